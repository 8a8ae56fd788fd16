"""Which part of a weights file is a model's, compared tensor by tensor; of several none is preferred."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .._tables import printable
from .parts import Stored

LONGEST_NAME = 120
"""Characters of a name in a report."""

LISTED = 8
"""A report names this many tensors of a kind, and counts the rest."""

SMALL = 64 << 20
"""A tensor that repeats few stored numbers, as `expand` makes it, may come to so many bytes in full."""

_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_COMPLEX = {torch.complex64, torch.complex128}
_WHOLE = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_ACCEPTED = {
    **dict.fromkeys(_FLOATS, _FLOATS),
    **dict.fromkeys(_COMPLEX, _COMPLEX),
    **dict.fromkeys(_WHOLE, _WHOLE | _FLOATS),  # as far as each value survives: counters that were averaged
}
"""The dtypes of a file by that of the model: those whose numbers mean the same there."""


@dataclass(frozen=True)
class Mismatch:
    """A tensor of one name and two shapes; or of two dtypes, where one means nothing as the other."""

    name: str
    expected: tuple[int, ...]
    got: tuple[int, ...]
    dtypes: tuple[str, str] | None = None

    def __str__(self) -> str:
        expected, got = self.dtypes or (self.expected, self.got)
        return f"{self.name} (model {expected}, file {got})"


@dataclass(frozen=True)
class Part:
    """What a file holds for a model under a prefix; `beside` are other such parts, of which all fits."""

    prefix: str
    rank: int  # 2 if nothing but counters is missing or of another kind, 1 if the head alone is, else 0
    fitting: tuple[str, ...]
    mismatched: tuple[Mismatch, ...]
    beside: tuple[str, ...] = ()


def choose(
    targets: Mapping[str, Tensor], stored: Stored, strict: bool | Literal["body"], asked: str | None
) -> Part:
    """The part of the file that is the model's.

    Raises:
        UnclearError: if nothing is where it is asked for, or several parts with other numbers would do.
    """
    found = stored.prefixes(targets)
    start = "" if asked is None else _start(stored, found, asked)
    needed = len({memory(tensor) for name, tensor in targets.items() if not _is_counter(name)})
    position = {name: i for i, name in enumerate(targets)}
    parts = [
        _part(targets, stored, prefix, sorted(names, key=position.__getitem__), needed)
        for prefix, names in sorted(found.items())
        if prefix.startswith(start)
    ]
    if not parts:
        return Part(stored.usual, 0, (), ())
    best = max(parts, key=lambda part: _order(part, stored.shown(part.prefix)))
    exact = next((part for part in parts if part.prefix == start), best)
    if asked is not None and exact.rank == best.rank:
        best = exact
    elif best.rank >= {True: 2, "body": 1, False: 0}[strict]:
        _check_alone(stored, best, [part for part in parts if part.rank == best.rank])
    whole = [part.prefix for part in parts if part.rank == 2 and part != best]
    return replace(best, beside=tuple(prefix for prefix in whole if prefix.startswith(best.prefix)))


class UnclearError(Exception):
    """Which part of a file is meant is not clear: what there is instead of one, and the prefixes to name."""


def _start(stored: Stored, found: Mapping[str, Sequence[str]], asked: str) -> str:
    """The full prefix of what is asked for."""
    asked = f"{asked.removesuffix('.')}." if asked else ""
    for start in (stored.usual + asked, asked):
        if any(prefix.startswith(start) for prefix in found):
            return start
    raise UnclearError(
        f'none under "{asked[:80].removesuffix(".")}"; there are', stored.shown_prefixes(found)
    )


def _order(part: Part, shown: str) -> tuple[int, int, int, bool, bool, int]:
    """The greater, the better the part."""
    known = len(part.fitting) + len(part.mismatched)
    return part.rank, len(part.fitting), known, shown == "", shown == "student.", -len(shown)


def _check_alone(stored: Stored, best: Part, parts: Sequence[Part]) -> None:
    """Raise if another part, with other numbers, would do as well, or half as well where none fits whole."""
    rivals = [part for part in parts if 2 * len(part.fitting) >= len(best.fitting) > 0]
    if others := [part for part in rivals if not _are_equal(stored, best, part)]:
        raise UnclearError("several", stored.shown_prefixes(part.prefix for part in (best, *others)))


def _part(
    targets: Mapping[str, Tensor], stored: Stored, prefix: str, names: Sequence[str], needed: int
) -> Part:
    compared = {name: _mismatch(name, targets[name], stored.tensors[prefix + name]) for name in names}
    mismatched = tuple(each for each in compared.values() if each is not None)
    fitting = tuple(name for name, each in compared.items() if each is None)
    lacks = len(names) < needed or missing(targets, compared, fitting)
    rank = 0 if lacks else 2 if not mismatched else 1 if head_of(mismatched) else 0
    return Part(prefix, rank, fitting, mismatched)


def _mismatch(name: str, expected: Tensor, got: Tensor) -> Mismatch | None:
    shapes = tuple(expected.shape), tuple(got.shape)
    if shapes[0] != shapes[1]:
        return Mismatch(name, *shapes)
    if got.dtype == expected.dtype or got.dtype in _ACCEPTED.get(expected.dtype, ()):
        return None
    kinds = str(expected.dtype).removeprefix("torch."), str(got.dtype).removeprefix("torch.")
    return Mismatch(name, *shapes, kinds)


def missing(targets: Mapping[str, Tensor], found: Container[str], fitting: Iterable[str]) -> list[str]:
    """What is not in the file; a tied tensor, which some writers store once, is filled through one name."""
    filled = {memory(targets[name]) for name in fitting}
    return [
        name
        for name, tensor in targets.items()
        if name not in found and memory(tensor) not in filled and not _is_counter(name)
    ]


def _is_counter(name: str) -> bool:
    """Whether it is a BatchNorm's count of batches, which old files leave out."""
    return name.endswith("num_batches_tracked")


