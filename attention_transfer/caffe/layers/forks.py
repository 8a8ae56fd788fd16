"""Layers of other forks, which neither stock Caffe nor the SSD fork has, by their plain meaning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_transfer.caffe import schema
from attention_transfer.caffe.layers.base import Layer, register
from attention_transfer.caffe.layers.convolution import Convolution

SEGNETS_EPS = 1e-9  # fixed in SegNet's BN
SEGNETS_FIELDS = ("scale_filler", "shift_filler", "bn_mode")
PSPNETS_FIELDS = ("slope_filler", "bias_filler", "momentum", "eps", "frozen", "engine")


@register("DepthwiseConvolution", "ConvolutionDepthwise")
class DepthwiseConvolution(Convolution):
    """A Convolution with a group for each channel.

    Where DepthwiseConvolution states its groups, these are as many; ConvolutionDepthwise does not look.
    """

    def count_groups(self, channels: int) -> int:
        stated = self.type == "DepthwiseConvolution" and self.spec.convolution_param.HasField("group")
        return self.spec.convolution_param.group if stated else channels


@register("BN")
class BN(Layer):
    """Batch normalisation with its factor and shift in one layer, two of that name.

    PSPNet's has four blobs of (1, c, 1, 1): factor, shift, and moving averages of mean and biased variance,
    momentum * old + (1 - momentum) * new, which it uses in TEST, or always if it is `frozen`.

    SegNet's has the first two. With the bn_mode LEARN it takes the statistics of the batch, in either phase;
    with INFERENCE it has none, and is factor * x + shift.

    It is SegNet's if it has a field of that, or two `param` entries and no field of PSPNet's; where
    the fields say nothing, the number of the stored blobs does.
    """

    factor: Tensor
    shift: Tensor
    mean: Tensor
    variance: Tensor

    def setup(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise self.error("a bottom of two axes or more", x.dim())
        param, shape = self.spec.bn_param, (1, x.shape[1], 1, 1)
        given = [
            {name for name in names if param.HasField(name)} for names in (SEGNETS_FIELDS, PSPNETS_FIELDS)
        ]
        if all(given):
            got = ", ".join(sorted(given[0] | given[1]))
            raise self.error("the fields of PSPNet's BN or of SegNet's", f"both: {got}")
        self.has_averages = not is_segnets(self.spec)
        fillers = (param.slope_filler, param.bias_filler)
        if not self.has_averages:
            fillers = (param.scale_filler, param.shift_filler)
        self.add_blob("factor", shape, fillers[0])
        self.add_blob("shift", shape, fillers[1])
        if self.has_averages:
            self.add_blob("mean", shape, learned=False)
            filler = schema.FillerParameter(value=1.0 if param.frozen else 0.0)
            self.add_blob("variance", shape, filler, learned=False)

    @classmethod
    def count_blobs(cls, spec: Any) -> int:
        return 2 if is_segnets(spec) else 4

    def blob_specs(self) -> list[Any]:
        specs = super().blob_specs()
        for index, spec in enumerate(specs):
            if index >= 2 or (self.has_averages and self.spec.bn_param.frozen):
                spec.lr_mult = spec.decay_mult = 0.0
        return specs

    def forward(self, x: Tensor) -> Tensor:
        param, factor, shift = self.spec.bn_param, self.factor.flatten(), self.shift.flatten()
        if not self.has_averages:
            if param.bn_mode == param.INFERENCE:
                spread = (-1, *[1] * (x.dim() - 2))
                return x * factor.view(spread) + shift.view(spread)
            return F.batch_norm(x, None, None, factor, shift, True, 0.0, SEGNETS_EPS)
        if param.frozen or not self.learning:
            stored = self.mean.flatten(), self.variance.flatten()
            return F.batch_norm(x, *stored, factor, shift, False, 0.0, param.eps)
        self._accumulate(x.detach(), param.momentum)
        return F.batch_norm(x, None, None, factor, shift, True, 0.0, param.eps)

    @torch.no_grad()
    def _accumulate(self, x: Tensor, momentum: float) -> None:
        over = [axis for axis in range(x.dim()) if axis != 1]
        variance, mean = torch.var_mean(x, over, correction=0)
        for stored, new in ((self.mean, mean), (self.variance, variance)):
            stored.mul_(momentum).add_(new.view(stored.shape), alpha=1 - momentum)


def settle_meaning(specs: Iterable[Any], stored: Iterable[Any]) -> None:
    """Let BN layers whose settings do not tell be what their stored blobs say, two or four of them."""
    blobs = {record.name: len(record.blobs) for net in stored for record in net.layer}
    for spec in specs:
        fields = (*SEGNETS_FIELDS, *PSPNETS_FIELDS)
        if spec.type == "BN" and not any(spec.bn_param.HasField(name) for name in fields):
            if blobs.get(spec.name) == 2:
                spec.bn_param.bn_mode = spec.bn_param.LEARN
            elif blobs.get(spec.name) == 4:
                spec.bn_param.frozen = False


def is_segnets(spec: Any) -> bool:
    """Whether a BN layer is SegNet's, by its fields and its `param` entries."""
    if any(spec.bn_param.HasField(name) for name in SEGNETS_FIELDS):
        return True
    return len(spec.param) == 2 and not any(spec.bn_param.HasField(name) for name in PSPNETS_FIELDS)


