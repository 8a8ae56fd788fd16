"""Reading what `torch.save` wrote: nothing is unpickled that could run, or unfold."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

STATE_DICT_REMEDY = "Save the weights alone, with save_weights(model, FILE), and pass that file."


def read_checkpoint(path: Path, *, mmap: bool = False) -> Any:
    """What `torch.save` wrote: containers, numbers, text and tensors on the CPU, and nothing that runs.

    Raises:
        ValueError: if the file is damaged, of another format, or needs unpickling.
        OSError: if it cannot be read.
    """
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            # torch warns of odd pickle protocols and of TorchScript before it refuses them below
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(_refused(path, str(error))) from error
    # a damaged pickle can end in any exception at all: KeyError, struct.error, UnicodeDecodeError, ...
    except Exception as error:
        raise ValueError(damaged(path, error)) from error


def _check_archive(path: Path) -> None:
    """Refuse what unfolds in memory: `torch.save` never compresses."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"the entry {entry.filename:.80} is compressed")


def _refused(path: Path, reason: str) -> str:
    unsafe = re.search(r"GLOBAL ([\w.]+)", reason)
    what = f"the pickled object {unsafe[1]}" if unsafe else "pickled objects, or is not a checkpoint"
    return (
        f"load_weights: expected tensors alone, got {path}, which holds {what}. "
        f"Unpickling can run any code, so it is refused. {STATE_DICT_REMEDY}"
    )


def damaged(path: Path, error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"load_weights: expected a safetensors file or a torch checkpoint, got {path}, "
        f"which is damaged or of another format ({reason[:160].rstrip('. ')}). Copy or download it again."
    )
