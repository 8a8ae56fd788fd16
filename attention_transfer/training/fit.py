"""Training runs from beginning to end: the one way in for `train`, `demo` and your own scripts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from attention_transfer._errors import InputError
from attention_transfer._extras import require
from attention_transfer._machine import commit, device_name
from attention_transfer._ranks import is_first_process
from attention_transfer._trust import trusting
from attention_transfer.data import Batches, Splits
from attention_transfer.models import fingerprint, load_weights, save_weights
from attention_transfer.runs.recipe import Recipe
from attention_transfer.runs.run import Run
from attention_transfer.training.build import (
    build_augment,
    build_distiller,
    build_student,
    build_teacher,
    build_views,
    has_unused_parameters,
    load_splits,
    trains_teacher,
)
from attention_transfer.training.cached import CachedTeacher, take_over
from attention_transfer.training.card import ModelCard
from attention_transfer.training.evaluation import evaluate_model
from attention_transfer.training.processes import (
    Processes,
    count,
    layout,
    only_first,
    quiet,
    together,
)
from attention_transfer.training.rehearsal import rehearse
from attention_transfer.training.speed import choose_speed, prepare, uncompiled
from attention_transfer.training.telling import Say, say_above_the_bar

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import Strategy

    from attention_transfer.distiller import Distiller
    from attention_transfer.training.callbacks import Checkpoints
    from attention_transfer.training.module import DistillationModule

EVALUATION_BATCH = 250


def train(recipe: Recipe, *, overwrite: bool = False, say: Say | None = None) -> Run:
    """Train a student as the recipe says, in a new run folder; a teacher that is to be trained comes first.

    Args:
        recipe: every setting of the run.
        overwrite: delete an earlier run in the same folder.
        say: takes each line of progress; by default they are printed, below a progress bar on a terminal.

    Raises:
        FileExistsError: if the run folder is there already.
        ValueError: if the settings do not fit each other, the models or the data.
        OSError: if data or weights cannot be read, or the run folder cannot be written.
        Interrupted: after Ctrl-C, when the state is saved.
    """
    require("lightning", extra="train", user="train")
    recipe.check_teacher_is_used()
    recipe = take_over(recipe).resolved()
    run = Run(recipe.folder)
    if is_first_process():
        run.check_free(overwrite=overwrite)
    with trusting(*recipe.factories):  # the card of a teacher that is trained first names it too
        return _start(run, recipe, say, lambda recipe: run.create(recipe, overwrite=overwrite))


def resume(folder: str | Path, *, say: Say | None = None, **places: Any) -> Run:
    """Go on with an interrupted run, exactly where it stopped; a finished run is returned as it is.

    `places` are fields of the recipe about the place, where it is to go on elsewhere than it was begun.

    Raises:
        FileNotFoundError: if the folder is not a run folder.
        ValueError, OSError, Interrupted: as `train`.
    """
    require("lightning", extra="train", user="resume")
    run = Run(Path(folder).absolute())
    if run.finished:
        return run
    return _start(run, take_over(replace(run.recipe, **places, output=str(run.folder))), say)


def _start(run: Run, recipe: Recipe, say: Say | None, create: Callable[[Recipe], None] | None = None) -> Run:
    """Build and check what can be before any other process is started; `create` makes the run folder."""
    # guard: output-name
    run.check_name()
    splits = load_splits(recipe)
    student = build_student(recipe, splits)
    cached = CachedTeacher.of(recipe, splits, student) if recipe.cache else None
    _check_processes(recipe)
    if trains_teacher(recipe) and not run.teacher.finished:
        rehearse(recipe, splits, student, recipe.for_teacher())
    speed = choose_speed(recipe)
    recipe = replace(recipe, precision=speed.precision)  # what the folder keeps repeats the run anywhere
    tell = only_first(say or say_above_the_bar)
    # guard: one-training-a-folder
    with _alone(run):
        if create is None and run.finished:  # by another process, which has just ended
            return run
        if create and is_first_process():
            create(recipe)
        # guard: run-folder-links
        run.check_links()
        tell(str(speed))
        with together(recipe, _facts(splits), "train") as processes:
            _check_shared(run)
            return _fit(run, recipe, splits, student, cached, processes, tell)


def _alone(run: Run) -> AbstractContextManager[None]:
    """Keep other trainings out of a run folder: of several processes the first does it for all."""
    return run.alone() if is_first_process() else nullcontext()


def _check_processes(recipe: Recipe) -> None:
    """Raise ValueError if a batch cannot be shared, or skipped, by the processes that there will be."""
    size = count(recipe)
    Processes(size=size).share_of(recipe.batch_size)
    if recipe.not_finite == "skip" and size > 1:
        raise InputError(
            f'train: not_finite "skip" works in one process, got {size}, of which each sees a part of the '
            "batch. Leave --not-finite out, or pass --devices 1."
        )


def _facts(splits: Splits) -> dict[str, Any]:
    """What processes that see the same images agree in."""
    held = splits.validation
    return {
        "training images": len(splits.train),
        "validation images": None if held is None else len(held),
        "shape of images": list(splits.shape),
        "classes": list(splits.classes),
    }


def _check_shared(run: Run) -> None:
    """Raise ValueError if another machine's run folder is not seen on this one."""
    if not run.exists:
        raise InputError(
            f"train: expected the run folder on every machine, got no {run.folder} here. "
            "Pass an --output on a disk that all of them share."
        )


