"""Backward rules of Caffe that are not the derivative of the forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Slope(torch.autograd.Function):
    """`value`, whose gradient for `x` is `slope` times the one that arrives, or `slope` whatever arrives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor, whatever_arrives: bool) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.whatever_arrives = whatever_arrives
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope if ctx.whatever_arrives else gradient * slope, None, None, None


def with_slope(x: Tensor, value: Tensor, slope: Tensor, *, whatever_arrives: bool = False) -> Tensor:
    """`value`, a function of `x`, with a slope that is Caffe's own.

    With `whatever_arrives`, the slope itself is sent back: so do layers that overwrite, in place, the
    gradient that they are to multiply by.
    """
    return _Slope.apply(x, value.detach(), slope.detach(), whatever_arrives)
