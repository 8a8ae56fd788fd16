"""What must be known about a model's weights to use them: written into the weights file as its metadata."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from attention_transfer._errors import InputError
from attention_transfer._reading import parse_json, shown
from attention_transfer._trust import check_trusted
from attention_transfer.data import Augment
from attention_transfer.models import build_model, load_weights, read_metadata

_KEY = "attention_transfer"
_MOST_CHANNELS = 4096


def _is_list(value: Any, kind: Any, holds: Callable[[Any], bool] = lambda each: True) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, kind) and not isinstance(each, bool) and holds(each) for each in value
    )


_FACTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda v: isinstance(v, str), "text"),
    "classes": (lambda v: _is_list(v, str) and len(v) > 0, "a list of names"),
    "in_channels": (
        lambda v: type(v) is int and 1 <= v <= _MOST_CHANNELS,
        f"from 1 to {_MOST_CHANNELS}",
    ),
    "image_size": (
        lambda v: _is_list(v, int, lambda each: 1 <= each <= 1 << 16) and len(v) == 2,
        "a height and a width",
    ),
    "mean": (lambda v: _is_list(v, int | float, lambda each: abs(each) < 1e9), "a list of numbers"),
    "std": (lambda v: _is_list(v, int | float, lambda each: abs(each) < 1e9), "a list of numbers"),
    "crop": (lambda v: isinstance(v, int | float) and 0 < v <= 1, "above 0, and at most 1"),
}


@dataclass(frozen=True)
class ModelCard:
    """A model's name and classes, and the images it expects: channels, size, mean and std in [0, 1].

    `crop` is the share of an image's shorter side that it was tested on: the central square of that, resized.
    """

    model: str
    classes: list[str]
    in_channels: int
    image_size: list[int]
    mean: list[float]
    std: list[float]
    crop: float = 1.0

    def __post_init__(self) -> None:
        for name, (holds, expected) in _FACTS.items():
            # guard: card-facts
            if not holds(getattr(self, name)):
                raise InputError(f"expected {name} to be {expected}, got {shown(getattr(self, name))}")
        if not len(self.mean) == len(self.std) == self.in_channels or not all(s > 0 for s in self.std):
            raise InputError("expected a mean and a positive std for each channel")

    @classmethod
    def read(cls, weights: str | Path) -> ModelCard | None:
        """The card of a weights file or a run folder; None if the file came from elsewhere.

        Raises:
            FileNotFoundError, ValueError: if the file is not there or damaged.
        """
        text = read_metadata(weights).get(_KEY)
        try:
            return cls(**parse_json(text)) if text else None
        except (ValueError, TypeError) as error:
            raise InputError(
                f"ModelCard.read: expected the metadata that this package writes in {weights}, got "
                f"{shown(text)} ({error}). Save the weights anew with save_weights."
            ) from None

    def as_metadata(self) -> dict[str, str]:
        """The card as safetensors metadata."""
        return {_KEY: self.as_json()}

    def as_json(self) -> str:
        """The card as one line of JSON."""
        return json.dumps(asdict(self))

    def build(self, weights: str | Path) -> nn.Module:
        """The model with its weights, in eval mode.

        Raises:
            ValueError: if the card names a factory that the user has not named himself; and as `build_model`.
        """
        # guard: factory-of-a-card
        check_trusted(self.model, weights)
        height, width = self.image_size
        model = build_model(
            self.model,
            num_classes=len(self.classes),
            in_channels=self.in_channels,
            image_size=(height, width),
        )
        load_weights(model, weights)
        return model.eval()

    def augment(self) -> Augment:
        """The normalisation of the images that the model was trained on."""
        return Augment(self.mean, self.std)
