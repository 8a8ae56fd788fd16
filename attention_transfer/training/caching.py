"""Building a teacher cache from the part of a recipe that concerns images and teacher."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from attention_transfer._choices import Stored
from attention_transfer._errors import InputError
from attention_transfer._locks import locked
from attention_transfer._ranks import is_first_process
from attention_transfer._tables import duration
from attention_transfer.cache import Cache, Filler, Layout, Manifest, Shard, megabytes
from attention_transfer.data import DECODING, Batches, Splits, Views, data_fingerprint
from attention_transfer.runs.recipe import IMAGES, VALIDATION, Recipe, cache_fields, fields_of
from attention_transfer.training.build import build_teacher, load_splits
from attention_transfer.training.onlooker import Onlooker
from attention_transfer.training.processes import (
    Processes,
    local_device,
    only_first,
    together,
)
from attention_transfer.training.speed import choose_speed
from attention_transfer.training.telling import Say

SHARD_BYTES = 64 << 20  # seconds of work, so that a kill costs no more


def build_cache(
    recipe: Recipe,
    folder: str | Path,
    *,
    layers: Sequence[str] | None = None,
    dtype: Stored = "float16",
    say: Say,
    progress: Say = lambda line: None,
) -> Cache:
    """Store what the recipe's teacher sees in every view of every training image; go on if some is there.

    Args:
        recipe: images, augmentation, views (one if not given), teacher, p, mapping and precision count.
        folder: where the cache is, or is to be.
        layers: the teacher's layers; by default all that any student may be paired with.
        dtype: of the stored maps.
        say: takes a line for each thing that is to be known.
        progress: takes lines, each of which replaces the one before.

    Raises:
        ValueError: if settings, teacher and images do not fit each other, or the cache that is there.
        FileExistsError: if the folder holds other files.
        OSError: if it does not fit on the disk, or cannot be written; what is stored is whole.
    """
    say, progress = only_first(say), only_first(progress)
    speed = choose_speed(recipe)
    recipe = replace(_settled(recipe), precision=speed.precision)
    splits = load_splits(recipe)
    say(str(splits))
    say(str(speed))
    teacher = build_teacher(recipe, splits, lambda: _no_weights(recipe))
    assert teacher is not None  # the recipe's method has one
    onlooker = Onlooker.of(recipe, splits, teacher, layers, local_device(recipe))
    settings = {name: getattr(recipe, name) for name in cache_fields()}
    manifest = describe(recipe, splits, onlooker, dtype)
    manifest = replace(manifest, settings=settings | {"layers": layers, "dtype": dtype})
    # guard: one-build-a-cache
    with _alone(Path(folder)):
        if is_first_process():
            Cache.create(folder, manifest)
        with together(recipe, {"cache": manifest.identity, "views": manifest.views}, "cache") as processes:
            cache = Cache.read(folder)
            _fill(cache, recipe, splits, onlooker, processes, say, progress)
    return cache


def _alone(folder: Path) -> AbstractContextManager[None]:
    """Keep other builds out of a cache folder: of several processes the first does it for all."""
    message = (
        f"cache: {folder} is in use: {{holder}} builds there. Wait until it has ended, or pass another -o."
    )
    return locked(folder, message) if is_first_process() else nullcontext()


def _settled(recipe: Recipe) -> Recipe:
    """The recipe with what it leaves open about the images filled in, so that students can be held to it."""
    return replace(
        recipe.resolved(),
        views=recipe.views or 1,
        view_seed=recipe.view_seed or 0,
        split_seed=recipe.seed if recipe.split_seed is None else recipe.split_seed,
        validation=VALIDATION if recipe.validation is None else recipe.validation,
    )


def _no_weights(recipe: Recipe) -> NoReturn:
    raise InputError(
        f"cache: expected a trained teacher, got {recipe.teacher} without weights. "
        "Pass a run folder or a weights file, or --teacher-weights too."
    )


def describe(recipe: Recipe, splits: Splits, onlooker: Onlooker, dtype: Stored) -> Manifest:
    """The facts about the cache that a settled recipe makes."""
    manifest = Manifest(
        teacher=onlooker.teacher.name,
        teacher_fingerprint=onlooker.weights,
        teacher_input=onlooker.input,
        classes=onlooker.classes,
        class_names=tuple(onlooker.teacher.names) if onlooker.teacher.names else None,
        layers=onlooker.layers,
        p=recipe.p,
        mapping=recipe.mapping,
        dtype=dtype,
        precision=onlooker.precision,
        data=data_fingerprint(splits.train),
        images=len(splits.train),
        shape=splits.shape,
        mean=splits.mean,
        std=splits.std,
        pad=onlooker.augment.pad,
        flip=onlooker.augment.flip,
        view_seed=recipe.view_seed or 0,
        views=recipe.views or 1,
        shard_images=1,
        source={name: getattr(recipe, name) for name in fields_of(IMAGES)},
        version=version("attention-transfer"),
        decoding=DECODING,
    )
    return replace(manifest, shard_images=max(1, SHARD_BYTES // Layout.of(manifest).bytes))


def _fill(
    cache: Cache,
    recipe: Recipe,
    splits: Splits,
    onlooker: Onlooker,
    processes: Processes,
    say: Say,
    progress: Say,
) -> None:
    """Add what is missing; several processes deal the files out among themselves."""
    views = Views(cache.manifest.views, cache.manifest.view_seed)
    batches = Batches(
        splits.train,
        recipe.batch_size,
        shuffle=False,
        device=onlooker.device,
        workers=recipe.num_workers,
        views=views,
    )
    missing = cache.missing()
    processes.wait()  # until all of them have looked, and before any of them writes
    filler = Filler(
        cache,
        batches,
        lambda images, rows, view: onlooker(images, rows, view, views),
        # guard: cache-shared-out
        missing[processes.rank :: processes.size],
    )
    if filler.todo:
        _announce(filler, missing, processes.size, say)
        filler.run(_Meter(sum(map(len, missing)), processes.size, progress))
    processes.wait()


def _announce(filler: Filler, missing: Sequence[Shard], processes: int, say: Say) -> None:
    """What is to be done, and what it will take, before it starts."""
    facts, size = filler.cache.manifest, filler.cache.layout.bytes
    layers = ", ".join(f"{stage.name} {'x'.join(map(str, stage.shape[1:]))}" for stage in facts.layers)
    say(f"{facts.teacher} at {layers}, as {facts.dtype}: {size:,} bytes a record")
    rate = filler.images_per_second() * processes
    images, stored = sum(map(len, missing)), megabytes(sum(shard.bytes for shard in missing))
    shared = f" on {processes} processes" if processes > 1 else ""
    say(
        f"{images:,} of {facts.images * facts.views:,} records to go: {stored}, "
        f"about {duration(images / rate)} at {rate:,.0f} images/s{shared}"
    )


class _Meter:
    """Says how far it is; of several processes each is taken to be as far as this one."""

    def __init__(self, total: int, processes: int, show: Say) -> None:
        self.total, self.processes, self.show = total, processes, show
        self.done, self.start = 0, time.perf_counter()

    def __call__(self, count: int) -> None:
        self.done = min(self.total, self.done + count * self.processes)
        rate = self.done / (time.perf_counter() - self.start)
        left = duration((self.total - self.done) / rate)
        self.show(f"{self.done:,} of {self.total:,} records, {rate:,.0f} images/s, {left} left")
