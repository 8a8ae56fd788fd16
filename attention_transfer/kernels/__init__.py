"""The energy operator `torch.ops.attention_transfer.energy`, and the choice of the backend that computes it.

Every module in this folder is a backend, named as its file; adding one is adding a file with

- `unsupported(features, p, mapping) -> str | None`: why this backend does not cover the case, or None;
- `energy(features, p, mapping) -> (energy, scale)`: as the operator `energy` below;
- `raw_energy(features, p, mapping) -> energy`: the same as it is, with 1 as every sample's scale;
- `gradient(features, scale, grad_energy, grad_features, p, mapping)`: as `energy_gradient` below;
- `distance(student, teacher, squared)`: as `distance` below, of two maps of energies;
- `distance_gradient(student, teacher, grad, squared)`: `grad` times its derivative by the student's map.

A file that cannot be imported (its package is missing) is passed over. The automatic choice is the first
backend, in alphabetical order with `reference` last, that covers the case; `use_backend` asks for one by
name, and then it computes or raises.
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
from torch.autograd.forward_ad import unpack_dual

from .._errors import InputError
from . import reference
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
        raise InputError(f"use_backend: expected one of {backends()}, got {name!r}.")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


@torch.library.custom_op(
    "attention_transfer::energy",
    mutates_args=(),
    schema="(Tensor features, float p, str mapping, bool relative=True) -> (Tensor, Tensor)",
)
def energy(
    features: Float[Tensor, "b c h w"], p: float, mapping: str, relative: bool = True
) -> tuple[Float[Tensor, "b h w"], Float[Tensor, " b"]]:
    """Energy over the channels, relative to a scale of each sample: sum (or max) over c of |A_c / scale|^p.

    `scale` is a positive power of two by which the backend keeps each sample's largest energy within
    [2^-40, 2^60], so that even its square neither overflows nor vanishes; the energy proper is
    `energy * scale**p`. An all-zero sample has energy 0, one with NaN or infinity a largest energy that is
    not finite. Both are float32, or float64 for float64 features. The gradient flows through the energy; the
    scale, a step function of the features, has none. Without `relative` every scale is 1, and the energy is
    lost where the type cannot hold it.

    An operator is differentiated backwards only: `differentiable_energy` serves all others.
    """
    backend = _backend(features, p, mapping)
    if relative:
        return backend.energy(features, p, mapping)
    total = backend.raw_energy(features, p, mapping)
    return total, total.new_ones(len(total))


def _backend(features: Tensor, p: float, mapping: str) -> ModuleType:
    requested = _requested.get()
    if requested is not None:
        return _require(requested, features, p, mapping)
    modules = (_load(name) for name in backends())
    return next(module for module in modules if module and not module.unsupported(features, p, mapping))


def _require(name: str, features: Tensor, p: float, mapping: str) -> ModuleType:
    module = importlib.import_module(f"{__name__}.{name}")
    if reason := module.unsupported(features, p, mapping):
        raise InputError(f"energy: the backend {name!r} was asked for, but {reason}.")
    return module


@functools.cache
def _load(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError:
        return None


@energy.register_fake
def _(features: Tensor, p: float, mapping: str, relative: bool = True) -> tuple[Tensor, Tensor]:
    b, _, h, w = features.shape
    dtype = accumulation_dtype(features.dtype)
    return features.new_empty((b, h, w), dtype=dtype), features.new_empty((b,), dtype=dtype)


@torch.library.custom_op(
    "attention_transfer::energy_gradient",
    mutates_args=(),
    schema="(Tensor features, Tensor scale, Tensor grad_energy, Tensor? grad_features, float p, str mapping)"
    " -> Tensor",
)
def energy_gradient(
    features: Float[Tensor, "b c h w"],
    scale: Float[Tensor, " b"],
    grad_energy: Float[Tensor, "b h w"],
    grad_features: Float[Tensor, "b c h w"] | None,
    p: float,
    mapping: str,
) -> Float[Tensor, "b c h w"]:
    """grad_features + p |A|^(p-1) sign(A) / scale^p * grad_energy, summed in one pass over memory.

    For "max" the slope is that of the channel of largest |A|, shared equally by those that tie. The sum is
    rounded once, to the type of the features. Not differentiable itself: `reference.gradient` is.
    """
    backend = _backend(features, p, mapping)
    return backend.gradient(features, scale, grad_energy, grad_features, p, mapping)


@energy_gradient.register_fake
def _(features: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(features)


def differentiable_energy(
    features: Float[Tensor, "b c h w"], p: float, mapping: str, *, relative: bool = True
) -> tuple[Float[Tensor, "b h w"], Float[Tensor, " b"]]:
    """`energy` that forward-mode differentiation and the transforms of torch.func can go through as well."""
    if not _composed(features):
        return energy(features, p, mapping, relative)
    if relative:
        return reference.energy(features, p, mapping)
    total = reference.raw_energy(features, p, mapping)
    return total, total.new_ones(len(total))


def _composed(*tensors: Tensor | None) -> bool:
    """Whether the work must be done by PyTorch's operations, which know the rules that no backend has.

    The tensors wrap others (torch.func, FakeTensor, DTensor), a dispatch mode looks on (as in make_fx), or
    one carries a tangent, as in forward mode.
    """
    if torch.compiler.is_compiling():  # which traces no question about a tensor
        return torch._C._are_functorch_transforms_active()
    return torch._C._len_torch_dispatch_stack() > 0 or any(
        type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or unpack_dual(tensor).tangent is not None
        for tensor in tensors
        if tensor is not None
    )


def pass_energy(
    features: Float[Tensor, "b c h w"], p: float, mapping: str
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b h w"], Float[Tensor, " b"]]:
    """The features themselves, to be used in their place from here on, with their `energy` and its scale.

    In the backward pass the gradient from above and that of the energy are added in the one pass over
    memory which the latter takes anyway; without this, autograd adds them in a pass of its own.
    """
    if torch.compiler.is_compiling() or _composed(features):  # a backend is no code that can be traced
        return features, *differentiable_energy(features, p, mapping)
    return _PassEnergy.apply(features, p, mapping)


class _PassEnergy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: Tensor, p: float, mapping: str) -> tuple[Tensor, Tensor, Tensor]:
        backend = _backend(features, p, mapping)
        total, scale = backend.energy(features, p, mapping)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(scale)
        ctx.save_for_backward(features, scale)
        ctx.backend, ctx.p, ctx.mapping = backend, p, mapping
        return features.detach(), total, scale  # not a view: that would forbid what follows to be in place

    @staticmethod
    def backward(ctx, grad_features: Tensor | None, grad_energy: Tensor | None, _grad_scale: None) -> tuple:
        if grad_energy is None:
            return grad_features, None, None
        features, scale = ctx.saved_tensors
        backend = reference if _differentiated(features, grad_features, grad_energy) else ctx.backend
        gradient = backend.gradient(features, scale, grad_energy, grad_features, ctx.p, ctx.mapping)
        return gradient, None, None


def distance(
    student: Float[Tensor, "b h w"], teacher: Float[Tensor, "b h w"], *, squared: bool
) -> Float[Tensor, " b"]:
    """How far apart two attention maps are: ||Q_S/||Q_S|| - Q_T/||Q_T||||_2 of each sample, or its square.

    Takes energies in the range that `energy` keeps them in. All norms are L2; a map of zeros stays zero.
    """
    if torch.compiler.is_compiling() or _composed(student, teacher):
        return reference.distance(student, teacher, squared)
    return _Distance.apply(student, teacher, squared)


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(student: Tensor, teacher: Tensor, squared: bool) -> Tensor:
        return _backend(student.unsqueeze(1), 2.0, "sum").distance(student, teacher, squared)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        student, teacher, ctx.squared = inputs
        ctx.save_for_backward(student, teacher)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        student, teacher = ctx.saved_tensors
        plain = _differentiated(student, teacher, grad)
        backend = reference if plain else _backend(student.unsqueeze(1), 2.0, "sum")
        pairs = [(student, teacher), (teacher, student)]
        grads = [
            backend.distance_gradient(*pair, grad, ctx.squared) if needed else None
            for pair, needed in zip(pairs, ctx.needs_input_grad, strict=False)
        ]
        return *grads, None


def _differentiated(*tensors: Tensor | None) -> bool:
    """Whether a gradient in the making is to be differentiated itself: by create_graph, or forwards."""
    return torch.is_grad_enabled() or _composed(*tensors)


def _save(ctx, inputs, output) -> None:
    features, ctx.p, ctx.mapping, _ = inputs
    ctx.save_for_backward(features, output[1])
    ctx.requested = _requested.get()


def _gradient(ctx, grad_energy: Float[Tensor, "b h w"], _grad_scale) -> tuple[Tensor, None, None, None]:
    features, scale = ctx.saved_tensors
    gradient = reference.gradient if _differentiated(features, grad_energy) else energy_gradient
    token = _requested.set(ctx.requested)
    try:
        return gradient(features, scale, grad_energy, None, ctx.p, ctx.mapping), None, None, None
    finally:
        _requested.reset(token)


energy.register_autograd(_gradient, setup_context=_save)
