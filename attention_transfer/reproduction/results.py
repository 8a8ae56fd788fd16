"""What came out: the table, published against ours, as text, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from attention_transfer._files import write_atomically
from attention_transfer._tables import duration, format_table
from attention_transfer.reproduction.claims import describe
from attention_transfer.reproduction.setting import Setting
from attention_transfer.reproduction.tables import UNITS, Cell, Reproduction, Table
from attention_transfer.runs.run import Run
from attention_transfer.runs.statistics import Spread, paired_difference

HEADER = ["row", "column", "published", "ours", "mean ± s.d.", "difference", "n", "each seed"]
NOT_YET = "not run"


@dataclass(frozen=True)
class Results:
    """The runs of some cells of a table, as far as they are there.

    Attributes:
        data: what the images are, in words.
        runs: {reproduction: {seed: finished run}}.
        seeds: how many are wanted.
        once: the numbers of which one run is wanted, of seed 0.
    """

    table: Table
    cells: dict[Cell, Reproduction]
    setting: Setting
    data: str
    runs: dict[str, dict[int, Run]]
    seeds: int
    once: frozenset[str] = frozenset()

    def wanted(self, name: str) -> int:
        """How many runs of a reproduction are wanted."""
        return 1 if name in self.once else self.seeds

    def values(self, name: str) -> dict[int, float]:
        """{seed: test error, or accuracy where the table has that}"""
        errors = {seed: float(run.result["test_error"]) for seed, run in self.runs.get(name, {}).items()}
        better = UNITS[self.table.unit] > 0
        return {seed: 100 - error if better else error for seed, error in errors.items()}

    def ours(self, name: str) -> float | None:
        """The table's own statistic, median or mean, over our seeds."""
        values = list(self.values(name).values())
        return _statistic(self.table)(values) if values else None

    @property
    def missing(self) -> list[str]:
        """The runs that are not there, as "reproduction seed N"."""
        names = dict.fromkeys(each.name for each in self.cells.values())
        return [
            f"{n} seed {s}" for n in names for s in range(self.wanted(n)) if s not in self.runs.get(n, {})
        ]

    def facts(self, name: str, *path: str) -> list[str]:
        """The different values of a number of result.json over the runs of a reproduction."""
        found = [_dig(run.result, path) for run in self.runs.get(name, {}).values()]
        return list(dict.fromkeys(str(value) for value in found if value is not None))


def find_results(
    table: Table,
    cells: dict[Cell, Reproduction],
    setting: Setting,
    data: str,
    seeds: int,
    once: frozenset[str] = frozenset(),
) -> Results:
    """Read what is there."""
    runs: dict[str, dict[int, Run]] = {}
    for each in cells.values():
        there = {seed: setting.run(each.name, seed) for seed in range(1 if each.name in once else seeds)}
        runs[each.name] = {seed: run for seed, run in there.items() if run.finished}
    return Results(table, cells, setting, data, runs, seeds, once)


def _statistic(table: Table) -> Any:
    return {"median": median, "mean": fmean}[table.statistic]


def _dig(values: Any, path: Sequence[str]) -> Any:
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values


def describe_setting(results: Results) -> list[str]:
    """Under what the numbers were made, a line each; every output begins with it."""
    setting, cells = results.setting, list(results.cells.values())
    epochs = {f"{setting.epochs(each)} of {each.recipe.epochs} epochs" for each in cells}
    scale = "the published schedule" if setting.scale == 1 else f"epochs scaled by {setting.scale:g}"
    images = "all training images" if setting.max_train is None else f"{setting.max_train:,} training images"
    precisions = sorted({run.recipe.precision for each in results.runs.values() for run in each.values()})
    lines = [
        f"{results.table.title}: {results.table.unit}, published {results.table.statistic} and ours",
        f"schedule: {scale} ({', '.join(sorted(epochs))}); images: {images}; data: {results.data}",
        f"precision: {', '.join(precisions) or setting.precision}; seeds 0 to {results.seeds - 1}; "
        "one teacher, of seed 0, for all students, so that the spread is the students' alone",
    ]
    lines.append(f"augmentation: {_augmentation(results)}")
    machines = list(dict.fromkeys(m for each in cells for m in results.facts(each.name, "machine", "device")))
    commits = list(dict.fromkeys(c for each in cells for c in results.facts(each.name, "machine", "commit")))
    if machines:
        lines.append(f"hardware: {', '.join(machines)}; commits: {', '.join(commits)}")
    return lines


def _augmentation(results: Results) -> str:
    runs = [run for each in results.runs.values() for run in each.values()]
    kinds = [f"{run.recipe.views} fixed views of each image, one an epoch in turn" if run.recipe.views
             else "fresh in every epoch" for run in runs]  # fmt: skip
    if len(set(kinds)) < 2:
        return kinds[0] if kinds else "not known before a run is there"
    fresh = [run for run in runs if not run.recipe.views]
    names = dict.fromkeys(run.folder.parent.name for run in fresh)
    fixed = next(kind for kind in kinds if not kind.startswith("fresh"))
    return f"{fixed}; fresh in every epoch: {', '.join(names)}"


