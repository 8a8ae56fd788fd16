"""The two Python layers that attention transfer needs; others cannot be run from a prototxt alone."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from attention_transfer._reading import parse_json
from attention_transfer.caffe.layers import pieces
from attention_transfer.caffe.layers.base import Layer, register

MODES = ("SUM", "BATCH_SIZE")


@register("Python")
class Python(Layer):
    """AttentionLoss or Normalize, as `attention-transfer caffe build` writes their sources for pycaffe.

    AttentionLoss, {"beta": b}: b / 2 times the sum over samples of ||Y_s - Y_t||_2, each map as one
    vector (the paper's equation 2); with {"normalization": "BATCH_SIZE"} by the batch size. Where both
    maps are equal, the gradient is 0. Like any Python layer it has no loss weight of its own.

    Normalize, {"eps": e}: x / sqrt(sum of squares + eps) over each sample.
    """

    bottoms_expected = (1, 2)
    allows_in_place = False
    known: ClassVar[dict[str, int]] = {"AttentionLoss": 2, "Normalize": 1}  # with the number of bottoms

    def setup(self, *bottoms: Tensor) -> None:
        param = self.spec.python_param
        if param.layer not in self.known:
            named = f"{param.module}.{param.layer}"
            remedy = "Its code is not in the prototxt, and is not loaded from elsewhere."
            raise self.unsupported(f"a Python layer {' or '.join(self.known)}", named, remedy)
        if len(bottoms) != self.known[param.layer]:
            raise self.error(f"{self.known[param.layer]} bottoms for {param.layer}", f"{len(bottoms)}")
        settings = self._settings()
        self.beta, self.eps = settings.pop("beta", 1.0), settings.pop("eps", 1e-10)
        if not all(
            isinstance(number, int | float) and abs(number) < 1e30 for number in (self.beta, self.eps)
        ):
            raise self.error("numbers as beta and eps in param_str", param.param_str)
        self.mode = settings.pop("normalization", "SUM")
        if settings or self.mode not in MODES:
            expected = f"beta, eps and a normalization out of {', '.join(MODES)} in param_str"
            raise self.error(expected, param.param_str)
        if param.layer == "AttentionLoss" and bottoms[0].shape[0] != bottoms[1].shape[0]:
            raise self.error("equal batch sizes", [tuple(x.shape) for x in bottoms])

    def _settings(self) -> dict[str, Any]:
        text = self.spec.python_param.param_str
        try:
            settings = parse_json(text) if text.strip() else {}
        except ValueError:
            settings = None
        if not isinstance(settings, dict):
            raise self.error("a JSON object as param_str", repr(text))
        return settings

    def forward(self, *bottoms: Tensor) -> Tensor:
        if self.spec.python_param.layer == "AttentionLoss":
            return self._loss(*bottoms)
        return pieces.unit(bottoms[0], self.eps)

    def _loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student[0].numel() != teacher[0].numel():
            shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
            raise self.error("maps of as many entries a sample", shapes)
        distances = torch.linalg.vector_norm(student.flatten(1) - teacher.flatten(1), dim=1)
        total = distances.sum() * (self.beta / 2)
        return total / student.shape[0] if self.mode == "BATCH_SIZE" else total
