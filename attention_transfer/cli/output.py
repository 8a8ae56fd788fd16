"""A line on the terminal that is written over."""

from __future__ import annotations

import sys

from attention_transfer._colours import print_safely


class StatusLine:
    """One line that is written over, for whoever watches; elsewhere it stays silent."""

    def __init__(self) -> None:
        self._visible = sys.stderr.isatty()

    def show(self, text: str) -> None:
        if self._visible:
            print_safely(text, end="", stream=sys.stderr, over=True)

    def clear(self) -> None:
        self.show("")

    def print(self, text: str) -> None:
        self.clear()
        print_safely(text)
