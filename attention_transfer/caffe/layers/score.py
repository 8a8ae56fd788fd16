"""Softmax, and what is measured of a prediction: Accuracy and ArgMax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_transfer.caffe.layers.base import Layer, register
from attention_transfer.caffe.layers.loss import labelled


@register("Softmax")
class Softmax(Layer):
    """e^x by its sum along an axis."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(x, self.axis(self.spec.softmax_param.axis, x))


@register("Accuracy")
class Accuracy(Layer):
    """The share of labels among the top_k largest scores; a second top has it for each class.

    Of equal scores, the higher class ranks first.
    """

    bottoms_expected = (2, 2)
    tops_expected = (1, 2)
    allows_in_place = False

    def setup(self, x: Tensor, label: Tensor) -> None:
        param = self.spec.accuracy_param
        self.class_axis = self.axis(param.axis, x)
        if not 1 <= param.top_k <= x.shape[self.class_axis]:
            raise self.error(f"top_k from 1 to {x.shape[self.class_axis]}", param.top_k)

    def freeze(self, force_backward: bool) -> None:
        if force_backward and self.train_phase:
            remedy = "Caffe aborts in the first backward pass. Include the layer in the phase TEST only."
            raise self.error("a net without force_backward", "one with it", remedy)
        super().freeze(force_backward)

    @torch.no_grad()
    def forward(self, x: Tensor, label: Tensor) -> Tensor | tuple[Tensor, ...]:
        param = self.spec.accuracy_param
        scores, labels = labelled(self, x, label, self.class_axis)
        counted = torch.ones_like(labels, dtype=torch.bool)
        if param.HasField("ignore_label"):
            counted = labels != param.ignore_label
        inside = labels.clamp(0, scores.shape[1] - 1)  # an ignored label may lie outside
        own = scores.gather(1, inside[:, None])
        classes = torch.arange(scores.shape[1], device=x.device)
        ahead = (scores > own) | ((scores == own) & (classes > inside[:, None]))
        correct = ((ahead.sum(1) < param.top_k) & counted).to(x.dtype)
        accuracy = correct.sum() / counted.sum()
        if len(self.tops) == 1:
            return accuracy
        of_class = (
            F.one_hot(inside, scores.shape[1]).to(x.dtype) if not x.is_meta else torch.zeros_like(scores)
        )
        members = (of_class * counted[:, None]).sum(0)
        return accuracy, (of_class * correct[:, None]).sum(0) / members.clamp(min=1)


@register("ArgMax")
class ArgMax(Layer):
    """The places of the top_k largest values, or the values, along an axis or in each whole sample.

    Of equal values, the higher place comes first.
    """

    allows_in_place = False

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        param = self.spec.argmax_param
        axis = self.axis(param.axis, x) if param.HasField("axis") else None
        vectors = x.flatten(1) if axis is None else x.movedim(axis, -1)
        if not 1 <= param.top_k <= vectors.shape[-1]:
            raise self.error(f"top_k from 1 to {vectors.shape[-1]}", param.top_k)
        values, places = vectors.flip(-1).sort(dim=-1, descending=True, stable=True)
        values, places = values[..., : param.top_k], vectors.shape[-1] - 1 - places[..., : param.top_k]
        places = places.to(x.dtype)
        if axis is not None:
            return (values if param.out_max_val else places).movedim(-1, axis)
        found = torch.stack((places, values), 1) if param.out_max_val else places[:, None]
        return found.reshape(*found.shape, *[1] * (x.dim() - 3))
