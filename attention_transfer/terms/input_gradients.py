"""What the terms over the input gradient J = dCE/dx share."""

from __future__ import annotations

import math

from attention_transfer._errors import InputError
from attention_transfer.functional import is_number
from attention_transfer.schedules import Schedule
from attention_transfer.terms.term import Term


class InputGradientTerm(Term):
    """What the terms over J = dCE/dx share. They differentiate twice: the student must not be compiled."""

    def __init__(self, beta: float, *, schedule: Schedule = "constant", name: str | None = None) -> None:
        if not (is_number(beta) and 0 <= beta < math.inf):
            raise InputError(f"{type(self).__name__}: expected a finite beta >= 0, got {beta!r}.")
        super().__init__(beta, schedule=schedule)
        self.name = name or self.name
