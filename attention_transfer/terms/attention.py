"""Attention transfer, the term `at`."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from attention_transfer.functional import (
    Activations,
    Form,
    Mapping,
    Side,
    attention_transfer_loss,
    check_loss_options,
    loss_of_energies,
)
from attention_transfer.pairs import Pair
from attention_transfer.schedules import Schedule
from attention_transfer.terms.declaration import (
    FORM,
    NOT_NEGATIVE_OR_AUTO,
    PAIRS,
    RESIZE,
    Energy,
    Setting,
    Weight,
    at_least,
)
from attention_transfer.terms.term import Observation, Term, at_each_pair, number_or_auto


class AttentionTransfer(Term):
    """Attention transfer (Zagoruyko & Komodakis 2017, equation 2): `attention_transfer_loss` as a module.

    Args:
        beta: weight of the term; about 1 for form "paper", 1000 for "code"; or "auto".
        p, mapping, form, resize: as in `attention_transfer_loss`.
        schedule: as for `Term`.
        name: what its contributions are called: "at/<student layer>".
    """

    name = "at"
    label = "attention transfer"
    formula = (
        "β/2 · mean ‖Y_S − Y_T‖₂ at each layer pair (`--form paper`; or [`code` or "
        "`caffe`](method.md#three-forms))"
    )
    energy = Energy()
    settings = (
        PAIRS,
        Setting(
            "beta",
            Weight,
            1.0,
            'Weight of the attention transfer term, which does not carry over between the forms; "auto" sets '
            "it from the first batches: see docs/methods.md.",
            NOT_NEGATIVE_OR_AUTO,
        ),
        FORM,
        Setting(
            "p",
            float,
            2.0,
            "Exponent of the attention map, the sum over channels of |A|^p; at least 1.",
            at_least(1),
            shapes_energy=True,
        ),
        Setting("mapping", Mapping, "sum", "How the channels are reduced to a map.", shapes_energy=True),
        RESIZE,
    )

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
        check_loss_options(
            "AttentionTransfer", number_or_auto("AttentionTransfer", beta), p, mapping, form, resize
        )
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
