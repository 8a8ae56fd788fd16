"""The energy operator `torch.ops.attention_transfer.energy`, and the choice of the backend that computes it.

Every module in this folder is a backend, named as its file; adding one is adding a file with

- `unsupported(features, p, mapping) -> str | None`: why this backend does not cover the case, or None;
- `energy(features, p, mapping) -> (energy, scale)`: as the operator below.

A file that cannot be imported (its package is missing) is passed over. The automatic choice is the first
backend, in alphabetical order with `reference` last, that covers the case; `use_backend` asks for one by
name, and then it computes or raises. The gradient is the same closed form for all of them.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from .reference import accumulation_dtype

_requested: ContextVar[str | None] = ContextVar("requested_backend", default=None)


def backends() -> list[str]:
    """Names of all backends, in the order in which the automatic choice tries them."""
    return list(_backends_in(tuple(__path__)))


@functools.cache
def _backends_in(folders: tuple[str, ...]) -> tuple[str, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules(folders))
    return tuple(sorted(names, key="reference".__eq__))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute every energy inside the `with` block on the backend `name`, or fail.

    Raises:
        ValueError: if there is no backend of that name; inside the block, if it does not cover a case.
        ImportError: inside the block, if the package that the backend needs is missing.
    """
    if name not in backends():
        raise ValueError(f"use_backend: expected one of {backends()}, got {name!r}.")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


@torch.library.custom_op(
    "attention_transfer::energy",
    mutates_args=(),
    schema="(Tensor features, float p, str mapping) -> (Tensor, Tensor)",
)
def energy(
    features: Float[Tensor, "b c h w"], p: float, mapping: str
) -> tuple[Float[Tensor, "b h w"], Float[Tensor, " b"]]:
    """Energy over the channels, relative to a scale of each sample: sum (or max) over c of |A_c / scale|^p.

    `scale` is a positive power of two that the backend chooses so that no energy overflows and no
    sample's largest energy underflows; the energy proper is `energy * scale**p`. Both are float32, or
    float64 for float64 features. The gradient flows through the energy; the scale, a step function of the
    features, has none.
    """
    return _backend(features, p, mapping).energy(features, p, mapping)


def _backend(features: Tensor, p: float, mapping: str) -> ModuleType:
    requested = _requested.get()
    if requested is not None:
        return _require(requested, features, p, mapping)
    modules = (_load(name) for name in backends())
    return next(module for module in modules if module and not module.unsupported(features, p, mapping))


def _require(name: str, features: Tensor, p: float, mapping: str) -> ModuleType:
    module = importlib.import_module(f"{__name__}.{name}")
    if reason := module.unsupported(features, p, mapping):
        raise ValueError(f"energy: the backend {name!r} was asked for, but {reason}.")
    return module


@functools.cache
def _load(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError:
        return None


@energy.register_fake
def _(features: Tensor, p: float, mapping: str) -> tuple[Tensor, Tensor]:
    b, _, h, w = features.shape
    dtype = accumulation_dtype(features.dtype)
    return features.new_empty((b, h, w), dtype=dtype), features.new_empty((b,), dtype=dtype)


def _save(ctx, inputs, output) -> None:
    features, ctx.p, ctx.mapping = inputs
    ctx.save_for_backward(features, output[1])


def _gradient(ctx, grad_energy: Float[Tensor, "b h w"], _grad_scale) -> tuple[Tensor, None, None]:
    """dL/dA = p |A|^(p-1) sign(A) dL/dQ, in ops that autograd can differentiate again."""
    features, scale = ctx.saved_tensors
    scale = scale.detach().view(-1, 1, 1, 1)
    relative = features.to(scale.dtype) / scale
    slope = ctx.p * _signed_power(relative, ctx.p - 1) / scale
    if ctx.mapping == "max":
        slope = slope * _share_of_maximum(relative)
    return (slope * grad_energy.unsqueeze(1)).to(features.dtype), None, None


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


energy.register_autograd(_gradient, setup_context=_save)
