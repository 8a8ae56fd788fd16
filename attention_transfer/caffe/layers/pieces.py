"""What torch has no module for: layers compute by it, and `convert` copies it into a converted net.

So it knows nothing but torch, and fits into 88 columns.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Scale(nn.Module):
    """x * weight + bias, with `trailing` axes of x behind those of the weight."""

    def __init__(self, *shape: int, trailing: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None
        self.spread = [*shape, *[1] * trailing]

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * self.weight.reshape(self.spread)
        return scaled if self.bias is None else scaled + self.bias.reshape(self.spread)


class Bias(nn.Module):
    """x + bias, with `trailing` axes of x behind those of the bias."""

    def __init__(self, *shape: int, trailing: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(shape))
        self.spread = [*shape, *[1] * trailing]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.reshape(self.spread)


class Normalize(nn.Module):
    """x / sqrt(sum of squares over `axes` + eps), times a scale for each channel or all."""

    def __init__(self, *shape: int, axes: tuple[int, ...], eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))
        self.axes, self.eps = axes, eps

    def forward(self, x: Tensor) -> Tensor:
        norm = (x.square().sum(self.axes, keepdim=True) + self.eps).sqrt()
        return x / norm * self.scale.reshape(-1, *[1] * (x.dim() - 2))


class Learned(nn.Module):
    """Values that are learned, and nothing else."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(shape))

    def forward(self) -> Tensor:
        return self.value


class TransposedLinear(nn.Module):
    """x @ weight + bias, with weights (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


def raise_to(x: Tensor, power: float, scale: float, shift: float) -> Tensor:
    """(shift + scale * x) ^ power."""
    base = x * scale + shift
    return base if power == 1 else base.square() if power == 2 else base**power


def exponential(x: Tensor, scale: float, factor: float) -> Tensor:
    """factor * e ^ (scale * x)."""
    return torch.exp(x * scale) * factor


def logarithm(x: Tensor, scale: float, shift: float, factor: float) -> Tensor:
    """factor * log(shift + scale * x)."""
    return torch.log(x * scale + shift) * factor


def zoomed(x: Tensor, shrink: int, zoom: int) -> Tensor:
    """Every `shrink`-th place, then `zoom` - 1 places between any two, bilinearly."""
    size = [(n - 1) // shrink * zoom + 1 for n in x.shape[2:]]
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def above(x: Tensor, threshold: float) -> Tensor:
    """1 where x is above the threshold, else 0."""
    return (x > threshold).to(x.dtype)


def respond_within(x: Tensor, size: int, alpha: float, beta: float) -> Tensor:
    """Local response normalisation within each channel."""
    mean = F.avg_pool2d(x * x, size, 1, size // 2)
    return x * (1 + alpha * mean) ** -beta


def centred(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """x less its mean over `axes`."""
    return x - x.mean(axes, keepdim=True)


def standardised(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """x less its mean over `axes`, by its deviation + eps."""
    rest = x - x.mean(axes, keepdim=True)
    return rest / (rest.square().mean(axes, keepdim=True).sqrt() + eps)


def unit(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(sum of squares + eps) over each sample."""
    axes = tuple(range(1, x.dim()))
    return x / (x.square().sum(axes, keepdim=True) + eps).sqrt()


def arg_max(x: Tensor, k: int, axis: int, values: bool) -> Tensor:
    """Places of the k largest along an axis, or values; of equals, the higher place."""
    rest, places, found = x.flip(axis), [], []
    for _ in range(k):
        place = rest.argmax(axis, keepdim=True)
        places.append(x.shape[axis] - 1 - place)
        found.append(rest.gather(axis, place))
        rest = rest.scatter(axis, place, -math.inf)
    return torch.cat(found, axis) if values else torch.cat(places, axis).to(x.dtype)


def arg_max_of_sample(x: Tensor, k: int, values: bool) -> Tensor:
    """Places of the k largest of each sample, (b, 1, k, ...); with values, both."""
    vectors = x.flatten(1)[:, None]
    found = [arg_max(vectors, k, 2, kind) for kind in (False, True)[: 1 + values]]
    both = torch.cat(found, 1)
    return both.reshape(*both.shape, *[1] * (x.dim() - 3))


def count_windows(size: int, kernel: int, stride: int, pad: int, drop: bool) -> int:
    """Windows along an axis: rounded up; `drop` the last where it begins in the padding."""
    count = math.ceil((size + 2 * pad - kernel) / stride) + 1
    return count - 1 if drop and (count - 1) * stride >= size + pad else count


def framed(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    pad: tuple[int, int],
    value: float,
) -> Tensor:
    """x with so much of `value` around it that exactly Caffe's windows fit."""
    behind = []
    for axis in (0, 1):
        size = x.shape[2 + axis]
        geometry = size, kernel[axis], stride[axis], pad[axis]
        last = (count_windows(*geometry, max(pad) > 0) - 1) * stride[axis]
        behind.append(last + kernel[axis] - pad[axis] - size)
    return F.pad(x, (pad[1], behind[1], pad[0], behind[0]), value=value)


def max_pool(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    pad: tuple[int, int],
) -> Tensor:
    """Max pooling over windows that may hang over the edge."""
    lowest = torch.finfo(torch.float32).min  # over nothing, in every precision
    return F.max_pool2d(framed(x, kernel, stride, pad, lowest), kernel, stride)


def max_pool_places(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    pad: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Max pooling, and the place of each largest value in its map."""
    around = framed(x, kernel, stride, pad, torch.finfo(torch.float32).min)
    values, places = F.max_pool2d(around, kernel, stride, return_indices=True)
    row = places // around.shape[3] - pad[0]
    column = places % around.shape[3] - pad[1]
    inside = (row >= 0) & (row < x.shape[2]) & (column >= 0) & (column < x.shape[3])
    return values, torch.where(inside, row * x.shape[3] + column, -1).to(x.dtype)


def mean_pool(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    pad: tuple[int, int],
) -> Tensor:
    """Mean pooling over windows that may hang over the edge; padding counts."""
    around = framed(x, kernel, stride, pad, 0.0)
    sums = F.avg_pool2d(around, kernel, stride) * (kernel[0] * kernel[1])
    extents = []
    for axis in (0, 1):
        start = torch.arange(sums.shape[2 + axis], device=x.device) * stride[axis]
        end = (start + kernel[axis]).clamp(max=x.shape[2 + axis] + 2 * pad[axis])
        extents.append((end - start).to(x.dtype))
    return sums / (extents[0][:, None] * extents[1])
