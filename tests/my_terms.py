"""A term of a user's own, as it stands in a file of theirs."""

import torch
from jaxtyping import Float
from torch import Tensor

import attention_transfer as at


class LogitDistance(at.Term):
    """Half the mean squared distance of the student's logits from the teacher's."""

    name = "logit-distance"
    label = "logit distance"
    symbol = "gamma"
    compares_classes = True

    def contributions(self, seen: at.Observation) -> dict[str, Float[Tensor, ""]]:
        distance = seen.student.logits - seen.teacher.logits
        return {self.name: self.weight * distance.square().mean() / 2}


class Unnamed(at.Term):
    """A term that does not say what it is called."""


def not_a_class() -> torch.Tensor:
    return torch.zeros(())
