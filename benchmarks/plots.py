"""Plots of the rows of one device, as small PNGs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from attention_transfer._extras import require
from attention_transfer._files import write_atomically
from benchmarks.names import AUTHORS, CACHED, COMPILED, FLOOR, LIVE, PROJECT, STUDENT, TORCHDISTILL
from benchmarks.rows import Row
from benchmarks.targets import batch, sweeps

COLOURS = {
    PROJECT: "#1b6ca8",
    LIVE: "#1b6ca8",
    CACHED: "#5fa8d3",
    AUTHORS: "#c44e52",
    TORCHDISTILL: "#dd8452",
    COMPILED: "#8172b3",
    STUDENT: "#7f7f7f",
}
DPI = 90


def draw(rows: Sequence[Row], docs: Path, stem: str) -> list[str]:
    """Write the plots of these rows into `docs`, and give the Markdown that shows them."""
    drawings = {
        "kernels": ("Times the memory floor, forward and backward", kernels),
        "scaling": ("Cost against batch, channels, positions and number of pairs", scaling),
        "steps": ("Images a second in whole training steps", steps),
    }
    lines = []
    for name, (title, drawing) in drawings.items():
        figure = drawing(rows)
        if figure is not None:
            file = f"speed-{stem}-{name}.png"
            drawn = partial(figure.savefig, format="png", dpi=DPI, metadata={"Software": None})
            write_atomically(docs / file, drawn)
            lines.append(f"![{title}]({file})")
    return lines


def _figure(columns: int, width: float, height: float) -> tuple[Any, Any]:
    require("matplotlib", extra="train", user="bench")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def kernels(rows: Sequence[Row]) -> Any:
    """A panel a data type: each contender's times-the-floor at each shape and layout."""
    from matplotlib import ticker

    found = [
        row
        for row in rows
        if (row.benchmark, row.op, row.against, row.form) == ("kernels", "both", FLOOR, "code")
        and row.allocator == "kept"
    ]
    if not found:
        return None
    dtypes = list(dict.fromkeys(row.dtype for row in found))
    figure, axes = _figure(len(dtypes), 10, 4.2)
    for ax, dtype in zip(axes, dtypes, strict=True):
        panel = [row for row in found if row.dtype == dtype]
        labels = list(dict.fromkeys(map(_label, panel)))
        for backend in dict.fromkeys(row.backend for row in panel):
            points = [row for row in panel if row.backend == backend]
            ratio = np.array([[row.ratio, row.ratio_p20, row.ratio_p80] for row in points], dtype=float).T
            spread = [ratio[0] - ratio[1], ratio[2] - ratio[0]]
            y = [labels.index(_label(row)) for row in points]
            ax.errorbar(ratio[0], y, xerr=spread, fmt="o", ms=5, lw=1, color=COLOURS[backend], label=backend)
        ax.axvline(1, color="black", lw=1)
        ax.set(xscale="log", xlabel="times the floor", title=dtype)
        ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.set_yticks(range(len(labels)), labels, fontsize=7)
        ax.invert_yaxis()
        ax.grid(axis="x", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    return figure


def _label(row: Row) -> str:
    return f"{row.shape}\n{row.layout}"


def scaling(rows: Sequence[Row]) -> Any:
    """A panel for each thing that grows: time over bytes, beside a straight line from 0 to the largest."""
    found = sweeps(rows)
    if not found:
        return None
    figure, axes = _figure(len(found), 10, 2.9)
    for ax, (axis, steps) in zip(axes, found.items(), strict=True):
        x = [(row.moved or 0) / 1e6 for row in steps]
        y = [1000 * (row.p50 or 0) for row in steps]
        ax.plot([0, x[-1]], [0, y[-1]], "--", color="black", lw=1, label="linear")
        ax.plot(x, y, "o", color=COLOURS[PROJECT], label=PROJECT)
        ax.set(xlabel="MB that the floor moves", title=f"growing {axis}", xlim=0, ylim=0)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("ms")
    axes[0].legend(fontsize=7)
    return figure


def steps(rows: Sequence[Row]) -> Any:
    """Bars by setting and data type."""
    order = (STUDENT, CACHED, LIVE, TORCHDISTILL)
    found = {
        (row.shape, row.dtype, row.backend): batch(row) / row.p50
        for row in rows
        if (row.benchmark, row.op, row.against) == ("step", "step", "") and row.p50 and row.backend in order
    }
    if not found:
        return None
    groups = list(dict.fromkeys(key[:2] for key in found))
    figure, axes = _figure(len(groups), 10, 2.6)
    for ax, group in zip(axes, groups, strict=True):
        names = [name for name in order if (*group, name) in found]
        bars = ax.barh(
            names, [found[(*group, name)] for name in names], color=[COLOURS[name] for name in names]
        )
        ax.bar_label(bars, fmt="{:,.0f}", fontsize=7, padding=2)
        ax.margins(x=0.18)
        ax.invert_yaxis()
        ax.set_title(f"{group[0].split(',')[0]}\n{group[1]}", fontsize=8)
        ax.set_xlabel("images/s", fontsize=8)
        ax.tick_params(labelsize=7)
        if ax is not axes[0]:
            ax.set_yticklabels([])
    return figure
