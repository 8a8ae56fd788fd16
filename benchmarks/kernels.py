"""The term alone, forward and backward, against the memory floor and against other hands' code.

Also how its cost grows, and how long the first call takes until the kernels are compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from attention_transfer._memory import keep_freed_memory
from attention_transfer.cli.parsing import one_line
from benchmarks import contenders
from benchmarks.contenders import Floor, Inputs, Term
from benchmarks.measuring import (
    LAYOUTS,
    Samples,
    allocated_by,
    allocator,
    dtype_name,
    interleave,
    shape_name,
)
from benchmarks.names import AUTHORS, COMPILED, FLOOR, PROJECT, TORCHDISTILL
from benchmarks.rows import ROOT, Results, Row
from benchmarks.session import Session

SHAPES = [(128, 16, 32, 32), (128, 64, 32, 32), (64, 256, 56, 56), (64, 512, 14, 14), (32, 2048, 7, 7)]
QUICK_SHAPE = (4, 16, 16, 16)
DTYPES = [torch.float32, torch.bfloat16]
OPS = ("forward", "backward", "both")
TERMS: dict[str, Callable[[str], Term]] = {
    PROJECT: contenders.project,
    AUTHORS: contenders.authors,
    TORCHDISTILL: contenders.torchdistill,
    COMPILED: contenders.compiled,
}


@dataclass(frozen=True)
class Case:
    """One pair of activations."""

    shape: Sequence[int]
    dtype: torch.dtype
    layout: str
    form: str

    @property
    def columns(self) -> dict[str, str]:
        return {
            "shape": shape_name(self.shape),
            "dtype": dtype_name(self.dtype),
            "layout": self.layout,
            "form": self.form,
        }

    def __str__(self) -> str:
        return " ".join(self.columns.values())


def cases(*, quick: bool) -> list[Case]:
    """Every shape, data type and layout with the authors' form, and two shapes with the paper's.

    The form makes a difference to small maps only.
    """
    if quick:
        return [Case(QUICK_SHAPE, torch.bfloat16, "channels-last", "paper")]
    by_code = [
        Case(shape, dtype, layout, "code") for shape in SHAPES for dtype in DTYPES for layout in LAYOUTS
    ]
    return by_code + [Case(shape, torch.float32, "nchw", "paper") for shape in SHAPES[1:3]]


def cases_of_the_unaware(*, quick: bool) -> list[Case]:
    """What is measured before freed memory is kept, as in a process where nobody has thought of it."""
    if quick:
        return [Case(QUICK_SHAPE, torch.float32, "nchw", "code")]
    return [Case(shape, torch.float32, layout, "code") for shape in SHAPES for layout in LAYOUTS]


def without(case: Case, *, quick: bool) -> dict[str, str]:
    """Contenders that are not measured at a case, and why."""
    if quick:
        return {COMPILED: "not measured: compiling takes longer than --quick may"}
    if case.form == "paper":
        return {COMPILED: "not measured: the forms differ in small maps only, see code"}
    return {}


def run(results: Results, session: Session) -> None:
    """Measure all cases, the scaling and the first calls; a case that is in the results is passed by."""
    if session.device.type == "cpu":
        todo = cases_of_the_unaware(quick=session.quick)
        _run_cases(todo, results, session)
    keep_freed_memory()
    _run_cases(cases(quick=session.quick), results, session)
    scaling(results, session)
    if not session.quick:
        first_calls(results, session)


def _run_cases(todo: Sequence[Case], results: Results, session: Session) -> None:
    memory = allocator(session.device)
    for i, case in enumerate(todo):
        if results.has(session.device, benchmark="kernels", allocator=memory, **case.columns):
            continue
        title = f"kernels {i + 1}/{len(todo)}, freed memory {memory}: {case}"
        session.status(title)
        rows = measure(case, session, title)
        session.say(f"{title}: {summary(results.append(rows, session.device))}")


def measure(case: Case, session: Session, title: str = "") -> list[Row]:
    """All contenders at one case, with the floor."""
    inputs = contenders.make_inputs([case.shape], case.dtype, case.layout, session.device)
    unmeasured = without(case, quick=session.quick)
    terms, unusable = _usable(case, inputs, [name for name in TERMS if name not in unmeasured])
    floor = Floor(inputs, session.device, session.evict_bytes)
    runs = {FLOOR: floor, **{name: contenders.timed(term, inputs) for name, term in terms.items()}}
    samples = interleave(
        runs,
        session.device,
        seconds=session.seconds,
        rounds=session.rounds,
        evict_bytes=session.evict_bytes,
        progress=lambda text: session.status(f"{title}: {text}"),
    )
    memory = {name: memory_of(term, inputs, session.device) for name, term in terms.items()}
    common = {"benchmark": "kernels", **case.columns, "allocator": allocator(session.device)}
    return [
        *_floor_rows(floor, samples, common),
        *(row for name in terms for row in _rows(name, samples, memory[name], common)),
        *(_comparison(name, samples, common) for name in terms if name != PROJECT),
        *(
            Row(op="both", backend=name, note=note, **common)
            for name, note in {**unmeasured, **unusable}.items()
        ),
    ]


def _usable(case: Case, inputs: Inputs, names: Sequence[str]) -> tuple[dict[str, Term], dict[str, str]]:
    """The contenders that work here, after a first run, and why the others do not."""
    usable, unusable = {}, {}
    for name in names:
        try:
            term = TERMS[name](case.form)
            contenders.gradients(inputs, *term(inputs.students, inputs.teachers))
            usable[name] = term
        except (ImportError, RuntimeError) as error:
            if name == PROJECT:
                raise
            unusable[name] = not_measured(error)
    return usable, unusable


def not_measured(error: Exception) -> str:
    """What a row says in place of figures."""
    return f"not measured: {type(error).__name__}: {one_line(str(error)):.120}"


def memory_of(term: Term, inputs: Inputs, device: torch.device) -> dict[str, int]:
    """Columns `bytes` and `saved`: what the term allocates at its peak, and keeps from forward to backward.

    For the latter the teacher's activations are copies that only the term could keep alive, because
    training without the term would not keep them. The student's, it would: the next layer needs them.
    """

    def whole() -> object:
        passed, loss = term(inputs.students, inputs.teachers)
        return contenders.gradients(inputs, passed, loss)

    def forward() -> object:
        return term(inputs.students, [x.clone() for x in inputs.teachers])

    return {"bytes": allocated_by(device, whole)[0], "saved": allocated_by(device, forward)[1]}


def _floor_rows(floor: Floor, samples: Samples, common: dict[str, str]) -> list[Row]:
    note = f"read by {floor.way}"
    moved = {"forward": floor.bytes * 2 // 5, "backward": floor.bytes * 3 // 5, "both": floor.bytes}
    return [
        Row(op=op, backend=FLOOR, moved=moved[op], note=note, **samples.figures(op, FLOOR), **common)
        for op in OPS
    ]


def _rows(name: str, samples: Samples, memory: dict[str, int], common: dict[str, str]) -> list[Row]:
    return [
        Row(
            op=op,
            backend=name,
            **samples.figures(op, name),
            **samples.ratio(op, name, FLOOR),
            **(memory if op == "both" else {}),
            **common,
        )
        for op in OPS
    ]


def _comparison(name: str, samples: Samples, common: dict[str, str]) -> Row:
    """How many times this project's time another contender takes."""
    figures = {**samples.figures("both", name), **samples.ratio("both", name, PROJECT)}
    return Row(op="both", backend=name, **figures, **common)


