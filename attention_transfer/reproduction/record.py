"""Putting what was measured into the files of `reproductions/`, for maintainers."""

from __future__ import annotations

import csv
import datetime
import io
import re
from pathlib import Path
from typing import Any

from attention_transfer._errors import InputError
from attention_transfer._files import write_atomically
from attention_transfer.reproduction.results import Results
from attention_transfer.reproduction.tables import Reproduction
from attention_transfer.runs.run import Run

OURS = re.compile(r"^ours:.*?(?=^---$)", re.MULTILINE | re.DOTALL)


def record(results: Results, command: str, folder: Path) -> list[Path]:
    """Write each number's `ours:`, and the runs' epochs into FOLDER/results; the files written.

    Raises:
        ValueError: if a file has no `ours:` as the last of its facts.
    """
    written = []
    for each in _unique(results):
        if results.values(each.name):
            written.append(_record_value(results, each, command))
    path = folder / "results" / f"{results.table.name}-{results.setting.tag}.csv"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, _epochs(results))
    return [*written, path]


def _unique(results: Results) -> list[Reproduction]:
    return list({each.name: each for each in results.cells.values()}.values())


def _record_value(results: Results, each: Reproduction, command: str) -> Path:
    import yaml

    text = each.file.read_text(encoding="utf-8")
    if not OURS.search(text):
        raise InputError(
            f"reproduce: expected `ours:` as the last fact in {each.file}, got none. Put it before the ---."
        )
    entry = _entry(results, each, command)
    kept = [old for old in each.ours if any(old.get(k) != entry[k] for k in ("scale", "max_train"))]
    dumped = yaml.safe_dump({"ours": [*kept, entry]}, sort_keys=False, width=108, allow_unicode=True)
    write_atomically(each.file, OURS.sub(lambda _: dumped, text, count=1))
    return each.file


def _entry(results: Results, each: Reproduction, command: str) -> dict[str, Any]:
    from statistics import fmean, median, stdev

    values = results.values(each.name)
    numbers, runs = list(values.values()), results.runs[each.name]
    ended = max(run.result_file.stat().st_mtime for run in runs.values())
    return {
        "scale": results.setting.scale,
        "epochs": results.setting.epochs(each),
        "max_train": results.setting.max_train,
        "median": round(median(numbers), 3),
        "mean": round(fmean(numbers), 3),
        "deviation": round(stdev(numbers), 3) if len(numbers) > 1 else None,
        "each": {seed: round(value, 2) for seed, value in values.items()},
        "data": results.data,
        "precision": ", ".join(sorted({run.recipe.precision for run in runs.values()})),
        "hardware": ", ".join(results.facts(each.name, "machine", "device")),
        "torch": ", ".join(results.facts(each.name, "machine", "torch")),
        "commit": ", ".join(results.facts(each.name, "machine", "commit")),
        "date": datetime.datetime.fromtimestamp(ended, datetime.timezone.utc).date().isoformat(),
        "command": command,
    }


def _epochs(results: Results) -> str:
    """Every epoch of every run, with what the runs of the table have in common: error, loss, rate, time."""
    names = ["reproduction", "seed", "epoch", "lr", "loss", "ce", "train_error", "seconds"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for name, runs in results.runs.items():
        for seed, run in runs.items():
            writer.writerows([name, seed, *row] for row in _small(run))
    return text.getvalue()


def _small(run: Run) -> list[list[str]]:
    columns = ("lr", "train/loss", "train/ce", "train/error", "seconds")
    rows = run.read_metrics()
    return [[row["epoch"], *(f"{float(row[c]):.4g}" if row.get(c) else "" for c in columns)] for row in rows]
