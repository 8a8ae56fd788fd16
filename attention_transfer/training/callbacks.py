"""What happens around the training step: rows of metrics, checkpoints, the progress bar, Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from attention_transfer._tables import duration, printable
from attention_transfer.runs.run import Interrupted, Run
from attention_transfer.training.module import DistillationModule
from attention_transfer.training.telling import Line

AGREE_EVERY = 10  # steps between which several processes agree whether to stop or to save


class EpochLog(Callback):
    """Writes each epoch into metrics.csv and the loggers, and says it in a line."""

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self.run, self.say = run, say
        self._started = 0.0, 0  # when, and how many steps had been taken before

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter(), trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DistillationModule)
        row = pl_module.epoch_row()
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in row.items() if k != "step"}, step=trainer.global_step)
        if trainer.is_global_zero:
            self.run.write_metrics(row)
            left = self._seconds_left(trainer)
            text = describe_epoch(row, trainer.max_epochs) + (f"  {duration(left)} left" if left else "")
            self.say(Line(text, "epoch", **row, epochs=trainer.max_epochs, seconds_left=left))

    def _seconds_left(self, trainer: Trainer) -> float:
        """By the steps that this process has taken, validation and checkpoints among them."""
        started, before = self._started
        taken = trainer.global_step - before
        total = trainer.global_step / (trainer.current_epoch + 1) * (trainer.max_epochs or 0)
        return (time.perf_counter() - started) / max(1, taken) * (total - trainer.global_step)


def describe_epoch(row: dict[str, float], epochs: int | None) -> str:
    """A row of metrics.csv as readable text."""
    terms = [f"{name[6:]} {value:.3f}" for name, value in row.items() if name.startswith("train/")]
    errors = [f"validation error {row['val/error']:.1f} %"] if "val/error" in row else []
    head = f"epoch {row['epoch']:.0f}/{epochs}"
    terms = [term if not term.startswith("error") else f"error {row['train/error']:.1f} %" for term in terms]
    return "  ".join([head, *terms, *errors, f"{row['images_per_second']:.0f} images/s"])


class Checkpoints(Checkpoint):
    """Saves last.ckpt after every epoch, and best.ckpt after each with the least validation error so far.

    Within an epoch last.ckpt is saved every `minutes`, and where the next batch cannot be had: a file that
    has vanished or a worker that died costs no step.

    Lightning's own ModelCheckpoint forgets the best score when the run folder has moved.
    """

    def __init__(self, run: Run, minutes: float) -> None:
        self.run, self.minutes = run, minutes
        self.best_error, self.best_epoch = float("inf"), 0
        self._before, self._started = 0.0, time.perf_counter()
        self._saved = self._started
        self._between_steps = False

    @property
    def wall_seconds(self) -> float:
        """How long the run has taken, with what came before an interruption."""
        return self._before + time.perf_counter() - self._started

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DistillationModule)
        error = pl_module.validation_totals.means(trainer.strategy.reduce).get("error")
        if error is None or error < self.best_error:
            self.best_error = float("inf") if error is None else error
            self.best_epoch = trainer.current_epoch + 1
            trainer.save_checkpoint(self.run.best_checkpoint)
        self._save(trainer)

    def on_train_batch_start(self, *args: Any) -> None:
        self._between_steps = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._between_steps = not trainer.is_last_batch
        # guard: save-often
        due = time.perf_counter() - self._saved >= 60 * self.minutes
        if self._between_steps and any_process(trainer, due, batch_idx):
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        has_saved = isinstance(exception, Interrupted) or not isinstance(exception, Exception)
        # guard: save-on-failure
        if self._between_steps and trainer.world_size == 1 and not has_saved:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.run.last_checkpoint)
        self._saved = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {"best_error": self.best_error, "best_epoch": self.best_epoch, "seconds": self.wall_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_error, self.best_epoch = state_dict["best_error"], state_dict["best_epoch"]
        self._before = state_dict["seconds"]


class StopOnSignal(Checkpoint):
    """On Ctrl-C or SIGTERM: finishes the step, saves last.ckpt, and raises `Interrupted`.

    The step is finished first because an optimizer that is stopped half-way leaves weights that no
    uninterrupted run ever had; after an epoch's last step the epoch is finished too. A second Ctrl-C stops
    at once; the last checkpoint on disk stays good. As a `Checkpoint` it comes after `Checkpoints`.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.received: int | None = None
        self._former: dict[int, Any] = {}
        self._over = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After Lightning has put its own handlers, which speak with the other processes at any moment, even
        # in the midst of a step; these agree between steps.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_last_batch and self._should_stop(trainer, batch_idx):
            trainer.save_checkpoint(self.run.last_checkpoint)
            raise Interrupted(self.received or signal.SIGINT)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._should_stop(trainer, batch_idx=0):
            raise Interrupted(self.received or signal.SIGINT)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _should_stop(self, trainer: Trainer, batch_idx: int) -> bool:
        return any_process(trainer, self.received is not None, batch_idx)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None or self._over:
            self._restore()
            signal.raise_signal(number)
        self.received = number

    def _restore(self) -> None:
        self._over = True  # and no more: Lightning puts `_note` back when it tidies up after an exception
        for number, handler in self._former.items():
            signal.signal(number, handler)


def any_process(trainer: Trainer, wanted: bool, batch_idx: int) -> bool:
    """Whether one of the processes wants it; several ask each other only every few steps."""
    if trainer.world_size == 1:
        return wanted
    if batch_idx % AGREE_EVERY:
        return False
    return trainer.strategy.reduce_boolean_decision(wanted, all=False)


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with the epoch's mean loss terms and images/s; lines are said above it."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10, leave=False)

    def on_train_epoch_start(self, trainer: Trainer, *rest: Any) -> None:
        super().on_train_epoch_start(trainer, *rest)
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)  # over before it can be read

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        assert isinstance(pl_module, DistillationModule)
        means = pl_module.training_totals.means()
        return {printable(name): f"{mean:.3f}" for name, mean in means.items()} | {
            "images/s": f"{pl_module.clock.images_per_second:.0f}"
        }
