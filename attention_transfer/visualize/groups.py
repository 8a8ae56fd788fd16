"""Runs that differ only by their seed, in one group."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from attention_transfer.runs.recipe import EXPERIMENT, METHOD, field_types, fields_of, fields_read_by
from attention_transfer.runs.run import Run
from attention_transfer.runs.statistics import Spread
from attention_transfer.terms.declaration import built_in

TEACHER = "teacher"
METHOD_STYLES = 6  # in report.css, beside those of the teacher and of the student alone


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
    return [Run(folder).check() for folder in reversed(unique.values())]


def _teacher_folders(run: Run) -> list[Path]:
    named = [run.settings.get(field) for field in ("teacher_weights", "teacher")]
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
    return any(run.model == other.settings.get("teacher") != other.model for other in taught)


def _groups_of(runs: Sequence[Run], role: str, styles: Iterator[str]) -> list[Group]:
    varying = _varying_settings(runs)
    members: dict[str, list[Run]] = {}
    for run in runs:
        settings = ", ".join(f"{name} {run.settings.get(name)}" for name in varying)
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
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [
        name
        for name in names
        if (name in counted or name not in field_types())
        and len({str(run.settings.get(name)) for run in runs}) > 1
    ]
