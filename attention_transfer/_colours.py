"""Colours for terminals; a file, a pipe and NO_COLOR (https://no-color.org) get none."""

from __future__ import annotations

import os
import re
from typing import TextIO

_COLOURS = {
    "attention-transfer:": "31",  # red: an error
    "warning:": "33",  # yellow
    "note:": "36",  # cyan
    "test error": "1",  # bold
}
_FIRST = re.compile("^({})".format("|".join(_COLOURS)), re.MULTILINE)


def coloured(text: str, stream: TextIO | None) -> str:
    """The text with the words that say what a line is in colour, if `stream` is a terminal."""
    unwanted = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if unwanted or stream is None or not stream.isatty():
        return text
    return _FIRST.sub(lambda found: f"\033[{_COLOURS[found[0]]}m{found[0]}\033[0m", text)
