"""The files of a cache: safetensors of records, each whole or not there, and each able to prove itself.

A shard bears the identity of its cache, its place in it and the SHA-256 of its records in its header, which
is written with the records in one go: there is no moment in which one is there without the other.
"""

from __future__ import annotations

import hashlib
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from safetensors.numpy import save
from torch import Tensor

from .._errors import InputError
from .._files import write_atomically
from .._reading import open_file, parse_json

NAME = "records"
MISSING = "is missing"
OUTSIDE = "lies outside the cache, through a link"
LONGEST_HEADER = 1 << 20  # bytes; one takes 200


@dataclass(frozen=True)
class Shard:
    """The records of the images `first` to `stop` - 1 in one view."""

    view: int
    first: int
    stop: int
    record_bytes: int
    cache: str  # the identity of the cache it belongs to

    def __len__(self) -> int:
        return self.stop - self.first

    @property
    def bytes(self) -> int:
        """Bytes of its records, the header apart."""
        return len(self) * self.record_bytes

    @property
    def name(self) -> str:
        """Its place in the folder."""
        return f"view-{self.view}/{self.first:09}.safetensors"

    @property
    def rows(self) -> Int64[Tensor, " n"]:
        """The positions of its images in the training set."""
        return torch.arange(self.first, self.stop)

    def write(self, folder: Path, records: UInt8[np.ndarray, "n r"]) -> None:
        """Write the file, whole or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        assert records.shape == (len(self), self.record_bytes)
        path = folder / self.name
        path.parent.mkdir(exist_ok=True)
        if not _is_inside(path.parent, folder):
            raise OSError(f"its folder {OUTSIDE}")
        checksum = hashlib.sha256(records.data).hexdigest()
        write_atomically(path, save({NAME: records}, {**self._place(), "sha256": checksum}))

    def fault(self, folder: Path, *, deep: bool = False) -> str | None:
        """What is wrong with the file: None if nothing is. `deep` reads it all, for its checksum."""
        path = folder / self.name
        if not path.is_file():
            return MISSING
        if not _is_inside(path, folder):
            return OUTSIDE
        try:
            header, start = _read_header(path)
            stored = header[NAME]["shape"], header[NAME]["dtype"]
            notes = header["__metadata__"]
            offsets = header[NAME]["data_offsets"]
            own = {name: notes.get(name) for name in self._place()}
        except (ValueError, KeyError, TypeError, AttributeError):
            return "is damaged: its header cannot be read"
        if own != self._place():
            return "belongs to another cache, or to another place in this one"
        size, expected = path.stat().st_size, start + self.bytes
        if stored != ([len(self), self.record_bytes], "U8") or offsets != [0, self.bytes]:
            return f"is damaged: its header speaks of {stored!s:.80}"
        if size != expected:
            return f"is damaged: it has {size:,} bytes, not {expected:,}"
        if deep and hashlib.sha256(self.open(folder).data).hexdigest() != notes.get("sha256"):
            return "is damaged: its checksum does not fit its content"
        return None

    def open(self, folder: Path) -> UInt8[np.ndarray, "n r"]:
        """Its records, mapped into memory and read only; a file without fault."""
        path = folder / self.name
        _, start = _read_header(path)
        with open_file(path) as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, np.uint8, self.bytes, start).reshape(len(self), self.record_bytes)

    def _place(self) -> dict[str, str]:
        return {"cache": self.cache, "view": str(self.view), "first": str(self.first)}


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file begins with the length of its header in 8 bytes, then the header as JSON."""
    with open_file(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(path.stat().st_size, LONGEST_HEADER):
            raise InputError("a header longer than the file")
        return parse_json(file.read(length)), 8 + length


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a path of the cache is really there, and no link to elsewhere."""
    # guard: shard-in-its-folder
    return path.resolve().is_relative_to(folder.resolve())
