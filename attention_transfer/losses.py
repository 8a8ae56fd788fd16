"""The terms of a distillation loss: modules over the functions of `functional`, each with its weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Mapping as Mappings
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from .functional import (
    Activations,
    Form,
    Mapping,
    Side,
    activation_transfer_loss,
    attention_transfer_loss,
    check_loss_options,
    check_term_options,
    detached,
    distillation_loss,
    flip_symmetry_loss,
    gradient_transfer_loss,
    input_gradient_norm,
    is_number,
    loss_of_energies,
)
from .pairs import Pair
from .schedules import Schedule, schedule_factor

Weight = float | Literal["auto"]
Shapes = tuple[tuple[int, int, int], tuple[int, int, int]]


@dataclass(frozen=True)
class Energy:
    """What an attention map is made of: sum (or max) over the channels of |A|^p, as `attention_map` says."""

    p: float = 2.0
    mapping: Mapping = "sum"


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
            raise ValueError(f"{error} (At the pair {pair.student} <- {pair.teacher}.)") from None
    return found


class Term(nn.Module):
    """An addend of the distillation loss. A term of your own: subclass, and say what it contributes.

    Args:
        weight: the factor in front of the term, >= 0: beta, alpha and the like. Where the subclass allows it,
            "auto" leaves it to `Distiller.balance`; it is 1 until then.
        schedule: the course of the weight over the training, as `schedule_factor` says.
    """

    name: str
    energy: Energy | None = None  # the kind of energy that it reads at each layer pair
    needs_features = False  # whether it reads activations there, which a cache of maps does not hold
    needs_teacher = True  # whether it compares with a teacher at all
    needs_input_gradient = False  # whether it reads dCE/dx, of the teacher too if it needs one
    needs_flip = False  # whether it reads that of the mirrored images as well
    resize: Side | None = None  # whose maps it resizes where sizes differ
    symbol = "beta"  # what its weight is called

    def __init__(self, weight: Weight = 1.0, *, schedule: Schedule = "constant") -> None:
        super().__init__()
        schedule_factor(schedule, 0.0)  # an unknown schedule is said at once
        self.automatic = weight == "auto"
        self.settled = not self.automatic  # whether the weight was given or found
        self.full_weight = 1.0 if weight == "auto" else weight
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


def _number(user: str, weight: Weight) -> float:
    """The weight, where it is given; "auto" counts as one that may be."""
    if not is_number(weight) and not (isinstance(weight, str) and weight == "auto"):
        raise ValueError(f'{user}: expected a number or "auto" as beta, got {weight!r}.')
    return 0.0 if weight == "auto" else weight


class AttentionTransfer(Term):
    """Attention transfer (Zagoruyko & Komodakis 2017, equation 2): `attention_transfer_loss` as a module.

    Args:
        beta: weight of the term; about 1 for form "paper", 1000 for "code"; or "auto".
        p, mapping, form, resize: as in `attention_transfer_loss`.
        schedule: as for `Term`.
        name: what its contributions are called: "at/<student layer>".
    """

    def __init__(
        self,
        beta: Weight,
        *,
        p: float = 2.0,
        mapping: Mapping = "sum",
        form: Form = "paper",
        resize: Side | None = None,
        schedule: Schedule = "constant",
        name: str = "at",
    ) -> None:
        check_loss_options("AttentionTransfer", _number("AttentionTransfer", beta), p, mapping, form, resize)
        super().__init__(beta, schedule=schedule)
        self.p, self.mapping, self.form, self.resize = p, mapping, form, resize
        self.name = name
        self.energy = Energy(float(p), mapping)

    def forward(
        self, student: Activations, teacher: Activations, weights: Sequence[float] | None = None
    ) -> Float[Tensor, ""]:
        """The term for one pair of activations, or the sum over a sequence of pairs."""
        return attention_transfer_loss(
            student,
            teacher,
            beta=self.weight,
            p=self.p,
            mapping=self.mapping,
            form=self.form,
            resize=self.resize,
            weights=weights,
        )

    def contributions(self, seen: Observation) -> dict[str, Float[Tensor, ""]]:
        assert self.energy is not None and seen.teacher is not None
        sides = (seen.student.energies[self.energy], seen.teacher.energies[self.energy])

        def of_pair(pair: Pair, student: Tensor, teacher: Tensor) -> Tensor:
            beta = self.weight * pair.weight
            return loss_of_energies(student, teacher, beta=beta, form=self.form, resize=self.resize)

        return at_each_pair(self.name, seen.pairs, of_pair, *sides)

    def extra_repr(self) -> str:
        options = ("p", "mapping", "form", "resize")
        own = ", ".join(f"{option}={getattr(self, option)!r}" for option in options)
        return f"{super().extra_repr()}, {own}"


class ActivationTransfer(Term):
    """Full-activation transfer, the table's F-ActT: `activation_transfer_loss` on regressed activations.

    Where student and teacher have unequal channels at a pair, a 1x1 convolution that is learnt with the
    student brings its activation to the teacher's (paper, section 4.1.2; the hints of FitNets).

    Args:
        beta: weight of the term; about 1 for form "paper"; or "auto".
        form, resize: as in `activation_transfer_loss`.
        channels: (student, teacher) channels of each pair; a `Distiller` finds them out.
        schedule: as for `Term`.
        name: what its contributions are called: "f-actt/<student layer>".
    """

    needs_features = True

    def __init__(
        self,
        beta: Weight,
        *,
        form: Form = "paper",
        resize: Side | None = None,
        channels: Sequence[tuple[int, int]] | None = None,
        schedule: Schedule = "constant",
        name: str = "f-actt",
    ) -> None:
        check_term_options("ActivationTransfer", _number("ActivationTransfer", beta), form, resize)
        super().__init__(beta, schedule=schedule)
        self.form, self.resize, self.name = form, resize, name
        self.channels: list[tuple[int, int]] = []
        self.regressors = nn.ModuleList()
        if channels is not None:
            self._regress(channels)

    def prepare(self, shapes: Sequence[Shapes | None], like: Tensor) -> None:
        known = [pair for pair in shapes if pair is not None]
        if len(known) < len(shapes) != len(self.channels):
            raise ValueError(
                "ActivationTransfer: expected layer pairs of known shape, got some that no example has been "
                "through. Pass example_input to the Distiller, and a teacher; or channels= of each pair here."
            )
        channels = self.channels if len(known) < len(shapes) else [(own[0], other[0]) for own, other in known]
        if channels != self.channels:
            self._regress(channels)
        self.regressors.to(like.device, like.dtype)

    def _regress(self, channels: Sequence[tuple[int, int]]) -> None:
        self.channels = list(channels)
        self.regressors = nn.ModuleList(
            nn.Identity() if own == other else nn.Conv2d(own, other, 1) for own, other in channels
        )

    def forward(
        self, student: Activations, teacher: Activations, weights: Sequence[float] | None = None
    ) -> Float[Tensor, ""]:
        """The term for one pair of activations, or the sum over a sequence of pairs, in order."""
        students = [student] if isinstance(student, Tensor) else student
        if len(students) != len(self.regressors):
            raise ValueError(
                f"ActivationTransfer: expected activations of {len(self.regressors)} pairs, got "
                f"{len(students)}. Pass channels=[(student, teacher), ...], or use it in a Distiller."
            )
        regressed = [regressor(each) for regressor, each in zip(self.regressors, students, strict=True)]
        teachers = [teacher] if isinstance(teacher, Tensor) else teacher
        options: dict[str, Any] = {"form": self.form, "resize": self.resize, "weights": weights}
        return activation_transfer_loss(regressed, teachers, beta=self.weight, **options)

    def contributions(self, seen: Observation) -> dict[str, Float[Tensor, ""]]:
        assert seen.teacher is not None

        def of_pair(pair: Pair, regressor: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
            beta = self.weight * pair.weight
            options: dict[str, Any] = {"form": self.form, "resize": self.resize}
            return activation_transfer_loss(regressor(student), teacher, beta=beta, **options)

        return at_each_pair(
            self.name, seen.pairs, of_pair, self.regressors, seen.student.features, seen.teacher.features
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={self.form!r}, resize={self.resize!r}"


class KnowledgeDistillation(Term):
    """Knowledge distillation (Hinton et al. 2015): alpha * T^2 KL + (1 - alpha) * cross-entropy.

    Args:
        alpha: share of the distillation term, 0 <= alpha <= 1; the cross-entropy keeps the rest.
        temperature: T > 0.
        schedule: as for `Term`; what alpha loses, the cross-entropy gains.

    Raises:
        ValueError: if alpha or temperature is out of range.
    """

    name, symbol = "kd", "alpha"

    def __init__(
        self, alpha: float = 0.9, temperature: float = 4.0, *, schedule: Schedule = "constant"
    ) -> None:
        if not (is_number(alpha) and 0 <= alpha <= 1):
            raise ValueError(f"KnowledgeDistillation: expected 0 <= alpha <= 1, got {alpha!r}.")
        if not (is_number(temperature) and temperature > 0):
            raise ValueError(f"KnowledgeDistillation: expected temperature > 0, got {temperature!r}.")
        super().__init__(alpha, schedule=schedule)
        self.temperature = temperature

    @property
    def cross_entropy_weight(self) -> float:
        return 1 - self.weight

    def forward(
        self, student_logits: Float[Tensor, "b k *pixels"], teacher_logits: Float[Tensor, "b k *pixels"]
    ) -> Float[Tensor, ""]:
        """alpha * T^2 * KL; the factor on the cross-entropy is the caller's to apply."""
        return self.weight * distillation_loss(student_logits, teacher_logits, temperature=self.temperature)

    def contributions(self, seen: Observation) -> dict[str, Float[Tensor, ""]]:
        assert seen.teacher is not None
        return {self.name: self(seen.student.logits, seen.teacher.logits)}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature}"


