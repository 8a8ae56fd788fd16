"""How the weight of a term changes over the training, by name. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import cast, get_args

from ._choices import Schedule
from ._errors import InputError
from ._hints import did_you_mean

MILESTONES = (0.3, 0.6, 0.8)  # of the training, where the paper's CIFAR recipe drops the learning rate
FACTOR = 0.2

_SMOOTH: dict[Schedule, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}


def schedule_factor(
    schedule: Schedule,
    progress: float,
    *,
    milestones: Sequence[float] = MILESTONES,
    factor: float = FACTOR,
) -> float:
    """The factor on a term's weight when the share `progress` of the training is done.

    Args:
        schedule: "constant" 1; "linear" 1 - progress; "cosine" (1 + cos(pi progress))/2; "step" `factor` to
            the power of how many `milestones` have been reached.
        progress: 0 at the start of the training, 1 at its end.
        milestones, factor: of "step"; the milestones as shares of the training.

    Raises:
        ValueError: on an unknown schedule, or a progress or milestone outside 0 to 1.
    """
    schedule = _known(schedule, "schedule_factor", "schedule")
    if not 0 <= progress <= 1:
        raise InputError(
            f"schedule_factor: expected progress from 0 to 1, got {progress}. Give the share that is done."
        )
    if not all(0 <= milestone <= 1 for milestone in milestones):
        raise InputError(
            f"schedule_factor: expected milestones from 0 to 1, got {list(milestones)}. "
            "Give shares of the training, not epochs."
        )
    if schedule == "step":
        return factor ** sum(progress >= milestone for milestone in milestones)
    return _SMOOTH[schedule](progress)


def parse_schedules(text: str, terms: Iterable[str], *, user: str = "Recipe") -> dict[str, Schedule]:
    """Each term's schedule as a setting states it: "linear" for all, or "at:linear,kd:cosine" by term.

    Args:
        text: the setting; terms that it does not name are constant.
        terms: the names of the terms there are.
        user: in whose name errors are raised.

    Raises:
        ValueError: on an unknown schedule or term, a term named twice, or a text of neither form.
    """
    terms = list(terms)
    if ":" not in text and "," not in text:
        return dict.fromkeys(terms, _known(text.strip(), user, "schedule"))
    named: dict[str, Schedule] = {}
    for part in text.split(","):
        term, colon, schedule = (word.strip() for word in part.partition(":"))
        if not colon:
            raise InputError(
                f"{user}: expected schedules as one name or as term:name,term:name, got {text!r}. "
                f'Write it such as "{next(iter(terms), "at")}:linear".'
            )
        if term not in terms:
            raise _unknown(user, f"schedules of terms among {terms}", term, terms)
        if term in named:
            raise InputError(f"{user}: expected each term once, got {term} twice in schedules {text!r}.")
        named[term] = _known(schedule, user, f"schedule of {term}")
    return dict.fromkeys(terms, cast(Schedule, "constant")) | named


def _known(schedule: str, user: str, what: str) -> Schedule:
    known = list(get_args(Schedule))
    if schedule not in known:
        raise _unknown(user, f"{what} as one of {known}", schedule, known)
    return cast(Schedule, schedule)


def _unknown(user: str, expected: str, got: str, known: Sequence[str]) -> InputError:
    return InputError(f"{user}: expected {expected}, got {got!r}. {did_you_mean(got, known)}".rstrip())
