"""Solvers against what a real Caffe computed, their files, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attention_transfer.caffe import Solver

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference" / "caffe"
CASES = [folder.name for folder in sorted((REFERENCE / "solvers").glob("*"))]
ABSENT = [pytest.param("", marks=pytest.mark.skip("no shared/reference"))]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def load(folder: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(folder / name) as arrays:
        return dict(arrays)


def batches(folder: Path, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    arrays = load(folder, "data.npz")
    count = len(next(iter(arrays.values())))
    return [{k: torch.from_numpy(v[i]).to(dtype) for k, v in arrays.items()} for i in range(count)]


def assert_close(got: Any, want: np.ndarray, tolerance: dict[str, float], key: str) -> None:
    values = np.asarray(got.detach().double() if isinstance(got, Tensor) else got)
    assert values.shape == want.shape, key
    absolute = tolerance["atol_scalar" if key.startswith("loss") or "/loss" in key else "atol"]
    worst = np.abs(values - want).max(initial=0)
    assert worst <= tolerance["rtol"] * np.abs(want).max(initial=0) + absolute, f"{key}: off by {worst:.3g}"


def run(solver: Solver, iterations: int) -> dict[str, Any]:
    """What a reference solver's expected.npz holds."""
    found: dict[str, Any] = {"loss": [], "learning_rate": []}
    for iteration in range(iterations):
        solver.step(1)
        found["loss"].append(solver.loss)
        found["learning_rate"].append(solver.learning_rate)
        for name, value in solver.losses.items():
            found.setdefault(f"loss/{name}", []).append(value)
        if iteration == 0:
            found |= parameters(solver, "param_iter1")
    found |= parameters(solver, "param")
    for layer, blobs in solver.history.items():
        for index, buffers in enumerate(blobs):
            found |= {f"history/{layer}/{index}/{j}": buffer for j, buffer in enumerate(buffers)}
    return found


def parameters(solver: Solver, kind: str) -> dict[str, Tensor]:
    return {
        f"{kind}/{layer}/{index}": blob.detach().clone()
        for layer, blobs in solver.net.params.items()
        for index, blob in enumerate(blobs)
    }


@DTYPES
@pytest.mark.parametrize("case", CASES or ABSENT)
def test_reference(case: str, dtype: torch.dtype) -> None:
    folder = REFERENCE / "solvers" / case
    meta = json.loads((folder / "meta.json").read_text())
    tolerance = meta["tolerance"][str(dtype).removeprefix("torch.")]
    feed = batches(folder, dtype)
    solver = Solver(folder / "solver.prototxt", folder / "init.caffemodel", feed)
    solver.net.to(dtype)
    found = run(solver, meta["iterations"])
    for key, want in load(folder, "expected.npz").items():
        assert_close(found[key], want, tolerance, key)
