"""Energies and distances in plain PyTorch: the oracle of every other backend, and the one for every case."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

# What a sample's largest energy is kept within: squares of energies neither overflow nor vanish in float32.
SMALLEST_ENERGY, LARGEST_ENERGY = 2.0**-40, 2.0**60


def unsupported(features: Tensor, p: float, mapping: str) -> str | None:
    """This backend covers every case."""
    return None


def energy(
    features: Float[Tensor, "b c h w"], p: float, mapping: str
) -> tuple[Float[Tensor, "b h w"], Float[Tensor, " b"]]:
    """See `kernels.energy`; in ops that PyTorch can differentiate, in any mode and twice."""
    wide = features.to(accumulation_dtype(features.dtype))
    scale = power_of_two_near(wide.detach().abs().amax((1, 2, 3)))
    return raw_energy(wide / scale.view(-1, 1, 1, 1), p, mapping), scale


def raw_energy(features: Float[Tensor, "b c h w"], p: float, mapping: str) -> Float[Tensor, "b h w"]:
    """Sum (or max) over c of |A_c|^p; in ops that PyTorch can differentiate, in any mode and twice."""
    wide = features.to(accumulation_dtype(features.dtype))
    # up to 2, PyTorch's second derivative of a power of |x| is wrong at 0
    powers = wide * _signed_power(wide, p - 1) if 1 < p <= 2 else wide.abs().pow(p)
    return powers.amax(1) if mapping == "max" else powers.sum(1)


def gradient(
    features: Float[Tensor, "b c h w"],
    scale: Float[Tensor, " b"],
    grad_energy: Float[Tensor, "b h w"],
    grad_features: Float[Tensor, "b c h w"] | None,
    p: float,
    mapping: str,
) -> Float[Tensor, "b c h w"]:
    """See `kernels.energy_gradient`; in ops that autograd can differentiate again."""
    scale = scale.detach().view(-1, 1, 1, 1)
    relative = features.to(scale.dtype) / scale
    slope = p * _signed_power(relative, p - 1) / scale
    if mapping == "max":
        slope = slope * _share_of_maximum(relative)
    gradient = slope * grad_energy.unsqueeze(1)
    gradient = gradient if grad_features is None else grad_features + gradient
    return gradient.to(features.dtype)


def distance(
    student: Float[Tensor, "b h w"], teacher: Float[Tensor, "b h w"], squared: bool
) -> Float[Tensor, " b"]:
    """See `kernels.distance`; in ops that autograd can differentiate twice."""
    difference = (unit(student) - unit(teacher)).flatten(1)
    return difference.square().sum(1) if squared else l2_norm(difference).squeeze(1)


def distance_gradient(
    student: Float[Tensor, "b h w"], teacher: Float[Tensor, "b h w"], grad: Float[Tensor, " b"], squared: bool
) -> Float[Tensor, "b h w"]:
    """d(distance)/d(student), times `grad`; in ops that autograd can differentiate again."""
    energy = student.flatten(1)
    y = l2_normalise(energy)
    difference = y - l2_normalise(teacher.flatten(1))
    slope = 2 * difference if squared else l2_normalise(difference)
    return l2_normalise_gradient(energy, grad.unsqueeze(1) * slope).view_as(student)


# --- maps ---------------------------------------------------------------------------------------------------


def unit(energy: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """Each sample's map over its L2 norm, 0 where the map is 0."""
    return l2_normalise(energy.flatten(1)).view_as(energy)


def l2_norm(x: Float[Tensor, "b n"]) -> Float[Tensor, "b 1"]:
    """||x||_2 of each row; d||x||/dx = x/||x||, and 0 where x = 0."""
    return _plain_l2(x)[1] if _in_forward_mode() else _L2Norm.apply(x)


def l2_normalise(x: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """y = x/||x||_2 of each row, 0 where x = 0; dL/dx = (g - y <y, g>)/||x|| with g = dL/dy.

    The Jacobian (I - y y^T)/||x|| is symmetric and never built.
    """
    return _plain_l2(x)[0] if _in_forward_mode() else _L2Normalise.apply(x)


def _in_forward_mode() -> bool:
    """Whether tangents may be about: `torch.func.jvp`, `jacfwd`, `make_dual`, and these within each other."""
    return forward_ad._current_level >= 0


def _plain_l2(x: Float[Tensor, "b n"]) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b 1"]]:
    """x/||x|| and ||x|| of each row, in ops of PyTorch.

    A rule for tangents in an autograd function would do for one of them alone: PyTorch drops the tangents of
    what such a rule computes.
    """
    largest = x.detach().abs().amax(1, keepdim=True)
    nonzero = largest != 0
    scale = largest.where(nonzero, 1)
    relative = x * nonzero / scale
    norm = relative.square().sum(1, keepdim=True).where(nonzero, 1).sqrt()
    return relative / norm, norm * scale * nonzero


class _L2Norm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Float[Tensor, "b n"]) -> Float[Tensor, "b 1"]:
        relative, largest = _relative(x)
        return largest * torch.linalg.vector_norm(relative, dim=1, keepdim=True)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Float[Tensor, "b 1"]) -> Float[Tensor, "b n"]:
        (x,) = ctx.saved_tensors
        return grad * l2_normalise(x)


class _L2Normalise(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        relative, _ = _relative(x)
        norm = torch.linalg.vector_norm(relative, dim=1, keepdim=True)
        return relative / norm.where(norm != 0, 1)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        (x,) = ctx.saved_tensors
        return l2_normalise_gradient(x, grad)


def l2_normalise_gradient(x: Float[Tensor, "b n"], grad: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """(g - y <y, g>)/||x|| with y = x/||x||, 0 where x = 0; in ops that autograd can differentiate again."""
    y, norm = l2_normalise(x), l2_norm(x)
    tangent = grad - y * (y * grad).sum(1, keepdim=True)
    return tangent * (norm != 0) / norm.where(norm != 0, 1)


def _relative(x: Float[Tensor, "b n"]) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b 1"]]:
    """Each row over its largest size, whose squares neither overflow nor vanish; and that size."""
    largest = x.abs().amax(1, keepdim=True)
    return x / largest.where(largest != 0, 1), largest


# --- scales and slopes --------------------------------------------------------------------------------------


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which energies of `dtype` activations are summed: float32 or better."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def power_of_two_near(largest: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The power of two nearest each entry by ratio; 1 for an entry that is zero or not finite.

    Dividing by a power of two is exact, so scaling changes no digit of a result that did not overflow or
    underflow without it. What is left is within sqrt(2) of 1, and its 64th power within 2^32 of 1.
    """
    scalable = (largest > 0) & largest.isfinite()
    largest = largest.where(scalable, 1)
    mantissa, _ = torch.frexp(largest)  # in [1/2, 1)
    below = largest / (2 * mantissa)
    above = (2 * below).where(mantissa >= math.sqrt(0.5), below)
    return above.where(above.isfinite(), below)


def _signed_power(x: Tensor, q: float) -> Tensor:
    """sign(x) |x|^q for q >= 0; its derivative at x = 0 is taken as 0 where it would be infinite."""
    if q == 1:
        return x
    return x.sign() * x.abs().where(x != 0, 1).pow(q)


def _share_of_maximum(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """1 at the channel of largest |x|, 1/m at each of m equal ones, 0 elsewhere: torch.amax's rule."""
    size = x.detach().abs()
    largest = (size == size.amax(1, keepdim=True)).to(x.dtype)
    return largest / largest.sum(1, keepdim=True)
