"""Sums, products and reductions of blobs, and Scale and Bias."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor

from attention_transfer.caffe import schema
from attention_transfer.caffe.layers.base import Layer, register

PROD, SUM, MAX = 0, 1, 2


@register("Eltwise")
class Eltwise(Layer):
    """The sum (with a coefficient for each bottom), the product, or the largest of several bottoms.

    Of equal values, a later bottom than the second wins only if it is greater than all before it; between the
    first two, the second wins.
    """

    bottoms_expected = (2, None)
    allows_in_place = False

    def setup(self, *bottoms: Tensor) -> None:
        param = self.spec.eltwise_param
        if len({tuple(x.shape) for x in bottoms}) > 1:
            raise self.error("bottoms of one shape", [tuple(x.shape) for x in bottoms])
        if len(param.coeff) not in (0, len(bottoms)):
            raise self.error("no coeff, or one for each bottom", f"{len(param.coeff)}")
        if param.coeff and param.operation != SUM:
            raise self.error("coeff for the operation SUM only", "another")

    def forward(self, *bottoms: Tensor) -> Tensor:
        param = self.spec.eltwise_param
        if param.operation == SUM:
            coefficients = list(param.coeff) or [1.0] * len(bottoms)
            terms = [x * c if c != 1 else x for x, c in zip(bottoms, coefficients, strict=True)]
            return functools.reduce(operator.add, terms)
        if param.operation == PROD:
            if param.stable_prod_grad:
                return functools.reduce(operator.mul, bottoms)
            return _UnstableProduct.apply(*bottoms)
        largest = torch.where(bottoms[0] > bottoms[1], bottoms[0], bottoms[1])
        for x in bottoms[2:]:
            largest = torch.where(x > largest, x, largest)
        return largest


class _UnstableProduct(torch.autograd.Function):
    """The product, with the gradient g y / x: not a number where a factor is 0."""

    @staticmethod
    def forward(ctx: Any, *factors: Tensor) -> Tensor:
        product = functools.reduce(operator.mul, factors)
        ctx.save_for_backward(product, *factors)
        return product

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        product, *factors = ctx.saved_tensors
        return tuple(g * product / factor for factor in factors)


@register("Reduction")
class Reduction(Layer):
    """The sum, of absolute values, of squares, or the mean, over all axes from `axis` on, times coeff."""

    allows_in_place = False

    def forward(self, x: Tensor) -> Tensor:
        param = self.spec.reduction_param
        vectors = x.flatten(self.axis(param.axis, x)) if x.dim() else x.reshape(1)
        reduced = {
            param.SUM: lambda: vectors.sum(-1),
            param.ASUM: lambda: vectors.abs().sum(-1),
            param.SUMSQ: lambda: vectors.square().sum(-1),
            param.MEAN: lambda: vectors.mean(-1),
        }[param.operation]()
        return reduced * param.coeff if param.coeff != 1 else reduced


class _Broadcast(Layer):
    """What Scale and Bias share: a second factor or term, a bottom or a blob, from `axis` on."""

    bottoms_expected = (1, 2)
    first_axis: int

    def _first_axis(self, x: Tensor, second: Tensor | None, param: Any) -> int:
        if second is not None and second.dim() == 0:
            return 0
        first = self.axis(param.axis, x)
        if second is not None and tuple(x.shape[first : first + second.dim()]) != tuple(second.shape):
            expected = f"a second bottom like the axes from {first} on of {tuple(x.shape)}"
            raise self.error(expected, tuple(second.shape))
        return first

    def _blob_shape(self, x: Tensor, param: Any) -> tuple[int, ...]:
        if param.num_axes == 0:
            return ()
        first = self.axis(param.axis, x)
        last = x.dim() if param.num_axes == -1 else first + param.num_axes
        if param.num_axes < -1 or last > x.dim():
            raise self.error(f"num_axes of -1, or up to the last of {x.dim()} axes", param.num_axes)
        return tuple(x.shape[first:last])

    def _spread(self, second: Tensor, x: Tensor) -> Tensor:
        """`second` with axes of 1 behind it, so that it broadcasts over `x`."""
        return second.reshape(*second.shape, *[1] * (x.dim() - self.first_axis - second.dim()))


@register("Scale")
class Scale(_Broadcast):
    """The bottom times a factor, the second bottom or a blob, plus a bias with bias_term."""

    weight: Tensor
    bias: Tensor

    def setup(self, x: Tensor, factor: Tensor | None = None) -> None:
        param = self.spec.scale_param
        self.first_axis = self._first_axis(x, factor, param)
        shape = tuple(factor.shape) if factor is not None else self._blob_shape(x, param)
        if factor is None:
            filler = param.filler if param.HasField("filler") else schema.FillerParameter(value=1.0)
            self.add_blob("weight", shape, filler)
        if param.bias_term:
            self.add_blob("bias", shape, param.bias_filler)

    @classmethod
    def count_blobs(cls, spec: Any) -> int:
        return (len(spec.bottom) == 1) + spec.scale_param.bias_term

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        scaled = x * self._spread(self.weight if factor is None else factor, x)
        return scaled + self._spread(self.bias, x) if self.spec.scale_param.bias_term else scaled


@register("Bias")
class Bias(_Broadcast):
    """The bottom plus the second bottom or a blob."""

    bias: Tensor

    def setup(self, x: Tensor, term: Tensor | None = None) -> None:
        param = self.spec.bias_param
        self.first_axis = self._first_axis(x, term, param)
        if term is None:
            self.add_blob("bias", self._blob_shape(x, param), param.filler)

    @classmethod
    def count_blobs(cls, spec: Any) -> int:
        return int(len(spec.bottom) == 1)

    def forward(self, x: Tensor, term: Tensor | None = None) -> Tensor:
        return x + self._spread(self.bias if term is None else term, x)
