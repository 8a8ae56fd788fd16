"""The run folder: where a run keeps its recipe, numbers, checkpoints and weights, and how it is read back."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from attention_transfer._errors import InputError
from attention_transfer._files import (
    is_bookkeeping,
    links_in,
    remove_leftovers,
    remove_written,
    write_atomically,
)
from attention_transfer._locks import is_locked, locked
from attention_transfer._reading import parse_csv, parse_json, parse_yaml, read_text, shown
from attention_transfer.runs.recipe import LARGEST_FLOAT, Recipe, check_models
from attention_transfer.runs.statistics import is_measurable


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """Training was stopped by a signal; its state is saved, and `resume` goes on from there."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"training was stopped by signal {signal_number}; its state is saved")
        self.exit_status = 128 + signal_number


WRITTEN = (
    *("recipe.yaml", "metrics.csv", "result.json", "student.safetensors", "report.html", "maps.safetensors"),
    *("loggers.json", "checkpoints/last.ckpt", "checkpoints/last.before.ckpt", "checkpoints/best.ckpt"),
    *("tensorboard/events.out.tfevents.*", "tensorboard/hparams.yaml"),
    *("not-finite/*/batch.json", "not-finite/*/images.png"),
)
"""What a run writes into its folder, W&B's own records apart; all that is deleted when it is started over."""

NUMBERS = ("test_error", "parameters", "images_per_second", "data_share", "wall_seconds")
"""What every result.json tells, besides what depends on the method."""


LONGEST = "not-finite/epoch-1000000-batch-1000000/images.png"
"""No file of a run has a longer name; TensorBoard's are shorter on a host of 200 letters."""

