"""The examples run, and what they print is so."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_custom_loop(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "custom_loop.py"))["main"](epochs=1)
    printed = capsys.readouterr().out
    assert "group2 <- group2" in printed
    assert re.search(r"epoch 1: ce \d\.\d+  at/group0 0\.\d+  at/group1 0\.\d+  at/group2 0\.\d+\n", printed)
    assert re.search(r"test error: teacher \d+\.\d %, student \d+\.\d %\n", printed)
