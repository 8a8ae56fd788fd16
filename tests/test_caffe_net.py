"""Nets against what a real Caffe computed, case by case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attention_transfer.caffe import Net

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference" / "caffe"
KINDS = ("layers", "attention", "nets")
CASES = [f"{kind}/{folder.name}" for kind in KINDS for folder in sorted((REFERENCE / kind).glob("*"))]


def load(folder: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(folder / name) as arrays:
        return dict(arrays)


def assert_close(got: Tensor | None, want: np.ndarray, tolerance: dict[str, float], key: str) -> None:
    values = np.zeros_like(want) if got is None else got.detach().double().numpy()
    assert values.shape == want.shape, key
    absolute = tolerance["atol_scalar" if key.startswith("loss") or "/loss" in key else "atol"]
    worst = np.abs(values - want).max(initial=0)
    assert worst <= tolerance["rtol"] * np.abs(want).max(initial=0) + absolute, f"{key}: off by {worst:.3g}"


def run(folder: Path, dtype: torch.dtype) -> tuple[Net, dict[str, Tensor], Any]:
    meta = json.loads((folder / "meta.json").read_text())
    weights = folder / "weights.caffemodel"
    net = Net(folder / "net.prototxt", weights if weights.exists() else None, phase=meta["phase"]).to(dtype)
    inputs = {name: torch.from_numpy(array).to(dtype) for name, array in load(folder, "inputs.npz").items()}
    if meta["force_backward"]:
        for tensor in inputs.values():
            tensor.requires_grad_()
    return net, inputs, meta


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES or [pytest.param("", marks=pytest.mark.skip("no shared/reference"))])
def test_case(case: str, dtype: torch.dtype) -> None:
    folder = REFERENCE / case
    net, inputs, meta = run(folder, dtype)
    if meta["kind"] == "stochastic":
        pytest.skip("random numbers: see test_dropout_keeps_and_scales")
    tolerance = meta["tolerance"][str(dtype).removeprefix("torch.")]
    blobs = net(inputs)
    if meta["has_loss"] and net.loss.requires_grad:
        net.loss.backward()
    for key, want in load(folder, "expected.npz").items():
        kind, _, rest = key.partition("/")
        if kind == "blob":
            got = blobs[rest]
        elif kind == "loss":
            got = net.loss
        elif kind == "grad":
            got = inputs[rest].grad
        else:
            layer, index = rest.rsplit("/", 1)
            blob = net.params[layer][int(index)]
            got = blob.grad if kind == "param_grad" else blob
        assert_close(got, want, tolerance, key)