@register("ReLU6")
class ReLU6(Layer):
    """x from 0 to 6, 6 above, negative_slope * x below; at 0 the slope is the negative one, at 6 it is 0."""

    def forward(self, x: Tensor) -> Tensor:
        slope = self.spec.relu6_param.negative_slope
        rectified = F.leaky_relu(x, slope) if slope else F.relu(x)
        return torch.where(x >= 6, 6.0, rectified)


@register("Axpy")
class Axpy(Layer):
    """A factor for each channel of each sample, (n, c, 1, 1), times the second bottom, plus the third."""

    bottoms_expected = (3, 3)
    allows_in_place = False

    def setup(self, a: Tensor, x: Tensor, y: Tensor) -> None:
        if (
            x.dim() < 2
            or a.shape[:2] != x.shape[:2]
            or a.numel() != a.shape[:2].numel()
            or x.shape != y.shape
        ):
            got = ", ".join(str(tuple(bottom.shape)) for bottom in (a, x, y))
            raise self.error("bottoms (n, c, 1, 1), and twice (n, c, ...)", got)

    def forward(self, a: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return a.reshape(*x.shape[:2], *[1] * (x.dim() - 2)) * x + y


@register("Interp")
class Interp(Layer):
    """Bilinear interpolation with aligned corners of the bottom, less a border where the pads are negative.

    To height and width; or every shrink_factor-th, then zoom_factor - 1 places between any two; or to the
    size of a second bottom.
    """

    bottoms_expected = (1, 2)
    allows_in_place = False

    def accepts_gradient(self, bottom: int) -> bool:
        return bottom == 0

    def setup(self, x: Tensor, reference: Tensor | None = None) -> None:
        param = self.spec.interp_param
        if x.dim() != 4 or (reference is not None and reference.dim() != 4):
            raise self.error("bottoms of four axes", f"the shape {tuple(x.shape)}")
        if max(param.pad_beg, param.pad_end) > 0:
            raise self.error("pads of 0 or less, which crop", f"{param.pad_beg} and {param.pad_end}")
        if min(param.shrink_factor, param.zoom_factor) < 1:
            raise self.error("factors of 1 or more", f"{param.shrink_factor} and {param.zoom_factor}")
        factors = param.HasField("shrink_factor") or param.HasField("zoom_factor")
        sized = param.HasField("height") and param.HasField("width")
        if reference is None and not factors and not sized:
            raise self.error("height and width, a factor, or a second bottom", "none of them")

    @property
    def by_factors(self) -> bool:
        """Whether the size is told by factors: by one of them at once, by both if no size is stated."""
        param = self.spec.interp_param
        stated = param.HasField("height") and param.HasField("width")
        return param.HasField("shrink_factor") != param.HasField("zoom_factor") or not stated

    def size_for(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """(h, w) of the top for that of the bottom."""
        param = self.spec.interp_param
        if not self.by_factors:
            return param.height, param.width
        effective = (size + param.pad_beg + param.pad_end for size in sizes)
        return tuple((size - 1) // param.shrink_factor * param.zoom_factor + 1 for size in effective)

    def forward(self, x: Tensor, reference: Tensor | None = None) -> Tensor:
        param = self.spec.interp_param
        (h, w), begin, end = x.shape[2:], -param.pad_beg, param.pad_end
        cropped = x[:, :, begin : h + end, begin : w + end]
        size = self.size_for(x.shape[2:]) if reference is None else tuple(reference.shape[2:])
        if min(*cropped.shape[2:], *size) < 1:
            raise self.error("a size of 1 or more", f"{tuple(cropped.shape[2:])} to {size}")
        return F.interpolate(cropped, size, mode="bilinear", align_corners=True)
