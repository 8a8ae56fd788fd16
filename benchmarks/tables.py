"""docs/speed.md: its tables and plots, from the rows in `results/`. Run: python -m benchmarks.tables"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from attention_transfer._files import write_atomically
from benchmarks import plots
from benchmarks.names import (
    AUTHORS,
    CACHED,
    COMPILED,
    FLOOR,
    LIVE,
    NO_TERM,
    PROJECT,
    STUDENT,
    TEACHER,
    TERM_ALONE,
    TORCHDISTILL,
)
from benchmarks.rows import ROOT, Row, latest, read
from benchmarks.targets import NOT_MEASURED, TARGETS, activation_bytes

OTHERS = (AUTHORS, TORCHDISTILL, COMPILED)
Cells = Sequence[str]


def write_docs(results: Path, docs: Path) -> Path:
    """Fill in every block of docs/speed.md between its markers, and draw the plots beside it.

    Raises:
        FileNotFoundError: if there is no speed.md.
        ValueError: if speed.md has no place for a block.
    """
    files = {path.stem: latest(read(path)) for path in sorted(results.glob("*.csv")) if path.stem != "quick"}
    rows = [row for found in files.values() for row in found]
    page = docs / "speed.md"
    text = page.read_text(encoding="utf-8")
    for name, block in BLOCKS.items():
        text = fill(text, name, block(rows) or f"({NOT_MEASURED} yet)")
    drawn = [line for stem, found in files.items() for line in plots.draw(found, docs, stem)]
    text = fill(text, "plots", "\n\n".join(drawn) or f"({NOT_MEASURED} yet)")
    write_atomically(page, text)
    return page


def fill(text: str, name: str, block: str) -> str:
    """The text with `block` between the markers of that name.

    Raises:
        ValueError: if the markers are not there.
    """
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"tables: expected {begin} and {end} in speed.md, got neither or one. Add them.")
    return pattern.sub(lambda _: f"{begin}\n{block}\n{end}", text)


def markdown(header: Cells, rows: Sequence[Cells]) -> str:
    """A table, its columns after the first to the right; empty without rows."""
    if not rows:
        return ""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


# --- blocks -------------------------------------------------------------------------------------------------


def where(rows: Sequence[Row]) -> str:
    """Which processors, versions and commits the rows come from."""
    lines = []
    for device, threads in dict.fromkeys((row.device, row.threads) for row in rows):
        found = [row for row in rows if (row.device, row.threads) == (device, threads)]
        commits = ", ".join(dict.fromkeys(row.commit for row in found))
        versions = ", ".join(dict.fromkeys(row.torch for row in found))
        days = sorted({row.time[:10] for row in found})
        lines.append(
            f"- {device}, {threads} threads, torch {versions}, commit {commits}, "
            f"{' to '.join(dict.fromkeys((days[0], days[-1])))}"
        )
    return "\n".join(lines)


def targets(rows: Sequence[Row]) -> str:
    """Each target with what was measured."""
    verdict = {True: "met", False: "**missed**", None: ""}
    cells = []
    for target in TARGETS:
        measured, hit = target.read(rows)
        cells.append([target.what, target.goal, measured, verdict[hit]])
    return markdown(["what", "target", "measured", ""], cells)


def kernels(rows: Sequence[Row]) -> str:
    """Times of the floor, and how many times that the contenders take."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.benchmark == "kernels":
            groups.setdefault((row.device, row.dtype, row.form, row.allocator), []).append(row)
    kept_first = sorted(groups.items(), key=lambda group: group[0][-1] != "kept")
    return "\n\n".join(
        f"**{device}, {dtype}, form `{form}`, freed memory {allocator}**\n\n{_kernel_table(found)}"
        for (device, dtype, form, allocator), found in kept_first
    )


def _kernel_table(rows: Sequence[Row]) -> str:
    cells = []
    for shape, layout in dict.fromkeys((row.shape, row.layout) for row in rows):
        case = {
            (row.backend, row.op, row.against): row
            for row in rows
            if (row.shape, row.layout) == (shape, layout)
        }
        floor = case[FLOOR, "both", ""]
        cells.append(
            [
                f"{shape}, {layout}",
                f"{activation_bytes(floor) / 1e6:.0f}",
                f"{1000 * (floor.p50 or 0):.2f}",
                f"{(floor.moved or 0) / (floor.p50 or 1) / 1e9:.0f}",
                *(_times(case.get((PROJECT, op, FLOOR))) for op in ("forward", "backward")),
                _times(case.get((PROJECT, "both", FLOOR)), spread=True),
                *(_times(case.get((other, "both", FLOOR)), spread=True) for other in OTHERS),
            ]
        )
    header = ["activation", "MB", "floor, ms", "GB/s", "forward", "backward", f"**{PROJECT}**", *OTHERS]
    return markdown(header, cells)


def _times(row: Row | None, *, spread: bool = False) -> str:
    if row is None or row.ratio is None:
        return "-"
    digits = 2 if row.ratio < 10 else 1
    range_ = f" ({row.ratio_p20:.{digits}f} to {row.ratio_p80:.{digits}f})" if spread else ""
    return f"{row.ratio:.{digits}f}{range_}"


