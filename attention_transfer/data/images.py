"""Labelled images, in memory or streamed from disk, and the splits of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from .augment import Augment
from .decode import Encoded, read_image, resize_and_crop, to_tensor
from .order import Layout
from .randomness import keyed_generator

SCALE = (0.08, 1.0)  # share of the image's area that a random crop covers (Szegedy et al., CVPR 2015)
RATIO = (3 / 4, 4 / 3)  # width over height of a random crop
DENSE = 0.5  # share of the images of a stretch from which on the whole of it is read ahead
EVALUATION_SHARE = 0.875  # centre crop after a resize of the shorter side: 224 of 256


@dataclass(frozen=True)
class Images:
    """Images decoded once and held in memory: pixels of 0 to 255, labels of 0 to k-1."""

    images: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of every image."""
        c, h, w = self.images.shape[1:]
        return c, h, w

    def select(self, rows: Int64[Tensor, " m"]) -> Images:
        """The images at these positions, in this order."""
        return Images(self.images[rows], self.labels[rows])

    @property
    def crop(self) -> float:
        """The share of each image's shorter side whose central square was made the pixels."""
        return 1.0

    def decoded(self) -> UInt8[Tensor, "n c h w"]:
        """All the pixels."""
        return self.images


@dataclass(frozen=True)
class StreamedImages:
    """Images left encoded, and decoded to RGB of `image_size` by the workers of `Batches` when asked for.

    `train=True` gives a random resized crop, drawn from (seed, epoch, position); otherwise a resize and the
    centre. The flip is left to `Augment`.
    """

    encoded: Encoded
    rows: Int64[Tensor, " n"]
    labels: Int64[Tensor, " n"]
    image_size: int
    train: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of every image once decoded."""
        return 3, self.image_size, self.image_size

    @property
    def crop(self) -> float:
        """The share of each image's shorter side whose central square becomes the pixels in evaluation."""
        return EVALUATION_SHARE

    def select(self, rows: Int64[Tensor, " m"], *, train: bool = False) -> StreamedImages:
        """The images at these positions, in this order, for training or for evaluation."""
        return StreamedImages(self.encoded, self.rows[rows], self.labels[rows], self.image_size, train)

    def layout(self) -> Layout | None:
        """How the images lie on the disk.

        None where one order of reading is as good as another: in files of their own, or where the images are
        so few of those there that to read whole stretches would be to read what nobody asked for.
        """
        stretches = self.encoded.stretches
        if stretches is None:
            return None
        stretch = torch.searchsorted(stretches.ends, self.rows, right=True)
        sizes = stretches.ends.diff(prepend=stretches.ends.new_zeros(1))
        dense = len(self.rows) >= DENSE * int(sizes[stretch.unique()].sum())
        return Layout(stretch, stretches.window) if dense or stretches.whole else None

    def expect(self, position: int) -> None:
        """Take the hint that most images around this one will be asked for soon."""
        self.encoded.expect(int(self.rows[position]))

    def decoded(self) -> UInt8[Tensor, "n c h w"]:
        """All the pixels, decoded one after the other: for a few images.

        Raises:
            ValueError: as `decode`.
        """
        return torch.stack([self.decode(i) for i in range(len(self))])

    def decode(self, position: int, *, seed: int = 0, epoch: int = 0) -> UInt8[Tensor, "c h w"]:
        """One image; a pure function of (position, seed, epoch).

        Raises:
            ValueError: if the image is corrupt; the message names it.
        """
        image = read_image(self.encoded, int(self.rows[position]), channels=3)
        size = (self.image_size, self.image_size)
        if self.train:
            box = random_crop(image.width, image.height, keyed_generator(seed, epoch, position))
            return to_tensor(image.resize(size, resample=_bilinear(), box=box))
        return to_tensor(resize_and_crop(image, self.image_size, share=self.crop))


def _bilinear() -> int:
    from PIL.Image import Resampling

    return Resampling.BILINEAR


def random_crop(width: int, height: int, generator: torch.Generator) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a crop of random area and aspect ratio, cut down to fit the image."""
    area_draw, ratio_draw, left_draw, top_draw = torch.rand(4, generator=generator).tolist()
    area = width * height * (SCALE[0] + area_draw * (SCALE[1] - SCALE[0]))
    ratio = RATIO[0] * (RATIO[1] / RATIO[0]) ** ratio_draw
    crop_width = min(width, (area * ratio) ** 0.5)
    crop_height = min(height, (area / ratio) ** 0.5)
    left = left_draw * (width - crop_width)
    top = top_draw * (height - crop_height)
    return left, top, left + crop_width, top + crop_height


@dataclass(frozen=True)
class Splits:
    """A data set, ready to train on.

    Attributes:
        train: what the weights see.
        validation: what choices are made by; None when `load_data(..., validation=0)`.
        test: what is reported, and never chosen by.
        classes: the name of each label.
        name: the data set's name, or the path it came from.
        mean, std: per channel, for pixels in [0, 1], over all training images before validation and
            `max_train` are taken out: they do not depend on a seed, so a teacher and its students always
            agree on them.
        flip: whether a left-to-right flip keeps the meaning (not for digits).
        pad: how far the random crop of `Augment` moves; 0 for streamed images, whose crop the workers make.
        notes: one line for each thing that was decided for the reader, such as a test split cut off.
    """

    train: Images | StreamedImages
    validation: Images | StreamedImages | None
    test: Images | StreamedImages
    classes: list[str]
    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True
    pad: int = 4
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of every image."""
        return self.train.shape

    @property
    def in_channels(self) -> int:
        return self.shape[0]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def numbered_as(self, classes: Sequence[str], places: Sequence[int]) -> Splits:
        """The same images with the classes of another list, in which those of today have these places."""
        found = torch.tensor(places)
        splits = {
            name: None if images is None else replace(images, labels=found[images.labels])
            for name, images in (("train", self.train), ("validation", self.validation), ("test", self.test))
        }
        return replace(self, classes=list(classes), **cast("dict[str, Any]", splits))

    def augment(self) -> Augment:
        """The augmentation and normalisation that suit this data set."""
        return Augment(self.mean, self.std, pad=self.pad, flip=self.flip)

    def __str__(self) -> str:
        counts = [f"{len(self.train):,} train"]
        if self.validation is not None:
            counts.append(f"{len(self.validation):,} validation")
        counts.append(f"{len(self.test):,} test")
        size = "x".join(str(n) for n in self.shape)
        lines = [f"{self.name}: {', '.join(counts)} images of {size} (c, h, w), {self.num_classes} classes"]
        if isinstance(self.train, StreamedImages):
            lines.append("streamed: decoded anew in every epoch, by worker processes")
        return "\n  ".join([*lines, *self.notes])
