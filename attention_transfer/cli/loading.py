"""What the verbs share in loading models: from a run folder, a weights file, or a library's own weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from attention_transfer._channels import channels_instead
from attention_transfer.cli.parsing import UsageError
from attention_transfer.data import Splits
from attention_transfer.distiller import InputTransform
from attention_transfer.models import build_model, fingerprint, native_size, why_not
from attention_transfer.runs.run import Run
from attention_transfer.training.build import Teacher, build_teacher, either_size
from attention_transfer.training.cached import name_teacher
from attention_transfer.training.card import ModelCard


@dataclass(frozen=True)
class Loaded:
    """A model with its weights, and its card if the weights came with one."""

    model: nn.Module
    name: str
    card: ModelCard | None

    def input(self, shape: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> nn.Module:
        """From normalised images (c, h, w) to those of the model: resized to its own if it takes no others.

        Raises:
            UsageError: if it takes neither.
        """
        reason, size = why_not(self.model, shape), native_size(self.model)
        if reason is None:
            return nn.Identity()
        if self.card:
            size = (self.card.image_size[0], self.card.image_size[1])
        if channels := channels_instead(self.model, shape) or channels_instead(self.model, (shape[0], *size)):
            raise UsageError(
                f"{self.name}: expected images of {channels} channels, got {shape[0]}. Pass such images, or "
                "another model."
            )
        if why_not(self.model, (shape[0], *size)):
            sizes = " x ".join(map(str, shape))
            raise UsageError(
                f"{self.name}: expected images that it takes, got {sizes}, on which it fails ({reason})."
            )
        return InputTransform((mean, std), (mean, std), size=size)


def load(
    weights: str, name: str | None, classes: int, channels: int, size: tuple[int, int] | None = None
) -> Loaded:
    """A model from a run folder, a weights file, or the word "pretrained".

    `classes`, `channels` and `size` are those of the images, for weights that do not say theirs.
    """
    if Run(Path(weights)).exists:
        _ = Run(Path(weights)).result
    card = None if weights == "pretrained" else ModelCard.read(weights)
    if card is not None and name in (None, card.model):
        return Loaded(card.build(weights), card.model, card)
    if name is None:
        raise UsageError(f"{weights} does not say which model it belongs to. Pass --model.")
    pretrained = weights == "pretrained"

    def build(size: tuple[int, int] | None) -> nn.Module:
        options: dict[str, Any] = {"num_classes": classes, "in_channels": channels, "image_size": size}
        if pretrained:
            return build_model(name, pretrained=True, **options)
        return build_model(name, weights=weights, **options)

    return Loaded(either_size(build, size).eval(), name, None)


def load_teacher(taught: Run, splits: Splits) -> Teacher | None:
    """The very teacher of a run; of one that learned from a cache, if it is still where it was.

    None for a run without a teacher.
    """
    recipe = taught.recipe if taught.recipe.cache is None else name_teacher(taught.recipe)
    teacher = build_teacher(recipe, splits, lambda: taught.teacher)
    if taught.recipe.cache is None or teacher is None:
        return teacher
    return teacher if fingerprint(teacher.model) == taught.result["teacher_fingerprint"] else None
