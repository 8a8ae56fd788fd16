"""Where the images of tar files lie, and what they show: found once by the headers, then kept in a file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .._colours import print_safely
from .._errors import InputError
from .._files import write_atomically
from .._patterns import cache_folder
from .._pictures import FORMATS, begins_as_picture
from .._reading import check_regular, open_file, parse_json
from .folder import IMAGE_SUFFIXES
from .sources import LABEL_NAMES
from .stamps import Stamp

INDEX = "attention-transfer-index.safetensors"
KEY = "attention_transfer_index"  # of its metadata
VERSION = 3
NUMBERS = ("offsets", "sizes", "labels")  # of each image
THREADS = 8  # each waits for its own file
LABEL_ENDINGS = ("cls", "json")
BEGINNING = 1 << 20  # bytes of a member by which an image is known
LABEL_BYTES = 1 << 20  # of a .cls or .json member, which is read whole
BLOCK = 512
END_BLOCKS = 40  # of zeros that are looked at behind the end of a tar file: what it is padded to, twice


@dataclass(frozen=True)
class Shard:
    """The images of one tar file, in its order.

    Attributes:
        stamp: of the file when it was looked at.
        names: of the members, UTF-8, each followed by a zero byte.
        offsets, sizes: of their content, in bytes.
        labels: their classes.
    """

    stamp: Stamp
    names: bytes
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray


def index_shards(paths: Sequence[Path], place: Path, label_field: str | None = None) -> list[Shard]:
    """What is in these tar files, from the index file where that still fits them, else from their headers.

    The index is kept in `place`, or in the user's cache folder where `place` cannot be written to. It counts
    for every file whose size and time of change are as they were.

    Args:
        paths: the tar files, within `place`.
        place: the data set's folder.
        label_field: of .json members; by default the first of the usual names that is there.

    Raises:
        ValueError: if a file is cut off, or damaged, or an image has no label, or a name is there twice.
        OSError: if a file cannot be read.
    """
    index = _Index.load(place, label_field)
    stale = [path for path in paths if not index.fits(path)]
    if stale:
        try:
            for count, (path, shard) in enumerate(_scan_all(stale, label_field), start=1):
                index.shards[index.key(path)] = shard
                _show(f"looking through tar file {count} of {len(stale)}")
        finally:  # what was found in minutes is kept, whatever happens
            _show("")
            index.save()
    return [index.shards[index.key(path)] for path in paths]


def _show(text: str) -> None:
    """A line that is written over, for whoever watches: a million images take a minute or two."""
    if sys.stderr.isatty():
        print_safely(text, end="", stream=sys.stderr, over=True)


def _scan_all(paths: Sequence[Path], label_field: str | None) -> Iterator[tuple[Path, Shard]]:
    pool = ThreadPoolExecutor(THREADS)
    try:
        yield from zip(paths, pool.map(lambda path: scan(path, label_field), paths), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


# Index file


@dataclass(frozen=True)
class _Index:
    """What is known of the tar files in a folder, by their paths within it."""

    place: Path
    label_field: str | None
    shards: dict[str, Shard] = field(default_factory=dict)

    @classmethod
    def load(cls, place: Path, label_field: str | None) -> _Index:
        """The index of a folder; empty if there is none, or one that is damaged or of another kind."""
        index = cls(place, label_field)
        for file in index._files:
            index.shards.update(_unpack(file, label_field))
        return index

    @property
    def _files(self) -> list[Path]:
        """Where it may be kept: the first one that can be written to is used."""
        name = hashlib.sha256(str(self.place.resolve()).encode()).hexdigest()[:16]
        own = cache_folder()
        return [self.place / INDEX, *([own / f"tar-{name}.safetensors"] if own else [])]

    def key(self, path: Path) -> str:
        return path.relative_to(self.place).as_posix()

    def fits(self, path: Path) -> bool:
        known = self.shards.get(self.key(path))
        return known is not None and known.stamp == Stamp.of(path)

    def save(self) -> None:
        data = _pack(self.shards, self.label_field)
        for file in self._files:
            with contextlib.suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, data)
                return


def _pack(shards: dict[str, Shard], label_field: str | None) -> bytes:
    facts = {
        "version": VERSION,
        "label_field": label_field,
        "shards": [
            [key, shard.stamp.size, shard.stamp.changed, len(shard.labels)] for key, shard in shards.items()
        ],
    }
    parts = shards.values()
    arrays = {
        name: np.concatenate([getattr(shard, name) for shard in parts] or [np.empty(0, np.int64)])
        for name in NUMBERS
    }
    arrays["names"] = np.frombuffer(b"".join(shard.names for shard in parts), np.uint8)
    return save(arrays, {KEY: json.dumps(facts)})


def _unpack(file: Path, label_field: str | None) -> dict[str, Shard]:
    """What `_pack` wrote, of which anyone may have made something else: then nothing."""
    try:
        check_regular(file)
        with safe_open(file, framework="np") as opened:
            facts = parse_json((opened.metadata() or {})[KEY])
            if (facts["version"], facts["label_field"]) != (VERSION, label_field):
                return {}
            arrays = {name: opened.get_tensor(name) for name in (*NUMBERS, "names")}
        return dict(_shards_of(facts["shards"], arrays))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, OverflowError):
        return {}


def _shards_of(rows: list[Any], arrays: dict[str, np.ndarray]) -> Iterator[tuple[str, Shard]]:
    """The shards one by one.

    Raises:
        ValueError: if numbers contradict each other, or speak of places that are not in the file.
    """
    ends = np.flatnonzero(arrays["names"] == 0) + 1  # of names
    counts = [count for _, _, _, count in rows]
    if any(type(count) is not int or count < 1 for count in counts):
        raise InputError("no numbers of images")
    if arrays["names"].dtype != np.uint8 or any(arrays[name].dtype != np.int64 for name in NUMBERS):
        raise InputError("no whole numbers")
    if any(array.shape != (sum(counts),) for array in (ends, *(arrays[name] for name in NUMBERS))):
        raise InputError("not as many as there are images")
    stops = np.cumsum(counts).tolist()
    for (key, size, changed, count), stop in zip(rows, stops, strict=True):
        offsets, sizes, labels = (arrays[name][stop - count : stop] for name in NUMBERS)
        # guard: tar-index-contradicts
        if min(offsets.min(), sizes.min()) < 0 or (sizes > size - offsets).any():
            raise InputError("outside of the file")
        start = ends[stop - count - 1] if stop > count else 0
        names = arrays["names"][start : ends[stop - 1]].tobytes()
        yield key, Shard(Stamp(size, changed), names, offsets, sizes, labels)


# Tar files


def scan(path: Path, label_field: str | None) -> Shard:
    """Look through a tar file; of the images only headers are read.

    Raises:
        ValueError, OSError: as `index_shards`.
    """
    stamp = Stamp.of(path)
    images: dict[str, tarfile.TarInfo] = {}
    others: dict[str, list[tarfile.TarInfo]] = {}
    labels: dict[str, dict[str, int | None]] = {}
    with open_file(path, buffering=0) as file:  # a buffer would read what is jumped over
        for member in _members(path, file):
            key, ending = _key(member.name)
            if f".{ending.rpartition('.')[2]}" in IMAGE_SUFFIXES:
                _check_image(path, member, ending, images.get(key))
                images[key] = member
            elif ending not in LABEL_ENDINGS:
                others.setdefault(key, []).extend([member] if member.isreg() else [])
            else:
                found = labels.setdefault(key, {})
                if ending in found:
                    raise _error(path, member.name, "one file of a name", "it twice", "Keep one of them")
                found[ending] = _read_label(path, member, file, label_field)
        for key, found in labels.items():
            if key not in images and others.get(key) and set(found.values()) != {None}:
                images[key] = _choose_by_content(path, others[key], file)
    images = dict(sorted(images.items(), key=lambda item: item[1].offset_data))
    if not images:
        raise InputError(
            f"load_data: expected images (KEY.jpg, KEY.png, ...) in {path}, got none. "
            "docs/large-data.md shows how to make shards."
        )
    members = list(images.values())
    return Shard(
        stamp,
        b"".join(member.name.encode("utf-8", "surrogateescape") + b"\0" for member in members),
        np.array([member.offset_data for member in members], dtype=np.int64),
        np.array([member.size for member in members], dtype=np.int64),
        np.array([_label(path, images[key], labels.get(key, {})) for key in images], dtype=np.int64),
    )


def _members(path: Path, file: io.FileIO) -> Iterator[tarfile.TarInfo]:
    """Every header of a tar file that is whole."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would remember them all
                yield member
            end = tar.offset
    # guard: tar-damaged
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise _damaged(path, str(error)) from None
    file.seek(end)
    behind = file.read(BLOCK * END_BLOCKS)
    if len(behind) < BLOCK:
        raise _damaged(path, "it ends without the mark of its end: it was cut off")
    if behind.strip(b"\0"):
        raise _damaged(path, f"from byte {end:,} on there is something else than members")