def _fit(
    run: Run,
    recipe: Recipe,
    splits: Splits,
    student: nn.Module,
    cached: CachedTeacher | None,
    processes: Processes,
    tell: Say,
) -> Run:
    """Train a built student in a run folder that is there, from its last checkpoint if it has one."""
    from attention_transfer.training.callbacks import Checkpoints
    from attention_transfer.training.checkpoints import check_fits, checkpoint_to_resume
    from attention_transfer.training.module import DistillationModule

    if is_first_process():
        # guard: sweep-before-start
        run.sweep()
    last = checkpoint_to_resume(run, tell)
    tell(str(splits))
    if processes.size > 1:
        tell(processes.plan(recipe.batch_size))
    weights: str | None
    if cached is not None:
        tell(f"{cached}\n{cached.images_of(recipe)}")
        distiller, weights = cached.distiller(recipe, student), cached.fingerprint
    else:
        distiller, weights = _with_teacher(run, recipe, splits, student, processes, tell)
    strategy = build_strategy(recipe, distiller, splits, processes)
    prepare(student, compiled=recipe.compile)
    checkpoints = Checkpoints(run, recipe.checkpoint_minutes)
    with quiet():
        trainer = build_trainer(run, recipe, strategy, splits, checkpoints, tell)
        loaders = _Loaders(recipe, splits, processes, trainer.strategy.root_device)
        if loaders.train.drop_last:
            tell("note: the last batch would leave a process less than two images; every epoch goes without")
        module = DistillationModule(
            recipe,
            distiller,
            build_augment(recipe, splits),
            loaders.train,
            classes=splits.classes,
            cached=cached,
            teacher=weights,
            say=tell,
        )
        if last is not None:
            check_fits(run, last, trainer, module)
        try:
            trainer.fit(module, loaders.train, loaders.validation, ckpt_path=last, weights_only=True)
        except SystemExit:  # Lightning's answer to a second Ctrl-C
            raise KeyboardInterrupt from None
    if trainer.is_global_zero:
        _finish(run, recipe, splits, module, checkpoints)
    processes.wait()
    return run


def _with_teacher(
    run: Run, recipe: Recipe, splits: Splits, student: nn.Module, processes: Processes, tell: Say
) -> tuple[Distiller, str | None]:
    """The student beside its teacher, which is trained first where need be, and the teacher's fingerprint."""
    teacher = build_teacher(recipe, splits, lambda: _train_teacher(run, recipe, splits, processes, tell))
    distiller = build_distiller(recipe, student, teacher, torch.zeros(2, *splits.shape))
    if teacher is None:
        return distiller, None
    prepare(teacher.model, compiled=recipe.compile)
    return distiller, fingerprint(teacher.model)


def _train_teacher(run: Run, recipe: Recipe, splits: Splits, processes: Processes, tell: Say) -> Run:
    """Train the teacher inside the run folder, or go on with it, or take it as it is there."""
    teacher_recipe = recipe.for_teacher()
    _check_teacher(run.teacher, teacher_recipe)
    if run.teacher.finished:
        return run.teacher
    tell(f"First the teacher: {recipe.teacher}, epochs: {teacher_recipe.epochs}")
    with _alone(run.teacher):
        if is_first_process() and not run.teacher.exists:
            run.teacher.create(teacher_recipe)
        student = build_student(teacher_recipe, splits, role="teacher")
        _fit(run.teacher, teacher_recipe, splits, student, None, processes, tell)
    tell(f"Now the student: {recipe.student}, epochs: {recipe.epochs}")
    return run.teacher


def _check_teacher(teacher: Run, recipe: Recipe) -> None:
    """Raise FileExistsError if the folder of a teacher that is trained first holds a run of another."""
    if teacher.exists and (differences := teacher.recipe.differences(recipe)):
        raise FileExistsError(
            f"train: {teacher.folder} holds another run than that of this teacher: they differ in "
            f"{', '.join(differences)}. Move it away, or learn from it: --teacher {teacher.folder}"
        )


class _Loaders:
    """The batches of this process."""

    def __init__(self, recipe: Recipe, splits: Splits, processes: Processes, device: torch.device) -> None:
        share = processes.share_of(recipe.batch_size)
        common: dict[str, Any] = {
            # guard: rows-of-each-process
            "rank": processes.rank,
            "world_size": processes.size,
            "device": device,
            "workers": recipe.num_workers,
        }
        self.train = Batches(
            splits.train,
            share,
            shuffle=True,
            seed=recipe.seed,
            views=build_views(recipe),
            drop_last=_last_batch_is_too_small(len(splits.train), recipe.batch_size, processes.size),
            **common,
        )
        self.validation = None
        if splits.validation is not None:
            self.validation = Batches(splits.validation, share, shuffle=False, **common)
        for images in (splits.train, splits.validation):
            _check_enough(images, processes.size)


