"""Nets against OpenCV's dnn module, which reads the same prototxt and caffemodel with code of its own.

OpenCV computes in float32 and in another order, so a blob agrees if it is within 2e-6 of its largest entry
for each layer before it, 1e-5 at the least; what is measured is about a tenth of that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caffe_nets import NETS, Text, randomise, written
from torch import Tensor

from attention_transfer.caffe import Net, build, write_prototxt
from attention_transfer.caffe.files.caffemodel import write_binary
from attention_transfer.caffe.files.prototxt import parse_net

cv2 = pytest.importorskip("cv2")

ONES = """param { lr_mult: 0 decay_mult: 0 } convolution_param {
    num_output: 1 kernel_size: 1 bias_term: false weight_filler { type: "constant" value: 1 } }"""


def each_layer(net: Net, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each layer of a net gives, by the layer's name."""
    found: dict[str, Tensor] = {}

    def keep(layer: Any, _: Any, output: Tensor) -> None:
        found[layer.name] = output

    handles = [layer.register_forward_hook(keep) for layer in net.layers]
    with torch.no_grad():
        net(inputs)
    for handle in handles:
        handle.remove()
    return found


def in_opencv(prototxt: Path, weights: Path, inputs: dict[str, Tensor], names: list[str]) -> list[np.ndarray]:
    """What OpenCV gives for each of these layers."""
    net = cv2.dnn.readNetFromCaffe(str(prototxt), str(weights))
    net.enableFusion(False)  # so that each layer's output is there to be seen
    found = []
    for name in names:
        for blob, value in inputs.items():
            net.setInput(value.numpy(), blob)
        found.append(net.forward(name).copy())
    return found


def assert_agree(prototxt: Path, weights: Path, net: Net, inputs: dict[str, Tensor]) -> None:
    wanted = each_layer(net, inputs)
    got = in_opencv(prototxt, weights, inputs, list(wanted))
    for depth, (name, want) in enumerate(wanted.items()):
        mine = got[depth].reshape(want.shape)  # OpenCV drops or adds axes of 1
        worst = np.abs(mine - want.numpy()).max() / want.abs().max()
        assert worst < max(1e-5, 2e-6 * depth), f"{name}: off by {worst:.2g} of the largest"


@pytest.mark.parametrize("name", NETS)
def test_every_layer_of_a_whole_net(name: str, tmp_path: Path) -> None:
    prototxt, weights, net = written(NETS[name](), tmp_path)
    assert_agree(prototxt, weights, net, {"data": torch.randn(net.inputs["data"])})


def attention_branch(p: int, *, flat: bool, settings: str) -> Text:
    net = Text("attention", 2, 5, 6, 4)
    net.conv("conv1", 7, 3, pad=1)
    if flat:
        net.add("Reshape", "flat", "reshape_param { shape { dim: 0 dim: 0 dim: -1 dim: 1 } }")
    net.add("AbsVal", "abs")
    for number in range({1: 0, 2: 1, 4: 2}[p]):
        net.add("Power", f"pow{number}", "power_param { power: 2 }")
    net.add("Convolution", "map", ONES)
    net.add("Normalize", "norm", f"norm_param {{ {settings} }}")
    return net


@pytest.mark.parametrize("across", ["true", "false"])
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "maps"])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_attention_branch(p: int, flat: bool, across: str, tmp_path: Path) -> None:
    settings = f"across_spatial: {across} channel_shared: false eps: 1e-10"
    prototxt, weights, net = written(attention_branch(p, flat=flat, settings=settings), tmp_path)
    assert_agree(prototxt, weights, net, {"data": torch.randn(net.inputs["data"])})


def write_for_opencv(stored: Any, weights: Path) -> None:
    """OpenCV cannot read a blob without axes, as Caffe writes a shared scale; as four axes of 1 both can."""
    for layer in stored.layer:
        for blob in layer.blobs:
            if not blob.shape.dim:
                blob.ClearField("shape")
                blob.num = blob.channels = blob.height = blob.width = 1
    write_binary(stored, weights)


def test_attention_branch_with_one_scale_for_all_channels(tmp_path: Path) -> None:
    text = attention_branch(2, flat=True, settings="across_spatial: true channel_shared: true eps: 1e-10")
    prototxt, weights, net = written(text, tmp_path)
    net.layers[-1].put_blob(0, torch.tensor(1.5))
    write_for_opencv(net.to_caffemodel(), weights)
    net.load(weights)
    assert net.params["norm"][0] == 1.5
    assert_agree(prototxt, weights, net, {"data": torch.randn(net.inputs["data"])})


