"""The files of `reproductions/`: tables, and one file a published number with its facts and its recipe."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attention_transfer._errors import InputError
from attention_transfer._hints import did_you_mean
from attention_transfer._reading import LARGEST_YAML, parse_yaml, read_text, shown
from attention_transfer.runs.recipe import Recipe

UNITS = {"test error %": -1, "test accuracy %": 1}
"""The units with the sign of what is better."""

Cell = tuple[str, str]  # row and column
TEACHER = "teacher"  # the column of the networks that the students of a row learn from


@dataclass(frozen=True)
class Reproduction:
    """A published number and the recipe that is to give it again.

    Attributes:
        places: (table, row, column) of each place where the number stands.
        published: the number, None where it was not published.
        statistic: over which runs, in words.
        teacher: the reproduction whose run of seed 0 is the teacher.
        notes: where the recipe differs from the publication's.
        ours: the recorded runs.
    """

    name: str
    file: Path
    places: tuple[tuple[str, str, str], ...]
    source: str
    published: float | None
    statistic: str
    unit: str
    teacher: str | None
    notes: tuple[str, ...]
    ours: tuple[dict[str, Any], ...]
    recipe: Recipe


@dataclass(frozen=True)
class Table:
    """A published table; `rows` and `columns` are {name: label}."""

    name: str
    title: str
    source: str
    unit: str
    statistic: str
    classes: int
    rows: dict[str, str]
    columns: dict[str, str]
    claims: tuple[tuple[str, str], ...]
    """(better column, worse column) as published"""
    cells: dict[Cell, Reproduction] = field(default_factory=dict)

    def choose(self, rows: Iterable[str] | None, columns: Iterable[str] | None) -> dict[Cell, Reproduction]:
        """The cells of some rows and columns, of all where None is given, row by row.

        Raises:
            ValueError: if a name is unknown.
        """
        chosen_rows = self._named("row", self.rows, rows)
        chosen_columns = self._named("column", self.columns, columns)
        return {cell: self.cells[cell] for row in chosen_rows for column in chosen_columns
                if (cell := (row, column)) in self.cells}  # fmt: skip

    def taught_once(self, cells: dict[Cell, Reproduction]) -> frozenset[str]:
        """The networks that only teach in these cells: their one run, of seed 0, is the teacher of all."""
        columns: dict[str, set[str]] = {}
        for (_, column), each in cells.items():
            columns.setdefault(each.name, set()).add(column)
        return frozenset(name for name, found in columns.items() if found == {TEACHER})

    def _named(self, kind: str, known: dict[str, str], names: Iterable[str] | None) -> list[str]:
        if names is None:
            return list(known)
        keys = {text.lower(): name for name, label in known.items() for text in (name, label)}
        for name in names:
            if name.lower() not in keys:
                hint = did_you_mean(name, known) or f"Known: {', '.join(known)}."
                raise InputError(f"reproduce: unknown {kind} {name!r} of {self.name}. {hint}")
        wanted = {keys[name.lower()] for name in names}
        return [name for name in known if name in wanted]


@dataclass(frozen=True)
class Library:
    """All tables and all reproductions of a folder, by name."""

    folder: Path
    tables: dict[str, Table]
    reproductions: dict[str, Reproduction]

    def table(self, name: str) -> Table:
        """The table of that name.

        Raises:
            ValueError: if there is none; the message lists the tables.
        """
        if name not in self.tables:
            raise InputError(
                f"reproduce: unknown table {name!r}. {did_you_mean(name, self.tables)}"
                f"{' ' if did_you_mean(name, self.tables) else ''}Tables: {', '.join(self.tables)}."
            )
        return self.tables[name]

    def is_teacher(self, name: str) -> bool:
        """Whether some reproduction learns from this one."""
        return any(each.teacher == name for each in self.reproductions.values())


def read_library(folder: Path) -> Library:
    """Read and check every file: tables are FOLDER/NAME.yaml, numbers FOLDER/TABLE/NAME.yaml.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if a file is not as it should be; the message names it.
    """
    tables = {path.stem: _read_table(path) for path in sorted(folder.glob("*.yaml"))}
    if not tables:
        raise FileNotFoundError(
            f"reproduce: expected tables, TABLE.yaml, in {folder}, got none. Run it in a checkout of the "
            "repository, or pass --recipes DIR."
        )
    found: dict[str, Reproduction] = {}
    for path in sorted(folder.glob("*/*.yaml")):
        if path.stem in found:
            raise _wrong(path, "a name of its own", f"that of {found[path.stem].file}")
        found[path.stem] = _read_reproduction(path)
    for each in found.values():
        _place(each, tables)
        if each.teacher is not None and each.teacher not in found:
            hint = did_you_mean(each.teacher, found) or "Add its file."
            raise _wrong(each.file, "the name of a reproduction as teacher", repr(each.teacher), hint)
    return Library(folder, tables, found)


def _place(each: Reproduction, tables: dict[str, Table]) -> None:
    """Put a number into the cells of its tables."""
    for name, row, column in each.places:
        if name not in tables or row not in tables[name].rows or column not in tables[name].columns:
            raise _wrong(each.file, "places in the tables", f"{name}, {row}, {column}")
        table, cell = tables[name], (row, column)
        if cell in table.cells:
            raise _wrong(each.file, "a place of its own", f"that of {table.cells[cell].file}")
        if each.unit != table.unit:
            raise _wrong(each.file, f"the table's unit, {table.unit}", each.unit)
        table.cells[cell] = each


def _read_table(path: Path) -> Table:
    (values,) = _documents(path, 1)
    _check_names(path, values, _TABLE_FIELDS)
    columns, claims = values["columns"], values["claims"] or []
    if not (_is_texts(values["rows"]) and _is_texts(columns)):
        raise _wrong(path, "rows and columns as `name: label`", "others")
    if not isinstance(claims, list) or not all(isinstance(c, list) and len(c) == 2 for c in claims):
        raise _wrong(path, "claims as pairs of columns", shown(claims))
    claims = [tuple(map(str, claim)) for claim in claims]
    if values["unit"] not in UNITS:
        raise _wrong(path, f"a unit of {', '.join(UNITS)}", str(values["unit"]))
    if values["statistic"] not in ("median", "mean"):
        raise _wrong(path, "the statistic median or mean", str(values["statistic"]))
    if stranger := next((c for claim in claims for c in claim if c not in columns), None):
        raise _wrong(path, "claims about columns", repr(stranger))
    return Table(path.stem, **{**values, "claims": tuple(claims)})


def _read_reproduction(path: Path) -> Reproduction:
    facts, _ = _documents(path, 2)
    _check_names(path, facts, _FACTS)
    try:
        places = tuple((str(p["table"]), str(p["row"]), str(p["column"])) for p in facts["places"])
    except (KeyError, TypeError):
        raise _wrong(path, "places with table, row and column", str(facts["places"])) from None
    if isinstance(facts["published"], bool) or not isinstance(facts["published"], int | float | None):
        raise _wrong(path, "a published number or null", repr(facts["published"]))
    if not all(isinstance(facts[name] or [], list) for name in ("notes", "ours")):
        raise _wrong(path, "lists of notes and of ours", shown(facts["notes"]))
    if not all(isinstance(entry, dict) for entry in facts["ours"] or ()):
        raise _wrong(path, "entries of `name: value` in ours", shown(facts["ours"]))
    if not isinstance(facts["teacher"], str | None):
        raise _wrong(path, "the name of a reproduction as teacher", shown(facts["teacher"]))
    lists = {name: tuple(facts[name] or ()) for name in ("notes", "ours")}
    recipe = Recipe.load(path)
    if recipe.needs_teacher != (facts["teacher"] is not None):
        raise _wrong(path, "a teacher where the method has one, and only there", str(facts["teacher"]))
    return Reproduction(path.stem, path, **{**facts, **lists, "places": places}, recipe=recipe)


def _documents(path: Path, count: int) -> list[dict[str, Any]]:
    try:
        found = parse_yaml(read_text(path, LARGEST_YAML))
    except ValueError as error:
        raise _wrong(path, "YAML", str(error)) from None
    if len(found) != count or not all(isinstance(each, dict) for each in found):
        raise _wrong(path, f"{count} YAML documents of `name: value` lines", f"{len(found)} documents")
    return found


def _is_texts(values: object) -> bool:
    return isinstance(values, dict) and all(isinstance(text, str) for pair in values.items() for text in pair)


def _check_names(path: Path, values: dict[str, Any], known: tuple[str, ...]) -> None:
    if set(values) != set(known):
        raise _wrong(path, f"the fields {', '.join(known)}", ", ".join(map(str, values)))


_TABLE_FIELDS = ("title", "source", "unit", "statistic", "classes", "rows", "columns", "claims")
_FACTS = ("places", "source", "published", "statistic", "unit", "teacher", "notes", "ours")


def _wrong(path: Path, expected: str, got: str, mend: str = "Mend the file.") -> InputError:
    return InputError(f"reproduce: expected {expected} in {path}, got {got}. {mend}")
