"""A teacher's maps and logits in a folder: what is there, what is not, and the records of a batch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from .._errors import InputError
from .._files import is_bookkeeping, remove_leftovers
from ..data.stamps import Stamp
from .manifest import FILE, Manifest
from .records import Layout
from .shards import MISSING, Shard

THREADS = 8  # each compares the checksum of its own file


@dataclass(eq=False)
class Cache:
    """The maps and logits of a teacher for fixed views of every training image.

    A record is of one view of one image, and serves that view alone. Nothing here flips or crops a map: the
    map of a flipped image is not the flipped map.
    """

    folder: Path
    manifest: Manifest
    _opened: dict[int, list[UInt8[np.ndarray, "_ _"]]] = field(default_factory=dict, repr=False)
    _compared: dict[Shard, Stamp] = field(
        default_factory=dict, repr=False
    )  # whose checksums are known to fit

    @classmethod
    def read(cls, folder: str | Path) -> Cache:
        """The cache in a folder, be it finished or not.

        Raises:
            FileNotFoundError, ValueError: as `Manifest.read`.
        """
        return cls(Path(folder), Manifest.read(Path(folder)))

    @classmethod
    def create(cls, folder: str | Path, manifest: Manifest) -> Cache:
        """Begin a cache in a new folder, or go on with the same one that is there, with more views if asked.

        Raises:
            FileExistsError: if the folder holds other files.
            ValueError: if it holds a cache of something else; the message says in what they differ.
            OSError: if it cannot be written, or what is missing does not fit on the disk.
        """
        cache = cls(Path(folder), _merge(Path(folder), manifest))
        cache._check_space()
        cache.folder.mkdir(parents=True, exist_ok=True)
        views = [path for path in cache.folder.glob("view-*") if not path.is_symlink()]
        remove_leftovers(cache.folder, *views)
        cache.manifest.write(cache.folder)
        return cache

    @property
    def layout(self) -> Layout:
        return Layout.of(self.manifest)

    def shards(self, view: int) -> list[Shard]:
        """The files of a view, whether they are there or not."""
        facts, size, identity = self.manifest, self.layout.bytes, self.manifest.identity
        return [
            Shard(view, first, min(first + facts.shard_images, facts.images), size, identity)
            for first in range(0, facts.images, facts.shard_images)
        ]

    def faults(self, views: int | None = None, *, deep: bool = False) -> Iterator[tuple[Shard, str | None]]:
        """Each file of the first `views` views (of all), and what is wrong with it; `deep` reads it all."""
        for view in range(self.manifest.views if views is None else views):
            for shard in self.shards(view):
                yield shard, shard.fault(self.folder, deep=deep)

    def missing(self) -> list[Shard]:
        """The files that are not there, or not as they should be."""
        return [shard for shard, fault in self.faults() if fault]

    def write(self, shard: Shard, records: UInt8[Tensor, "n r"]) -> None:
        """Store the records of a shard: all of them, or none.

        Raises:
            OSError: if they cannot be written; the message says how to go on.
        """
        try:
            shard.write(self.folder, records.numpy())
        except OSError as error:
            raise type(error)(
                f"cache: could not write {self.folder / shard.name}: {error.strerror or error}. All files "
                f"before it are whole. Make room, and go on with {self.build_command}"
            ) from error

    def require(self, views: int) -> None:
        """Make sure that the first `views` views can be served.

        Raises:
            ValueError: if there are not so many, the cache is unfinished, or a file is damaged or foreign.
        """
        if views > self.manifest.views:
            raise InputError(
                f"cache: expected {views} views in {self.folder}, got {self.manifest.views}. Pass --views "
                f"{self.manifest.views}, or add some: {self.build_command} --views {views}"
            )
        faults = list(self.faults(views))
        missing = [shard for shard, fault in faults if fault == MISSING]
        damaged = [
            f"{self.folder / shard.name} {fault}" for shard, fault in faults if fault not in (None, MISSING)
        ]
        if damaged:
            raise InputError(
                f"cache: {damaged[0]}. Build such files anew, the rest is kept: {self.build_command}"
            )
        if missing:
            raise InputError(
                f"cache: {self.folder} is unfinished: {len(missing)} of {len(faults)} files are missing. "
                f"Finish it: {self.build_command}"
            )

    @property
    def build_command(self) -> str:
        """What finishes the cache."""
        return f"attention-transfer cache build --resume {self.folder}"

    def read_records(
        self, rows: Int64[Tensor, " b"], view: int, *, pinned: bool = False
    ) -> UInt8[Tensor, "b r"]:
        """The records of one view of the images at `rows`.

        Raises:
            ValueError: if one of the view's files is damaged; all their checksums are compared when the view
                is asked for the first time, and again where a file has changed.
        """
        shards = self._open(view)
        records = torch.empty(len(rows), self.layout.bytes, dtype=torch.uint8, pin_memory=pinned)
        target = records.numpy()
        for place, row in enumerate(rows.tolist()):
            shard, within = divmod(row, self.manifest.shard_images)
            target[place] = shards[shard][within]
        return records

    def read_maps(
        self,
        rows: Int64[Tensor, " b"],
        view: int,
        layers: Sequence[str] = (),
        *,
        device: torch.device | str = "cpu",
    ) -> tuple[Float[Tensor, "b k"], list[Float[Tensor, "b _ _"]]]:
        """Logits, and the energy maps at `layers` up to a factor for each, of one view of the images."""
        names = [stage.name for stage in self.manifest.layers]
        on_gpu = torch.device(device).type == "cuda"
        records = self.read_records(rows, view, pinned=on_gpu).to(device, non_blocking=True)
        return self.layout.unpack(records, [names.index(layer) for layer in layers])

    def _open(self, view: int) -> list[UInt8[np.ndarray, "_ _"]]:
        """The records of a view; those of the view before are let go."""
        if view not in self._opened:
            self._opened.clear()
            with ThreadPoolExecutor(THREADS) as pool:
                self._opened[view] = list(pool.map(self._open_shard, self.shards(view)))
        return self._opened[view]

    def _open_shard(self, shard: Shard) -> UInt8[np.ndarray, "_ _"]:
        path = self.folder / shard.name
        stamp = Stamp.of(path)
        # guard: shard-checksums
        fault = shard.fault(self.folder, deep=self._compared.get(shard) != stamp)
        if fault:
            raise InputError(
                f"cache: {path} {fault}. Delete it, and build it anew, the rest is kept: {self.build_command}"
            )
        self._compared[shard] = stamp
        return shard.open(self.folder)

    def _check_space(self) -> None:
        """Before a long work begins: is there room for it?"""
        place = next(each for each in (self.folder, *self.folder.absolute().parents) if each.exists())
        needed, free = sum(shard.bytes for shard in self.missing()), shutil.disk_usage(place).free
        if needed > free:
            raise OSError(
                f"cache: expected {megabytes(needed)} of room in {self.folder}, got {megabytes(free)}. "
                "Choose another --output, fewer --views, or --dtype uint8."
            )


def _merge(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest for a folder, of which some work may be there."""
    if not folder.exists() or all(map(is_bookkeeping, folder.iterdir())):
        return manifest
    if not (folder / FILE).exists():
        raise FileExistsError(
            f"cache: {folder} exists and is no cache folder, so it stays. Pass another --output."
        )
    there = Manifest.read(folder)
    if not any(folder.glob("view-*/*.safetensors")):
        return manifest
    manifest = replace(manifest, shard_images=there.shard_images)
    if differences := there.differences(manifest):
        raise InputError(
            f"cache: {folder} holds another cache ({'; '.join(differences)}). "
            "Go on with the settings it was begun with, or pass another --output."
        )
    return replace(there, views=max(there.views, manifest.views), settings=manifest.settings)


def megabytes(count: int) -> str:
    """A number of bytes, readable."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"
