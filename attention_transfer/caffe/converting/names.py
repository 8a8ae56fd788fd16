"""Caffe's names as Python identifiers: no keyword, no name twice, and nothing but letters, digits and `_`."""

from __future__ import annotations

import keyword
import re
from collections.abc import Collection

LONGEST = 35  # so that `name = self.name(` fits into 88 columns
LONGEST_CLASS = 30  # and `def load(...) -> Name:`


class Names:
    """Gives each name an identifier of its own.

    Args:
        prefix: what stands before a name that begins with a digit, or for one that is empty.
        taken: identifiers that nothing may have, besides keywords.
    """

    def __init__(self, prefix: str, taken: Collection[str]) -> None:
        self._prefix = prefix
        self._taken = {*taken, *keyword.kwlist}

    def new(self, name: str) -> str:
        """An identifier near `name` that was not given before."""
        plain = self._plain(name)
        candidate, number = plain, 2
        if candidate in self._taken:
            candidate = f"{plain}_"
        while candidate in self._taken:
            suffix = f"_{number}"
            candidate, number = plain[: LONGEST - len(suffix)] + suffix, number + 1
        self._taken.add(candidate)
        return candidate

    def _plain(self, name: str) -> str:
        plain = re.sub(r"[^A-Za-z0-9]+", "_", name[:200]).strip("_")
        if not plain or plain[0].isdigit():
            plain = f"{self._prefix}_{plain}".rstrip("_")
        return plain[: LONGEST - 1].rstrip("_")


def class_name(net_name: str, taken: Collection[str]) -> str:
    """The name of the class for a net of this name: `ResNet-50` gives `ResNet_50`."""
    plain = re.sub(r"[^A-Za-z0-9]+", "_", net_name[:200]).strip("_")[: LONGEST_CLASS - 4].rstrip("_")
    if not plain or plain[0].isdigit():
        plain = f"Net_{plain}".rstrip("_")
    plain = plain[:1].upper() + plain[1:]
    return Names("Net", taken).new(plain)


def quoted(name: str) -> str:
    """A name as it may stand in a comment: in quotes, on one line, in ASCII, and not endlessly long."""
    return ascii(name if len(name) <= 60 else name[:57] + "...")
