"""Training: the recipe of a run, the run itself, and the folder that keeps it."""

from __future__ import annotations

from typing import Any

from attention_transfer.training.recipe import Recipe as Recipe
from attention_transfer.training.run import Interrupted as Interrupted
from attention_transfer.training.run import Run as Run

_LATE = {"train": "fit", "resume": "fit", "evaluate_model": "evaluation", "Evaluation": "evaluation"}


def __getattr__(name: str) -> Any:
    """`train` and its company on first use: they need models and data, which `Recipe` and `Run` do not."""
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
