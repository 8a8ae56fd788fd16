"""How long a user waits before anything happens: importing the package, and `attention-transfer --help`."""

from __future__ import annotations

import subprocess
import sys
import time

from attention_transfer.cli.parsing import PROGRAM
from benchmarks.measuring import Samples
from benchmarks.names import PROJECT
from benchmarks.rows import ROOT, Results, Row
from benchmarks.session import Session

IMPORT = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
AFTER_TORCH = "import time, torch; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
NAMES = "import attention_transfer as at; [getattr(at, name) for name in at.__all__]"  # loaded on first use
HELP = "from attention_transfer.cli import main; main(['--help'])"


def run(results: Results, session: Session) -> None:
    """Rows for the import beyond torch's, torch's own, and the whole of --help; fresh processes in turn."""
    if results.has(session.device, benchmark="startup"):
        return
    samples, rounds = Samples(), 2 if session.quick else 9
    for i in range(rounds + 1):
        session.status(f"startup: round {i} of {rounds}")
        laps = {
            "import torch": _printed(IMPORT.format("torch")),
            "import attention_transfer beyond torch": _printed(
                AFTER_TORCH.format("import attention_transfer")
            ),
            "every public name beyond torch": _printed(AFTER_TORCH.format(NAMES)),
            f"{PROGRAM} --help": _wall(HELP),
        }
        if i:  # the first round only brings the files into memory
            samples.add(PROJECT, laps)
    rows = [
        Row("startup", op, "torch" if op == "import torch" else PROJECT, "", **samples.figures(op, PROJECT))
        for op in samples.seconds
    ]
    results.append(rows, session.device)
    session.say(", ".join(f"{row.op} {row.p50:.3f} s" for row in rows))


def _printed(code: str) -> float:
    return float(_run(code).stdout)


def _wall(code: str) -> float:
    start = time.perf_counter()
    _run(code)
    return time.perf_counter() - start


def _run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
