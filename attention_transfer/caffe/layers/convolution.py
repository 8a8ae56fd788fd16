"""Convolution, Deconvolution and InnerProduct."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from attention_transfer.caffe.layers.base import Layer, register


class _Window(Layer):
    """What both kinds of convolution share: the window, and one set of weights for every bottom."""

    bottoms_expected = (1, None)
    tops_expected = (1, None)
    allows_in_place = False
    functions: ClassVar[tuple[Callable[..., Tensor], ...]]
    weight: Tensor
    kernel: tuple[int, ...]

    def setup(self, *bottoms: Tensor) -> None:
        param, first = self.spec.convolution_param, bottoms[0]
        self.channels_axis = self.axis(param.axis, first)
        spatial = first.dim() - self.channels_axis - 1
        if not 1 <= spatial <= 3:
            raise self.error("one to three spatial axes", f"a bottom of shape {tuple(first.shape)}")
        self.kernel = _per_axis(self, param, "kernel", spatial, None)
        self.stride = _per_axis(self, param, "stride", spatial, 1)
        self.pad = _per_axis(self, param, "pad", spatial, 0)
        self.dilation = _listed(self, param.dilation, "dilation", spatial, 1)
        channels = first.shape[self.channels_axis]
        self.groups = self.count_groups(channels)
        if param.num_output < 1 or self.groups < 1:
            raise self.error("num_output and group of 1 or more", f"{param.num_output} and {self.groups}")
        if channels % self.groups or param.num_output % self.groups:
            got = f"{channels} channels, num_output {param.num_output} and group {self.groups}"
            raise self.error("channels and num_output that are multiples of group", got)
        self.add_blob(
            "weight", (*self._channels(channels, param.num_output), *self.kernel), param.weight_filler
        )
        if param.bias_term:
            self.add_blob("bias", (param.num_output,), param.bias_filler)
        self.function = self.functions[spatial - 1]

    @classmethod
    def count_blobs(cls, spec: Any) -> int:
        return 1 + spec.convolution_param.bias_term

    def count_groups(self, channels: int) -> int:
        """The groups of a bottom of so many channels."""
        return self.spec.convolution_param.group

    def _channels(self, channels: int, outputs: int) -> tuple[int, int]:
        raise NotImplementedError

    def _convolve(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, *bottoms: Tensor) -> Tensor | tuple[Tensor, ...]:
        tops = tuple(self._one(bottom) for bottom in bottoms)
        return tops if len(tops) > 1 else tops[0]

    def _one(self, x: Tensor) -> Tensor:
        if self.channels_axis == 1:
            return self._convolve(x)
        leading = x.shape[: self.channels_axis]  # all of them count as samples
        return self._convolve(x.reshape(-1, *x.shape[self.channels_axis :])).unflatten(0, leading)


@register("Convolution")
class Convolution(_Window):
    """Weights (num_output, channels / group, *kernel) and, with bias_term, a bias (num_output)."""

    functions = (F.conv1d, F.conv2d, F.conv3d)

    def _channels(self, channels: int, outputs: int) -> tuple[int, int]:
        return outputs, channels // self.groups

    def _convolve(self, x: Tensor) -> Tensor:
        bias = getattr(self, "bias", None)
        return self.function(x, self.weight, bias, self.stride, self.pad, self.dilation, self.groups)


@register("Deconvolution")
class Deconvolution(_Window):
    """The transposed convolution; weights (channels, num_output / group, *kernel)."""

    functions = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

    def _channels(self, channels: int, outputs: int) -> tuple[int, int]:
        return channels, outputs // self.groups

    def _convolve(self, x: Tensor) -> Tensor:
        bias = getattr(self, "bias", None)
        return self.function(x, self.weight, bias, self.stride, self.pad, 0, self.groups, self.dilation)


def _per_axis(layer: Layer, param: Any, name: str, spatial: int, default: int | None) -> tuple[int, ...]:
    """One number for each spatial axis, from the repeated field or from NAME_h and NAME_w."""
    h, w, listed = f"{name}_h", f"{name}_w", "kernel_size" if name == "kernel" else name
    if not (param.HasField(h) or param.HasField(w)):
        return _listed(layer, getattr(param, listed), name, spatial, default)
    if spatial != 2:
        raise layer.error(f"{h} and {w} for two spatial axes only", f"{spatial} of them")
    if getattr(param, listed):
        raise layer.error(f"either {listed}, or {h} and {w}", "both")
    values = getattr(param, h), getattr(param, w)
    if name != "pad" and min(values) < 1:
        raise layer.error(f"{h} and {w} of 1 or more", values)
    return values


def _listed(layer: Layer, repeated: Any, name: str, spatial: int, default: int | None) -> tuple[int, ...]:
    values = list(repeated) or ([default] if default is not None else [])
    if len(values) not in (1, spatial):
        raise layer.error(f"1 or {spatial} values of {name}", f"{len(values)}")
    if name != "pad" and min(values) < 1:
        raise layer.error(f"a {name} of 1 or more", values)
    return tuple(values * (spatial // len(values)) if len(values) == 1 else values)


@register("InnerProduct")
class InnerProduct(Layer):
    """A matrix times each vector made of all axes from `axis` on; weights (num_output, K), or transposed."""

    allows_in_place = False
    weight: Tensor

    def setup(self, x: Tensor) -> None:
        param = self.spec.inner_product_param
        self.first_axis = self.axis(param.axis, x)
        if param.num_output < 1:
            raise self.error("num_output of 1 or more", param.num_output)
        inputs = x.shape[self.first_axis :].numel()
        shape = (inputs, param.num_output) if param.transpose else (param.num_output, inputs)
        self.add_blob("weight", shape, param.weight_filler)
        if param.bias_term:
            self.add_blob("bias", (param.num_output,), param.bias_filler)

    @classmethod
    def count_blobs(cls, spec: Any) -> int:
        return 1 + spec.inner_product_param.bias_term

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t() if self.spec.inner_product_param.transpose else self.weight
        vectors = x.flatten(self.first_axis) if x.dim() > self.first_axis + 1 else x
        return F.linear(vectors, weight, getattr(self, "bias", None))
