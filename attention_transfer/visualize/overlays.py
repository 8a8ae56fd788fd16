"""Attention maps laid over their images, one at a time or as a labelled grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from attention_transfer._errors import InputError
from attention_transfer._extras import require
from attention_transfer._files import write_atomically
from attention_transfer._tables import printable

Array = Tensor | np.ndarray
Size = tuple[int, int]

COLORMAP = "inferno"
SMALLEST_TILE, LARGEST_TILE = 160, 320  # pixels of an image's longer side in a grid
MARGIN, GAP, GROUP_GAP, LINE = 16, 6, 22, 20  # pixels between the parts of a grid
DPI = 100


def overlay(image: Array, attention_map: Array, *, alpha: float = 0.6) -> UInt8[np.ndarray, "h w 3"]:
    """Lay an attention map over its image, in a perceptually uniform colour map.

    Args:
        image: uint8, (c, h, w) or (h, w, c) with 1 or 3 channels.
        attention_map: non-negative, of any size; upsampled bilinearly and divided by its own maximum.
        alpha: how much of the map shows, 0 to 1.

    Raises:
        ValueError: if the image is not an 8-bit picture, or the map is not a finite non-negative matrix.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"overlay: expected alpha between 0 and 1, got {alpha}. Try alpha=0.6.")
    pixels = as_rgb(image)
    height, width, _ = pixels.shape
    colours = colour_table()[map_levels(attention_map, (height, width))]
    return np.rint((1 - alpha) * pixels + alpha * colours).astype(np.uint8)


