"""Attention transfer under Hugging Face's Trainer: a small subclass, for any of its vision models.

pip install "attention-transfer[examples]"
python examples/hf_trainer.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

import attention_transfer as at


class AttentionTrainer(Trainer):
    """A Trainer of `distiller.student`. Its checkpoints are the student's, for `from_pretrained`."""

    loss_is_scaled_for_ga = False  # the loss is a mean over the batch, whatever is accumulated

    def __init__(self, *, distiller: at.Distiller, **options: Any) -> None:
        super().__init__(model=distiller.student, **options)
        self.distiller = distiller.to(self.args.device)
        self.terms: dict[str, Tensor] = {}

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, **options: Any
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **options)
        self.distiller.student = model  # with what Trainer wraps around it: DDP, a compiled model
        out = self.distiller(inputs["pixel_values"], inputs["labels"])
        self.terms = out.terms
        return (out.loss, {"logits": out.logits}) if return_outputs else out.loss

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """The terms of the last step, beside the loss."""
        terms = {name: term.item() for name, term in self.terms.items()} if "loss" in logs else {}
        super().log({**logs, **terms}, *args)


def resnet(widths: list[int], depth: int) -> ResNetForImageClassification:
    """A small ResNet without pretrained weights."""
    config = ResNetConfig(
        num_channels=1, embedding_size=widths[0], hidden_sizes=widths, depths=[depth] * len(widths),
        layer_type="basic", num_labels=10,
    )  # fmt: skip
    return ResNetForImageClassification(config)


def digits() -> list[dict[str, Any]]:
    """1,797 handwritten digits of 8x8 pixels, enlarged to 32x32."""
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = nn.functional.interpolate((images.float() / 16 - 0.3).view(-1, 1, 8, 8), scale_factor=4)
    return [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, labels, strict=True)]


def error(prediction: EvalPrediction) -> dict[str, float]:
    return {"error": 100 * float((prediction.predictions.argmax(1) != prediction.label_ids).mean())}


def fit(title: str, folder: Path, epochs: int, count: int, distiller: at.Distiller) -> None:
    """Train on the first `count` digits, and print what came of it."""
    set_seed(0)
    rows = digits()
    arguments = TrainingArguments(
        str(folder / title), num_train_epochs=epochs, per_device_train_batch_size=25, learning_rate=5e-3,
        lr_scheduler_type="cosine", logging_strategy="epoch", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = AttentionTrainer(
        distiller=distiller,
        args=arguments,
        train_dataset=rows[:count],
        eval_dataset=rows[900:],
        compute_metrics=error,
    )
    trainer.remove_callback(PrinterCallback)
    print(title)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "ce" in entry]
    for entry in (logged[0], logged[-1]):
        terms = (f" {name} {entry[name]:.3f}" for name in trainer.terms)
        print(f"  epoch {entry['epoch']:.0f}:", *terms)
    print(f"  test error {trainer.evaluate()['eval_error']:.1f} %")


def main(folder: str = "runs/hf", epochs: int = 20) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    root = Path(folder)
    set_seed(0)
    teacher, alone, student = resnet([32, 64, 128], 2), resnet([8, 16, 32], 1), resnet([8, 16, 32], 1)
    alone.load_state_dict(student.state_dict())  # both begin alike
    fit("teacher", root, epochs, 900, at.Distiller(teacher, None))
    fit("student alone", root, epochs, 200, at.Distiller(alone, None))
    distiller = at.Distiller(
        student, teacher, terms=[at.AttentionTransfer(beta=1.0)], example_input=torch.zeros(2, 1, 32, 32)
    )
    fit("student with attention transfer", root, epochs, 200, distiller)


if __name__ == "__main__":
    main()
