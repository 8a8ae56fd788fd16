"""What may have been meant by a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`Did you mean A or B?`, whatever the case of the letters; empty where nothing is near."""
    lowered = {name.lower(): name for name in known}
    near = [lowered[match] for match in difflib.get_close_matches(word.lower(), lowered, n=3)]
    return f"Did you mean {' or '.join(near)}?" if near else ""
