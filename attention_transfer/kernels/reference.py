"""The energy in plain PyTorch: the oracle of every other backend, and the one that covers every case."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def unsupported(features: Tensor, p: float, mapping: str) -> str | None:
    """This backend covers every case."""
    return None


def energy(
    features: Float[Tensor, "b c h w"], p: float, mapping: str
) -> tuple[Float[Tensor, "b h w"], Float[Tensor, " b"]]:
    """See `kernels.energy`."""
    wide = features.to(accumulation_dtype(features.dtype))
    scale = _power_of_two_below(wide.abs().amax((1, 2, 3)))
    powers = (wide / scale.view(-1, 1, 1, 1)).abs().pow(p)
    return (powers.amax(1) if mapping == "max" else powers.sum(1)), scale


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which energies of `dtype` activations are summed: float32 or better."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _power_of_two_below(largest: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The greatest power of two <= each entry; 1 for an entry that is zero or not finite.

    Dividing by a power of two is exact, so scaling changes no digit of a result that did not
    overflow or underflow without it.
    """
    scalable = (largest > 0) & largest.isfinite()
    largest = largest.where(scalable, 1)
    return largest / (2 * torch.frexp(largest).mantissa)
