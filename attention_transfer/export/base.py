"""What a format is, how one is judged, and the lines that the snippets of all share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from attention_transfer._choices import ExportFormat
from attention_transfer._errors import InputError
from attention_transfer._outputs import logits_of

from .student import BATCHES, Student

Predict = Callable[[Tensor], object]
"""Pixels, uint8 (b, c, h, w) -> logits (b, k), or what leads with them."""


class Format(ABC):
    """One way to write a student: `write` makes `path` in the export, `load` reads it as others will.

    Attributes:
        name: what `--format` calls it.
        path: its file or folder.
        summary: what it holds and what it needs, for the README beside it.
        tolerance: the largest difference to the student's logits, over the largest logit, that passes.
    """

    name: ExportFormat
    path: str
    summary: str
    tolerance: float

    @property
    def files(self) -> tuple[str, ...]:
        """What is written, by its place in the export."""
        return (self.path,)

    def check(self, student: Student) -> None:
        """Look whether this student can be written so, before anything is.

        Raises:
            ValueError: if it cannot. ImportError: if a package is missing.
        """
        return

    @abstractmethod
    def write(self, student: Student, path: Path) -> None:
        """Write the student."""

    @abstractmethod
    def load(self, student: Student, path: Path) -> Predict:
        """Read `path` anew, with nothing of the student but what its card says."""

    @abstractmethod
    def snippet(self, student: Student) -> str:
        """Python that loads `path` from the folder where it stands and leaves `logits` for `pixels`."""


@torch.no_grad()
def compare(written: Format, student: Student, path: Path) -> float:
    """The largest difference of a written file's logits to the student's, over the largest logit.

    Raises:
        ValueError: if it exceeds the format's tolerance, or the shapes differ.
    """
    predict = written.load(student, path)
    largest = float(student.answers.abs().max()) or 1.0
    differences = [0.0]
    for batch in BATCHES:
        got, want = logits_of(predict(student.pixels[:batch]), user="export"), student.answers[:batch]
        difference = float((got - want).abs().max()) / largest if got.shape == want.shape else float("inf")
        if not difference <= written.tolerance:
            raise InputError(
                f"export: {written.name}: expected the student's logits to within {written.tolerance:g} of "
                f"the largest, got a difference of {difference:.2g} for a batch of {batch}. Does the model "
                f"draw random numbers in evaluation mode? If not, leave {written.name} out."
            )
        differences.append(difference)
    return max(differences)


def pixels_line(student: Student) -> str:
    """The line of a snippet that makes images."""
    channels, (height, width) = student.card.in_channels, student.card.image_size
    return (
        f"pixels = torch.randint(0, 256, (4, {channels}, {height}, {width}), dtype=torch.uint8)"
        "  # your images"
    )


def normalise_lines(student: Student) -> str:
    """The lines of a snippet that normalise `pixels` into `images`."""
    mean, std = student.card.mean, student.card.std
    return (
        f"mean = torch.tensor({mean}).view(-1, 1, 1)\n"
        f"std = torch.tensor({std}).view(-1, 1, 1)\n"
        "images = (pixels / 255 - mean) / std"
    )


def input_lines(student: Student) -> tuple[str, str]:
    """The lines of a snippet that make a program's input, and what that is called."""
    if student.input == "pixels":
        return pixels_line(student), "pixels"
    return f"{pixels_line(student)}\n{normalise_lines(student)}", "images"


def input_of(student: Student, pixels: Tensor) -> Tensor:
    """What an exported program of this student takes."""
    return pixels if student.input == "pixels" else student.augment.normalise(pixels)
