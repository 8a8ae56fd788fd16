"""Attention transfer in a training script in timm's style: the lines that are added are marked.

pip install "attention-transfer[train]"
python examples/timm_script.py
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy
from torch import nn
from torch.utils.data import DataLoader, Dataset

import attention_transfer as at

SIZE = 32


class Digits(Dataset):
    """Handwritten digits, as timm's data sets are: a PIL image through `transform`, and its label."""

    def __init__(self, rows: slice) -> None:
        pixels, labels = load_digits(return_X_y=True)
        self.images = [
            Image.fromarray((16 * row).clip(0, 255).astype("uint8").reshape(8, 8)) for row in pixels[rows]
        ]
        self.labels = labels[rows].tolist()
        self.transform = None  # set by create_loader

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def loader(rows: slice, *, training: bool) -> DataLoader:
    return create_loader(
        Digits(rows), (1, SIZE, SIZE), 25, is_training=training, use_prefetcher=False, num_workers=0,
        mean=(0.3,), std=(0.4,), hflip=0.0, color_jitter=None, scale=(0.8, 1.0), ratio=(0.9, 1.1),
        crop_pct=1.0,
    )  # fmt: skip


def train(model: nn.Module, epochs: int, count: int, teacher: nn.Module | None = None) -> None:
    batches = loader(slice(0, count), training=True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-3, weight_decay=0.05)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=epochs,
        warmup_epochs=1,
        warmup_lr=1e-4,
        updates_per_epoch=len(batches),
    )
    terms = [at.AttentionTransfer(beta=1.0)] if teacher else []  # added
    example = torch.zeros(2, 1, SIZE, SIZE)  # added
    distiller = at.Distiller(model, teacher, terms=terms, example_input=example)  # added
    distiller.train()  # was: model.train()
    for epoch in range(epochs):
        meters: dict[str, AverageMeter] = {}
        for images, labels in batches:
            out = distiller(images, labels)  # was: loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            for name, term in out.terms.items():
                meters.setdefault(name, AverageMeter()).update(term.item(), len(labels))
        scheduler.step(epoch + 1)
        if epoch in (0, epochs - 1):
            print(f"  epoch {epoch + 1}:", *(f" {name} {meter.avg:.3f}" for name, meter in meters.items()))


@torch.no_grad()
def validate(model: nn.Module) -> float:
    """Top-1 error on the last 897 digits, in percent."""
    top1 = AverageMeter()
    for images, labels in loader(slice(900, None), training=False):
        top1.update(accuracy(model.eval()(images), labels)[0].item(), len(labels))
    return 100 - top1.avg


def main(folder: str = "runs/timm", epochs: int = 10) -> None:
    torch.manual_seed(0)
    names = {
        "teacher": "resnet10t",
        "student alone": "test_resnet",
        "student with attention transfer": "test_resnet",
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    models: dict[str, nn.Module] = {}
    for title, name in names.items():
        print(title)
        torch.manual_seed(0)
        models[title] = model = timm.create_model(name, num_classes=10, in_chans=1)
        taught = title == "student with attention transfer"
        train(model, epochs, 500 if title == "teacher" else 200, models["teacher"] if taught else None)
        print(f"  test error {validate(model):.1f} %")
        torch.save({"state_dict": model.state_dict()}, Path(folder) / f"{title}.pth")


if __name__ == "__main__":
    main()
