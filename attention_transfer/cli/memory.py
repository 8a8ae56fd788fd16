"""The switch for freed memory, which the verbs that run models over many images share."""

from __future__ import annotations

from typing import Any

from attention_transfer._memory import keep_freed_memory
from attention_transfer.runs.recipe import Recipe


def add_memory_flag(parser: Any) -> None:
    """`--keep-memory`, whose value is for `govern_memory`."""
    parser.add_argument(
        "--keep-memory",
        type=bool,
        default=True,
        help="On a CPU, keep freed memory for the next step, which is faster; false gives it back to the "
        "system each time. Your own MALLOC_ settings and allocator are left alone. Linux with glibc only.",
    )


def govern_memory(recipe: Recipe, *, keep: bool) -> None:
    """Keep freed memory from now on, if that is wanted and the recipe trains on a CPU."""
    from attention_transfer.training.speed import device_of

    if keep and device_of(recipe) == "cpu":
        keep_freed_memory()
