"""An export from beginning to end: written beside its place, loaded anew, compared, moved there whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from attention_transfer._choices import ExportFormat, ProgramInput
from attention_transfer.training.run import Run

from .base import Format, compare
from .formats import FORMATS
from .readme import README, model_card
from .student import Student


@dataclass(frozen=True)
class Written:
    """A file or folder of an export.

    Attributes:
        format: what wrote it.
        size: bytes.
        difference: of its logits to the student's at most, over the largest logit.
    """

    format: Format
    size: int
    difference: float


@dataclass(frozen=True)
class Export:
    """What an export wrote, and where."""

    folder: Path
    student: Student
    written: list[Written]


def export_run(
    folder: str | Path,
    formats: Sequence[ExportFormat],
    output: str | Path | None = None,
    *,
    input: ProgramInput = "pixels",
    overwrite: bool = False,
) -> Export:
    """Write the student of a finished run in some formats, with a model card README.md beside them.

    Every file is loaded anew and must give the student's logits; if one does not, or anything else fails,
    `output` stays as it was.

    Args:
        folder: the run folder.
        formats: names among `FORMATS`.
        output: the folder to write; `export` in the run folder if not given.
        input: what onnx and torch-export take: "pixels" (uint8, 0 to 255, normalised inside) or "normalised"
            (float32).
        overwrite: replace an earlier export in `output`.

    Raises:
        FileNotFoundError: if the folder is no run folder.
        FileExistsError: if `output` is there already.
        ValueError: if the run is not finished, the student does not fit a format, or a file does not give
            the student's logits.
        OSError: if a file cannot be written.
        ImportError: if a format's package is missing.
    """
    run = Run(Path(folder))
    place = run.folder / "export" if output is None else Path(output)
    chosen = [FORMATS[name] for name in dict.fromkeys(formats)]
    student = Student.of(run, input)
    _check_free(place, overwrite=overwrite)
    for each in chosen:
        each.check(student)
    with _in_place_of(place) as workplace:
        written = [_write(each, student, workplace / each.path) for each in chosen]
        files = [(each.format, each.size, each.difference) for each in written]
        (workplace / README).write_text(model_card(student, files), encoding="utf-8")
    return Export(place, student, written)


def _write(format: Format, student: Student, path: Path) -> Written:
    format.write(student, path)
    files = path.rglob("*") if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    return Written(format, size, compare(format, student, path))


def _check_free(folder: Path, *, overwrite: bool) -> None:
    """Make sure that nothing but an earlier export is replaced, and that only if asked for."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"export: expected a folder after -o, got {folder}, which is a file.")
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in there if name not in {README, *(each.path for each in FORMATS.values())}]
    if others:
        raise FileExistsError(
            f"export: {folder} holds {others[0]}, which no export writes, so it stays. Pass another -o."
        )
    if there and not overwrite:
        raise FileExistsError(
            f"export: {folder} holds an export. Replace it: --overwrite; or pass another -o."
        )


@contextmanager
def _in_place_of(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place in the end, or is gone after an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.absolute().with_name(f".{folder.absolute().name}.{os.getpid()}.tmp")
    new.mkdir()
    try:
        yield new
        if folder.is_dir():
            shutil.rmtree(folder)
        new.replace(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
