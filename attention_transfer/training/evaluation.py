"""How often a model is wrong on a set of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from attention_transfer._channels import wrong_channels
from attention_transfer._errors import InputError
from attention_transfer._outputs import check_finite, logits_of

NO_ANSWER = -1  # among predictions
TOP = 5  # the number of answers of which one is to be right, in a top-5 error


@dataclass(frozen=True)
class Evaluation:
    """A model's answers on some images. Errors are in percent; of five classes or fewer no top-5 error.

    `unanswered` images have logits that are not finite, which tell no class: -1 among the predictions.
    """

    predictions: Int[Tensor, " n"]
    labels: Int[Tensor, " n"]
    error: float
    top5_error: float | None
    unanswered: int = 0


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    batches: Iterable[tuple[UInt8[Tensor, "b c h w"], Int[Tensor, " b"]]],
    normalise: Callable[[Tensor], Tensor],
    *,
    device: torch.device | str = "cpu",
    name: str = "the model",
    not_finite: Literal["stop", "skip"] = "stop",
) -> Evaluation:
    """Run a model in eval mode and float32 over batches of uint8 images; the model stays on `device`.

    `name` is what errors call the model. With `not_finite` "skip" an image without finite logits is a wrong
    answer, if there are others.

    Raises:
        ValueError: if there are no images, the labels name classes that the model does not have, or the
            logits of an image are not finite and not to be skipped.
    """
    model.eval().to(device, torch.float32).to(memory_format=torch.channels_last)
    predictions, labels, hits, finite = [], [], [], []
    for images, targets in batches:
        logits = logits_of(_answer(model, normalise(images.to(device))), user="evaluate_model").float().cpu()
        _check_classes(logits, targets)
        finite.append(logits.isfinite().all(1))
        predictions.append(torch.where(finite[-1], logits.argmax(1), NO_ANSWER))
        labels.append(targets.cpu())
        hits.append(_in_top5(logits, targets.cpu()) & finite[-1])
    if not labels:
        raise InputError("evaluate_model: expected at least one image, got none. Pass data with test images.")
    answered = torch.cat(finite)
    if not_finite == "stop" or not answered.any():
        check_finite(answered, user="evaluate_model", model=name)
    predicted, truth = torch.cat(predictions), torch.cat(labels)
    top5_error = None if logits.shape[1] <= TOP else _percent(~torch.cat(hits))
    return Evaluation(predicted, truth, _percent(predicted != truth), top5_error, int((~answered).sum()))


def _answer(model: nn.Module, images: Float[Tensor, "b c h w"]) -> Any:
    try:
        return model(images)
    except (RuntimeError, ValueError) as error:
        message = wrong_channels(model, images.shape[1:], user="evaluate_model", role="model")
        if message is None:
            raise
        raise InputError(message) from error


def _check_classes(logits: Float[Tensor, "b k"], labels: Int[Tensor, " b"]) -> None:
    if int(labels.max()) >= logits.shape[1]:
        raise InputError(
            f"evaluate_model: expected labels below {logits.shape[1]}, the model's number of classes, "
            f"got {int(labels.max())}. Pass the data that the model was trained on."
        )


def _in_top5(logits: Float[Tensor, "b k"], labels: Int[Tensor, " b"]) -> Tensor:
    """Whether the true class is among the five largest logits."""
    best = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(1)


def _percent(wrong: Tensor) -> float:
    return 100 * wrong.double().mean().item()
