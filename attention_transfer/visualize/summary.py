"""What the numbers of a report say, in one sentence that claims no more than they show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from attention_transfer._extras import require
from attention_transfer.visualize.runs import TEACHER, Group, Spread

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
    numbers = f"{taught.spread(metric)} % against {alone.spread(metric)} % for the {alone.label}{change.runs}"
    if change.interval is None:
        return (
            f"with {taught.label} the {name} ended {change}, {numbers}, "
            "which a single run cannot tell from chance"
        )
    if not change.is_clear:
        return f"{taught.label} made no clear difference to the {name}: {numbers}, {change}"
    if change.points > 0:
        return f"{taught.label} did not help: the {name} came out {change}, {numbers}"
    return f"{taught.label} lowered the {name} by {-change.points:.1f} points: {numbers}"


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
        return f"{taught.label} ended {change} (a single run, which could be chance)"
    if not change.is_clear:
        return f"{taught.label} made no clear difference ({change})"
    return f"{taught.label} {'did not help' if change.points > 0 else 'helped'} ({change})"


@dataclass(frozen=True)
class Change:
    """By how many points an error changed, with half its 95 % interval (None: too few runs to tell).

    `runs` says over how many, in brackets for a sentence.
    """

    points: float
    interval: float | None
    runs: str

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval is not None and abs(self.points) > self.interval

    def __str__(self) -> str:
        return f"{abs(self.points):.1f} points {'lower' if self.points < 0 else 'higher'}"


def compare(taught: Group, alone: Group, metric: str) -> Change:
    """The change seed by seed where both groups have the same seeds, else between the means (Welch).

    Runs of one seed share their initial weights, images and order, so that their difference varies less
    than either of them.
    """
    after, before = _by_seed(taught, metric), _by_seed(alone, metric)
    if after and before and after.keys() == before.keys():
        return _paired_change([after[seed] - before[seed] for seed in after])
    return _welch_change(_spread(taught, metric), _spread(alone, metric))


def _by_seed(group: Group, metric: str) -> dict[object, float] | None:
    """The error of each seed; None if a seed is unknown or comes twice."""
    found = [
        (run.recipe.get("seed"), value) for run in group.runs if (value := run.number(metric)) is not None
    ]
    values = dict(found)
    return values if None not in values and len(values) == len(found) else None


def _paired_change(differences: Sequence[float]) -> Change:
    count, points = len(differences), statistics.fmean(differences)
    if count == 1:
        return Change(points, None, "")
    interval = _quantile(count - 1) * statistics.stdev(differences) / math.sqrt(count)
    return Change(points, interval, f" ({count} seeds each)")


def _welch_change(after: Spread, before: Spread) -> Change:
    points, runs = after.mean - before.mean, f" ({after.count} and {before.count} runs)"
    if before.deviation is None or after.deviation is None:
        return Change(points, None, runs)
    errors = [spread.deviation**2 / spread.count for spread in (before, after) if spread.deviation]
    if not errors:
        return Change(points, 0.0, runs)
    counts = [spread.count for spread in (before, after) if spread.deviation]
    freedom = sum(errors) ** 2 / sum(e**2 / (count - 1) for e, count in zip(errors, counts, strict=True))
    return Change(points, _quantile(freedom) * math.sqrt(sum(errors)), runs)


def _quantile(freedom: float) -> float:
    """Half the width of a 95 % interval, in standard errors."""
    stats = require("scipy.stats", extra="train", user="write_report", name="scipy")
    return float(stats.t.ppf(0.975, freedom))


def _spread(group: Group, metric: str) -> Spread:
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


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
