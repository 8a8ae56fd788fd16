"""A small input gradient, the term `min-l2`."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from attention_transfer.functional import input_gradient_norm
from attention_transfer.terms.declaration import NOT_NEGATIVE, Setting
from attention_transfer.terms.input_gradients import InputGradientTerm
from attention_transfer.terms.term import Observation


class InputGradientNorm(InputGradientTerm):
    """A small input gradient (Drucker & LeCun 1992, double backpropagation): the table's min-l2 baseline.

    Args:
        beta: weight of the term.
        schedule, name: as for `AttentionTransfer`; its contribution is called "min-l2".
    """

    name = "min-l2"
    label = "small input gradient"
    formula = "β/2 · mean ‖J‖₂ (Drucker & LeCun's double backpropagation)"
    needs_teacher = False
    needs_input_gradient = True
    settings = (
        Setting(
            "beta_min_l2",
            float,
            1.0,
            "Weight of the norm of the student's input gradient.",
            NOT_NEGATIVE,
            argument="beta",
        ),
    )

    def contributions(self, seen: Observation) -> dict[str, Float[Tensor, ""]]:
        assert seen.student.input_gradient is not None
        return {self.name: input_gradient_norm(seen.student.input_gradient, beta=self.weight)}
