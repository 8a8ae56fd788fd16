"""Batches in an order that depends on seed and epoch alone: sharded over ranks, resumable anywhere."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .._errors import InputError
from .._reading import one_line
from .images import Images, StreamedImages
from .order import Layout
from .randomness import keyed_generator
from .views import Views

MOST_WORKERS = 8
SHARED = Path("/dev/shm")  # where Linux keeps memory that processes share
Batch = Any  # (images, labels); with fixed views (images, labels, rows)


class Batches:
    """Iterate over (images uint8 (b, c, h, w), labels (b,)), as often as wished.

    With `views` it is (images, labels, rows): the positions of the images, on the CPU, by which `Augment`
    makes the view that the epoch shows.

    In-memory images are gathered on `device`, where they are kept; streamed ones are decoded by worker
    processes. Where those lie in shards, their order keeps together what lies together: stretches of 16 MiB
    (of parquet files: row groups) are put into random order, and all images within a window of up to 64 of
    them are shuffled; a global batch is dealt out by stretches, so that each rank reads others.

    Each pass is one epoch, and the next pass is the next epoch, unless `set_epoch` says otherwise. A global
    batch of `batch_size * world_size` images is dealt out to the ranks like cards, so that the ranks together
    see what one rank with the larger batch would see, each image once. Every rank gets equally many batches;
    in a last batch that does not divide by `world_size` the shares differ by one image, and may be empty.

    Args:
        images: what to iterate over.
        batch_size: images a batch, on each rank.
        shuffle: a new order each epoch, by (seed, epoch); otherwise the given order.
        seed: of the order, and of the crops of streamed images.
        drop_last: leave out a last batch that is not full.
        rank: which of the `world_size` shares is ours.
        world_size: number of processes.
        device: where the batches are delivered.
        workers: processes that decode streamed images; by default one a core, at most 8. 0 decodes here.
        views: show these fixed views, and deliver the rows. The crops of streamed images follow them too.

    Attributes:
        epoch: of the batch that comes next.
        seconds: spent waiting for batches so far; set it to 0 to measure anew.

    Raises:
        ValueError: if a size or the rank is out of range, or there would be no batch at all.
    """

    def __init__(
        self,
        images: Images | StreamedImages,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        workers: int | None = None,
        views: Views | None = None,
    ) -> None:
        self.images = images
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)
        self.workers = _default_workers() if workers is None else workers
        self.views = views
        self.epoch = 0
        self.seconds = 0.0
        self._position = 0  # batches of this epoch already delivered
        self._resume_at = 0  # where the next pass starts: not 0 only after load_state_dict
        self._on_device: tuple[Tensor, Tensor] | None = None
        self._layout = images.layout() if isinstance(images, StreamedImages) else None
        self._latest: tuple[int, tuple[Tensor, ...], Layout | None] | None = None
        self._check()

    def __len__(self) -> int:
        whole, rest = divmod(len(self.images), self.batch_size * self.world_size)
        return whole if self.drop_last or not rest else whole + 1

    def __iter__(self) -> Iterator[Batch]:
        # A generator reads the state at its first `next`: Lightning calls iter() before it sets the epoch.
        start, self._resume_at = self._resume_at, 0
        batches = self.fetch(self.rows(self.epoch)[start:])
        for delivered in range(start + 1, len(self) + 1):
            batch = self._timed(lambda: next(batches))
            # Before the yield, not after: the consumer may stop at the last batch and never come back.
            self._advance_to(delivered)
            yield batch

    def whole(self, index: int) -> int:
        """How many images all ranks together have in batch `index` of an epoch."""
        full = self.batch_size * self.world_size
        return min(full, len(self.images) - index * full)

    batch_sampler = None  # Lightning looks for one beside a sampler

    @property
    def sampler(self) -> Batches:
        """Itself: Lightning announces epochs by `loader.sampler.set_epoch(epoch)`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be this epoch. The position within the epoch is kept if it is the present one."""
        if epoch != self.epoch:
            self.epoch, self._position, self._resume_at = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """The epoch and position of the batch that comes next."""
        return {"epoch": self.epoch, "position": self._position, "seed": self.seed, "length": len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass start where `state` was taken.

        Raises:
            ValueError: if the state was taken within an epoch of another seed or number of batches.
        """
        expected = {"seed": self.seed, "length": len(self)}
        if state["position"] and any(state[key] != value for key, value in expected.items()):
            raise InputError(
                f"Batches.load_state_dict: expected a position among {len(self)} batches "
                f"of seed {self.seed}, got one among {state['length']} of seed {state['seed']}. "
                "Resume with the settings of the interrupted run."
            )
        self.epoch = state["epoch"]
        # guard: resume-position
        self._position = self._resume_at = state["position"]

    def rows(self, epoch: int) -> list[Int64[Tensor, " _"]]:
        """The positions in `images` of each batch of this rank."""
        whole, layout = self._whole_batches(epoch)
        return [rows[self._share(rows, layout)] for rows in whole]

    def share(self, epoch: int, index: int) -> slice | Int64[Tensor, " _"]:
        """Which images of the batch of all ranks are this rank's, in an epoch's batch `index`."""
        if self._layout is None or self.world_size == 1:
            return slice(self.rank, None, self.world_size)
        if self._latest is None or self._latest[0] != epoch:  # an order of millions is not for every step
            self._latest = epoch, *self._whole_batches(epoch)
        _, whole, layout = self._latest
        return self._share(whole[index], layout)

    def fetch(self, rows: Sequence[Int64[Tensor, " _"]]) -> Iterator[Batch]:
        """The images at these rows as they are in the present epoch, a batch for each entry."""
        streamed = isinstance(self.images, StreamedImages)
        batches = self._fetch_streamed(rows) if streamed else self._fetch_in_memory(rows)
        for (images, labels), chosen in zip(batches, rows, strict=True):
            yield (images, labels) if self.views is None else (images, labels, chosen)

    def _order(self, epoch: int) -> tuple[Int64[Tensor, " n"], Layout | None]:
        if not self.shuffle:
            return torch.arange(len(self.images)), self._layout
        generator = keyed_generator(self.seed, epoch)
        if self._layout is None:
            return torch.randperm(len(self.images), generator=generator), None
        return self._layout.shuffle(generator)

    def _whole_batches(self, epoch: int) -> tuple[tuple[Int64[Tensor, " _"], ...], Layout | None]:
        """The batches of all ranks together, and how their images lie in that order."""
        order, layout = self._order(epoch)
        if self.drop_last:
            order = order[: len(self) * self.batch_size * self.world_size]
        return order.split(self.batch_size * self.world_size), layout

    def _share(self, rows: Int64[Tensor, " _"], layout: Layout | None) -> slice | Int64[Tensor, " _"]:
        if layout is None or self.world_size == 1:
            return slice(self.rank, None, self.world_size)
        return layout.share(rows, self.rank, self.world_size)

    def _advance_to(self, delivered: int) -> None:
        if delivered == len(self):
            self.epoch, self._position = self.epoch + 1, 0
        else:
            self._position = delivered

    def _timed(self, fetch: Callable[[], Batch]) -> Batch:
        start = time.perf_counter()
        batch = fetch()
        self.seconds += time.perf_counter() - start
        return batch

    def _fetch_in_memory(self, rows: Sequence[Int64[Tensor, " _"]]) -> Iterator[tuple[Tensor, Tensor]]:
        assert isinstance(self.images, Images)
        if self._on_device is None:
            self._on_device = self.images.images.to(self.device), self.images.labels.to(self.device)
        pixels, labels = self._on_device
        for chosen in rows:
            index = chosen.to(self.device, non_blocking=True)
            yield pixels.index_select(0, index), labels.index_select(0, index)

    def _fetch_streamed(self, rows: Sequence[Int64[Tensor, " _"]]) -> Iterator[tuple[Tensor, Tensor]]:
        assert isinstance(self.images, StreamedImages)
        views = self.views
        crops = (self.seed, self.epoch) if views is None else (views.seed, views.of_epoch(self.epoch))
        loader = DataLoader(
            _Epoch(self.images, *crops, ahead=self._layout is not None),
            batch_sampler=[chosen.tolist() for chosen in rows],
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda",
        )
        # guard: dead-worker
        for (images, error), chosen in zip(_or_the_reason(loader), rows, strict=True):
            if error:
                raise InputError(error)
            if isinstance(images, np.ndarray):
                _warn_of_pipes()
                images = torch.from_numpy(images)
            labels = self.images.labels[chosen]
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def _check(self) -> None:
        if self.batch_size < 1:
            raise InputError(
                f"Batches: expected batch_size >= 1, got {self.batch_size}. Pass a positive number."
            )
        if not 0 <= self.rank < self.world_size:
            raise InputError(
                f"Batches: expected 0 <= rank < world_size, got rank {self.rank} of {self.world_size}. "
                "Ranks count from 0."
            )
        if len(self) == 0:
            raise InputError(
                f"Batches: expected at least one batch, got {len(self.images)} images for batches of "
                f"{self.batch_size} x {self.world_size}. Pass a smaller batch_size, or drop_last=False."
            )


