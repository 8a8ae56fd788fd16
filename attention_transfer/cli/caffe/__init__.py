"""`attention-transfer caffe VERB`: one file a verb."""

from __future__ import annotations

import importlib

from attention_transfer._colours import print_safely
from attention_transfer.cli.parsing import PROGRAM, UsageError, suggest

VERBS = {
    "build": "Make one net of a student, a frozen teacher, and attention branches between them",
    "check": "Find what is wrong with an attention transfer net, before Caffe does or does not tell",
    "train": "Train a net as its solver prototxt says",
    "convert": "Make a PyTorch module of a net and its weights, or a caffemodel of a module's weights",
    "lmdb": "Put images and labels into an LMDB that Caffe's Data layer reads",
}


def run(arguments: list[str]) -> int | None:
    """Run one verb; the exit status, where it is not 0 by itself."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        print_safely(f"usage: {PROGRAM} caffe VERB [flags]\n\nAttention transfer for Caffe's nets.\n")
        print_safely(*(f"  {name.ljust(width)}  {summary}" for name, summary in VERBS.items()), "", sep="\n")
        print_safely(f"`{PROGRAM} caffe VERB --help` lists a verb's flags.")
        return None
    verb, *rest = arguments
    if verb not in VERBS:
        raise UsageError(f"caffe: unknown verb {verb!r}. {suggest(verb, VERBS)}")
    return importlib.import_module(f"{__name__}.{verb}").run(rest)
