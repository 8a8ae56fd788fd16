"""The run folder: where a run keeps its recipe, numbers, checkpoints and weights, and how it is read back."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attention_transfer.training.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn


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
    def tensorboard(self) -> Path:
        return self.folder / "tensorboard"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: result.json is the last thing that is written."""
        return self.result_file.is_file()

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe that the run was started with.

        Raises:
            FileNotFoundError: if the folder is not a run folder.
        """
        if not self.recipe_file.is_file():
            raise FileNotFoundError(
                f"Run: expected a run folder with a recipe.yaml, got {self.folder}. Pass a run's --output."
            )
        return Recipe.load(self.recipe_file)

    @cached_property
    def result(self) -> dict[str, Any]:
        """What result.json holds.

        Raises:
            ValueError: if the run has not finished.
        """
        if not self.finished:
            raise ValueError(
                f"Run: {self.folder} has no result.json: the run is not finished. "
                f"Finish it: attention-transfer train --resume {self.folder}"
            )
        return json.loads(self.result_file.read_text(encoding="utf-8"))

    @property
    def teacher(self) -> Run | None:
        """The run that the teacher comes from: trained first inside this run, or named by the recipe."""
        own = Run(self.folder / "teacher")
        if own.recipe_file.is_file():
            return own
        named = Run(Path(self.recipe.teacher or ""))
        return named if self.recipe.teacher and named.recipe_file.is_file() else None

    def build_student(self) -> nn.Module:
        """The student in eval mode, with the weights that the run ended with.

        Raises:
            ValueError: if the run has not finished.
        """
        from attention_transfer.models import build_model

        model = build_model(
            self.recipe.student,
            num_classes=len(self.result["classes"]),
            in_channels=self.result["in_channels"],
            weights=str(self.student_weights),
        )
        return model.eval()

    def create(self, recipe: Recipe, *, overwrite: bool = False) -> None:
        """Make the folder and write the recipe into it.

        Raises:
            FileExistsError: if the folder is there and is neither empty nor to be overwritten.
            OSError: if it cannot be written.
        """
        if self.folder.is_dir() and any(self.folder.iterdir()):
            self._clear(overwrite)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomically(self.recipe_file, recipe.to_yaml())

    def _clear(self, overwrite: bool) -> None:
        """Delete an earlier run, and only what is known to be one."""
        if not self.recipe_file.is_file():
            raise FileExistsError(
                f"train: {self.folder} exists and is no run folder: it is left alone. Pass another --output."
            )
        if not overwrite:
            raise FileExistsError(
                f"train: the run folder {self.folder} exists. Go on with it: --resume {self.folder}; "
                "or start it over: --overwrite; or pass another --output."
            )
        shutil.rmtree(self.folder)

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json, which marks the run as finished."""
        write_atomically(self.result_file, json.dumps(result, indent=2) + "\n")

    def read_metrics(self) -> list[dict[str, str]]:
        """The rows of metrics.csv, one an epoch; none before the first epoch has ended."""
        if not self.metrics_file.is_file():
            return []
        with self.metrics_file.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def write_metrics(self, row: dict[str, float]) -> None:
        """Put an epoch's row into metrics.csv, in place of any row of that epoch or a later one."""
        rows = [old for old in self.read_metrics() if int(old["epoch"]) < row["epoch"]]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(row), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, row])
        write_atomically(self.metrics_file, text.getvalue())


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all: a full disk or a kill leaves the old file as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
