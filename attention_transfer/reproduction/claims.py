"""What a table claims, held against runs that are paired by their seed."""

from __future__ import annotations

from attention_transfer.runs.statistics import Difference


def describe(name: str, difference: Difference | None, better: int) -> str:
    """A claim's line: "AT against student: -2.51 points, 95 % interval -3.30 to -1.72: better (n=3)".

    A word stands only where the interval excludes 0; `better` is the sign of what is better.
    """
    if difference is None:
        return f"{name}: no seed of both is there yet"
    points = f"{name}: {difference.mean:+.2f} points"
    if difference.interval is None:
        return f"{points}: no interval from one seed"
    low, high = difference.interval
    verdict = "better" if difference.mean * better > 0 else "worse"
    verdict = verdict if difference.is_clear else "no difference shown"
    return f"{points}, 95 % interval {low:+.2f} to {high:+.2f}: {verdict} (n={difference.pairs})"
