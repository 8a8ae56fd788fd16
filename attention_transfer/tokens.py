"""What a model says of its own tokens: the grid of its patches, what stands around them, and their order.

timm's models say it by `feature_info` and `num_prefix_tokens`, those of Hugging Face by their config, and the
Hiera of either by `reroll`, which undoes the order in which it keeps its tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Tokens:
    """What the nearest module around a layer says of the tokens in it.

    Attributes:
        by: the class of that module.
        strides: (vertical, horizontal) pixels from patch to patch, of each of its stages.
        prefix: how many tokens stand in front of the patches, in its blocks; None if it does not say.
        suffix: how many stand behind them.
    """

    by: str
    strides: Sequence[tuple[int, int]]
    prefix: int | None = None
    suffix: int = 0

    def grids(self, input_hw: tuple[int, int]) -> list[tuple[int, int]]:
        """The (h, w) that its stages may have: what does not fill a patch is cut off or padded."""
        (height, width), strides = input_hw, self.strides
        cut = [(height // y, width // x) for y, x in strides]
        padded = [(-(-height // y), -(-width // x)) for y, x in strides]
        return [grid for grid in dict.fromkeys([*cut, *padded]) if math.prod(grid)]


def tokens_around(path: Sequence[nn.Module]) -> Tokens | None:
    """What is said by the nearest of the modules on the path from the root to a layer; None if none does."""
    return next(filter(None, (_of_timm(module) or _of_config(module) for module in reversed(path))), None)


def rolled(path: Sequence[nn.Module], n: int) -> tuple[tuple[int, int], Int[Tensor, " n"]] | None:
    """The grid of a layer in a Hiera with `n` tokens, and in row-major order the number of each one.

    None for any other layer.
    """
    for owner, child in itertools.pairwise(path):
        reroll = getattr(owner, "reroll", None)
        schedule = getattr(reroll, "schedule", None) or getattr(owner, "schedule", None)
        inside = child in (getattr(owner, "blocks", None), getattr(owner, "stages", None))
        if inside and callable(reroll) and isinstance(schedule, Mapping):
            for place, (_, size) in schedule.items():
                if math.prod(size) == n and len(size) == 2:
                    numbers = reroll(torch.arange(n, device="cpu").view(1, n, 1), place)
                    return (size[0], size[1]), numbers.flatten()
    return None


def _of_timm(module: nn.Module) -> Tokens | None:
    infos = getattr(module, "feature_info", None)
    infos = getattr(infos, "info", infos)
    if not isinstance(infos, Sequence) or not all(isinstance(info, Mapping) for info in infos):
        return None
    strides = [_pair(info["reduction"]) for info in infos if _is_size(info.get("reduction"))]
    prefix = getattr(module, "num_prefix_tokens", None)
    if not strides:
        return None
    return Tokens(
        type(module).__name__, list(dict.fromkeys(strides)), prefix if isinstance(prefix, int) else None
    )


def _of_config(module: nn.Module) -> Tokens | None:
    config = getattr(module, "config", None)
    patch = getattr(config, "patch_stride", None) or getattr(config, "patch_size", None)
    if not _is_size(patch) or getattr(config, "backbone_config", None) is not None:
        return None
    y, x = _pair(patch)
    depths = getattr(config, "depths", None)
    halvings = range(len(depths) if isinstance(depths, Sequence) else 1)
    suffix = getattr(config, "num_detection_tokens", 0)
    return Tokens(type(module).__name__, [(y << i, x << i) for i in halvings], suffix=suffix)


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, Sequence) and len(value) == 2 else [value]
    return all(isinstance(side, int) and side > 0 for side in sides)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
