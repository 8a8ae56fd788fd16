"""Nets as PyTorch source, as ONNX, and back: the same numbers, and source that is safe to run."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from caffe_nets import NETS, Text, randomise, written
from conftest import SHARED
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from attention_transfer.caffe import Net, convert, read_caffemodel, schema, to_caffemodel
from attention_transfer.caffe.converting import GradientWarning
from attention_transfer.caffe.files.caffemodel import blob_array, write_binary
from attention_transfer.caffe.files.prototxt import parse_net
from attention_transfer.cli import main

REFERENCE = SHARED / "reference" / "caffe"
CASES = [
    f"{kind}/{folder.name}"
    for kind in ("layers", "attention", "nets")
    for folder in sorted((REFERENCE / kind).glob("*"))
]
ONLY_LOSSES = ("accuracy", "euclidean", "hinge", "sigmoid_ce", "softmax_loss")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}

pytestmark = pytest.mark.filterwarnings("ignore::attention_transfer.caffe.converting.GradientWarning")

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


UNUSUAL = {
    "argmax": ("ArgMax", "argmax_param { top_k: 3 out_max_val: true }"),
    "places": ("ArgMax", "argmax_param { top_k: 2 axis: 1 }"),
    "hanging": ("Pooling", "pooling_param { pool: AVE kernel_size: 3 stride: 2 pad: 2 }"),
    "padded": ("Pooling", "pooling_param { pool: MAX kernel_size: 3 stride: 3 pad: 2 }"),
    "attention": ("Reshape", "reshape_param { shape { dim: 0 dim: 0 dim: -1 dim: 1 } }"),
    "normalize": ("Normalize", "norm_param { across_spatial: false channel_shared: false }"),
    "slice": ("Slice", "slice_param { slice_point: 1 }"),
    "mvn": ("MVN", ""),
    "deconvolution": ("Deconvolution", "convolution_param { num_output: 2 kernel_size: 4 stride: 2 }"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_onnx_of_unusual_layers(name: str, tmp_path: Path) -> None:
    """The export compares itself, for the declared batch and for another."""
    pytest.importorskip("onnxruntime")
    text = Text("unusual", 2, 4, 7, 8)
    text.add("Power", "below", "power_param { scale: 2 }")
    kind, settings = UNUSUAL[name]
    text.add(kind, "layer", settings)
    if name == "slice":
        text.text = text.text.replace('top: "layer"', 'top: "layer" top: "rest"')
    converted(text.text, tmp_path, onnx=True)
    assert (tmp_path / "model.onnx").stat().st_size > 0


def test_onnx_of_doubles_is_in_float32(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    prototxt, weights, net = written(NETS["vgg"](), tmp_path, double=True)
    convert(prototxt, weights, tmp_path, onnx=True)
    images = torch.randn(1, *net.inputs["data"][1:])
    (got,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"data": images.numpy()})
    want = net.float()({"data": images})["prob"]
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-6)
    assert load(tmp_path).load().fc8.weight.dtype == torch.float64


def test_a_net_of_one_batch_size_alone_is_exported_so(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    text = Text("fixed", 2, 3, 4, 4)
    text.add("Reshape", "one", "reshape_param { shape { dim: 2 dim: 48 } }")
    text.dense("fc", 2)
    converted(text.text, tmp_path, onnx=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_inputs()[0].shape == [2, 3, 4, 4]


def test_what_onnxruntime_computes_otherwise_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")

    def forward(self: nn.Softmax, x: Tensor) -> Tensor:
        return x.sigmoid() if torch.compiler.is_exporting() else x.softmax(1)

    monkeypatch.setattr(nn.Softmax, "forward", forward)
    prototxt, weights, _ = written(NETS["vgg"](), tmp_path)
    with pytest.raises(ValueError, match="expected onnxruntime to give the module's 'prob'"):
        convert(prototxt, weights, tmp_path / "out", onnx=True)
    assert not (tmp_path / "out").exists()


def test_missing_packages_of_onnx_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prototxt, weights, _ = written(NETS["vgg"](), tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r'pip install "attention-transfer\[onnx\]"'):
        convert(prototxt, weights, tmp_path / "out", onnx=True)
    assert not (tmp_path / "out").exists()


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


def test_round_trip_keeps_doubles(tmp_path: Path) -> None:
    prototxt, weights, net = written(NETS["resnet"](), tmp_path, double=True)
    folder = convert(prototxt, weights, tmp_path / "out")
    back = to_caffemodel(prototxt, folder / "model.safetensors")
    again = Net(prototxt, back).double()
    images = {"data": torch.randn(net.inputs["data"], dtype=torch.float64)}
    assert_same(again(images)["fc"], net(images)["fc"])


def test_trained_weights_go_back(tmp_path: Path) -> None:
    prototxt, weights, net = written(NETS["resnet"](), tmp_path)
    model = load(convert(prototxt, weights, tmp_path / "out")).load().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 16, 16)).square().sum().backward()
        optimizer.step()
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    again = Net(prototxt, to_caffemodel(prototxt, state))
    images = torch.randn(2, 3, 16, 16)
    assert_same(again(images), model.eval()(images))
    assert not torch.equal(again.params["conv1"][0], net.params["conv1"][0])


def test_a_state_that_does_not_fit_is_refused_with_an_entry_named(tmp_path: Path) -> None:
    prototxt, weights, _ = written(NETS["resnet"](), tmp_path)
    state = load_file(convert(prototxt, weights, tmp_path / "out") / "model.safetensors")
    for change, message in (
        ({"conv9.weight": torch.zeros(1)}, "got 'conv9.weight'"),
        ({"fc.weight": torch.zeros(3, 3)}, r"expected \(10, 12\) for 'fc.weight', got \(3, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            to_caffemodel(prototxt, state | change)
    del state["fc.bias"]
    with pytest.raises(ValueError, match=r"expected 'fc\.bias' beside"):
        to_caffemodel(prototxt, state)
    del state["fc.weight"]
    with pytest.warns(UserWarning, match="nothing for 'fc'"):
        back = to_caffemodel(prototxt, state)
    assert not next(layer for layer in back.layer if layer.name == "fc").blobs


# ------------------------------------------------------------------------------------------ what is kept

TRAINING = """
name: "training"
layer { name: "data" type: "Input" top: "data" top: "label"
        input_param { shape { dim: 2 dim: 4 } shape { dim: 2 } }
        transform_param { scale: 0.5 mean_value: 104 } }
