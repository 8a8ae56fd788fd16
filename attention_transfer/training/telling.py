"""What a run says while it goes: lines for people, with the same as values for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any, Literal

from attention_transfer._colours import print_safely

Say = Callable[[str], None]
Progress = Literal["auto", "lines", "json", "none"]


class Line(str):
    """A line of text that carries an event's name and values."""

    event: str
    values: dict[str, Any]

    def __new__(cls, text: str, event: str, **values: Any) -> Line:
        line = super().__new__(cls, text)
        line.event, line.values = event, values
        return line


def teller(progress: Progress) -> Say | None:
    """Who says a run's lines; None leaves it to `train`, which prints them above a progress bar."""
    return {"auto": None, "lines": say_text, "json": say_json, "none": say_nothing}[progress]


def say_text(line: str) -> None:
    print_safely(line)


def say_nothing(line: str) -> None:
    pass


def say_json(line: str) -> None:
    """One JSON object a line, with "event" and "text"; numbers that are not finite are null."""
    values = {name: _plain(value) for name, value in getattr(line, "values", {}).items()}
    print_safely(json.dumps({"event": getattr(line, "event", "note"), "text": str(line), **values}))


def say_above_the_bar(line: str) -> None:
    """Print a line, above the progress bar if there is one."""
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stdout):
        print_safely(line)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
