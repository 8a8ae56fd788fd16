"""Nets against what a real Caffe computed, case by case."""

from __future__ import annotations

import copy
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED
from torch import Tensor

from attention_transfer import Taps
from attention_transfer.caffe import Net, fusion
from attention_transfer.caffe.files.prototxt import parse_net
from attention_transfer.caffe.layers import count_blobs
from attention_transfer.caffe.schema import ParamSpec
from attention_transfer.functional import raw_energy

REFERENCE = SHARED / "reference" / "caffe"
KINDS = ("layers", "attention", "nets")
CASES = [f"{kind}/{folder.name}" for kind in KINDS for folder in sorted((REFERENCE / kind).glob("*"))]


def test_a_deep_net_is_copied_and_pickled() -> None:
    spec = 'layer { name: "x" type: "Input" top: "x" input_param { shape { dim: 2 } } }'
    for index in range(600):
        bottom, top = f"y{index - 1}" if index else "x", f"y{index}"
        spec += f'layer {{ name: "{top}" type: "ReLU" bottom: "{bottom}" top: "{top}" }}'
    net = Net(parse_net(spec))
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin.outputs == ["y599"]
        assert torch.equal(twin({"x": torch.ones(2)})["y599"], torch.ones(2))


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
    assert all(count_blobs(layer.spec) == len(layer.blobs) for layer in net.layers)
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


# ---------------------------------------------------------------------------------------------- pitfalls

PITFALLS = sorted(folder.name for folder in (REFERENCE / "pitfalls").glob("*"))
FORWARD = [name for name in PITFALLS if (REFERENCE / "pitfalls" / name / "inputs.npz").exists()]


def asked_of(key: str) -> str:
    return key.split("/", 2)[2]


# of shared/reference: relative and absolute
PITFALL_TOLERANCE = {torch.float64: (1e-10, 1e-12), torch.float32: (2e-5, 1e-6)}


