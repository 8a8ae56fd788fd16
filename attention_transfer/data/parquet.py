"""Hugging Face style parquet files: encoded images in one column, integer labels in another."""

from __future__ import annotations

import difflib
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int64
from torch import Tensor

from .._extras import require
from .._reading import parse_json
from .sources import SPLIT_NAMES, RawSplit, Source

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 256  # read at a time
UNFOLDED, SMALL = 64, 64 << 20  # the columns take up to so many times the file, or so many bytes
MOST_CLASSES = 1 << 20
LABEL_NAMES = ("label", "labels", "target", "class", "fine_label", "y")


class EncodedColumns:
    """The image columns of one or more files, one after the other, encoded images held in memory."""

    def __init__(self, files: Sequence[Path], columns: Sequence[pa.ChunkedArray]) -> None:
        self.files = list(files)
        self.columns = list(columns)
        self.ends = list(accumulate(len(column) for column in columns))

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, row: int) -> bytes | None:
        file, local = self._locate(row)
        return self.columns[file][local].as_py()

    def name(self, row: int) -> str:
        file, local = self._locate(row)
        return f"{self.files[file]}, row {local}"

    def identify(self, rows: Sequence[int]) -> Iterator[str]:
        compute = require("pyarrow.compute", extra="data", user="load_data")
        sizes = [size for column in self.columns for size in compute.binary_length(column).to_pylist()]
        return (str(sizes[row]) for row in rows)

    def _locate(self, row: int) -> tuple[int, int]:
        file = bisect_right(self.ends, row)
        return file, row - (self.ends[file - 1] if file else 0)


def read_parquet(
    files: Sequence[Path], place: Path, image_column: str | None = None, label_column: str | None = None
) -> Source:
    """Read the columns of images and labels; nothing is decoded yet.

    A file belongs to the split its name (or a folder above it) speaks of: train, test, val, valid or
    validation. If no name speaks of one, all files are training files.

    Raises:
        ValueError: if a file is corrupt, a column is unknown or cannot be told, or labels are not integers.
    """
    splits: dict[str, RawSplit] = {}
    names: dict[Path, list[str]] = {}
    for split, members in _group_by_split(files, place).items():
        tables = [_read_file(file, image_column, label_column) for file in members]
        content = EncodedColumns(members, [images for images, _, _ in tables])
        splits[split] = RawSplit(content, torch.cat([labels for _, labels, _ in tables]))
        names |= {file: classes for file, (_, _, classes) in zip(members, tables, strict=True) if classes}
    return Source(splits, _agreed(names) or _numbered(splits), str(place))


def _agreed(names: dict[Path, list[str]]) -> list[str]:
    """The class names, which every file that has some must give in the same order."""
    if not names:
        return []
    first, expected = next(iter(names.items()))
    for file, classes in names.items():
        if classes != expected:
            raise ValueError(
                f"load_data: expected the classes of {first} ({', '.join(expected[:10])}) in {file} too, "
                f"got {', '.join(classes[:10])}. Number the classes of all files alike."
            )
    return expected


def _numbered(splits: dict[str, RawSplit]) -> list[str]:
    highest = max(int(split.labels.max()) if len(split.labels) else 0 for split in splits.values())
    if highest >= MOST_CLASSES:
        raise ValueError(
            f"load_data: expected labels below {MOST_CLASSES:,}, got {highest:,}. "
            "Pass the label_column that holds class numbers from 0."
        )
    return [str(label) for label in range(highest + 1)]


def _group_by_split(files: Sequence[Path], place: Path) -> dict[str, list[Path]]:
    groups: dict[str | None, list[Path]] = defaultdict(list)
    for file in sorted(files):
        groups[_split_of(file.relative_to(place).as_posix() if place.is_dir() else file.name)].append(file)
    nameless = groups.pop(None, [])
    if groups and nameless:
        raise ValueError(
            f"load_data: expected every parquet file in {place} to be named after its split, "
            f"got {nameless[0].name}. "
            "Put train, validation or test into its name, or move it away."
        )
    return {name: group for name, group in groups.items() if name} or {"train": nameless}


def _split_of(name: str) -> str | None:
    words = re.findall(r"[a-z]+", name.lower().removesuffix(".parquet"))
    return next((SPLIT_NAMES[word] for word in reversed(words) if word in SPLIT_NAMES), None)


def _read_file(
    path: Path, image_column: str | None, label_column: str | None
) -> tuple[pa.ChunkedArray, Int64[Tensor, " n"], list[str] | None]:
    pq = require("pyarrow.parquet", extra="data", user="load_data")
    pa = require("pyarrow", extra="data", user="load_data")
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        features = _hugging_face_features(schema)
        image = _choose_column(
            path, schema, "image_column", image_column, _image_candidates(schema, features)
        )
        label = _choose_column(
            path, schema, "label_column", label_column, _label_candidates(schema, features)
        )
        table = _read_columns(file, path, list(dict.fromkeys((image, label))))
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        detail = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"load_data: cannot read {path} ({detail}). Copy or download the file again."
        ) from None
    names = features.get(label, {}).get("names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        names = None
    return _bytes_of(table[image], path, image), _integers(table[label], path, label), names


def _read_columns(file: Any, path: Path, columns: list[str]) -> pa.Table:
    """The columns, as long as they come to no more than such a file may hold.

    A few bytes of parquet can stand for any number of equal rows.
    """
    pa = require("pyarrow", extra="data", user="load_data")
    limit = UNFOLDED * path.stat().st_size + SMALL
    batches, held = [], 0
    for batch in file.iter_batches(ROWS, columns=columns):
        batches.append(batch)
        held += batch.nbytes
        if held > limit:
            raise ValueError(
                f"load_data: expected at most {limit:,} bytes of images and labels in {path}, got more: it "
                "unfolds beyond measure. Write it with encoded images (JPEG, PNG), once each."
            )
    schema = pa.schema([file.schema_arrow.field(name) for name in columns])
    return pa.Table.from_batches(batches, schema if not batches else None).select(columns)


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
        raise ValueError(
            f"load_data: no column {wanted!r} in {path}. {hint}Pass {argument}= one of: {columns}."
        )
    if wanted is None and len(candidates) != 1:
        found = "none" if not candidates else "several: " + ", ".join(candidates)
        raise ValueError(
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


def _bytes_of(column: pa.ChunkedArray, path: Path, name: str) -> pa.ChunkedArray:
    if _has_bytes(column.type):
        compute = require("pyarrow.compute", extra="data", user="load_data")
        return compute.struct_field(column, "bytes")
    if _is_binary(column.type):
        return column
    raise ValueError(
        f"load_data: expected encoded images in column {name!r} of {path}, got {_short(column.type)}. "
        "Pass the image_column that holds bytes, or structs of {bytes, path}."
    )


def _integers(column: pa.ChunkedArray, path: Path, name: str) -> Int64[Tensor, " n"]:
    import pyarrow as pa

    if not pa.types.is_integer(column.type) or column.null_count:
        got = f"{column.null_count} empty cells" if pa.types.is_integer(column.type) else str(column.type)
        raise ValueError(
            f"load_data: expected integer labels in column {name!r} of {path}, got {got}. "
            "Pass the label_column that holds class numbers from 0."
        )
    numbers = column.to_numpy()
    if len(numbers) and int(numbers.max()) > torch.iinfo(torch.int64).max:
        raise ValueError(
            f"load_data: expected class numbers in column {name!r} of {path}, got {int(numbers.max())}. "
            "Pass the label_column that holds class numbers from 0."
        )
    return torch.from_numpy(numbers.astype("int64"))
