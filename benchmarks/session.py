"""What a run of the benchmarks has been told: device, pains to take, where to report."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from attention_transfer.cli.output import StatusLine
from benchmarks.measuring import CACHES


@dataclass
class Session:
    """`seconds` are for each case, of at least and at most so many rounds."""

    device: torch.device
    quick: bool = False
    line: StatusLine = field(default_factory=StatusLine)

    @property
    def seconds(self) -> float:
        return 0.0 if self.quick else 4.0

    @property
    def rounds(self) -> tuple[int, int]:
        return (2, 2) if self.quick else (5, 60)

    @property
    def evict_bytes(self) -> int:
        return 2**20 if self.quick else CACHES

    def status(self, text: str) -> None:
        """A line that is written over, on a terminal."""
        self.line.show(text)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.line.print(text)
