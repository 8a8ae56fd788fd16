"""Full-activation transfer, the term `f-actt`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from attention_transfer._errors import InputError
from attention_transfer.functional import (
    Activations,
    Form,
    Side,
    activation_transfer_loss,
    check_term_options,
)
from attention_transfer.pairs import Pair
from attention_transfer.schedules import Schedule
from attention_transfer.terms.declaration import FORM, NOT_NEGATIVE_OR_AUTO, PAIRS, RESIZE, Setting, Weight
from attention_transfer.terms.term import Observation, Shapes, Term, at_each_pair, number_or_auto


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

    name = "f-actt"
    label = "full-activation transfer"
    formula = "β/2 · mean ‖A_S/‖A_S‖ − A_T/‖A_T‖‖₂ at each pair; a learnt 1×1 convolution where widths differ"
    needs_features = True
    settings = (
        PAIRS,
        FORM,
        RESIZE,
        Setting(
            "beta_f_actt",
            Weight,
            1.0,
            'Weight of full-activation transfer, or "auto" as for beta.',
            NOT_NEGATIVE_OR_AUTO,
            argument="beta",
        ),
    )

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
        check_term_options("ActivationTransfer", number_or_auto("ActivationTransfer", beta), form, resize)
        super().__init__(beta, schedule=schedule)
        self.form, self.resize, self.name = form, resize, name
        self.channels: list[tuple[int, int]] = []
        self.regressors = nn.ModuleList()
        if channels is not None:
            self._regress(channels)

    def prepare(self, shapes: Sequence[Shapes | None], like: Tensor) -> None:
        known = [pair for pair in shapes if pair is not None]
        if len(known) < len(shapes) != len(self.channels):
            raise InputError(
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
            raise InputError(
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
