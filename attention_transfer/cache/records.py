"""The record of one image: the teacher's logits and maps as bytes, which are kept one after the other.

A record is what a student needs of an image at a step, so that it takes one read and one copy to the device;
it is unpacked there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from .._choices import Stored
from .manifest import Manifest

LEVELS = 255  # of uint8, from 0 to a map's own maximum


@dataclass(frozen=True)
class Layout:
    """Where the parts of a record stand: logits in float16, then a map for each layer.

    A map is stored relative to its own maximum, which no term can tell from the map itself, because all of
    them normalise. It has 11 significant bits in float16, and 256 equal steps in uint8.
    """

    classes: int
    sizes: tuple[tuple[int, int], ...]  # (h, w) of each layer's map
    dtype: Stored

    @classmethod
    def of(cls, manifest: Manifest) -> Layout:
        """The layout that the records of a cache have."""
        return cls(manifest.classes, tuple(stage.shape[1:] for stage in manifest.layers), manifest.dtype)

    @property
    def bytes(self) -> int:
        """Bytes of a record: an even number, so that every record begins where a float16 may."""
        width = 2 if self.dtype == "float16" else 1
        return 2 * self.classes + 2 * math.ceil(width * sum(map(math.prod, self.sizes)) / 2)

    def pack(
        self, logits: Float[Tensor, "b k"], maps: Sequence[Float[Tensor, "b _ _"]]
    ) -> UInt8[Tensor, "b r"]:
        """The records of a batch, from its logits and an energy map for each layer; all must be finite."""
        parts = [logits.half().view(torch.uint8), *(self._pack_map(energy.flatten(1)) for energy in maps)]
        records = torch.cat(parts, 1)
        return torch.nn.functional.pad(records, (0, self.bytes - records.shape[1]))

    def unpack(
        self, records: UInt8[Tensor, "b r"], layers: Sequence[int]
    ) -> tuple[Float[Tensor, "b k"], list[Float[Tensor, "b _ _"]]]:
        """Logits, and the maps of the layers at these places, in float32 on the device of the records."""
        logits = records[:, : 2 * self.classes].view(torch.float16).float()
        return logits, [self._unpack_map(records, layer) for layer in layers]

    def _pack_map(self, energy: Float[Tensor, "b n"]) -> UInt8[Tensor, "b _"]:
        most = energy.amax(1, keepdim=True)
        relative = energy / most.where(most > 0, 1)
        if self.dtype == "uint8":
            return (relative * LEVELS).round().to(torch.uint8)
        return relative.half().view(torch.uint8)

    def _unpack_map(self, records: UInt8[Tensor, "b r"], layer: int) -> Float[Tensor, "b h w"]:
        width = 2 if self.dtype == "float16" else 1
        start = 2 * self.classes + width * sum(map(math.prod, self.sizes[:layer]))
        stored = records[:, start : start + width * math.prod(self.sizes[layer])]
        if self.dtype == "float16":
            stored = stored.view(torch.float16)
        return stored.float().unflatten(1, self.sizes[layer])
