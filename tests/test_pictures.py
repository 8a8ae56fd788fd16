"""Which pixels an image file stands for: one rule for every reader, held against images of known pixels."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from attention_transfer._pictures import DeepError, convert, open_picture
from attention_transfer.cli.maps import _read_image
from attention_transfer.data import load_data
from attention_transfer.data.decode import EncodedFiles, read_image

RGB = np.array(
    [
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]],
        [[1, 2, 3], [250, 240, 230], [60, 120, 180], [0, 0, 0]],
    ],
    np.uint8,
)
GREY = np.array([[0, 17, 85, 255], [34, 51, 170, 102]], np.uint8)
ALPHA = np.array([[0, 1, 128, 255], [255, 0, 3, 200]], np.uint8)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def png(pixels: np.ndarray, depth: int, colour: int) -> bytes:
    """A PNG of rows of bytes as they are, whatever Pillow can write; four pixels a row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", 4, len(pixels), depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff(pixels: np.ndarray, tags: dict[int, tuple[int, int | list[int]]]) -> bytes:
    """A little-endian TIFF of one strip, with its tags as {number: (type 3 for shorts or 4, value)}."""
    height, width = tags[257][1], tags[256][1]
    assert height and width
    body, entries = b"", []
    data = pixels.tobytes()
    tags = {**tags, 273: (4, 8), 278: (3, height), 279: (4, len(data))}
    after = 8 + len(data)
    for number, (kind, value) in sorted(tags.items()):
        values = value if isinstance(value, list) else [value]
        packed = struct.pack("<" + ("H" if kind == 3 else "I") * len(values), *values)
        if len(packed) > 4:
            packed, body = struct.pack("<I", after + len(body)), body + packed
        entries.append(struct.pack("<HHI", number, kind, len(values)) + packed.ljust(4, b"\0"))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    return struct.pack("<2sHI", b"II", 42, after + len(body)) + data + body + directory


def oriented(number: int, kind: str, **options: Any) -> bytes:
    """`RGB` as a camera held in one of the eight ways stores it."""
    stored = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(RGB, -1),
    }[number]
    exif = Image.Exif()
    exif[0x0112] = number
    return saved(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)


def frames(kind: str) -> bytes:
    first, second = Image.fromarray(RGB), Image.fromarray(255 - RGB)
    if kind == "GIF":  # of few colours, so that none is lost
        first, second = (each.quantize(16) for each in (first, second))
    return saved(first, kind, save_all=True, append_images=[second])


def palette(**options: Any) -> bytes:
    image = Image.fromarray(np.arange(8, dtype=np.uint8).reshape(2, 4), "L").convert("P")
    image.putpalette(RGB.tobytes())
    return saved(image, "PNG", **options)


def blocks(mode: str) -> Image.Image:
    """Large enough areas of one colour that a JPEG keeps them."""
    inks = np.array([[[0, 255, 255, 0], [255, 0, 255, 0]], [[0, 0, 0, 255], [0, 0, 0, 0]]], np.uint8)
    large = np.kron(inks, np.ones((16, 16, 1), np.uint8))
    return Image.frombytes("CMYK", (32, 32), large.tobytes()).convert(mode)


RED_GREEN_BLACK_WHITE = np.kron(
    np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 0], [255, 255, 255]]], np.uint8),
    np.ones((16, 16, 1), np.uint8),
)
THREE = np.stack([GREY] * 3, -1)
WIDE = {256: (3, 4), 257: (3, 2), 259: (3, 1)}

