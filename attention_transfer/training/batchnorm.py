"""BatchNorm over the whole batch where several processes share it.

PyTorch's SyncBatchNorm runs on GPUs only, has no second derivative, and drops the activation that timm's
layers have inside; this one is plain PyTorch and has none of these limits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from lightning.pytorch.plugins import LayerSync
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from attention_transfer._errors import InputError


class SharedBatchNorm(LayerSync):
    """Lets each BatchNorm layer of a model that is trained normalise by the statistics of all processes."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Change how the layers compute, in place: parameters, names and hooks stay.

        Raises:
            ValueError: if a layer does more than BatchNorm does.
        """
        for name, layer in model.named_modules():
            if isinstance(layer, _BatchNorm):
                _check(name, layer)
                vars(layer)["forward"] = partial(_forward, layer)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        for layer in model.modules():
            if isinstance(layer, _BatchNorm):
                vars(layer).pop("forward", None)
        return model


def _check(name: str, layer: nn.Module) -> None:
    known = type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) or _of_timm(layer)
    if not known:
        raise InputError(
            f"train: --sync-batchnorm knows BatchNorm layers of PyTorch and timm, got {type(layer).__name__} "
            f"at {name}. Leave --sync-batchnorm out."
        )


def _of_timm(layer: nn.Module) -> bool:
    """Whether it is timm's BatchNorm with dropout and activation behind it."""
    return type(layer).__module__.startswith("timm.") and hasattr(layer, "act") and hasattr(layer, "drop")


def _forward(layer: Any, x: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *space"]:
    if not layer.training:
        return type(layer).forward(layer, x)
    mean, variance, count = _statistics(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x)
    _note(layer, mean.detach(), variance.detach(), count)
    scale = (variance + layer.eps).rsqrt()
    scale = scale if layer.weight is None else scale * layer.weight
    shift = -mean * scale if layer.bias is None else layer.bias - mean * scale
    shape = (1, -1, *[1] * (x.ndim - 2))
    result = (x * scale.view(shape) + shift.view(shape)).to(x.dtype)
    return layer.act(layer.drop(result)) if _of_timm(layer) else result


def _statistics(x: Float[Tensor, "b c *space"]) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"], Tensor]:
    """Mean and biased variance of each channel over all processes, and how many numbers they are of.

    Each process's own mean and variance m_r, v_r of n_r numbers are exchanged, for their differences from
    the whole lose no digits: mean = sum n_r m_r / n, variance = sum n_r (v_r + (m_r - mean)^2) / n.
    """
    axes = [0, *range(2, x.ndim)]
    variance, mean = torch.var_mean(x, axes, correction=0)
    count = x.new_full((1,), x.numel() // x.shape[1])
    rows = x.new_zeros(dist.get_world_size(), 2 * len(mean) + 1)
    place = torch.arange(len(rows), device=x.device)[:, None] == dist.get_rank()
    rows = _Sum.apply(torch.where(place, torch.cat([mean, variance, count]), rows))
    means, variances, counts = rows.split([len(mean), len(mean), 1], 1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    variance = (counts * (variances + (means - mean) ** 2)).sum(0) / total
    return mean, variance, total


@torch.no_grad()
def _note(layer: Any, mean: Float[Tensor, " c"], variance: Float[Tensor, " c"], count: Tensor) -> None:
    """Move the running statistics as BatchNorm does, which keeps the unbiased variance."""
    if not layer.track_running_stats:
        return
    layer.num_batches_tracked.add_(1)
    share = 1 / layer.num_batches_tracked if layer.momentum is None else layer.momentum
    layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), share)
    layer.running_var.lerp_((variance * count / (count - 1)).to(layer.running_var.dtype), share)


class _Sum(torch.autograd.Function):
    """The sum over processes, whose gradient is the sum of theirs; it can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        # guard: batchnorm-forward
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # guard: batchnorm-backward
        return _Sum.apply(gradient.contiguous())
