"""A loss that is infinite or not a number: which batch it came from, and that batch on disk to look at."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from attention_transfer._files import write_atomically

LOOK_EVERY = 50  # steps, where looking at a loss makes a host wait for its device or for other processes
MOST_IN_A_ROW = 10  # batches that may be skipped in a row: after so many it is not the batches


class FirstBad:
    """The first step of an epoch whose loss was not finite, noted on the device without waiting for it."""

    def __init__(self) -> None:
        self._step: Tensor | None = None

    def clear(self) -> None:
        self._step = None

    def note(self, loss: Float[Tensor, ""], step: int) -> None:
        """Take in a step's loss."""
        loss = loss.detach()
        before = torch.full_like(loss, -1, dtype=torch.int64) if self._step is None else self._step
        # guard: first-bad-step
        self._step = torch.where((before < 0) & ~torch.isfinite(loss), step, before)

    def step(self) -> int | None:
        """The first bad step so far; waits for the device."""
        found = -1 if self._step is None else int(self._step)
        return None if found < 0 else found


class SavedBuffers:
    """A model's buffers, BatchNorm's statistics above all, as they were before a step."""

    def __init__(self, model: nn.Module) -> None:
        self._saved = [(buffer, buffer.clone()) for buffer in model.buffers()]

    @torch.no_grad()
    def restore(self) -> None:
        for buffer, value in self._saved:
            buffer.copy_(value)


def parameters_are_finite(model: nn.Module) -> bool:
    """Where they are not, an earlier batch's gradient is to blame, and not the images at hand."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def dump_batch(
    folder: Path,
    images: UInt8[Tensor, "b c h w"],
    labels: Int64[Tensor, " b"],
    rows: Int64[Tensor, " b"],
    facts: dict[str, Any],
) -> Path:
    """Write a batch as batch.json (positions among the training images, labels, facts) and images.png.

    Raises:
        OSError: if it cannot be written.
    """
    from torchvision.utils import make_grid, save_image

    folder.mkdir(parents=True, exist_ok=True)
    batch = {**facts, "images": rows.tolist(), "labels": labels.tolist()}
    write_atomically(folder / "batch.json", json.dumps(_plain(batch), indent=2) + "\n")
    columns = math.ceil(math.sqrt(len(images)))
    grid = make_grid(images.float() / 255, nrow=columns)
    write_atomically(folder / "images.png", lambda file: save_image(grid, file, format="png"))
    return folder


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no infinities: numbers that are not finite as text."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
