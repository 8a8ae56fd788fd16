"""BatchNorm, LRN, MVN, and the SSD fork's Normalize."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from attention_transfer.caffe import schema
from attention_transfer.caffe.layers import pieces
from attention_transfer.caffe.layers.base import Layer, register


@register("BatchNorm")
class BatchNorm(Layer):
    """Subtracts the mean of each channel and divides by its deviation, sqrt(variance + eps).

    The blobs are sums over the forward passes of training: of means, of unbiased variances, and of the
    weights to divide both by; each pass first multiplies all three by moving_average_fraction.
    """

    asks_for_gradient = True
    blobs_expected = 3

    mean: Tensor
    variance: Tensor
    factor: Tensor

    def setup(self, x: Tensor) -> None:
        if any(spec.lr_mult for spec in self.spec.param):
            raise self.error(
                "lr_mult 0, if any, for the statistics", "another", "They move by averages alone."
            )
        channels = x.shape[1] if x.dim() > 1 else 1
        for name, size in (("mean", channels), ("variance", channels), ("factor", 1)):
            self.add_blob(name, (size,), learned=False)

    def blob_specs(self) -> list[Any]:
        specs = super().blob_specs()
        for spec in specs:
            spec.lr_mult = 0.0
        return specs

    @property
    def uses_stored(self) -> bool:
        """Whether the stored statistics are used, and stay as they are."""
        param = self.spec.batch_norm_param
        return param.use_global_stats if param.HasField("use_global_stats") else not self.learning

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """The normalised bottom; times `weight` plus `bias`, (c,) each, where a Scale is done with it."""
        eps = self.spec.batch_norm_param.eps
        channelled = x if x.dim() > 1 else x[:, None]
        if self.uses_stored:
            scale = torch.where(self.factor == 0, 0.0, 1 / self.factor)
            y = F.batch_norm(
                channelled, self.mean * scale, self.variance * scale, weight, bias, False, 0.0, eps
            )
        else:
            y = self._normalised_by_batch(channelled, weight, bias, eps)
        return y if x.dim() > 1 else y[:, 0]

    def _normalised_by_batch(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        if x.numel() == x.shape[1]:  # one value a channel, which torch refuses
            self._accumulate(x.detach().flatten(), torch.zeros_like(self.variance))
            y = x - x
            if weight is None or bias is None:
                return y
            shape = (1, -1, *[1] * (x.dim() - 2))
            return y * weight.view(shape) + bias.view(shape)
        mean, variance = torch.zeros_like(self.mean), torch.zeros_like(self.variance)
        y = F.batch_norm(x, mean, variance, weight, bias, True, 1.0, eps)  # fills mean and variance in
        self._accumulate(mean, variance)
        return y

    def again(self, x: Tensor) -> Tensor:
        """What `forward` gave for `x`, with the statistics left as they are."""
        stored = [self.mean, self.variance, self.factor]
        before = [blob.clone() for blob in stored]
        y = self.forward(x)
        torch._foreach_copy_(stored, before)
        return y

    @torch.no_grad()
    def _accumulate(self, mean: Tensor, variance: Tensor) -> None:
        stored = [self.mean, self.variance, self.factor]
        torch._foreach_mul_(stored, self.spec.batch_norm_param.moving_average_fraction)
        torch._foreach_add_(stored, [mean, variance, torch.ones_like(self.factor)])


@register("LRN")
class LRN(Layer):
    """x / (k + alpha / n * the sum of squares in a window of n)^beta, across channels or within each.

    Within a channel the window is local_size squared, and Caffe takes 1 for k.
    """

    def setup(self, x: Tensor) -> None:
        param = self.spec.lrn_param
        if x.dim() != 4:
            raise self.error("a bottom of four axes", f"the shape {tuple(x.shape)}")
        if param.local_size % 2 == 0:
            raise self.error("an odd local_size", param.local_size)

    def forward(self, x: Tensor) -> Tensor:
        param = self.spec.lrn_param
        size, half = param.local_size, param.local_size // 2
        if param.norm_region == param.WITHIN_CHANNEL:
            return pieces.respond_within(x, size, param.alpha, param.beta)
        squares = F.pad((x * x)[:, None], (0, 0, 0, 0, half, half))
        mean = F.avg_pool3d(squares, (size, 1, 1), stride=1)[:, 0]
        return x * (param.k + param.alpha * mean) ** -param.beta


@register("MVN")
class MVN(Layer):
    """Subtracts the mean of each sample's channel, or of each sample, and divides by its deviation + eps."""

    allows_in_place = False

    def forward(self, x: Tensor) -> Tensor:
        param = self.spec.mvn_param
        vectors = x.flatten(1 if param.across_channels else 2) if x.dim() > 2 else x
        if not param.normalize_variance:
            return (vectors - vectors.mean(-1, keepdim=True)).view_as(x)
        return _MVN.apply(vectors, param.eps).view_as(x)


class _MVN(torch.autograd.Function):
    """Caffe's gradient (g - mean(g) - y mean(g y)) / (deviation + eps); the derivative divides y by more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        divisor = centred.square().mean(-1, keepdim=True).sqrt() + eps
        y = centred / divisor
        ctx.save_for_backward(y, divisor)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        y, divisor = ctx.saved_tensors
        gy = (g * y).mean(-1, keepdim=True)
        return (g - g.mean(-1, keepdim=True) - y * gy) / divisor, None


@register("Normalize")
class Normalize(Layer):
    """x / sqrt(sum of squares + eps) over each sample, or over the channels of each position, times a scale.

    Caffe's gradient has the scales outside, s (g - x <x, g> / norm^2) / norm: the derivative while all scales
    are equal. In place, Caffe subtracts the gradient from itself: 0.
    """

    blobs_expected = 1
    scale: Tensor

    def setup(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise self.error("a bottom of two axes or more", f"{x.dim()}")
        param = self.spec.norm_param
        filler = param.scale_filler if param.HasField("scale_filler") else schema.FillerParameter(value=1.0)
        self.add_blob("scale", () if param.channel_shared else (x.shape[1],), filler)

    def forward(self, x: Tensor) -> Tensor:
        param = self.spec.norm_param
        axes = tuple(range(1, x.dim())) if param.across_spatial else (1,)
        scale = self.scale if param.channel_shared else self.scale.view(-1, *[1] * (x.dim() - 2))
        return _Normalize.apply(x, scale, axes, param.eps, self.in_place)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, axes: tuple[int, ...], eps: float, in_place: bool
    ) -> Tensor:
        norm = (x.square().sum(axes, keepdim=True) + eps).sqrt()
        unit = x / norm
        ctx.save_for_backward(unit, norm, scale)
        ctx.axes, ctx.in_place = axes, in_place
        return unit * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        unit, norm, scale = ctx.saved_tensors
        to_scale = (g * unit).sum_to_size(scale.shape) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, to_scale, None, None, None
        if ctx.in_place:
            return torch.zeros_like(g), to_scale, None, None, None
        along = (unit * g).sum(ctx.axes, keepdim=True)
        return scale * (g - unit * along) / norm, to_scale, None, None, None