class _InputGradientTerm(Term):
    """What the terms over J = dCE/dx share. They differentiate twice: the student must not be compiled."""

    needs_input_gradient = True

    def __init__(self, beta: float, *, schedule: Schedule = "constant", name: str | None = None) -> None:
        if not (is_number(beta) and 0 <= beta < math.inf):
            raise ValueError(f"{type(self).__name__}: expected a finite beta >= 0, got {beta!r}.")
        super().__init__(beta, schedule=schedule)
        self.name = name or self.name


class GradientTransfer(_InputGradientTerm):
    """Gradient-based attention transfer (paper, section 3.2): `gradient_transfer_loss` as a module.

    Both gradients are with respect to the student's input: a teacher that is fed another size or
    normalisation is differentiated through the transform.

    Args:
        beta: weight of the term.
        schedule, name: as for `AttentionTransfer`; its contribution is called "gradient".
    """

    name = "gradient"

    def contributions(self, seen: Observation) -> dict[str, Float[Tensor, ""]]:
        assert seen.teacher is not None and seen.teacher.input_gradient is not None
        own, other = seen.student.input_gradient, seen.teacher.input_gradient
        assert own is not None
        return {self.name: gradient_transfer_loss(own, other, beta=self.weight)}


class FlipSymmetry(_InputGradientTerm):
    """Symmetry of the input gradient under a horizontal flip (paper, section 3.2): `flip_symmetry_loss`.

    Images and mirrored images pass the student in one batch, so that BatchNorm sees both alike; the
    cross-entropy and the other terms are of the images themselves.

    Args:
        beta: weight of the term.
        schedule, name: as for `AttentionTransfer`; its contribution is called "symmetry".
    """

    name = "symmetry"
    needs_teacher = False
    needs_flip = True

    def contributions(self, seen: Observation) -> dict[str, Float[Tensor, ""]]:
        own, mirrored = seen.student.input_gradient, seen.student.input_gradient_of_flipped
        assert own is not None and mirrored is not None
        return {self.name: flip_symmetry_loss(own, mirrored, beta=self.weight)}


class InputGradientNorm(_InputGradientTerm):
    """A small input gradient (Drucker & LeCun 1992, double backpropagation): the table's min-l2 baseline.

    Args:
        beta: weight of the term.
        schedule, name: as for `AttentionTransfer`; its contribution is called "min-l2".
    """

    name = "min-l2"
    needs_teacher = False

    def contributions(self, seen: Observation) -> dict[str, Float[Tensor, ""]]:
        assert seen.student.input_gradient is not None
        return {self.name: input_gradient_norm(seen.student.input_gradient, beta=self.weight)}
