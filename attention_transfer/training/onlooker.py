"""A teacher that looks at images for others to learn from later, just as it would in a live run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from attention_transfer._outputs import logits_of
from attention_transfer.data import Augment, Splits, Views
from attention_transfer.functional import attention_map
from attention_transfer.locality import find_order
from attention_transfer.models import fingerprint
from attention_transfer.pairs import Stage, stages_to_store
from attention_transfer.preflight import check_order
from attention_transfer.runs.recipe import Precision, Recipe
from attention_transfer.taps import Taps
from attention_transfer.training.build import Teacher, build_augment
from attention_transfer.training.speed import prepare

HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Onlooker:
    """A teacher with the augmentation, precision and input transform of a live run.

    Attributes:
        weights: fingerprint of the teacher's weights as they were loaded.
        classes: how many logits it gives.
        layers: where it is looked at.
    """

    teacher: Teacher
    weights: str
    classes: int
    layers: tuple[Stage, ...]
    augment: Augment
    p: float
    mapping: Any
    precision: Precision
    device: torch.device

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        splits: Splits,
        teacher: Teacher,
        layers: Sequence[str] | None,
        device: torch.device,
    ) -> Onlooker:
        """The teacher of a settled recipe on its device; `layers` are by default all that may be paired.

        Raises:
            ValueError: if a layer is unknown, no layer has maps, or one has its own order of places.
        """
        model, transform, weights = teacher.model, teacher.transform, fingerprint(teacher.model)
        model.eval()
        example = torch.zeros(2, *splits.shape)
        seen = transform(example) if transform else example
        names = [stage.name for stage in stages_to_store(model, seen)] if layers is None else layers
        classes, stages = _probe(model, names, seen)
        noise = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
        check_order("teacher", find_order(model, names, noise, transform=transform))
        precision = recipe.precision
        for module in (model, transform):
            if module is not None:
                module.to(device, torch.float64 if precision == "64-true" else torch.float32)
        prepare(model, compiled=False)
        augment = build_augment(recipe, splits).to(device)
        return cls(teacher, weights, classes, stages, augment, recipe.p, recipe.mapping, precision, device)

    @torch.no_grad()
    def __call__(
        self, images: UInt8[Tensor, "b c h w"], rows: Int64[Tensor, " b"], view: int, views: Views
    ) -> tuple[Float[Tensor, "b k"], list[Float[Tensor, "b _ _"]]]:
        """Logits, and the map at each layer, of a view of the images at `rows`."""
        x = self.augment.view(images, rows, views, view).contiguous(memory_format=torch.channels_last)
        x = x.double() if self.precision == "64-true" else x
        names = [stage.name for stage in self.layers]
        with self._arithmetic(), Taps(self.teacher.model, names, read=self._map) as taps:
            x = self.teacher.transform(x) if self.teacher.transform else x
            logits = logits_of(self.teacher.model(x), user="cache")
            maps = taps.pop()
        return logits, [maps[name] for name in names]

    def _map(self, features: Float[Tensor, "b c h w"]) -> tuple[Tensor, Float[Tensor, "b h w"]]:
        return features, attention_map(features, p=self.p, mapping=self.mapping)

    @property
    def input(self) -> list[Any] | None:
        """How the teacher's input follows from the data's: factor and offset a channel, and the size."""
        transform = self.teacher.transform
        if transform is None:
            return None
        factor, offset = (each.flatten().tolist() for each in (transform.factor, transform.offset))
        return [factor, offset, transform.size and list(transform.size)]

    def _arithmetic(self) -> AbstractContextManager[object]:
        half = HALF.get(self.precision)
        return torch.autocast(self.device.type, half) if half else nullcontext()


@torch.no_grad()
def _probe(
    model: nn.Module, names: Sequence[str], x: Float[Tensor, "b c h w"]
) -> tuple[int, tuple[Stage, ...]]:
    """The number of logits, and the layers of these names as they are on images such as x."""
    with Taps(model, list(names)) as taps:
        classes = logits_of(model(x), user="cache").shape[1]
        features = taps.pop()
    shapes = [
        (found.shape[1], found.shape[2], found.shape[3]) for found in (features[name] for name in names)
    ]
    strides = [math.sqrt(math.prod(x.shape[2:]) / (h * w)) for _, h, w in shapes]
    return classes, tuple(map(Stage, names, shapes, strides))
