"""The learning rate of each iteration: Caffe's `lr_policy`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Number = type[np.float32] | type[np.float64]  # the net's precision, in which Caffe computes

# What each policy needs beside base_lr: it means nothing, or divides by zero, without.
NEEDED = {
    "fixed": (),
    "step": ("gamma", "stepsize"),
    "exp": ("gamma",),
    "inv": ("gamma", "power"),
    "multistep": ("gamma", "stepvalue"),
    "poly": ("power", "max_iter"),
    "sigmoid": ("gamma",),
}


def check_policy(solver: Any) -> None:
    """Compare `lr_policy` of a SolverParameter with the fields that it needs.

    Raises:
        ValueError: if the policy is unknown, or one of its fields is missing or unusable.
    """
    policy = solver.lr_policy
    if policy == "plateau":
        raise ValueError(
            "Solver: expected an lr_policy that depends on the iteration alone, got 'plateau', of the SSD "
            "fork. Name the iterations yourself: lr_policy 'multistep' with stepvalue."
        )
    if policy not in NEEDED:
        got = repr(policy) if policy else "none"
        raise ValueError(f"Solver: expected an lr_policy out of {', '.join(NEEDED)}, got {got}.")
    if not solver.HasField("base_lr") or not np.isfinite(solver.base_lr):
        got = solver.base_lr if solver.HasField("base_lr") else "none"
        raise ValueError(f"Solver: expected a base_lr, got {got}. Write for example `base_lr: 0.1`.")
    for name in NEEDED[policy]:
        if not _is_given(solver, name):
            got = getattr(solver, name) if name in ("stepsize", "max_iter") else "none"
            raise ValueError(
                f"Solver: expected {_wanted(name)} for the lr_policy {policy!r}, got {got or 'none'}."
            )


def _is_given(solver: Any, name: str) -> bool:
    if name in ("stepsize", "max_iter"):
        return getattr(solver, name) >= 1
    return bool(solver.stepvalue) if name == "stepvalue" else solver.HasField(name)


def _wanted(name: str) -> str:
    return {"stepsize": "a stepsize of 1 or more", "max_iter": "a max_iter of 1 or more"}.get(
        name, f"a {name}"
    )


def next_step(solver: Any, iteration: int, step: int) -> int:
    """How many steps of `step` and `multistep` are passed at `iteration`, if `step` were before.

    At most one step of `multistep` is passed in an iteration.
    """
    if solver.lr_policy == "step":
        return iteration // solver.stepsize
    if solver.lr_policy == "multistep":
        return step + (step < len(solver.stepvalue) and iteration >= solver.stepvalue[step])
    return step


def learning_rate(solver: Any, iteration: int, step: int, number: Number) -> float:
    """The learning rate of `iteration`, after `step` steps, in the precision `number`."""
    with np.errstate(all="ignore"):  # a power may overflow to infinity, as in Caffe
        factor = _FACTORS[solver.lr_policy](solver, iteration, step, number)
        return float(number(np.float64(solver.base_lr) * np.float64(factor)))


def _power_of_gamma(solver: Any, exponent: int) -> Any:
    return np.float64(solver.gamma) ** exponent  # C++ takes a float to the power of an int in doubles


def _inv(solver: Any, iteration: int, step: int, number: Number) -> Any:
    product = np.float32(solver.gamma) * np.float32(iteration)  # a float times an int is a float
    return (number(1) + number(product)) ** number(-solver.power)


def _poly(solver: Any, iteration: int, step: int, number: Number) -> Any:
    return (number(1) - number(iteration) / number(solver.max_iter)) ** number(solver.power)


def _sigmoid(solver: Any, iteration: int, step: int, number: Number) -> Any:
    return number(1) / (
        number(1) + np.exp(-number(solver.gamma) * (number(iteration) - number(solver.stepsize)))
    )


_FACTORS: dict[str, Callable[[Any, int, int, Number], Any]] = {
    "fixed": lambda solver, iteration, step, number: 1.0,
    "step": lambda solver, iteration, step, number: _power_of_gamma(solver, step),
    "exp": lambda solver, iteration, step, number: _power_of_gamma(solver, iteration),
    "inv": _inv,
    "multistep": lambda solver, iteration, step, number: _power_of_gamma(solver, step),
    "poly": _poly,
    "sigmoid": _sigmoid,
}
