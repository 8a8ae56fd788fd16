"""What the verbs share in loading models: from a run folder, a weights file, or a library's own weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from attention_transfer.cli.parsing import UsageError
from attention_transfer.data import Splits
from attention_transfer.models import build_model, fingerprint, load_weights
from attention_transfer.training.build import Teacher, build_teacher
from attention_transfer.training.cached import name_teacher
from attention_transfer.training.card import ModelCard
from attention_transfer.training.run import Run


@dataclass(frozen=True)
class Loaded:
    """A model with its weights, and its card if the weights came with one."""

    model: nn.Module
    name: str
    card: ModelCard | None


def load(weights: str, name: str | None, classes: int, channels: int) -> Loaded:
    """A model from a run folder, a weights file, or the word "pretrained"."""
    if Run(Path(weights)).exists:
        _ = Run(Path(weights)).result
    card = None if weights == "pretrained" else ModelCard.read(weights)
    if card is not None and name in (None, card.model):
        return Loaded(card.build(weights), card.model, card)
    if name is None:
        raise UsageError(f"{weights} does not say which model it belongs to. Pass --model.")
    pretrained = weights == "pretrained"
    model = build_model(name, num_classes=classes, in_channels=channels, pretrained=pretrained)
    if not pretrained:
        load_weights(model, weights)
    return Loaded(model.eval(), name, None)


def load_teacher(taught: Run, splits: Splits) -> Teacher | None:
    """The very teacher of a run; of one that learned from a cache, if it is still where it was.

    None for a run without a teacher.
    """
    recipe = taught.recipe if taught.recipe.cache is None else name_teacher(taught.recipe)
    teacher = build_teacher(recipe, splits, lambda: taught.teacher)
    if taught.recipe.cache is None or teacher is None:
        return teacher
    return teacher if fingerprint(teacher.model) == taught.result["teacher_fingerprint"] else None
