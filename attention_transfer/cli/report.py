"""`attention-transfer report`."""

from __future__ import annotations

from pathlib import Path

from attention_transfer._colours import print_safely
from attention_transfer.cli.parsing import PROGRAM, parse, verb_parser

SIMILARITY_IMAGES = 500  # test images that the similarity of the maps is a mean over


def run(arguments: list[str]) -> None:
    parser = verb_parser("report", f"{PROGRAM} report runs/* -o report.html")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Run folders.")
    parser.add_argument(
        "-o", "--output", help="The page to write; report.html in the first run if not given."
    )
    parser.add_argument(
        "--images",
        type=int,
        default=SIMILARITY_IMAGES,
        help="Test images the map similarity is averaged over.",
    )
    flags = parse(parser, arguments)
    runs = [Path(folder) for folder in flags.runs]
    output = Path(flags.output or runs[0] / "report.html")
    from attention_transfer.cli.collecting import collect
    from attention_transfer.visualize import write_report

    print_safely(f"report: {write_report(runs, output, examples=collect(runs, flags.images))}")