def _damaged(path: Path, detail: str) -> InputError:
    return InputError(
        f"load_data: expected a whole, uncompressed tar file, got {path} ({detail}). "
        "Copy, download, unzip or make it again."
    )


def printable(name: str) -> str:
    """A member's name as it may stand in a message: on one line."""
    return name if name.isprintable() else ascii(name)


def _error(path: Path, name: str, expected: str, got: str, remedy: str) -> InputError:
    return InputError(
        f"load_data: expected {expected}, got {got}: {path}, member {printable(name)}. {remedy}."
    )


def _key(name: str) -> tuple[str, str]:
    """The key that image and label share, up to the first dot of the file's name, and the ending."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return f"{folder}{slash}{stem}", ending.lower() if stem else ""


def _check_image(path: Path, member: tarfile.TarInfo, ending: str, other: tarfile.TarInfo | None) -> None:
    if not member.isreg() or member.sparse is not None:
        raise _error(path, member.name, "images stored as they are", "a link", "Make the tar file again")
    if member.name.startswith("/") or ".." in member.name.split("/") or "\0" in member.name:
        raise _error(path, member.name, "plain names", "a path that leads elsewhere", "Rename it")
    if "." in ending:
        raise _error(
            path,
            member.name,
            "one image a key, which is the name up to its first dot",
            "several dots",
            "Rename it",
        )
    if other is not None:
        raise _error(path, member.name, "one image a key", f"{printable(other.name)} too", "Keep one of them")


def _choose_by_content(path: Path, members: list[tarfile.TarInfo], file: io.FileIO) -> tarfile.TarInfo:
    """The image among the members that belong to a label, none of which ends as images do."""
    for member in members:
        file.seek(member.offset_data)
        if begins_as_picture(io.BytesIO(file.read(min(member.size, BEGINNING)))):
            _check_image(path, member, _key(member.name)[1], None)
            return member
    expected = f"an image for every label, of {', '.join(FORMATS)}"
    raise _error(path, members[0].name, expected, "something else", "Convert it, or leave its label out")


# Labels


def _read_label(path: Path, member: tarfile.TarInfo, file: io.FileIO, label_field: str | None) -> int | None:
    """The class that a .cls or .json member gives; None from JSON that gives none."""
    if not member.isreg() or member.size > LABEL_BYTES:
        raise _error(path, member.name, "a small file with a label", "another thing", "Make it again")
    place = file.tell()
    file.seek(member.offset_data)
    text = file.read(member.size)
    file.seek(place)
    try:
        as_number = member.name.lower().endswith(".cls")
        value = int(text) if as_number else _field(parse_json(text), label_field)
    except ValueError:
        value = text[:40].decode(errors="replace")
    if value is None or (type(value) is int and abs(value) < 1 << 63):
        return value
    remedy = "Number the classes, and name them in classes.txt"
    raise _error(path, member.name, "a whole number as label", repr(value)[:60], remedy)


def _field(values: Any, label_field: str | None) -> Any:
    if not isinstance(values, dict):
        return values
    names = LABEL_NAMES if label_field is None else (label_field,)
    return next((values[name] for name in names if values.get(name) is not None), None)


def _label(path: Path, image: tarfile.TarInfo, found: dict[str, int | None]) -> int:
    labels = {label for label in found.values() if label is not None}
    if not labels:
        got = "none" if not found else "a .json file without one"
        remedy = "Add a .cls or .json file, or name the field by label_column"
        raise _error(path, image.name, "a label for every image", got, remedy)
    if len(labels) > 1:
        got = " and ".join(f"{label} in .{ending}" for ending, label in found.items())
        raise _error(path, image.name, "one label for an image", got, "Keep one of them")
    return labels.pop()