def as_rgb(image: Array) -> UInt8[np.ndarray, "h w 3"]:
    """An 8-bit image, grey or colour, channels first or last, as RGB with channels last."""
    pixels = np.asarray(image.detach().cpu() if isinstance(image, Tensor) else image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or not {1, 3} & {pixels.shape[0], pixels.shape[-1]}:
        raise InputError(
            "overlay: expected a uint8 image of shape (c, h, w) or (h, w, c) with 1 or 3 channels, got "
            f"{pixels.dtype} {pixels.shape}. Give the image before normalisation, one at a time."
        )
    if pixels.shape[0] in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def map_levels(attention_map: Array, size: Size) -> UInt8[np.ndarray, "h w"]:
    """A map resized to `size` and scaled so that its maximum is 255; an all-zero map stays zero."""
    energy = torch.as_tensor(attention_map).detach().to("cpu", torch.float32)
    if energy.ndim != 2 or not energy.numel() or not energy.isfinite().all() or (energy < 0).any():
        raise InputError(
            f"overlay: expected a finite, non-negative map of shape (h, w), got {tuple(energy.shape)} with "
            f"{_describe_values(energy)}. Give one map of attention_map(features)."
        )
    energy = energy / energy.max().clamp_min(torch.finfo(torch.float32).tiny)
    energy = F.interpolate(energy[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    levels = energy / energy.max().clamp_min(torch.finfo(torch.float32).tiny)
    return (levels * 255).round().to(torch.uint8).numpy()


def colour_table() -> UInt8[np.ndarray, "256 3"]:
    """The colour of each of the 256 levels of a map."""
    colormap = require("matplotlib", extra="train", user="overlay").colormaps[COLORMAP]
    return colormap(np.arange(256), bytes=True)[:, :3]


def enlarge(pixels: UInt8[np.ndarray, "h w 3"], at_least: int) -> UInt8[np.ndarray, "H W 3"]:
    """Repeat whole pixels until the longer side has `at_least` of them: small images stay crisp."""
    factor = max(1, math.ceil(at_least / max(pixels.shape)))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def shrink(pixels: UInt8[np.ndarray, "h w 3"], at_most: int) -> UInt8[np.ndarray, "H W 3"]:
    """Scale an image down until its longer side is within `at_most` pixels."""
    scale = at_most / max(pixels.shape)
    if scale >= 1:
        return pixels
    height, width, _ = pixels.shape
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = require("PIL.Image", extra="train", user="overlay")
    return np.asarray(image.fromarray(pixels).resize(size, image.Resampling.LANCZOS))


def save_maps(
    path: Path | str,
    images: Array | Sequence[Array],
    maps: Mapping[str, Mapping[str, Float[Tensor, "n _h _w"]]],
    *,
    captions: Sequence[str] | None = None,
    alpha: float = 0.6,
    tile: int | None = None,
) -> Path:
    """Write a PNG grid: a row an image, and for each model (teacher, student, ...) a column a layer.

    Args:
        path: the PNG to write.
        images: uint8 images, (n, c, h, w) or a sequence of images of any sizes.
        maps: for each model's name, its maps by layer, as `attention_maps` gives them.
        captions: a line under each image, such as its file name.
        alpha: how much of a map shows.
        tile: pixels of an image's longer side in the grid; None keeps it, from 160 to 320. Small images are
            enlarged by whole factors, to at least that.

    Raises:
        ValueError: if a tile has no pixel, there are no images or maps, or their numbers differ.
    """
    _check_grid(images, maps, captions, tile)
    smallest, largest = (tile, tile) if tile else (SMALLEST_TILE, LARGEST_TILE)
    tiles = [enlarge(shrink(as_rgb(image), largest), smallest) for image in images]
    columns = [(role, layer, batch) for role, layers in maps.items() for layer, batch in layers.items()]
    grid = _Grid.measure(tiles, maps, captioned=captions is not None)
    for row, pixels in enumerate(tiles):
        grid.paste(pixels, row, 0)
        for column, (_, _, batch) in enumerate(columns, start=1):
            grid.paste(overlay(pixels, batch[row], alpha=alpha), row, column)
    grid.label(maps, captions)
    return grid.save(Path(path))


def _check_grid(
    images: Array | Sequence[Array],
    maps: Mapping[str, Mapping[str, Tensor]],
    captions: Sequence[str] | None,
    tile: int | None,
) -> None:
    if tile is not None and tile < 1:
        raise InputError(f"save_maps: expected a tile of 1 pixel or more, got {tile}. Try tile=160.")
    if len(images) == 0 or not any(maps.values()):
        raise InputError(
            f"save_maps: expected at least one image and one layer's maps, got {len(images)} images and "
            f"{sum(map(len, maps.values()))} layers. Name a layer of the model."
        )
    counts = {
        f"maps of {role} at {layer}": len(m) for role, layers in maps.items() for layer, m in layers.items()
    }
    if captions is not None:
        counts["captions"] = len(captions)
    for what, count in counts.items():
        if count != len(images):
            raise InputError(
                f"save_maps: expected as many {what} as images, got {count} for {len(images)} images. "
                "Compute the maps on the same images."
            )


def _describe_values(energy: Tensor) -> str:
    if not energy.numel():
        return "no values"
    return f"values from {energy.min().item():.3g} to {energy.max().item():.3g}"


class _Grid:
    """Tiles on one canvas, whose pixels are copied to the PNG as they are; the text is drawn over them."""

    def __init__(self, lefts: list[int], tops: list[int], cell: Size, size: Size) -> None:
        self.lefts, self.tops, self.cell = lefts, tops, cell
        self.canvas = np.full((*size, 3), 255, np.uint8)
        self.figure = require("matplotlib.figure", extra="train", user="save_maps").Figure(
            figsize=(size[1] / DPI, size[0] / DPI), dpi=DPI
        )

    @classmethod
    def measure(
        cls, tiles: list[np.ndarray], maps: Mapping[str, Mapping[str, Tensor]], *, captioned: bool
    ) -> _Grid:
        height, width = (max(tile.shape[axis] for tile in tiles) for axis in (0, 1))
        groups = [1, *(len(layers) for layers in maps.values() if layers)]
        lefts, x = [], MARGIN
        for count in groups:
            lefts += [x + i * (width + GAP) for i in range(count)]
            x = lefts[-1] + width + GROUP_GAP
        step = height + GAP + (LINE + GAP) * captioned
        tops = [MARGIN + 2 * LINE + row * step for row in range(len(tiles))]
        return cls(lefts, tops, (height, width), (tops[-1] + step - GAP + MARGIN, x - GROUP_GAP + MARGIN))

    def paste(self, tile: np.ndarray, row: int, column: int) -> None:
        height, width, _ = tile.shape
        top = self.tops[row] + (self.cell[0] - height) // 2
        left = self.lefts[column] + (self.cell[1] - width) // 2
        self.canvas[top : top + height, left : left + width] = tile

    def label(self, maps: Mapping[str, Mapping[str, Tensor]], captions: Sequence[str] | None) -> None:
        column = 1
        for role, layers in maps.items():
            if layers:
                end = self.lefts[column + len(layers) - 1] + self.cell[1]
                self._write(role, (self.lefts[column], end), MARGIN + LINE // 2, bold=True)
            for layer in layers:
                self._write_over(column, layer, MARGIN + LINE + LINE // 2)
                column += 1
        for row, caption in enumerate(captions or []):
            self._write_over(0, caption, self.tops[row] + self.cell[0] + LINE // 2)

    def _write_over(self, column: int, text: str, y: int) -> None:
        self._write(text, (self.lefts[column], self.lefts[column] + self.cell[1]), y)

    def _write(self, text: str, span: tuple[int, int], y: int, *, bold: bool = False) -> None:
        height, width, _ = self.canvas.shape
        room = int((span[1] - span[0]) / (8 if bold else 7))
        text = printable(text)
        text = text if len(text) <= room else "…" + text[1 - room :]
        self.figure.text(
            sum(span) / 2 / width,
            1 - y / height,
            text,
            ha="center",
            va="center",
            fontsize=10 if bold else 8.5,
            fontweight="bold" if bold else "normal",
            color="#1c1b19" if bold else "#55524c",
            parse_math=False,
        )

    def save(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.figure.figimage(self.canvas, origin="upper")
        write_atomically(path, lambda file: self.figure.savefig(file, format="png", dpi=DPI))
        return path
