"""Choosing rows by seed, class by class."""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from .randomness import keyed_generator


def stratified_split(
    labels: Int64[Tensor, " n"], fraction: float, *key: int
) -> tuple[Int64[Tensor, " kept"], Int64[Tensor, " taken"]]:
    """Take round(fraction * n) rows, the same share of every class; both parts come back ascending."""
    shuffled, rank = _rank_within_class(labels, *key)
    share = (rank + 0.5) / labels.bincount()[labels[shuffled]]
    chosen = shuffled[share.argsort(stable=True)]
    count = round(fraction * len(labels))
    return chosen[count:].sort().values, chosen[:count].sort().values


def balanced_subset(labels: Int64[Tensor, " n"], count: int, *key: int) -> Int64[Tensor, " count"]:
    """Rows of `count` images, equally many of every class as far as there are; ascending.

    A smaller subset by the same key lies within a larger one.
    """
    shuffled, rank = _rank_within_class(labels, *key)
    return shuffled[rank.argsort(stable=True)][:count].sort().values


def _rank_within_class(
    labels: Int64[Tensor, " n"], *key: int
) -> tuple[Int64[Tensor, " n"], Float64[Tensor, " n"]]:
    """Rows in random order, and for each how many of its own class stand before it."""
    shuffled = torch.randperm(len(labels), generator=keyed_generator(*key))
    by_class = labels[shuffled].argsort(stable=True)
    counts = labels.bincount()
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    rank = torch.empty(len(labels), dtype=torch.float64)
    rank[by_class] = (torch.arange(len(labels)) - first).double()
    return shuffled, rank
