"""Noticing that a file is not what it was."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .._errors import InputError
from .._reading import check_regular


@dataclass(frozen=True)
class Stamp:
    """A file's size in bytes and the time of its last change in nanoseconds."""

    size: int
    changed: int

    @classmethod
    def of(cls, file: Path | int) -> Stamp:
        """The stamp of a path or an open file.

        Raises:
            OSError: if it is not there, or no file.
        """
        if isinstance(file, Path):
            check_regular(file)
        found = file.stat() if isinstance(file, Path) else os.fstat(file)
        return cls(found.st_size, found.st_mtime_ns)


def check_unchanged(path: Path, stamp: Stamp, file: int | None = None) -> None:
    """Refuse a file, opened as `file` or not, that was changed since its stamp was taken.

    Raises:
        OSError: if it is gone.
        ValueError: if it was changed.
    """
    if Stamp.of(path if file is None else file) != stamp:
        raise InputError(
            f"load_data: {path} was changed while its images were in use. "
            "Leave the data as it is during a run, and start again."
        )