layer { name: "halved" type: "Power" bottom: "label" top: "halved" power_param { scale: 0.5 } }
layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip"
        inner_product_param { num_output: 3 weight_filler { type: "xavier" } } }
layer { name: "aux" type: "InnerProduct" bottom: "data" top: "aux"
        inner_product_param { num_output: 2 weight_filler { type: "xavier" } } }
layer { name: "quiet" type: "Power" bottom: "aux" top: "quiet" }
layer { name: "silence" type: "Silence" bottom: "quiet" }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "halved" top: "loss" }
layer { name: "aux_loss" type: "SoftmaxWithLoss" bottom: "aux" bottom: "halved" top: "aux_loss" }
layer { name: "accuracy" type: "Accuracy" bottom: "ip" bottom: "label" top: "accuracy" }
"""


ONES = 'num_output: 1 kernel_size: 1 bias_term: false weight_filler { type: "constant" value: 1 }'


def converted(text: str, folder: Path, **options: Any) -> tuple[ModuleType, str, Net]:
    """The module of a net whose weights are random, its source, and the net."""
    net = randomise(Net(parse_net(text)))
    convert(parse_net(text), net.to_caffemodel(), folder, **options)
    return load(folder), (folder / "model.py").read_text(), net


def test_losses_labels_and_what_is_silenced_are_left_out(tmp_path: Path) -> None:
    module, source, net = converted(TRAINING, tmp_path)
    model = module.load()
    assert list(inspect.signature(model.forward).parameters) == ["data"]
    assert sorted(name for name, _ in model.named_children()) == ["aux", "ip"]
    data = torch.randn(2, 4)
    blobs = net({"data": data, "label": torch.zeros(2)})
    got = model(data)
    assert got.keys() == {"ip", "aux"}
    assert all(torch.equal(got[name], blobs[name]) for name in got)
    for name in ("halved", "quiet", "loss", "accuracy"):
        assert f"Left out, as no output needs it: '{name}'" in source
    assert "Caffe transformed what 'data' reads: 'scale: 0.5 mean_value: 104'" in source


def test_a_part_that_is_silenced_is_no_output(tmp_path: Path) -> None:
    text = Text("silence", 2, 4)
    text.text += 'layer { name: "cut" type: "Slice" bottom: "data" top: "kept" top: "unused" }\n'
    text.text += 'layer { name: "silence" type: "Silence" bottom: "unused" }\n'
    module, _, _ = converted(text.text, tmp_path)
    data = torch.randn(2, 4)
    assert torch.equal(module.load()(data), data[:, :2])


def test_rounding_may_turn_a_few_decisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ArgMax over many places: one that falls out otherwise is no error, many are."""
    from attention_transfer.caffe.layers.score import ArgMax

    text = Text("segment", 1, 3, 20, 20)
    text.conv("conv", 5, 1)
    text.add("ArgMax", "classes", "argmax_param { axis: 1 }")
    original = ArgMax.forward
    for wrong, fine in ((1, True), (40, False)):

        def forward(self: ArgMax, x: Tensor, wrong: int = wrong) -> Tensor:
            places = original(self, x)
            places.view(-1)[:wrong] = 9
            return places

        monkeypatch.setattr(ArgMax, "forward", forward)
        if fine:
            converted(text.text, tmp_path)
        else:
            with pytest.raises(ValueError, match="to give the net's 'classes', got other numbers"):
                converted(text.text, tmp_path)


