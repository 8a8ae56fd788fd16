"""Attention transfer in a LightningModule of your own: the lines that change are marked.

pip install "attention-transfer[train]"
python examples/lightning_module.py
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import attention_transfer as at


class Classifier(lightning.LightningModule):
    def __init__(
        self, model: nn.Module, steps: int, teacher: nn.Module | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.steps = steps
        self.distiller = at.Distiller(model, teacher, **options)  # was: self.model = model

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        out = self.distiller(*batch)  # was: loss = F.cross_entropy(self.model(images), labels)
        self.log_dict(out.terms, on_step=False, on_epoch=True)  # was: self.log("ce", loss, ...)
        return out.loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        images, labels = batch
        wrong = self.distiller.student(images).argmax(1) != labels  # was: self.model(images)
        self.log("error", 100 * wrong.float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class PrintTerms(lightning.Callback):
    """Prints the first and the last epoch's means."""

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if trainer.current_epoch in (0, trainer.max_epochs - 1):
            means = {name: m for name, m in trainer.callback_metrics.items() if name != "error"}
            print(f"  epoch {trainer.current_epoch + 1}:", *(f" {name} {m:.3f}" for name, m in means.items()))


def digits(count: int) -> tuple[TensorDataset, TensorDataset]:
    """Handwritten digits of 8x8 pixels: `count` to train, the last 897 to test."""
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = (images.float() / 16 - 0.3).view(-1, 1, 8, 8)
    return TensorDataset(images[:count], labels[:count]), TensorDataset(images[900:], labels[900:])


def fit(
    title: str, folder: Path, epochs: int, model: nn.Module, *args: Any, count: int, **options: Any
) -> None:
    """Train, print what came of it and leave a checkpoint."""
    print(title)
    lightning.seed_everything(0, verbose=False)
    training, testing = digits(count)
    loader = DataLoader(training, 50, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=[PrintTerms()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(model, epochs * len(loader), *args, **options), loader, DataLoader(testing, 897))
    trainer.save_checkpoint(folder / f"{title}.ckpt")
    print(f"  test error {trainer.callback_metrics['error']:.1f} %")


def main(folder: str = "runs/lightning", epochs: int = 20) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    teacher, alone, student = (
        at.build_model(name, in_channels=1) for name in ("wrn-10-2", "wrn-10-1", "wrn-10-1")
    )
    alone.load_state_dict(student.state_dict())  # both begin alike
    fit("teacher", Path(folder), epochs, teacher, count=900)
    fit("student alone", Path(folder), epochs, alone, count=100)
    fit(
        "student with attention transfer", Path(folder), epochs, student, teacher, count=100,
        terms=[at.AttentionTransfer(beta=1.0)], example_input=torch.zeros(2, 1, 8, 8),
    )  # fmt: skip


if __name__ == "__main__":
    main()