def memory(rows: Sequence[Row]) -> str:
    """Bytes at the peak, and bytes kept from forward to backward, as shares of the student's activation."""
    found = [
        row
        for row in rows
        if (row.benchmark, row.op, row.against, row.form) == ("kernels", "both", FLOOR, "code")
        and (row.dtype, row.allocator) == ("float32", "kept")
    ]
    backends = dict.fromkeys(row.backend for row in found)
    cells = []
    for device, shape, layout in dict.fromkeys((row.device, row.shape, row.layout) for row in found):
        case = {r.backend: r for r in found if (r.device, r.shape, r.layout) == (device, shape, layout)}
        shown = [_share_of_activation(case.get(backend)) for backend in backends]
        cells.append([f"{device}: {shape}, {layout}", *shown])
    return markdown(["peak; saved, in % of A", *backends], cells)


def _share_of_activation(row: Row | None) -> str:
    if row is None or row.bytes is None or row.saved is None:
        return "-"
    return "; ".join(f"{100 * size / activation_bytes(row):.1f}" for size in (row.bytes, row.saved))


def steps(rows: Sequence[Row]) -> str:
    """Whole steps, in images a second."""
    order = (STUDENT, TEACHER, NO_TERM, LIVE, CACHED, TORCHDISTILL, TERM_ALONE)
    chosen = [
        row for row in rows if row.benchmark == "step" and row.op in ("step", "term") and not row.against
    ]
    blocks = []
    for device, shape, dtype in dict.fromkeys((row.device, row.shape, row.dtype) for row in chosen):
        case = {
            row.backend: row for row in chosen if (row.device, row.shape, row.dtype) == (device, shape, dtype)
        }
        cells = [_step_cells(case[name]) for name in order if name in case]
        table = markdown(["", "ms", "p20 to p80", "images/s", "peak, MB"], cells)
        blocks.append(f"**{device}: {shape}, {dtype}, {next(iter(case.values())).layout}**\n\n{table}")
    return "\n\n".join(blocks)


def _step_cells(row: Row) -> Cells:
    if row.p50 is None or row.p20 is None or row.p80 is None:
        return [row.backend, row.note, "", "", ""]
    rate = "" if row.op == "term" else f"{batch(row) / row.p50:,.0f}"
    peak = "" if row.bytes is None else f"{row.bytes / 1e6:,.0f}"
    spread = f"{1000 * row.p20:.1f} to {1000 * row.p80:.1f}"
    return [row.backend, f"{1000 * row.p50:.1f}", spread, rate, peak]


def batch(row: Row) -> int:
    """Images in a step of the row's setting, "student from teacher, 128x3x32x32"."""
    return int(row.shape.split()[-1].split("x")[0])


def ratios(rows: Sequence[Row]) -> str:
    """Whole steps against each other, and the term's share."""
    cells = [
        [f"{row.shape}, {row.dtype}", row.backend, _comparison(row), _figure(row.ratio), _spread(row)]
        for row in rows
        if row.benchmark == "step" and row.against
    ]
    return markdown(["setting", "", "against", "ratio", "p20 to p80"], cells)


def _comparison(row: Row) -> str:
    return row.against if row.op == "step" else f"{row.op}: of {row.against}"


def _figure(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3f}"


def _spread(row: Row) -> str:
    return "" if row.ratio_p20 is None else f"{_figure(row.ratio_p20)} to {_figure(row.ratio_p80)}"


def own_defaults(rows: Sequence[Row]) -> str:
    """Each project with its defaults."""
    cells = []
    for row in rows:
        if row.benchmark != "defaults" or row.against:
            continue
        settings = f"{row.dtype}, {row.layout}, freed memory: {row.allocator}" if row.p50 else row.note
        rate = f"{batch(row) / row.p50:,.0f}" if row.p50 else ""
        cells.append([f"{row.device}: {row.shape}", row.backend, settings, rate])
    return markdown(["setting", "", "defaults", "images/s"], cells)


def waits(rows: Sequence[Row]) -> str:
    """Start-up and first calls."""
    cells = [
        [f"{row.backend}: {row.op}", _spread_of_seconds(row)]
        for row in rows
        if row.benchmark in ("startup", "compile")
    ]
    return markdown(["", "seconds"], cells)


def _spread_of_seconds(row: Row) -> str:
    if row.p50 is None:
        return row.note
    return f"{row.p50:.3f}" + (f" ({row.p20:.3f} to {row.p80:.3f})" if row.p20 and row.p80 else "")


BLOCKS: dict[str, Callable[[Sequence[Row]], str]] = {
    "where": where,
    "targets": targets,
    "kernels": kernels,
    "memory": memory,
    "steps": steps,
    "ratios": ratios,
    "defaults": own_defaults,
    "waits": waits,
}

if __name__ == "__main__":
    print(write_docs(ROOT / "benchmarks" / "results", ROOT / "docs"))