_OTHERS: dict[str, tuple[Callable[[Any], bool], Any]] = {
    **dict.fromkeys(("test_top5_error", "validation_error", "best_epoch"), (lambda v: _is_number(v), None)),
    **dict.fromkeys(("seed",), (lambda v: type(v) is int, None)),
    "test_unanswered": (lambda v: type(v) is int and v >= 0, 0),
    **dict.fromkeys(("method", "teacher_fingerprint"), (lambda v: isinstance(v, str), None)),
    "weights": (lambda v: isinstance(v, dict) and all(map(_is_number, v.values())), {}),
    "machine": (lambda v: isinstance(v, dict) and all(isinstance(e, str | int) for e in v.values()), {}),
}
"""What else it tells, with what stands for it where it is missing or null."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_FLOAT


def _checked(result: Any) -> dict[str, Any]:
    """What a result.json holds, every entry of it of its kind."""
    for name in NUMBERS:
        if not _is_number(result.get(name)):
            raise InputError(f"no number {name}")
    for name, (holds, missing) in _OTHERS.items():
        if result.setdefault(name, missing) is None:
            result[name] = missing
        # guard: result-facts
        elif not holds(result[name]):
            raise InputError(f"{name} is {shown(result[name])}")
    plan = result.get("plan")
    if not isinstance(plan, list) or not all(map(_is_pair, plan)):
        raise InputError("no list of pairs under plan")
    return result


def _is_pair(row: Any) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(side), str) for side in ("student", "teacher"))


def _damaged(path: Path, expected: str, found: str) -> InputError:
    remedies = {
        "metrics.csv": "Delete it: the weights do not depend on it.",
        "result.json": f"Delete it, and write it anew: attention-transfer train --resume {path.parent}",
    }
    remedy = remedies.get(path.name, "Train again, or leave this run out.")
    return InputError(
        f"Run: expected {expected} in {path}, got {' '.join(found.split())}: the file is damaged. {remedy}"
    )


@dataclass(frozen=True)
class Run:
    """A run folder. Making a `Run` touches no file; the properties say where things are."""

    folder: Path

    @property
    def recipe_file(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.csv"

    @property
    def result_file(self) -> Path:
        return self.folder / "result.json"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        return self.checkpoints / "last.ckpt"

    @property
    def best_checkpoint(self) -> Path:
        return self.checkpoints / "best.ckpt"

    @property
    def student_weights(self) -> Path:
        return self.folder / "student.safetensors"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def maps(self) -> Path:
        return self.folder / "maps.safetensors"

    @property
    def tensorboard(self) -> Path:
        return self.folder / "tensorboard"

    @property
    def exists(self) -> bool:
        """Whether the folder is a run folder."""
        return self.recipe_file.is_file()

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: result.json is the last thing that is written."""
        return self.result_file.is_file()

    @property
    def holds_work(self) -> bool:
        """Whether anything has been trained here, be it the teacher's first epoch."""
        trained = any((self.folder / name).is_file() for name in WRITTEN if name.endswith(".ckpt"))
        return self.finished or trained or (self._has_its_teacher() and self.teacher.holds_work)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The recipe as it stands in the folder, of whatever version of this package.

        Raises:
            FileNotFoundError: if the folder is not a run folder.
            ValueError: if the file is damaged.
        """
        try:
            documents = parse_yaml(self.recipe_text)
        except ValueError as error:
            raise _damaged(self.recipe_file, "YAML", str(error)) from None
        if len(documents) != 1 or not isinstance(documents[0], dict):
            found = shown(documents[0]) if len(documents) == 1 else f"{len(documents)} documents"
            raise _damaged(self.recipe_file, "lines of `field: value`", found)
        return documents[0]

    @cached_property
    def recipe_text(self) -> str:
        """What recipe.yaml holds."""
        return self._read(self.recipe_file)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe that the run was started with.

        Raises:
            FileNotFoundError: if the folder is not a run folder.
            ValueError: if the file is damaged, holds what no recipe does, or names code of others.
        """
        check_models(self.settings, self.recipe_file)
        return Recipe.from_mapping(self.settings)

    @property
    def method(self) -> str:
        return str(self.settings.get("method", "none"))

    @property
    def model(self) -> str:
        """The student's name."""
        return str(self.settings.get("student", "student"))

    @cached_property
    def _result(self) -> dict[str, Any]:
        """What result.json holds, empty while there is none."""
        if not self.result_file.exists():
            return {}
        try:
            result = parse_json(self._read(self.result_file))
        except ValueError as error:
            raise _damaged(self.result_file, "JSON", str(error)) from None
        if not isinstance(result, dict):
            raise _damaged(self.result_file, "a JSON object", shown(result))
        return result

    @cached_property
    def result(self) -> dict[str, Any]:
        """What result.json holds, all that a finished run tells.

        Raises:
            ValueError: if the run has not finished, or the file is damaged.
        """
        if not self.finished:
            raise InputError(
                f"Run: {self.folder} has no result.json: the run is not finished. "
                f"Finish it: attention-transfer train --resume {self.folder}"
            )
        try:
            return _checked(dict(self._result))
        except ValueError as error:
            raise _damaged(self.result_file, "the result of a run", str(error)) from None

    def number(self, name: str) -> float | None:
        """A measurable number of the result, None if it has none."""
        value = self._result.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and is_measurable(value):
            return float(value)
        return None

    @property
    def plan(self) -> list[dict[str, Any]]:
        """The layer pairs that were compared, a row each; none while the run has no result."""
        plan = self._result.get("plan")
        return plan if isinstance(plan, list) and all(isinstance(row, dict) for row in plan) else []

    @property
    def metrics(self) -> dict[str, list[float]]:
        """The numbers of every epoch by name, NaN where there is none; empty before an epoch has ended.

        Raises:
            FileNotFoundError: if a finished run has none.
            ValueError: if the file is damaged.
        """
        if self.finished and not self.metrics_file.is_file():
            self._read(self.metrics_file)
        columns: dict[str, list[float]] = {}
        for row in self.read_metrics():
            for name, cell in row.items():
                columns.setdefault(name, []).append(float(cell) if cell else math.nan)
        return columns

    def check(self) -> Run:
        """This run, once all of its files have been read.

        Raises:
            FileNotFoundError: if it is no run folder, or lacks a file.
            ValueError: if a file is damaged.
        """
        _ = self.settings, self._result, self.metrics
        return self

    def _read(self, path: Path) -> str:
        if not path.exists():
            problem = f"which has no {path.name}" if self.folder.is_dir() else "which is not a folder"
            raise FileNotFoundError(
                f"Run: expected a run folder, got {self.folder}, {problem}. Pass a folder that `train` wrote."
            )
        try:
            return read_text(path)
        except ValueError as error:
            raise _damaged(path, "UTF-8 text", str(error)) from None

    @property
    def teacher(self) -> Run:
        """Where a teacher that is trained first has its own run folder."""
        return Run(self.folder / "teacher")

    def create(self, recipe: Recipe, *, overwrite: bool = False) -> None:
        """Make the folder, in place of a run that may be overwritten, and write the recipe into it.

        Of a run that was there all goes that runs write; other files stay.

        Raises:
            FileExistsError: as `check_free`.
            OSError: if it cannot be written.
        """
        self.check_free(overwrite=overwrite)
        self.folder.mkdir(parents=True, exist_ok=True)
        teacher = [f"teacher/{name}" for name in WRITTEN] if self._has_its_teacher() else []
        remove_written(self.folder, [*WRITTEN, *teacher])
        write_atomically(self.recipe_file, recipe.to_yaml())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other process trains in the folder.

        Raises:
            InUseError: if one does.
            OSError: if the folder cannot be written.
        """
        with locked(
            self.folder,
            f"train: the run folder {self.folder} is in use: {{holder}} trains there. "
            "Wait until it has ended, or pass another --output.",
        ):
            yield

    @property
    def in_use(self) -> bool:
        """Whether a process trains in the folder."""
        return is_locked(self.folder)

    def sweep(self) -> None:
        """Delete what a killed process has left half-written."""
        remove_leftovers(self.folder, self.checkpoints)

    def check_free(self, *, overwrite: bool = False) -> None:
        """Make sure that no work is lost if a run is created here.

        Raises:
            FileExistsError: if the folder holds a run that is not to be overwritten, or files of others.
        """
        if not self.folder.is_dir():
            if self.folder.exists():
                raise FileExistsError(
                    f"train: expected a folder, got {self.folder}, which is a file. Pass another --output."
                )
            return
        there = [path for path in self.folder.iterdir() if not is_bookkeeping(path)]
        if there and not self.exists:
            raise FileExistsError(
                f"train: {self.folder} exists and is no run folder, so it stays. Pass another --output."
            )
        if self.exists and self.holds_work:
            if not overwrite:
                raise FileExistsError(
                    f"train: the run folder {self.folder} exists. Go on with it: --resume {self.folder}; "
                    "or start it over: --overwrite; or pass another --output."
                )
            return
        known = {name.partition("/")[0] for name in WRITTEN} | {self.teacher.folder.name, "wandb"}
        if there and not self._wrote_recipe():
            known.remove(self.recipe_file.name)
        # guard: foreign-files-kept
        if others := sorted(path.name for path in there if path.name not in known):
            raise FileExistsError(
                f"train: {self.folder} holds {others[0]}, which no run wrote, so it stays. "
                f"Pass another --output, such as {self.folder / 'run'}."
            )

    def check_name(self) -> None:
        """Make sure that every file of a run can be called so.

        Raises:
            ValueError: if the name is not UTF-8: safetensors and TensorBoard take no other.
            OSError: if it is too long.
        """
        try:
            str(self.folder).encode()
        except UnicodeEncodeError:
            raise InputError(
                f"train: expected an --output whose name is UTF-8, got {self.folder}, into which neither "
                "safetensors nor TensorBoard can write. Pass another --output."
            ) from None
        try:
            (self.teacher.folder / LONGEST).exists()
        except OSError as error:
            error.filename = str(self.folder)
            raise

    def check_links(self) -> None:
        """Make sure that what is written into the folder stays in it.

        W&B makes links of its own in wandb/, also to its logs elsewhere, and replaces those that it finds.

        Raises:
            OSError: if there is a link.
        """
        for link in links_in(self.folder):
            if self.folder / "wandb" not in link.parents:
                raise OSError(
                    f"train: expected a run folder without links, got {link}, which may lead anywhere. "
                    "Remove it."
                )

    def _has_its_teacher(self) -> bool:
        """Whether the run in teacher/ is this run's own teacher, and none that was put there."""
        try:
            ours = Run(self.folder).recipe if self.exists else None  # not kept: it may be written anew
            theirs = self.teacher.recipe if self.teacher.exists else None
        except ValueError:
            return False
        if ours is None or theirs is None or ours.teacher is None:
            return False
        return not theirs.differences(ours.for_teacher())

    def _wrote_recipe(self) -> bool:
        """Whether the recipe that is there is one that a run wrote into this folder, to the letter."""
        try:
            recipe, text = Recipe.load(self.recipe_file), read_text(self.recipe_file)
        except (OSError, ValueError):
            return False
        place = None if recipe.output is None else Path(recipe.output)
        # guard: foreign-recipe-kept
        return text == recipe.to_yaml() and place == self.folder.absolute()

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json, which marks the run as finished."""
        write_atomically(self.result_file, json.dumps(result, indent=2) + "\n")

    def read_metrics(self) -> list[dict[str, str]]:
        """The rows of metrics.csv, one an epoch; none before the first epoch has ended.

        Raises:
            ValueError: if the file is damaged.
        """
        if not self.metrics_file.exists():
            return []
        try:
            columns, rows = parse_csv(self._read(self.metrics_file))
        except ValueError as error:
            raise _damaged(self.metrics_file, "CSV", str(error)) from None
        if "epoch" not in columns:
            found = f"the columns {shown(', '.join(columns))}"
            raise _damaged(self.metrics_file, "a column named epoch", found)
        for line, row in enumerate(rows, start=2):
            for name, cell in row.items():
                kind = int if name == "epoch" else float
                try:
                    kind(cell or "nan" if kind is float else cell)
                except ValueError:
                    expected = f"a number in line {line}, {shown(name)}"
                    raise _damaged(self.metrics_file, expected, shown(cell)) from None
        return rows

    def write_metrics(self, row: dict[str, float]) -> None:
        """Put an epoch's row into metrics.csv, in place of any row of that epoch or a later one."""
        rows = [old for old in self.read_metrics() if int(old["epoch"]) < row["epoch"]]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(row), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, row])
        write_atomically(self.metrics_file, text.getvalue())
