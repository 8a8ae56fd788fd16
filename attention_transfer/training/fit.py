"""Training runs from beginning to end: the one way in for `train`, `demo` and your own scripts."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from attention_transfer._extras import require
from attention_transfer._machine import commit, device_name
from attention_transfer._reading import one_line
from attention_transfer.data import Batches, Splits
from attention_transfer.models import fingerprint, load_weights, save_weights
from attention_transfer.models.weights import read_checkpoint
from attention_transfer.training.build import (
    build_augment,
    build_distiller,
    build_student,
    build_teacher,
    build_views,
    load_splits,
)
from attention_transfer.training.cached import CachedTeacher, take_over
from attention_transfer.training.card import ModelCard
from attention_transfer.training.evaluation import evaluate_model
from attention_transfer.training.recipe import Recipe
from attention_transfer.training.run import Run
from attention_transfer.training.speed import choose_speed, prepare, uncompiled

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from attention_transfer.distiller import Distiller
    from attention_transfer.training.callbacks import Checkpoints
    from attention_transfer.training.module import DistillationModule

EVALUATION_BATCH = 250

CHECKPOINT = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "training_totals"}
"""What a run needs of its checkpoint to go on."""

Say = Callable[[str], None]


def _print(line: str) -> None:
    """Print a line, above the progress bar if there is one."""
    from tqdm import tqdm

    if is_first_process():
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


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
    recipe = take_over(recipe.resolved())
    run = Run(recipe.folder)
    if is_first_process():
        run.check_free(overwrite=overwrite)
    splits = load_splits(recipe)
    student = build_student(recipe, splits)
    cached = CachedTeacher.of(recipe, splits, student) if recipe.cache else None
    speed = choose_speed(recipe)
    recipe = replace(recipe, precision=speed.precision)  # what the folder keeps repeats the run anywhere
    if is_first_process():
        run.create(recipe, overwrite=overwrite)
    (say or _print)(str(speed))
    return _fit(run, recipe, splits, student, cached, say)


def resume(folder: str | Path, *, say: Say | None = None) -> Run:
    """Go on with an interrupted run, exactly where it stopped; a finished run is returned as it is.

    Raises:
        FileNotFoundError: if the folder is not a run folder.
        ValueError, OSError, Interrupted: as `train`.
    """
    require("lightning", extra="train", user="resume")
    run = Run(Path(folder).absolute())
    if run.finished:
        return run
    recipe = take_over(replace(run.recipe, output=str(run.folder)))
    splits = load_splits(recipe)
    student = build_student(recipe, splits)
    cached = CachedTeacher.of(recipe, splits, student) if recipe.cache else None
    speed = choose_speed(recipe)
    recipe = replace(recipe, precision=speed.precision)
    (say or _print)(str(speed))
    return _fit(run, recipe, splits, student, cached, say)


def _fit(
    run: Run,
    recipe: Recipe,
    splits: Splits,
    student: nn.Module,
    cached: CachedTeacher | None,
    say: Say | None,
) -> Run:
    """Train a built student in a run folder that is there, from its last checkpoint if it has one."""
    from attention_transfer.training.callbacks import Checkpoints
    from attention_transfer.training.module import DistillationModule

    last = _checkpoint_to_resume(run)
    tell = say or _print
    tell(str(splits))
    weights: str | None
    if cached is not None:
        tell(str(cached))
        distiller, weights = cached.distiller(recipe, student), cached.fingerprint
    else:
        distiller, weights = _with_teacher(run, recipe, splits, student, say)
    prepare(student, compiled=recipe.compile)
    checkpoints = Checkpoints(run)
    with quiet():
        trainer = build_trainer(run, recipe, checkpoints, say)
        loaders = _Loaders(recipe, splits, trainer)
        if loaders.train.drop_last:
            tell("note: the last batch would hold one image; every epoch leaves it out")
        module = DistillationModule(
            recipe,
            distiller,
            build_augment(recipe, splits),
            len(loaders.train),
            views=loaders.train.views,
            cached=cached,
            teacher=weights,
            say=tell,
        )
        try:
            trainer.fit(module, loaders.train, loaders.validation, ckpt_path=last, weights_only=True)
        except SystemExit:  # Lightning's answer to a second Ctrl-C
            raise KeyboardInterrupt from None
        # what is missing in a checkpoint, or does not fit, ends in any exception before the first step
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError) as error:
            if last is None or checkpoints.started or str(error).startswith("train: "):
                raise
            raise _unusable(run, error) from error
    if trainer.is_global_zero:
        _finish(run, recipe, splits, module, checkpoints)
    trainer.strategy.barrier()
    return run


def _with_teacher(
    run: Run, recipe: Recipe, splits: Splits, student: nn.Module, say: Say | None
) -> tuple[Distiller, str | None]:
    """The student beside its teacher, which is trained first where need be, and the teacher's fingerprint."""
    teacher = build_teacher(recipe, splits, lambda: _train_teacher(run, recipe, splits, say))
    distiller = build_distiller(recipe, student, teacher, torch.zeros(2, *splits.shape))
    if teacher is None:
        return distiller, None
    prepare(teacher.model, compiled=recipe.compile)
    return distiller, fingerprint(teacher.model)