@pytest.mark.parametrize("dtype", PITFALL_TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("side", ["net", "fixed"])
@pytest.mark.parametrize("name", FORWARD or [pytest.param("", marks=pytest.mark.skip("no shared/reference"))])
def test_pitfall_does_what_caffe_does(name: str, side: str, dtype: torch.dtype) -> None:
    folder = REFERENCE / "pitfalls" / name
    meta = json.loads((folder / "meta.json").read_text())
    repaired = side == "fixed" and (folder / "fixed.caffemodel").exists()
    weights = folder / ("fixed.caffemodel" if repaired else "weights.caffemodel")
    arguments = folder / f"{side}.prototxt", weights if weights.exists() else None
    if side == "net" and meta["outcome"] == "aborts":
        with pytest.raises(ValueError, match=r"^(Net: layer|read_net: )"):
            Net(*arguments, phase=meta["phase"])
        return
    net = Net(*arguments, phase=meta["phase"]).to(dtype)
    given = load(folder, "inputs.npz")
    chosen = {
        name: given.get(f"{name}@fixed", given[name]) if side == "fixed" else given[name]
        for name in net.inputs
    }
    inputs = {name: torch.from_numpy(array).to(dtype) for name, array in chosen.items()}
    relative, absolute = PITFALL_TOLERANCE[dtype]
    expected = {key: value for key, value in load(folder, "expected.npz").items() if key.startswith(side)}
    assert expected
    asked = [asked_of(key) for key in expected if key.split("/")[1] == "grad"]
    # Caffe keeps one gradient for a name: of the value before its in-place layers, which has no name here.
    makers = Counter(top for layer in net.layers for top in layer.tops)
    expected = {
        key: value for key, value in expected.items() if "/grad/" not in key or makers[asked_of(key)] == 1
    }
    for name in asked:
        if name in inputs:
            inputs[name].requires_grad_()
    blobs = net(inputs)
    inner = {name: blobs[name] for name in asked if name not in inputs and blobs[name].requires_grad}
    for blob in inner.values():
        blob.retain_grad()
    if net.loss.requires_grad:
        net.loss.backward()
    for key, want in expected.items():
        _, kind, rest = key.split("/", 2) if key.count("/") > 1 else (*key.split("/"), "")
        if kind == "param_grad":
            layer, index = rest.rsplit("/", 1)
            got = net.params[layer][int(index)].grad
        elif kind == "grad":
            got = {**inputs, **inner}[rest].grad if rest in {**inputs, **inner} else None
        else:
            got = blobs[rest] if kind == "blob" else net.loss
        values = np.zeros_like(want) if got is None else got.detach().numpy()
        scale = np.nanmax(np.abs(want), initial=0)
        np.testing.assert_allclose(values, want, rtol=0, atol=relative * scale + absolute, err_msg=key)


def test_of_two_layers_with_one_name_the_first_is_loaded(shared_reference: Path) -> None:
    folder = shared_reference / "caffe" / "pitfalls" / "same_layer_name"
    expected = load(folder, "expected.npz")
    net = Net(folder / "net.prototxt", phase="TRAIN").double()
    first, second = (layer for layer in net.layers if layer.name == "conv")
    for place, layer in enumerate((first, second)):
        for index in range(2):
            layer.put_blob(index, torch.from_numpy(expected[f"net/before/{place}/{index}"]))
    net.load(folder / "weights.caffemodel")
    for place, layer in enumerate((first, second)):
        for index, blob in enumerate(layer.blobs):
            np.testing.assert_array_equal(blob.detach().numpy(), expected[f"net/after_load/{place}/{index}"])
    saved = net.to_caffemodel()
    net.load(saved)
    assert torch.equal(first.blobs[0], second.blobs[0])


# ----------------------------------------------------------------------------------- what no case covers


def net_of(text: str, phase: str = "TRAIN") -> Net:
    return Net(parse_net(text), phase=phase)


def layer(kind: str, bottom: str, top: str, more: str = "", name: str | None = None) -> str:
    bottoms = " ".join(f'bottom: "{one}"' for one in bottom.split())
    tops = " ".join(f'top: "{one}"' for one in top.split())
    return f'layer {{ name: "{name or top}" type: "{kind}" {bottoms} {tops} {more} }}\n'


def source(name: str = "x", *dims: int) -> str:
    shape = " ".join(f"dim: {dim}" for dim in dims or (2, 3, 4, 5))
    return layer("Input", "", name, f"input_param {{ shape {{ {shape} }} }}")


MAP = (
    layer("AbsVal", "a", "abs")
    + layer("Power", "abs", "pow", "power_param { power: 2 }")
    + layer(
        "Convolution",
        "pow",
        "map",
        "param { lr_mult: 0 } convolution_param { num_output: 1 kernel_size: 1 bias_term: false "
        'weight_filler { type: "constant" value: 1 } }',
    )
    + layer("Reduction", "map", "loss", "loss_weight: 1 reduction_param { operation: SUMSQ }")
)


def test_dropout_keeps_and_scales() -> None:
    text = source("x", 40, 50) + layer("Dropout", "x", "y", "dropout_param { dropout_ratio: 0.25 }")
    x = torch.rand(40, 50) + 1
    kept = net_of(text)({"x": x})["y"]
    assert torch.all((kept == 0) | torch.isclose(kept, x / 0.75))
    assert 0.7 < (kept != 0).float().mean() < 0.8
    assert torch.equal(net_of(text, "TEST")({"x": x})["y"], x)
    assert torch.equal(net_of(text).eval()({"x": x})["y"], x)


def test_a_dropout_of_all_gives_what_caffe_gives() -> None:
    net = net_of(source("x", 2, 3) + layer("Dropout", "x", "y", "dropout_param { dropout_ratio: 1 }"))
    x = torch.randn(2, 3)
    assert net({"x": x})["y"].isnan().all()
    assert torch.equal(net.eval()({"x": x})["y"], x)


def test_a_parameter_layer_is_a_blob_that_learns() -> None:
    text = source("x", 2, 3) + layer(
        "Parameter", "", "p", "param { lr_mult: 3 } parameter_param { shape { dim: 2 dim: 3 } }"
    )
    text += layer("Eltwise", "x p", "y", "eltwise_param { operation: PROD }")
    text += layer("Reduction", "y", "loss", "loss_weight: 2")
    net, x = net_of(text), torch.randn(2, 3)
    assert [(entry.layer, entry.lr_mult) for entry in net.learnable] == [("p", 3)]
    assert torch.equal(net({"x": x})["y"], torch.zeros(2, 3)) and net.inputs == {"x": (2, 3)}
    net.loss.backward()
    assert torch.equal(net.params["p"][0].grad, 2 * x)
    saved = net.to_caffemodel()
    assert len(saved.layer[1].blobs) == 1
    net.load(saved)


def test_an_hdf5_output_takes_its_bottoms_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = source("x", 2, 3) + source("l", 2)
    text += (
        'layer { name: "o" type: "HDF5Output" bottom: "x" bottom: "l" hdf5_output_param { file_name: "f" } }'
    )
    net = net_of(text, "TEST")
    assert list(net({"x": torch.ones(2, 3), "l": torch.zeros(2)})) == ["x", "l"]
    assert not [*tmp_path.iterdir()]


def test_the_attention_branch_runs_on_the_kernels_with_the_numbers_of_its_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = []
    monkeypatch.setattr(fusion, "raw_energy", lambda *args: called.append(1) or raw_energy(*args))
    net = net_of(source("a") + MAP).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    blobs = net({"a": x})
    assert called and list(blobs) == ["a", "map", "loss", "abs", "pow"]
    (fast,) = torch.autograd.grad(net.loss, x)
    assert torch.equal(blobs["pow"], x.abs().square())
    with torch.no_grad():
        net.params["map"][0].fill_(2.0)  # no longer the sum: the layers themselves
    net({"a": x})
    assert len(called) == 1
    (slow,) = torch.autograd.grad(net.loss, x)
    torch.testing.assert_close(slow, 4 * fast, rtol=1e-12, atol=0)


def test_the_attention_branch_keeps_the_largest_numbers_that_its_layers_keep() -> None:
    x = torch.full((2, 3, 4, 5), 0.0)
    x[:, 0] = 0.75 * 2.0**64
    assert net_of(source("a") + MAP)({"a": x})["map"].eq(x[:, :1].square()).all()


def test_a_tap_inside_the_attention_branch_sees_its_layer() -> None:
    net = net_of(source("a") + MAP)
    with Taps(net, ["pow"]) as taps:
        x = torch.randn(2, 3, 4, 5)
        net({"a": x})
        assert torch.equal(taps.pop()["pow"], x.square())


def test_a_branch_whose_convolution_learns_is_left_to_the_layers() -> None:
    net = net_of("force_backward: true " + source("a") + MAP)
    net({"a": torch.randn(2, 3, 4, 5)})
    net.loss.backward()
    assert net.params["map"][0].grad is not None


def test_batchnorm_and_scale_in_one_pass_equal_the_layers() -> None:
    body = layer("BatchNorm", "x", "n", name="bn") + layer(
        "Scale",
        "n",
        "n",
        "scale_param { bias_term: true filler { value: 1.5 } bias_filler { value: 0.5 } }",
        name="s",
    )
    text = (
        source()
        + body
        + layer("Reduction", "n", "loss", "loss_weight: 1 reduction_param { operation: SUMSQ }")
    )
    fast, slow = net_of(text).double(), net_of(text).double()
    slow.layers[1].register_forward_hook(lambda *_: None)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    for net in (fast, slow):
        net({"x": x})
        net.loss.backward()
    for one, other in zip(fast.learnable, slow.learnable, strict=True):
        torch.testing.assert_close(one.tensor, other.tensor, rtol=1e-12, atol=1e-14)
        if one.tensor.requires_grad:
            torch.testing.assert_close(one.tensor.grad, other.tensor.grad, rtol=1e-12, atol=1e-14)


def test_what_a_scale_hides_of_a_batchnorm_is_there_when_asked_for() -> None:
    text = (
        source() + layer("BatchNorm", "x", "n") + layer("Scale", "n", "y", "scale_param { bias_term: true }")
    )
    net, x = net_of(text), torch.randn(2, 3, 4, 5)
    with torch.no_grad():
        net.params["y"][0].fill_(3.0)
    blobs = net({"x": x})
    stored = [blob.clone() for blob in net.params["n"]]
    assert list(blobs) == ["x", "y", "n"]
    torch.testing.assert_close(3 * blobs["n"], blobs["y"])
    assert all(torch.equal(one, other) for one, other in zip(stored, net.params["n"], strict=True))


def test_a_cut_batchnorm_sends_no_gradient_back() -> None:
    text = source() + layer("BatchNorm", "x", "n", "propagate_down: false", name="bn")
    text += layer("Scale", "n", "n", name="s")
    text += layer("Reduction", "n", "loss", "loss_weight: 1 reduction_param { operation: SUMSQ }")
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    net = net_of(text)
    net({"x": x})
    net.loss.backward()
    assert x.grad is None and net.params["s"][0].grad is not None


def test_doubles_of_a_filler_survive_the_change_of_precision() -> None:
    deconvolution = (
        "convolution_param { num_output: 1 kernel_size: 5 stride: 3 bias_term: false "
        'weight_filler { type: "bilinear" } }'
    )
    text = source("x", 1, 1, 3, 3) + layer("Deconvolution", "x", "y", deconvolution)
    weight = net_of(text).double().params["y"][0]
    row = torch.tensor([1, 2, 3, 2, 1], dtype=torch.float64) / 3
    torch.testing.assert_close(weight[0, 0], row[:, None] * row, rtol=1e-15, atol=0)
    written = net_of(text)
    with torch.no_grad():
        written.params["y"][0].fill_(0.1)
    assert torch.equal(written.double().params["y"][0], torch.full((1, 1, 5, 5), 0.1).double())


@pytest.mark.parametrize("weight", ["loss_weight: 0", "", "loss_weight: 1"])
def test_what_counts_for_nothing_has_gradients_of_zero(weight: str) -> None:
    """Also where the derivative is infinite or not a number: Caffe runs nothing backward then."""
    text = source("x", 2, 3) + layer("InnerProduct", "x", "y", "inner_product_param { num_output: 2 }")
    text += layer("Power", "y", "z", "power_param { power: -1 }")
    kind = "SUM" if weight else "MEAN"
    text += layer("Reduction", "z", "loss", f"{weight} reduction_param {{ operation: {kind} }}")
    net, x = net_of(text), torch.randn(2, 3, requires_grad=True)
    net({"x": x})
    net.loss.backward()
    gradients = [x.grad, *(blob.grad for blob in net.params["y"])]
    if weight == "loss_weight: 1":
        assert not all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
    else:
        assert net.loss.item() == 0
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
    with torch.no_grad():
        net({"x": x})
        assert not net.loss.requires_grad


def test_a_net_without_labels_scores_images() -> None:
    text = (
        source("data", 4, 3, 8, 8)
        + source("label", 4)
        + layer(
            "InnerProduct",
            "data",
            "fc",
            'inner_product_param { num_output: 5 weight_filler { type: "xavier" } }',
        )
        + layer("SoftmaxWithLoss", "fc label", "loss")
    )
    net, x = net_of(text), torch.randn(7, 3, 8, 8)
    assert torch.equal(net(x), net({"data": x, "label": torch.zeros(7)})["fc"])


def test_scores_of_a_pooled_map_have_two_axes() -> None:
    convolution = "convolution_param { num_output: 6 kernel_size: 1 }"
    pooling = "pooling_param { pool: AVE global_pooling: true }"
    text = source("data", 2, 3, 4, 5) + layer("Convolution", "data", "c", convolution)
    text += layer("Pooling", "c", "p", pooling) + layer("Softmax", "p", "prob")
    assert net_of(text, "TEST")(torch.randn(2, 3, 4, 5)).shape == (2, 6)


def test_a_test_net_shares_the_blobs_and_a_saved_net_loads() -> None:
    text = source() + layer(
        "Convolution",
        "x",
        "y",
        'convolution_param { num_output: 2 kernel_size: 3 weight_filler { type: "msra" } }',
    )
    train, test = net_of(text), net_of(text, "TEST")
    test.share(train)
    assert test.params["y"][0] is train.params["y"][0]
    again = net_of(text)
    again.load(train.to_caffemodel())
    assert torch.equal(again.params["y"][0], train.params["y"][0])
    assert net_of(text).load_state_dict(train.state_dict())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (layer("ReLU", "x", "y"), "layer 'y' (ReLU): expected bottoms that earlier layers make, got 'x'."),
        (
            source() + layer("Relu", "x", "y"),
            "expected a type that this package runs, got 'Relu'. Did you mean",
        ),
        (source() + layer("Convolution", "x", "y"), "1 or 2 values of kernel, got 0"),
        (source() + layer("ReLU", "x", "y") * 2, "expected a top that no other layer makes, got 'y'"),
        (source() + layer("ReLU", "x x", "y"), "expected 1 bottoms, got 2"),
        (
            source() + layer("ReLU", "x", "y", "param { lr_mult: 1 }"),
            "expected at most 0 param entries, got 1",
        ),
        (source() + layer("ReLU", "x", "y", "propagate_down: true propagate_down: true"), "propagate_down"),
        (source() + layer("ReLU", "x", "y", "loss_weight: 1 loss_weight: 2"), "loss_weight"),
        (
            source() + layer("Convolution", "x", "y", "convolution_param { num_output: 2 kernel_size: 9 }"),
            "expected bottoms that it can work on, got (2, 3, 4, 5). PyTorch: ",
        ),
        (
            source() + layer("InnerProduct", "x", "y", "inner_product_param { num_output: 2000000000 }"),
            "a blob of at most 2147483647 entries",
        ),
        (
            source()
            + layer(
                "Convolution",
                "x",
                "y",
                'convolution_param { num_output: 2 kernel_size: 1 weight_filler { type: "he" } }',
            ),
            "expected a filler out of constant, uniform,",
        ),
        (
            source() + layer("Python", "x", "y", 'python_param { module: "os" layer: "system" }'),
            "expected a Python layer AttentionLoss or Normalize, got os.system.",
        ),
        (source() + layer("Reshape", "x", "y", "reshape_param { shape { dim: 0 dim: 7 } }"), "(2, 7)"),
        (layer("Input", "", "x"), "Declare them by"),
    ],
)
def test_a_net_that_cannot_be_built_says_why_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^Net: layer ") as error:
        net_of(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_inputs_are_checked() -> None:
    net = net_of(source())
    with pytest.raises(ValueError, match="got none for x"):
        net({})
    with pytest.raises(ValueError, match="got y"):
        net({"x": torch.zeros(2, 3, 4, 5), "y": torch.zeros(1)})
    with pytest.raises(ValueError, match="expected a forward pass before"):
        _ = net_of(source()).loss
    with pytest.raises(ValueError, match="phase TRAIN or TEST, got 'train'"):
        net_of(source(), "train")


def test_a_label_out_of_range_is_named() -> None:
    net = net_of(source("x", 2, 3) + source("label", 2) + layer("SoftmaxWithLoss", "x label", "loss"))
    with pytest.raises(ValueError, match="expected labels from 0 to 2, got 0 to 3"):
        net({"x": torch.zeros(2, 3), "label": torch.tensor([0.0, 3.0])})


def test_shared_statistics_stay_shared_in_another_precision() -> None:
    text = source("x0") + source("x1") + layer("BatchNorm", "x0", "y0") + layer("BatchNorm", "x1", "y1")
    spec = parse_net(text)
    for one in spec.layer[2:]:  # three specs in a prototxt are dropped on reading
        one.param.extend(ParamSpec(name=name, lr_mult=0) for name in "abc")
    net = Net(spec, phase="TRAIN").double()
    net({name: torch.randn(2, 3, 4, 5) for name in ("x0", "x1")})
    assert net.params["y0"][2] is net.params["y1"][2]
    assert float(net.params["y0"][2]) == pytest.approx(1.999)


def test_a_constant_power_sends_back_nothing() -> None:
    net = net_of(source() + layer("Power", "x", "y", "loss_weight: 1 power_param { power: 0 }"))
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    assert torch.equal(net({"x": x})["y"], torch.ones(2, 3, 4, 5))
    net.loss.backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


# ---------------------------------------------------------------------------------------- pooling by hand


def pooled_by_hand(x: np.ndarray, k: list[int], s: list[int], p: list[int], largest: bool) -> np.ndarray:
    """Caffe's windows one by one, over an array (h, w)."""
    counts = []
    for size, kernel, stride, pad in zip(x.shape, k, s, p, strict=True):
        count = -(-(size + 2 * pad - kernel) // stride) + 1
        counts.append(count - 1 if (any(p) and (count - 1) * stride >= size + pad) else count)
    result = np.empty(counts)
    for i in range(counts[0]):
        for j in range(counts[1]):
            start = [i * s[0] - p[0], j * s[1] - p[1]]
            end = [min(start[a] + k[a], x.shape[a] + p[a]) for a in (0, 1)]
            area = (end[0] - start[0]) * (end[1] - start[1])
            rows, columns = (slice(max(start[a], 0), min(end[a], x.shape[a])) for a in (0, 1))
            inside = x[rows, columns]
            result[i, j] = inside.max(initial=np.finfo(np.float32).min) if largest else inside.sum() / area
    return result


@pytest.mark.parametrize("seed", range(40))
def test_pooling_has_caffes_windows(seed: int) -> None:
    chance = np.random.default_rng(seed)
    k, hw = chance.integers(1, 5, 2).tolist(), chance.integers(4, 9, 2).tolist()
    s, p = [chance.integers(1, 4).item() for _ in k], [chance.integers(0, size).item() for size in k]
    x = chance.normal(size=hw)
    for kind in ("MAX", "AVE"):
        with np.errstate(all="ignore"):
            want = pooled_by_hand(x, k, s, p, kind == "MAX")
        assume = np.isfinite(want).all()  # a mean over nothing is no number
        param = " ".join(
            f"{name}_h: {value[0]} {name}_w: {value[1]}"
            for name, value in (("kernel", k), ("stride", s), ("pad", p))
        )
        text = source("x", 1, 1, *hw) + layer(
            "Pooling", "x", "y", f"pooling_param {{ pool: {kind} {param} }}"
        )
        if min(want.shape) > 0 and assume:
            got = net_of(text).double()({"x": torch.from_numpy(x)[None, None]})["y"]
            np.testing.assert_allclose(got[0, 0].numpy(), want, rtol=1e-12)
