"""Reading run folders, and putting runs that differ only by their seed into one group."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attention_transfer._reading import parse_csv, parse_json, parse_yaml, read_text, shown
from attention_transfer.runs.recipe import EXPERIMENT, METHOD, field_types, fields_of, fields_read_by
from attention_transfer.terms.declaration import built_in

TEACHER = "teacher"
METHOD_STYLES = 6  # in report.css, beside those of the teacher and of the student alone


LARGEST = 1e100  # whose square is a number too, for spreads


def is_measurable(value: float) -> bool:
    """Whether a number is finite, and not so large that sums and squares of it are none."""
    return abs(value) <= LARGEST


@dataclass(frozen=True)
class Run:
    """What a run folder says about its run; `result` is None while the run is in progress."""

    folder: Path
    recipe: dict[str, Any]
    recipe_text: str
    metrics: dict[str, list[float]]
    """{column: a number an epoch, NaN where the cell is empty}"""
    result: dict[str, Any] | None

    @property
    def finished(self) -> bool:
        return self.result is not None

    @property
    def method(self) -> str:
        return str(self.recipe.get("method", "none"))

    @property
    def model(self) -> str:
        return str(self.recipe.get("student", "student"))

    def number(self, name: str) -> float | None:
        """A measurable number of the result, or None."""
        value = (self.result or {}).get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and is_measurable(value):
            return float(value)
        return None


def read_run(folder: Path | str) -> Run:
    """Read the recipe, the metrics and the result of a run folder.

    Raises:
        FileNotFoundError: if it is not a run folder.
        ValueError: if one of its files is damaged; the message names the file.
    """
    folder = Path(folder)
    text = _read_text(folder, "recipe.yaml")
    recipe = _parse_recipe(text, folder / "recipe.yaml")
    result = _parse_result(folder / "result.json") if (folder / "result.json").exists() else None
    has_metrics = (folder / "metrics.csv").exists() or result is not None
    metrics = _parse_metrics(_read_text(folder, "metrics.csv"), folder / "metrics.csv") if has_metrics else {}
    return Run(folder, recipe, text, metrics, result)


def _read_text(folder: Path, name: str) -> str:
    if not (folder / name).is_file():
        problem = f"which has no {name}" if folder.is_dir() else "which is not a folder"
        raise FileNotFoundError(
            f"read_run: expected a run folder, got {folder}, {problem}. Give a folder that `train` wrote."
        )
    try:
        return read_text(folder / name)
    except ValueError as error:
        raise _damaged(folder / name, "UTF-8 text", str(error)) from None


def _damaged(path: Path, expected: str, found: str) -> ValueError:
    return ValueError(
        f"read_run: expected {expected} in {path}, got {' '.join(found.split())}. "
        "The file is damaged: train again, or leave this run out."
    )


def _parse_recipe(text: str, path: Path) -> dict[str, Any]:
    try:
        documents = parse_yaml(text)
    except ValueError as error:
        raise _damaged(path, "YAML", str(error)) from None
    if len(documents) != 1 or not isinstance(documents[0], dict):
        found = shown(documents[0]) if len(documents) == 1 else f"{len(documents)} documents"
        raise _damaged(path, "lines of `field: value`", found)
    return documents[0]


def _parse_result(path: Path) -> dict[str, Any]:
    try:
        result = parse_json(_read_text(path.parent, path.name))
    except ValueError as error:
        raise _damaged(path, "JSON", str(error)) from None
    if not isinstance(result, dict):
        raise _damaged(path, "a JSON object", shown(result))
    return result


def _parse_metrics(text: str, path: Path) -> dict[str, list[float]]:
    try:
        names, rows = parse_csv(text)
    except ValueError as error:
        raise _damaged(path, "CSV", str(error)) from None
    if "epoch" not in names:
        raise _damaged(path, "a column named epoch", f"the columns {shown(', '.join(names))}")
    columns: dict[str, list[float]] = {name: [] for name in names}
    for line, row in enumerate(rows, start=2):
        for name, values in columns.items():
            try:
                values.append(float(row[name]) if row[name] else math.nan)
            except ValueError:
                raise _damaged(path, f"a number in line {line}, {shown(name)}", shown(row[name])) from None
    return columns


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
        return f"{self.mean:.1f}" if self.deviation is None else f"{self.mean:.1f} ± {self.deviation:.1f}"


@dataclass(frozen=True)
class Group:
    """Runs that differ only by their seed. `style` names the colour of their curves."""

    role: str
    label: str
    style: str
    runs: list[Run]

    def spread(self, name: str) -> Spread | None:
        """Mean and spread of a number of the results, over the runs that have it."""
        return Spread.of([value for run in self.runs if (value := run.number(name)) is not None])

    @property
    def title(self) -> str:
        return self.label[:1].upper() + self.label[1:]

    @property
    def model(self) -> str:
        return self.runs[0].model


def find_teachers(runs: Sequence[Run], teacher: Path | str | None = None) -> list[Run]:
    """The teachers' own runs: the one named, those inside the run folders, and those the recipes point to."""
    folders = [Path(teacher)] if teacher is not None else []
    for run in runs:
        folders += [folder for folder in _teacher_folders(run) if (folder / "recipe.yaml").is_file()]
    unique = {folder.resolve(): folder for folder in reversed(folders)}
    return [read_run(folder) for folder in reversed(unique.values())]


