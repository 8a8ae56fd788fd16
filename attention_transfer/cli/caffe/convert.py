"""`attention-transfer caffe convert`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attention_transfer._colours import print_safely
from attention_transfer._reading import one_line, open_file
from attention_transfer.cli.caffe import VERBS
from attention_transfer.cli.parsing import PROGRAM, UsageError, parse, verb_parser

VERB = "caffe convert"

HELP = """
 Two directions, told by the second file. NET.prototxt WEIGHTS.caffemodel -o DIR writes DIR/model.py, readable
 source that needs torch and safetensors alone, and DIR/model.safetensors; --onnx adds DIR/model.onnx.
 NET.prototxt model.safetensors -o NEW.caffemodel takes weights that were trained there back to Caffe.
"""


def run(arguments: list[str]) -> None:
    summary = f"{VERBS['convert']}.{one_line(HELP).rstrip('.').join((' ', ''))}"
    usage = f"{PROGRAM} {VERB} deploy.prototxt net.caffemodel -o converted --onnx"
    parser = verb_parser(VERB, usage, summary)
    parser.add_argument("net", metavar="NET.prototxt", help="The net.")
    parser.add_argument(
        "weights", metavar="WEIGHTS", help="A .caffemodel, or a .safetensors for the way back."
    )
    parser.add_argument("-o", "--out", metavar="PATH", required=True, help="The folder, or the caffemodel.")
    parser.add_argument("--phase", default="TEST", help="Which layers are in: TEST or TRAIN.")
    parser.add_argument(
        "--output", metavar="BLOB", action="append", default=[], help="A blob to give; may be repeated."
    )
    parser.add_argument("--onnx", action="store_true", help="Write model.onnx too, checked with onnxruntime.")
    parser.add_argument("--force", action="store_true", help="Replace what is there.")
    flags = parse(parser, arguments)
    if flags.phase not in ("TEST", "TRAIN"):
        raise UsageError(f"{VERB}: expected --phase TEST or TRAIN, got {flags.phase}.")
    for path in (flags.net, flags.weights):
        if not Path(path).is_file():
            raise UsageError(f"{VERB}: expected a file, got {path}, which is not one.")
    with _plain_warnings():
        if _is_safetensors(flags.weights):
            _back(flags)
        else:
            _forth(flags)


def _is_safetensors(path: str) -> bool:
    """Whether a file begins as safetensors do, with the length of a header and the header's brace."""
    with open_file(path) as file:
        return file.read(9)[8:] == b"{"


def _forth(flags: Any) -> None:
    from attention_transfer.caffe import converting

    folder = Path(flags.out)
    written = [converting.SOURCE, converting.WEIGHTS, *([converting.ONNX] if flags.onnx else [])]
    _refuse_to_replace([folder / name for name in written], flags.force)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{VERB}: expected a folder after -o, got {folder}, which is a file.")
    done = converting.convert_net(
        flags.net, flags.weights, folder, phase=flags.phase, output=flags.output, onnx=flags.onnx
    )
    for line in done.differences():
        print_safely(f"warning: {line}", stream=sys.stderr)
    gives = ", ".join(done.source.outputs)
    print_safely(f"{done.source.name}: {', '.join(done.source.inputs)} -> {gives}; same numbers as the net.")
    print_safely(*(folder / name for name in written), sep="\n")


def _back(flags: Any) -> None:
    if flags.onnx or flags.output:
        raise UsageError(f"{VERB}: expected no --onnx and no --output on the way back to Caffe.")
    path = Path(flags.out)
    if path.suffix != ".caffemodel":
        raise UsageError(f"{VERB}: expected -o NAME.caffemodel for weights in safetensors, got {path}.")
    _refuse_to_replace([path], flags.force)
    from attention_transfer.caffe.converting import to_caffemodel
    from attention_transfer.caffe.files.caffemodel import write_binary

    stored = to_caffemodel(flags.net, flags.weights, phase=flags.phase)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_binary(stored, path)
    print_safely(path)


def _refuse_to_replace(paths: list[Path], force: bool) -> None:
    there = [path for path in paths if path.exists()]
    if there and not force:
        raise UsageError(
            f"{VERB}: expected to write a new file, got {there[0]}, which is there. Pass --force."
        )


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as lines on stderr, whatever filters are on."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        yield
