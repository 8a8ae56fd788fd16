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
from benchmarks.targets import NOT_MEASURED, TARGETS, activation_bytes, batch

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


def markdown(header: Cells, rows: Sequence[Cells], words: int = 1) -> str:
    """A table, its columns after those of words to the right; empty without rows."""
    if not rows:
        return ""
    rule = ["---"] * words + ["---:"] * (len(header) - words)
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
    return markdown(["what", "target", "measured", ""], cells, words=4)


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
    tables = []
    for device in dict.fromkeys(row.device for row in found):
        cells = []
        for shape, layout in dict.fromkeys((row.shape, row.layout) for row in found):
            case = {r.backend: r for r in found if (r.device, r.shape, r.layout) == (device, shape, layout)}
            cells.append([f"{shape}, {layout}", *(_share_of_activation(case.get(name)) for name in backends)])
        tables.append(f"**{device}**\n\n{markdown(['activation', *backends], cells)}")
    return "\n\n".join(tables)


def _share_of_activation(row: Row | None) -> str:
    if row is None or row.bytes is None or row.saved is None:
        return "-"
    return "; ".join(f"{100 * size / activation_bytes(row):.1f}" for size in (row.bytes, row.saved))


def steps(rows: Sequence[Row]) -> str:
    """Whole steps: a table for each pair of models, with the data types side by side."""
    order = (STUDENT, TEACHER, NO_TERM, LIVE, CACHED, TORCHDISTILL, TERM_ALONE)
    chosen = [row for row in rows if row.benchmark == "step" and not row.against]
    blocks = []
    for device, shape in dict.fromkeys((row.device, row.shape) for row in chosen):
        case = {(r.backend, r.dtype): r for r in chosen if (r.device, r.shape) == (device, shape)}
        dtypes = list(dict.fromkeys(dtype for _, dtype in case))
        cells = [
            [name, *(cell for dtype in dtypes for cell in _step_cells(case.get((name, dtype))))]
            for name in order
            if (name, dtypes[0]) in case
        ]
        header = ["", *(text for dtype in dtypes for text in (f"{dtype}, ms", "images/s", "peak, MB"))]
        blocks.append(f"**{device}: {shape}**\n\n{markdown(header, cells)}")
    return "\n\n".join(blocks)


def _step_cells(row: Row | None) -> Cells:
    if row is None or row.p50 is None or row.p20 is None or row.p80 is None:
        return ["-" if row is None else row.note, "", ""]
    spread = f"{1000 * row.p50:.1f} ({1000 * row.p20:.1f} to {1000 * row.p80:.1f})"
    rate = "" if row.op == "term" else f"{batch(row) / row.p50:,.0f}"
    return [spread, rate, "" if row.bytes is None else f"{row.bytes / 1e6:,.0f}"]


def ratios(rows: Sequence[Row]) -> str:
    """Whole steps against each other, and the term's share: a column for each setting."""
    chosen = [row for row in rows if row.benchmark == "step" and row.against]
    settings = list(dict.fromkeys((row.device, row.shape, row.dtype) for row in chosen))
    found = {(_comparison(row), row.device, row.shape, row.dtype): row for row in chosen}
    cells = [
        [comparison, *(_ratio_with_spread(found.get((comparison, *setting))) for setting in settings)]
        for comparison in dict.fromkeys(map(_comparison, chosen))
    ]
    header = [f"{device.split(':')[0]}: {shape.split(',')[0]}, {dtype}" for device, shape, dtype in settings]
    return markdown(["", *header], cells)


def _comparison(row: Row) -> str:
    return f"{row.backend} / ({row.against})" if row.op == "step" else f"{row.op}, of {row.against}"


def _ratio_with_spread(row: Row | None) -> str:
    if row is None or row.ratio is None:
        return "-"
    style = ".3f" if row.op == "step" else ".1%"
    spread = "" if row.ratio_p20 is None else f" ({row.ratio_p20:{style}} to {row.ratio_p80:{style}})"
    return f"{row.ratio:{style}}{spread}"


def terms(rows: Sequence[Row]) -> str:
    """Steps with each term of the paper."""
    found = [row for row in rows if row.benchmark == "terms"]
    ratios = {(row.device, row.backend): _times(row, spread=True) for row in found if row.against}
    alone = {row.device: row.bytes or 1 for row in found if row.backend == STUDENT and row.bytes}
    cells = [
        [
            f"{row.device}: {row.shape}",
            row.backend,
            f"{1000 * (row.p50 or 0):.0f}",
            ratios.get((row.device, row.backend), ""),
            f"{row.bytes / 2**20:.0f}",
            f"{row.bytes / alone[row.device]:.2f}",
        ]
        for row in found
        if row.bytes
    ]
    header = ["", "term", "ms", "times the student alone", "peak MiB", "times the student alone"]
    return markdown(header, cells, words=2)


def caffe_nets(rows: Sequence[Row]) -> str:
    """Steps of nets read from prototxt, and what they are compared with."""
    cells = [
        [f"{row.device}: {row.shape}", row.backend, f"{1000 * (row.p50 or 0):.1f}", ""]
        if not row.against
        else [f"{row.device}: {row.shape}", f"{row.backend} / ({row.against})", "", _times(row, spread=True)]
        for row in rows
        if row.benchmark == "caffe"
    ]
    return markdown(["", "", "ms", "ratio"], cells, words=2)


def own_defaults(rows: Sequence[Row]) -> str:
    """Each project with its defaults."""
    cells = []
    for row in rows:
        if row.benchmark != "defaults" or row.against:
            continue
        settings = f"{row.dtype}, {row.layout}, freed memory {row.allocator}" if row.p50 else row.note
        rate = f"{batch(row) / row.p50:,.0f}" if row.p50 else ""
        cells.append([f"{row.device}: {row.shape}", row.backend, settings, rate])
    return markdown(["setting", "", "defaults", "images/s"], cells, words=3)


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
    "terms": terms,
    "caffe": caffe_nets,
    "waits": waits,
}

if __name__ == "__main__":
    print(write_docs(ROOT / "benchmarks" / "results", ROOT / "docs"))