def _teacher_folders(run: Run) -> list[Path]:
    named = [run.recipe.get(field) for field in ("teacher_weights", "teacher")]
    paths = [Path(name) for name in named if isinstance(name, str)]
    return [run.folder / "teacher", *(path.parent if path.is_file() else path for path in paths)]


def group_runs(runs: Sequence[Run], teachers: Sequence[Run]) -> list[Group]:
    """The teacher first, then the student alone, then the taught students, each with its seeds together."""
    known = {run.folder.resolve() for run in teachers}
    taught = [run for run in runs if run.method != "none"]
    students = [run for run in runs if run.folder.resolve() not in known and not _is_teacher(run, taught)]
    others = [run for run in runs if run not in students and run.folder.resolve() not in known]
    free = itertools.cycle(f"method{number}" for number in range(METHOD_STYLES))
    groups = _groups_of([*teachers, *others], TEACHER, itertools.chain([TEACHER], free))
    for method in sorted({run.method for run in students}, key=_method_order):
        styles = itertools.chain(["alone"], free) if method == "none" else free
        groups += _groups_of([run for run in students if run.method == method], method, styles)
    return groups


def _terms(method: str) -> list[str]:
    return [] if method == "none" else method.split("+")


def describe_method(method: str) -> str:
    """What the figures call a method: "attention transfer + distillation"."""
    known = built_in()
    titles = (known[term].title if term in known else term for term in _terms(method))
    return " + ".join(titles) or "student alone"


def _method_order(method: str) -> tuple[int, list[int]]:
    """Fewer terms first; among as many, in the order in which a method names them."""
    known, terms = list(built_in()), _terms(method)
    return len(terms), [known.index(term) if term in known else len(known) for term in terms]


def _is_teacher(run: Run, taught: Sequence[Run]) -> bool:
    """A model trained from labels only, which the other runs name as their teacher."""
    if run.method != "none":
        return False
    return any(run.model == other.recipe.get("teacher") != other.model for other in taught)


def _groups_of(runs: Sequence[Run], role: str, styles: Iterator[str]) -> list[Group]:
    varying = _varying_settings(runs)
    members: dict[str, list[Run]] = {}
    for run in runs:
        settings = ", ".join(f"{name} {run.recipe.get(name)}" for name in varying)
        members.setdefault(settings, []).append(run)
    label = role if role == TEACHER else describe_method(role)
    return [
        Group(role, f"{label} ({settings})" if settings else label, next(styles), group)
        for settings, group in members.items()
    ]


def _varying_settings(runs: Sequence[Run]) -> list[str]:
    """The recipe's fields that make these runs different experiments, not repetitions."""
    if not runs:
        return []
    counted = set(fields_of(*set(EXPERIMENT) - {METHOD})) | fields_read_by(_terms(runs[0].method))
    names = dict.fromkeys(name for run in runs for name in run.recipe)
    return [
        name
        for name in names
        if (name in counted or name not in field_types())
        and len({str(run.recipe.get(name)) for run in runs}) > 1
    ]
