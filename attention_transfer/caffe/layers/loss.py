"""Layers whose top is a loss, with the loss weight 1 unless the net says otherwise."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_transfer.caffe.layers.base import Layer, register

SMALLEST = torch.finfo(torch.float32).tiny  # probabilities below it count as it, in every precision
FULL, VALID, BATCH_SIZE, NONE = 0, 1, 2, 3


class Loss(Layer):
    """A loss of what the net says, bottom 0, and of what is true, bottom 1, which gets no gradient."""

    bottoms_expected = (2, 2)
    tops_expected = (0, 1)
    allows_in_place = False

    def accepts_gradient(self, bottom: int) -> bool:
        return bottom != 1

    def normaliser(self, mode: int, outer: int, entries: int, counted: Tensor | None) -> Tensor | float:
        """What a sum of losses is divided by.

        Args:
            mode: a NormalizationMode.
            outer: the number of samples; entries: of labels.
            counted: which labels are not ignored; None without an ignore_label.
        """
        if mode == VALID and counted is not None:
            return counted.sum().clamp(min=1)
        return max({FULL: entries, VALID: entries, BATCH_SIZE: outer, NONE: 1}[mode], 1)


@register("EuclideanLoss")
class EuclideanLoss(Loss):
    """Half the sum of squared differences, by the batch size; the shapes need equal counts only."""

    def accepts_gradient(self, bottom: int) -> bool:
        return True

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape[:1] != y.shape[:1] or x.numel() != y.numel():
            raise self.error("bottoms of as many entries a sample", f"{tuple(x.shape)} and {tuple(y.shape)}")
        difference = x.flatten() - y.flatten()
        return difference.dot(difference) / (2 * x.shape[0])


@register("HingeLoss")
class HingeLoss(Loss):
    """Sum of margins max(0, 1 - x) of the true class and max(0, 1 + x) of the others, by the batch size."""

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        scores = x.flatten(1)
        truth = F.one_hot(label.flatten().long(), scores.shape[1]).bool() if not x.is_meta else scores > 0
        margins = F.relu(1 + torch.where(truth, -scores, scores))
        is_l2 = self.spec.hinge_loss_param.norm == self.spec.hinge_loss_param.L2
        return (margins.square() if is_l2 else margins).sum() / x.shape[0]


@register("SigmoidCrossEntropyLoss")
class SigmoidCrossEntropyLoss(Loss):
    """Cross-entropy of each entry with its target; by default the sum by the batch size.

    An entry is ignored if its target, cut to an integer, is the ignore_label.
    """

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        param = self.spec.loss_param
        if x.numel() != target.numel():
            raise self.error("as many targets as entries", f"{tuple(target.shape)} for {tuple(x.shape)}")
        target = target.reshape(x.shape).to(x.dtype)
        losses, counted = F.binary_cross_entropy_with_logits(x, target, reduction="none"), None
        if param.HasField("ignore_label"):
            counted = target.trunc() != param.ignore_label
            losses = losses * counted
        mode = param.normalization if param.HasField("normalization") else BATCH_SIZE
        if param.HasField("normalize") and not param.HasField("normalization"):
            mode = VALID if param.normalize else BATCH_SIZE
        return losses.sum() / self.normaliser(mode, x.shape[0], x.numel(), counted)


@register("SoftmaxWithLoss")
class SoftmaxWithLoss(Loss):
    """Cross-entropy of the softmax over an axis with a label at each of the other places.

    The value, but not the gradient, takes probabilities below the smallest normal float32 for that.
    """

    def setup(self, x: Tensor, label: Tensor) -> None:
        if len(self.spec.top) > 1:
            message = "Caffe builds its inner Softmax with both loss weights and aborts. Use a Softmax layer."
            raise self.error("one top", "2", message)
        self.class_axis = self.axis(self.spec.softmax_param.axis, x)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        param, axis = self.spec.loss_param, self.class_axis
        outer, inner = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
        scores, labels = labelled(self, x, label, axis)
        ignored = param.ignore_label if param.HasField("ignore_label") else None
        log_probabilities = F.log_softmax(scores, 1)
        try:
            losses = F.nll_loss(
                log_probabilities, labels, reduction="none", ignore_index=-100 if ignored is None else ignored
            )
        except IndexError:
            largest = int(labels.max())
            raise self.error(
                f"labels from 0 to {scores.shape[1] - 1}", f"{int(labels.min())} to {largest}"
            ) from None
        losses = losses + (losses.clamp(max=-math.log(SMALLEST)) - losses).detach()
        mode = param.normalization
        if param.HasField("normalize") and not param.HasField("normalization"):
            mode = VALID if param.normalize else BATCH_SIZE
        counted = None if ignored is None else labels != ignored
        return losses.sum() / self.normaliser(mode, outer, outer * inner, counted)


def labelled(layer: Layer, x: Tensor, label: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Scores (places, k) and integer labels (places,) of a prediction whose classes lie along `axis`.

    Raises:
        ValueError: if there is not one label for each place.
    """
    scores = x.movedim(axis, -1).reshape(-1, x.shape[axis]) if x.dim() > 2 or axis != 1 else x
    if label.numel() != scores.shape[0]:
        expected = f"{scores.shape[0]} labels, one for each place of {tuple(x.shape)} but axis {axis}"
        raise layer.error(expected, f"{label.numel()}")
    return scores, label.reshape(-1).long()
