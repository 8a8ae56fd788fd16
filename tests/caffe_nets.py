"""Small nets in the manner of published ones, as prototxt, with weights and statistics drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attention_transfer.caffe import Net
from attention_transfer.caffe.files.caffemodel import write_binary


class Text:
    """A prototxt that grows layer by layer; each call gives the name of its top."""

    def __init__(self, name: str, *shape: int, data: str = "data") -> None:
        dims = " ".join(f"dim: {size}" for size in shape)
        self.text = f'name: "{name}"\n'
        self.top = data
        self.text += (
            f'layer {{ name: "{data}" type: "Input" top: "{data}" input_param {{ shape {{ {dims} }} }} }}\n'
        )

    def add(self, kind: str, name: str, settings: str = "", *bottoms: str, top: str = "") -> str:
        bottoms = bottoms or (self.top,)
        below = " ".join(f'bottom: "{bottom}"' for bottom in bottoms)
        self.top = top or name
        self.text += f'layer {{ name: "{name}" type: "{kind}" {below} top: "{self.top}" {settings} }}\n'
        return self.top

    def conv(self, name: str, outputs: int, kernel: int, bottom: str = "", **settings: Any) -> str:
        extra = " ".join(f"{key}: {value}" for key, value in settings.items())
        param = f"num_output: {outputs} kernel_size: {kernel} {extra} "
        fill = 'weight_filler { type: "msra" } bias_filler { type: "gaussian" std: 0.1 }'
        return self.add("Convolution", name, f"convolution_param {{ {param} {fill} }}", bottom or self.top)

    def dense(self, name: str, outputs: int) -> str:
        fill = 'weight_filler { type: "xavier" } bias_filler { type: "gaussian" std: 0.1 }'
        return self.add("InnerProduct", name, f"inner_product_param {{ num_output: {outputs} {fill} }}")

    def over(self, kind: str, name: str, settings: str = "") -> str:
        """A layer in place."""
        return self.add(kind, name, settings, top=self.top)

    def pool(self, name: str, settings: str, bottom: str = "") -> str:
        return self.add("Pooling", name, f"pooling_param {{ {settings} }}", bottom or self.top)

    def norm(self, name: str) -> str:
        self.over("BatchNorm", f"bn_{name}", "batch_norm_param { eps: 1e-4 }")
        return self.over("Scale", f"scale_{name}", "scale_param { bias_term: true }")


def alexnet() -> Text:
    net = Text("AlexNet", 2, 3, 67, 67)
    net.conv("conv1", 8, 11, stride=4)
    net.over("ReLU", "relu1")
    net.add("LRN", "norm1", "lrn_param { local_size: 5 alpha: 0.1 beta: 0.75 }")
    net.pool("pool1", "pool: MAX kernel_size: 3 stride: 2")
    net.conv("conv2", 12, 5, pad=2, group=2)
    net.over("ReLU", "relu2")
    net.add("LRN", "norm2", "lrn_param { local_size: 3 alpha: 0.5 beta: 0.75 norm_region: WITHIN_CHANNEL }")
    net.pool("pool2", "pool: MAX kernel_size: 3 stride: 2")
    net.conv("conv3", 8, 3, pad=1)
    net.over("ReLU", "relu3")
    net.dense("fc6", 16)
    net.over("ReLU", "relu6")
    net.over("Dropout", "drop6", "dropout_param { dropout_ratio: 0.5 }")
    net.dense("fc8", 10)
    net.add("Softmax", "prob")
    return net


def inception() -> Text:
    net = Text("GoogLe.Net-block", 2, 3, 30, 30)
    net.conv("conv1/7x7_s2", 8, 7, stride=2, pad=3)
    net.over("ReLU", "conv1/relu_7x7")
    below = net.pool("pool1/3x3_s2", "pool: MAX kernel_size: 3 stride: 2")
    ends = [net.conv("inception_3a/1x1", 4, 1, below)]
    net.over("ReLU", "inception_3a/relu_1x1")
    for size, reduced, outputs in ((3, 4, 6), (5, 2, 3)):
        net.conv(f"inception_3a/{size}x{size}_reduce", reduced, 1, below)
        net.over("ReLU", f"inception_3a/relu_{size}x{size}_reduce")
        ends.append(net.conv(f"inception_3a/{size}x{size}", outputs, size, pad=size // 2))
        net.over("ReLU", f"inception_3a/relu_{size}x{size}")
    net.pool("inception_3a/pool", "pool: MAX kernel_size: 3 stride: 1 pad: 1", below)
    ends.append(net.conv("inception_3a/pool_proj", 3, 1))
    net.over("ReLU", "inception_3a/relu_pool_proj")
    net.add("Concat", "inception_3a/output", "", *ends)
    net.pool("pool5/7x7_s1", "pool: AVE kernel_size: 3 stride: 2")
    net.dense("loss3/classifier", 7)
    net.add("Softmax", "prob")
    return net


def squeezenet() -> Text:
    net = Text("squeeze", 2, 3, 36, 36)
    net.conv("conv1", 8, 3, stride=2)
    net.over("ReLU", "relu_conv1")
    net.pool("pool1", "pool: MAX kernel_size: 3 stride: 2")
    for number in (2, 3):
        below = net.conv(f"fire{number}/squeeze1x1", 4, 1)
        net.over("ReLU", f"fire{number}/relu_squeeze1x1")
        left = net.conv(f"fire{number}/expand1x1", 6, 1, below)
        net.over("ReLU", f"fire{number}/relu_expand1x1")
        right = net.conv(f"fire{number}/expand3x3", 6, 3, below, pad=1)
        net.over("ReLU", f"fire{number}/relu_expand3x3")
        net.add("Concat", f"fire{number}/concat", "", left, right)
        if number == 2:
            net.pool("pool2", "pool: MAX kernel_size: 3 stride: 2")
    net.over("Dropout", "drop9")
    net.conv("conv10", 5, 1, pad=1)
    net.over("ReLU", "relu_conv10")
    net.pool("pool10", "pool: AVE global_pooling: true")
    net.add("Softmax", "prob")
    return net


def resnet() -> Text:
    net = Text("ResNet-8", 2, 3, 16, 16)
    net.conv("conv1", 8, 3, pad=1, bias_term="false")
    net.norm("conv1")
    below = net.over("ReLU", "conv1_relu")
    for number, (outputs, stride) in enumerate(((8, 1), (12, 2)), start=2):
        short = below
        if outputs != 8:
            short = net.conv(f"res{number}a_branch1", outputs, 1, below, stride=stride, bias_term="false")
            net.norm(f"{number}a_branch1")
        net.conv(f"res{number}a_branch2a", outputs, 3, below, pad=1, stride=stride, bias_term="false")
        net.norm(f"{number}a_branch2a")
        net.over("ReLU", f"res{number}a_branch2a_relu")
        long = net.conv(f"res{number}a_branch2b", outputs, 3, pad=1, bias_term="false")
        net.norm(f"{number}a_branch2b")
        net.add("Eltwise", f"res{number}a", "", short, long)
        below = net.over("ReLU", f"res{number}a_relu")
    net.pool("pool5", "pool: AVE global_pooling: true")
    net.dense("fc", 10)
    return net


def mobilenet() -> Text:
    net = Text("MOBILENET", 2, 3, 17, 17)
    net.conv("conv1", 8, 3, pad=1, stride=2, bias_term="false")
    net.norm("conv1")
    net.over("ReLU", "relu1")
    for number, stride in ((2, 1), (3, 2)):
        net.conv(f"conv{number}/dw", 8, 3, pad=1, stride=stride, group=8, bias_term="false")
        net.norm(f"conv{number}/dw")
        net.over("ReLU", f"relu{number}/dw")
        net.conv(f"conv{number}/sep", 8, 1, bias_term="false")
        net.norm(f"conv{number}/sep")
        net.over("PReLU", f"relu{number}/sep")
    net.pool("pool6", "pool: AVE global_pooling: true")
    net.conv("fc7", 6, 1)
    net.add("Softmax", "prob")
    return net


def vgg() -> Text:
    net = Text("VGG", 2, 3, 21, 21)
    for stage, outputs in ((1, 4), (2, 8)):
        for number in (1, 2):
            net.conv(f"conv{stage}_{number}", outputs, 3, pad=1)
            net.over("ReLU", f"relu{stage}_{number}")
        net.pool(f"pool{stage}", "pool: MAX kernel_size: 2 stride: 2")
    for name in ("fc6", "fc7"):
        net.dense(name, 16)
        net.over("ReLU", f"relu_{name}")
        net.over("Dropout", f"drop_{name}")
    net.dense("fc8", 5)
    net.add("Softmax", "prob")
    return net


NETS: dict[str, Callable[[], Text]] = {
    make.__name__: make for make in (alexnet, inception, squeezenet, resnet, mobilenet, vgg)
}


def randomise(net: Net) -> Net:
    """Draw statistics, factors and slopes, which fillers make all alike."""
    for layer in net.layers:
        for index, blob in enumerate(layer.blobs):
            if layer.type == "BatchNorm":
                layer.put_blob(
                    index, torch.tensor([8.0]) if index == 2 else torch.rand(blob.shape) * 4 + index
                )
            elif layer.type in ("Scale", "PReLU"):
                layer.put_blob(index, torch.rand(blob.shape) + 0.5 - index)
    return net


def written(net: Text, folder: Path, *, double: bool = False) -> tuple[Path, Path, Net]:
    """The net's prototxt and caffemodel in `folder`, and the net."""
    folder.mkdir(parents=True, exist_ok=True)
    prototxt, weights = folder / "net.prototxt", folder / "net.caffemodel"
    prototxt.write_text(net.text)
    loaded = randomise(Net(prototxt))
    write_binary((loaded.double() if double else loaded).to_caffemodel(), weights)
    return prototxt, weights, loaded
