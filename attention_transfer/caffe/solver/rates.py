"""The learning rate of each iteration: Caffe's `lr_policy`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from attention_transfer._errors import InputError

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
    "plateau": ("gamma", "plateau_winsize"),  # of the SSD fork
}
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Progress:
    """How far down a learning rate is.

    Attributes:
        step: the steps that were passed, of `step`, `multistep` and `plateau`.
        minimum_loss: the smallest smoothed loss so far, of `plateau`.
        last_event: the iteration of that, or of a step after it.
    """

    step: int = 0
    minimum_loss: float = LARGEST
    last_event: int = 0


def check_policy(solver: Any) -> None:
    """Compare `lr_policy` of a SolverParameter with the fields that it needs.

    Raises:
        ValueError: if the policy is unknown, or one of its fields is missing or unusable.
    """
    policy = solver.lr_policy
    if policy not in NEEDED:
        got = repr(policy) if policy else "none"
        raise InputError(f"Solver: expected an lr_policy out of {', '.join(NEEDED)}, got {got}.")
    if not solver.HasField("base_lr") or not np.isfinite(solver.base_lr):
        got = solver.base_lr if solver.HasField("base_lr") else "none"
        raise InputError(f"Solver: expected a base_lr, got {got}. Write for example `base_lr: 0.1`.")
    for name in NEEDED[policy]:
        if not _is_given(solver, name):
            got = getattr(solver, name) if name in ("stepsize", "max_iter") else "none"
            raise InputError(
                f"Solver: expected {_wanted(name)} for the lr_policy {policy!r}, got {got or 'none'}."
            )


def _is_given(solver: Any, name: str) -> bool:
    if name in ("stepsize", "max_iter"):
        return getattr(solver, name) >= 1
    if name in ("stepvalue", "plateau_winsize"):
        return bool(getattr(solver, name))
    return solver.HasField(name)


def _wanted(name: str) -> str:
    return {"stepsize": "a stepsize of 1 or more", "max_iter": "a max_iter of 1 or more"}.get(
        name, f"a {name}"
    )


def advance(solver: Any, iteration: int, before: Progress, smoothed_loss: Callable[[], float]) -> Progress:
    """How far down the learning rate is at `iteration`, if it were `before`.

    At most one step of `multistep` and `plateau` is passed in an iteration. A step of `plateau` is passed
    when neither the loss fell to a new minimum nor a step was passed for `plateau_winsize` iterations.
    """
    step = before.step
    if solver.lr_policy == "step":
        return Progress(iteration // solver.stepsize)
    if solver.lr_policy == "multistep":
        passed = step < len(solver.stepvalue) and iteration >= solver.stepvalue[step]
        return Progress(step + passed)
    if solver.lr_policy != "plateau":
        return before
    loss, minimum, last = smoothed_loss(), before.minimum_loss, before.last_event
    if loss < minimum:
        minimum, last = loss, iteration
    if step < len(solver.plateau_winsize) and iteration >= last + solver.plateau_winsize[step]:
        step, last = step + 1, iteration
    return Progress(step, minimum, last)


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
    "plateau": lambda solver, iteration, step, number: _power_of_gamma(solver, step),
    "poly": _poly,
    "sigmoid": _sigmoid,
}
