"""Which classes a model takes for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from attention_transfer._errors import InputError
from attention_transfer._extras import require
from attention_transfer._files import write_atomically
from attention_transfer._tables import printable

ANNOTATED_CLASSES = 20  # beyond these, numbers in the cells are too small to read


class ClassError(NamedTuple):
    """A class, how many images it has, and the share of them that was misclassified, in percent."""

    name: str
    images: int
    error: float


def per_class_errors(
    predictions: Int[Tensor, " n"], labels: Int[Tensor, " _n"], classes: Sequence[str]
) -> list[ClassError]:
    """The error of each class in percent, NaN for a class without images.

    Raises:
        ValueError: as `confusion_matrix`.
    """
    counts = _count(predictions, labels, classes, user="per_class_errors")
    errors = 100 - _row_percent(counts).diagonal()
    totals = counts.sum(axis=1)
    return [
        ClassError(name, int(total), float(error) if total else float("nan"))
        for name, total, error in zip(classes, totals, errors, strict=True)
    ]


def confusion_matrix(
    predictions: Int[Tensor, " n"], labels: Int[Tensor, " _n"], classes: Sequence[str], path: Path | str
) -> Path:
    """Write a PNG: a row a true class, a column a predicted one, in percent of the true class.

    Raises:
        ValueError: if predictions and labels differ in number or name a class that does not exist.
    """
    counts = _count(predictions, labels, classes, user="confusion_matrix")
    figure = _draw(_row_percent(counts), [printable(name) for name in classes])
    total, right = int(counts.sum()), int(counts.trace())
    error = f"{100 * (1 - right / total):.1f} % error" if total else "no images"
    figure.suptitle(f"{error} · {total:,} images · {len(classes)} classes", fontsize=12, x=0.02, ha="left")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
    return path


def _count(
    predictions: Tensor, labels: Tensor, classes: Sequence[str], *, user: str
) -> Int[np.ndarray, "k k"]:
    k = len(classes)
    if predictions.shape != labels.shape or predictions.ndim != 1:
        raise InputError(
            f"{user}: expected one prediction a label, got predictions {tuple(predictions.shape)} and labels "
            f"{tuple(labels.shape)}. Give class indices, such as logits.argmax(1)."
        )
    both = torch.cat([predictions, labels]).cpu()
    if both.numel() and (int(both.min()) < 0 or int(both.max()) >= k):
        raise InputError(
            f"{user}: expected class indices from 0 to {k - 1}, got {int(both.min())} to {int(both.max())}. "
            "Give the names of all classes that the model knows."
        )
    pairs = labels.cpu().long() * k + predictions.cpu().long()
    return torch.bincount(pairs, minlength=k * k).reshape(k, k).numpy()


def _row_percent(counts: Int[np.ndarray, "k k"]) -> Float[np.ndarray, "k k"]:
    return 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def _draw(percent: Float[np.ndarray, "k k"], classes: list[str]) -> Any:
    k = len(classes)
    side = min(max(5.0, 0.55 * k + 2), 16.0)
    matplotlib = require("matplotlib.figure", extra="train", user="confusion_matrix")
    colours = require("matplotlib.colors", extra="train", user="confusion_matrix")
    figure = matplotlib.Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    # A norm that stretches the low end: confusions are rare, and are what one looks for.
    norm = colours.PowerNorm(0.6, vmin=0, vmax=100)
    image = axes.imshow(percent, cmap="Blues", norm=norm, interpolation="nearest")
    _name_classes(axes, classes, side)
    axes.spines[:].set_color("#e4e4e4")
    if k <= ANNOTATED_CLASSES:
        _rule_cells(axes, k)
        _annotate(axes, percent)
    bar = figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.8, aspect=30)
    bar.outline.set_visible(False)
    return figure


def _name_classes(axes: Any, classes: list[str], side: float) -> None:
    """Class names along both axes, as large as they fit; of more than 150 classes every second, third, ..."""
    shown = range(0, len(classes), -(-len(classes) // 150))
    size = min(9.0, 40 * side / len(shown))
    for axis, name in ((axes.xaxis, "predicted"), (axes.yaxis, "true class")):
        axis.set_ticks(shown, [classes[i] for i in shown], fontsize=size, parse_math=False)
        axis.set_label_text(name)
    axes.tick_params(length=0)
    slanted = len(classes) <= ANNOTATED_CLASSES
    for label in axes.get_xticklabels():
        label.set(rotation=45 if slanted else 90, rotation_mode="anchor" if slanted else "default")
        label.set_ha("right" if slanted else "center")


def _rule_cells(axes: Any, k: int) -> None:
    edges = np.arange(k + 1) - 0.5
    axes.hlines(edges, -0.5, k - 0.5, color="#e4e4e4", linewidth=0.8)
    axes.vlines(edges, -0.5, k - 0.5, color="#e4e4e4", linewidth=0.8)


def _annotate(axes: Any, percent: Float[np.ndarray, "k k"]) -> None:
    for (row, column), value in np.ndenumerate(percent):
        if value >= 0.5:
            colour = "white" if value > 45 else "#222222"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
