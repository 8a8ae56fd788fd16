"""Caffe's layers as modules, one class a type, made by `new_layer`."""

from __future__ import annotations

from typing import Any

from attention_transfer._hints import did_you_mean
from attention_transfer.caffe.layers import (
    activation,
    arithmetic,
    convolution,
    data,
    forks,
    loss,
    normalization,
    pieces,
    pooling,
    python,
    score,
    shape,
)
from attention_transfer.caffe.layers.base import REGISTRY, Layer

__all__ = [
    "FORKS", "REGISTRY", "Layer", "Unknown", "activation", "arithmetic", "convolution", "count_blobs", "data",
    "forks", "loss", "new_layer", "normalization", "pieces", "pooling", "python", "score", "shape",
]  # fmt: skip


# What Caffe has besides: BVLC's, then the SSD fork's own.
CAFFES_OWN = {
    "BatchReindex", "ContrastiveLoss", "Embed", "Filter", "Im2col", "InfogainLoss", "LSTM", "LSTMUnit",
    "MultinomialLogisticLoss", "RNN", "SPP",
}  # fmt: skip
SSDS_OWN = {
    "AnnotatedData", "DetectionEvaluate", "DetectionOutput", "MultiBoxLoss", "PriorBox", "SmoothL1Loss",
    "VideoData",
}  # fmt: skip


# What other forks have, and whose layer it is.
FORKS = {
    "Axpy": "SENet's",
    "BN": "PSPNet's and SegNet's, two of one name",
    "ConvolutionDepthwise": "of forks for depthwise convolutions",
    "DepthwiseConvolution": "of forks for depthwise convolutions",
    "Interp": "DeepLab's and PSPNet's",
    "ReLU6": "of MobileNet's forks",
}


class Unknown(Layer):
    """Stands for a layer of a type that this package does not run."""

    bottoms_expected = (0, None)
    tops_expected = (0, None)

    @classmethod
    def count_blobs(cls, spec: Any) -> int:
        """Those of a depthwise convolution of some fork, or of Embed; else 0, as nothing tells."""
        if spec.type == "Embed":
            return 1 + spec.embed_param.bias_term
        return 1 + spec.convolution_param.bias_term if spec.HasField("convolution_param") else 0


def count_blobs(spec: Any) -> int:
    """The number of a layer's blobs, from its message alone."""
    return REGISTRY.get(spec.type, Unknown).count_blobs(spec)


def new_layer(spec: Any, *, train_phase: bool) -> Layer:
    """The layer of a LayerParameter.

    Raises:
        ValueError: if this package does not run its type; the message lists near matches.
    """
    if spec.type in REGISTRY:
        return REGISTRY[spec.type](spec, train_phase=train_phase)
    unknown, expected = Unknown(spec, train_phase=train_phase), "a type that this package runs"
    if spec.type in CAFFES_OWN | SSDS_OWN:
        whose = "Caffe" if spec.type in CAFFES_OWN else "the SSD fork of Caffe"
        raise unknown.unsupported(expected, f"{spec.type!r}, which {whose} alone runs")
    hint = did_you_mean(spec.type, REGISTRY) or f"Known: {', '.join(sorted(REGISTRY))}."
    raise unknown.error(expected, repr(spec.type), hint)
