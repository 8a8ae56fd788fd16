"""What the numbers of a report say, in one sentence that claims no more than they show."""

from __future__ import annotations

import math
from collections.abc import Sequence

from attention_transfer.visualize.runs import TEACHER, Group, Spread

# Two-sided 95 % quantiles of Student's t for 1, 2, 3, ... degrees of freedom; 2.0 is close beyond them.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)

METRICS = {"test_error": "test error", "validation_error": "validation error"}


def choose_metric(groups: Sequence[Group]) -> str:
    """The test error, or the validation error if a finished student has no test error."""
    finished = [run for group in groups if group.role != TEACHER for run in group.runs if run.finished]
    return (
        "test_error" if all(run.number("test_error") is not None for run in finished) else "validation_error"
    )


def summarise(groups: Sequence[Group]) -> str:
    """One sentence on what the taught students gained or lost against the student alone."""
    students = [group for group in groups if group.role != TEACHER]
    metric = choose_metric(groups)
    finished = [group for group in students if group.spread(metric)]
    if not finished:
        return "No run has finished yet; the curves show the epochs so far."
    taught = [group for group in finished if group.role != "none"]
    compared = [(group, alone) for group in taught if (alone := baseline(group, finished))]
    if len(compared) == 1:
        return _sentence(_compare_one(*compared[0], metric))
    if compared:
        return _sentence(_compare_many(compared, metric))
    missing = "taught student" if not taught else "student alone with the same model and data"
    reached = "; ".join(
        f"{group.label} reached {group.spread(metric)} % {METRICS[metric]}" for group in finished
    )
    return _sentence(f"{reached}; there is no finished run of a {missing} to compare with")


def _compare_one(taught: Group, alone: Group, metric: str) -> str:
    after, before, name = _required(taught, metric), _required(alone, metric), METRICS[metric]
    points = after.mean - before.mean
    numbers = f"{after} % against {before} % for the {alone.label}{_seeds(after, before)}"
    if 1 in (after.count, before.count):
        return (
            f"with {taught.label} the {name} ended {_points(points)}, {numbers}, "
            "which a single run cannot tell from chance"
        )
    if not is_clear(before, after):
        return f"{taught.label} made no clear difference to the {name}: {numbers}, {_points(points)}"
    if points > 0:
        return f"{taught.label} did not help: the {name} came out {_points(points)}, {numbers}"
    return f"{taught.label} lowered the {name} by {-points:.1f} points: {numbers}"


def _compare_many(compared: Sequence[tuple[Group, Group]], metric: str) -> str:
    """A clause for each method, after the student alone that they are compared with."""
    parts = []
    for alone in {id(alone): alone for _, alone in compared}.values():
        before = _required(alone, metric)
        clauses = [_clause(group, before, metric) for group, other in compared if other is alone]
        runs = f"{before.count} seeds" if before.count > 1 else "one seed"
        opening = f"against the {alone.label} with {before} % {METRICS[metric]} ({runs})"
        parts.append(f"{opening}, " + ", ".join(clauses[:-1]) + " and " * (len(clauses) > 1) + clauses[-1])
    return "; ".join(parts)


def _clause(taught: Group, before: Spread, metric: str) -> str:
    after = _required(taught, metric)
    points = after.mean - before.mean
    if 1 in (after.count, before.count):
        return f"{taught.label} ended {_points(points)} (a single run, which could be chance)"
    if not is_clear(before, after):
        return f"{taught.label} made no clear difference ({_points(points)})"
    return f"{taught.label} {'did not help' if points > 0 else 'helped'} ({_points(points)})"


def _points(points: float) -> str:
    return f"{abs(points):.1f} points {'lower' if points < 0 else 'higher'}"


def _required(group: Group, metric: str) -> Spread:
    spread = group.spread(metric)
    assert spread is not None  # only groups with finished runs are compared
    return spread


def baseline(taught: Group, groups: Sequence[Group]) -> Group | None:
    """The runs of the same student alone on the same data whose other settings are the most alike."""
    same = ("student", "data", "max_train", "epochs")
    own = taught.runs[0].recipe
    alone = [
        group
        for group in groups
        if group.role == "none" and all(group.runs[0].recipe.get(name) == own.get(name) for name in same)
    ]
    return max(alone, key=lambda group: _shared(group.runs[0].recipe, own), default=None)


def _shared(one: dict[str, object], other: dict[str, object]) -> int:
    return sum(one.get(name) == value for name, value in other.items())


def is_clear(before: Spread, after: Spread) -> bool:
    """Whether the 95 % interval of the difference of the means (Welch) leaves out zero."""
    if before.deviation is None or after.deviation is None:
        return False
    errors = [before.deviation**2 / before.count, after.deviation**2 / after.count]
    if sum(errors) == 0:
        return before.mean != after.mean
    freedom = sum(errors) ** 2 / sum(
        e**2 / (s.count - 1) for e, s in zip(errors, (before, after), strict=True)
    )
    quantile = _T95[int(freedom) - 1] if freedom < len(_T95) + 1 else 2.0
    return abs(after.mean - before.mean) > quantile * math.sqrt(sum(errors))


def _seeds(after: Spread, before: Spread) -> str:
    if after.count == before.count:
        return f" ({after.count} seeds each)" if after.count > 1 else ""
    return f" ({after.count} and {before.count} runs)"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
