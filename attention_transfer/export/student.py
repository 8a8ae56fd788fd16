"""The student that leaves: its run, its card, its weights, and the answers that every export must give."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from attention_transfer._choices import ProgramInput
from attention_transfer._errors import InputError
from attention_transfer._outputs import logits_of
from attention_transfer.data import Augment
from attention_transfer.runs.run import Run
from attention_transfer.training.card import ModelCard

BATCHES = (1, 2, 5)
"""The batch sizes at which exports are compared with the student."""


@dataclass(frozen=True)
class Student:
    """The student of a finished run, alone: built anew from its weights, without hooks, on the CPU.

    `input` is what exported programs take: "pixels" (uint8, 0 to 255; they normalise themselves) or
    "normalised" (float32, as the card says).
    """

    run: Run
    card: ModelCard
    model: nn.Module
    input: ProgramInput

    @classmethod
    def of(cls, run: Run, input: ProgramInput) -> Student:
        """The student of a run.

        Raises:
            FileNotFoundError: if the folder is no run folder.
            ValueError: if the run is not finished, its weights are damaged or say nothing of what they are,
                or its answers are not finite.
        """
        _ = run.recipe, run.result
        card = ModelCard.read(run.folder)
        if card is None:
            raise InputError(
                f"export: expected weights that say what they hold in {run.student_weights}, got some from "
                f"elsewhere. Write the run's own anew: remove {run.result_file.name} and resume it."
            )
        student = cls(run, card, card.build(run.folder), input)
        if not student.answers.isfinite().all():
            raise InputError(
                f"export: expected finite logits of the student in {run.folder}, got NaN or infinity: "
                "its training diverged. Train it again with a smaller --lr."
            )
        return student

    @property
    def augment(self) -> Augment:
        """The normalisation that the card states; nothing is cropped or flipped."""
        return self.card.augment()

    @cached_property
    def pixels(self) -> UInt8[Tensor, "b c h w"]:
        """Images to compare answers on: noise, always the same."""
        generator = torch.Generator().manual_seed(0)
        shape = (max(BATCHES), self.card.in_channels, *self.card.image_size)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    @cached_property
    def answers(self) -> Float[Tensor, "b k"]:
        """The student's logits for `pixels`."""
        with torch.no_grad():
            return logits_of(self.model(self.augment.normalise(self.pixels)), user="export")


class Program(nn.Module):
    """A student as a program of its own: images -> logits (b, k), whatever else the model returns.

    With an `augment` the images are uint8 pixels, which it normalises; without, they are normalised.
    """

    def __init__(self, model: nn.Module, augment: Augment | None) -> None:
        super().__init__()
        self.model, self.augment = model, augment
        self.eval()

    def forward(self, images: Tensor) -> Float[Tensor, "b k"]:
        normalised = images if self.augment is None else self.augment.normalise(images)
        return logits_of(self.model(normalised), user="export")