def _are_equal(stored: Stored, one: Part, other: Part) -> bool:
    """Whether two parts hold the same numbers: one attribute under two names, an average at its start."""
    if {*one.fitting} != {*other.fitting}:
        return False
    return all(
        are_alike(stored.tensors[one.prefix + name], stored.tensors[other.prefix + name])
        for name in one.fitting
    )


def are_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape are the same numbers."""
    if one is other:
        return True
    return is_plain(one) and is_plain(other) and one.dtype == other.dtype and torch.equal(one, other)


def memory(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two tensors that are one piece of memory seen alike. Empty and meta tensors have none."""
    address: object = tensor.data_ptr() if tensor.numel() and tensor.device.type != "meta" else object()
    return address, tensor.device, tensor.shape, tensor.stride()


def head_of(mismatched: Sequence[Mismatch]) -> tuple[str, int, int] | None:
    """(modules, classes in the file, classes in the model) of tensors that differ in their number alone."""
    if any(m.dtypes or not (m.got and m.expected) or m.got[1:] != m.expected[1:] for m in mismatched):
        return None
    classes = {(m.got[0], m.expected[0]) for m in mismatched}
    if len(classes) != 1:
        return None
    modules = dict.fromkeys(m.name.rpartition(".")[0] for m in mismatched)
    return (shorten(tuple(modules)), *classes.pop())


def is_plain(tensor: Tensor) -> bool:
    """Whether a stored tensor is numbers on the CPU, and no more of them than are there."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    if tensor.is_quantized or tensor.is_nested:
        return False
    full = tensor.numel() * tensor.element_size()
    return full <= max(SMALL, tensor.untyped_storage().nbytes())


def convert(tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A tensor in a dtype that accepts its own; None if a number becomes infinite, or a whole one another."""
    converted = tensor.to(dtype)
    if dtype in _WHOLE:
        return converted if torch.equal(converted.to(tensor.dtype), tensor) else None
    return None if bool((converted.isinf() & ~tensor.isinf()).any()) else converted


def shorten(names: Sequence[object]) -> str:
    listed = ", ".join(printable(str(name)[:LONGEST_NAME]) for name in names[:LISTED])
    return listed if len(names) <= LISTED else f"{listed} and {len(names) - LISTED} more"
