"""The size of a model's images: most networks take any, vision transformers that which they are built for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

USUAL = (224, 224)  # of weights that say nothing: ImageNet's


def native_size(model: nn.Module) -> tuple[int, int]:
    """(height, width) of the images that a library's model is built for, as far as it says so."""
    own = getattr(model, "pretrained_cfg", None) or {}
    if "input_size" in own:
        height, width = own["input_size"][1:]
        return height, width
    size = getattr(model, "image_size", None)  # torchvision's vision transformers
    return (size, size) if isinstance(size, int) else USUAL


def options_for(
    build: Callable[..., nn.Module], argument: str, size: tuple[int, int], *, as_pair: bool = False
) -> dict[str, Any]:
    """{argument: size} if a model takes RGB images of that size when built with it, and not without; else {}.

    It is tried on the meta device, where nothing is computed.
    """
    square = size[0] if size[0] == size[1] and not as_pair else size
    tried: list[dict[str, Any]] = [{}, {argument: square}]
    return next((options for options in tried if _takes(lambda: build(**options), size)), {})  # noqa: B023


def _takes(build: Callable[[], nn.Module], size: tuple[int, int]) -> bool:
    try:
        with torch.device("meta"), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            build().eval()(torch.zeros(1, 3, *size))
    except Exception:  # what the library says of an argument or size that it does not take
        return False
    return True
