"""A cache on disk with the teacher's reading of one batch, many times over."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from attention_transfer.cache import Cache, Manifest
from attention_transfer.pairs import Stage
from attention_transfer.terms import Energy, Reading

BATCHES, SHARD = 32, 1024


def readings_from_disk(
    reading: Reading, energy: Energy, names: Sequence[str], images: Tensor
) -> Callable[[], Reading]:
    """A function that looks the reading of these images up in a cache, each time in other places.

    The cache holds `BATCHES` times as many images, and which record is taken for an image is drawn anew, as a
    shuffled epoch would have it. Its files are in the system's memory, as they are after a first epoch.
    """
    count = len(images)
    with tempfile.TemporaryDirectory(prefix="cache-") as folder:
        cache = _fill(
            Cache.create(Path(folder, "cache"), _manifest(reading, energy, names, images)), reading, energy
        )
        layers, device = list(names), images.device
        place, generator = torch.arange(count), torch.Generator().manual_seed(0)

        def look_up() -> Reading:
            rows = place + count * torch.randint(BATCHES, (count,), generator=generator)
            logits, maps = cache.read_maps(rows, 0, layers, device=device)
            return Reading(logits, {energy: maps})

        look_up()  # maps the files into memory, where they stay when the folder goes
    return look_up


def _manifest(reading: Reading, energy: Energy, names: Sequence[str], images: Tensor) -> Manifest:
    layers = [Stage(name, shape, 1.0) for name, shape in zip(names, reading.shapes, strict=True)]
    channels, height, width = images.shape[1:]
    return Manifest(
        teacher="benchmark",
        teacher_fingerprint="",
        teacher_input=None,
        classes=reading.logits.shape[1],
        layers=tuple(layers),
        p=energy.p,
        mapping=energy.mapping,
        dtype="float16",
        precision="32-true",
        data="",
        images=BATCHES * len(images),
        shape=(channels, height, width),
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        pad=0,
        flip=False,
        view_seed=0,
        views=1,
        shard_images=SHARD,
    )


def _fill(cache: Cache, reading: Reading, energy: Energy) -> Cache:
    records = cache.layout.pack(reading.logits.float(), reading.energies[energy]).cpu()
    for shard in cache.shards(0):
        cache.write(shard, records[shard.rows % len(records)])
    return cache
