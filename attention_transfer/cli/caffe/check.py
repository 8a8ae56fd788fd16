"""`attention-transfer caffe check`."""

from __future__ import annotations

from pathlib import Path

from attention_transfer._colours import print_safely
from attention_transfer.cli.caffe import VERBS
from attention_transfer.cli.parsing import PROGRAM, parse, verb_parser


def run(arguments: list[str]) -> int:
    """Print what is wrong; the exit status is 1 if something is, and not only to be known."""
    parser = verb_parser(
        "caffe check",
        f"{PROGRAM} caffe check at_train.prototxt --solver at_train_solver.prototxt",
        VERBS["check"],
    )
    parser.add_argument("net", type=Path, help="The net's prototxt.")
    parser.add_argument("--solver", type=Path, help="The solver's prototxt.")
    parser.add_argument("--channels", type=int, help="Of the images, where neither data nor prototxt tell.")
    flags = parse(parser, arguments)
    from attention_transfer.caffe import check

    findings = check(flags.net, solver=flags.solver, channels=flags.channels)
    for finding in findings:
        kind = "note: " if finding.note else ""
        print_safely(f"{flags.net}:{finding.line}: {kind}{finding.pitfall}: {', '.join(finding.layers)}")
        print_safely(f"  {finding.message}", f"  Mend: {finding.mend}", "", sep="\n")
    mistakes = [finding for finding in findings if not finding.note]
    if not mistakes:
        print_safely(f"{flags.net}: nothing found")
    return 1 if mistakes else 0
