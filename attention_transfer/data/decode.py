"""From encoded images (files, or rows of a table) to uint8 pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from .._errors import InputError
from .._extras import require
from .._pictures import GREY_MODES, LARGEST, DeepError, convert, open_picture
from .._reading import one_line, read_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

CHUNK = 256  # images a thread takes at a time
DECODING = "turned upright as EXIF says"
"""What tells these pixels from those that another version made of the same files; caches know it."""


@dataclass(frozen=True)
class Stretches:
    """How the rows lie on the disk: in stretches, each of which is quickly read in one go.

    Attributes:
        ends: the row after the last one of each stretch.
        window: how many stretches a process can well be at work on.
        whole: whether a stretch is read whole, however few of its rows are asked for.
    """

    ends: Int64[Tensor, " stretches"]
    window: int
    whole: bool


@runtime_checkable
class Encoded(Protocol):
    """A sequence of encoded images.

    Attributes:
        stretches: how they lie on the disk; None where one order of reading is as good as another.
    """

    @property
    def stretches(self) -> Stretches | None: ...

    def __len__(self) -> int: ...

    def read(self, row: int) -> bytes | None:
        """The encoded bytes; None where there are none."""

    def name(self, row: int) -> str:
        """What to call the image in an error."""

    def identify(self, rows: Sequence[int]) -> Iterator[str]:
        """What tells each image from another without its being read, wherever the data set lies."""

    def expect(self, row: int) -> None:
        """Take the hint that most of the row's stretch will be read soon."""


class EncodedFiles:
    """One image file a row."""

    stretches = None

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, row: int) -> bytes:
        return read_bytes(self.paths[row], LARGEST)

    def name(self, row: int) -> str:
        return str(self.paths[row])

    def identify(self, rows: Sequence[int]) -> Iterator[str]:
        paths = (self.paths[row] for row in rows)
        return (f"{path.parent.name}/{path.name} {path.stat().st_size}" for path in paths)

    def expect(self, row: int) -> None:
        pass


class NotGreyError(Exception):
    """A colour image where a grey one was hoped for: decode again with three channels."""


def read_image(encoded: Encoded, row: int, channels: int) -> Image:
    """Decode one image to Pillow's mode L (1 channel) or RGB (3 channels).

    Raises:
        ValueError: if the image is corrupt, too large, or not of 8 bits; the message names the file or row.
        NotGreyError: if `channels` is 1 and the image has colour.
    """
    image = _open(encoded, row)
    if channels == 1 and image.mode not in GREY_MODES:
        raise NotGreyError
    return convert(image, channels)


def _open(encoded: Encoded, row: int) -> Image:
    try:
        return open_picture(_read_bytes(encoded, row), extra="train", user="load_data")
    except DeepError as error:
        raise InputError(
            f"load_data: expected 8-bit images, got mode {error} in {encoded.name(row)}. "
            "Convert it to 8 bits a channel: which of its values are black and white, it does not say."
        ) from None
    except ValueError as error:
        if str(error).startswith("load_data: "):
            raise
        too_large = str(error).startswith("too large")
        mend = (
            "Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it."
            if too_large
            else "Images are never skipped silently: repair or remove it."
        )
        name = encoded.name(row)
        what = f"{name} is {error}" if too_large else f"cannot decode {name} ({error})"
        raise InputError(f"load_data: {what}. {mend}") from None


def _read_bytes(encoded: Encoded, row: int) -> bytes:
    try:
        data = encoded.read(row)
    except OSError as error:
        raise InputError(
            f"load_data: cannot read {encoded.name(row)} ({error.strerror or one_line(error)}). "
            "Check the file and its permissions."
        ) from None
    except ValueError as error:
        if str(error).startswith("load_data: "):
            raise
        raise InputError(
            f"load_data: {encoded.name(row)} is too large to decode safely ({error}). Shrink it."
        ) from None
    if not data:
        raise InputError(
            f"load_data: expected an image, got no bytes in {encoded.name(row)}. Repair or remove it."
        )
    return data


def resize_and_crop(image: Image, size: int, *, share: float = 1.0) -> Image:
    """The central square, `share` of the shorter side, as `size` x `size` pixels (bilinear, antialiased)."""
    if image.size == (size, size) and share == 1.0:
        return image
    ops = require("PIL.ImageOps", extra="train", user="load_data")
    pillow = require("PIL.Image", extra="train", user="load_data")
    return ops.fit(image, (size, size), method=pillow.Resampling.BILINEAR, bleed=(1 - share) / 2)


def to_tensor(image: Image) -> UInt8[Tensor, "c h w"]:
    """Pixels of a Pillow image of mode L or RGB, channels first."""
    return torch.from_numpy(_pixels(image).copy())


def _pixels(image: Image) -> np.ndarray:
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def decode(encoded: Encoded, channels: int, image_size: int | None) -> UInt8[Tensor, "n c h w"]:
    """Decode every row into one tensor, on a few threads.

    Raises:
        ValueError: as `read_image`, or if the images have several sizes and `image_size` is None.
        NotGreyError: if `channels` is 1 and an image has colour.
    """
    first = read_image(encoded, 0, channels)
    width, height = (image_size, image_size) if image_size else first.size
    pixels = np.empty((len(encoded), channels, height, width), dtype=np.uint8)

    def fill(start: int) -> None:
        for row in range(start, min(start + CHUNK, len(encoded))):
            image = read_image(encoded, row, channels)
            if image_size:
                image = resize_and_crop(image, image_size)
            elif image.size != (width, height):
                raise _several_sizes(encoded.name(0), (width, height), encoded.name(row), image.size)
            pixels[row] = _pixels(image)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(fill, range(0, len(encoded), CHUNK)):
            pass
    return torch.from_numpy(pixels)


def _several_sizes(first: str, size: tuple[int, int], other: str, other_size: tuple[int, int]) -> InputError:
    return InputError(
        f"load_data: expected images of one size, got {size[0]}x{size[1]} in {first} and "
        f"{other_size[0]}x{other_size[1]} in {other}. Pass image_size, such as image_size={min(size)}."
    )
