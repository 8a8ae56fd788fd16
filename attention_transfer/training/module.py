"""The training step: a Lightning module around the distiller, exactly repeatable from any batch on."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float, Int, Int64, UInt8
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from attention_transfer._errors import InputError
from attention_transfer._outputs import logits_of
from attention_transfer.data import Augment, Batches
from attention_transfer.distiller import Distiller
from attention_transfer.preflight import PreflightWarning
from attention_transfer.runs.recipe import Recipe
from attention_transfer.terms.term import Reading
from attention_transfer.training.cached import CachedTeacher
from attention_transfer.training.finite import (
    LOOK_EVERY,
    MOST_IN_A_ROW,
    FirstBad,
    SavedBuffers,
    dump_batch,
    parameters_are_finite,
)
from attention_transfer.training.speed import uncompiled
from attention_transfer.training.telling import Line

AUTO_BATCHES = 8  # first batches from which the weights that are left open are found


class DistillationModule(LightningModule):
    """Trains `distiller.student` on batches of uint8 images, which it augments on the device.

    Every random number of a step follows from (seed, epoch, batch), and from the process too for what is
    drawn inside of models, such as dropout: a resumed run draws what the uninterrupted run would have drawn,
    and crops and flips do not depend on the number of processes. The state dict is the student's alone.
    """

    def __init__(
        self,
        recipe: Recipe,
        distiller: Distiller,
        augment: Augment,
        batches: Batches,
        *,
        classes: Sequence[str] | None = None,
        cached: CachedTeacher | None = None,
        teacher: str | None,
        say: Callable[[str], None],
    ) -> None:
        """`batches` are the training images, of which this process may have a share.

        `teacher` is the fingerprint of the teacher's weights, which checkpoints carry in their place.

        `classes` are the labels' names, by which a run that goes on knows them again.
        `cached` gives, by position and view, what a teacher made of the images that is not at hand.
        """
        super().__init__()
        self.say = say
        self.recipe, self.distiller, self.augment = recipe, distiller, augment
        self.batches, self.steps_per_epoch, self.views = batches, len(batches), batches.views
        self.teacher_fingerprint, self.cached = teacher, cached
        self.classes = None if classes is None else list(classes)
        self.training_totals, self.validation_totals = Totals(), Totals()
        self._unclassified = Totals()  # of the validation images: those whose logits are not finite
        self.clock = Clock()
        self.learning_rate = recipe.lr
        self._found: dict[str, list[float]] = {}
        self._first_bad, self._skipped_in_a_row = FirstBad(), 0

    @property
    def student(self) -> nn.Module:
        """The model that is trained."""
        return self.distiller.student

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return self.student.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return self.student.load_state_dict(state_dict, *args, **kwargs)

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        optimizer = torch.optim.SGD(
            self.distiller.parameters(),  # the student's, and those that terms learn beside it
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
        )
        scheduler = build_schedule(optimizer, recipe, self.steps_per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        self.training_totals.clear()
        self._first_bad.clear()
        self.clock = Clock()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.clock.data_has_come()
        if self.recipe.reset_momentum and self.global_step in rate_drops(self.recipe, self.steps_per_epoch):
            self.trainer.optimizers[0].state.clear()
        self._seed(batch_idx, process=0)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # Batches delivers on the device, but for the rows, which are looked up on the CPU

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Float[Tensor, ""] | None:
        images, labels, *rows = batch
        self.learning_rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        inputs = self._augmented(images, batch_idx, *rows).contiguous(memory_format=torch.channels_last)
        if self.global_rank:
            self._seed(batch_idx, process=self.global_rank)
        teacher = self._recalled(*rows)
        self.distiller.advance(self.global_step / (self.recipe.epochs * self.steps_per_epoch))
        if self.global_step < AUTO_BATCHES:
            self._balance(inputs, labels, teacher, self._share(batch_idx, len(labels)))
        if self.global_step == 0:
            self._preflight(inputs, labels, teacher)
        before = SavedBuffers(self.student) if self.recipe.not_finite == "skip" else None
        with self._uncompiled_if_partial(labels):
            out = self.distiller(inputs, labels, teacher=teacher)
        if self._to_be_skipped(out.loss, batch_idx, before):
            return None
        wrong = (out.logits.detach().argmax(1) != labels).float().mean()
        self.training_totals.add({"loss": out.loss, **out.terms, "error": 100 * wrong}, len(labels))
        share = self._share(batch_idx, len(labels))
        # guard: share-of-the-loss
        return out.loss if share == 1 else out.loss * share  # the mean over processes is that over images

    def _share(self, batch_idx: int, images: int) -> float:
        """What our mean over `images` counts for in the mean over the processes; 1 for equal shares."""
        return images * self.batches.world_size / self.batches.whole(batch_idx)

    def _seed(self, batch_idx: int, *, process: int) -> None:
        seed_generators(step_seed(self.recipe.seed, self.current_epoch, batch_idx, process), self.device)

    def _mean(self, ours: Tensor) -> Tensor:
        """The mean over the processes: what one of them trips over, all do."""
        # guard: mean-over-processes
        return self.trainer.strategy.reduce(ours, reduce_op="mean")

    def _balance(self, inputs: Tensor, labels: Tensor, teacher: Reading | None, share: float) -> None:
        """Each weight that was left open is the mean over the first batches, whoever holds their images."""

        def total(squares: list[float]) -> list[float]:
            return self._mean(torch.tensor(squares, device=self.device, dtype=torch.float32)).tolist()

        weights = self.distiller.balance(inputs, labels, teacher=teacher, share=share, total=total)
        for name, weight in weights.items():
            found = self._found.setdefault(name, [])
            found.append(weight)
            self.distiller.settle({name: fmean(found)})
            if len(found) == AUTO_BATCHES:
                self.say(f"{name}: weight {fmean(found):.3g}, from the first {AUTO_BATCHES} batches")

    def _augmented(
        self, images: UInt8[Tensor, "b c h w"], batch_idx: int, *rows: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        if self.views is None:
            ours = self.batches.share(self.current_epoch, batch_idx)
            # guard: draws-of-the-whole-batch
            return self.augment(images, whole=self.batches.whole(batch_idx), share=ours)
        return self.augment.view(images, rows[0], self.views, self.views.of_epoch(self.current_epoch))

    def _recalled(self, *rows: Int64[Tensor, " b"]) -> Reading | None:
        """What the cached teacher made of this epoch's view of the images; None with a live one, or none."""
        if self.cached is None or self.views is None:
            return None
        return self.cached(rows[0], self.views.of_epoch(self.current_epoch), self.device)

    def _uncompiled_if_partial(self, labels: Tensor) -> AbstractContextManager[object]:
        """A last batch of fewer images is not worth minutes of compiling once more."""
        return uncompiled(self.recipe.compile and len(labels) < self.batches.batch_size)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.clock.step_has_ended(len(batch[1]))

    def on_validation_epoch_start(self) -> None:
        self.validation_totals.clear()
        self._unclassified.clear()

    def validation_step(
        self, batch: tuple[UInt8[Tensor, "b c h w"], Int[Tensor, " b"]], batch_idx: int
    ) -> None:
        images, labels = batch
        if not len(labels):  # the other processes have the whole of a small last batch
            return
        with self._uncompiled_if_partial(labels):
            logits = logits_of(self.student(self.augment.normalise(images)), user="train").float()
        finite = logits.isfinite().all(1)
        self._unclassified.add({"images": (~finite).float().mean()}, len(labels))
        if self.recipe.not_finite == "skip":
            logits, labels = logits[finite], labels[finite]
        if not len(labels):
            self.validation_totals.add(dict.fromkeys(("loss", "error"), logits.new_zeros(())), 0)
            return
        wrong = (logits.argmax(1) != labels).float().mean()
        self.validation_totals.add(
            {"loss": F.cross_entropy(logits, labels), "error": 100 * wrong}, len(labels)
        )

    def epoch_row(self) -> dict[str, float]:
        """The epoch that has just ended, as a row of metrics.csv; the same on every process.

        Raises:
            FloatingPointError: if a loss was not finite, or the logits of validation images.
        """
        self._stop_if_bad()
        self._look_at_unclassified()
        training = self.training_totals.means(self.trainer.strategy.reduce)
        validation = self.validation_totals.means(self.trainer.strategy.reduce)
        return {
            "epoch": self.current_epoch + 1,
            "step": self.global_step,
            "lr": self.learning_rate,
            **{f"train/{name}": value for name, value in training.items()},
            **{f"val/{name}": value for name, value in validation.items()},
            **{f"weight/{name}": value for name, value in self.distiller.weights().items()},
            "images_per_second": self.clock.images_per_second * self.trainer.world_size,
            "seconds": self.clock.seconds,
            "data_share": self.clock.data_share,
        }

    def _look_at_unclassified(self) -> None:
        """Raise FloatingPointError for validation images without finite logits that are not to be skipped."""
        sums, images = self._unclassified.together(self.trainer.strategy.reduce)
        bad = round(sums["images"].item()) if sums else 0
        if not bad:
            return
        where = f"{bad:,} of {images:,} validation images in epoch {self.current_epoch + 1}"
        if self.recipe.not_finite == "skip" and bad < images:
            self.say(f"warning: skipped {where}, whose logits are not finite")
            return
        raise FloatingPointError(
            f"train: expected finite logits, got NaN or infinite ones for {where}; checkpoints/ holds an "
            "earlier state. Lower --lr, pass --gradient-clip 1 or --precision 32-true or, for bad images, "
            "--not-finite skip."
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["teacher_fingerprint"] = self.teacher_fingerprint
        checkpoint["classes"] = self.classes
        checkpoint["terms"] = self.distiller.terms.state_dict()
        checkpoint["found_weights"] = self._found
        checkpoint["training_totals"] = self.training_totals.state_dict(self.trainer.strategy.reduce)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the epoch's sums.

        Raises:
            ValueError: if the checkpoint was made with another teacher, or with other classes.
        """
        if self.classes != (known := checkpoint.get("classes") or self.classes):
            raise InputError(
                f"train: expected the classes that the run began with, {', '.join(known or ())[:200]}, got "
                f"{', '.join(self.classes or ())[:200]}. Put the data back as it was, or start over with "
                "--overwrite."
            )
        before = checkpoint.get("teacher_fingerprint")
        # guard: same-teacher-on-resume
        if before != self.teacher_fingerprint:
            raise InputError(
                f"train: expected the teacher that had fingerprint {before}, got {self.teacher_fingerprint}. "
                "Put the teacher's former weights back, or start over with --overwrite."
            )
        # guard: totals-counted-once
        self.training_totals.load_state_dict(checkpoint["training_totals"], first=self.global_rank == 0)
        self.distiller.terms.load_state_dict(checkpoint.get("terms", {}))
        self._found = checkpoint.get("found_weights", {})
        self.distiller.settle({name: fmean(found) for name, found in self._found.items()})

    def _preflight(self, inputs: Tensor, labels: Tensor, teacher: Reading | None) -> None:
        with warnings.catch_warnings():
            if not self.trainer.is_global_zero:  # says nothing that the first does not say
                warnings.simplefilter("ignore", PreflightWarning)
            classes = None if self.classes is None else len(self.classes)
            plan = self.distiller.preflight(inputs, labels, teacher=teacher, classes=classes).plan
        if self.recipe.method_terms:
            self.say(Line(str(plan), "plan", pairs=plan.as_dicts()))

    def _to_be_skipped(self, loss: Float[Tensor, ""], batch_idx: int, before: SavedBuffers | None) -> bool:
        """Look at a step's loss; `before` is there where a bad one is to leave no trace."""
        self._first_bad.note(loss, batch_idx)
        if before is None:
            looking_is_free = self.device.type == "cpu" and self.trainer.world_size == 1
            if looking_is_free or batch_idx % LOOK_EVERY == 0:
                self._stop_if_bad()
            return False
        if self._first_bad.step() is None:
            self._skipped_in_a_row = 0
            return False
        self._skipped_in_a_row += 1
        # guard: too-many-skipped
        if self._skipped_in_a_row > MOST_IN_A_ROW:
            self._stop_if_bad()
        # guard: skip-without-trace
        before.restore()
        self._first_bad.clear()
        self.say(f"warning: skipped a batch whose loss is not finite: {self._dump(batch_idx)}")
        return True

    def _stop_if_bad(self) -> None:
        """Raise FloatingPointError if a loss was not finite: what one process trips over, all do."""
        bad = self._first_bad.step()
        if not self.trainer.strategy.reduce_boolean_decision(bad is not None, all=False):
            return
        where = "another process" if bad is None else f"batch {bad + 1}, which is in {self._dump(bad)}"
        raise FloatingPointError(
            f"train: expected a finite loss, got none in epoch {self.current_epoch + 1}, {where}; "
            "checkpoints/ holds an earlier state. Lower --lr, pass --gradient-clip 1 or --precision 32-true "
            "or, for bad images, --not-finite skip."
        )

    def _dump(self, batch_idx: int) -> Path:
        """Write a batch of this epoch into the run folder."""
        rows = self.batches.rows(self.current_epoch)[batch_idx]
        images, labels, *_ = next(self.batches.fetch([rows]))
        name = f"epoch-{self.current_epoch + 1}-batch-{batch_idx + 1}"
        name += f"-rank-{self.global_rank}" if self.trainer.world_size > 1 else ""
        facts = {
            "learning_rate": self.learning_rate,
            "parameters_are_finite": parameters_are_finite(self.student),
        }
        return dump_batch(self.recipe.folder / "not-finite" / name, images, labels, rows, facts)


class Totals:
    """Means over an epoch's images, summed on the device so that no step waits for a number."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def clear(self) -> None:
        self.sums, self.count = {}, 0

    def add(self, means: Mapping[str, Tensor], count: int) -> None:
        """Add a batch's means, which are weighted by its number of images."""
        for name, mean in means.items():
            weighted = mean.detach().float() * count
            self.sums[name] = self.sums[name] + weighted if name in self.sums else weighted
        self.count += count

    def means(self, reduce: Any = None) -> dict[str, float]:
        """The means by name; `reduce` sums a tensor over processes."""
        sums, count = self.together(reduce)
        if not sums:
            return {}
        totals = torch.stack([*sums.values()]).tolist()
        return {name: total / count for name, total in zip(sums, totals, strict=True)}

    def state_dict(self, reduce: Any = None) -> dict[str, Any]:
        """The sums of all processes, so that any number of them can go on."""
        sums, count = self.together(reduce)
        return {"sums": sums, "count": count}

    def load_state_dict(self, state: Mapping[str, Any], *, first: bool = True) -> None:
        """Take up the sums: the first process all of them, the others none."""
        share = 1 if first else 0
        self.sums = {name: total * share for name, total in state["sums"].items()}
        self.count = state["count"] * share

    def together(self, reduce: Any) -> tuple[dict[str, Tensor], int]:
        """The sums and the count over all processes; `reduce` sums a tensor over them."""
        # guard: totals-of-all
        if reduce is None or not self.sums:
            return self.sums, self.count
        sums = [*self.sums.values()]
        stacked = reduce(torch.stack([*sums, sums[0].new_tensor(self.count)]), reduce_op="sum")
        return dict(zip(self.sums, stacked[:-1], strict=True)), round(stacked[-1].item())


class Clock:
    """What an epoch's wall time went into; validation does not count."""

    def __init__(self) -> None:
        self.images, self.seconds, self.waiting = 0, 0.0, 0.0
        self._mark = time.perf_counter()

    def data_has_come(self) -> None:
        self.waiting += self._lap()

    def step_has_ended(self, images: int) -> None:
        self._lap()
        self.images += images

    def _lap(self) -> float:
        now = time.perf_counter()
        lap, self._mark = now - self._mark, now
        self.seconds += lap
        return lap

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def data_share(self) -> float:
        """Share of the time, from 0 to 1, that steps waited for images."""
        return self.waiting / self.seconds if self.seconds else 0.0


def build_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int) -> LRScheduler:
    """The learning rate's course over the run, moved at every step."""
    if recipe.schedule == "one-cycle":
        return OneCycleLR(
            optimizer, recipe.lr, total_steps=recipe.epochs * steps_per_epoch, cycle_momentum=False
        )
    drops = rate_drops(recipe, steps_per_epoch)
    return LambdaLR(optimizer, lambda step: recipe.factor ** sum(step >= drop for drop in drops))


def rate_drops(recipe: Recipe, steps_per_epoch: int) -> list[int]:
    """The steps before which the rate drops, under the schedule "steps"."""
    if recipe.schedule != "steps":
        return []
    return [round(share * recipe.epochs) * steps_per_epoch for share in recipe.milestones]


def seed_generators(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` for the CPU and one device, with the same numbers to come.

    Seeding every kind of device notes the call stack for each that is not in use: near a millisecond a step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def step_seed(*position: int) -> int:
    """A 63-bit seed from (seed, epoch, batch, process): neighbours get unrelated seeds."""
    digest = hashlib.blake2b(repr(position).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
