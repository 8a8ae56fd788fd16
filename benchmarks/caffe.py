"""Nets read from prototxt against the same nets written by hand, and the attention branch against its layers.

A CIFAR ResNet-20 of `examples/caffe_resnet.py` makes one training step as a `Net`, and as the nn.Modules that
anyone would write. Then it is built together with a ResNet-56 teacher, and the whole net makes a step with
the branches on the kernels, and layer by layer.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_transfer.caffe import Net, build, schema
from benchmarks.measuring import Run, Samples, Stopwatch, allocator, interleave, synchronise
from benchmarks.names import BY_HAND, LAYER_BY_LAYER, PROJECT
from benchmarks.rows import ROOT, Results, Row
from benchmarks.session import Session

WIDTHS = (16, 32, 64)
Step = Callable[[], object]


def run(results: Results, session: Session) -> None:
    """Rows for both comparisons."""
    if results.has(session.device, benchmark="caffe"):
        return
    batch, small, large = (8, 8, 14) if session.quick else (128, 20, 56)
    images = torch.randn(batch, 3, 32, 32, device=session.device)
    labels = torch.randint(0, 10, (batch,), device=session.device)
    net = Net(resnet(small, batch), phase="TRAIN").to(session.device)
    by_hand = ResNet(small).to(session.device)
    inputs = {"data": images, "label": labels}
    plain: dict[str, Step] = {
        PROJECT: lambda: _loss(net, inputs),
        BY_HAND: lambda: F.cross_entropy(by_hand(images), labels),
    }
    steps = {
        name: _step(loss, module) for (name, loss), module in zip(plain.items(), (net, by_hand), strict=True)
    }
    _compare(results, session, f"resnet{small}, batch {batch}", steps, BY_HAND)

    built = build(resnet(small, batch), resnet(large, batch)).net
    fast, slow = (Net(built, phase="TRAIN").to(session.device) for _ in range(2))
    for layer in slow.layers:  # who listens to a layer makes it run by itself
        if layer.type in ("Reshape", "AbsVal"):
            layer.register_forward_hook(lambda *_: None)
    steps = {
        PROJECT: _step(lambda: _loss(fast, inputs), fast),
        LAYER_BY_LAYER: _step(lambda: _loss(slow, inputs), slow),
    }
    name = f"resnet{small} with attention from resnet{large}, batch {batch}"
    _compare(results, session, name, steps, LAYER_BY_LAYER)


def _compare(results: Results, session: Session, shape: str, steps: dict[str, Run], against: str) -> None:
    samples: Samples = interleave(
        steps,
        session.device,
        seconds=10 * session.seconds,
        rounds=session.rounds,
        evict_bytes=session.evict_bytes,
        progress=lambda text: session.status(f"caffe: {shape}: {text}"),
    )
    common: dict[str, Any] = {"dtype": "float32", "layout": "nchw", "allocator": allocator(session.device)}
    rows = [Row("caffe", "step", name, shape, **common, **samples.figures("step", name)) for name in steps]
    ratio = samples.ratio("step", PROJECT, against)
    rows.append(Row("caffe", "step", PROJECT, shape, **common, **ratio))
    results.append(rows, session.device)
    session.say(f"caffe: {shape}: {ratio['ratio']:.3f} times {against}")


def _loss(net: Net, inputs: dict[str, Tensor]) -> Tensor:
    net(inputs)
    return net.loss


def _step(loss: Step, module: nn.Module) -> Run:
    """Forward, backward and an update, timed as one."""
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.01, momentum=0.9)

    def step(watch: Stopwatch) -> None:
        with watch("step"):
            optimizer.zero_grad()
            loss().backward()  # type: ignore[attr-defined]
            optimizer.step()
            synchronise(next(module.parameters()).device)

    return step


def resnet(depth: int, batch: int) -> Any:
    """The example's net, with Input layers in the place of its data."""
    example = runpy.run_path(str(ROOT / "examples" / "caffe_resnet.py"))
    net = example["resnet"](depth, "", "")
    for layer in [layer for layer in net.layer if layer.type in ("Data", "Accuracy")]:
        net.layer.remove(layer)
    layers = list(net.layer)
    del net.layer[:]
    for name, dims in (("data", (batch, 3, 32, 32)), ("label", (batch,))):
        layer = net.layer.add(name=name, type="Input", top=[name])
        layer.input_param.shape.add(dim=dims)
    net.layer.extend(layers)
    assert isinstance(net, schema.NetParameter)
    return net


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + y)


class ResNet(nn.Sequential):
    """The same net as anyone would write it."""

    def __init__(self, depth: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        before = 16
        for group, width in enumerate(WIDTHS):
            for number in range((depth - 2) // 6):
                layers.append(Block(before, width, 2 if group and not number else 1))
                before = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
