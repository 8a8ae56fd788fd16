"""Weights alone, for whoever has the model's code: safetensors, and PyTorch's own state dict."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from attention_transfer._files import write_atomically
from attention_transfer.models import build_model, save_weights

from .base import Format, Predict, normalise_lines, pixels_line
from .student import Student

EXACT = 1e-6
"""The same arithmetic on the same weights, but for how it is split over threads."""


class Safetensors(Format):
    name, path, tolerance = "safetensors", "model.safetensors", EXACT
    summary = (
        "The weights, with the card (model, classes, image size, mean, std) as metadata; takes normalised "
        "images. `attention-transfer evaluate`, `maps` and `train --teacher` read it as it is."
    )

    def write(self, student: Student, path: Path) -> None:
        save_weights(student.model, path, student.card.as_metadata())

    def load(self, student: Student, path: Path) -> Predict:
        return _normalised(student, student.card.build(path))

    def snippet(self, student: Student) -> str:
        loading = f'model = at.build_model({_arguments(student)}, weights="{self.path}").eval()'
        return _snippet(student, loading)


class StateDict(Format):
    name, path, tolerance = "torch", "model.pt", EXACT
    summary = (
        "The weights as a plain state dict, which loads with `weights_only=True`; takes normalised images."
    )

    def write(self, student: Student, path: Path) -> None:
        write_atomically(path, lambda file: torch.save(dict(student.model.state_dict()), file))

    def load(self, student: Student, path: Path) -> Predict:
        card = student.card
        height, width = card.image_size
        model = build_model(
            card.model,
            num_classes=len(card.classes),
            in_channels=card.in_channels,
            image_size=(height, width),
        )
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return _normalised(student, model.eval())

    def snippet(self, student: Student) -> str:
        loading = (
            f"model = at.build_model({_arguments(student)}).eval()\n"
            f'model.load_state_dict(torch.load("{self.path}", weights_only=True))'
        )
        return _snippet(student, loading)


def _normalised(student: Student, model: nn.Module) -> Predict:
    return lambda pixels: model(student.augment.normalise(pixels))


def _arguments(student: Student) -> str:
    card = student.card
    shape = f"in_channels={card.in_channels}, image_size={tuple(card.image_size)}"
    return f'"{card.model}", num_classes={len(card.classes)}, {shape}'


def _snippet(student: Student, loading: str) -> str:
    return (
        f"import torch\nimport attention_transfer as at\n\n{loading}\n"
        f"{pixels_line(student)}\n{normalise_lines(student)}\n"
        "with torch.no_grad():\n    logits = model(images)"
    )
