"""Backward rules of Caffe that are not the derivative of the forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class WithSlope(torch.autograd.Function):
    """`value`, whose gradient for `x` is `slope` times the gradient that arrives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone() if value is x else value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return gradient * slope, None, None


class WithGradient(torch.autograd.Function):
    """`value`, whose gradient for `x` is `gradient`, whatever arrives: so some in-place layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone() if value is x else value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0], None, None


def with_slope(x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """`value` with the gradient rule of `WithSlope`."""
    return WithSlope.apply(x, value.detach(), slope.detach())


def with_gradient(x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """`value` with the gradient rule of `WithGradient`."""
    return WithGradient.apply(x, value.detach(), gradient.detach())
