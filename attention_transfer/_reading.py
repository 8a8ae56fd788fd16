"""Text, JSON, YAML and CSV out of files that anyone may have written: what is wrong ends in a ValueError."""

from __future__ import annotations

import csv
import errno
import functools
import io
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from ._errors import InputError
from ._extras import require

LARGEST = 64 << 20  # bytes of a text file: the metrics of 100,000 epochs take a third of it
LARGEST_YAML = 1 << 20  # characters; a recipe takes 2,000, and PyYAML a second for 100,000
DEEPEST = 32  # levels in JSON or YAML; what this package writes has 5
SHOWN = 60  # characters of a value in an error
DECEPTIVE = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse what is no file with an end: a pipe never gives any, and /dev/zero gives bytes without end.

    A link is what it points to.

    Raises:
        OSError: if it is something else, or not there.
    """
    _check_mode(Path(path).stat().st_mode, path)


def _check_mode(mode: int, path: str | os.PathLike[str]) -> None:
    # guard: regular-files
    if stat.S_ISREG(mode):
        return
    is_kind = (stat.S_ISDIR, stat.S_ISFIFO, stat.S_ISSOCK, stat.S_ISCHR, stat.S_ISBLK)
    names = ("a folder", "a named pipe", "a socket", "a device", "a device")
    got = next((name for test, name in zip(is_kind, names, strict=True) if test(mode)), "something else")
    number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise OSError(number, f"expected a file, got {got}", os.fspath(path))


def open_descriptor(path: str | os.PathLike[str]) -> int:
    """A file, open for reading; whatever may stand in its place by then, opening it does not wait.

    Raises:
        OSError: as `check_regular`, or if it cannot be read.
    """
    check_regular(path)  # before it is opened, which some devices take as an order
    flags = ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY")
    descriptor = os.open(path, os.O_RDONLY | sum(getattr(os, flag, 0) for flag in flags))
    try:
        _check_mode(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def open_file(path: str | os.PathLike[str], *, buffering: int = -1) -> Any:
    """A file, open for reading its bytes.

    Raises:
        OSError: as `open_descriptor`.
    """
    return os.fdopen(open_descriptor(path), "rb", buffering=buffering)


def read_bytes(path: str | os.PathLike[str], limit: int | None = None) -> bytes:
    """The bytes of a file.

    Raises:
        ValueError: if there are more than `limit`.
        OSError: as `open_file`.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise InputError(f"more than {limit:,} bytes")
        return file.read(-1 if limit is None else limit)


def read_text(path: Path, limit: int = LARGEST) -> str:
    """A file as UTF-8.

    Raises:
        ValueError: if it is larger than `limit` bytes, or something else.
        OSError: if it cannot be read.
    """
    with open_file(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise InputError(f"more than {limit:,} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text: byte {error.start:,} is {data[error.start]:#04x}") from None


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: in one line, if it is damaged, has a name twice, or is nested beyond what anyone means.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_twins)
    # guard: json-recursion
    except RecursionError:
        raise InputError("nested too deeply") from None
    except ValueError as error:
        raise InputError(f"not JSON: {one_line(error)}") from None
    # guard: json-depth
    if _depth_exceeds(value, DEEPEST):
        raise InputError("nested too deeply")
    return value


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if again := _first_twin([name for name, _ in pairs]):
        raise InputError(f"{shown(pairs[again][0])} is there twice")
    return dict(pairs)


def _first_twin(names: list[str]) -> int:
    """The place of the first name that was there before; 0 if there is none."""
    seen: set[str] = set()
    return next((i for i, name in enumerate(names) if name in seen or seen.add(name)), 0)  # type: ignore[func-returns-value]


def _depth_exceeds(value: Any, limit: int) -> bool:
    """Level by level, so that no depth is too much for this function itself."""
    level = [value]
    for _ in range(limit):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += each.values()
            elif isinstance(each, list):
                inner += each
        level = inner
        if not level:
            return False
    return True


def parse_yaml(text: str) -> list[Any]:
    """The documents of a YAML text: plain values, of which no tag makes an object.

    Aliases are refused, by which a few lines can stand for more values than fit into memory, and what says
    something else than it looks: 010 (8), 1:30 (90), dates, a key that is there twice.

    Raises:
        ValueError: in one line, if it is damaged, too large, has aliases, is nested deeply, or deceives.
    """
    yaml = require("yaml", extra="train", user="parse_yaml", name="pyyaml")
    if len(text) > LARGEST_YAML:
        raise InputError(f"more than {LARGEST_YAML:,} characters")
    try:
        _check_events(yaml, text)
        return list(yaml.load_all(text, Loader=_strict_loader(yaml)))
    # PyYAML lets out what int(), datetime() and the like raise: ValueError, TypeError, KeyError, ...
    # guard: yaml-errors
    except Exception as error:
        raise InputError(f"not plain YAML: {one_line(error)}") from None


def is_deceptive(number: str) -> bool:
    """Whether YAML and people read a number differently: 010 is octal to it, and 1:30 counts in sixties."""
    return DECEPTIVE.fullmatch(number.strip()) is not None


@functools.cache
def _strict_loader(yaml: Any) -> Any:
    class Strict(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            # guard: yaml-twins
            if again := _first_twin([key.value for key in keys]):
                raise InputError(f"line {_line(keys[again])}: {shown(keys[again].value)} is there twice")
            if merged := [key for key in keys if key.tag == "tag:yaml.org,2002:merge"]:
                raise InputError(f"line {_line(merged[0])}: <<: write the fields themselves")
            return super().construct_mapping(node, deep)

    def number(loader: Any, node: Any) -> Any:
        # guard: yaml-deceives
        if is_deceptive(node.value):
            raise InputError(f"line {_line(node)}: {node.value}: write a plain number, or quote it as text")
        return getattr(yaml.SafeLoader, f"construct_yaml_{node.tag.rpartition(':')[2]}")(loader, node)

    def date(loader: Any, node: Any) -> Any:
        raise InputError(f"line {_line(node)}: the date {node.value}: quote it as text")

    for kind, construct in (("int", number), ("float", number), ("timestamp", date)):
        Strict.add_constructor(f"tag:yaml.org,2002:{kind}", construct)
    return Strict


def _line(node: Any) -> int:
    return node.start_mark.line + 1


def _check_events(yaml: Any, text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        # guard: yaml-aliases
        if isinstance(event, yaml.AliasEvent):
            raise InputError(f"the alias *{event.anchor}: write the value itself")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise InputError("nested too deeply")


def parse_csv(text: str) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and the rows of a CSV text with a header; every row has a cell for each column.

    Raises:
        ValueError: if it is damaged: no header, a row with more or fewer cells, a byte that is no text.
    """
    try:
        header, *lines = list(csv.reader(io.StringIO(text, newline=""), strict=True)) or [[]]
    except csv.Error as error:
        raise InputError(f"not CSV: {one_line(error)}") from None
    if not header or len(set(header)) < len(header):
        raise InputError("no header of different names")
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header):
            raise InputError(f"{len(line)} cells in row {number}, not {len(header)}")
    return header, [dict(zip(header, line, strict=True)) for line in lines]


def one_line(error: object) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: object) -> str:
    """What another's error says first, to stand within a sentence: without a full stop, and never empty."""
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(". ") if lines else "") or type(error).__name__


def shown(value: object) -> str:
    """A value as it may stand in an error: on one line, printable, and not endlessly long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
