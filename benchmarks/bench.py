"""All benchmarks, one after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import caffe, kernels, startup, step, tables, terms
from benchmarks.rows import ROOT, Results
from benchmarks.session import Session

WHAT: dict[str, Callable[[Results, Session], None]] = {
    "kernels": kernels.run,
    "step": step.run,
    "terms": terms.run,
    "caffe": caffe.run,
    "startup": startup.run,
}
FOLDER = ROOT / "benchmarks" / "results"


def bench(
    what: Sequence[str] = (), *, quick: bool = False, output: str | None = None, device: str = ""
) -> Path:
    """Measure what is asked for, or everything, and append the rows to a CSV.

    Without `quick` and `output`, the rows go to `results/` and docs/speed.md is written anew. What this very
    commit has measured on this device already is passed by, so that a run that was stopped goes on.

    Args:
        what: names of `WHAT`; none for all.
        quick: tiny shapes and two rounds, to see that everything works.
        output: the CSV.
        device: "cpu" or "cuda"; a GPU if there is one.

    Returns:
        The CSV.

    Raises:
        ValueError: if the CSV has other columns, or there is no such device.
        KeyboardInterrupt: on Ctrl-C; the rows of all cases that were complete are kept.
    """
    session = Session(find_device(device), quick=quick)
    file = FOLDER / f"{'quick' if quick else session.device.type}.csv"
    results = Results(output or file)
    try:
        for name, run in WHAT.items():  # in this order: kernels are the first to see freed memory as it is
            if name in (what or WHAT):
                run(results, session)
    except KeyboardInterrupt:
        session.line.clear()
        print(f"\nStopped; {len(results.rows)} rows are in {results.path}.", file=sys.stderr)
        raise
    session.say(f"rows: {results.path}")
    if not (quick or output):
        session.say(f"tables and plots: {tables.write_docs(FOLDER, ROOT / 'docs')}")
    return results.path


def find_device(name: str) -> torch.device:
    """The device of that name, or the best there is.

    Raises:
        ValueError: if it is not here.
    """
    here = torch.cuda.is_available()
    if name not in ("", "cpu", "cuda") or (name == "cuda" and not here):
        raise ValueError(f"bench: expected --device cpu{' or cuda' if here else ''}, got {name}.")
    return torch.device(name or ("cuda" if here else "cpu"))
