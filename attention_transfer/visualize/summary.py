"""What the numbers of a report say, in one sentence that claims no more than they show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attention_transfer.runs.statistics import Difference, Spread, paired_difference, welch_difference
from attention_transfer.visualize.groups import TEACHER, Group

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
    change, name = compare(taught, alone, metric), METRICS[metric]
    after, before = _spread(taught, metric), _spread(alone, metric)
    runs = f" ({after.count} and {before.count} runs)"
    if change.pairs is not None:
        runs = f" ({change.pairs} seeds each)" if change.pairs > 1 else ""
    numbers = f"{after} % against {before} % for the {alone.label}{runs}"
    if change.interval is None:
        return (
            f"with {taught.label} the {name} ended {_points(change)}, {numbers}, "
            "which a single run cannot tell from chance"
        )
    if not change.is_clear:
        return f"{taught.label} made no clear difference to the {name}: {numbers}, {_points(change)}"
    if change.mean > 0:
        return f"{taught.label} did not help: the {name} came out {_points(change)}, {numbers}"
    return f"{taught.label} lowered the {name} by {-change.mean:.1f} points: {numbers}"


def _compare_many(compared: Sequence[tuple[Group, Group]], metric: str) -> str:
    """A clause for each method, after the student alone that they are compared with."""
    parts = []
    for alone in {id(alone): alone for _, alone in compared}.values():
        clauses = [_clause(group, alone, metric) for group, other in compared if other is alone]
        before = _spread(alone, metric)
        runs = f"{before.count} seeds" if before.count > 1 else "one seed"
        opening = f"against the {alone.label} with {before} % {METRICS[metric]} ({runs})"
        parts.append(f"{opening}, " + ", ".join(clauses[:-1]) + " and " * (len(clauses) > 1) + clauses[-1])
    return "; ".join(parts)


def _clause(taught: Group, alone: Group, metric: str) -> str:
    change = compare(taught, alone, metric)
    if change.interval is None:
        return f"{taught.label} ended {_points(change)} (a single run, which could be chance)"
    if not change.is_clear:
        return f"{taught.label} made no clear difference ({_points(change)})"
    return f"{taught.label} {'did not help' if change.mean > 0 else 'helped'} ({_points(change)})"


def compare(taught: Group, alone: Group, metric: str) -> Difference:
    """The change seed by seed where both groups have the same seeds, else between the means."""
    after, before = _by_seed(taught, metric), _by_seed(alone, metric)
    if after and before and after.keys() == before.keys():
        paired = paired_difference(after, before)
        assert paired is not None
        return paired
    return welch_difference(_spread(taught, metric), _spread(alone, metric))


def _by_seed(group: Group, metric: str) -> dict[Any, float] | None:
    """The error of each seed; None if a seed is unknown or comes twice."""
    found = [
        (run.settings.get("seed"), value) for run in group.runs if (value := run.number(metric)) is not None
    ]
    values = dict(found)
    return values if None not in values and len(values) == len(found) else None


def _points(change: Difference) -> str:
    return f"{abs(change.mean):.1f} points {'lower' if change.mean < 0 else 'higher'}"


def _spread(group: Group, metric: str) -> Spread:
    spread = group.spread(metric)
    assert spread is not None  # only groups with finished runs are compared
    return spread


def baseline(taught: Group, groups: Sequence[Group]) -> Group | None:
    """The runs of the same student alone on the same data whose other settings are the most alike."""
    same = ("student", "data", "max_train", "epochs")
    own = taught.runs[0].settings
    alone = [
        group
        for group in groups
        if group.role == "none" and all(group.runs[0].settings.get(name) == own.get(name) for name in same)
    ]
    return max(alone, key=lambda group: _shared(group.runs[0].settings, own), default=None)


def _shared(one: dict[str, object], other: dict[str, object]) -> int:
    return sum(one.get(name) == value for name, value in other.items())


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
