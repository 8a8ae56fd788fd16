"""Symmetry of the input gradient under a flip, the term `symmetry`."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from attention_transfer.functional import flip_symmetry_loss
from attention_transfer.terms.declaration import NOT_NEGATIVE, Setting
from attention_transfer.terms.input_gradients import InputGradientTerm
from attention_transfer.terms.term import Observation


class FlipSymmetry(InputGradientTerm):
    """Symmetry of the input gradient under a horizontal flip (paper, section 3.2): `flip_symmetry_loss`.

    Images and mirrored images pass the student in one batch, so that BatchNorm sees both alike; the
    cross-entropy and the other terms are of the images themselves.

    Args:
        beta: weight of the term.
        schedule, name: as for `AttentionTransfer`; its contribution is called "symmetry".
    """

    name = "symmetry"
    label = "flip symmetry"
    formula = "β/2 · mean ‖J(x) − flip(J(flip x))‖₂"
    needs_teacher = False
    needs_input_gradient = True
    needs_flip = True
    settings = (
        Setting(
            "beta_symmetry",
            float,
            1.0,
            "Weight of the symmetry term, which shows the student every image and its mirror image.",
            NOT_NEGATIVE,
            argument="beta",
        ),
    )

    def contributions(self, seen: Observation) -> dict[str, Float[Tensor, ""]]:
        own, mirrored = seen.student.input_gradient, seen.student.input_gradient_of_flipped
        assert own is not None and mirrored is not None
        return {self.name: flip_symmetry_loss(own, mirrored, beta=self.weight)}
