"""Layers that work on each entry by itself."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_transfer.caffe import schema
from attention_transfer.caffe.layers import pieces
from attention_transfer.caffe.layers.base import Layer, register
from attention_transfer.caffe.layers.rules import with_slope


@register("ReLU")
class ReLU(Layer):
    """max(x, 0), and negative_slope * x below; at 0 the slope is the negative one."""

    def forward(self, x: Tensor) -> Tensor:
        slope = self.spec.relu_param.negative_slope
        return F.leaky_relu(x, slope) if slope else F.relu(x)


@register("Sigmoid")
class Sigmoid(Layer):
    """1 / (1 + e^-x)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


@register("TanH")
class TanH(Layer):
    """The hyperbolic tangent."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


@register("ELU")
class ELU(Layer):
    """x above 0, alpha (e^x - 1) below; at 0 the slope is alpha."""

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(x, self.spec.elu_param.alpha)


@register("AbsVal")
class AbsVal(Layer):
    """|x|; the gradient at 0 is 0."""

    allows_in_place = False

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


@register("BNLL")
class BNLL(Layer):
    """log(1 + e^x). In place, Caffe takes the slope at the value instead of at x."""

    def forward(self, x: Tensor) -> Tensor:
        value = torch.logaddexp(x, torch.zeros_like(x))
        return with_slope(x, value, torch.sigmoid(value)) if self.in_place else value


@register("Threshold")
class Threshold(Layer):
    """1 above the threshold, else 0; no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return pieces.above(x, self.spec.threshold_param.threshold)


@register("Dropout")
class Dropout(Layer):
    """In training, entries are kept with probability 1 - dropout_ratio and scaled by its inverse.

    With a ratio of 1 that is 0 times infinity, so nothing is a number in training.
    """

    def setup(self, x: Tensor) -> None:
        ratio = self.spec.dropout_param.dropout_ratio
        if not 0 <= ratio <= 1:
            raise self.error("a dropout_ratio from 0 to 1", ratio)

    def forward(self, x: Tensor) -> Tensor:
        ratio = self.spec.dropout_param.dropout_ratio
        if ratio == 1 and self.learning:
            return x * math.nan
        return F.dropout(x, ratio, self.learning)


@register("PReLU")
class PReLU(Layer):
    """x above 0, slope * x elsewhere, with a learned slope for each channel or for all."""

    blobs_expected = 1
    slope: Tensor

    def setup(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise self.error("a bottom of two axes or more", f"{x.dim()}")
        param = self.spec.prelu_param
        filler = param.filler if param.HasField("filler") else schema.FillerParameter(value=0.25)
        self.add_blob("slope", () if param.channel_shared else (x.shape[1],), filler)

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x, self.slope.reshape(-1))


@register("Exp")
class Exp(Layer):
    """base ^ (shift + scale * x); base -1 means e."""

    def forward(self, x: Tensor) -> Tensor:
        param = self.spec.exp_param
        log_base = 1.0 if param.base == -1 else math.log(param.base)
        return pieces.exponential(x, log_base * param.scale, math.exp(log_base * param.shift))

    def setup(self, x: Tensor) -> None:
        _check_base(self, self.spec.exp_param.base)


@register("Log")
class Log(Layer):
    """log(shift + scale * x) to a base; -1 means e. In place, Caffe takes the slope at the value."""

    def setup(self, x: Tensor) -> None:
        _check_base(self, self.spec.log_param.base)

    def forward(self, x: Tensor) -> Tensor:
        param = self.spec.log_param
        inverse = 1.0 if param.base == -1 else 1 / math.log(param.base)
        value = pieces.logarithm(x, param.scale, param.shift, inverse)
        if not self.in_place:
            return value
        return with_slope(x, value, inverse * param.scale / (value * param.scale + param.shift))


def _check_base(layer: Layer, base: float) -> None:
    if base != -1 and base <= 0:
        raise layer.error("a base above 0, or -1 for e", base)


@register("Power")
class Power(Layer):
    """(shift + scale * x) ^ power.

    Caffe's slope is power * scale * y / (shift + scale * x), so NaN where that is 0 / 0, unless the power is
    0, 1 or 2. In place it overwrites what it still needs: the slope is taken at the value, and sent back
    squared whatever gradient arrives.
    """

    def forward(self, x: Tensor) -> Tensor:
        param = self.spec.power_param
        if param.power * param.scale == 0:
            value = torch.full_like(x, param.shift**param.power if param.power else 1.0)
            return with_slope(x, value, torch.zeros_like(x))
        if self.in_place:
            value = self._value(x)
            slope = self._slope(value, value)
            return with_slope(x, value, slope * slope, whatever_arrives=True)
        if param.power in (1, 2):
            return self._value(x)
        value = self._value(x.detach())
        return with_slope(x, value, self._slope(x.detach(), value))

    def _base(self, x: Tensor) -> Tensor:
        param = self.spec.power_param
        scaled = x * param.scale if param.scale != 1 else x
        return scaled + param.shift if param.shift else scaled

    def _value(self, x: Tensor) -> Tensor:
        base, power = self._base(x), self.spec.power_param.power
        if power == 2:
            return base * base
        return base**power if power != 1 else base.clone() if base is x else base

    def _slope(self, x: Tensor, value: Tensor) -> Tensor:
        param = self.spec.power_param
        if param.power == 1:
            return torch.full_like(x, param.scale)
        if param.power == 2:
            return self._base(x) * (2 * param.scale)
        if param.shift == 0:
            return value / x * param.power
        return value / self._base(x) * (param.power * param.scale)
