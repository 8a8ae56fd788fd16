"""Opening image files that anyone may have made."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from ._extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
"""What is opened, whatever its name says. Pillow knows more, and hands EPS to the program Ghostscript."""


def open_picture(data: bytes, *, extra: str, user: str) -> Image:
    """Decode an image, of one with several frames the first.

    Raises:
        ValueError: in one line, if it is damaged, of another format, or has more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    pillow = require("PIL.Image", extra=extra, user=user)
    try:
        image = _without_bomb_warning(pillow, data)
        if image is None:
            raise ValueError(f"none of {', '.join(FORMATS)}")
        limit, pixels = pillow.MAX_IMAGE_PIXELS, image.width * image.height
        if limit is not None and pixels > limit:
            raise pillow.DecompressionBombError(f"{pixels:,} pixels, limit {limit:,}")
        image.load()
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise ValueError(f"too large to decode safely ({_first_line(error)})") from None
    except Exception as error:  # a broken file makes Pillow's decoders raise almost anything
        raise ValueError(_first_line(error)) from None
    return image


def _without_bomb_warning(pillow: object, data: bytes) -> Image | None:
    """As `PIL.Image.open`, which warns of images of up to twice the limit where this package refuses them."""
    pillow.init()  # type: ignore[attr-defined]
    for name in FORMATS:
        factory, accepts = pillow.OPEN.get(name, (None, None))  # type: ignore[attr-defined]
        if factory is None or (accepts and accepts(data[:16]) is not True):
            continue
        try:
            return factory(io.BytesIO(data), None)
        except (SyntaxError, IndexError, TypeError, KeyError, EOFError):
            continue  # Pillow's word for: not mine after all
    return None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
