"""Which classes a model takes for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from attention_transfer._extras import require

ANNOTATED_CLASSES = 20  # beyond these, numbers in the cells are too small to read


class ClassError(NamedTuple):
    """A class, how many images it has, and the share of them that was misclassified, in percent."""

    name: str
    images: int
    error: float


def per_class_errors(
    predictions: Int[Tensor, "n"], labels: Int[Tensor, "n"], classes: Sequence[str]
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
    predictions: Int[Tensor, "n"], labels: Int[Tensor, "n"], classes: Sequence[str], path: Path | str
) -> Path:
    """Write a PNG: a row a true class, a column a predicted one, in percent of the true class.

    Raises:
        ValueError: if predictions and labels differ in number or name a class that does not exist.
    """
    counts = _count(predictions, labels, classes, user="confusion_matrix")
    figure = _draw(_row_percent(counts), list(classes))
    total, right = int(counts.sum()), int(counts.trace())
    error = f"{100 * (1 - right / total):.1f} % error" if total else "no images"
    figure.suptitle(f"{error} · {total:,} images · {len(classes)} classes", fontsize=12, x=0.02, ha="left")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)
    return path


def _count(
    predictions: Tensor, labels: Tensor, classes: Sequence[str], *, user: str
) -> Int[np.ndarray, "k k"]:
    k = len(classes)
    if predictions.shape != labels.shape or predictions.ndim != 1:
        raise ValueError(
            f"{user}: expected one prediction a label, got predictions {tuple(predictions.shape)} and labels "
            f"{tuple(labels.shape)}. Give class indices, such as logits.argmax(1)."
        )
    both = torch.cat([predictions, labels]).cpu()
    if both.numel() and (int(both.min()) < 0 or int(both.max()) >= k):
        raise ValueError(
            f"{user}: expected class indices from 0 to {k - 1}, got {int(both.min())} to {int(both.max())}. "
            "Give the names of all classes that the model knows."
        )
    pairs = labels.cpu().long() * k + predictions.cpu().long()
    return torch.bincount(pairs, minlength=k * k).reshape(k, k).numpy()


def _row_percent(counts: Int[np.ndarray, "k k"]) -> Float[np.ndarray, "k k"]:
    return 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def _draw(percent: Float[np.ndarray, "k k"], classes: list[str]) -> Any:
    k = len(classes)
    side = min(max(5.0, 0.55 * k + 2), 13.0)
    figure_module = require("matplotlib.figure", extra="plots", user="confusion_matrix")
    figure = figure_module.Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(percent, cmap="magma_r", vmin=0, vmax=100, interpolation="nearest")
    size = 9 if k <= ANNOTATED_CLASSES else max(3.5, 9 - k / 18)
    for axis, name in ((axes.xaxis, "predicted"), (axes.yaxis, "true class")):
        axis.set_ticks(range(k), classes, fontsize=size, parse_math=False)
        axis.set_label_text(name)
    axes.tick_params(axis="x", rotation=90 if k > ANNOTATED_CLASSES else 45)
    axes.tick_params(length=0)
    for label in axes.get_xticklabels():
        label.set(
            ha="center" if k > ANNOTATED_CLASSES else "right", rotation_mode="anchor" if k <= 20 else None
        )
    _rule_cells(axes, k)
    if k <= ANNOTATED_CLASSES:
        _annotate(axes, percent)
    figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.8, aspect=30).outline.set_visible(
        False
    )
    return figure


def _rule_cells(axes: Any, k: int) -> None:
    axes.set_xticks(np.arange(k + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(k + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5 if k <= ANNOTATED_CLASSES else 0.3)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)


def _annotate(axes: Any, percent: Float[np.ndarray, "k k"]) -> None:
    for (row, column), value in np.ndenumerate(percent):
        if value >= 0.5:
            colour = "white" if value > 50 else "#222222"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
