"""An export from beginning to end: written beside its place, loaded anew, compared, moved there whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attention_transfer._choices import ExportFormat, ProgramInput
from attention_transfer._files import is_bookkeeping, new_folder, remove_written, write_atomically
from attention_transfer._reading import read_text
from attention_transfer.runs.run import Run

from .base import Format, compare
from .formats import FORMATS
from .readme import README, SIGNATURE, model_card
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
    if output is not None and place.is_symlink():
        place = place.resolve()
    chosen = [FORMATS[name] for name in dict.fromkeys(formats)]
    student = Student.of(run, input)
    _check_free(place, overwrite=overwrite)
    for each in chosen:
        each.check(student)
    with new_folder(place) as workplace:
        written = [_write(each, student, workplace / each.path) for each in chosen]
        files = [(each.format, each.size, each.difference) for each in written]
        write_atomically(workplace / README, model_card(student, files))
        _check_free(place, overwrite=overwrite)  # minutes have passed
        remove_written(place, _names())
    return Export(place, student, written)


def _write(format: Format, student: Student, path: Path) -> Written:
    format.write(student, path)
    files = path.rglob("*") if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    return Written(format, size, compare(format, student, path))


def _check_free(folder: Path, *, overwrite: bool) -> None:
    """Make sure that nothing but an earlier export is replaced, and that only if asked for."""
    if folder.is_symlink():
        raise FileExistsError(f"export: {folder} is a link, through which nothing is written. Pass -o.")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"export: expected a folder after -o, got {folder}, which is a file.")
    there = [path for path in sorted(folder.rglob("*")) if not path.is_dir() or path.is_symlink()]
    names = [path.relative_to(folder).as_posix() for path in there if not is_bookkeeping(path)]
    others = names if not _is_export(folder) else [name for name in names if name not in _names()]
    if others:
        raise FileExistsError(
            f"export: {folder} holds {others[0]}, which no export writes, so it stays. Pass another -o."
        )
    if names and not overwrite:
        raise FileExistsError(
            f"export: {folder} holds an export. Replace it: --overwrite; or pass another -o."
        )


def _is_export(folder: Path) -> bool:
    """Whether the README.md of a folder is one of those that are written here."""
    try:
        return SIGNATURE in read_text(folder / README)
    except (OSError, ValueError):
        return False


def _names() -> list[str]:
    """The files of an export, by their place in its folder."""
    return [README, *(name for each in FORMATS.values() for name in each.files)]
