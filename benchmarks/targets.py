"""The targets of the project's plan, and what the latest rows say to each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.names import (
    AUTHORS,
    BY_HAND,
    CACHED,
    COMPILED,
    FLOOR,
    LIVE,
    PROJECT,
    STUDENT,
    TAPPED,
    TEACHER,
    TORCHDISTILL,
)
from benchmarks.rows import Row

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
COLUMNS = ("shape", "dtype", "layout", "form")
NOT_MEASURED = "not measured"

Measured = tuple[str, bool | None]  # in words, and whether the target is met; None where that is not said


@dataclass(frozen=True)
class Target:
    """What is to be reached, and how to read it off the rows of a device."""

    what: str
    goal: str
    read: Callable[[Sequence[Row]], Measured]


def near_floor(limit: float, megabytes: float, device: str) -> Callable[[Sequence[Row]], Measured]:
    """This project's float32 forward and backward over the floor, the worst of each layout."""

    def read(rows: Sequence[Row]) -> Measured:
        found = [
            row
            for row in rows
            if (row.benchmark, row.backend, row.op, row.against) == ("kernels", PROJECT, "both", FLOOR)
            and (row.dtype, row.allocator) == ("float32", "kept")
            and activation_bytes(row) > megabytes * 1e6
            and device in row.device
        ]
        return by_group(found, lambda row: row.layout, lambda ratio: ratio <= limit)

    return read


def faster_than(others: Sequence[str], limit: float, device: str) -> Callable[[Sequence[Row]], Measured]:
    """How many times this project's time the others take; all of them with freed memory kept decide."""

    def read(rows: Sequence[Row]) -> Measured:
        found = _against_project(rows, others, device)
        text, _ = by_group(found, _who, bool)
        _, hit = by_group(_kept(found), _who, lambda ratio: ratio >= limit)
        return text, hit

    return read


def tenfold(rows: Sequence[Row]) -> Measured:
    """At least 5 times faster everywhere, and 10 times where a term at 1.3 times the floor would be that."""
    text, hit = faster_than((AUTHORS, TORCHDISTILL), 5, "CPU")(rows)
    if hit is None:
        return text, hit
    over_floor = {
        _measured(row): row.ratio or 0
        for row in rows
        if (row.benchmark, row.op, row.against) == ("kernels", "both", FLOOR)
    }
    found = _kept(_against_project(rows, (AUTHORS, TORCHDISTILL), "CPU"))
    allowed = [row for row in found if over_floor.get(_measured(row), 0) >= 10 * 1.3]
    count = sum((row.ratio or 0) >= 10 for row in allowed)
    return f"{text}; tenfold in {count} of {len(allowed)} cases that allow it", hit and count == len(allowed)


def _against_project(rows: Sequence[Row], others: Sequence[str], device: str) -> list[Row]:
    return [
        row
        for row in rows
        if (row.benchmark, row.op, row.against) == ("kernels", "both", PROJECT)
        and row.backend in others
        and device in row.device
    ]


def _kept(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.allocator == "kept"]


def _who(row: Row) -> str:
    return row.backend + ("" if row.allocator == "kept" else f" with freed memory {row.allocator}")


def _measured(row: Row) -> tuple[object, ...]:
    return tuple(getattr(row, name) for name in ("device", "backend", "allocator", *COLUMNS))


def whole_step(
    backend: str, against: str, holds: Callable[[float], bool], *, student: str = "", op: str = "step"
) -> Callable[[Sequence[Row]], Measured]:
    """A ratio of whole steps, by setting and precision."""

    def read(rows: Sequence[Row]) -> Measured:
        found = [
            row
            for row in rows
            if (row.benchmark, row.op, row.backend, row.against) == ("step", op, backend, against)
            and row.shape.startswith(student)
        ]
        style = ".3f" if op == "step" else ".1%"
        return by_group(found, lambda row: f"{row.shape.split()[0]} {row.dtype}", holds, style)

    return read


def our_defaults(rows: Sequence[Row]) -> Measured:
    """Whole steps, each project in a process of its own with its own defaults."""
    found = [row for row in rows if row.benchmark == "defaults" and row.against == PROJECT]
    return by_group(found, lambda row: row.shape.split()[0], lambda ratio: ratio >= 2)


def net_from_prototxt(rows: Sequence[Row]) -> Measured:
    """A step of a Caffe net against the same net written by hand."""
    found = [row for row in rows if (row.benchmark, row.against) == ("caffe", BY_HAND)]
    return by_group(found, lambda row: row.shape, lambda ratio: ratio <= 1.1, ".3f")


