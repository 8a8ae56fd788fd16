"""A folder that timm loads by itself, in the layout of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from attention_transfer._errors import InputError
from attention_transfer._extras import require
from attention_transfer._files import write_atomically
from attention_transfer.models import is_of_timm, size_options

from .base import Format, Predict, normalise_lines, pixels_line
from .student import Student
from .weights import EXACT

KEPT = ("architecture", "first_conv", "classifier", "fixed_input_size")
"""What stays true of timm's own description of the model; tag, origin and licence are of other weights."""


class TimmFolder(Format):
    name, path, tolerance = "timm", "timm", EXACT
    summary = (
        "`config.json` and `model.safetensors` as on the Hugging Face hub: `timm.create_model` with "
        "`local-dir:`, or `hf-hub:` once the folder is uploaded; takes normalised images, as "
        "`timm.data.create_transform` makes them."
    )

    @property
    def files(self) -> tuple[str, ...]:
        return (f"{self.path}/config.json", f"{self.path}/model.safetensors")

    def check(self, student: Student) -> None:
        require("timm", extra="train", user="export: timm")
        if not is_of_timm(student.card.model):
            raise InputError(
                f"export: timm: expected a model of timm, got {student.card.model}, which timm does not "
                "know. Leave timm out; onnx and torch-export need no code of the model."
            )

    def write(self, student: Student, path: Path) -> None:
        timm: Any = require("timm", extra="train", user="export: timm")
        card = student.card
        model: Any = card.build(student.run.folder)  # one of its own: its description is changed
        known = model.pretrained_cfg
        model.pretrained_cfg = {name: known[name] for name in KEPT if name in known} | _input(student)
        arguments: dict[str, Any] = {"num_classes": len(card.classes), "in_chans": card.in_channels}
        height, width = card.image_size
        arguments |= size_options(card.model, (height, width))
        config = {"model_args": arguments, "label_names": card.classes}
        try:
            timm.models.save_for_hf(model, str(path), model_config=config, safe_serialization=True)
        except SafetensorError as error:
            raise OSError(f"export: timm: could not write {path}: {error}") from None
        for file in path.iterdir():  # once more: safetensors lets nobody but the owner read its files
            write_atomically(file, file.read_bytes())

    def load(self, student: Student, path: Path) -> Predict:
        timm: Any = require("timm", extra="train", user="export: timm")
        model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
        return lambda pixels: model(student.augment.normalise(pixels))

    def snippet(self, student: Student) -> str:
        return (
            "import timm\nimport torch\n\n"
            f'model = timm.create_model("local-dir:{self.path}", pretrained=True).eval()\n'
            f"{pixels_line(student)}\n{normalise_lines(student)}\n"
            "with torch.no_grad():\n    logits = model(images)"
        )


def _input(student: Student) -> dict[str, Any]:
    """The images that the student expects, in timm's words."""
    card = student.card
    return {
        "num_classes": len(card.classes),
        "input_size": (card.in_channels, *card.image_size),
        "mean": tuple(card.mean),
        "std": tuple(card.std),
        "crop_pct": card.crop,
        "crop_mode": "center",
        "interpolation": "bilinear",
    }
