"""Gradient-based attention transfer, the term `gradient`."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from attention_transfer.functional import gradient_transfer_loss
from attention_transfer.terms.declaration import NOT_NEGATIVE, Setting
from attention_transfer.terms.input_gradients import InputGradientTerm
from attention_transfer.terms.term import Observation


class GradientTransfer(InputGradientTerm):
    """Gradient-based attention transfer (paper, section 3.2): `gradient_transfer_loss` as a module.

    Both gradients are with respect to the student's input: a teacher that is fed another size or
    normalisation is differentiated through the transform.

    Args:
        beta: weight of the term.
        schedule, name: as for `AttentionTransfer`; its contribution is called "gradient".
    """

    name = "gradient"
    label = "gradient transfer"
    formula = "β/2 · mean ‖J_S − J_T‖₂ with J = dCE/dx"
    needs_input_gradient = True
    compares_classes = True
    settings = (
        Setting(
            "beta_gradient",
            float,
            1.0,
            "Weight of gradient-based attention transfer; docs/speed.md has what the second derivative "
            "costs.",
            NOT_NEGATIVE,
            argument="beta",
        ),
    )

    def contributions(self, seen: Observation) -> dict[str, Float[Tensor, ""]]:
        assert seen.teacher is not None and seen.teacher.input_gradient is not None
        own, other = seen.student.input_gradient, seen.teacher.input_gradient
        assert own is not None
        return {self.name: gradient_transfer_loss(own, other, beta=self.weight)}