def _checkpoint_to_resume(run: Run) -> Path | None:
    """The run's last checkpoint, once it has been seen to be whole."""
    if not run.last_checkpoint.is_file():
        return None
    try:
        checkpoint = read_checkpoint(run.last_checkpoint, mmap=True)
    except ValueError as error:
        raise _unusable(run, error.__cause__ or error) from None
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= CHECKPOINT:
        raise _unusable(run, "it is no checkpoint of a run")
    return run.last_checkpoint


def _unusable(run: Run, reason: object) -> ValueError:
    return ValueError(
        f"resume: expected a whole checkpoint, got {run.last_checkpoint}, which is damaged or foreign "
        f"({one_line(reason)[:160]}). Put {run.best_checkpoint.name} in its place to go on from there."
    )


def _train_teacher(run: Run, recipe: Recipe, splits: Splits, say: Say | None) -> Run:
    """Train the teacher inside the run folder, or go on with it, or take it as it is there."""
    if run.teacher.finished:
        return run.teacher
    teacher_recipe = recipe.for_teacher()
    (say or _print)(f"First the teacher: {recipe.teacher}, epochs: {teacher_recipe.epochs}")
    if is_first_process() and not run.teacher.holds_work:
        run.teacher.create(teacher_recipe)
    _fit(run.teacher, teacher_recipe, splits, build_student(teacher_recipe, splits), None, say)
    (say or _print)(f"Now the student: {recipe.student}, epochs: {recipe.epochs}")
    return run.teacher


class _Loaders:
    """The batches of this process."""

    def __init__(self, recipe: Recipe, splits: Splits, trainer: Trainer) -> None:
        common: dict[str, Any] = {
            "rank": trainer.global_rank,
            "world_size": trainer.world_size,
            "device": trainer.strategy.root_device,
            "workers": recipe.num_workers,
        }
        self.train = Batches(
            splits.train,
            recipe.batch_size,
            shuffle=True,
            seed=recipe.seed,
            views=build_views(recipe),
            drop_last=_last_batch_is_one(
                len(splits.train), recipe.batch_size * trainer.world_size, trainer.world_size
            ),
            **common,
        )
        self.validation = None
        if splits.validation is not None:
            self.validation = Batches(splits.validation, recipe.batch_size, shuffle=False, **common)


def _last_batch_is_one(images: int, batch: int, processes: int) -> bool:
    """One image alone has no batch statistics: a last batch of one for each process is left out."""
    return images > batch and 1 <= images % batch <= processes


def build_trainer(run: Run, recipe: Recipe, checkpoints: Checkpoints, say: Say | None) -> Trainer:
    """Lightning's trainer for a recipe, without its chatter."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import TensorBoardLogger

    from attention_transfer.training.callbacks import EpochLog, ProgressBar, StopOnSignal

    precision: Any = recipe.precision
    progress = [ProgressBar()] if say is None and sys.stdout.isatty() else []
    return Trainer(
        accelerator=recipe.accelerator,
        devices=recipe.devices or "auto",
        num_nodes=recipe.nodes,
        precision=precision,
        max_epochs=recipe.epochs,
        gradient_clip_val=recipe.gradient_clip,
        callbacks=[EpochLog(run, say or _print), checkpoints, StopOnSignal(run), *progress],
        logger=TensorBoardLogger(run.folder, name="tensorboard", version=""),
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
        test = evaluate_model(student, evaluation_batches(splits), normalise, device=module.device)
    run.write_result(
        {
            "test_error": test.error,
            "test_top5_error": test.top5_error,
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
    )


def evaluation_batches(splits: Splits) -> Batches:
    """The test images, in order."""
    return Batches(splits.test, EVALUATION_BATCH, shuffle=False)


def is_first_process() -> bool:
    """Whether this process is the one of several that writes and prints."""
    from lightning.pytorch.utilities import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) == 0


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning without its tips and its advice on data loaders; its errors stay."""
    from lightning.fabric.utilities.warnings import PossibleUserWarning

    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=PossibleUserWarning)
        warnings.filterwarnings("ignore", module=r"lightning\.")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
