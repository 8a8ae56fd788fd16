"""Several files by one name, as a shell has it: train-{000..146}.tar, train-*.tar, {train,val}-?.tar."""

from __future__ import annotations

import os
import re
from glob import glob, has_magic
from pathlib import Path

RANGE = re.compile(r"(\d+)\.\.(\d+)")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|pipe:")  # not C:, a disk
BRACES = re.compile(r"\{([^{}]*)\}")


def is_url(name: str) -> bool:
    """Whether a name is an address of something that is not on a disk of this machine."""
    return URL.match(name) is not None


def at_home(name: str) -> Path:
    """A path with its ~ filled in; one of a user whom the system does not know is taken by the letter."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 (Path.expanduser raises a RuntimeError)


def cache_folder() -> Path | None:
    """Where this package keeps what it can get again; None where this user has no home."""
    folder = at_home("~/.cache/attention-transfer")
    return folder if folder.is_absolute() else None


def is_pattern(name: str) -> bool:
    """Whether a name stands for several files, and for none that is called so."""
    marked = has_magic(name) or BRACES.search(name)
    return bool(marked) and not is_url(name) and not at_home(name).exists()


def expand(pattern: str) -> list[Path]:
    """The files that a pattern stands for, sorted; every alternative in braces must be there.

    Raises:
        FileNotFoundError: if one is not.
    """
    found: set[Path] = set()
    for alternative in _alternatives(pattern):
        files = glob(str(at_home(alternative)), recursive=True)  # noqa: PTH207 (a whole path)
        if not files:
            raise FileNotFoundError(
                f"load_data: expected files by the pattern {pattern}, got none called {alternative}. "
                "Check the pattern, and that all files are there."
            )
        found.update(map(Path, files))
    return sorted(found)


def _alternatives(pattern: str) -> list[str]:
    braces = BRACES.search(pattern)
    if braces is None:
        return [pattern]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [rest for part in _parts(braces[1]) for rest in _alternatives(f"{before}{part}{after}")]


def _parts(text: str) -> list[str]:
    numbers = RANGE.fullmatch(text)
    if numbers is None:
        return text.split(",")
    first, last = numbers.groups()
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
