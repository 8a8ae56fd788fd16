"""Reading LMDB files, every offset checked: the library that writes them ends the process on damaged ones.

The format is that of LMDB 0.9, data version 1, as Caffe's tools write it. All numbers are little-endian, and
a file is of pages of one size:

    page    u64 number, u16 -, u16 flags, u16 lower, u16 upper, then u16 offsets of its nodes up to `lower`;
            an overflow page has u32 pages in place of lower and upper, and then bytes
    node    u16 low, u16 high, u16 flags, u16 length of the key, key, data
            branch: the page below is low + high * 2^16 + flags * 2^32
            leaf: so many bytes of data are low + high * 2^16; with the flag BIG these are on an overflow
            page, whose number stands in place of the data
    meta    on pages 0 and 1, behind 16 bytes: u32 magic, u32 version, u64 -, u64 -, two databases of 48
            bytes, the free pages' and the records', u64 last page, u64 transaction; the later one counts
    database  u32 page size (in the first), u16 flags, u16 depth, 3 u64 counts of pages, u64 entries, u64 root
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from attention_transfer._errors import InputError
from attention_transfer._reading import open_file

MAGIC, VERSION = 0xBEEFC0DE, 1
BRANCH, LEAF, OVERFLOW = 1, 2, 4  # flags of pages
BIG, SPECIAL = (
    1,
    2 | 4,
)  # flags of nodes; the latter of databases in the database, and of several values a key
HEAD = 16  # bytes of a page before its content
DEEPEST = 32
NO_PAGE = 2**64 - 1


@dataclass(frozen=True)
class Place:
    """Where the value of a key stands in the file."""

    key: bytes
    start: int
    size: int


class Pages:
    """An LMDB file, mapped into memory.

    Args:
        first_only: look for the first record alone, which takes no time in a large file.

    Attributes:
        places: of all records, in the order of their keys.

    Raises:
        ValueError: if it is none, or damaged; the message says in what.
        OSError: if it cannot be read.
    """

    def __init__(self, path: Path, *, first_only: bool = False) -> None:
        with open_file(path) as file:
            length = file.seek(0, 2)
            if length < 2 * HEAD:
                raise InputError("it is too short")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._length = length
        root, entries = self._root()
        self._seen: set[int] = set()
        walk = iter(()) if root == NO_PAGE else self._walk(root, 0)
        self.places: list[Place] = list(islice(walk, 1 if first_only else None))
        if not first_only and len(self.places) != entries:
            raise InputError(f"{len(self.places):,} records where it speaks of {entries:,}")

    def value(self, place: Place) -> bytes:
        """The bytes at a place."""
        return self._bytes[place.start : place.start + place.size]

    def _number(self, form: str, start: int) -> int:
        if start < 0 or start + struct.calcsize(form) > self._length:
            raise InputError("it was cut off, or points beyond its end")
        return struct.unpack_from(form, self._bytes, start)[0]

    def _root(self) -> tuple[int, int]:
        """The root page and the number of entries of the later of the two states that the file holds."""
        self._size = self._number("<I", HEAD + 24)
        if self._size < 256 or self._size > 1 << 16 or self._size & (self._size - 1):
            raise InputError("it does not begin as one")
        metas = [HEAD, self._size + HEAD]
        for meta in metas:
            if (self._number("<I", meta), self._number("<I", meta + 4)) != (MAGIC, VERSION):
                raise InputError("it does not begin as one")
        meta = max(metas, key=lambda start: self._number("<Q", start + 128))
        needed, there = (self._number("<Q", meta + 120) + 1) * self._size, self._length
        if there < needed:
            raise InputError(f"expected {needed:,} bytes, got {there:,}: it was cut off")
        records = meta + 24 + 48
        if self._number("<H", records + 4):
            raise InputError("it has keys of a special kind")
        return self._number("<Q", records + 40), self._number("<Q", records + 32)

    def _walk(self, page: int, depth: int) -> Iterator[Place]:
        start = page * self._size
        # guard: lmdb-loops
        if page in self._seen or depth > DEEPEST or start + self._size > self._length:
            raise InputError(f"page {page} is not in its tree")
        self._seen.add(page)
        flags, lower = self._number("<H", start + 10), self._number("<H", start + 12)
        if flags & (BRANCH | LEAF) not in (BRANCH, LEAF) or not HEAD <= lower <= self._size or lower % 2:
            raise InputError(f"page {page} is no page of a tree")
        for offset in struct.unpack_from(f"<{(lower - HEAD) // 2}H", self._bytes, start + HEAD):
            if offset < lower or offset + 8 > self._size:
                raise InputError(f"page {page} points outside itself")
            low, high, kind, length = struct.unpack_from("<4H", self._bytes, start + offset)
            if flags & BRANCH:
                yield from self._walk(low | high << 16 | kind << 32, depth + 1)
            else:
                yield self._place(page, start + offset + 8, low | high << 16, kind, length)

    def _place(self, page: int, start: int, size: int, kind: int, length: int) -> Place:
        end, data = (page + 1) * self._size, start + length
        if kind & SPECIAL or data + (8 if kind & BIG else size) > end:
            raise InputError(f"a record of page {page} is not inside it")
        key = self._bytes[start:data]
        if not kind & BIG:
            return Place(key, data, size)
        first = self._number("<Q", data)
        if first >= self._length // self._size or not self._number("<H", first * self._size + 10) & OVERFLOW:
            raise InputError(f"a record of page {page} is not where it should be")
        pages = self._number("<I", first * self._size + 12)
        begin = first * self._size + HEAD
        if begin + size > min((first + pages) * self._size, self._length):
            raise InputError(f"a record of page {page} is longer than its pages")
        return Place(key, begin, size)