def linear(rows: Sequence[Row]) -> Measured:
    """Slopes in a doubly logarithmic plot: 1 is linear."""
    slopes = {
        axis: slope([(row.moved or 0, row.p50 or 0) for row in found]) for axis, found in sweeps(rows).items()
    }
    return ", ".join(f"{axis}: slope {value:.2f}" for axis, value in slopes.items()) or NOT_MEASURED, None


def startup(rows: Sequence[Row]) -> Measured:
    """Seconds of the import and of --help."""
    found = {row.op: row.p50 or 0 for row in rows if row.benchmark == "startup"}
    if not found:
        return NOT_MEASURED, None
    bare, names = found["import attention_transfer beyond torch"], found["every public name beyond torch"]
    help_ = next(seconds for op, seconds in found.items() if op.endswith("--help"))
    words = f"{bare:.3f} s, and {names:.3f} s once every name has been used; {help_:.2f} s"
    return words, max(bare, names) <= 0.15 and help_ <= 0.6


TARGETS = [
    Target(
        "the term, forward and backward, against the floor: CPU, float32, over 8 MB",
        "≤ 1.3 in both layouts",
        near_floor(1.3, 8, "CPU"),
    ),
    Target("the same on an H200, over 64 MB", "≤ 1.15", near_floor(1.15, 64, "H200")),
    Target(
        "the authors' formula and torchdistill against the term, CPU",
        "≥ 10 where the floor allows it, never under 5",
        tenfold,
    ),
    Target(
        "`torch.compile` of the authors' formula against the term, CPU",
        "≥ 3",
        faster_than((COMPILED,), 3, "CPU"),
    ),
    Target("the same on a GPU", "≥ 1.5", faster_than((COMPILED,), 1.5, "GPU")),
    Target(
        "extra peak memory of the term in a step, of the tapped activations",
        "≤ 2 %",
        whole_step(LIVE, TAPPED, lambda ratio: ratio <= 0.02, op="extra peak memory"),
    ),
    Target(
        "the term's share of the whole WRN-16-1 step",
        "≤ 3 %",
        whole_step(LIVE, LIVE, lambda ratio: ratio <= 0.03, student="wrn-16-1", op="share, by itself"),
    ),
    Target(
        "a step with a live teacher against student alone + teacher forward alone",
        "≤ 1.05",
        whole_step(LIVE, f"{STUDENT} + {TEACHER}", lambda ratio: ratio <= 1.05),
    ),
    Target(
        "a step with the cache against the student alone",
        "≤ 1.08",
        whole_step(CACHED, STUDENT, lambda ratio: ratio <= 1.08),
    ),
    Target(
        "torchdistill's loop against the whole live step, same precision and settings",
        "≥ 1.3",
        whole_step(TORCHDISTILL, LIVE, lambda ratio: ratio >= 1.3),
    ),
    Target("the same, each with its defaults", "≥ 2", our_defaults),
    Target("a step of a Caffe net against the same net written by hand", "≤ 1.1", net_from_prototxt),
    Target("cost against b, c, h·w and number of pairs", "linear", linear),
    Target(
        "`import attention_transfer` beyond `import torch`; `attention-transfer --help` in all",
        "≤ 0.15 s; ≤ 0.6 s",
        startup,
    ),
]


def by_group(
    rows: Iterable[Row],
    group: Callable[[Row], str],
    holds: Callable[[float], bool],
    style: str = ".2f",
) -> Measured:
    """The range of the ratios of each group, and whether all of them hold."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row.ratio is not None:
            groups.setdefault(group(row), []).append(row.ratio)
    if not groups:
        return NOT_MEASURED, None
    texts = [f"{name}: {_range(ratios, style)}" for name, ratios in groups.items()]
    return ", ".join(texts), all(holds(ratio) for ratios in groups.values() for ratio in ratios)


def _range(ratios: Sequence[float], style: str) -> str:
    low, high = (f"{edge:{style}}" for edge in (min(ratios), max(ratios)))
    return low if low == high else f"{low} to {high}"


def batch(row: Row) -> int:
    """Images in a step of the row's setting, "student from teacher, 128x3x32x32"."""
    return int(row.shape.split()[-1].split("x")[0])


def activation_bytes(row: Row) -> int:
    return math.prod(map(int, row.shape.split("x"))) * BYTES[row.dtype]


def sweeps(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of the scaling benchmark by what grows, from small to large."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.benchmark == "scaling" and row.p50 is not None:
            found.setdefault(row.op.split()[-1], []).append(row)
    return {axis: sorted(steps, key=lambda row: row.moved or 0) for axis, steps in found.items()}


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of a straight line through the points in a doubly logarithmic plot."""
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])