def test_a_net_for_training_with_data_of_its_own_converts(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["data"] = np.zeros((4, 3, 6, 6), dtype=np.float32)
        file["label"] = np.zeros(4, dtype=np.float32)
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'data.h5'}\n")
    text = Text("train_val", 2, 3, 6, 6)
    text.text = (
        'name: "train_val" layer { name: "data" type: "HDF5Data" top: "data" top: "label" '
        f'hdf5_data_param {{ source: "{tmp_path / "list.txt"}" batch_size: 2 }} }}\n'
    )
    text.conv("conv", 4, 3)
    text.dense("fc", 3)
    text.add("SoftmaxWithLoss", "loss", "", "fc", "label")
    module, _, net = converted(text.text, tmp_path / "out")
    images = torch.randn(5, 3, 6, 6)
    model = module.load()
    assert list(inspect.signature(model.forward).parameters) == ["data"]
    assert_same(model(images), net(images))


DATA = """layer { name: "data" type: "Data" top: "data" top: "label" %s
    data_param { source: "away" backend: LMDB batch_size: 2 } }"""
CROPPED = DATA % "transform_param { crop_size: 8 }"
SCORES = """layer { name: "fc" type: "InnerProduct" bottom: "data" top: "fc" inner_product_param {
    num_output: 3 weight_filler { type: "xavier" } } }
    layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }"""


def test_a_net_converts_without_its_data_if_it_tells_their_size(tmp_path: Path) -> None:
    fed = parse_net(CROPPED + SCORES)
    fed.layer[0].CopyFrom(schema.LayerParameter(name="data", type="Input", top=["data"]))
    fed.layer[0].input_param.shape.add(dim=[1, 3, 8, 8])
    del fed.layer[2]
    net, x = Net(fed), torch.randn(2, 3, 8, 8)
    folder = convert(parse_net(CROPPED + SCORES), net.to_caffemodel(), tmp_path)
    assert_same(load(folder).load(folder)(x), net({"data": x})["fc"])
    back = to_caffemodel(parse_net(CROPPED + SCORES), folder / "model.safetensors")
    np.testing.assert_array_equal(blob_array(back.layer[1].blobs[0]), net.params["fc"][0].detach().numpy())
    with pytest.raises(FileNotFoundError, match="an LMDB in away, got nothing there"):
        convert(parse_net(DATA % "" + SCORES), net.to_caffemodel(), tmp_path)


