"""The terms of a distillation loss: modules over the functions of `functional`, each with its weight."""

from __future__ import annotations

from collections.abc import Mapping as Mappings
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor, nn

from .functional import (
    Activations,
    Form,
    Mapping,
    Side,
    attention_transfer_loss,
    check_loss_options,
    distillation_loss,
    loss_of_energies,
)
from .pairs import Pair


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
    """

    logits: Float[Tensor, "b _"]
    energies: Mappings[Energy, Sequence[Float[Tensor, "b _ _"]]] = field(default_factory=dict)
    features: Sequence[Float[Tensor, "b _ _ _"]] = ()
    shapes: Sequence[tuple[int, int, int]] = ()


@dataclass(frozen=True)
class Observation:
    """What one forward pass of student and teacher on the same images left behind, for the terms to read.

    The student's part is in its autograd graph; the teacher's may come from a cache.
    """

    pairs: Sequence[Pair]
    student: Reading
    teacher: Reading | None
    labels: Int[Tensor, " b"]


def names_at_pairs(term: str, pairs: Sequence[Pair]) -> list[str]:
    """What a term's contributions are called: "at/layer3", with the teacher's layer where need be."""
    students = [pair.student for pair in pairs]
    return [
        f"{term}/{pair.student}"
        if students.count(pair.student) == 1
        else f"{term}/{pair.student}<-{pair.teacher}"
        for pair in pairs
    ]


class Term(nn.Module):
    """An addend of the distillation loss. A term of your own: subclass, and say what it contributes."""

    name: str
    energy: Energy | None = None  # the kind of energy that it reads at each layer pair
    needs_features = False  # whether it reads activations there, which a cache of maps does not hold
    resize: Side | None = None  # whose maps it resizes where sizes differ
    cross_entropy_weight = 1.0  # the factor that this term puts on the cross-entropy

    @property
    def weight(self) -> float:
        """The factor in front of the term: beta, alpha and the like."""
        return 1.0

    def contributions(self, seen: Observation) -> dict[str, Float[Tensor, ""]]:
        """The term's value by name; a term that works on layer pairs names each, as in "at/layer3"."""
        raise NotImplementedError


class AttentionTransfer(Term):
    """Attention transfer (Zagoruyko & Komodakis 2017, equation 2): `attention_transfer_loss` as a module.

    Args:
        beta: weight of the term; about 1 for form "paper", 1000 for "code".
        p, mapping, form, resize: as in `attention_transfer_loss`.
        name: what its contributions are called: "at/<student layer>".
    """

    def __init__(
        self,
        beta: float,
        *,
        p: float = 2.0,
        mapping: Mapping = "sum",
        form: Form = "paper",
        resize: Side | None = None,
        name: str = "at",
    ) -> None:
        super().__init__()
        check_loss_options("AttentionTransfer", beta, p, mapping, form, resize)
        self.beta, self.p, self.mapping, self.form, self.resize = beta, p, mapping, form, resize
        self.name = name
        self.energy = Energy(float(p), mapping)

    @property
    def weight(self) -> float:
        return self.beta

    def forward(
        self, student: Activations, teacher: Activations, weights: Sequence[float] | None = None
    ) -> Float[Tensor, ""]:
        """The term for one pair of activations, or the sum over a sequence of pairs."""
        return attention_transfer_loss(
            student,
            teacher,
            beta=self.beta,
            p=self.p,
            mapping=self.mapping,
            form=self.form,
            resize=self.resize,
            weights=weights,
        )

    def contributions(self, seen: Observation) -> dict[str, Float[Tensor, ""]]:
        assert self.energy is not None and seen.teacher is not None
        sides = (seen.student.energies[self.energy], seen.teacher.energies[self.energy])
        values = [self._of_pair(*energies) for energies in zip(seen.pairs, *sides, strict=True)]
        return dict(zip(names_at_pairs(self.name, seen.pairs), values, strict=True))

    def _of_pair(self, pair: Pair, student: Tensor, teacher: Tensor) -> Float[Tensor, ""]:
        beta = self.beta * pair.weight
        try:
            return loss_of_energies(student, teacher, beta=beta, form=self.form, resize=self.resize)
        except ValueError as error:
            raise ValueError(f"{error} (At the pair {pair.student} <- {pair.teacher}.)") from None

    def extra_repr(self) -> str:
        options = ("beta", "p", "mapping", "form", "resize")
        return ", ".join(f"{option}={getattr(self, option)!r}" for option in options)


class KnowledgeDistillation(Term):
    """Knowledge distillation (Hinton et al. 2015): alpha * T^2 KL + (1 - alpha) * cross-entropy.

    Args:
        alpha: share of the distillation term, 0 <= alpha <= 1; the cross-entropy keeps the rest.
        temperature: T > 0.

    Raises:
        ValueError: if alpha or temperature is out of range.
    """

    name = "kd"

    def __init__(self, alpha: float = 0.9, temperature: float = 4.0) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"KnowledgeDistillation: expected 0 <= alpha <= 1, got {alpha}.")
        if not temperature > 0:
            raise ValueError(f"KnowledgeDistillation: expected temperature > 0, got {temperature}.")
        self.alpha, self.temperature = alpha, temperature
        self.cross_entropy_weight = 1 - alpha

    @property
    def weight(self) -> float:
        return self.alpha

    def forward(
        self, student_logits: Float[Tensor, "b k"], teacher_logits: Float[Tensor, "b k"]
    ) -> Float[Tensor, ""]:
        """alpha * T^2 * KL; the factor on the cross-entropy is the caller's to apply."""
        return self.alpha * distillation_loss(student_logits, teacher_logits, temperature=self.temperature)

    def contributions(self, seen: Observation) -> dict[str, Float[Tensor, ""]]:
        assert seen.teacher is not None
        return {self.name: self(seen.student.logits, seen.teacher.logits)}

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, temperature={self.temperature}"
