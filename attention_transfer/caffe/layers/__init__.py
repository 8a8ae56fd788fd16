"""Caffe's layers as modules, one class a type, found by `layer_class`."""

from __future__ import annotations

from attention_transfer._hints import did_you_mean
from attention_transfer.caffe.layers import (
    activation,
    arithmetic,
    convolution,
    data,
    loss,
    normalization,
    pooling,
    python,
    score,
    shape,
)
from attention_transfer.caffe.layers.base import REGISTRY, Layer

__all__ = [
    "REGISTRY", "Layer", "activation", "arithmetic", "convolution", "data", "layer_class", "loss",
    "normalization", "pooling", "python", "score", "shape",
]  # fmt: skip


def layer_class(kind: str, name: str) -> type[Layer]:
    """The class of a Caffe layer type, asked for by the layer `name`.

    Raises:
        ValueError: if this package does not run the type; the message lists near matches.
    """
    if kind not in REGISTRY:
        hint = did_you_mean(kind, REGISTRY) or f"Known: {', '.join(sorted(REGISTRY))}."
        raise ValueError(f"Net: layer {name!r}: expected a type that this package runs, got {kind!r}. {hint}")
    return REGISTRY[kind]
