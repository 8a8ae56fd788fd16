"""Network in Network for small images (Lin, Chen & Yan, ICLR 2014), wide and thin."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .wide_resnet import initialise

WIDE = ((192, 160, 96), (192, 192, 192), (192, 192, 192))
"""Channels after each convolution: the authors' CIFAR network, 1.0M parameters (1,005,642 for 10 classes)."""

THIN = ((84, 70, 42), (84, 84, 84), (84, 84, 84))
"""WIDE times 7/16: 0.2M parameters (197,298 for 10 classes)."""


class NetworkInNetwork(nn.Module):
    """Three groups of one spatial convolution (5x5, 5x5, 3x3) and two 1x1 ones, each with BatchNorm and ReLU.

    Without BatchNorm, as in the paper's gradient-based experiments, convolutions have a bias instead.

    `group0`, `group1` and `group2` have strides 1, 2 and 4. Max pooling 3x3/2 follows the first group,
    average pooling 3x3/2 the second; a global average and a linear layer follow the third.

    The attention-transfer paper (section 4.1) gives only the sizes, NIN-wide 1M and NIN-thin 0.2M parameters.
    WIDE is the NIN of the same authors' wide-residual-networks repository (models/nin.lua), which has 1.0M.
    The thin definition was never published: THIN scales all of WIDE by 7/16, our choice, to reach 0.2M.

    Images (b, in_channels, h, w), any h and w from 8 up -> logits (b, num_classes).
    """

    def __init__(
        self,
        widths: tuple[tuple[int, int, int], ...] = WIDE,
        *,
        batchnorm: bool = True,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        first, second, third = widths
        self.group0 = _group(in_channels, first, 5, batchnorm)
        self.pool0 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.group1 = _group(first[-1], second, 5, batchnorm)
        self.pool1 = nn.AvgPool2d(3, 2, ceil_mode=True)
        self.group2 = _group(second[-1], third, 3, batchnorm)
        self.fc = nn.Linear(third[-1], num_classes)
        initialise(self)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        x = self.pool0(self.group0(x))
        x = self.pool1(self.group1(x))
        return self.fc(F.adaptive_avg_pool2d(self.group2(x), 1).flatten(1))


def _group(c_in: int, widths: tuple[int, int, int], kernel: int, batchnorm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for c_out, size in zip(widths, (kernel, 1, 1), strict=True):
        layers.append(nn.Conv2d(c_in, c_out, size, padding=size // 2, bias=not batchnorm))
        layers += [nn.BatchNorm2d(c_out), nn.ReLU()] if batchnorm else [nn.ReLU()]
        c_in = c_out
    return nn.Sequential(*layers)
