"""All that this package writes and deletes: whole or not at all, never through a link, nothing of others."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from ._locks import LOCK, InUseError, locked

Content = bytes | memoryview | str | Callable[[BinaryIO], object]

_LEFTOVER = re.compile(r"\.attention-transfer-[0-9a-f]{16}\.tmp")
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def write_atomically(path: Path, content: Content, *, keep: Path | None = None) -> None:
    """Write beside `path`, then rename: at every moment `path` is the old file or the new one, whole.

    Args:
        path: the file; its folder may be reached through links, the file itself may not be one.
        content: text (UTF-8), bytes, or a function that writes into the open file it is given. It fills
            memory: a library that writes by itself never sees a full disk.
        keep: the old file is renamed to this first: for the moment between the two, there is only that.

    Raises:
        OSError: if it cannot be written, or a link or a folder is there; the old file is intact.
    """
    # guard: written-file-follows-no-link
    check_writable(path)
    data = _filled(content) if callable(content) else content
    temporary = path.with_name(_temporary_name())
    try:
        # guard: temporary-name-is-new, mode-by-umask
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            check_writable(keep)
            path.replace(keep)
        # guard: whole-files
        temporary.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(path), None  # a full disk is said without a name
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def check_writable(path: Path) -> None:
    """Make sure that nothing but an earlier file is at `path`.

    Raises:
        OSError: if a link is there, which may lead anywhere, or a folder, a pipe, a device.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, "A link is there, through which nothing is written; remove it", str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "Something is there that is not a file", str(path))


def open_to_append(path: Path) -> TextIO:
    """A file that text is added to, as it comes; it need not be there yet.

    Raises:
        OSError: as `write_atomically`.
    """
    check_writable(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_LINK, 0o666)
    return os.fdopen(descriptor, "a", newline="", encoding="utf-8")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to be filled, which takes its place in the end; after an error it is gone.

    What a killed process left of one is deleted first.

    Raises:
        OSError: if it cannot be made, or `path` is there and is not an empty folder in the end.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    # guard: abandoned-files-removed
    _remove_abandoned(path.parent)
    new = path.with_name(_temporary_name())
    new.mkdir()
    try:
        with locked(new, str(new)):
            yield new
            (new / LOCK).unlink()
            new.replace(path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Delete folders that `new_folder` made in processes that are no more."""
    for left in [path for path in folder.iterdir() if is_leftover(path) and (path / LOCK).is_file()]:
        with contextlib.suppress(OSError, InUseError), locked(left, str(left)):
            shutil.rmtree(left)


def is_leftover(path: Path) -> bool:
    """Whether something was being written by this package when its process was killed, or still is."""
    return _LEFTOVER.fullmatch(path.name) is not None and not path.is_symlink()


def is_bookkeeping(path: Path) -> bool:
    """Whether something is there on this package's own account: it makes a folder none of somebody else's."""
    return path.name == LOCK or is_leftover(path)


def remove_leftovers(*folders: Path) -> None:
    """Delete files that a killed process has left half-written, where no other process writes."""
    for folder in folders:
        for path in list(folder.glob(".*")):
            if is_leftover(path) and path.is_file():
                path.unlink(missing_ok=True)


def links_in(folder: Path) -> Iterator[Path]:
    """The links in a folder and the folders in it, none of which is followed."""
    for here, folders, files in os.walk(folder):
        yield from (path for name in (*folders, *files) if (path := Path(here, name)).is_symlink())


def remove_written(folder: Path, patterns: Iterable[str]) -> None:
    """Delete the files in `folder` that fit one of `patterns`, such as "view-*/*.safetensors".

    Folders that this leaves empty go too, `folder` itself apart. What is a link, or lies behind one, stays.

    Raises:
        OSError: if a file cannot be deleted.
    """
    emptied = set()
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        within = [parent for parent in path.parents if parent.is_relative_to(folder) and parent != folder]
        if path.is_file() and not any(each.is_symlink() for each in (path, *within)):
            path.unlink()
            emptied.update(within)
    for each in sorted(emptied, key=lambda each: len(each.parts), reverse=True):
        with contextlib.suppress(OSError):  # something else is in there
            each.rmdir()


def _temporary_name() -> str:
    """A name that nobody can know before; a long one of the file's own would not fit into it."""
    return f".attention-transfer-{secrets.token_hex(8)}.tmp"


def _filled(write: Callable[[BinaryIO], object]) -> memoryview:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getbuffer()