READ: dict[str, tuple[bytes, np.ndarray]] = {
    "rgb": (saved(Image.fromarray(RGB), "PNG"), RGB),
    "grey": (saved(Image.fromarray(GREY), "PNG"), THREE),
    "grey of 4 bits": (png(np.array([[0x01, 0x5F], [0x23, 0xA6]], np.uint8), 4, 0), THREE),
    "1 bit": (
        saved(Image.fromarray(GREY > 60), "PNG"),
        np.stack([np.where(GREY > 60, 255, 0)] * 3, -1),
    ),
    "alpha is dropped": (saved(Image.fromarray(np.dstack([RGB, ALPHA])), "PNG"), RGB),
    "alpha is dropped, webp": (
        saved(Image.fromarray(np.dstack([RGB, ALPHA])), "WEBP", lossless=True, exact=True),
        RGB,
    ),
    "grey and alpha": (saved(Image.fromarray(np.dstack([GREY, ALPHA]), "LA"), "PNG"), THREE),
    "palette": (palette(), RGB),
    "palette with alpha": (palette(transparency=bytes([0, 255, 10, 0])), RGB),
    "palette with a clear colour": (palette(transparency=3), RGB),
    "one clear colour": (saved(Image.fromarray(RGB), "PNG", transparency=(9, 8, 7)), RGB),
    "grey with a clear level": (saved(Image.fromarray(GREY), "PNG", transparency=17), THREE),
    "cmyk jpeg, inverted as Adobe does": (
        saved(blocks("CMYK"), "JPEG", quality=100),
        RED_GREEN_BLACK_WHITE,
    ),
    "cmyk tiff": (saved(blocks("CMYK"), "TIFF"), RED_GREEN_BLACK_WHITE),
    "first of a gif": (frames("GIF"), RGB),
    "first of an animated png": (frames("PNG"), RGB),
    "first page": (frames("TIFF"), RGB),
    "largest value 15": (b"P5 4 2 15\n" + (GREY // 17).tobytes(), THREE),
    "5, 6 and 5 bits": (
        struct.pack("<2sIHHI", b"BM", 66 + 4, 0, 0, 66)
        + struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0)
        + struct.pack("<III", 0xF800, 0x07E0, 0x001F)
        + struct.pack("<HH", 0xF800, 0x07E0),
        np.array([[[255, 0, 0], [0, 255, 0]]], np.uint8),
    ),
    "notes that are damaged": (
        saved(Image.fromarray(RGB), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"),
        RGB,
    ),
    "an orientation that is none": (
        saved(
            Image.fromarray(RGB),
            "PNG",
            exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x63\0\0\0\0\0\0",
        ),
        RGB,
    ),
    "a colour profile": (saved(Image.fromarray(RGB), "PNG", icc_profile=b"a profile"), RGB),
} | {
    f"orientation {number}, {kind}": (oriented(number, kind, **options), RGB)
    for kind, options in {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}.items()
    for number in range(1, 9)
}

DEEP = np.arange(0, 4096, 171, dtype=np.uint16)[: RGB.size].reshape(RGB.shape)  # 12 bits of 16
REFUSED = {
    "grey of 16 bits": saved(Image.fromarray(DEEP[..., 0]), "PNG"),
    "colour of 16 bits": png(DEEP.astype(">u2"), 16, 2),
    "colour and alpha of 16 bits": png(np.dstack([DEEP, DEEP[..., 0]]).astype(">u2"), 16, 6),
    "grey and alpha of 16 bits": png(DEEP[..., :2].astype(">u2"), 16, 4),
    "grey tiff of 16 bits": saved(Image.fromarray(DEEP[..., 0]), "TIFF"),
    "big-endian tiff of 16 bits": saved(Image.fromarray(DEEP[..., 0].astype(">u2")), "TIFF"),
    "colour tiff of 16 bits": tiff(
        DEEP.astype("<u2"), WIDE | {258: (3, [16] * 3), 262: (3, 2), 277: (3, 3), 284: (3, 1)}
    ),
    "colour tiff of 16 bits, plane by plane": tiff(
        DEEP.transpose(2, 0, 1).astype("<u2"),
        WIDE | {258: (3, [16] * 3), 262: (3, 2), 277: (3, 3), 284: (3, 2)},
    ),
    "numbers of 32 bits": saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
    "floating point": saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
    "largest value 65535": b"P6 4 2 65535\n" + DEEP.astype(">u2").tobytes(),
    "largest value 4095, grey": b"P5 4 2 4095\n" + DEEP[..., 0].astype(">u2").tobytes(),
    "plain text of 16 bits": b"P3 1 1 65535\n0 30000 65535\n",
    "portable floats": b"Pf 4 2 -1.0\n" + GREY.astype("<f4").tobytes(),
}


@pytest.mark.parametrize("name", READ)
def test_pixels_are_what_the_file_stands_for(name: str) -> None:
    data, wanted = READ[name]
    image = convert(open_picture(data, extra="train", user="it"), 3)
    assert np.abs(np.asarray(image).astype(int) - wanted).max() <= (1 if "jpeg" in name else 0)


@pytest.mark.parametrize("name", REFUSED)
def test_more_than_8_bits_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DeepError):
        open_picture(REFUSED[name], extra="train", user="it")
    (tmp_path / "x.png").write_bytes(REFUSED[name])
    with pytest.raises(
        ValueError, match=r"^load_data: expected 8-bit images, got mode .* in .*x\.png\. Conv"
    ):
        read_image(EncodedFiles([tmp_path / "x.png"]), 0, 3)
    with pytest.raises(ValueError, match=r"^maps: expected 8 bits a channel in .*x\.png, got mode "):
        _read_image(str(tmp_path / "x.png"), 3, 2)


def test_a_colour_space_that_is_not_read_is_said() -> None:
    data = saved(Image.new("LAB", (4, 2)), "TIFF")
    with pytest.raises(ValueError, match=r"^the colour space LAB$"):
        open_picture(data, extra="train", user="it")


def test_a_file_that_is_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(saved(Image.fromarray(RGB), "PNG"))
    os.truncate(tmp_path / "x.png", 100 << 30)
    with pytest.raises(
        ValueError, match=r"x\.png is too large to decode safely \(more than 1,073,741,824 bytes"
    ):
        read_image(EncodedFiles([tmp_path / "x.png"]), 0, 3)
    with pytest.raises(ValueError, match=r"x\.png is not a readable image \(more than 1,073,741,824 bytes"):
        _read_image(str(tmp_path / "x.png"), 3, 2)


# --- every reader


def turned() -> bytes:
    """Black, with white at the top once it is upright; stored lying on its side."""
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(np.ascontiguousarray(np.rot90(upright))), "PNG", exif=exif)


