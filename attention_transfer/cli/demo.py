"""`attention-transfer demo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from attention_transfer._colours import print_safely
from attention_transfer._tables import format_table
from attention_transfer.cli.memory import add_memory_flag, govern_memory
from attention_transfer.cli.output import StatusLine
from attention_transfer.cli.parsing import PROGRAM, parse, verb_parser
from attention_transfer.cli.report import SIMILARITY_IMAGES
from attention_transfer.runs.run import Interrupted

if TYPE_CHECKING:
    from attention_transfer.training.demo import DemoRuns
    from attention_transfer.visualize import Examples

PICTURED = 3  # test images in maps.png


def run(arguments: list[str]) -> None:
    parser = verb_parser("demo", f"{PROGRAM} demo")
    parser.add_argument(
        "--output", default="runs/demo", help="Folder for the runs; finished ones are reused."
    )
    parser.add_argument("--overwrite", action="store_true", help="Start over.")
    add_memory_flag(parser)
    flags = parse(parser, arguments)
    folder = Path(flags.output)
    runs = _train(folder, flags.overwrite, flags.keep_memory)
    print_safely("\n" + _comparison(runs))
    _write_pages(folder, [run.folder for group in runs.students.values() for run in group])


def _train(folder: Path, overwrite: bool, keep_memory: bool) -> DemoRuns:
    """Train what is not there yet, and on Ctrl-C say how to go on."""
    line = StatusLine()
    try:
        from attention_transfer.training import demo

        govern_memory(demo.TEACHER, keep=keep_memory)
        runs = demo.run(folder, overwrite=overwrite, say=line.print, progress=line.show)
    except (Interrupted, KeyboardInterrupt):
        line.clear()
        print_safely(
            f"Stopped; nothing is lost. Go on with: {PROGRAM} demo --output {folder}", stream=sys.stderr
        )
        raise
    line.clear()
    return runs


def _write_pages(folder: Path, students: list[Path]) -> None:
    """The picture of the maps, and the report."""
    from attention_transfer.cli.collecting import collect
    from attention_transfer.visualize import write_report

    examples = collect(students, SIMILARITY_IMAGES)
    assert examples is not None  # some of the students are taught
    print_safely(f"\nmaps:   {_save_picture(folder / 'maps.png', examples).absolute()}")
    print_safely(f"report: {write_report(students, folder / 'report.html', examples=examples).absolute()}")


def _save_picture(path: Path, examples: Examples) -> Path:
    from attention_transfer.visualize import save_maps

    shown = examples.shown
    maps = {
        role: {layer: batch[:PICTURED] for layer, batch in layers.items()}
        for role, layers in shown.maps.items()
    }
    return save_maps(path, shown.images[:PICTURED], maps)


def _comparison(runs: DemoRuns) -> str:
    """Test errors with mean and spread, parameter counts, and what they say in a sentence."""
    from attention_transfer.runs.statistics import Spread
    from attention_transfer.training import demo
    from attention_transfer.visualize.groups import group_runs
    from attention_transfer.visualize.summary import summarise

    named = {f"teacher {demo.TEACHER.student}": [runs.teacher]}
    named |= {
        f"{demo.NAMES[method]}, {demo.STUDENT.student}": group for method, group in runs.students.items()
    }
    rows = []
    for name, group in named.items():
        errors = [run.result["test_error"] for run in group]
        each = "  ".join(f"{error:.1f}" for error in errors)
        rows.append([name, f"{group[0].result['parameters']:,}", str(Spread.of(errors)), each])
    students = [run for group in runs.students.values() for run in group]
    sentence = summarise(group_runs(students, []))
    table = format_table(["", "parameters", "test error %", "each seed"], rows, numbers=True)
    return f"{table}\n\n{sentence}"
