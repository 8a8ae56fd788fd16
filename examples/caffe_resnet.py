"""Write a ResNet for CIFAR-10 as Caffe's prototxt, with its solver.

    attention-transfer caffe lmdb --data cifar10 --split train --pad 4 -o cifar10_train.lmdb
    attention-transfer caffe lmdb --data cifar10 --split test --pad 4 -o cifar10_test.lmdb
    python examples/caffe_resnet.py --depth 20 -o resnet20
    attention-transfer caffe train --solver resnet20_solver.prototxt

It is the net of He et al., "Deep Residual Learning for Image Recognition", section 4.2: 6 k + 2 layers in
three groups, whose outputs after the last ReLU are the blobs `group1`, `group2` and `group3`. Where a group
begins with other channels, the shortcut is a 1x1 convolution of stride 2 (for CIFAR they padded with zeros).

Caffe can crop but not pad. So the images are stored with a border of 4 pixels: 32x32 of 40x40 is the usual
random crop in training, and the middle is the image itself in tests.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attention_transfer.caffe import schema, write_prototxt

CROP = 32
MEAN = (113.86, 122.94, 125.28)  # blue, green, red: `caffe lmdb` prints them
SCALE = 1 / 64  # about one over the standard deviation
WIDTHS = (16, 32, 64)


def add(net: Any, kind: str, name: str, bottoms: Sequence[str], top: str, **parts: Any) -> str:
    """Append a layer; returns its top."""
    net.layer.add(name=name, type=kind, bottom=bottoms, top=[top], **parts)
    return top


def convolution(
    net: Any, name: str, bottom: str, channels: int, size: int, stride: int = 1, *, start: float = 1.0
) -> str:
    """A convolution without bias, then BatchNorm and Scale in place; the scales begin with `start`."""
    filler = {"type": "msra", "variance_norm": "FAN_OUT"}
    param = {"num_output": channels, "kernel_size": [size], "stride": [stride], "pad": [size // 2]}
    add(net, "Convolution", name, [bottom], name,
        convolution_param={**param, "bias_term": False, "weight_filler": filler})  # fmt: skip
    add(net, "BatchNorm", f"{name}_bn", [name], name, batch_norm_param={"moving_average_fraction": 0.95})
    scale = {"bias_term": True, "filler": {"value": start}}
    return add(net, "Scale", f"{name}_scale", [name], name, scale_param=scale)


def relu(net: Any, blob: str) -> str:
    return add(net, "ReLU", f"{blob}_relu", [blob], blob)


def block(net: Any, name: str, bottom: str, channels: int, stride: int, top: str, *, project: bool) -> str:
    """Two convolutions beside a shortcut.

    The second one's scales start at 0, so that every block begins as its shortcut (Goyal et al., 2017): 56
    layers do not learn at the full rate from the first iteration otherwise.
    """
    inner = relu(net, convolution(net, f"{name}_conv1", bottom, channels, 3, stride))
    branch = convolution(net, f"{name}_conv2", inner, channels, 3, start=0.0)
    shortcut = convolution(net, f"{name}_shortcut", bottom, channels, 1, stride) if project else bottom
    add(net, "Eltwise", top, [shortcut, branch], top, eltwise_param={"operation": "SUM"})
    return relu(net, top)


def data(net: Any, phase: str, source: str, batch: int) -> None:
    net.layer.add(
        name="data", type="Data", top=["data", "label"], include=[{"phase": phase}],
        transform_param={"crop_size": CROP, "mirror": phase == "TRAIN", "mean_value": MEAN, "scale": SCALE},
        data_param={"source": source, "batch_size": batch, "backend": "LMDB"},
    )  # fmt: skip


def resnet(depth: int, train: str, test: str, *, batch: int = 128, test_batch: int = 100) -> Any:
    """The net as a NetParameter; `train` and `test` are paths of LMDBs."""
    if depth < 8 or depth % 6 != 2:
        raise SystemExit(f"caffe_resnet: expected a depth of 6 k + 2 layers, got {depth}. Pass 20 or 56.")
    net = schema.NetParameter(name=f"resnet{depth}")
    data(net, "TRAIN", train, batch)
    data(net, "TEST", test, test_batch)
    blob = relu(net, convolution(net, "conv1", "data", WIDTHS[0], 3))
    blocks = (depth - 2) // 6
    for group, channels in enumerate(WIDTHS, 1):
        for number in range(1, blocks + 1):
            name = f"group{group}_block{number}"
            grows = group > 1 and number == 1
            top = f"group{group}" if number == blocks else name
            blob = block(net, name, blob, channels, 2 if grows else 1, top, project=grows)
    add(net, "Pooling", "pool", [blob], "pool", pooling_param={"pool": "AVE", "global_pooling": True})
    filler = {"type": "gaussian", "std": 0.01}
    scores = {"num_output": 10, "weight_filler": filler}
    add(net, "InnerProduct", "fc", ["pool"], "fc", inner_product_param=scores)
    add(net, "SoftmaxWithLoss", "loss", ["fc", "label"], "loss")
    add(net, "Accuracy", "accuracy", ["fc", "label"], "accuracy", include=[{"phase": "TEST"}])
    return net


def solver(net: str, prefix: str, iterations: int, *, test_images: int, test_batch: int = 100) -> Any:
    """SGD as in the paper: the learning rate falls at a half and at three quarters."""
    return schema.SolverParameter(
        net=net, test_iter=[-(-test_images // test_batch)], test_interval=500,
        base_lr=0.1, lr_policy="multistep", gamma=0.1, stepvalue=[iterations // 2, 3 * iterations // 4],
        momentum=0.9, weight_decay=1e-4, max_iter=iterations, display=100, average_loss=100,
        snapshot=5000, snapshot_prefix=prefix, random_seed=1,
        test_initialization=False,  # BatchNorm has no statistics yet
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a ResNet for CIFAR-10 as prototxt, with its solver.")
    parser.add_argument("--depth", type=int, default=20, help="6 k + 2, such as 20 or 56")
    parser.add_argument("--train", default="cifar10_train.lmdb", help="LMDB of the training images")
    parser.add_argument("--test", default="cifar10_test.lmdb", help="LMDB of the test images")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=64000)
    parser.add_argument("--test-images", type=int, default=10000)
    parser.add_argument(
        "-o", "--output", default="resnet20", help="writes OUTPUT.prototxt, OUTPUT_solver.prototxt"
    )
    flags = parser.parse_args(arguments)
    net_file, solver_file = Path(f"{flags.output}.prototxt"), Path(f"{flags.output}_solver.prototxt")
    write_prototxt(resnet(flags.depth, flags.train, flags.test, batch=flags.batch), net_file)
    write_prototxt(
        solver(net_file.name, flags.output, flags.iterations, test_images=flags.test_images), solver_file
    )
    print(f"{net_file}\n{solver_file}")


if __name__ == "__main__":
    main()
