"""The table as a picture: published and ours, a column of points a number, the seeds visible."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from attention_transfer._extras import require
from attention_transfer._files import write_atomically

if TYPE_CHECKING:
    from attention_transfer.reproduction.results import Results

PUBLISHED, OURS = "#b3531b", "#1f5fa8"


def save_plot(results: Results, path: Path) -> Path:
    """Draw a panel a row of the table; a panel has two scales where ours lies far from the published."""
    require("matplotlib", extra="train", user="reproduce")
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys(row for row, _ in results.cells))
    figure = Figure(figsize=(8.5, 1.1 + 3.1 * len(rows)), dpi=150, layout="constrained")
    for i, row in enumerate(rows):
        _panel(figure.add_subplot(len(rows), 1, i + 1), results, row)
    figure.suptitle(_title(results), fontsize=9)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path


def _title(results: Results) -> str:
    setting = results.setting
    images = "" if setting.max_train is None else f", {setting.max_train:,} training images"
    schedule = "published schedule" if setting.scale == 1 else f"epochs × {setting.scale:g}"
    return (
        f"{results.table.title}\n{schedule}{images}; data: {results.data}\n"
        "two scales; a point is equally long on both"
    )


def _panel(axes: Any, results: Results, row: str) -> None:
    """Published left, ours right, each on its own scale of equal span: what is compared is the order."""
    cells = [(column, each) for (r, column), each in results.cells.items() if r == row]
    twin = axes.twinx()
    published = [(i, e.published) for i, (_, e) in enumerate(cells) if e.published is not None]
    ours = [(i, list(results.values(e.name).values())) for i, (_, e) in enumerate(cells)]
    axes.plot(*zip(*published, strict=True), "D", color=PUBLISHED, ms=6) if published else None
    for i, values in ours:
        if values:
            twin.plot([i + 0.18] * len(values), values, "o", color=OURS, ms=4, alpha=0.55, mew=0)
            twin.hlines(fmean(values), i + 0.06, i + 0.30, color=OURS, lw=2)
    _equal_spans(axes, [v for _, v in published], twin, [v for _, values in ours for v in values])
    axes.set_xticks(range(len(cells)), [results.table.columns[column] for column, _ in cells])
    axes.set_xlim(-0.5, len(cells) - 0.3)
    axes.set_ylabel(f"published (diamonds)\n{results.table.unit}", color=PUBLISHED, fontsize=8)
    twin.set_ylabel(f"ours: a dot a seed, bars the means\n{results.table.unit}", color=OURS, fontsize=8)
    axes.set_title(results.table.rows[row], fontsize=9)
    for each, color in ((axes, PUBLISHED), (twin, OURS)):
        each.tick_params(axis="y", colors=color, labelsize=8)
        each.spines["top"].set_visible(False)


def _equal_spans(left: Any, published: list[float], right: Any, ours: list[float]) -> None:
    """A point up is as long on both scales."""
    span = max([1.0, *(max(v) - min(v) for v in (published, ours) if v)]) * 1.25
    for axes, values in ((left, published), (right, ours)):
        if values:
            middle = (max(values) + min(values)) / 2
            axes.set_ylim(middle - span / 2, middle + span / 2)
        else:
            axes.set_yticks([])
