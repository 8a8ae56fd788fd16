"""Factories of small models with random weights, for names such as "small_models:vit" in `build_model`.

All but VGG and the vision transformer with registers are Hugging Face's.
"""

from __future__ import annotations

import torch
import torchvision
import transformers
from torch import Tensor, nn


def vgg(num_classes: int = 10, *, batch_norm: bool = False) -> nn.Module:
    """VGG-11 with a small classifier: the published one has 120 million weights."""
    parts = torchvision.models.vgg
    model = parts.VGG(parts.make_layers(parts.cfgs["A"], batch_norm), num_classes=1, init_weights=False)
    model.classifier = nn.Linear(512 * 7 * 7, num_classes)
    return model


def vgg_bn(num_classes: int = 10) -> nn.Module:
    return vgg(num_classes, batch_norm=True)


def vit(num_classes: int = 10, in_channels: int = 3, *, width: int = 32) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=2 * width,
        image_size=64,
        patch_size=8,
        num_labels=num_classes,
        num_channels=in_channels,
    )
    return transformers.ViTForImageClassification(config)


def wide_vit(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    return vit(num_classes, in_channels, width=48)


def resnet(num_classes: int = 10, in_channels: int = 3, *, width: int = 8) -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=width,
        hidden_sizes=[width, 2 * width, 4 * width, 8 * width],
        depths=[1, 1, 2, 1],
        layer_type="basic",
        num_labels=num_classes,
        num_channels=in_channels,
    )
    return transformers.ResNetForImageClassification(config)


def wide_resnet(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    return resnet(num_classes, in_channels, width=16)


def convnext(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 16, 32, 64],
        depths=[1, 1, 2, 1],
        num_labels=num_classes,
        num_channels=in_channels,
    )
    return transformers.ConvNextForImageClassification(config)


def swin(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    config = transformers.SwinConfig(
        image_size=64,
        embed_dim=16,
        depths=[2, 2, 2, 1],
        num_heads=[1, 2, 4, 8],
        window_size=2,
        num_labels=num_classes,
        num_channels=in_channels,
    )
    return transformers.SwinForImageClassification(config)


def pvt(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    config = transformers.PvtV2Config(
        image_size=64,
        hidden_sizes=[8, 16, 32, 64],
        depths=[1, 1, 2, 1],
        num_attention_heads=[1, 1, 2, 2],
        num_labels=num_classes,
        num_channels=in_channels,
    )
    return transformers.PvtV2ForImageClassification(config)


class Registers(nn.Module):
    """A vision transformer that says nothing, with register tokens behind its patches."""

    def __init__(self, behind: int = 4, front: int = 0, depth: int = 2, patch: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, patch, patch)
        self.behind = nn.Parameter(torch.randn(1, behind, 24))
        self.front = nn.Parameter(torch.randn(1, front, 24))
        layer = {"dim_feedforward": 48, "batch_first": True, "norm_first": True, "dropout": 0.0}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(24, 2, **layer) for _ in range(depth))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        front, behind = (each.expand(len(x), -1, -1) for each in (self.front, self.behind))
        tokens = torch.cat([front, tokens, behind], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens.mean(1))
