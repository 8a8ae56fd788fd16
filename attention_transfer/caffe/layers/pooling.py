"""Pooling, with Caffe's window that hangs over the edge."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_transfer.caffe.layers.base import Layer, register

LOWEST = torch.finfo(torch.float32).min  # the maximum over nothing, in every precision
MAX, AVE = 0, 1

Pair = tuple[int, int]


@register("Pooling")
class Pooling(Layer):
    """The largest or the mean value of each window; a second top holds the place of the largest.

    The number of windows is rounded up, and with padding along either axis a last one that would start beyond
    image and left padding is dropped. A mean divides by the window's area within image and padding.
    """

    tops_expected = (1, 2)
    allows_in_place = False

    def setup(self, x: Tensor) -> None:
        param = self.spec.pooling_param
        if x.dim() != 4:
            raise self.error("a bottom of four axes", f"the shape {tuple(x.shape)}")
        if param.pool not in (MAX, AVE):
            raise self.unsupported("pool MAX or AVE", "STOCHASTIC", "It cannot run here.")
        if len(self.tops) > 1 and param.pool != MAX:
            raise self.error("a second top for pool MAX only", "AVE")
        self.stride = _pair(self, param, "stride", "stride")
        self.pad = _pair(self, param, "pad", "pad")
        if not param.global_pooling:
            self.kernel = _pair(self, param, "kernel", "kernel_size")
        elif any(param.HasField(name) for name in ("kernel_size", "kernel_h", "kernel_w")) or any(self.pad):
            raise self.error("neither kernel nor pad beside global_pooling", "one")
        elif self.stride != (1, 1):
            raise self.error("a stride of 1 beside global_pooling", self.stride)
        if not param.global_pooling and any(p >= k for p, k in zip(self.pad, self.kernel, strict=True)):
            raise self.error("a pad smaller than the kernel", f"{self.pad} and {self.kernel}")

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        hw = (x.shape[2], x.shape[3])
        if self.spec.pooling_param.global_pooling:
            kernel, stride = hw, (1, 1)
        else:
            kernel, stride = self.kernel, self.stride
        axes = zip(hw, kernel, stride, self.pad, strict=True)
        sizes = [count_windows(*axis, clip=any(self.pad)) for axis in axes]
        if min(sizes) < 1:
            raise self.error("a kernel that fits into its bottom", f"{kernel} for {hw}")
        plain = all(_is_plain(*axis) for axis in zip(hw, kernel, stride, self.pad, sizes, strict=True))
        if self.spec.pooling_param.pool == AVE:
            return self._mean(x, kernel, stride, sizes, plain)
        if plain:
            if len(self.tops) == 1:
                return F.max_pool2d(x, kernel, stride, self.pad, ceil_mode=True)
            values, places = F.max_pool2d(x, kernel, stride, self.pad, ceil_mode=True, return_indices=True)
            return values, places.to(x.dtype)
        return self._largest(x, kernel, stride, sizes)

    def _mean(self, x: Tensor, kernel: Pair, stride: Pair, sizes: list[int], plain: bool) -> Tensor:
        if self.spec.pooling_param.global_pooling:
            return x.mean((2, 3), keepdim=True)
        if plain:
            return F.avg_pool2d(x, kernel, stride, self.pad, ceil_mode=True)
        sums = F.avg_pool2d(self._framed(x, kernel, stride, sizes, 0.0), kernel, stride, divisor_override=1)
        areas = [self._extents(x, axis, kernel, stride, sizes) for axis in (0, 1)]
        return sums / (areas[0][:, None] * areas[1])

    def _largest(
        self, x: Tensor, kernel: Pair, stride: Pair, sizes: list[int]
    ) -> Tensor | tuple[Tensor, ...]:
        framed = self._framed(x, kernel, stride, sizes, LOWEST)
        values, places = F.max_pool2d(framed, kernel, stride, return_indices=True)
        if len(self.tops) == 1:
            return values
        row, column = places // framed.shape[3] - self.pad[0], places % framed.shape[3] - self.pad[1]
        inside = (row >= 0) & (row < x.shape[2]) & (column >= 0) & (column < x.shape[3])
        return values, torch.where(inside, row * x.shape[3] + column, -1).to(x.dtype)

    def _framed(self, x: Tensor, kernel: Pair, stride: Pair, sizes: list[int], value: float) -> Tensor:
        """`x` with so much around it that exactly the wanted windows fit; cut where none reaches."""
        needed = [(n - 1) * s + k for n, s, k in zip(sizes, stride, kernel, strict=True)]
        behind = [need - pad - size for need, pad, size in zip(needed, self.pad, x.shape[2:], strict=True)]
        return F.pad(x, (self.pad[1], behind[1], self.pad[0], behind[0]), value=value)

    def _extents(self, x: Tensor, axis: int, kernel: Pair, stride: Pair, sizes: list[int]) -> Tensor:
        start = torch.arange(sizes[axis], device=x.device) * stride[axis] - self.pad[axis]
        end = (start + kernel[axis]).clamp(max=x.shape[2 + axis] + self.pad[axis])
        return (end - start).to(x.dtype)


def count_windows(size: int, kernel: int, stride: int, pad: int, *, clip: bool) -> int:
    """How many windows there are along an axis; with `clip`, none that begins in the padding behind."""
    count = math.ceil((size + 2 * pad - kernel) / stride) + 1
    return count - 1 if clip and (count - 1) * stride >= size + pad else count


def _is_plain(size: int, kernel: int, stride: int, pad: int, count: int) -> bool:
    """Whether torch's own ceil_mode, which always drops such a window, makes the same ones."""
    return (
        2 * pad <= kernel
        and count == count_windows(size, kernel, stride, pad, clip=True)
        and size + 2 * pad >= kernel
    )


def _pair(layer: Layer, param: Any, name: str, square: str) -> Pair:
    """(h, w) of a size: from the one field, or from both of NAME_h and NAME_w."""
    h, w = f"{name}_h", f"{name}_w"
    given = param.HasField(h) + param.HasField(w)
    if param.HasField(square) and given > (name == "kernel"):  # of a kernel, one is overlooked
        raise layer.error(f"either {square}, or {h} and {w}", "both")
    if given == 1 and not param.HasField(square):
        raise layer.error(f"{h} and {w}, or {square}", "one of the two")
    values = (getattr(param, h), getattr(param, w)) if given == 2 else (getattr(param, square),) * 2
    if name != "pad" and min(values) < 1:
        raise layer.error(f"a {name} of 1 or more", values)
    return values
