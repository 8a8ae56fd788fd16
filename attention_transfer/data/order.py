"""Random orders of images that keep together what lies together on the disk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """In which stretch of the disk each image of a set lies, and how many stretches may be read at a time."""

    stretch: Int64[Tensor, " n"]
    window: int

    def shuffle(self, generator: torch.Generator) -> tuple[Int64[Tensor, " n"], Layout]:
        """All positions in random order, and the layout with its stretches numbered in that order.

        The stretches are shuffled, then all images within every `window` of them.
        """
        stretches, count = int(self.stretch.max()) + 1, len(self.stretch)
        place = torch.randperm(stretches, generator=generator)[self.stretch]
        order = (place // self.window * count + torch.randperm(count, generator=generator)).argsort()
        return order, Layout(place, self.window)

    def share(self, rows: Int64[Tensor, " b"], rank: int, world_size: int) -> Int64[Tensor, " share"]:
        """Which of a global batch a rank takes: neighbours, so that each rank reads other stretches."""
        return self.stretch[rows].argsort(stable=True).tensor_split(world_size)[rank]
