"""The logits in what a model returns: a tensor, an object with `.logits`, or a tuple led by them."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def find_logits(output: object) -> Float[Tensor, "b k"] | None:
    """The logits (b, k), or None if there are none."""
    if isinstance(output, tuple | list) and output and not hasattr(output, "logits"):
        output = output[0]
    logits = getattr(output, "logits", output)
    return logits if isinstance(logits, Tensor) and logits.ndim == 2 else None


def logits_of(output: object, *, user: str) -> Float[Tensor, "b k"]:
    """The logits (b, k) in an output, on behalf of `user`.

    Raises:
        ValueError: if there are none.
    """
    logits = find_logits(output)
    if logits is None:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"{user}: expected a model that gives logits (b, k), got {got}. Give a classifier.")
    return logits
