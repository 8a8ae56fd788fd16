"""Each project as it comes: torchdistill's defaults against those of `attention-transfer train`.

Precision, memory layout and the C library's allocator differ, and the last is set for a whole process: so
each side runs in processes of its own, in turn, and the median of the paired ratios counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import Samples, allocator, dtype_name, interleave
from benchmarks.names import PROJECT, TORCHDISTILL
from benchmarks.rows import ROOT, Results, Row
from benchmarks.session import Session

TURNS, SECONDS = 3, 5


def run(name: str, shape: str, results: Results, session: Session) -> None:
    """Rows of both sides at the setting of that name, if it has not been measured."""
    if results.has(session.device, benchmark="defaults", shape=shape):
        return
    samples, told = Samples(), {}
    for turn in range(1 if session.quick else TURNS):
        for side in (TORCHDISTILL, PROJECT):
            session.status(f"defaults, {shape}: turn {turn + 1} of {TURNS}, {side}")
            done = _in_fresh_process(side, name, session)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["it failed"])[-1]
                note = f"not measured: {last:.120}"
                results.append([Row("defaults", "step", side, shape, note=note)], session.device)
                session.say(f"defaults, {shape}: {side} {note}")
                return
            told[side] = json.loads(done.stdout.splitlines()[-1])
            samples.add(side, {"step": told[side].pop("seconds")})
    results.append(_rows(shape, samples, told), session.device)
    ratio = samples.ratio("step", TORCHDISTILL, PROJECT)["ratio"]
    session.say(f"defaults, {shape}: torchdistill's step takes {ratio:.2f} times this project's")


def _rows(shape: str, samples: Samples, told: dict[str, dict[str, str]]) -> list[Row]:
    rows = [
        Row("defaults", "step", side, shape, **told[side], **samples.figures("step", side)) for side in told
    ]
    ratio = samples.ratio("step", TORCHDISTILL, PROJECT)
    figures = samples.figures("step", TORCHDISTILL)
    return [*rows, Row("defaults", "step", TORCHDISTILL, shape, **told[TORCHDISTILL], **figures, **ratio)]


def _in_fresh_process(side: str, name: str, session: Session) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    flags = json.dumps({"side": side, "setting": name, "quick": session.quick, "device": str(session.device)})
    command = [sys.executable, "-m", "benchmarks.defaults", flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


# --- in the process of one side -----------------------------------------------------------------------------


def worker(side: str, setting: str, quick: bool, device: str) -> dict[str, Any]:
    """The median time of a step of one side, and the settings that it ran with."""
    from benchmarks.step import settings

    prepare = {PROJECT: _project, TORCHDISTILL: _torchdistill}[side]
    step, told = prepare(settings(quick=quick)[setting], torch.device(device))

    def timed(watch: Any) -> None:
        with watch("step"):
            step()

    samples = interleave(
        {side: timed},
        torch.device(device),
        seconds=0 if quick else SECONDS,
        rounds=(2, 2) if quick else (5, 60),
        warm_up=3,
        evict_bytes=0,
    )
    return {"seconds": float(np.median(samples.of("step", side))), **told}


def _project(setting: Any, device: torch.device) -> tuple[Callable[[], object], dict[str, str]]:
    """As `attention-transfer train` sets itself up when it is told nothing."""
    from attention_transfer._memory import keep_freed_memory
    from attention_transfer.runs.recipe import Recipe
    from attention_transfer.training.speed import choose_speed
    from benchmarks.step import LAYOUT, LIVE, Bench

    if device.type == "cpu":
        keep_freed_memory()
    speed = choose_speed(Recipe(accelerator=device.type))
    dtype = torch.bfloat16 if speed.precision == "bf16-mixed" else torch.float32
    told = {"dtype": dtype_name(dtype), "layout": LAYOUT, "form": "code", "allocator": allocator(device)}
    return Bench(setting, dtype, device).step(LIVE), told


def _torchdistill(setting: Any, device: torch.device) -> tuple[Callable[[], object], dict[str, str]]:
    import attention_transfer as at
    from benchmarks.step import torchdistill_step

    student, teacher = (model.to(device) for model in setting.models())
    images, labels = setting.images_and_labels(device)
    pairs = at.suggest_pairs(student, teacher, images[:2])
    step = torchdistill_step(pairs, student, teacher, images, labels, contextlib.nullcontext)
    return step, {"dtype": "float32", "layout": "nchw", "form": "code", "allocator": allocator(device)}


if __name__ == "__main__":
    print(json.dumps(worker(**json.loads(sys.argv[1]))))
