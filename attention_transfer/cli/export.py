"""`attention-transfer export`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from attention_transfer._choices import ExportFormat, ProgramInput
from attention_transfer._colours import print_safely
from attention_transfer._tables import format_table
from attention_transfer.cli.parsing import PROGRAM, UsageError, parse, suggest, verb_parser
from attention_transfer.runs.run import Run
from attention_transfer.training.telling import say_text

if TYPE_CHECKING:
    from attention_transfer.export import Export, Written

NAMES: tuple[ExportFormat, ...] = get_args(ExportFormat)
INPUTS: tuple[ProgramInput, ...] = get_args(ProgramInput)


def run(arguments: list[str]) -> None:
    parser = verb_parser(
        "export", f"{PROGRAM} export runs/cifar10-wrn-16-1-at-0 --format onnx,safetensors -o wrn-16-1"
    )
    parser.add_argument("run", metavar="RUN", help="The folder of a finished run, whose student is written.")
    parser.add_argument(
        "--format",
        action="append",
        default=[],
        metavar="NAME[,NAME]",
        help=f"{', '.join(NAMES)}; several with commas between, or the flag again.",
    )
    parser.add_argument("-o", "--output", metavar="DIR", help="The folder to write; RUN/export if not given.")
    parser.add_argument(
        "--input",
        default="pixels",
        metavar="pixels|normalised",
        help="What onnx and torch-export take: uint8 pixels, 0 to 255, which they normalise themselves, or "
        "normalised float32 images.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier export there.")
    flags = parse(parser, arguments)
    formats, program_input = _formats(flags.format), _input(flags.input)
    _check_run(flags.run)
    from attention_transfer.export import export_run

    done = export_run(flags.run, formats, flags.output, input=program_input, overwrite=flags.overwrite)
    _show(done)


def _formats(given: Sequence[str]) -> list[ExportFormat]:
    names = [name.strip() for text in given for name in text.split(",")]
    if not names:
        raise UsageError(f"export: expected --format, got none. Known: {', '.join(NAMES)}.")
    for name in names:
        if name not in NAMES:
            raise UsageError(f"export: unknown format {name!r}. {suggest(name, NAMES)}")
    return cast(Any, names)


def _input(given: str) -> ProgramInput:
    if given not in INPUTS:
        raise UsageError(f"export: expected --input {' or '.join(INPUTS)}, got {given!r}.")
    return cast(Any, given)


def _check_run(folder: str) -> None:
    """Answer what is no finished run before anything heavy is loaded."""
    if Path(folder).is_file():
        raise UsageError(f"export: expected a run folder, got {folder}, which is a file.")
    run = Run(Path(folder))
    if (Path(folder) / "cache.json").is_file():
        raise UsageError(
            f"export: {folder} is a teacher's cache, which holds no model. Pass a run's --output."
        )
    _ = run.recipe, run.result


def _show(done: Export) -> None:
    student, result = done.student, done.student.run.result
    parameters, error = result["parameters"], result["test_error"]
    print_safely(f"{student.card.model}: {parameters:,} parameters, test error {error:.2f} %")
    if taught := _whose_teacher(student.run):
        say_text(f"note: this is the teacher of {taught}. Its student: {PROGRAM} export {taught}")
    print_safely(format_table(["format", "file", "MB", "difference", "allowed"], [*map(_row, done.written)]))
    from attention_transfer.export.student import BATCHES

    batches = ", ".join(map(str, BATCHES))
    print_safely(
        "difference: of each file, loaded anew, to the student's logits, over the largest logit, at batch "
        f"sizes {batches}"
    )
    if {"onnx", "torch-export"} & {each.format.name for each in done.written}:
        takes = {"pixels": "uint8 pixels, 0 to 255, which they normalise", "normalised": "normalised float32"}
        print_safely(f"input of onnx and torch-export: {takes[student.input]}")
    print_safely(f"model card, with a snippet for each file: {done.folder / 'README.md'}")


def _row(written: Written) -> list[str]:
    format = written.format
    size, difference = f"{written.size / 1e6:.2f}", f"{written.difference:.1e}"
    return [format.name, format.path, size, difference, f"{format.tolerance:.0e}"]


def _whose_teacher(run: Run) -> Path | None:
    """The run whose teacher was trained in this folder, inside its own."""
    outer = run.folder.absolute().parent
    return outer if run.folder.absolute().name == "teacher" and Run(outer).exists else None
