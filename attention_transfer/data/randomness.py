"""Random draws that depend on named numbers and on nothing else."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int64, UInt64
from torch import Tensor

from attention_transfer._errors import InputError

GOLDEN = 0x9E3779B97F4A7C15


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream is a pure function of the non-negative integers in `key`.

    The numbers are mixed, not added: (seed 0, epoch 1) and (seed 1, epoch 0) are unrelated streams.

    Raises:
        ValueError: if a number is negative.
    """
    _check_key("keyed_generator", key)
    state = np.random.SeedSequence(key).generate_state(1, dtype=np.uint32)
    return torch.Generator().manual_seed(int(state[0]))


def keyed_words(rows: Int64[Tensor, " n"], count: int, *key: int) -> UInt64[np.ndarray, "n count"]:
    """`count` random words for each row; word j of row i is a pure function of (key, i, j).

    They stand at the places i * count + j of a SplitMix64 stream (Steele, Lea & Flood, OOPSLA 2014), which
    can be read anywhere: no word depends on how many rows there are, or on which others are asked for.

    Raises:
        ValueError: if a number of the key is negative.
    """
    _check_key("keyed_words", key)
    start = np.random.SeedSequence(key).generate_state(1, dtype=np.uint64)
    first = rows.numpy().astype(np.uint64)[:, None] * np.uint64(count)
    return _mix(start + (first + np.arange(1, count + 1, dtype=np.uint64)) * np.uint64(GOLDEN))


def _mix(word: UInt64[np.ndarray, "n m"]) -> UInt64[np.ndarray, "n m"]:
    """SplitMix64's output function."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def _check_key(user: str, key: tuple[int, ...]) -> None:
    if any(number < 0 for number in key):
        raise InputError(f"{user}: expected non-negative integers, got {key}. Choose a seed >= 0.")
