"""The logits in what a model returns: a tensor, an object with `.logits`, a tuple led by them, or a dict."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Bool, Float
from torch import Tensor


def find_logits(output: object, *, dense: bool = False) -> Float[Tensor, "b k ..."] | None:
    """The logits (b, k), or None if there are none; if `dense`, those of each pixel (b, k, h, w) too.

    In a dict they are under "logits" or, as torchvision's segmentation models have it, under "out".
    """
    if isinstance(output, Mapping):
        output = output.get("logits", output.get("out"))
    elif isinstance(output, tuple | list) and output and not hasattr(output, "logits"):
        output = output[0]
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        return None
    return logits if logits.ndim == 2 or (dense and logits.ndim == 4) else None


def check_finite(finite: Bool[Tensor, " n"], *, user: str, model: str) -> None:
    """Make sure that all images have finite logits, as said of each: of NaN the largest is still some class.

    Raises:
        ValueError: if they have not, on behalf of `user`.
    """
    bad = (~finite).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{user}: expected finite logits from {model}, got NaN or infinite ones for {len(bad):,} of "
            f"{len(finite):,} images, the first of which is number {bad[0] + 1:,}. Look at the weights, "
            "and at these images: such logits tell no class."
        )


def logits_of(output: object, *, user: str, dense: bool = False) -> Float[Tensor, "b k ..."]:
    """The logits in an output, as `find_logits` finds them, on behalf of `user`.

    Raises:
        ValueError: if there are none.
    """
    logits = find_logits(output, dense=dense)
    if logits is None:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        wanted = "(b, k) or (b, k, h, w)" if dense else "(b, k)"
        raise ValueError(
            f"{user}: expected a model that gives logits {wanted}, got {got}. Give a classifier."
        )
    return logits
