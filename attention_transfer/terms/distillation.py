"""Knowledge distillation, the term `kd`."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from attention_transfer._errors import InputError
from attention_transfer.functional import distillation_loss, is_number
from attention_transfer.schedules import Schedule
from attention_transfer.terms.declaration import POSITIVE, SHARE, Setting
from attention_transfer.terms.term import Observation, Term


class KnowledgeDistillation(Term):
    """Knowledge distillation (Hinton et al. 2015): alpha * T^2 KL + (1 - alpha) * cross-entropy.

    Args:
        alpha: share of the distillation term, 0 <= alpha <= 1; the cross-entropy keeps the rest.
        temperature: T > 0.
        schedule: as for `Term`; what alpha loses, the cross-entropy gains.

    Raises:
        ValueError: if alpha or temperature is out of range.
    """

    name = "kd"
    label = "distillation"
    formula = "α · T² KL(teacher ‖ student), and the cross-entropy times 1 − α"
    symbol = "alpha"
    compares_classes = True
    settings = (
        Setting(
            "alpha",
            float,
            0.9,
            "Distillation: share of the teacher's answer in the loss, from 0 to 1.",
            SHARE,
        ),
        Setting("temperature", float, 4.0, "Distillation: temperature that softens both answers.", POSITIVE),
    )

    def __init__(
        self, alpha: float = 0.9, temperature: float = 4.0, *, schedule: Schedule = "constant"
    ) -> None:
        if not (is_number(alpha) and 0 <= alpha <= 1):
            raise InputError(f"KnowledgeDistillation: expected 0 <= alpha <= 1, got {alpha!r}.")
        if not (is_number(temperature) and temperature > 0):
            raise InputError(f"KnowledgeDistillation: expected temperature > 0, got {temperature!r}.")
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
