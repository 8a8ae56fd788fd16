"""What the verbs share in showing what models see: their maps over test images, for pictures and reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from attention_transfer.cli.loading import load, load_teacher
from attention_transfer.data import Splits, match_classes
from attention_transfer.runs.run import Run
from attention_transfer.training.build import Teacher, load_splits
from attention_transfer.training.card import ModelCard
from attention_transfer.training.telling import say_text
from attention_transfer.visualize import Examples, collect_examples


def collect(runs: Sequence[Path], images: int) -> Examples | None:
    """What the models of some runs see in test images; None without a student taught by attention.

    None too where that student learned from a cache, whose teacher is no longer at hand.
    """
    found = [Run(folder) for folder in runs]
    taught = next((run for run in found if run.finished and run.recipe.reads_maps), None)
    if taught is None:
        return None
    splits = load_splits(taught.recipe)
    teacher = load_teacher(taught, splits)
    if teacher is None:
        say_text(f"note: the teacher of {taught.folder} is not at hand, so no maps are shown")
        return None
    sides = _sides(taught, teacher, found, splits)
    test = splits.test.select(_spread_evenly(len(splits.test), images))
    return collect_examples(
        {role: (side.model, side.layers) for role, side in sides.items()},
        test.decoded(),
        test.labels,
        {role: side.normalise for role, side in sides.items()},
        splits.classes,
        answers={role: order for role, side in sides.items() if (order := _answers(splits, side.classes))},
    )


class _Side(NamedTuple):
    """A model, its layers, what makes its input of pixels, and what its classes are called, if known."""

    model: nn.Module
    layers: list[str]
    normalise: Callable[[Tensor], Tensor]
    classes: Sequence[str] | None


def _answers(splits: Splits, classes: Sequence[str] | None) -> list[int] | None:
    """For each class of a model that of the images, or a number beyond; None where they are the same."""
    places = None if classes is None else match_classes(classes, splits.classes)
    if places is None or places == list(range(splits.num_classes)):
        return None
    return [splits.num_classes + i if place is None else place for i, place in enumerate(places)]


def _spread_evenly(available: int, wanted: int) -> Int64[Tensor, " n"]:
    """Positions all over the images, which may be sorted by class."""
    return torch.linspace(0, available - 1, min(wanted, available)).round().long()


def _sides(taught: Run, teacher: Teacher, runs: Sequence[Run], splits: Splits) -> dict[str, _Side]:
    """Teacher, student alone and the taught student, by role."""
    plan = taught.result["plan"]
    own, others = [row["student"] for row in plan], [row["teacher"] for row in plan]
    normalise = splits.augment().normalise
    to_teacher = teacher.transform or (lambda x: x)
    model = teacher.model.eval()
    sides = {"teacher": _Side(model, others, lambda x: to_teacher(normalise(x)), teacher.names)}
    roles = {"student alone": _alone(taught, runs), "student with attention transfer": taught}
    for role, run in roles.items():
        if run is not None:
            loaded = load(str(run.folder), None, 0, 0)
            classes = loaded.card.classes if loaded.card else None
            sides[role] = _Side(loaded.model, own, normalise, classes)
    return sides


def _alone(taught: Run, runs: Sequence[Run]) -> Run | None:
    """The run of the same student without a teacher, on the same images, of the same seed if there is one."""
    alone = []
    for run in runs:
        if run.finished and run.recipe.method == "none" and run.recipe.student == taught.recipe.student:
            if differing := _other_images(run, taught):
                say_text(f"note: {run.folder} is not shown as the student alone: it has other {differing}")
            else:
                alone.append(run)
    return min(alone, key=lambda run: run.recipe.seed != taught.recipe.seed, default=None)


def _other_images(one: Run, other: Run) -> str | None:
    """In what the images differ that two runs were trained on; a folder may have moved, but not both."""
    cards = [ModelCard.read(run.folder) for run in (one, other)]
    facts = [(set(card.classes), card.in_channels, tuple(card.image_size)) for card in cards if card]
    for name, *values in zip(("classes", "channels", "sizes of images"), *facts, strict=False):
        if len(values) == 2 and values[0] != values[1]:
            return name
    data = [Path(run.recipe.images) for run in (one, other)]
    if data[0].name != data[1].name or (all(map(Path.exists, data)) and not data[0].samefile(data[1])):
        return "images"
    return None
