"""Hugging Face style parquet files: encoded images in one column, integer labels in another."""

from __future__ import annotations

import difflib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int64
from torch import Tensor

from .._errors import InputError
from .._extras import require
from .._reading import first_line, parse_json
from .decode import Stretches
from .sources import LABEL_NAMES, RawSplit, Source, group_by_split, numbered_classes
from .stamps import Stamp, check_unchanged

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

GROUPS_BYTES = 256 << 20  # of row groups that a process keeps, so that images are not read in their order
MOST_GROUPS = 64
ROWS = 256  # read at a time
UNFOLDED, SMALL = 64, 64 << 20  # the columns take up to so many times the file, or so many bytes


class EncodedRows:
    """The image columns of one or more files, one after the other, read by row groups when asked for.

    A process keeps the row groups that it read last, up to 256 MiB of them, or else two: no more of them are
    ever in memory.
    """

    def __init__(self, columns: Sequence[ImageColumn]) -> None:
        self.columns = list(columns)
        self.groups = [
            _RowGroup(column, number, first)
            for column in columns
            for number, first in enumerate(column.firsts)
        ]
        ends = list(accumulate(group.rows for group in self.groups))
        largest = max((group.bytes for group in self.groups), default=0)
        window = min(MOST_GROUPS, max(1, GROUPS_BYTES // max(1, largest)))
        self.stretches = Stretches(torch.tensor(ends, dtype=torch.int64), window, whole=True)
        self._ends = ends
        self._prepare()

    def _prepare(self) -> None:
        self._lock = Lock()  # else threads that miss the same row group would each read it
        self._images = lru_cache(self.stretches.window + 1)(lambda group: self.groups[group].read())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_images")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, row: int) -> bytes | None:
        group, local = self._locate(row)
        with self._lock:
            images = self._images(group)
        return images[local].as_py()

    def name(self, row: int) -> str:
        group, local = self._locate(row)
        return f"{self.groups[group].column.path}, row {self.groups[group].first + local}"

    def identify(self, rows: Sequence[int]) -> Iterator[str]:
        """By the size of the row group and the place in it: the sizes of the images would have to be read."""
        places = (self._locate(row) for row in rows)
        return (f"{self.groups[group].bytes} {local}" for group, local in places)

    def expect(self, row: int) -> None:
        pass

    def _locate(self, row: int) -> tuple[int, int]:
        group = bisect_right(self._ends, row)
        return group, row - (self._ends[group - 1] if group else 0)


@dataclass(frozen=True)
class ImageColumn:
    """Where the encoded images of one file are: in the leaf `name` of its columns."""

    path: Path
    stamp: Stamp
    metadata: pq.FileMetaData
    name: str

    @property
    def firsts(self) -> list[int]:
        """The first row of each row group."""
        counts = (self.metadata.row_group(i).num_rows for i in range(self.metadata.num_row_groups))
        return list(accumulate(counts, initial=0))[:-1]


@dataclass(frozen=True)
class _RowGroup:
    column: ImageColumn
    number: int
    first: int

    @property
    def _metadata(self) -> Any:
        return self.column.metadata.row_group(self.number)

    @property
    def rows(self) -> int:
        return self._metadata.num_rows

    @property
    def bytes(self) -> int:
        """Of all columns, once decompressed.

        A column's own size stays unasked: on damaged metadata pyarrow's `RowGroupMetaData.column` ends the
        process (its C++ exception is not caught).
        """
        # guard: parquet-bytes
        return self._metadata.total_byte_size

    def read(self) -> pa.ChunkedArray:
        """The encoded images.

        Raises:
            OSError: if the file is gone.
            ValueError: if it was changed, or is damaged.
        """
        check_unchanged(self.column.path, self.column.stamp)
        with _readable(self.column.path):
            pq = require("pyarrow.parquet", extra="train", user="load_data")
            with pq.ParquetFile(self.column.path, metadata=self.column.metadata) as file:
                table = _read_columns(file, self.column.path, [self.column.name], [self.number])
        images = table.column(0)
        return _bytes_field(images) if _has_bytes(images.type) else images


def read_parquet(
    files: Sequence[Path], place: Path, image_column: str | None = None, label_column: str | None = None
) -> Source:
    """Read the labels, and see where the images are; none is read yet.

    Files belong to splits by their names, as `group_by_split` has it.

    Raises:
        ValueError: if a file is corrupt, a column is unknown or cannot be told, or labels are not integers.
    """
    splits: dict[str, RawSplit] = {}
    names: dict[Path, list[str]] = {}
    groups, notes = group_by_split(files, place)
    for split, members in groups.items():
        tables = [_read_file(file, image_column, label_column) for file in members]
        content = EncodedRows([images for images, _, _ in tables])
        splits[split] = RawSplit(content, torch.cat([labels for _, labels, _ in tables]))
        names |= {file: classes for file, (_, _, classes) in zip(members, tables, strict=True) if classes}
    return Source(splits, _agreed(names) or numbered_classes(splits), str(place), notes=notes)


def _agreed(names: dict[Path, list[str]]) -> list[str]:
    """The class names, which every file that has some must give in the same order."""
    if not names:
        return []
    first, expected = next(iter(names.items()))
    for file, classes in names.items():
        if classes != expected:
            raise InputError(
                f"load_data: expected the classes of {first} ({', '.join(expected[:10])}) in {file} too, "
                f"got {', '.join(classes[:10])}. Number the classes of all files alike."
            )
    return expected


def _read_file(
    path: Path, image_column: str | None, label_column: str | None
) -> tuple[ImageColumn, Int64[Tensor, " n"], list[str] | None]:
    pq = require("pyarrow.parquet", extra="train", user="load_data")
    stamp = Stamp.of(path)
    with _readable(path), pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        features = _hugging_face_features(schema)
        image = _choose_column(
            path, schema, "image_column", image_column, _image_candidates(schema, features)
        )
        label = _choose_column(
            path, schema, "label_column", label_column, _label_candidates(schema, features)
        )
        labels = _read_columns(file, path, [label])[label]
        names = features.get(label, {}).get("names")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            names = None
    column = ImageColumn(path, stamp, file.metadata, _leaf(schema.field(image), path))
    return column, _integers(labels, path, label), names


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """One line for all that Arrow has to say about a damaged file."""
    pa = require("pyarrow", extra="train", user="load_data")
    try:
        yield
    # guard: parquet-damaged
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise InputError(
            f"load_data: cannot read {path} ({first_line(error)}). Copy or download the file again."
        ) from None


def _read_columns(
    file: pq.ParquetFile, path: Path, columns: list[str], row_groups: list[int] | None = None
) -> pa.Table:
    """The columns, as long as they come to no more than such a file may hold.

    A few bytes of parquet can stand for any number of equal rows.
    """
    pa = require("pyarrow", extra="train", user="load_data")
    limit = UNFOLDED * path.stat().st_size + SMALL
    batches, held = [], 0
    # threads of Arrow's own do not go well with forked workers
    for batch in file.iter_batches(ROWS, row_groups=row_groups, columns=columns, use_threads=False):
        batches.append(batch)
        held += batch.nbytes
        # guard: parquet-bomb
        if held > limit:
            raise InputError(
                f"load_data: expected at most {limit:,} bytes of images and labels in {path}, got more: it "
                "unfolds beyond measure. Write it with encoded images (JPEG, PNG), once each."
            )
    return pa.Table.from_batches(batches) if batches else file.read(columns=columns)


def _hugging_face_features(schema: pa.Schema) -> dict[str, Any]:
    """What the `datasets` library wrote about each column: {"img": {"_type": "Image"}, ...}."""
    try:
        features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: each for name, each in features.items() if isinstance(each, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _image_candidates(schema: pa.Schema, features: dict[str, Any]) -> list[str]:
    declared = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    structs = [field.name for field in schema if _has_bytes(field.type)]
    return declared or structs or [field.name for field in schema if _is_binary(field.type)]


def _label_candidates(schema: pa.Schema, features: dict[str, Any]) -> list[str]:
    import pyarrow as pa

    declared = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    usual = [name for name in LABEL_NAMES if name in (declared or schema.names)]
    return usual[:1] or declared or [field.name for field in schema if pa.types.is_integer(field.type)]


def _choose_column(
    path: Path, schema: pa.Schema, argument: str, wanted: str | None, candidates: list[str]
) -> str:
    """The column asked for, or the only candidate."""
    columns = ", ".join(f"{field.name} ({_short(field.type)})" for field in schema)
    if wanted is not None and wanted not in schema.names:
        near = difflib.get_close_matches(wanted, schema.names)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"load_data: no column {wanted!r} in {path}. {hint}Pass {argument}= one of: {columns}."
        )
    if wanted is None and len(candidates) != 1:
        found = "none" if not candidates else "several: " + ", ".join(candidates)
        raise InputError(
            f"load_data: cannot tell the {argument} of {path} (found {found}). "
            f"Pass {argument}= one of: {columns}."
        )
    return wanted or candidates[0]


def _short(kind: pa.DataType) -> str:
    return "struct" if hasattr(kind, "fields") or str(kind).startswith("struct") else str(kind)


def _has_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(kind) and any(field.name == "bytes" for field in kind)


def _is_binary(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _leaf(field: pa.Field, path: Path) -> str:
    """The path of the encoded images within the schema."""
    if _has_bytes(field.type):
        return f"{field.name}.bytes"
    if _is_binary(field.type):
        return field.name
    raise InputError(
        f"load_data: expected encoded images in column {field.name!r} of {path}, got {_short(field.type)}. "
        "Pass the image_column that holds bytes, or structs of {bytes, path}."
    )


def _bytes_field(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return require("pyarrow.compute", extra="train", user="load_data").struct_field(column, "bytes")


def _integers(column: pa.ChunkedArray, path: Path, name: str) -> Int64[Tensor, " n"]:
    import pyarrow as pa

    if not pa.types.is_integer(column.type) or column.null_count:
        got = f"{column.null_count} empty cells" if pa.types.is_integer(column.type) else str(column.type)
        raise InputError(
            f"load_data: expected integer labels in column {name!r} of {path}, got {got}. "
            "Pass the label_column that holds class numbers from 0."
        )
    numbers = column.to_numpy()
    if len(numbers) and int(numbers.max()) > torch.iinfo(torch.int64).max:
        raise InputError(
            f"load_data: expected class numbers in column {name!r} of {path}, got {int(numbers.max())}. "
            "Pass the label_column that holds class numbers from 0."
        )
    return torch.from_numpy(numbers.astype("int64"))