def test_outputs_may_be_chosen(tmp_path: Path) -> None:
    module, _, net = converted(TRAINING, tmp_path, output="ip")
    data = torch.randn(2, 4)
    assert torch.equal(module.load()(data), net(data))
    module, _, _ = converted(TRAINING, tmp_path, output=["quiet", "ip"])
    assert list(module.load()(data)) == ["quiet", "ip"]
    for output, message in (
        ("ipp", "got 'ipp'. Did you mean ip?"),
        ("loss", "needs no loss or labels, got 'loss' of the layer 'loss'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            converted(TRAINING, tmp_path, output=output)


def test_a_layer_without_weights_is_named(tmp_path: Path) -> None:
    stored = schema.NetParameter()
    stored.layer.append(next(x for x in Net(parse_net(TRAINING)).to_caffemodel().layer if x.name == "ip"))
    with pytest.warns(UserWarning, match="no weights for 'aux': they start from fillers"):
        convert(parse_net(TRAINING), stored, tmp_path)


@pytest.mark.filterwarnings("error")
def test_frozen_layers_may_come_from_their_fillers(tmp_path: Path) -> None:
    text = Text("frozen", 2, 3, 4, 4)
    text.conv("conv", 3, 1)
    stored = Net(parse_net(text.text)).to_caffemodel()
    text.add("Convolution", "sum", f"param {{ lr_mult: 0 }} convolution_param {{ {ONES} }}")
    convert(parse_net(text.text), stored, tmp_path)
    model = load(tmp_path).load()
    images = torch.randn(2, 3, 4, 4)
    assert_same(model(images), model.conv(images).sum(1, keepdim=True))


def test_shared_and_frozen_parameters_stay_so(tmp_path: Path) -> None:
    text = Text("shared", 2, 4)
    settings = "inner_product_param { num_output: 4 bias_term: false }"
    text.add("InnerProduct", "one", f'param {{ name: "w" }} {settings}')
    text.add("InnerProduct", "two", f'param {{ name: "w" }} {settings}')
    text.add("InnerProduct", "three", f"param {{ lr_mult: 0 }} {settings}")
    module, _, _ = converted(text.text, tmp_path)
    model = module.load()
    assert model.one.weight is model.two.weight
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["three.weight"]


# --------------------------------------------------------------------------------------------- the source


def formatter() -> str:
    found = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if found is None:
        pytest.skip("ruff is not installed")
    return found


HOSTILE = [
    'x"""\nimport os; os.system("touch pwned")\n"""',
    "a\n    raise SystemExit\n",
    "class",
    "self",
    "torch",
    "forward",
    "__init__",
    "__class__",
    "3a/1x1",
    "Tensor",
    "max_pool",
    "\u202e\u2028\r\x0c\\",
    "_",
    "",
    "load_state_dict",
    "n" * 300,
    "n" * 300 + "m",
    "parts",
    "print",
    "relu",
    "ReLU",
    "été\nimport os",
    "conv 1",
    "conv-1",
    "conv_1",
    "training",
    "eval('1')",
]


def hostile_net() -> Any:
    net = schema.NetParameter(name=HOSTILE[0])
    first = net.layer.add(name="'#\n", type="Input", top=["data\n'"])
    first.input_param.shape.add(dim=[2, 3, 9, 9])
    first.transform_param.mean_file = HOSTILE[0]
    bottom = "data\n'"
    for place, name in enumerate(HOSTILE):
        top = HOSTILE[-1 - place] + "#"
        layer = net.layer.add(name=name, type="Convolution", bottom=[bottom], top=[top])
        layer.convolution_param.num_output = 3
        layer.convolution_param.kernel_size.append(1)
        layer.convolution_param.weight_filler.type = "xavier"
        bottom = top
        if place % 3 == 0:
            net.layer.add(name=f"{name}!", type="ReLU", bottom=[bottom], top=[bottom])
        if place % 5 == 0:
            pool = net.layer.add(name=f"{name}?", type="Pooling", bottom=[bottom], top=[f"{top}'"])
            pool.pooling_param.kernel_size, pool.pooling_param.stride = 1, 1
            pool.pooling_param.pad = 0
            bottom = f"{top}'"
    net.layer.add(name="end", type="Eltwise", bottom=[bottom, HOSTILE[-1] + "#'"], top=[HOSTILE[0]])
    net.layer.add(name="'\n", type="Slice", bottom=[HOSTILE[0]], top=["n" * 300, "n" * 301, "n" * 302])
    return net


def test_hostile_names_become_harmless_identifiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    net = Net(hostile_net())
    convert(hostile_net(), net.to_caffemodel(), tmp_path)
    images = torch.randn(2, 3, 9, 9)
    model = load(tmp_path).load()
    got = model(images)
    want = net({"data\n'": images})
    for value, name in zip(got.values(), net.outputs, strict=True):
        assert_same(value, want[name])
    assert not (tmp_path / "pwned").exists()
    names = [name for name, _ in model.named_children()]
    assert len(set(names)) == len(names) and all(name.isidentifier() for name in names)
    back = Net(hostile_net(), to_caffemodel(hostile_net(), model.state_dict()))
    assert all(map(torch.equal, back.parameters(), net.parameters()))
    source = (tmp_path / "model.py").read_text()
    assert source.isascii()
    allowed = {ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Expr}
    assert {type(node) for node in ast.parse(source).body} <= allowed


@pytest.mark.parametrize("width", [88, 110])
def test_source_is_formatted_and_needs_torch_alone(width: int, tmp_path: Path) -> None:
    convert(hostile_net(), Net(hostile_net()).to_caffemodel(), tmp_path / "hostile")
    for name, make in NETS.items():
        prototxt, weights, _ = written(make(), tmp_path / name)
        convert(prototxt, weights, tmp_path / name)
        tree = ast.parse((tmp_path / name / "model.py").read_text())
        imported = {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert imported <= {"math", "pathlib", "torch", "torch.nn.functional", "safetensors.torch"}
    for arguments in (["format", "--check"], ["check", "--select", "E4,E7,E9,F,I,UP,B"]):
        command = [formatter(), *arguments, "--isolated", "--no-cache", "--line-length", str(width)]
        done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_batchnorm_with_scale_is_one_module(tmp_path: Path) -> None:
    prototxt, weights, net = written(NETS["resnet"](), tmp_path)
    model = load(convert(prototxt, weights, tmp_path)).load()
    assert isinstance(model.bn_conv1, nn.BatchNorm2d)
    assert not hasattr(model, "scale_conv1")
    mean, variance, factor = net.params["bn_conv1"]
    torch.testing.assert_close(model.bn_conv1.running_mean, mean / factor)
    torch.testing.assert_close(model.bn_conv1.running_var, variance / factor)
    assert torch.equal(model.bn_conv1.weight, net.params["scale_conv1"][0])
    assert model.bn_conv1.eps == float(np.float32(1e-4))
    assert {"conv1.weight", "fc.weight", "fc.bias"} <= model.state_dict().keys()


UNEQUAL = 'norm_param { channel_shared: false scale_filler { type: "uniform" } }'


def test_a_batchnorm_whose_own_values_are_wanted_keeps_to_itself(tmp_path: Path) -> None:
    text = Text("apart", 2, 3, 5, 5)
    text.add("BatchNorm", "norm")
    text.add("Scale", "scaled", "scale_param { bias_term: true }")
    images = torch.randn(2, 3, 5, 5)
    module, _, net = converted(text.text, tmp_path, output=["norm", "scaled"])
    got, want = module.load()(images), net({"data": images})
    assert not torch.equal(got["norm"], got["scaled"])
    for name in got:
        assert_same(got[name], want[name])
    text.add("TanH", "other", "", "norm")
    module, _, net = converted(text.text, tmp_path)
    assert_same(module.load()(images)["other"], net({"data": images})["other"])


DIFFERING = {
    "in place, Power": ("Power", "power_param { power: 2 }", True),
    "is 0, it is not a number": ("Power", "power_param { power: 3 }", False),
    "in place, Normalize": ("Normalize", "", True),
    "unequal scales": ("Normalize", UNEQUAL, False),
    "MVN leaves eps": ("MVN", "", False),
    "g y / x": ("Eltwise", "eltwise_param { operation: PROD stable_prod_grad: false }", False),
    "of equal values": ("Eltwise", "eltwise_param { operation: MAX }", False),
    "in place, BNLL": ("BNLL", "", True),
    "stops here": ("TanH", "propagate_down: false", False),
}  # fmt: skip
ALIKE = [
    ("Power", "power_param { power: 2 scale: 3 }"),
    ("Normalize", ""),
    ("MVN", "mvn_param { normalize_variance: false }"),
    ("Eltwise", "eltwise_param { operation: PROD stable_prod_grad: true }"),
    ("Eltwise", ""),
    ("TanH", ""),
]


def one_layer(kind: str, settings: str, in_place: bool = False) -> str:
    text = Text("one", 2, 4, 3, 3)
    below = text.add("Power", "below", "power_param { scale: 2 }")
    others = [below, "data"] if kind == "Eltwise" else [below]
    text.add(kind, "layer", settings, *others, top=below if in_place else "layer")
    return text.text


@pytest.mark.parametrize("reason", DIFFERING)
def test_a_gradient_that_is_caffes_own_is_told(reason: str, tmp_path: Path) -> None:
    with pytest.warns(GradientWarning, match=f"Caffe's own gradient differs in 'layer': .*{reason}"):
        _, source, _ = converted(one_layer(*DIFFERING[reason]), tmp_path)
    assert re.search(f"# Caffe's own gradient differs here: .*{reason}", source)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("kind", "settings"), ALIKE)
def test_other_gradients_are_the_same(kind: str, settings: str, tmp_path: Path) -> None:
    module, source, net = converted(one_layer(kind, settings), tmp_path)
    assert "gradient differs" not in source
    grads = []
    weights = torch.randn(2, 4, 3, 3)
    for model in (module.load(), lambda x: net({"data": x})["layer"]):
        x = torch.linspace(-2, 3, 72).view(2, 4, 3, 3).requires_grad_()
        (model(x) * weights).sum().backward()
        grads.append(x.grad)
    assert_same(grads[0], grads[1])


def test_a_type_that_does_not_convert_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attention_transfer.caffe.converting import emit

    monkeypatch.delitem(emit.EMITTERS, "TanH")
    with pytest.raises(ValueError, match="layer 'layer': expected a type that converts, got 'TanH'"):
        converted(one_layer("TanH", ""), tmp_path)


# -------------------------------------------------------------------------------------------- the command


def test_a_net_too_large_to_try_is_refused(tmp_path: Path) -> None:
    text = Text("huge", 2, 3, 10000, 10000)
    for number in range(60):
        text.add("TanH", f"tanh{number}")
    text.text = text.text.replace("dim: 3 dim", "dim: 9 dim")
    with pytest.raises(ValueError, match=r"convert: expected blobs that fit into \d+ GB of memory"):
        convert(parse_net(text.text), schema.NetParameter(), tmp_path)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.chdir(tmp_path)
    prototxt, weights, _ = written(NETS["squeezenet"](), tmp_path)
    return str(prototxt), str(weights)


def convert_by_command(*arguments: str) -> int:
    return main(["caffe", "convert", *arguments])


def test_command_there_and_back(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    prototxt, weights = files
    assert convert_by_command(prototxt, weights, "-o", "out", "--onnx") == 0
    assert "squeeze: data -> prob".lower() in capsys.readouterr().out.lower()
    assert {path.name for path in Path("out").iterdir()} == {"model.py", "model.safetensors", "model.onnx"}
    assert convert_by_command(prototxt, "out/model.safetensors", "-o", "back.caffemodel") == 0
    for before, after in zip(
        read_caffemodel(weights).layer, read_caffemodel("back.caffemodel").layer, strict=True
    ):
        assert before.name == after.name
        for one, other in zip(before.blobs, after.blobs, strict=True):
            assert np.array_equal(blob_array(one), blob_array(other))


def test_command_replaces_nothing_unless_forced(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    prototxt, weights = files
    assert convert_by_command(prototxt, weights, "-o", "out") == 0
    assert convert_by_command(prototxt, weights, "-o", "out") == 2
    assert "out/model.py, which is there. Pass --force." in capsys.readouterr().err
    assert convert_by_command(prototxt, weights, "-o", "out", "--force", "--output", "pool10") == 0
    assert "return pool10" in Path("out/model.py").read_text()


def test_command_tells_of_gradients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prototxt, weights, _ = written(_text("mvn"), tmp_path)
    assert convert_by_command(str(prototxt), str(weights), "-o", str(tmp_path / "out")) == 0
    captured = capsys.readouterr()
    assert "warning: convert: Caffe's own gradient differs in 'mvn': MVN" in captured.err


def _text(kind: str) -> Text:
    text = Text("net", 2, 4, 3, 3)
    text.add("MVN", kind)
    text.dense("fc", 2)
    return text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["NET", "nothing.caffemodel", "-o", "out"], "nothing.caffemodel"),
        (["nothing.prototxt", "WEIGHTS", "-o", "out"], "nothing.prototxt"),
        (["NET", "WEIGHTS"], "out"),
        (["NET", "WEIGHTS", "-o", "out", "--phase", "PLAY"], "--phase TEST or TRAIN, got PLAY"),
        (["NET", "WEIGHTS", "-o", "out", "--output", "pool11"], "got 'pool11'. Did you mean pool1 or pool10"),
        (["NET", "WEIGHTS", "-o", "NET"], "which is a file"),
        (["NET", "NET", "-o", "out"], "expected a NetParameter in protobuf's binary form"),
        (["WEIGHTS", "WEIGHTS", "-o", "out"], "expected text"),
        (["NET", "TENSORS", "-o", "out"], "expected -o NAME.caffemodel"),
        (["NET", "TENSORS", "-o", "x.caffemodel", "--onnx"], "on the way back"),
        (["NET", "TENSORS", "-o", "x.caffemodel"], "got 'other'"),
        (["NET", "BROKEN", "-o", "x.caffemodel"], "is none, or damaged"),
        (["NET", "OTHER", "-o", "out"], "layer 'conv1': expected 2 blobs, got 1"),
        (["NET", "WEIGHTS", "-o", "out", "--onyx"], "unknown argument --onyx"),
    ],
)
def test_command_answers_bad_input_in_one_line(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    prototxt, weights = files
    save_file({"other": torch.zeros(2)}, "other.safetensors")
    Path("broken.safetensors").write_bytes(Path("other.safetensors").read_bytes()[:20])
    stored = read_caffemodel(weights)
    for layer in stored.layer:
        del layer.blobs[1:]
    write_binary(stored, "other.caffemodel")
    known = {
        "NET": prototxt,
        "WEIGHTS": weights,
        "TENSORS": "other.safetensors",
        "BROKEN": "broken.safetensors",
        "OTHER": "other.caffemodel",
    }
    assert convert_by_command(*(known.get(argument, argument) for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("attention-transfer: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert not Path("out").exists()