def folder(root: Path, data: bytes) -> Path:
    for name in "ab":
        (root / name).mkdir(parents=True)
        for number in range(4):
            (root / name / f"{number}.png").write_bytes(data)
    return root


def parquet(root: Path, data: bytes) -> Path:
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    table = pa.table({"image": [{"bytes": data, "path": "x"}] * 8, "label": [0, 1] * 4})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, root / "train.parquet")
    return root / "train.parquet"


def tar(root: Path, data: bytes) -> Path:
    with tarfile.open(root / "train.tar", "w") as file:
        for number in range(8):
            for ending, content in (("png", data), ("cls", str(number % 2).encode())):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    return root / "train.tar"


def loaded(make: Callable[[Path, bytes], Path], stream: bool) -> Callable[[Path, bytes], Tensor]:
    def first(root: Path, data: bytes) -> Tensor:
        train = load_data(make(root, data), validation=0, image_size=32, stream=stream).train
        return train.select(torch.tensor([0])).decoded()[0]

    return first


def of_maps(root: Path, data: bytes) -> Tensor:
    (root / "x.png").write_bytes(data)
    return _read_image(str(root / "x.png"), 3, 32)


READERS = {
    f"{make.__name__}, {'streamed' if stream else 'in memory'}": loaded(make, stream)
    for make in (folder, parquet, tar)
    for stream in (False, True)
} | {"maps": of_maps}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_turns_images_upright(reader: str, tmp_path: Path) -> None:
    pixels = READERS[reader](tmp_path, turned())
    assert pixels.shape == (3, 32, 32)
    assert (pixels[:, :4] == 255).all() and (pixels[:, 12:] == 0).all()


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_16_bits(reader: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected 8.bit"):
        READERS[reader](tmp_path, REFUSED["colour of 16 bits"])
