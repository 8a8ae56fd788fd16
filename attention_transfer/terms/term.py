"""What every term is derived from, and what it is given to read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Mapping as Mappings
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from attention_transfer._errors import InputError
from attention_transfer.functional import Side, detached, is_number
from attention_transfer.pairs import Pair
from attention_transfer.schedules import Schedule, schedule_factor
from attention_transfer.terms.declaration import AUTO, Energy, Setting, Weight

Shapes = tuple[tuple[int, int, int], tuple[int, int, int]]


@dataclass(frozen=True)
class Reading:
    """What one model made of a batch.

    Attributes:
        logits: its answers.
        energies: by kind, one entry a pair; each sample's up to a positive factor, which the terms take out.
        features: activations, one entry a pair, where a term or the preflight asks for them; else empty.
        shapes: (c, h, w) of the layer of each pair.
        input_gradient: J = dCE/dx, each image's own, where a term asks for it.
        input_gradient_of_flipped: that of the mirrored images, as it comes: mirrored too.
        rivals: what else in the model's output could be its logits, as (index, width).
    """

    logits: Float[Tensor, "b _ ..."]
    energies: Mappings[Energy, Sequence[Float[Tensor, "b _ _"]]] = field(default_factory=dict)
    features: Sequence[Float[Tensor, "b _ _ _"]] = ()
    shapes: Sequence[tuple[int, int, int]] = ()
    input_gradient: Float[Tensor, "b _ _ _"] | None = None
    input_gradient_of_flipped: Float[Tensor, "b _ _ _"] | None = None
    rivals: Sequence[tuple[int, int]] = ()

    def of_first(self, count: int) -> Reading:
        """The reading of the first images alone, in the same graph."""
        return self._each(lambda tensor: tensor[:count])

    def detached(self) -> Reading:
        """The same reading outside of any graph."""
        return self._each(detached)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Reading:
        energies = {kind: [change(energy) for energy in maps] for kind, maps in self.energies.items()}
        features = [change(each) for each in self.features]
        gradients = (self.input_gradient, self.input_gradient_of_flipped)
        own, flipped = (None if gradient is None else change(gradient) for gradient in gradients)
        return Reading(change(self.logits), energies, features, self.shapes, own, flipped, self.rivals)


@dataclass(frozen=True)
class Observation:
    """What one forward pass of student and teacher on the same images left behind, for the terms to read.

    The student's part is in its autograd graph; the teacher's may come from a cache. The labels are as
    `functional.class_targets` gives them.
    """

    pairs: Sequence[Pair]
    student: Reading
    teacher: Reading | None
    labels: Int[Tensor, "b ..."] | Float[Tensor, "b k ..."]


def names_at_pairs(term: str, pairs: Sequence[Pair]) -> list[str]:
    """What a term's contributions are called: "at/layer3", with the teacher's layer where need be."""
    students = [pair.student for pair in pairs]
    return [
        f"{term}/{pair.student}"
        if students.count(pair.student) == 1
        else f"{term}/{pair.student}<-{pair.teacher}"
        for pair in pairs
    ]


def at_each_pair(
    term: str, pairs: Sequence[Pair], of_pair: Callable[..., Tensor], *sides: Iterable[Any]
) -> dict[str, Float[Tensor, ""]]:
    """A term's contributions by name: `of_pair` of each pair and its entry of every one of `sides`."""
    found = {}
    for name, pair, *entries in zip(names_at_pairs(term, pairs), pairs, *sides, strict=True):
        try:
            found[name] = of_pair(pair, *entries)
        except ValueError as error:
            raise InputError(f"{error} (At the pair {pair.student} <- {pair.teacher}.)") from None
    return found


class Term(nn.Module):
    """An addend of the distillation loss. A term of your own: subclass it, and say what it contributes.

    The attributes of the class, at least its `name`, declare it: `terms.declaration.Declaration` lists them.

    Args:
        weight: the factor in front of the term, >= 0: beta, alpha and the like. Where the subclass allows it,
            "auto" leaves it to `Distiller.balance`; it is 1 until then.
        schedule: the course of the weight over the training, as `schedule_factor` says.
    """

    name: str
    label = ""
    formula = ""
    symbol = "beta"
    settings: tuple[Setting, ...] = ()
    energy: Energy | None = None
    needs_features = False
    needs_teacher = True
    needs_input_gradient = False
    needs_flip = False
    compares_classes = False

    resize: Side | None = None  # whose maps it resizes where sizes differ

    def __init__(self, weight: Weight = 1.0, *, schedule: Schedule = "constant") -> None:
        super().__init__()
        schedule_factor(schedule, 0.0)  # an unknown schedule is said at once
        self.automatic = weight == AUTO
        self.settled = not self.automatic  # whether the weight was given or found
        self.full_weight = 1.0 if weight == AUTO else weight
        self.schedule = schedule
        self.progress = 0.0  # of the training, from 0 to 1

    @property
    def weight(self) -> float:
        """The factor in front of the term now: the weight, as its schedule has it at this progress."""
        return self.full_weight * schedule_factor(self.schedule, self.progress)

    @property
    def cross_entropy_weight(self) -> float:
        """The factor that this term puts on the cross-entropy."""
        return 1.0

    @property
    def at_pairs(self) -> bool:
        """Whether it compares student and teacher at layer pairs."""
        return self.energy is not None or self.needs_features

    def prepare(self, shapes: Sequence[Shapes | None], like: Tensor) -> None:
        """Make what depends on the layer pairs, whose (c, h, w) of student and teacher are given if known.

        `like` has the device and type that new parameters are to have.
        """

    def contributions(self, seen: Observation) -> dict[str, Float[Tensor, ""]]:
        """The term's value by name; a term that works on layer pairs names each, as in "at/layer3"."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        course = "" if self.schedule == "constant" else f", schedule={self.schedule!r}"
        found = "auto" if self.settled else "auto, not found yet"
        weight = f"{self.full_weight:.3g} ({found})" if self.automatic else f"{self.full_weight}"
        return f"{self.symbol}={weight}{course}"


def number_or_auto(user: str, weight: Weight) -> float:
    """The weight, where it is given; "auto" counts as one that may be."""
    if not is_number(weight) and not (isinstance(weight, str) and weight == AUTO):
        raise InputError(f'{user}: expected a number or "auto" as beta, got {weight!r}.')
    return 0.0 if weight == AUTO else weight
