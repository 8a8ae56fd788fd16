"""Where data layers read from: LMDBs of Datum records, and encoded images."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attention_transfer._errors import InputError
from attention_transfer._pictures import DeepError, open_picture
from attention_transfer._reading import first_line
from attention_transfer.caffe import schema
from attention_transfer.caffe.files.lmdb import Pages
from attention_transfer.caffe.schema import DecodeError

USER = "Data"


class Database:
    """An LMDB, read by place in the order of its keys. Use `open_database`.

    Attributes:
        keys: of all records.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = path / "data.mdb" if path.is_dir() else path
        try:
            self._pages = Pages(file)
        except ValueError as error:
            raise InputError(
                f"{USER}: expected an LMDB in {path}, got something else, or a damaged one ({error}). "
                "Copy or write it again."
            ) from None
        self.keys = [place.key for place in self._pages.places]
        if not self.keys:
            raise InputError(f"{USER}: expected records in the LMDB {path}, got none. Write it again.")

    def __len__(self) -> int:
        return len(self.keys)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_database, (str(self.path),)  # a copy is the same, open, database

    def read(self, places: Sequence[int]) -> list[Any]:
        """The Datum records at these places.

        Raises:
            ValueError: if one is damaged; the message holds its key.
        """
        return [self._datum(place) for place in places]

    def _datum(self, place: int) -> Any:
        try:
            return schema.Datum.FromString(self._pages.value(self._pages.places[place]))
        except DecodeError:
            raise InputError(
                f"{USER}: expected a Datum under the key {self.keys[place]!r} of {self.path}, got something "
                "else. Write the LMDB again."
            ) from None

    def name(self, place: int) -> str:
        """What to call a record in an error."""
        return f"the record {self.keys[place].decode(errors='replace')!r} of {self.path}"


_open: weakref.WeakValueDictionary[str, Database] = weakref.WeakValueDictionary()


def open_database(path: str) -> Database:
    """The LMDB at `path`: one object for all who read it, since a process may open an LMDB but once.

    Raises:
        ValueError: if there is something else, or it is empty.
        FileNotFoundError: if there is nothing.
    """
    resolved = Path(path).resolve()
    if not resolved.exists():
        raise FileNotFoundError(
            f"{USER}: expected an LMDB in {path}, got nothing there. "
            "Paths are relative to the working directory; make one with `attention-transfer caffe lmdb`."
        )
    database = _open.get(str(resolved))
    if database is None:
        database = _open[str(resolved)] = Database(resolved)
    return database


def first_record(path: str, kind: Any) -> Any:
    """The first record of an LMDB, as a message of the class `kind`, without reading through the others.

    Raises:
        ValueError: if there is none.
        OSError: if the file cannot be read.
    """
    if not path:
        raise InputError(f"{USER}: expected the path of an LMDB, got none.")
    folder = Path(path)
    pages = Pages(folder / "data.mdb" if folder.is_dir() else folder, first_only=True)
    if not pages.places:
        raise InputError(f"{USER}: expected records in the LMDB {path}, got none.")
    try:
        return kind.FromString(pages.value(pages.places[0]))
    except DecodeError:
        raise InputError(
            f"{USER}: expected a {kind.DESCRIPTOR.name} as the first record of {path}."
        ) from None


def datum_pixels(datum: Any, color: bool | None, what: str) -> np.ndarray:
    """The image of a Datum, (c, h, w): uint8, or float32 for `float_data`.

    Args:
        color: three channels or one, for an encoded image; None as it is.
        what: how to call it in an error.

    Raises:
        ValueError: if its data do not fit its shape, or it cannot be decoded.
    """
    if datum.encoded:
        return decode_image(datum.data, color, what)
    shape = (datum.channels, datum.height, datum.width)
    if datum.data:
        values = np.frombuffer(datum.data, dtype=np.uint8)
    else:
        values = np.array(datum.float_data, dtype=np.float32)
    if min(shape) < 1 or values.size != shape[0] * shape[1] * shape[2]:
        raise InputError(
            f"{USER}: expected an image of (c, h, w) {shape} in {what}, got {values.size} values. "
            "Write it again."
        )
    return values.reshape(shape)


def decode_image(data: bytes, color: bool | None, what: str) -> np.ndarray:
    """An encoded image as uint8 (c, h, w), channels in the order blue, green, red.

    As OpenCV does, it is turned upright by EXIF unless it comes as it is.

    Args:
        color: three channels or one; None as it is, with alpha as a fourth.
        what: how to call it in an error.

    Raises:
        ValueError: if it cannot be decoded, is too large, or has not 8 bits a channel.
    """
    try:
        image = open_picture(data, extra="caffe", user=USER, upright=color is not None)
    except DeepError as error:
        raise InputError(f"{USER}: expected 8 bits a channel in {what}, got the mode {error}.") from None
    except ValueError as error:
        raise InputError(
            f"{USER}: expected an image in {what}, got what cannot be decoded: {first_line(error)}."
        ) from None
    if image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")
    pixels = np.asarray(image.convert(_mode(image.mode, color)))
    if pixels.ndim == 2:
        return pixels[None]
    order = [2, 1, 0, 3][: pixels.shape[2]]
    return np.ascontiguousarray(pixels[..., order].transpose(2, 0, 1))


def _mode(mode: str, color: bool | None) -> str:
    if color is not None:
        return "RGB" if color else "L"
    if mode in ("1", "L"):
        return "L"
    return "RGBA" if mode in ("RGBA", "LA", "PA") else "RGB"