@pytest.mark.parametrize("pairs", ["res2a:res2a,res3a:res3a", "res2a:res3a", "conv1:res2a"])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_built_net(p: int, pairs: str, tmp_path: Path) -> None:
    """All that `caffe build` adds but losses, which OpenCV has not; its branches moved to the phase TEST."""
    student, teacher = (Net(parse_net(NETS["resnet"]().text)) for _ in range(2))
    stored = [randomise(net).to_caffemodel() for net in (student, teacher)]
    made = build(
        student.proto, teacher.proto, pairs=pairs, p=p, student_weights=stored[0], teacher_weights=stored[1]
    )
    for layer in made.net.layer:
        del layer.include[:]
    losses = ("SoftmaxWithLoss", "EuclideanLoss", "Accuracy")
    kept = [layer for layer in made.net.layer if layer.type not in losses and "label" not in layer.top]
    assert len(made.net.layer) - len(kept) == 2 + len(made.pairs)
    del made.net.layer[:]
    made.net.layer.extend(kept)
    write_prototxt(made.net, tmp_path / "net.prototxt")
    net = Net(made.net, made.weights)
    write_for_opencv(net.to_caffemodel(), tmp_path / "net.caffemodel")
    inputs = {"data": torch.randn(net.inputs["data"])}
    assert sum(layer.type == "Normalize" for layer in net.layers) == 2 * len(made.pairs)
    assert_agree(tmp_path / "net.prototxt", tmp_path / "net.caffemodel", net, inputs)


def test_normalize_over_the_channels_of_a_position_with_scales_as_in_ssd(tmp_path: Path) -> None:
    net = Text("ssd", 2, 6, 5, 7)
    fill = 'scale_filler { type: "constant" value: 20 }'
    net.add(
        "Normalize", "conv4_3_norm", f"norm_param {{ across_spatial: false channel_shared: false {fill} }}"
    )
    prototxt, weights, loaded = written(net, tmp_path)
    loaded.layers[1].put_blob(0, torch.rand(6) + 19)
    write_binary(loaded.to_caffemodel(), weights)
    assert_agree(prototxt, weights, loaded, {"data": torch.randn(2, 6, 5, 7)})


POOLS = {
    "max": "pool: MAX kernel_size: 3 stride: 2",
    "mean": "pool: AVE kernel_size: 3 stride: 2",
    "max_padded": "pool: MAX kernel_size: 3 stride: 2 pad: 1",
    "mean_padded": "pool: AVE kernel_size: 3 stride: 2 pad: 1",
    "max_uneven": "pool: MAX kernel_h: 2 kernel_w: 3 stride_h: 1 stride_w: 2",
}


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("kind", POOLS)
def test_pooling(kind: str, size: int, tmp_path: Path) -> None:
    net = Text("pool", 2, 3, size, size + 1)
    net.pool("pool", POOLS[kind])
    prototxt, weights, loaded = written(net, tmp_path)
    assert_agree(prototxt, weights, loaded, {"data": torch.randn(2, 3, size, size + 1)})


LAYERS = {
    "deconvolution": ("Deconvolution", "convolution_param { num_output: 4 kernel_size: 4 stride: 2 pad: 1 }"),
    "dilation": ("Convolution", "convolution_param { num_output: 4 kernel_size: 3 dilation: 2 pad: 2 }"),
    "elu": ("ELU", ""),
    "leaky": ("ReLU", "relu_param { negative_slope: 0.1 }"),
    "sigmoid": ("Sigmoid", ""),
    "tanh": ("TanH", ""),
    "bnll": ("BNLL", ""),
    "power": ("Power", "power_param { power: 2 scale: 0.5 shift: 3 }"),
    "permute": ("Permute", "permute_param { order: 0 order: 2 order: 3 order: 1 }"),
    "flatten": ("Flatten", "flatten_param { axis: 2 }"),
    "softmax": ("Softmax", ""),
    "mvn": ("MVN", ""),
    "lrn_across": ("LRN", "lrn_param { local_size: 3 alpha: 2.0 beta: 0.5 }"),
    "lrn_within": ("LRN", "lrn_param { local_size: 3 alpha: 2.0 beta: 0.5 norm_region: WITHIN_CHANNEL }"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layer(kind: str, tmp_path: Path) -> None:
    net = Text("one", 2, 4, 8, 6)
    net.add(LAYERS[kind][0], "layer", LAYERS[kind][1])
    prototxt, weights, loaded = written(net, tmp_path)
    for layer in loaded.layers:
        for index, blob in enumerate(layer.blobs):
            layer.put_blob(index, torch.randn(blob.shape))
    write_binary(loaded.to_caffemodel(), weights)
    assert_agree(prototxt, weights, loaded, {"data": torch.randn(2, 4, 8, 6)})


@pytest.mark.parametrize("operation", ["SUM", "PROD", "MAX", "SUM coeff: 0.5 coeff: -2"])
def test_two_bottoms(operation: str, tmp_path: Path) -> None:
    net = Text("two", 2, 3, 5, 5)
    left = net.conv("left", 4, 3, "data")
    right = net.conv("right", 4, 3, "data")
    net.add("Eltwise", "joined", f"eltwise_param {{ operation: {operation} }}", left, right)
    net.add("Concat", "both", "", "joined", left)
    prototxt, weights, loaded = written(net, tmp_path)
    assert_agree(prototxt, weights, loaded, {"data": torch.randn(2, 3, 5, 5)})
