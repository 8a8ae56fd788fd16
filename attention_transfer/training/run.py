"""The run folder: where a run keeps its recipe, numbers, checkpoints and weights, and how it is read back."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from attention_transfer._files import write_atomically
from attention_transfer._reading import parse_csv, parse_json, read_text
from attention_transfer.training.recipe import Recipe


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """Training was stopped by a signal; its state is saved, and `resume` goes on from there."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"training was stopped by signal {signal_number}; its state is saved")
        self.exit_status = 128 + signal_number


NUMBERS = ("test_error", "parameters", "images_per_second", "data_share", "wall_seconds")
"""What every result.json tells, besides what depends on the method."""


def _checked(result: Any) -> dict[str, Any]:
    if not isinstance(result, dict):
        raise ValueError("no JSON object")
    for name in NUMBERS:
        if isinstance(result.get(name), bool) or not isinstance(result.get(name), int | float):
            raise ValueError(f"no number {name}")
    plan = result.get("plan")
    if not isinstance(plan, list) or not all(isinstance(row, dict) for row in plan):
        raise ValueError("no list of pairs under plan")
    return result


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
        return self.finished or any(self.folder.rglob("*.ckpt"))

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe that the run was started with.

        Raises:
            FileNotFoundError: if the folder is not a run folder.
        """
        if not self.exists:
            raise FileNotFoundError(
                f"Run: expected a run folder with a recipe.yaml, got {self.folder}. Pass a run's --output."
            )
        return Recipe.load(self.recipe_file)

    @cached_property
    def result(self) -> dict[str, Any]:
        """What result.json holds.

        Raises:
            ValueError: if the run has not finished, or the file is damaged.
        """
        if not self.finished:
            raise ValueError(
                f"Run: {self.folder} has no result.json: the run is not finished. "
                f"Finish it: attention-transfer train --resume {self.folder}"
            )
        try:
            return _checked(parse_json(read_text(self.result_file)))
        except ValueError as error:
            raise ValueError(
                f"Run: expected JSON in {self.result_file}, got a damaged file ({error}). "
                f"Delete it, and write it anew: attention-transfer train --resume {self.folder}"
            ) from None

    @property
    def teacher(self) -> Run:
        """Where a teacher that is trained first has its own run folder."""
        return Run(self.folder / "teacher")

    def create(self, recipe: Recipe, *, overwrite: bool = False) -> None:
        """Make the folder, in place of a run that may be overwritten, and write the recipe into it.

        Raises:
            FileExistsError: as `check_free`.
            OSError: if it cannot be written.
        """
        self.check_free(overwrite=overwrite)
        if self.exists:
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.recipe_file, recipe.to_yaml())

    def sweep(self) -> None:
        """Delete what a killed process has left half-written."""
        for path in (*self.folder.glob(".*"), *self.checkpoints.glob(".*")):
            if _is_leftover(path):
                path.unlink()

    def check_free(self, *, overwrite: bool = False) -> None:
        """Make sure that no work is lost if a run is created here.

        Raises:
            FileExistsError: if the folder holds a run that is not to be overwritten, or other files.
        """
        if not self.folder.is_dir() or all(map(_is_leftover, self.folder.iterdir())):
            return
        if not self.exists:
            raise FileExistsError(
                f"train: {self.folder} exists and is no run folder, so it stays. Pass another --output."
            )
        if self.holds_work and not overwrite:
            raise FileExistsError(
                f"train: the run folder {self.folder} exists. Go on with it: --resume {self.folder}; "
                "or start it over: --overwrite; or pass another --output."
            )

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
            columns, rows = parse_csv(read_text(self.metrics_file))
            if "epoch" not in columns:
                raise ValueError("no column epoch")
            _ = [(int(row["epoch"]), *map(float, filter(None, row.values()))) for row in rows]
        except ValueError as error:
            raise ValueError(
                f"Run: expected a row of numbers for each epoch in {self.metrics_file}, got a damaged file "
                f"({error}). Delete it: the weights do not depend on it."
            ) from None
        return rows

    def write_metrics(self, row: dict[str, float]) -> None:
        """Put an epoch's row into metrics.csv, in place of any row of that epoch or a later one."""
        rows = [old for old in self.read_metrics() if int(old["epoch"]) < row["epoch"]]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(row), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, row])
        write_atomically(self.metrics_file, text.getvalue())


def _is_leftover(path: Path) -> bool:
    """Whether a file was being written by `write_atomically` when its process was killed."""
    return path.name.startswith(".") and path.suffix == ".tmp"
