"""Checkpoint files: written whole or not at all, with the one before kept for the day the last is damaged."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from attention_transfer._errors import InputError
from attention_transfer._files import write_atomically
from attention_transfer._reading import check_regular, one_line
from attention_transfer.models.checkpoint import read_checkpoint
from attention_transfer.runs.run import Run
from attention_transfer.training.module import DistillationModule

NEEDED = {
    *("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "training_totals"),
    *("epoch", "global_step", "pytorch-lightning_version"),
}
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
        # guard: folder-that-went
        path.parent.mkdir(exist_ok=True)  # of a run folder that is gone nothing is made anew
        # guard: previous-checkpoint-kept
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
    # guard: previous-checkpoint-read
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


def unusable(run: Run, reason: object) -> InputError:
    """The error of a run that cannot go on from its checkpoints."""
    return InputError(
        f"resume: expected a whole checkpoint of this run in {run.checkpoints}, got damaged or foreign ones: "
        f"{one_line(reason)[:300]}. Put good ones back, or start over with --overwrite."
    )


def check_fits(run: Run, checkpoint: Path, trainer: Trainer, module: DistillationModule) -> None:
    """Make sure that a whole checkpoint is one of this run, before anything is restored from it.

    Raises:
        ValueError: if what is in it has other names, kinds or shapes than what the run would write now.
    """
    state = read_checkpoint(checkpoint, mmap=True)
    parameters = list(module.distiller.parameters())
    expected: dict[str, Any] = {
        "state_dict": module.state_dict(),
        **({"terms": learnt} if (learnt := module.distiller.terms.state_dict()) else {}),
        "training_totals": {"sums": {}, "count": 0},
        "callbacks": {each.state_key: own for each in _callbacks(trainer) if (own := each.state_dict())},
        "optimizer_states": [{"state": {}, "param_groups": [{"params": list(range(len(parameters)))}]}],
        "lr_schedulers": [{"last_epoch": 0}],
        "loops": {"fit_loop": {}},
        "epoch": 0,
        "global_step": 0,
    }
    if state["pytorch-lightning_version"] == lightning.__version__:
        expected["loops"] = {"fit_loop": trainer.fit_loop.state_dict()}
    reason = _difference(state, expected, "")
    if reason := reason or _strange_momentum(state["optimizer_states"][0]["state"], parameters):
        raise unusable(run, reason)


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def _strange_momentum(states: dict[int, Any], parameters: Sequence[Tensor]) -> str | None:
    """PyTorch itself looks at the shape of a momentum at the first step."""
    for index, values in states.items():
        if not (isinstance(values, dict) and index in range(len(parameters))):
            return f"a state of parameter {index!r}, of which there are {len(parameters)}"
        momentum, parameter = values.get("momentum_buffer"), parameters[index]
        # guard: momentum-shapes
        if momentum is not None and getattr(momentum, "shape", None) != parameter.shape:
            return f"a momentum of {tuple(getattr(momentum, 'shape', ()))} for {tuple(parameter.shape)}"
    return None


def _difference(found: Any, expected: Any, place: str) -> str | None:
    """Where something is not made as expected, None if it is. Beside weights, more names are no matter."""
    if isinstance(expected, dict):
        if not isinstance(found, dict):
            return f"no names under {place}"
        for name, part in expected.items():
            if name not in found:
                return f"no {name} in {place or 'it'}"
            if reason := _difference(found[name], part, f"{place}/{name}".strip("/")):
                return reason
        are_weights = bool(expected) and all(isinstance(part, Tensor) for part in expected.values())
        more = sorted(map(str, found.keys() - expected.keys())) if are_weights else []
        return f"{more[0]} in {place}, which the model has not" if more else None
    if isinstance(expected, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(expected):
            return f"no list of {len(expected)} under {place}"
        parts = (
            _difference(a, b, f"{place}/{i}") for i, (a, b) in enumerate(zip(found, expected, strict=True))
        )
        return next(filter(None, parts), None)
    if isinstance(expected, Tensor):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        return (
            None if shape == tuple(expected.shape) else f"{shape} for {tuple(expected.shape)} under {place}"
        )
    is_number = isinstance(expected, int | float) and not isinstance(expected, bool)
    if is_number and not isinstance(found, int | float):
        return f"no number under {place}"
    return None


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    check_regular(path)
    try:
        state = read_checkpoint(path, mmap=True)
        with zipfile.ZipFile(path) as archive:
            # guard: checkpoint-checksums
            if (part := archive.testzip()) is not None:  # checksums: torch.load does not look at them
                return f"wrong checksum in {part}"
    except (ValueError, zipfile.BadZipFile) as error:
        return one_line(error.__cause__ or error)[:80]
    return None if isinstance(state, dict) and state.keys() >= NEEDED else "no checkpoint of a run"
