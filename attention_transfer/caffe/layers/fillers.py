"""What a parameter starts from: Caffe's fillers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]


def fill(shape: Shape, filler: Any, error: Callable[..., ValueError]) -> Tensor:
    """A float64 tensor of this shape as a FillerParameter says, random ones from torch's generator.

    Args:
        error: makes the error of the layer that asks.

    Raises:
        ValueError: if the filler is unknown, or does not fit the shape.
    """
    check_filler(shape, filler, error)
    return FILLERS[filler.type](shape, filler)


def check_filler(shape: Shape, filler: Any, error: Callable[..., ValueError]) -> None:
    """Raises ValueError if a filler is unknown, or does not fit the shape."""
    if filler.type not in FILLERS:
        raise error(f"a filler out of {', '.join(FILLERS)}", repr(filler.type))
    if filler.type == "bilinear" and (len(shape) != 4 or shape[2] != shape[3]):
        raise error("a square kernel for the filler bilinear", f"the shape {shape}")


def _constant(shape: Shape, filler: Any) -> Tensor:
    return torch.full(shape, filler.value, dtype=torch.float64)


def _uniform(shape: Shape, filler: Any) -> Tensor:
    return _between(shape, filler.min, filler.max)


def _gaussian(shape: Shape, filler: Any) -> Tensor:
    values = _normal(shape, filler.std) + filler.mean
    if filler.sparse < 0:
        return values
    share = min(1.0, filler.sparse / shape[0])  # so many of a unit's inputs count, on average
    return values * torch.bernoulli(torch.full(shape, share, dtype=torch.float64))


def _positive_unitball(shape: Shape, filler: Any) -> Tensor:
    values = _between(shape, 0.0, 1.0)
    return values / values.flatten(1).sum(1).view(-1, *[1] * (len(shape) - 1))


def _xavier(shape: Shape, filler: Any) -> Tensor:
    bound = math.sqrt(3.0 / _fan(shape, filler))
    return _between(shape, -bound, bound)


def _msra(shape: Shape, filler: Any) -> Tensor:
    return _normal(shape, math.sqrt(2.0 / _fan(shape, filler)))


def _bilinear(shape: Shape, filler: Any) -> Tensor:
    size = shape[3]
    half = math.ceil(size / 2)
    centre = (size - 1) / (2.0 * half)
    row = 1 - (torch.arange(size, dtype=torch.float64) / half - centre).abs()
    return (row[:, None] * row).expand(shape).clone()


def _fan(shape: Shape, filler: Any) -> float:
    count = math.prod(shape)
    fan_in, fan_out = count / shape[0], count / (shape[1] if len(shape) > 1 else 1)
    return (fan_in, fan_out, (fan_in + fan_out) / 2)[filler.variance_norm]


# Random numbers are drawn as float32, so that a net starts alike whatever its precision.


def _between(shape: Shape, low: float, high: float) -> Tensor:
    return torch.empty(shape).uniform_(low, high).double()


def _normal(shape: Shape, std: float) -> Tensor:
    return torch.randn(shape).mul_(std).double()


FILLERS: dict[str, Callable[[Shape, Any], Tensor]] = {
    "constant": _constant,
    "uniform": _uniform,
    "gaussian": _gaussian,
    "positive_unitball": _positive_unitball,
    "xavier": _xavier,
    "msra": _msra,
    "bilinear": _bilinear,
}
