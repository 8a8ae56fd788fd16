"""What each type of solver subtracts from the parameters, and the history that it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attention_transfer._errors import InputError

Tensors = list[Tensor]
Update = Callable[[Any, float, int, Tensors, list[Tensors]], Tensors]

# Each function takes (solver, rate, iteration, gradients, history): `rate` with its multiplier, the gradients
# with weight decay, and of `history` a list of buffers for each slot, which it moves on. It returns what the
# parameters lose.


def _sgd(solver: Any, rate: float, iteration: int, gradients: Tensors, history: list[Tensors]) -> Tensors:
    """h <- rate g + m h; loses h."""
    (momentum,) = history
    torch._foreach_mul_(momentum, solver.momentum)
    torch._foreach_add_(momentum, gradients, alpha=rate)
    return momentum


def _nesterov(
    solver: Any, rate: float, iteration: int, gradients: Tensors, history: list[Tensors]
) -> Tensors:
    """h' = rate g + m h; loses (1 + m) h' - m h."""
    (momentum,) = history
    lost = list(torch._foreach_mul(momentum, -solver.momentum))
    _sgd(solver, rate, iteration, gradients, history)
    torch._foreach_add_(lost, momentum, alpha=1 + solver.momentum)
    return lost


def _adagrad(solver: Any, rate: float, iteration: int, gradients: Tensors, history: list[Tensors]) -> Tensors:
    """h <- h + g^2; loses rate g / (sqrt(h) + delta)."""
    (squares,) = history
    torch._foreach_addcmul_(squares, gradients, gradients)
    return _over_root(gradients, squares, solver.delta, rate)


def _rmsprop(solver: Any, rate: float, iteration: int, gradients: Tensors, history: list[Tensors]) -> Tensors:
    """h <- d h + (1 - d) g^2; loses rate g / (sqrt(h) + delta)."""
    (squares,) = history
    _average_squares(squares, gradients, solver.rms_decay)
    return _over_root(gradients, squares, solver.delta, rate)


def _adadelta(
    solver: Any, rate: float, iteration: int, gradients: Tensors, history: list[Tensors]
) -> Tensors:
    """h <- m h + (1 - m) g^2; u = g sqrt((k + delta) / (h + delta)); k <- m k + (1 - m) u^2; loses rate u."""
    squares, updates = history
    _average_squares(squares, gradients, solver.momentum)
    ratio = list(torch._foreach_add(updates, solver.delta))
    torch._foreach_div_(ratio, torch._foreach_add(squares, solver.delta))
    torch._foreach_sqrt_(ratio)
    torch._foreach_mul_(ratio, gradients)
    _average_squares(updates, ratio, solver.momentum)
    torch._foreach_mul_(ratio, rate)
    return ratio


def _adam(solver: Any, rate: float, iteration: int, gradients: Tensors, history: list[Tensors]) -> Tensors:
    """m <- a m + (1 - a) g; v <- b v + (1 - b) g^2; loses rate c m / (sqrt(v) + delta).

    c = sqrt(1 - b^t) / (1 - a^t).
    """
    first, second = history
    a, b, t = solver.momentum, solver.momentum2, iteration + 1
    torch._foreach_mul_(first, a)
    torch._foreach_add_(first, gradients, alpha=1 - a)
    _average_squares(second, gradients, b)
    return _over_root(first, second, solver.delta, rate * math.sqrt(1 - b**t) / (1 - a**t))


def _average_squares(average: Tensors, values: Tensors, decay: float) -> None:
    torch._foreach_mul_(average, decay)
    torch._foreach_addcmul_(average, values, values, 1 - decay)


def _over_root(values: Tensors, squares: Tensors, delta: float, rate: float) -> Tensors:
    """rate * values / (sqrt(squares) + delta)."""
    root = list(torch._foreach_sqrt(squares))
    torch._foreach_add_(root, delta)
    lost = list(torch._foreach_div(values, root))
    torch._foreach_mul_(lost, rate)
    return lost


UPDATES: dict[str, Update] = {
    "SGD": _sgd,
    "Nesterov": _nesterov,
    "AdaGrad": _adagrad,
    "RMSProp": _rmsprop,
    "AdaDelta": _adadelta,
    "Adam": _adam,
}
SLOTS = {"AdaDelta": 2, "Adam": 2}  # buffers for each blob; one elsewhere
LINEAR = ("SGD", "Nesterov")  # a rate of 0 leaves not only the parameter but its history as it is


def check_type(solver: Any) -> None:
    """Compare the type of a SolverParameter with its momenta, as Caffe does.

    Raises:
        ValueError: if the type is unknown, or a number is out of the range it works with.
    """
    kind = solver.type
    if kind not in UPDATES:
        raise InputError(f"Solver: expected a type out of {', '.join(UPDATES)}, got {kind!r}.")
    if kind in ("AdaGrad", "RMSProp") and solver.momentum:
        raise InputError(
            f"Solver: expected no momentum for the type {kind!r}, which has none, got {solver.momentum:g}. "
            "Remove it."
        )
    decays = {"RMSProp": ("rms_decay",), "AdaDelta": ("momentum",), "Adam": ("momentum", "momentum2")}
    for name in decays.get(kind, ()):
        if not 0 <= (value := getattr(solver, name)) < 1:
            raise InputError(f"Solver: expected 0 <= {name} < 1 for the type {kind!r}, got {value:g}.")
    if solver.regularization_type not in ("L1", "L2"):
        raise InputError(
            f"Solver: expected a regularization_type out of L1, L2, got {solver.regularization_type!r}."
        )


def decay(solver: Any, factor: float, gradients: Tensors, parameters: Tensors) -> None:
    """Add weight decay to the gradients: L2 factor * w, L1 factor * sign(w)."""
    added = parameters if solver.regularization_type == "L2" else list(torch._foreach_sign(parameters))
    torch._foreach_add_(gradients, added, alpha=factor)


def clip(gradients: Tensors, limit: float) -> None:
    """Scale all gradients down together to the L2 norm `limit`, where theirs is larger."""
    norm = torch.linalg.vector_norm(torch.stack(list(torch._foreach_norm(gradients))))
    scale = torch.where(norm > limit, limit / norm, torch.ones_like(norm))
    torch._foreach_mul_(gradients, scale)
