"""What is printed: safe for terminals, and there in colours; a file, a pipe and NO_COLOR get none.

See https://no-color.org.
"""

from __future__ import annotations

import os
import re
import sys
from typing import TextIO

from ._tables import printable

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


def print_safely(
    *parts: object, sep: str = " ", end: str = "\n", stream: TextIO | None = None, over: bool = False
) -> None:
    """As `print`, but for what moves a terminal's cursor, colours it or names it, whichever name holds it.

    Every line that this package prints comes through here. Only line breaks are left as they are: a part that
    is no text of ours, such as a path, has none either. With `over` the line before is written over.
    """
    stream = stream or sys.stdout
    lines = sep.join(part if isinstance(part, str) else printable(str(part)) for part in parts).split("\n")
    # guard: printable-names
    text = coloured("\n".join(map(printable, lines)), stream)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    known = text.encode(encoding, "backslashreplace").decode(encoding)
    print(f"\r\033[K{known}" if over else known, end=end, file=stream, flush=True)
