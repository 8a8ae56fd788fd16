"""Names of layers and blobs that are free in a net."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any


def all_names(net: Any) -> set[str]:
    """All names of layers, blobs and parameters."""
    found = {layer.name for layer in net.layer} | {param.name for layer in net.layer for param in layer.param}
    return found | {name for layer in net.layer for name in (*layer.bottom, *layer.top)}


def free_prefix(candidates: Sequence[str], taken: set[str], names: Iterable[str]) -> str:
    """The first prefix, with a number if need be, that makes names that are not taken."""
    stem = candidates[-1].rstrip("_")
    numbered = (f"{stem}{number}_" for number in itertools.count(2))
    names = set(names)
    for prefix in itertools.chain(candidates, numbered):
        if not {prefix + name for name in names} & taken:
            return prefix
    raise AssertionError("numbers do not end")


def free_name(name: str, taken: set[str]) -> str:
    return free_prefix(["", "at_"], taken, [name]) + name
