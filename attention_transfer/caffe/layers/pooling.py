"""Pooling, with Caffe's window that hangs over the edge."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from attention_transfer.caffe.layers.base import Layer, register
from attention_transfer.caffe.layers.pieces import count_windows, max_pool, max_pool_places, mean_pool

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
        hw, kernel, stride = (x.shape[2], x.shape[3]), (x.shape[2], x.shape[3]), (1, 1)
        everywhere = self.spec.pooling_param.global_pooling
        if not everywhere:
            kernel, stride = self.kernel, self.stride
        geometry = list(zip(hw, kernel, stride, self.pad, strict=True))
        counts = [count_windows(*axis, drop=any(self.pad)) for axis in geometry]
        if min(counts) < 1:
            raise self.error("a kernel that fits into its bottom", f"{kernel} for {hw}")
        window = kernel, stride, self.pad
        plain = all(_is_plain(*axis, count) for axis, count in zip(geometry, counts, strict=True))
        if self.spec.pooling_param.pool == AVE:
            if everywhere:
                return x.mean((2, 3), keepdim=True)
            return F.avg_pool2d(x, *window, ceil_mode=True) if plain else mean_pool(x, *window)
        if len(self.tops) == 1:
            return F.max_pool2d(x, *window, ceil_mode=True) if plain else max_pool(x, *window)
        if not plain:
            return max_pool_places(x, *window)
        values, places = F.max_pool2d(x, *window, ceil_mode=True, return_indices=True)
        return values, places.to(x.dtype)


def _is_plain(size: int, kernel: int, stride: int, pad: int, count: int) -> bool:
    """Whether torch's own ceil_mode, which always drops such a window, makes the same ones."""
    return (
        2 * pad <= kernel
        and count == count_windows(size, kernel, stride, pad, drop=True)
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
