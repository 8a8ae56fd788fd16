"""What each term of the paper adds to a training step: time, and peak memory.

Every contender trains its own copy of the student on the same batch, beside its own live teacher where its
term asks one. The terms over input gradients differentiate twice, and `symmetry` shows every image twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import attention_transfer as at
from attention_transfer.terms import Term
from benchmarks.measuring import Run, allocated_by, allocator, interleave
from benchmarks.names import STUDENT
from benchmarks.rows import Results, Row
from benchmarks.session import Session
from benchmarks.step import LAYOUT, OPTIMIZER, Setting, settings

TERMS: dict[str, Callable[[], list[Term]]] = {
    STUDENT: list,
    "at": lambda: [at.AttentionTransfer(1.0)],
    "kd": lambda: [at.KnowledgeDistillation()],
    "f-actt": lambda: [at.ActivationTransfer(1.0)],
    "gradient": lambda: [at.GradientTransfer(1.0)],
    "symmetry": lambda: [at.FlipSymmetry(1.0)],
    "min-l2": lambda: [at.InputGradientNorm(1.0)],
}


def run(results: Results, session: Session) -> None:
    """A row for the time of each term's step, one for its ratio to the student alone, one for its memory."""
    setting = next(iter(settings(quick=session.quick).values()))
    case = {"benchmark": "terms", "shape": setting.name}
    if results.has(session.device, **case):
        return
    steps = {name: _step(setting, make(), session.device) for name, make in TERMS.items()}
    runs: dict[str, Run] = {name: _timed(step) for name, step in steps.items()}
    samples = interleave(
        runs,
        session.device,
        seconds=setting.seconds,
        rounds=setting.rounds,
        evict_bytes=0,
        progress=lambda text: session.status(f"terms: {text}"),
    )
    common: dict[str, Any] = {**case, "op": "step", "dtype": "float32", "layout": LAYOUT}
    common["allocator"] = allocator(session.device)
    for name, step in steps.items():
        peak, _ = allocated_by(session.device, step)
        ratio = samples.ratio("step", name, STUDENT)
        row = Row(backend=name, bytes=peak, **samples.figures("step", name), **common)
        results.append([row, Row(backend=name, **ratio, **common)], session.device)
        session.say(f"terms: {name}: {ratio['ratio']:.2f} times {STUDENT}, {peak / 2**20:.0f} MiB")


def _step(setting: Setting, terms: list[Term], device: torch.device) -> Callable[[], object]:
    student, teacher = setting.models()
    images, labels = setting.images_and_labels(device)
    images = images.contiguous(memory_format=torch.channels_last)
    for model in (student, teacher):
        model.to(device, memory_format=torch.channels_last)
    distiller = at.Distiller(student, teacher, terms=terms, example_input=images).train()
    optimizer = torch.optim.SGD(distiller.parameters(), **OPTIMIZER)

    def step() -> None:
        optimizer.zero_grad()
        distiller(images, labels).loss.backward()
        optimizer.step()

    return step


def _timed(step: Callable[[], object]) -> Run:
    def run(watch: Any) -> None:
        with watch("step"):
            step()

    return run
