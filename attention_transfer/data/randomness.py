"""Random draws that depend on named numbers and on nothing else."""

from __future__ import annotations

import numpy as np
import torch


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream is a pure function of the non-negative integers in `key`.

    The numbers are mixed, not added: (seed 0, epoch 1) and (seed 1, epoch 0) are unrelated streams.

    Raises:
        ValueError: if a number is negative.
    """
    if any(number < 0 for number in key):
        raise ValueError(f"keyed_generator: expected non-negative integers, got {key}. Choose a seed >= 0.")
    state = np.random.SeedSequence(key).generate_state(1, dtype=np.uint32)
    return torch.Generator().manual_seed(int(state[0]))
