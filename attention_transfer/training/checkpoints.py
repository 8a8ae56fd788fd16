"""Checkpoint files: written whole or not at all, with the one before kept for the day the last is damaged."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from attention_transfer._files import write_atomically
from attention_transfer._reading import check_regular, one_line
from attention_transfer.models.checkpoint import read_checkpoint
from attention_transfer.runs.run import Run

NEEDED = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "training_totals"}
"""What a run needs of its checkpoint to go on."""


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's way of writing checkpoints, which a kill or a full disk cannot leave with half of one.

    Lightning's own writes into the system's folder for temporary files, from where a move to another disk is
    a copy.
    """

    def __init__(self, keeps: Path) -> None:
        """`keeps` is the one checkpoint whose former state is kept."""
        self._keeps = keeps

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            OSError: if it cannot be written; the earlier files are intact.
        """
        path = Path(path)
        path.parent.mkdir(exist_ok=True)  # of a run folder that is gone nothing is made anew
        keep = former(path) if path == self._keeps else None
        write_atomically(path, lambda file: torch.save(checkpoint, file), keep=keep)


def former(path: Path) -> Path:
    """Where the checkpoint is kept that `path` held before its last one."""
    return path.with_name(f"{path.stem}.before{path.suffix}")


def checkpoint_to_resume(run: Run, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint of a run; None where it has none yet. Says which are damaged.

    Raises:
        ValueError: if there are checkpoints, and none of them is whole.
    """
    damaged: list[str] = []
    for path in (run.last_checkpoint, former(run.last_checkpoint), run.best_checkpoint):
        if not path.exists():
            continue
        if reason := _damage(path):
            damaged.append(f"{path.name} ({reason})")
            continue
        if damaged:
            say(f"warning: damaged: {', '.join(damaged)}. Going on from {path.name}, the one before")
        return path
    if damaged:
        raise unusable(run, ", ".join(damaged))
    return None


def unusable(run: Run, reason: object) -> ValueError:
    """The error of a run that cannot go on from its checkpoints."""
    return ValueError(
        f"resume: expected a whole checkpoint of this run in {run.checkpoints}, got damaged or foreign ones: "
        f"{one_line(reason)[:300]}. Put good ones back, or start over with --overwrite."
    )


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    check_regular(path)
    try:
        state = read_checkpoint(path, mmap=True)
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:  # checksums: torch.load does not look at them
                return f"wrong checksum in {part}"
    except (ValueError, zipfile.BadZipFile) as error:
        return one_line(error.__cause__ or error)[:80]
    return None if isinstance(state, dict) and state.keys() >= NEEDED else "no checkpoint of a run"
