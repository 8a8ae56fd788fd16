"""What the report says of where finished models look: how alike, in which classes and images the least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from attention_transfer.visualize import overlays, pictures
from attention_transfer.visualize.examples import Examples, Seen
from attention_transfer.visualize.groups import TEACHER

APART = 4  # images where student and teacher are the most apart
SHOWN_CLASSES = 20  # rows of a table over classes
MATRIX_CLASSES = 12  # classes up to which confusions are a matrix, beyond it a list
CONFUSIONS = 12  # entries of that list


def section(examples: Examples) -> dict[str, Any]:
    """The parts of the section, for the template."""
    students = list(examples.similarity)
    taught = students[-1] if students else None
    return {
        "compared": examples.compared,
        "students": students,
        "layers": layer_names(examples.layers),
        "similarity": [list(row) for row in zip(*examples.similarity.values(), strict=True)],
        "by_class": _by_class(examples, students) if taught else None,
        "confusions": [_confusions(examples, role) for role in examples.seen.predictions],
        "cards": _cards(examples, examples.shown, "shown"),
        "taught": taught,
        "apart": _cards(examples, examples.apart(taught, APART), "apart") if taught else [],
    }


def layer_names(layers: dict[str, list[str]]) -> list[str]:
    """One name for each position; where student and teacher differ, both."""
    order = [role for role in layers if role != TEACHER] + [TEACHER]
    named = (dict(zip(layers, names, strict=True)) for names in zip(*layers.values(), strict=True))
    return [" ↔ ".join(dict.fromkeys(names[role] for role in order)) for names in named]


def _by_class(examples: Examples, students: Sequence[str]) -> dict[str, Any]:
    """A row a class with images, the taught student's least agreement first where there are too many."""
    means = torch.stack([examples.similarity_by_class(role) for role in students])  # s k j
    counts = examples.seen.labels.bincount(minlength=len(examples.classes))
    present = [index for index in range(len(examples.classes)) if counts[index]]
    least = sorted(present, key=lambda index: means[-1, index].mean().item())[:SHOWN_CLASSES]
    chosen = present if len(present) <= SHOWN_CLASSES else least
    shades = _shades(means[:, chosen])
    rows = [
        {
            "name": examples.classes[index],
            "images": int(counts[index]),
            "cells": [
                (value, shade)
                for values, tints in zip(means[:, index], shades[:, place], strict=True)
                for value, shade in zip(values.tolist(), tints.tolist(), strict=True)
            ],
        }
        for place, index in enumerate(chosen)
    ]
    return {"rows": rows, "left_out": len(present) - len(chosen)}


def _shades(means: Tensor) -> Tensor:
    """How dark each cell is, 0 to 1, on a scale of its layer that all students share."""
    low, high = means.amin((0, 1)), means.amax((0, 1))
    return (means - low) / (high - low).clamp_min(1e-9)


def _confusions(examples: Examples, role: str) -> dict[str, Any]:
    """What a model takes for what, in percent of the true class."""
    counts = _count(examples, role)
    percent = 100 * counts / counts.sum(1, keepdim=True).clamp_min(1)
    wrong = counts.sum() - counts.diagonal().sum()
    error = f"{100 * int(wrong) / examples.compared:.1f} % error"
    k = len(examples.classes)
    rows = [
        {"name": name, "cells": [(value, value / 100, i == j) for j, value in enumerate(percent[i].tolist())]}
        for i, name in enumerate(examples.classes)
        if k <= MATRIX_CLASSES
    ]
    return {"role": role, "error": error, "rows": rows, "pairs": [] if rows else _most(examples, counts)}


def _count(examples: Examples, role: str) -> Int[Tensor, "k k"]:
    k = len(examples.classes)
    predicted = examples.seen.predictions[role]
    inside = predicted < k  # a teacher may know more classes than the data have
    both = examples.seen.labels[inside] * k + predicted[inside]
    return both.bincount(minlength=k * k).reshape(k, k)


def _most(examples: Examples, counts: Int[Tensor, "k k"]) -> list[dict[str, Any]]:
    """The most frequent confusions."""
    off = counts.clone().fill_diagonal_(0)
    values, places = off.flatten().topk(min(CONFUSIONS, off.numel()))
    names, k = examples.classes, len(examples.classes)
    return [
        {"true": names[place // k], "predicted": names[place % k], "count": count}
        for count, place in zip(values.tolist(), places.tolist(), strict=True)
        if count
    ]


def _cards(examples: Examples, seen: Seen, prefix: str) -> list[dict[str, Any]]:
    return [_card(examples, seen, i, f"{prefix}{i}") for i in range(len(seen.labels))]


def _card(examples: Examples, seen: Seen, i: int, name: str) -> dict[str, Any]:
    """One test image with the maps of every model; `name` is the class of its tiles."""
    pixels = overlays.as_rgb(seen.images[i])
    label = int(seen.labels[i])
    roles = [
        {
            "name": role,
            "prediction": class_name(examples.classes, int(seen.predictions[role][i])),
            "right": int(seen.predictions[role][i]) == label,
            "maps": _maps(examples.layers[role], seen, role, i, (pixels.shape[0], pixels.shape[1])),
        }
        for role in seen.maps
    ]
    return {
        "label": class_name(examples.classes, label),
        "picture": {"name": name, **pictures.picture(pixels)},
        "roles": roles,
    }


def _maps(
    layers: list[str], seen: Seen, role: str, i: int, size: tuple[int, int]
) -> list[tuple[str, str, str]]:
    """(layer, its map, cosine to the teacher's or nothing)"""
    cosines = [f"{value:.2f}" for value in seen.cosines[role][i].tolist()] if role in seen.cosines else []
    return [
        (layer, pictures.map_source(seen.maps[role][layer][i], size), cosines[j] if cosines else "")
        for j, layer in enumerate(layers)
    ]


def class_name(classes: Sequence[str], index: int) -> str:
    """The name of a class, or its number if the data have no name for it."""
    return classes[index] if 0 <= index < len(classes) else f"class {index}"
