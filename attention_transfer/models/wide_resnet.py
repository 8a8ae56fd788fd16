"""Wide residual networks for small images (Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016)."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from attention_transfer._errors import InputError


class Block(nn.Module):
    """Pre-activation residual block, (b, c_in, h, w) -> (b, c_out, h/stride, w/stride), rounded up.

    Every ReLU is out of place: an in-place one on the block's input would overwrite the output of the
    block before, which is what attention transfer reads.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm2d(c_in)
        self.conv0 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv1 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.convdim = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else None

    def forward(self, x: Float[Tensor, "b c_in h w"]) -> Float[Tensor, "b c_out h2 w2"]:
        activated = F.relu(self.bn0(x))
        residual = self.conv1(F.relu(self.bn1(self.conv0(activated))))
        return residual + (x if self.convdim is None else self.convdim(activated))


class WideResNet(nn.Module):
    """A WRN-depth-width: three groups of (depth - 4) / 6 blocks, 16, 32 and 64 times `width` channels.

    The outputs of `group0`, `group1` and `group2` (strides 1, 2 and 4, before BatchNorm and ReLU) are what
    the authors transfer attention between; the module names are theirs too. Convolutions and the classifier
    start from a Kaiming normal (fan in) with zero bias, as in the authors' code; BatchNorm scales start at 1
    (theirs at uniform [0, 1), their library's default of the time).

    Images (b, in_channels, h, w), any h and w from 8 up -> logits (b, num_classes).

    Raises:
        ValueError: if depth is not 6n + 4 with n >= 1, or width is not positive.
    """

    def __init__(self, depth: int, width: int, *, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        check_depth_and_width(depth, width)
        blocks = (depth - 4) // 6
        widths = [16 * width, 32 * width, 64 * width]
        self.conv0 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.group0 = _group(16, widths[0], blocks, stride=1)
        self.group1 = _group(widths[0], widths[1], blocks, stride=2)
        self.group2 = _group(widths[1], widths[2], blocks, stride=2)
        self.bn = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], num_classes)
        initialise(self)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        features = self.group2(self.group1(self.group0(self.conv0(x))))
        return self.fc(F.relu(self.bn(features)).mean((2, 3)))


def check_depth_and_width(depth: int, width: int) -> None:
    """Raise ValueError unless (depth, width) names a wide residual network."""
    if depth < 10 or (depth - 4) % 6:
        below = max(10, depth - (depth - 4) % 6)
        raise InputError(
            f"WideResNet: expected a depth of 6n + 4 (10, 16, 22, 28, 34, 40, ...), got {depth}. "
            f"Try wrn-{below}-{width} or wrn-{below + 6}-{width}."
        )
    if width < 1:
        raise InputError(f"WideResNet: expected a width of 1 or more, got {width}. Try wrn-{depth}-1.")


def initialise(model: nn.Module) -> None:
    """Kaiming normal (fan in) weights and zero biases for every convolution and linear layer, in place."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _group(c_in: int, c_out: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = Block(c_in, c_out, stride)
    rest = [Block(c_out, c_out, 1) for _ in range(blocks - 1)]
    return nn.Sequential(OrderedDict((f"block{i}", block) for i, block in enumerate([first, *rest])))
