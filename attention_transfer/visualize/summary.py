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
    clauses = [clause for group in taught if (clause := _compare(group, finished, metric))]
    if clauses:
        return _sentence("; ".join(clauses))
    missing = "taught student" if not taught else "student alone with the same model and data"
    reached = "; ".join(f"{g.label} reached {_value(g, metric)} {METRICS[metric]}" for g in finished)
    return _sentence(f"{reached}; there is no finished run of a {missing} to compare with")


def _compare(taught: Group, groups: Sequence[Group], metric: str) -> str | None:
    alone = baseline(taught, groups)
    after = taught.spread(metric)
    before = alone.spread(metric) if alone else None
    if alone is None or after is None or before is None:
        return None
    points = after.mean - before.mean
    change = f"{abs(points):.1f} points {'lower' if points < 0 else 'higher'}"
    numbers = f"{_value(taught, metric)} against {_value(alone, metric)} for the {alone.label}"
    if before.deviation is None or after.deviation is None:
        return (
            f"with {taught.label} the {METRICS[metric]} ended {change} ({numbers}), "
            "which a single seed cannot tell from chance"
        )
    if not is_clear(before, after):
        return f"{taught.label} made no clear difference to the {METRICS[metric]}: {numbers}, {change}"
    if points > 0:
        return f"{taught.label} did not help: the {METRICS[metric]} came out {change}, {numbers}"
    return f"{taught.label} lowered the {METRICS[metric]} by {-points:.1f} points: {numbers}"


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
    errors = [spread.deviation**2 / spread.count for spread in (before, after)]
    if sum(errors) == 0:
        return before.mean != after.mean
    freedom = sum(errors) ** 2 / sum(
        e**2 / (s.count - 1) for e, s in zip(errors, (before, after), strict=True)
    )
    quantile = _T95[int(freedom) - 1] if freedom < len(_T95) + 1 else 2.0
    return abs(after.mean - before.mean) > quantile * math.sqrt(sum(errors))


def _value(group: Group, metric: str) -> str:
    spread = group.spread(metric)
    seeds = f" over {spread.count} seeds" if spread and spread.count > 1 else ""
    return f"{spread} %{seeds}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
