"""Images and maps as the report embeds them: data URIs, as small as they can be."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from attention_transfer._extras import require
from attention_transfer.visualize import overlays

THUMBNAIL, MAP_SIDE = 256, 64  # pixels of the longer side of a shown image, of its maps
PIXELATED = 96  # up to this size an image is shown pixel by pixel, and stored without loss
BORDER = 2  # pixels around each frame of a strip, for browsers that look beyond the frame to enlarge it


def picture(pixels: UInt8[np.ndarray, "h w 3"]) -> dict[str, Any]:
    """An image for the background of tiles."""
    image = require("PIL.Image", extra="train", user="write_report")
    kind = "png" if max(pixels.shape) <= PIXELATED else "jpeg"
    return {
        "source": _data_uri(image.fromarray(overlays.shrink(pixels, THUMBNAIL)), kind),
        "ratio": f"{pixels.shape[1]} / {pixels.shape[0]}",
        "pixelated": max(pixels.shape) <= PIXELATED,
    }


def map_source(attention_map: Float[Tensor, "_h _w"], size: tuple[int, int]) -> str:
    """A small palette image, which the page lays over its image of this (height, width)."""
    scale = MAP_SIDE / max(size)
    fitted = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    return _coloured(overlays.map_levels(attention_map, fitted))


def strip(maps: Float[Tensor, "e h w"]) -> dict[str, Any]:
    """Maps as the frames of one image, side by side in their own resolution, each within a border."""
    height, width = maps.shape[1:]
    frames = [np.pad(overlays.map_levels(each, (height, width)), BORDER, mode="edge") for each in maps]
    return {
        "source": _coloured(np.concatenate(frames, axis=1)),
        "frames": len(frames),
        "size": (height, width),
    }


def _coloured(levels: UInt8[np.ndarray, "h w"]) -> str:
    image = require("PIL.Image", extra="train", user="write_report").fromarray(levels)
    image.putpalette(overlays.colour_table().tobytes())
    return _data_uri(image, "png")


def _data_uri(image: Any, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, optimize=True, **({"quality": 88} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