def table_rows(results: Results) -> list[list[str]]:
    """The table's lines, one a cell."""
    rows = []
    for (row, column), each in results.cells.items():
        labels = [results.table.rows[row], results.table.columns[column]]
        rows.append([*labels, *_numbers(results, each)])
    return rows


def _numbers(results: Results, each: Reproduction) -> list[str]:
    values = results.values(each.name)
    published = "not given" if each.published is None else f"{each.published:g}"
    ours = results.ours(each.name)
    if ours is None:
        return [published, NOT_YET, "", "", f"0/{results.wanted(each.name)}", ""]
    wanted = results.wanted(each.name)
    count = f"{len(values)}/{wanted}" if len(values) < wanted else str(len(values))
    difference = "" if each.published is None else f"{ours - each.published:+.2f}"
    singles = "  ".join(f"{value:.2f}" for value in values.values())
    return [published, f"{ours:.2f}", f"{Spread.of(list(values.values())):.2f}", difference, count, singles]


def claim_lines(results: Results) -> list[str]:
    """What each claim of the table comes to, row by row, as far as its two columns were chosen."""
    table, lines = results.table, []
    for row in dict.fromkeys(row for row, _ in results.cells):
        for first, second in table.claims:
            pair = [results.cells.get((row, column)) for column in (first, second)]
            if pair[0] is None or pair[1] is None:
                continue
            difference = paired_difference(results.values(pair[0].name), results.values(pair[1].name))
            name = f"{table.rows[row]}: {table.columns[first]} against {table.columns[second]}"
            lines.append(describe(name, difference, UNITS[table.unit]))
    return lines


CLAIMS_NOTE = "Paired over seeds; each interval stands for itself, none is widened for there being several."


def as_text(results: Results) -> str:
    """The table for a terminal."""
    parts = ["\n".join(describe_setting(results)), format_table(HEADER, table_rows(results))]
    if claims := claim_lines(results):
        parts.append("\n".join([*claims, CLAIMS_NOTE]))
    if results.missing:
        parts.append(f"not there yet ({len(results.missing)}): {', '.join(results.missing)}")
    return "\n\n".join(parts)


def as_markdown(results: Results, picture: str) -> str:
    """The same as a page."""
    rows = [HEADER, ["---"] * len(HEADER), *table_rows(results)]
    lines = [f"# {results.table.name}: {results.table.title}", "", f"{results.table.source}.", ""]
    lines += [f"- {line}" for line in describe_setting(results)]
    lines += ["", *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)]
    if claims := claim_lines(results):
        lines += ["", *(f"- {line.replace('|', chr(92) + '|')}" for line in claims), "", CLAIMS_NOTE]
    if results.missing:
        lines += ["", f"Not there yet ({len(results.missing)}): {', '.join(results.missing)}."]
    return "\n".join([*lines, "", f"![published against ours]({picture})", ""])


COLUMNS = [
    *("reproduction", "seed", "scale", "epochs", "max_train", "data", "precision", "test_error", "seconds"),
    *("images_per_second", "device", "threads", "torch", "commit"),
]


def as_csv(results: Results) -> str:
    """A line a run."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=COLUMNS, lineterminator="\n")
    writer.writeheader()
    for name, runs in results.runs.items():
        for seed, run in runs.items():
            writer.writerow(_csv_row(results, name, seed, run))
    return text.getvalue()


def _csv_row(results: Results, name: str, seed: int, run: Run) -> dict[str, Any]:
    result: Mapping[str, Any] = run.result
    machine = result.get("machine") or {}
    return {
        "reproduction": name,
        "seed": seed,
        "scale": results.setting.scale,
        "epochs": run.recipe.epochs,
        "max_train": run.recipe.max_train,
        "data": results.data,
        "precision": run.recipe.precision,
        "test_error": f"{result['test_error']:.4g}",
        "seconds": f"{result['wall_seconds']:.0f}",
        "images_per_second": f"{result['images_per_second']:.0f}",
        **{key: machine.get(key, "") for key in ("device", "threads", "torch", "commit")},
    }


def write_results(results: Results) -> list[Path]:
    """TABLE.md, TABLE.csv and, once there is a number, TABLE.png beside the runs."""
    folder, name = results.setting.folder, results.table.name
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.md", folder / f"{name}.csv"]
    write_atomically(paths[0], as_markdown(results, f"{name}.png"))
    write_atomically(paths[1], as_csv(results))
    if any(results.runs.values()):
        from attention_transfer.reproduction.plot import save_plot

        paths.append(save_plot(results, folder / f"{name}.png"))
    return paths


def total_time(results: Results) -> str:
    """What the runs took, all in all."""
    runs = [run for runs in results.runs.values() for run in runs.values()]
    return f"{len(runs)} runs, {duration(sum(float(run.result['wall_seconds']) for run in runs))} of training"
