"""Filling a cache: the teacher looks once at every view of every image, and what it saw is stored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from .._errors import InputError
from ..data import Batches
from .shards import Shard
from .store import Cache

MEASURED = 2  # batches

Maps = tuple[Float[Tensor, "b k"], Sequence[Float[Tensor, "b _ _"]]]
Look = Callable[[UInt8[Tensor, "b c h w"], Int64[Tensor, " b"], int], Maps]


class Filler:
    """What is left to do at a cache, and doing it: a file at a time, in order, each stored once it is full.

    Args:
        cache: where it goes.
        batches: the training images, with the cache's views.
        look: from images, their rows and the view's number to the teacher's logits and the energy map at each
            layer of the cache.
        todo: the files that are to be filled; by default all that are missing.
    """

    def __init__(
        self, cache: Cache, batches: Batches, look: Look, todo: Sequence[Shard] | None = None
    ) -> None:
        self.cache, self.batches, self.look = cache, batches, look
        self.todo = cache.missing() if todo is None else todo

    @property
    def images(self) -> int:
        """How many views of images are to be looked at."""
        return sum(map(len, self.todo))

    @property
    def bytes(self) -> int:
        """What they will take on the disk."""
        return sum(shard.bytes for shard in self.todo)

    def images_per_second(self) -> float:
        """A quick measurement, of the batches that come after the first, which warms everything up.

        Raises:
            ValueError: as `run`.
        """
        parts = self.todo[0].rows.split(self.batches.batch_size)
        stream = self._records(self.todo[0].view, [*parts, *parts][: 1 + MEASURED])
        next(stream)
        start = time.perf_counter()
        return sum(map(len, stream)) / (time.perf_counter() - start)

    def run(self, progress: Callable[[int], None]) -> None:
        """Do what is left; `progress` takes the number of images of each batch that is done.

        Raises:
            ValueError: if the teacher gives a number that is not finite, or an image cannot be decoded.
            OSError: if a file cannot be written; what is stored stays whole.
        """
        for view, shards in groupby(self.todo, key=lambda shard: shard.view):
            self._fill_view(view, list(shards), progress)

    def _fill_view(self, view: int, shards: list[Shard], progress: Callable[[int], None]) -> None:
        parts = [shard.rows.split(self.batches.batch_size) for shard in shards]
        stream = self._records(view, [rows for chunk in parts for rows in chunk])
        for shard, chunk in zip(shards, parts, strict=True):
            records = []
            for rows in chunk:
                records.append(next(stream))
                progress(len(rows))
            self.cache.write(shard, torch.cat(records))

    def _records(self, view: int, rows: Sequence[Int64[Tensor, " _"]]) -> Iterator[UInt8[Tensor, "_ r"]]:
        self.batches.set_epoch(view)
        for images, _, chosen in self.batches.fetch(rows):
            logits, maps = self.look(images, chosen, view)
            self._check(logits, maps, chosen)
            yield self.cache.layout.pack(logits, maps).cpu()

    def _check(self, logits: Tensor, maps: Sequence[Tensor], rows: Int64[Tensor, " b"]) -> None:
        """Neither NaN nor infinity can be learned from, and float16 must hold the logits."""
        names = [f"the map of {stage.name}" for stage in self.cache.manifest.layers]
        for what, tensor in zip(["the logits", *names], [logits.half(), *maps], strict=True):
            bad = ~tensor.flatten(1).isfinite().all(1)
            if bad.any():
                raise InputError(
                    f"cache: expected finite numbers from the teacher, got NaN or infinity in {what} for "
                    f"training image {int(rows[bad.cpu()][0])}. Build with --precision 32-true, or look at "
                    "its weights and at the normalisation it expects."
                )
