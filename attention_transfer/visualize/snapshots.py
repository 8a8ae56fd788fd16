"""Where a student looks in a few images over its training: one small file in the run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float16, Int, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from attention_transfer._errors import InputError
from attention_transfer._files import write_atomically
from attention_transfer._reading import check_regular, parse_json
from attention_transfer.functional import resize_maps
from attention_transfer.visualize.examples import cosine_similarity

FILE = "maps.safetensors"
IMAGES = 4
MOST_EPOCHS = 20  # beside the start, the first epoch and the last
MAP_SIDE, IMAGE_SIDE = 32, 96  # pixels of the longer side; what is larger is shrunk, so that files stay small
_KEY = "attention_transfer_maps"


def epochs_to_keep(total: int) -> set[int]:
    """The start (0), the first epoch, every 1st, 2nd, 5th, 10th, ... of `total` epochs, and the last."""
    steps = (factor * 10**power for power in range(12) for factor in (1, 2, 5))
    step = next(step for step in steps if total <= step * MOST_EPOCHS)
    return {0, min(1, total), total, *range(0, total, step)}


@dataclass(frozen=True)
class Snapshots:
    """The student's maps of some images after several epochs, 0 being the start, and the teacher's once.

    `maps` has an entry a layer, as `layers` names them; `teacher` has one for each too, or none at all.
    """

    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    classes: list[str]
    layers: list[str]
    teacher: list[Float16[Tensor, "n _ _"]]
    epochs: list[int]
    maps: list[Float16[Tensor, "e n _ _"]]

    @classmethod
    def start(
        cls,
        images: UInt8[Tensor, "n c h w"],
        labels: Int[Tensor, " n"],
        classes: Sequence[str],
        layers: Sequence[str],
    ) -> Snapshots:
        """Of no epoch yet, and without a teacher."""
        small = _fitted(images.flatten(0, 1).float(), IMAGE_SIDE).round().to(torch.uint8)
        pixels = small.unflatten(0, images.shape[:2]).cpu()
        return cls(pixels, labels.cpu(), list(classes), list(layers), [], [], [])

    def with_teacher(self, maps: Sequence[Float[Tensor, "n _ _"]]) -> Snapshots:
        """With the teacher's maps of the same images, an entry a layer."""
        return replace(self, teacher=[_kept(each) for each in maps])

    def add(self, epoch: int, maps: Sequence[Float[Tensor, "n _ _"]]) -> Snapshots:
        """With the maps after an epoch, an entry a layer, in place of any of that epoch or a later one.

        Raises:
            ValueError: if there are not as many maps as layers.
        """
        if len(maps) != len(self.layers):
            raise InputError(
                f"Snapshots.add: expected maps of {len(self.layers)} layers, got {len(maps)}. "
                f"Give those of {', '.join(self.layers)}."
            )
        count = sum(before < epoch for before in self.epochs)
        new = [_kept(each)[None] for each in maps]
        if count:
            new = [torch.cat([old[:count], each]) for old, each in zip(self.maps, new, strict=True)]
        return replace(self, epochs=[*self.epochs[:count], epoch], maps=new)

    def continues(self, other: Snapshots) -> bool:
        """Whether both are of the same images and layers."""
        return self.layers == other.layers and self.shows_images_of(other)

    def shows_images_of(self, other: Snapshots) -> bool:
        """Whether both are of the same images."""
        return torch.equal(self.images, other.images)

    def agreement(self, layer: int, teacher: Float[Tensor, "n _ _"]) -> dict[int, float]:
        """{epoch: mean cosine of the student's maps at this position of `layers` to the teacher's}"""
        each = (cosine_similarity(maps.float(), teacher.float()).mean() for maps in self.maps[layer])
        return {epoch: float(value) for epoch, value in zip(self.epochs, each, strict=True)}

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically.

        Raises:
            OSError: if it cannot be written.
        """
        tensors = {"images": self.images, "labels": self.labels}
        tensors |= {f"student.{i}": each for i, each in enumerate(self.maps)}
        tensors |= {f"teacher.{i}": each for i, each in enumerate(self.teacher)}
        facts = {"classes": self.classes, "layers": self.layers, "epochs": self.epochs}
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomically(path, save(whole, {_KEY: json.dumps(facts)}))

    @classmethod
    def read(cls, path: Path) -> Snapshots:
        """What `save` wrote.

        Raises:
            ValueError: if the file is damaged.
            OSError: if it is no file.
        """
        check_regular(path)
        try:
            with safe_open(path, framework="pt") as file:
                # guard: nested-facts
                facts = parse_json((file.metadata() or {})[_KEY])
                tensors: dict[str, Any] = {
                    name: file.get_tensor(name).clone()  # not a view of a file that may be written anew
                    for name in file.keys()  # noqa: SIM118
                }
            layers, taught = facts["layers"], "teacher.0" in tensors
            maps = [tensors[f"student.{i}"] for i in range(len(layers))]
            teacher = [tensors[f"teacher.{i}"] for i in range(len(layers) * taught)]
            kept = cls(
                tensors["images"], tensors["labels"], facts["classes"], layers, teacher, facts["epochs"], maps
            )
            # guard: kept-maps
            kept._check()
            return kept
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"Snapshots.read: expected the maps that `train` keeps, got the damaged {path} ({error}). "
                "Delete it: the report then leaves these maps out."
            ) from None

    def _check(self) -> None:
        """Raise a ValueError for parts that contradict each other, or are not what they are taken for."""
        images, epochs = len(self.labels), self.epochs
        if not all(isinstance(text, str) for text in (*self.classes, *self.layers)):
            raise InputError("names that are no text")
        if not all(type(epoch) is int for epoch in epochs) or epochs != sorted(set(epochs)):
            raise InputError("no epochs")
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] not in (1, 3):
            raise InputError("no images")
        if not 0 < images == len(self.images) or self.labels.dtype != torch.int64 or self.labels.ndim != 1:
            raise InputError("no label for each image")
        expected = [(self.maps, (len(epochs), images)), (self.teacher, (images,))]
        for maps, leading in expected:
            for each in maps:
                if each.ndim != len(leading) + 2 or each.shape[: len(leading)] != leading or not each.numel():
                    raise InputError("no map for each image")
                if not each.is_floating_point() or not each.isfinite().all() or (each < 0).any():
                    raise InputError("maps with values that maps do not have")


def _kept(maps: Float[Tensor, "n h w"]) -> Float16[Tensor, "n _ _"]:
    """Small, and with a largest value of 1: half precision would lose a large map's small values."""
    small = _fitted(maps.detach().float(), MAP_SIDE)
    largest = small.flatten(1).amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    return (small / largest[:, None, None]).half().cpu()


def _fitted(maps: Float[Tensor, "n h w"], side: int) -> Float[Tensor, "n _ _"]:
    scale = side / max(maps.shape[1:])
    if scale >= 1:
        return maps
    height, width = (max(1, round(length * scale)) for length in maps.shape[1:])
    return resize_maps(maps, (height, width))
