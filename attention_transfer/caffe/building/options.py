"""How a student and a teacher are joined."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

from attention_transfer._errors import InputError
from attention_transfer.functional import convert_beta

File = str | PathLike[str]
SQUARINGS = {1: 0, 2: 1, 4: 2}  # by p
FORMS, NORMALIZES = ("caffe", "paper"), ("ssd", "python")


@dataclass(frozen=True)
class Options:
    """How `build` joins two nets.

    Attributes:
        pairs: (student's blob, teacher's blob) for each pair of layers to compare, also as "a:b,c:d". A
            blob's name means what its last in-place layer leaves. "auto" pairs the ends of stages of equal
            resolution, as `networks.resolution_ends` finds them.
        form: "caffe", a EuclideanLoss with loss weight beta; or "paper", a Python layer with beta / 2 times
            the mean distance over samples, which equals this package's form "paper".
        p: 1, 2 or 4, the power of the activations; 4 is two squarings, since one Power layer of 4 has NaN
            gradients.
        beta: weight of each pair's term. Without one, 1 for the form "paper", which did best in this
            project's first trial, and for "caffe" what pulls as hard, by `convert_beta`: 1.25.
        normalize: "ssd", the Normalize layer of the SSD fork; or "python", a Python layer for any Caffe.
        solver: a solver to take over, with this net in the place of its own; without one, SGD as is usual.
        student_weights: where the student starts, a .caffemodel or NetParameter.
        teacher_weights: the trained teacher.
        channels: of the images, where neither the weights nor the data, nor the prototxts, tell.

    Raises:
        ValueError: if one is out of its range.
    """

    pairs: str | Iterable[tuple[str, str]] = "auto"
    form: Literal["caffe", "paper"] = "caffe"
    p: int = 2
    beta: float | None = None
    normalize: Literal["ssd", "python"] = "ssd"
    solver: File | Any = None
    student_weights: File | Any = None
    teacher_weights: File | Any = None
    channels: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("form", FORMS), ("normalize", NORMALIZES)):
            if getattr(self, name) not in known:
                expected = f"{name} {' or '.join(map(repr, known))}"
                raise InputError(f"build: expected {expected}, got {getattr(self, name)!r}.")
        if self.p not in SQUARINGS:
            raise InputError(
                f"build: expected p 1, 2 or 4, got {self.p}. Other powers have NaN gradients in Caffe where "
                "an activation is 0."
            )
        if self.beta is not None and not 0 < self.beta < math.inf:
            raise InputError(f"build: expected beta > 0, got {self.beta}. Leave it out for the default.")
        if self.channels is not None and self.channels < 1:
            raise InputError(f"build: expected channels of 1 or more, got {self.channels}.")

    @property
    def weight(self) -> float:
        """Of each pair's term."""
        if self.beta is not None:
            return self.beta
        # between these two forms the size of the map does not count
        return 1.0 if self.form == "paper" else convert_beta(1.0, source="paper", target="caffe", hw=(1, 1))
