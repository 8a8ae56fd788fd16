"""`attention-transfer caffe build`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attention_transfer._colours import print_safely
from attention_transfer._tables import format_table
from attention_transfer.cli.caffe import VERBS
from attention_transfer.cli.parsing import PROGRAM, parse, verb_parser

if TYPE_CHECKING:
    from attention_transfer.caffe.building.branches import BuiltPair


def run(arguments: list[str]) -> None:
    flags = parse(_parser(), arguments)
    from attention_transfer.caffe import build
    from attention_transfer.caffe.building.options import Options

    options = Options(**{field.name: flags[field.name] for field in fields(Options)})
    built = build(flags.student, flags.teacher, options)
    files = built.write(flags.output, force=flags.force)
    notes = [f"note: {note}" for note in built.notes]
    print_safely(_table(built.pairs), "", *notes, *(f"wrote {file}" for file in files), "", sep="\n")
    weights = f" --weights {flags.output.with_suffix('.caffemodel')}" if built.weights is not None else ""
    print_safely(f"Next: {PROGRAM} caffe train --solver {files[1]}{weights}")
    print_safely(f"In Caffe: caffe train --solver {files[1]}{weights}")
    if built.sources:
        print_safely(f"with PYTHONPATH={flags.output.parent} and a Caffe built WITH_PYTHON_LAYER.")
    if flags.teacher_weights is None:
        print_safely(
            "The teacher has no weights yet: give --weights those of a trained one, under its new names."
        )


def _parser() -> Any:
    usage = f"{PROGRAM} caffe build --student s.prototxt --teacher t.prototxt -o at_train.prototxt"
    parser = verb_parser("caffe build", usage, VERBS["build"])
    parser.add_argument("--student", type=Path, required=True, help="The student's prototxt.")
    parser.add_argument("--teacher", type=Path, required=True, help="The teacher's prototxt.")
    parser.add_argument(
        "--pairs", default="auto", help="Blobs to compare, STUDENT:TEACHER,..., or auto: the ends of stages."
    )
    parser.add_argument(
        "--form",
        type=Literal["caffe", "paper"],
        default="caffe",
        help="EuclideanLoss, or the paper's, in Python.",
    )
    parser.add_argument("--p", type=int, default=2, help="Power of the activations: 1, 2 or 4.")
    parser.add_argument(
        "--beta",
        type=float,
        default=None,
        help="Weight of each pair; 1 for paper and 1.25 for caffe, if not given.",
    )
    parser.add_argument(
        "--normalize",
        type=Literal["ssd", "python"],
        default="ssd",
        help="SSD's Normalize layer, or one in Python.",
    )
    parser.add_argument("--solver", type=Path, help="A solver prototxt to take over.")
    parser.add_argument("--student-weights", type=Path, help="Where the student starts, a caffemodel.")
    parser.add_argument("--teacher-weights", type=Path, help="The trained teacher, a caffemodel.")
    parser.add_argument(
        "--channels", type=int, help="Of the images, where neither weights, data nor prototxts tell."
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("at_train.prototxt"),
        help="The net; other files go beside it.",
    )
    parser.add_argument("--force", action="store_true", help="Overwrite files that are already there.")
    return parser


def _table(pairs: list[BuiltPair]) -> str:
    header = ["student", "shape", "teacher", "shape", "maps"]
    return format_table(
        header,
        [
            [pair.student, _shape(pair.student_shape), pair.teacher, _shape(pair.teacher_shape), _maps(pair)]
            for pair in pairs
        ],
    )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "unknown" if shape is None else "x".join(map(str, shape[1:]))


def _maps(pair: BuiltPair) -> str:
    if pair.student_shape is None or pair.teacher_shape is None:
        return "unknown"
    changed = [change for change in (pair.pooled, pair.cropped) if change]
    smaller = pair.teacher_shape if changed and changed[0][0] == "s" else pair.student_shape
    said = []
    if pair.pooled:
        said.append("pooled {}x{}".format(*pair.pooled[1]))
    if pair.cropped:
        said.append("cropped from {},{} on".format(*pair.cropped[1]))
    whose = "student's" if changed and changed[0][0] == "s" else "teacher's"
    maps = "x".join(map(str, smaller[2:]))
    return f"{maps} ({whose} {', '.join(said)})" if said else maps
