"""Images that a model cannot take, and how many channels those have that it can."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from ._reading import one_line
from ._untouched import untouched


def why_not(model: nn.Module, shape: Sequence[int]) -> str | None:
    """What a model says of an image (c, h, w) that it cannot take; None if it can. It stays as it is."""
    like = next(model.parameters(), torch.empty(0))
    try:
        with torch.no_grad(), untouched(model, training=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(torch.zeros(1, *shape).to(like))
    except Exception as error:  # of the model's own code, which may say it in any way
        return one_line(error)[:160].rstrip(". ")
    return None


def channels_instead(model: nn.Module, shape: Sequence[int]) -> int | None:
    """How many channels a model takes that fails on images (c, h, w); None if it is not they that it minds.

    Its first convolution tells it, and the model must run on such images.
    """
    told = next((each.in_channels for each in model.modules() if isinstance(each, nn.Conv2d)), 0)
    if told in (0, shape[0]) or why_not(model, (told, *shape[1:])):
        return None
    return told


def wrong_channels(model: nn.Module, shape: Sequence[int], *, user: str, role: str) -> str | None:
    """What is said where a model fails on images (c, h, w) for their channels; None if it is not that."""
    wanted, got = channels_instead(model, shape), shape[0]
    if wanted is None:
        return None
    how = f"x.expand(-1, {wanted}, -1, -1)" if got == 1 else f"x[:, :{wanted}]" if wanted < got else "others"
    return (
        f"{user}: expected images of {wanted} channels, as the {role} takes, got {got}. "
        f"Pass {how}, or build the {role} with in_channels={got}."
    )
