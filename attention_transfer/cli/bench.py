"""`attention-transfer bench`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from attention_transfer.cli.parsing import PROGRAM, UsageError, parse, verb_parser

WHAT = ("kernels", "step", "terms", "caffe", "startup")


def run(arguments: list[str]) -> None:
    parser = verb_parser("bench", f"{PROGRAM} bench kernels --quick")
    parser.add_argument(
        "what", nargs="*", default=[], metavar="WHAT", help=f"{', '.join(WHAT)}; all if not given."
    )
    parser.add_argument("--quick", action="store_true", help="Tiny shapes, two rounds: see that it works.")
    parser.add_argument("--output", help="The CSV to append to. If not given, docs/speed.md is written too.")
    parser.add_argument("--device", default="", help="cpu or cuda. A GPU if there is one, if not given.")
    flags = parse(parser, arguments)
    if unknown := [name for name in flags.what if name not in WHAT]:
        raise UsageError(f"bench: unknown benchmark {unknown[0]}. Known: {', '.join(WHAT)}.")
    benchmarks = _benchmarks(Path(__file__).parents[2])
    try:
        benchmarks.bench(flags.what, quick=flags.quick, output=flags.output, device=flags.device)
    except ValueError as error:
        if str(error).startswith("bench: "):
            raise UsageError(str(error)) from None
        raise


def _benchmarks(root: Path) -> ModuleType:
    """The module of all benchmarks, which is part of the repository and not of the package."""
    if not (root / "benchmarks" / "bench.py").is_file():
        raise UsageError(
            "bench: the benchmarks are not installed with the package. Run it in a checkout of the "
            'repository, after pip install -e ".[dev]".'
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("benchmarks.bench")
