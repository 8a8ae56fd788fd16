"""What a table claims, held against runs that are paired by their seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

from attention_transfer._extras import require

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """The mean difference, first minus second, over the seeds of both, and its 95 % t interval.

    The interval is None for a single pair, and a point where all pairs differ by the same.
    """

    difference: float
    interval: tuple[float, float] | None
    count: int

    @classmethod
    def of(cls, first: Mapping[int, float], second: Mapping[int, float]) -> Paired | None:
        """Compare two columns, {seed: value}; None if they have no seed in common."""
        seeds = sorted(first.keys() & second.keys())
        if not seeds:
            return None
        differences = [first[seed] - second[seed] for seed in seeds]
        return cls(fmean(differences), _interval(differences), len(seeds))

    def verdict(self, better: int) -> str:
        """A word only where the interval excludes 0; `better` is the sign of what is better."""
        if self.interval is None:
            return "no interval from one seed"
        low, high = self.interval
        if low <= 0 <= high:
            return f"no difference shown (n={self.count})"
        return f"{'better' if self.difference * better > 0 else 'worse'} (n={self.count})"


def _interval(differences: list[float]) -> tuple[float, float] | None:
    count, mean = len(differences), fmean(differences)
    if count < 2:
        return None
    stats = require("scipy.stats", extra="train", user="reproduce", name="scipy")
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * stdev(differences) / math.sqrt(count)
    return mean - half, mean + half


def describe(name: str, paired: Paired | None, better: int) -> str:
    """A claim's line: "AT against student: -2.51 points, 95 % interval -3.30 to -1.72: better (n=3)"."""
    if paired is None:
        return f"{name}: no seed of both is there yet"
    parts = [f"{name}: {paired.difference:+.2f} points"]
    if paired.interval is not None:
        parts.append(f"95 % interval {paired.interval[0]:+.2f} to {paired.interval[1]:+.2f}")
    return f"{', '.join(parts)}: {paired.verdict(better)}"
