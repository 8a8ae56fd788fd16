"""Keeps where the student looks in a few test images, epoch by epoch, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from attention_transfer.data import Splits
from attention_transfer.pairs import stages_to_store
from attention_transfer.training.loggers import log_pictures
from attention_transfer.training.module import DistillationModule
from attention_transfer.visualize.examples import attention_maps, spread_over_classes
from attention_transfer.visualize.overlays import overlay
from attention_transfer.visualize.snapshots import IMAGES, Snapshots, epochs_to_keep


class MapRecorder(Callback):
    """Writes the maps of four test images into the run folder, at the start and after some of the epochs.

    Loggers that show pictures are given them too, laid over the images.

    Nothing is chosen by them. They are taken between epochs, in eval mode and float32, and leave the student,
    the random numbers and so the run's numbers as they would have been. The layers are those of the pairs; of
    a student that compares none, those that could be paired.
    """

    def __init__(self, path: Path, splits: Splits, epochs: int) -> None:
        self.path, self.splits = path, splits
        self.epochs = epochs_to_keep(epochs)
        self.snapshots: Snapshots | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DistillationModule)
        if not trainer.is_global_zero:
            return
        self.snapshots = self._begin(pl_module)
        if trainer.global_step == 0:
            self._record(0, pl_module, trainer.loggers)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DistillationModule)
        if trainer.is_global_zero and trainer.current_epoch + 1 in self.epochs:
            self._record(trainer.current_epoch + 1, pl_module, trainer.loggers)

    def _begin(self, module: DistillationModule) -> Snapshots | None:
        """What an interrupted run kept, else a new start; None for a student without maps."""
        distiller = module.distiller
        example = torch.zeros(2, *self.splits.shape, device=module.device)
        layers = [pair.student for pair in distiller.pairs] or _layers_of(module.student, example)
        if not layers:
            return None
        rows = spread_over_classes(self.splits.test.labels, IMAGES)
        test = self.splits.test.select(torch.tensor(rows))
        pixels = test.decoded()
        new = Snapshots.start(pixels, test.labels, self.splits.classes, layers)
        self._pixels = pixels
        self._inputs = module.augment.normalise(pixels.to(module.device))
        if distiller.teacher is not None and distiller.pairs:
            transform = distiller.teacher_transform
            seen = transform(self._inputs) if transform else self._inputs
            new = new.with_teacher(_look(distiller.teacher, [pair.teacher for pair in distiller.pairs], seen))
        return _continued(self.path, new)

    def _record(self, epoch: int, module: DistillationModule, loggers: Sequence[Logger]) -> None:
        if self.snapshots is None:
            return
        maps = _look(module.student, self.snapshots.layers, self._inputs)
        if all(each.isfinite().all() for each in maps):
            self.snapshots = self.snapshots.add(epoch, maps)
            self.snapshots.save(self.path)
            for layer, over in zip(self.snapshots.layers, maps, strict=True):
                pairs = zip(self._pixels, over.cpu(), strict=True)
                pictures = np.stack([overlay(image, each) for image, each in pairs])
                log_pictures(loggers, f"maps/{layer}", pictures, module.global_step)


def _layers_of(student: nn.Module, example: Float[Tensor, "b c h w"]) -> list[str]:
    like = next(student.parameters(), example)
    try:
        return [stage.name for stage in stages_to_store(student, example.to(like))]
    except ValueError:  # no stages: nothing to look at
        return []


def _look(
    model: nn.Module, layers: Sequence[str], inputs: Float[Tensor, "n c h w"]
) -> list[Float[Tensor, "n _ _"]]:
    maps = attention_maps(model, layers, inputs)
    return [maps[layer] for layer in layers]


def _continued(path: Path, new: Snapshots) -> Snapshots:
    if not path.is_file():
        return new
    try:
        before = Snapshots.read(path)
    except ValueError:  # a picture that is damaged must not stop the training
        return new
    return before if before.continues(new) else new
