"""One process a folder: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"
"""The file in a folder that is locked."""

PATIENCE = 1.0  # seconds: whoever looks whether a lock is held holds it for a moment


class InUseError(BlockingIOError):
    """Another process works in the folder."""


@contextmanager
def locked(folder: Path, message: str, name: str = LOCK) -> Iterator[None]:
    """Keep other processes that lock the same file out of `folder`, which is made where it is missing.

    Args:
        folder: the folder.
        message: what the error says, with {holder} where it names the other process.
        name: of the lock's file.

    Raises:
        InUseError: if another process holds the lock.
        OSError: if the folder or the file cannot be made.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    if file.exists() and not file.is_file():
        raise OSError(errno.EEXIST, "Something is there that is not a file", str(file))
    lock = FileLock(file)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise InUseError(message.replace("{holder}", _holder(file))) from None
    try:
        _sign(file)
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held: whoever has it open looks whether it is still there
        lock.release()


def is_locked(folder: Path, name: str = LOCK) -> bool:
    """Whether a process holds the folder's lock; looking changes nothing."""
    from filelock import FileLock, Timeout

    if not (folder / name).is_file():
        return False
    try:
        with FileLock(folder / name, timeout=0):
            return False
    except Timeout:
        return True


def _sign(file: Path) -> None:
    """Write into a lock's file who holds it."""
    descriptor = os.open(file, os.O_WRONLY | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0))
    with os.fdopen(descriptor, "w", encoding="ascii", errors="replace") as stream:
        stream.write(f"{os.getpid()} {platform.node()}")


def _holder(file: Path) -> str:
    """The process that signed, such as "process 1234 on gpu-2"."""
    with file.open("rb") as stream:
        words = stream.read(300).decode("ascii", "replace").split()
    if len(words) != 2 or not words[0].isdecimal():
        return "another process"
    return f"process {words[0]}" + ("" if words[1] == platform.node() else f" on {words[1]}")