def summary(rows: Sequence[Row]) -> str:
    """One line about a case: times the floor's."""
    shown = [row for row in rows if row.op == "both" and row.against in (FLOOR, "") and row.backend != FLOOR]
    floor = next(row for row in rows if row.backend == FLOOR and row.op == "both")
    parts = [f"{row.backend} {row.ratio:.2f}" if row.ratio else f"{row.backend} {row.note}" for row in shown]
    return f"floor {1000 * (floor.p50 or 0):.2f} ms; {', '.join(parts)}"


# --- how the cost grows -------------------------------------------------------------------------------------

BASE = (64, 64, 32, 32)
GROWTH = (0.25, 0.5, 1, 2, 4)


def sweeps(*, quick: bool) -> dict[str, list[list[tuple[int, ...]]]]:
    """By what grows, the shapes of the pairs at each step."""
    if quick:
        return {"pairs": [[(4, 8, 8, 8)] * count for count in (1, 2)]}
    b, c, h, w = BASE
    return {
        "b": [[(int(b * growth), c, h, w)] for growth in GROWTH],
        "c": [[(b, int(c * growth), h, w)] for growth in GROWTH],
        "h*w": [[(b, c, round(h * growth**0.5), round(w * growth**0.5))] for growth in GROWTH],
        "pairs": [[(b // 4, c, h, w)] * int(4 * growth) for growth in GROWTH],
    }


def scaling(results: Results, session: Session) -> None:
    """Forward and backward of this project over growing batch, channels, positions and number of pairs."""
    for axis, steps in sweeps(quick=session.quick).items():
        case = {"benchmark": "scaling", "op": f"both, growing {axis}", "dtype": "float32", "layout": "nchw"}
        if results.has(session.device, **case):
            continue
        rows = []
        for shapes in steps:
            session.status(f"scaling in {axis}: {len(shapes)} x {shape_name(shapes[0])}")
            inputs = contenders.make_inputs(shapes, torch.float32, "nchw", session.device)
            runs = {
                FLOOR: Floor(inputs, session.device, session.evict_bytes),
                PROJECT: contenders.timed(contenders.project("code"), inputs),
            }
            samples = interleave(
                runs,
                session.device,
                seconds=session.seconds / 4,
                rounds=session.rounds,
                evict_bytes=session.evict_bytes,
            )
            figures = {**samples.figures("both", PROJECT), **samples.ratio("both", PROJECT, FLOOR)}
            rows.append(
                Row(
                    backend=PROJECT,
                    shape=f"{len(shapes)} x ({shape_name(shapes[0])})",
                    form="code",
                    moved=5 * inputs.bytes,
                    allocator=allocator(session.device),
                    **case,
                    **figures,
                )
            )
        results.append(rows, session.device)
        session.say(f"scaling in {axis}: {', '.join(f'{1000 * (row.p50 or 0):.2f}' for row in rows)} ms")


# --- the first call -----------------------------------------------------------------------------------------

FIRST_CALL = """
import json, sys, time, torch
from benchmarks import contenders
name, device = sys.argv[1:]
inputs = contenders.make_inputs([(8, 8, 16, 16)], torch.float32, "nchw", torch.device(device))
term = {"project": contenders.project, "compiled": contenders.compiled}[name]("code")
start = time.perf_counter()
contenders.gradients(inputs, *term(inputs.students, inputs.teachers))
print(json.dumps(time.perf_counter() - start))
"""


def first_calls(results: Results, session: Session) -> None:
    """Seconds to the first loss and gradient of a fresh process, with nothing and with all cached on disk."""
    for name, backend in (("project", PROJECT), ("compiled", COMPILED)):
        if results.has(session.device, benchmark="compile", backend=backend):
            continue
        session.status(f"first call: {backend}")
        rows = [
            Row(
                "compile",
                op,
                backend,
                "8x8x16x16",
                "float32",
                "nchw",
                "code",
                p50=seconds,
                rounds=1,
                note=note,
            )
            for op, seconds, note in _first_calls(name, session.device)
        ]
        results.append(rows, session.device)
        session.say(
            f"first call of {backend}: "
            + ", ".join(f"{row.op.split(', ')[1]} {row.p50:.2f} s" if row.p50 else row.note for row in rows)
        )


def _first_calls(name: str, device: torch.device) -> list[tuple[str, float | None, str]]:
    """(op, seconds or None, why not): a start with an empty cache, then one with what that has left there."""
    found: list[tuple[str, float | None, str]] = []
    with tempfile.TemporaryDirectory(prefix="first-call-") as folder:
        for op in ("first call, nothing cached", "first call, cached on disk"):
            done = _in_fresh_process(name, device, folder)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["it failed"])[-1]
                return [*found, (op, None, f"not measured: {last:.120}")]
            found.append((op, json.loads(done.stdout.splitlines()[-1]), ""))
    return found


def _in_fresh_process(name: str, device: torch.device, folder: str) -> subprocess.CompletedProcess[str]:
    caches = ("NUMBA_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    environment = {**os.environ, **{cache: str(Path(folder, cache)) for cache in caches}}
    return subprocess.run(
        [sys.executable, "-c", FIRST_CALL, name, str(device)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