def _last_batch_is_too_small(images: int, batch: int, processes: int) -> bool:
    """One image alone has no batch statistics: a last batch without two for each process is left out."""
    return images > batch and 1 <= images % batch < 2 * processes


def _check_enough(images: Sized | None, processes: int) -> None:
    if images is not None and processes > 1 and len(images) < 2 * processes:
        raise InputError(
            f"train: expected two images at least for each of {processes} processes, got {len(images)}. "
            "Use fewer --devices."
        )


def build_strategy(
    recipe: Recipe, distiller: Distiller, splits: Splits, processes: Processes
) -> str | Strategy:
    """The recipe's strategy; "auto" looks whether DDP has to search for parameters without a gradient."""
    if recipe.strategy != "auto" or processes.size == 1:
        return recipe.strategy
    from lightning.pytorch.strategies import DDPStrategy

    unused = has_unused_parameters(distiller.student, torch.zeros(2, *splits.shape))
    return DDPStrategy(find_unused_parameters=unused)


def build_trainer(
    run: Run, recipe: Recipe, strategy: str | Strategy, splits: Splits, checkpoints: Checkpoints, say: Say
) -> Trainer:
    """Lightning's trainer for a recipe, without its chatter."""
    from lightning.pytorch import Trainer

    from attention_transfer.training.callbacks import EpochLog, ProgressBar, StopOnSignal
    from attention_transfer.training.checkpoints import SafeCheckpointIO
    from attention_transfer.training.loggers import build_loggers
    from attention_transfer.training.recorder import MapRecorder

    precision: Any = recipe.precision
    recorder = MapRecorder(run.maps, splits, recipe.epochs)
    devices, nodes = layout(recipe)
    plugins: list[Any] = [SafeCheckpointIO(run.last_checkpoint)]
    if recipe.sync_batchnorm:
        from attention_transfer.training.batchnorm import SharedBatchNorm

        plugins.append(SharedBatchNorm())
    progress = [ProgressBar()] if say is say_above_the_bar and sys.stdout.isatty() else []
    return Trainer(
        accelerator=recipe.accelerator,
        devices=devices or "auto",
        num_nodes=nodes,
        strategy=strategy,
        plugins=plugins,
        precision=precision,
        max_epochs=recipe.epochs,
        gradient_clip_val=recipe.gradient_clip,
        callbacks=[EpochLog(run, say), recorder, checkpoints, StopOnSignal(run), *progress],
        logger=build_loggers(run, recipe),
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=bool(progress),
        default_root_dir=run.folder,
    )


def _finish(
    run: Run,
    recipe: Recipe,
    splits: Splits,
    module: DistillationModule,
    checkpoints: Checkpoints,
) -> None:
    """Write the student's weights, measure it on the test images, and write result.json."""
    student, rows = module.student, run.read_metrics()
    kept = rows[-1]
    if recipe.keep == "best":
        load_weights(student, run.best_checkpoint)
        kept = rows[checkpoints.best_epoch - 1]
    card = _card(recipe, splits)
    save_weights(student, run.student_weights, card.as_metadata())
    normalise = card.augment().to(module.device).normalise
    with uncompiled(recipe.compile):  # as `evaluate` will measure it
        test = evaluate_model(
            student,
            evaluation_batches(splits),
            normalise,
            device=module.device,
            not_finite=recipe.not_finite,
        )
    if test.unanswered:
        module.say(
            f"warning: {test.unanswered:,} of {len(test.labels):,} test images have logits that are not "
            "finite, which count as wrong answers"
        )
    run.write_result(
        {
            "test_error": test.error,
            "test_top5_error": test.top5_error,
            "test_unanswered": test.unanswered,
            "validation_error": float(kept["val/error"]) if "val/error" in kept else None,
            "best_epoch": checkpoints.best_epoch,
            "parameters": sum(p.numel() for p in student.parameters()),
            "seed": recipe.seed,
            "images_per_second": fmean(float(row["images_per_second"]) for row in rows),
            "data_share": fmean(float(row["data_share"]) for row in rows),
            "wall_seconds": checkpoints.wall_seconds,
            "method": recipe.method,
            "teacher_fingerprint": module.teacher_fingerprint,
            "weights": {term.name: term.full_weight for term in module.distiller.terms},
            "plan": module.distiller.plan().as_dicts(),
            "machine": _machine(module.device),
        }
    )


def _machine(device: torch.device) -> dict[str, Any]:
    """Where the numbers of a run come from."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "version": version("attention-transfer"),
        "commit": commit(),
    }


def _card(recipe: Recipe, splits: Splits) -> ModelCard:
    return ModelCard(
        model=recipe.student,
        classes=list(splits.classes),
        in_channels=splits.in_channels,
        image_size=list(splits.shape[1:]),
        mean=list(splits.mean),
        std=list(splits.std),
        crop=splits.test.crop,
    )


def evaluation_batches(splits: Splits) -> Batches:
    """The test images, in order."""
    return Batches(splits.test, EVALUATION_BATCH, shuffle=False)
