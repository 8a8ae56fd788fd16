"""Tar shards in the manner of WebDataset: images read in place, KEY.jpg labelled by KEY.cls or KEY.json."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._errors import InputError
from .._pictures import LARGEST
from .._reading import open_descriptor
from .decode import Stretches
from .sources import RawSplit, Source, group_by_split, numbered_classes
from .stamps import check_unchanged
from .tar_index import Shard, index_shards, printable

CLASSES = "classes.txt"
STRETCH_BYTES = 16 << 20  # far more than a disk delivers while it looks for the place
WINDOW = 64  # stretches, a gibibyte: some 9,000 images of ImageNet are shuffled at a time
OPEN_FILES = 64


class TarMembers:
    """The images of one or more tar files, one after the other, each read when asked for."""

    def __init__(self, files: Sequence[Path], shards: Sequence[Shard]) -> None:
        self.files = list(files)
        self.stamps = [shard.stamp for shard in shards]
        self.names = b"".join(shard.names for shard in shards)
        self.name_ends = np.flatnonzero(np.frombuffer(self.names, np.uint8) == 0)
        self.offsets = np.concatenate([shard.offsets for shard in shards])
        self.sizes = np.concatenate([shard.sizes for shard in shards])
        self.ends = np.array(list(accumulate(len(shard.labels) for shard in shards)))
        ends = _stretch_ends(np.repeat(np.arange(len(files)), np.diff(self.ends, prepend=0)), self.offsets)
        self.stretches = Stretches(torch.from_numpy(ends), WINDOW, whole=False)
        self._prepare()

    def _prepare(self) -> None:
        self._open = lru_cache(OPEN_FILES)(lambda file: _File(self.files[file]))
        self._read_ahead = lru_cache(4 * WINDOW)(self._ask_for_stretch)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_open", "_read_ahead")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare()

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, row: int) -> bytes:
        file = self._file_of(row)
        opened = self._open(file)
        check_unchanged(self.files[file], self.stamps[file], opened.number)
        if self.sizes[row] > LARGEST:
            raise InputError(f"more than {LARGEST:,} bytes")
        return os.pread(opened.number, int(self.sizes[row]), int(self.offsets[row]))

    def name(self, row: int) -> str:
        return f"{self.files[self._file_of(row)]}, member {printable(self._member(row))}"

    def identify(self, rows: Sequence[int]) -> Iterator[str]:
        return (f"{printable(self._member(row))} {self.sizes[row]}" for row in rows)

    def expect(self, row: int) -> None:
        stretch = int(torch.searchsorted(self.stretches.ends, row, right=True))
        with contextlib.suppress(OSError):  # reading tells
            self._read_ahead(stretch)

    def _ask_for_stretch(self, stretch: int) -> None:
        """Have the system read a stretch from the disk in one go, for all processes of this machine."""
        if not hasattr(os, "posix_fadvise"):
            return
        first = int(self.stretches.ends[stretch - 1]) if stretch else 0
        last = int(self.stretches.ends[stretch]) - 1
        start, end = self.offsets[first], self.offsets[last] + self.sizes[last]
        opened = self._open(self._file_of(first))
        os.posix_fadvise(opened.number, int(start), int(end - start), os.POSIX_FADV_WILLNEED)

    def _file_of(self, row: int) -> int:
        return int(np.searchsorted(self.ends, row, side="right"))

    def _member(self, row: int) -> str:
        start = self.name_ends[row - 1] + 1 if row else 0
        return self.names[start : self.name_ends[row]].decode("utf-8", "surrogateescape")


class _File:
    """An open file, closed when nobody holds it any more: a thread may read from one that another lets go."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = open_descriptor(path)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def _stretch_ends(file: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The row after the last one of each stretch of `STRETCH_BYTES` of a file."""
    stretch = np.stack([file, offsets // STRETCH_BYTES])
    changes = np.flatnonzero((stretch[:, 1:] != stretch[:, :-1]).any(0)) + 1
    return np.append(changes, len(offsets)).astype(np.int64)


def read_tars(files: Sequence[Path], place: Path, label_field: str | None = None) -> Source:
    """Find the images and read their labels; no image is read yet.

    Files belong to splits by their names, as `group_by_split` has it. Classes are named in `classes.txt` of
    the data set's folder, a line each, or else by their numbers.

    Raises:
        ValueError: if a file is damaged, or has an image without a label, or a class has no name.
        OSError: if a file cannot be read.
    """
    folder = place if place.is_dir() else place.parent
    groups, notes = group_by_split(files, place)
    paths = [path for members in groups.values() for path in members]
    shards = dict(zip(paths, index_shards(paths, folder, label_field), strict=True))
    splits = {name: _read_split(members, shards) for name, members in groups.items()}
    return Source(splits, _named_classes(folder / CLASSES, numbered_classes(splits)), str(place), notes=notes)


def _read_split(files: Sequence[Path], shards: dict[Path, Shard]) -> RawSplit:
    found = [shards[file] for file in files]
    return RawSplit(TarMembers(files, found), torch.from_numpy(np.concatenate([s.labels for s in found])))


def _named_classes(path: Path, numbers: list[str]) -> list[str]:
    if not path.is_file():
        return numbers
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(
            f"load_data: expected UTF-8 text in {path}, got something else. Save it so."
        ) from None
    names = [line.strip() for line in lines if line.strip()]
    if len(names) < len(numbers):
        raise InputError(
            f"load_data: expected the names of classes 0 to {numbers[-1]} in {path}, a line each, got "
            f"{len(names)}. Add the others, or remove the file."
        )
    return names
