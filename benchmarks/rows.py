"""One measurement a row, appended to a CSV as soon as it is made."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from attention_transfer._files import open_to_append
from attention_transfer._machine import commit, device_name

ROOT = Path(__file__).resolve().parents[1]
CODE = ("attention_transfer", "benchmarks/*.py")
FIGURES = ("p50", "p20", "p80", "rounds", "ratio", "ratio_p20", "ratio_p80", "bytes", "saved", "moved")


@dataclass(frozen=True)
class Row:
    """A measurement. Times are seconds; `ratio` is of this time to that of `against`, round by round."""

    benchmark: str
    """kernels, scaling, compile, step, defaults, terms, caffe or startup."""
    op: str
    """What was timed: forward, backward, both, step, import, ..."""
    backend: str
    """Whose code: "floor", "this project", "authors' formula", ..."""
    shape: str
    dtype: str = ""
    layout: str = ""
    form: str = ""
    allocator: str = ""
    """What becomes of freed memory: kept by the process, or given back by the C library's defaults."""
    against: str = ""
    p50: float | None = None
    p20: float | None = None
    p80: float | None = None
    rounds: int | None = None
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    bytes: int | None = None
    """Allocated at the peak, beyond what was there before."""
    saved: int | None = None
    """Kept from forward to backward, beyond what training without the term keeps."""
    moved: int | None = None
    """Read and written by the floor."""
    note: str = ""
    device: str = ""
    threads: int = 0
    torch: str = ""
    commit: str = ""
    time: str = ""

    @property
    def case(self) -> tuple[object, ...]:
        """What was measured and where: rows of one case replace each other, the latest counts."""
        names = ("benchmark", "op", "backend", "shape", "dtype", "layout", "form", "allocator", "against")
        return *(getattr(self, name) for name in names), self.device, self.threads


class Results:
    """The rows of one CSV file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.rows = read(self.path)
        self.commit = commit(*CODE)

    def append(self, rows: Iterable[Row], device: torch.device) -> list[Row]:
        """Write the rows at the end of the file, with where and when they were measured."""
        here = {
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "commit": self.commit,
            "time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        stamped = [replace(row, **here) for row in rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self.path.read_bytes() if self.path.exists() else b""
        with open_to_append(self.path) as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
            if not before:
                writer.writeheader()
            elif not before.endswith(b"\n"):
                file.write("\n")  # a kill tore the last line
            writer.writerows(
                {name: _written(value) for name, value in asdict(row).items()} for row in stamped
            )
            file.flush()
            os.fsync(file.fileno())
        self.rows += stamped
        return stamped

    def has(self, device: torch.device, **case: str) -> bool:
        """Whether this very code has measured the case on this device: then a restarted run passes it by."""
        if self.commit.endswith("+") or self.commit == "unknown":
            return False
        here = {**case, "device": device_name(device), "commit": self.commit, "torch": torch.__version__}
        return any(
            row.threads == torch.get_num_threads()
            and all(getattr(row, name) == value for name, value in here.items())
            for row in self.rows
        )


def latest(rows: Sequence[Row]) -> list[Row]:
    """The last row of each case, in the order in which the cases first came."""
    by_case: dict[tuple[object, ...], Row] = {}
    for row in rows:
        by_case[row.case] = row
    return list(by_case.values())


def read(path: str | Path) -> list[Row]:
    """The rows of a CSV file; none if it is not there.

    Raises:
        ValueError: if the file has other columns.
    """
    if not Path(path).is_file():
        return []
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        names = [field.name for field in fields(Row)]
        if reader.fieldnames is not None and list(reader.fieldnames) != names:
            raise ValueError(f"bench: expected the columns {','.join(names)} in {path}. Move it away.")
        return [_row(line) for line in reader if None not in line.values()]  # a torn last line is no row


def _row(line: dict[str, str]) -> Row:
    counts = ("rounds", "bytes", "saved", "moved")
    figures = {
        name: None if line[name] == "" else int(line[name]) if name in counts else float(line[name])
        for name in FIGURES
    }
    return Row(**{**line, **figures, "threads": int(line["threads"])})  # type: ignore[arg-type]


def _written(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else value