class _Epoch(Dataset):
    """One epoch of streamed images, as the workers see it: a list of rows in, images or an error out."""

    def __init__(self, images: StreamedImages, seed: int, epoch: int, *, ahead: bool) -> None:
        self.images = images
        self.seed = seed
        self.epoch = epoch
        self.ahead = ahead

    def __getitems__(self, rows: list[int]) -> tuple[Tensor | np.ndarray, str]:
        if not rows:
            return torch.empty(0, *self.images.shape, dtype=torch.uint8), ""
        # An exception would arrive wrapped in the worker's traceback; a message arrives as it is.
        try:
            if self.ahead:
                for row in rows:
                    self.images.expect(row)
            decoded = [self.images.decode(row, seed=self.seed, epoch=self.epoch) for row in rows]
        except ValueError as error:
            return torch.empty(0), str(error)
        return _shared(torch.stack(decoded)), ""


def _shared(images: Tensor) -> Tensor | np.ndarray:
    """Images in memory that the training process shares; as an array, which goes through a pipe, if there is
    no room for them.

    PyTorch would only find out in a thread that passes them on, which loses them: the loader waits for ever.
    """
    if get_worker_info() is None:
        return images
    try:
        # guard: little-shared-memory
        return images.share_memory_()
    except (RuntimeError, OSError):
        return images.numpy()


def _warn_of_pipes() -> None:
    room = f"{SHARED} ({shutil.disk_usage(SHARED).total:,} bytes)" if SHARED.is_dir() else "shared memory"
    warnings.warn(
        f"Batches: the images that processes decode do not fit into {room}: they come through pipes, which "
        "takes longer. Make it larger, such as by docker run --shm-size=8g, or use fewer processes: "
        "num_workers.",
        stacklevel=2,
    )


def _or_the_reason(loader: DataLoader) -> Iterator[Any]:
    """What the loader gives; that a worker has died, or cannot be started, in one line."""
    try:
        batches = iter(loader)
    except OSError as error:  # semaphores lie in /dev/shm too
        raise ChildProcessError(
            f"Batches: cannot start {loader.num_workers} processes that decode images "
            f"({error.strerror or one_line(error)}). Make room in {SHARED} and in memory, or pass "
            "num_workers=0, which decodes in the training process."
        ) from None
    try:
        yield from batches
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ChildProcessError(
            f"Batches: expected {loader.num_workers} processes that decode images, got one that died "
            f"({error}). If memory ran out, pass fewer: num_workers=0 decodes in the training process."
        ) from None


def _as_it_is(batch: Any) -> Any:
    return batch


def _default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores)
