"""The logits in what a model returns: a tensor, an object with `.logits`, a tuple with them, or a dict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from attention_transfer._errors import InputError

Place = int | str | Callable[[Any], Any]
"""Where logits are in an output: an index, a key, the name of an attribute, or a function of the output."""


def find_logits(
    output: object, *, dense: bool | None = False, place: Place | None = None
) -> Float[Tensor, "b k ..."] | None:
    """The logits (b, k), or None if there are none.

    Without a `place` they are the output itself or its `.logits`, of a tuple or list the first such entry,
    and in a dict under "logits" or, as torchvision's segmentation models have it, under "out"; and a dict's
    "last_hidden_state" of two axes.

    Args:
        dense: True: those of each pixel (b, k, h, w), or else (b, k); None: the other way round.
        place: where they are, if they are not where they are looked for.
    """
    kinds = {False: [2], True: [4, 2], None: [2, 4]}[dense]
    entries = [output] if place is None else [_at(output, place)]
    if place is None and isinstance(output, Mapping):
        entries = [output.get("logits", output.get("out", _answers_of_state(output)))]
    elif place is None and isinstance(output, tuple | list) and not hasattr(output, "logits"):
        entries = list(output)
    tensors = [getattr(entry, "logits", entry) for entry in entries]
    found = [each for each in tensors if isinstance(each, Tensor) and each.is_floating_point()]
    return next((each for kind in kinds for each in found if each.ndim == kind), None)


def _answers_of_state(output: Mapping[str, Any]) -> Any:
    """What Hugging Face's PP-LCNet calls its last state is, as no state is, (b, k)."""
    state = output.get("last_hidden_state")
    return state if isinstance(state, Tensor) and state.ndim == 2 else None


def _at(output: Any, place: Place) -> Any:
    try:
        if callable(place):
            return place(output)
        if isinstance(place, str) and not isinstance(output, Mapping):
            return getattr(output, place)
        return output[place]
    except (LookupError, AttributeError, TypeError):
        return None


def rivals(output: object, logits: Tensor) -> list[tuple[int, int]]:
    """What else in a tuple or list could be its logits: (index, width) of tensors with as many axes."""
    if not isinstance(output, tuple | list) or hasattr(output, "logits"):
        return []
    return [
        (index, entry.shape[1])
        for index, entry in enumerate(output)
        if isinstance(entry, Tensor) and entry.is_floating_point() and entry.ndim == logits.ndim
        if entry is not logits
    ]


def check_finite(finite: Bool[Tensor, " n"], *, user: str, model: str) -> None:
    """Make sure that all images have finite logits, as said of each: of NaN the largest is still some class.

    Raises:
        ValueError: if they have not, on behalf of `user`.
    """
    bad = (~finite).nonzero().flatten().tolist()
    if bad:
        raise InputError(
            f"{user}: expected finite logits from {model}, got NaN or infinite ones for {len(bad):,} of "
            f"{len(finite):,} images, the first of which is number {bad[0] + 1:,}. Look at the weights, "
            "and at these images: such logits tell no class."
        )


def logits_of(
    output: object,
    *,
    user: str,
    dense: bool | None = False,
    place: Place | None = None,
    remedy: str = 'Let it return them alone, in a tuple, or in a dict as "logits".',
) -> Float[Tensor, "b k ..."]:
    """The logits in an output, as `find_logits` finds them, on behalf of `user`.

    Raises:
        ValueError: if there are none.
    """
    logits = find_logits(output, dense=dense, place=place)
    if logits is None:
        wanted = "(b, k)" if dense is False else "(b, k) or (b, k, h, w)"
        wanted += "" if place is None else f" at {place!r}"
        raise InputError(
            f"{user}: expected a model that gives logits {wanted}, got {_contents(output)}. {remedy}"
        )
    return logits


def _contents(output: object) -> str:
    if isinstance(output, Tensor):
        return str(tuple(output.shape))
    kind = type(output).__name__
    if isinstance(output, Mapping):
        return f"{kind} of {', '.join(f'{key!r} {_contents(entry)}' for key, entry in output.items())}"
    if isinstance(output, tuple | list):
        return f"{kind} of [{', '.join(map(_contents, output))}]"
    return kind
