"""Image files that anyone may have made, and the one rule by which they become pixels.

They are turned upright as EXIF says. Of several frames the first counts. Transparency is dropped: the
colour beneath shows. CMYK becomes RGB by the plain formula; colour profiles are left aside. More than 8 bits
a channel are refused, because nobody says which of them are the picture: 12 bits in a file of 16 would come
out black.
"""

from __future__ import annotations

import io
import re
from typing import IO, TYPE_CHECKING, Any

from ._errors import InputError
from ._extras import require
from ._reading import first_line

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
"""What is opened, whatever its name says. Pillow knows more, and hands EPS to the program Ghostscript."""

LARGEST = 1 << 30  # bytes of an encoded image: as many pixels as Pillow bears, at 8 bytes, take 0.7e9

GREY_MODES = ("1", "L", "LA")
MODES = (*GREY_MODES, "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # that Pillow makes L and RGB of

ORIENTATION, BITS_PER_SAMPLE = 0x0112, 258  # tags of EXIF and TIFF
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}  # what undoes an orientation


class DeepError(InputError):
    """An image of more than 8 bits a channel; the message is its mode."""


def open_picture(data: bytes, *, extra: str, user: str, upright: bool = True) -> Image:
    """Decode an image to one of `MODES`, turned upright as EXIF says unless `upright` is False.

    Raises:
        DeepError: if it has more than 8 bits a channel.
        ValueError: in one line, if it is damaged, of another format or colour space, or has more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    pillow = require("PIL.Image", extra=extra, user=user)
    try:
        image = _without_bomb_warning(pillow, io.BytesIO(data))
        if image is None:
            raise InputError(f"none of {', '.join(FORMATS)}")
        limit, pixels = pillow.MAX_IMAGE_PIXELS, image.width * image.height
        # guard: image-bomb
        if limit is not None and pixels > limit:
            raise pillow.DecompressionBombError(f"{pixels:,} pixels, limit {limit:,}")
        # guard: deep-pixels
        _refuse_deep(image)
        image.load()
        if image.mode not in MODES:
            raise InputError(f"the colour space {image.mode}")
        return _turned(pillow, image) if upright else image
    except DeepError:
        raise
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise InputError(f"too large to decode safely ({first_line(error)})") from None
    except Exception as error:  # a broken file makes Pillow's decoders raise almost anything
        raise InputError(first_line(error)) from None


def convert(image: Image, channels: int) -> Image:
    """What `open_picture` gave as mode L (1 channel) or RGB (3 channels)."""
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode:
        return image
    # Pillow warns when a palette's transparency is dropped in one go
    return (image.convert("RGBA") if "transparency" in image.info else image).convert(mode)


def begins_as_picture(file: IO[bytes]) -> bool:
    """Whether it begins as an image that `open_picture` reads."""
    pillow = require("PIL.Image", extra="train", user="load_data")
    try:
        return _without_bomb_warning(pillow, file) is not None
    except Exception:  # a header that is damaged: Pillow's readers raise almost anything
        return False


def _without_bomb_warning(pillow: Any, file: IO[bytes]) -> Image | None:
    """As `PIL.Image.open`, which warns of images of up to twice the limit where this package refuses them."""
    pillow.init()
    head = file.read(16)
    # guard: image-formats
    for name in FORMATS:
        factory, accepts = pillow.OPEN.get(name, (None, None))
        if factory is None or (accepts and accepts(head) is not True):
            continue
        try:
            file.seek(0)
            return factory(file, None)
        except (SyntaxError, IndexError, TypeError, KeyError, EOFError):
            continue  # Pillow's word for: not mine after all
    return None


def _refuse_deep(image: Any) -> None:
    """Of 16 bits Pillow would keep the upper 8 in colour images, all in grey ones, and clip these later."""
    if image.mode.startswith(("I", "F")):
        raise DeepError(image.mode)
    samples = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, ())
    depths = [*(samples if isinstance(samples, tuple) else (samples,))]
    for codec, _, _, arguments in image.tile:
        raw, *rest = arguments if isinstance(arguments, tuple) else (arguments,)
        if codec.startswith("ppm") and rest:
            depths.append(rest[0].bit_length())  # of the largest value
        elif named := re.fullmatch(r"(?!BGR)\w+;(\d+)\w*", str(raw)):  # BGR;16 are 5, 6 and 5 bits
            depths.append(int(named[1]))
    if max(depths, default=8) > 8:
        raise DeepError(f"{image.mode} of {max(depths)} bits a channel")


def _turned(pillow: Any, image: Image) -> Image:
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # notes that are damaged, and say nothing: the picture may still be whole
        return image
    return image if turn is None else image.transpose(pillow.Transpose[turn])
