"""The geometry of the report's line charts and of its plot of final errors; report.html draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attention_transfer.runs.run import Run
from attention_transfer.runs.statistics import is_measurable
from attention_transfer.visualize.groups import Group

WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 36

Number = int | float
Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """A linear axis: values to pixels of the drawing."""

    low: Number
    high: Number
    start: Number
    end: Number

    def __call__(self, value: Number) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, count: int, *, whole: bool = False) -> list[tuple[float, str]]:
        """Round numbers within the axis, as (pixel, label)."""
        step = _round_step((self.high - self.low) / count)
        step = max(1.0, step) if whole else step
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(self(i * step), f"{i * step:.{digits}f}") for i in range(first, last + 1)]


@dataclass(frozen=True)
class Line:
    """The curve of one run, or the mean of a group, cut where values are not finite."""

    style: str
    is_mean: bool
    pieces: list[str]
    dots: list[Point]


@dataclass(frozen=True)
class Chart:
    """A line chart of one metric over the epochs; `hover` is what the script shows under the pointer."""

    title: str
    unit: str
    description: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    hover: dict[str, Any]


@dataclass(frozen=True)
class DotRow:
    """One group's final errors: a dot a run, a bar at the mean."""

    label: str
    style: str
    y: float
    dots: list[tuple[float, str]]
    mean: float
    text: str


@dataclass(frozen=True)
class DotPlot:
    title: str
    unit: str
    description: str
    height: float
    x_ticks: list[tuple[float, str]]
    rows: list[DotRow]


@dataclass(frozen=True)
class Series:
    """What is drawn in one colour: a curve {epoch: value} for each run, and their mean.

    A curve goes straight on from one of its epochs to the next, however far that is; NaN cuts it.
    """

    label: str
    style: str
    curves: list[dict[int, float]]


def line_chart(title: str, unit: str, column: str, groups: Sequence[Group]) -> Chart | None:
    """The chart of one column of the metrics, or None if no run has a number there."""
    return draw(
        title,
        unit,
        [Series(group.label, group.style, [curve(run, column) for run in group.runs]) for group in groups],
    )


def draw(title: str, unit: str, series: Sequence[Series]) -> Chart | None:
    """The chart of some curves, or None if all are empty."""
    known = [Series(s.label, s.style, [c for c in s.curves if _finite(c)]) for s in series]
    shown = [s for s in known if s.curves]
    if not shown:
        return None
    values = [value for s in shown for points in s.curves for value in _finite(points).values()]
    epochs = sorted({epoch for s in shown for points in s.curves for epoch in _finite(points)})
    x = Axis(*_widened(epochs[0], epochs[-1]), LEFT, WIDTH - RIGHT)
    y = Axis(*_rounded_out(min(values), max(values)), HEIGHT - BOTTOM, TOP)
    means = [_mean(s.curves) for s in shown]
    lines = [_line(s.style, False, points, x, y) for s in shown if len(s.curves) > 1 for points in s.curves]
    lines += [_line(s.style, True, mean, x, y) for s, mean in zip(shown, means, strict=True)]
    hover = [_hover_series(s, mean, epochs, y) for s, mean in zip(shown, means, strict=True)]
    return Chart(
        title,
        unit,
        _describe(title, unit, shown, means),
        x.ticks(6, whole=True),
        y.ticks(5),
        lines,
        {"x": [[epoch, x(epoch)] for epoch in epochs], "unit": unit, "series": hover},
    )


def dot_plot(title: str, unit: str, name: str, groups: Sequence[Group]) -> DotPlot | None:
    """The plot of one number of the results, a row a group, or None if no run has finished."""
    found = [(group, [v for run in group.runs if (v := run.number(name)) is not None]) for group in groups]
    found = [(group, values) for group, values in found if values]
    if not found:
        return None
    everything = [value for _, values in found for value in values]
    x = Axis(*_rounded_out(min(everything), max(everything)), 16, WIDTH - 16)
    step = max(44.0, (HEIGHT - TOP - BOTTOM) / len(found))
    rows = [
        DotRow(
            group.title,
            group.style,
            TOP + step * i + 30,
            [(x(value), f"{value:.2f}") for value in values],
            x(sum(values) / len(values)),
            f"{group.spread(name)} {unit}",
        )
        for i, (group, values) in enumerate(found)
    ]
    description = f"{title}: " + "; ".join(f"{row.label} {row.text}" for row in rows)
    return DotPlot(title, unit, description, TOP + step * len(found) + BOTTOM, x.ticks(5), rows)


def curve(run: Run, column: str) -> dict[int, float]:
    """{epochs finished, counted from 1: value} of one column, NaN where it is empty or beyond measure."""
    values = (v if is_measurable(v) else math.nan for v in run.metrics.get(column, []))
    return dict(enumerate(values, start=1))


def _finite(points: dict[int, float]) -> dict[int, float]:
    return {epoch: value for epoch, value in points.items() if is_measurable(value)}


def _mean(curves: Sequence[dict[int, float]]) -> dict[int, float]:
    """The mean over runs, at the epochs that all of them have."""
    shared = sorted(set.intersection(*map(set, curves)))
    return {epoch: sum(points[epoch] for points in curves) / len(curves) for epoch in shared}


def _line(style: str, is_mean: bool, points: dict[int, float], x: Axis, y: Axis) -> Line:
    pieces: list[list[int]] = [[]]
    for epoch, value in points.items():
        if math.isfinite(value):
            pieces[-1].append(epoch)
        else:
            pieces.append([])
    paths = [" ".join(f"{x(e)},{y(points[e])}" for e in piece) for piece in pieces if len(piece) > 1]
    return Line(style, is_mean, paths, [(x(p[0]), y(points[p[0]])) for p in pieces if len(p) == 1])


def _hover_series(series: Series, mean: dict[int, float], epochs: Sequence[int], y: Axis) -> dict[str, Any]:
    """Per epoch: null, or [text, pixel], where the text holds the mean and the range over the seeds."""
    points: list[Any] = []
    for epoch in epochs:
        if not math.isfinite(mean.get(epoch, math.nan)):
            points.append(None)
            continue
        values = [points_of[epoch] for points_of in series.curves if epoch in points_of]
        text = _number(mean[epoch])
        if len(values) > 1:
            text += f"  ({_number(min(values))} to {_number(max(values))})"
        points.append([text, y(mean[epoch])])
    return {"label": series.label, "style": series.style, "points": points}


def _describe(title: str, unit: str, shown: Sequence[Series], means: Sequence[dict[int, float]]) -> str:
    ends = [
        f"{series.label} ends at {_number(mean[max(mean)])} after epoch {max(mean)}"
        for series, mean in zip(shown, map(_finite, means), strict=True)
        if mean
    ]
    return f"Line chart of {title} ({unit}) by epoch: {'; '.join(ends)}"


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def _round_step(step: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _widened(low: Number, high: Number) -> tuple[Number, Number]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _rounded_out(low: float, high: float) -> tuple[float, float]:
    """The range with some room around it, ending on round numbers; values that are never negative stay so."""
    room = (high - low) * 0.03 or abs(high) * 0.1 or 1.0
    low, high = (max(0.0, low - room) if low >= 0 else low - room), high + room
    step = _round_step((high - low) / 10)
    return math.floor(low / step) * step, math.ceil(high / step) * step
