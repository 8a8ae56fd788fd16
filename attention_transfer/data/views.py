"""Fixed augmented views: the same few crops and flips of every image, whoever trains on them, and when."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from .._errors import InputError
from .randomness import keyed_words


@dataclass(frozen=True)
class Views:
    """`count` augmented views of each image of a data set.

    View v of the image at position i is a pure function of (seed, i, v): not of the number of images, nor of
    their order, the batch, the process or the device.

    Raises:
        ValueError: if count < 1 or seed < 0.
    """

    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or self.seed < 0:
            raise InputError(
                f"Views: expected count >= 1 and seed >= 0, got {self.count} and {self.seed}. "
                "Pass a number of views, such as 4."
            )

    def of_epoch(self, epoch: int) -> int:
        """The view that all images show in an epoch: they take turns."""
        return epoch % self.count

    def draw(
        self, rows: Int64[Tensor, " b"], view: int, pad: int, *, flip: bool
    ) -> tuple[Int64[Tensor, "2 b"], Bool[Tensor, " b"]]:
        """The shifts in [-pad, pad], rows then columns, and the flips of a view of the images at `rows`."""
        words = torch.from_numpy((keyed_words(rows.cpu(), 3, self.seed, view) >> 1).astype("int64"))
        return words[:, :2].T % (2 * pad + 1) - pad, (words[:, 2] % 2 == 1) & flip
