"""What must be known about a model's weights to use them: written into the weights file as its metadata."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from attention_transfer.data import Augment
from attention_transfer.models import build_model, load_weights, read_metadata

_KEY = "attention_transfer"


@dataclass(frozen=True)
class ModelCard:
    """A model's name and classes, and the images it expects: channels, size, mean and std in [0, 1]."""

    model: str
    classes: list[str]
    in_channels: int
    image_size: list[int]
    mean: list[float]
    std: list[float]

    @classmethod
    def read(cls, weights: str | Path) -> ModelCard | None:
        """The card of a weights file or a run folder; None if the file came from elsewhere.

        Raises:
            FileNotFoundError, ValueError: if the file is not there or damaged.
        """
        text = read_metadata(weights).get(_KEY)
        try:
            return cls(**json.loads(text)) if text else None
        except (ValueError, TypeError):
            raise ValueError(
                f"ModelCard.read: expected the metadata that this package writes in {weights}, got "
                f"{text:.80}. Save the weights anew with save_weights."
            ) from None

    def as_metadata(self) -> dict[str, str]:
        """The card as safetensors metadata."""
        return {_KEY: self.as_json()}

    def as_json(self) -> str:
        """The card as one line of JSON."""
        return json.dumps(asdict(self))

    def build(self, weights: str | Path) -> nn.Module:
        """The model with its weights, in eval mode."""
        model = build_model(self.model, num_classes=len(self.classes), in_channels=self.in_channels)
        load_weights(model, weights)
        return model.eval()

    def augment(self) -> Augment:
        """The normalisation of the images that the model was trained on."""
        return Augment(self.mean, self.std)
