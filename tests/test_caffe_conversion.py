"""Nets as PyTorch source, as ONNX, and back: the same numbers, and source that is safe to run."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from caffe_nets import NETS, written
from torch import Tensor, nn

from attention_transfer.caffe import Net, convert, to_caffemodel

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference" / "caffe"
CASES = [
    f"{kind}/{folder.name}"
    for kind in ("layers", "attention", "nets")
    for folder in sorted((REFERENCE / kind).glob("*"))
]
ONLY_LOSSES = ("accuracy", "euclidean", "hinge", "sigmoid_ce", "softmax_loss")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}

pytestmark = pytest.mark.filterwarnings("ignore::attention_transfer.caffe.conversion.GradientWarning")

_numbers = itertools.count()


def load(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"converted_{next(_numbers)}", folder / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same(got: Tensor, want: Tensor, what: str = "") -> None:
    torch.testing.assert_close(
        got,
        want,
        rtol=0,
        atol=TOLERANCE[want.dtype] * float(want.detach().abs().nan_to_num().max()) + 1e-12,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


def outputs(folder: Path, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    names = list(inspect.signature(model.forward).parameters)
    got = model(*(inputs[name] for name in names))
    if isinstance(got, dict):
        return got
    (name,) = re.findall(r"return (\w+)\n\n\ndef load", (folder / "model.py").read_text())
    return {name: got}


def compare(folder: Path, model: nn.Module, net: Net, inputs: dict[str, Tensor]) -> None:
    blobs = net(inputs)
    got = outputs(folder, model, inputs)
    assert got
    for name, value in got.items():
        assert_same(value, blobs[name], name)


# ------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES or [pytest.param("", marks=pytest.mark.skip("no shared/reference"))])
def test_reference_case(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = REFERENCE / case
    meta = json.loads((folder / "meta.json").read_text())
    stored = folder / "weights.caffemodel"
    prototxt = folder / "net.prototxt"
    net = Net(prototxt, stored if stored.exists() else None, phase=meta["phase"]).to(dtype)
    if folder.name.startswith(ONLY_LOSSES) and folder.name != "euclidean_propagate_down":
        with pytest.raises(ValueError, match="something besides losses"):
            convert(prototxt, net.to_caffemodel(), tmp_path, phase=meta["phase"])
        return
    convert(prototxt, net.to_caffemodel(), tmp_path, phase=meta["phase"])
    model = load(tmp_path).load()
    with np.load(folder / "inputs.npz") as arrays:
        inputs = {name: torch.from_numpy(array).to(dtype) for name, array in arrays.items()}
    compare(tmp_path, model, net.eval(), inputs)
    by_batch = "batchnorm" in case and "single_value" not in case and "global" not in case
    if by_batch and meta["phase"] == "TRAIN":
        compare(tmp_path, model.train(), net.train(), inputs)


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NETS)
def test_whole_net(name: str, double: bool, tmp_path: Path) -> None:
    prototxt, weights, net = written(NETS[name](), tmp_path, double=double)
    folder = convert(prototxt, weights, tmp_path / "out")
    model = load(folder).load()
    images = torch.randn(3, *net.inputs["data"][1:], dtype=net.dtype)
    compare(folder, model, net, {"data": images})


@pytest.mark.parametrize("name", NETS)
def test_onnx(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    prototxt, weights, net = written(NETS[name](), tmp_path)
    convert(prototxt, weights, tmp_path / "out", onnx=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    images = torch.randn(5, *net.inputs["data"][1:])  # another batch than the declared one
    (got,) = session.run(None, {"data": images.numpy()})
    blobs = net({"data": images})
    torch.testing.assert_close(torch.from_numpy(got), blobs[net.outputs[0]], rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------- back


@pytest.mark.parametrize("name", NETS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    prototxt, weights, net = written(NETS[name](), tmp_path)
    folder = convert(prototxt, weights, tmp_path / "out")
    back = to_caffemodel(prototxt, folder / "model.safetensors")
    again = Net(prototxt, back)
    images = {"data": torch.randn(net.inputs["data"])}
    assert_same(again(images)[net.outputs[0]], net(images)[net.outputs[0]])
    for before, after in zip(net.layers, again.layers, strict=True):
        if before.type != "BatchNorm":
            assert all(map(torch.equal, before.blobs, after.blobs)), before.name
        else:
            assert after.blobs[2] == 1


@pytest.mark.parametrize("name", NETS)
def test_state_of_a_net(name: str, tmp_path: Path) -> None:
    prototxt, _, net = written(NETS[name](), tmp_path)
    again = Net(prototxt, to_caffemodel(prototxt, net.state_dict()))
    for before, after in zip(net.layers, again.layers, strict=True):
        assert all(map(torch.equal, before.blobs, after.blobs)), before.name
