"""What several runs say together: mean and spread, and by how much one method differs from another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attention_transfer._extras import require

CONFIDENCE = 0.95
MAX_MEASURABLE = 1e100  # whose square is a number too, for spreads


def is_measurable(value: float) -> bool:
    """Whether a number is finite, and not so large that sums and squares of it are none."""
    # guard: measurable-numbers
    return abs(value) <= MAX_MEASURABLE


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (None for a single value)."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))

    def __str__(self) -> str:
        return format(self)

    def __format__(self, digits: str) -> str:
        digits = digits or ".1f"
        mean = format(self.mean, digits)
        return mean if self.deviation is None else f"{mean} ± {format(self.deviation, digits)}"


@dataclass(frozen=True)
class Difference:
    """By how much the mean of one sample exceeds that of another.

    Attributes:
        mean: the first minus the second.
        half_width: half of its 95 % interval; None where there are too few values to tell.
        pairs: how many pairs it is the mean of; None for samples that are not paired.
    """

    mean: float
    half_width: float | None
    pairs: int | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.half_width is None else (self.mean - self.half_width, self.mean + self.half_width)

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """Student's t over the seeds of both, {seed: value}; None if they have no seed in common.

    Runs of one seed share their initial weights, images and order, so that their difference varies less than
    either of them.
    """
    found = Spread.of([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])
    if found is None or found.deviation is None:
        return None if found is None else Difference(found.mean, None, found.count)
    error = found.deviation / math.sqrt(found.count)
    return Difference(found.mean, _quantile(found.count - 1) * error, found.count)


def welch_difference(first: Spread, second: Spread) -> Difference:
    """Welch's t between the means of two samples that are not paired."""
    mean = first.mean - second.mean
    if first.deviation is None or second.deviation is None:
        return Difference(mean, None)
    varying = [spread for spread in (second, first) if spread.deviation]
    if not varying:
        return Difference(mean, 0.0)
    errors = [spread.deviation**2 / spread.count for spread in varying]  # type: ignore[operator]
    freedom = sum(errors) ** 2 / sum(
        error**2 / (spread.count - 1) for error, spread in zip(errors, varying, strict=True)
    )
    return Difference(mean, _quantile(freedom) * math.sqrt(sum(errors)))


def _quantile(freedom: float) -> float:
    """Half the width of the interval, in standard errors."""
    stats = require("scipy.stats", extra="train", user="statistics", name="scipy")
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
