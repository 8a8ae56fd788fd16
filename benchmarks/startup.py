"""How long a user waits before anything happens: importing the package, and `attention-transfer --help`."""

from __future__ import annotations

import json
import subprocess
import sys
import time

from attention_transfer.cli.parsing import PROGRAM
from benchmarks.measuring import Samples
from benchmarks.names import PROJECT
from benchmarks.rows import ROOT, Results, Row
from benchmarks.session import Session

IMPORTS = """
import json, time
start = time.perf_counter()
import torch
torch_is_there = time.perf_counter()
import attention_transfer
package_is_there = time.perf_counter()
[getattr(attention_transfer, name) for name in attention_transfer.__all__]  # loaded on first use
end = time.perf_counter()
print(json.dumps([torch_is_there - start, package_is_there - torch_is_there, end - torch_is_there]))
"""
OPS = ("import torch", "import attention_transfer beyond torch", "every public name beyond torch")
HELP = "from attention_transfer.cli import main; main(['--help'])"


def run(results: Results, session: Session) -> None:
    """Rows for the imports and for the whole of --help, from fresh processes in turn."""
    if results.has(session.device, benchmark="startup"):
        return
    samples, rounds = Samples(), 1 if session.quick else 9
    if not session.quick:
        _imports()  # brings the files into memory
    for i in range(rounds):
        session.status(f"startup: round {i + 1} of {rounds}")
        samples.add(PROJECT, {**_imports(), f"{PROGRAM} --help": _help()})
    rows = [
        Row("startup", op, "torch" if op == OPS[0] else PROJECT, "", **samples.figures(op, PROJECT))
        for op in samples.seconds
    ]
    results.append(rows, session.device)
    session.say(", ".join(f"{row.op} {row.p50:.3f} s" for row in rows))


def _imports() -> dict[str, float]:
    return dict(zip(OPS, json.loads(_run(IMPORTS).stdout), strict=True))


def _help() -> float:
    start = time.perf_counter()
    _run(HELP)
    return time.perf_counter() - start


def _run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
