"""Reading what `torch.save` wrote: nothing is unpickled that could run, or unfold."""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from .._errors import InputError
from .pickles import OutOfProportionError, Pickle

LEGACY_PICKLES = (
    5  # before the numbers: a magic one, the protocol, the system, the content, the storages' keys
)

STATE_DICT_REMEDY = "Save the weights alone, with save_weights(model, FILE), and pass that file."


def read_checkpoint(path: Path, *, mmap: bool = False) -> Any:
    """What `torch.save` wrote: containers, numbers, text and tensors on the CPU, and nothing that runs.

    Raises:
        ValueError: if the file is damaged, of another format, or needs unpickling.
        OSError: if it cannot be read.
    """
    try:
        # guard: weights-only, weights-only
        _check_proportion(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of odd pickle protocols before it refuses them
            # guard: weights-only, weights-only
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(_refused(path, str(error))) from error
    except OutOfProportionError as error:
        raise InputError(
            f"load_weights: expected a checkpoint that takes no more than its size is worth, got {path}, "
            f"which {error}. {STATE_DICT_REMEDY}"
        ) from error
    # a damaged pickle can end in any exception at all: KeyError, struct.error, UnicodeDecodeError, ...
    except Exception as error:
        raise InputError(damaged(path, error)) from error


def _check_proportion(path: Path) -> None:
    """Refuse what would take more time or memory than a file of this size is worth, before it is loaded.

    Raises:
        pickle.UnpicklingError, ValueError: as `Pickle.check`.
    """
    storages: dict[str, int] = {}
    with path.open("rb") as file:
        # guard: archive-or-pickle
        if file.read(4) == b"PK\x03\x04":  # by which torch tells the two formats apart
            Pickle(io.BytesIO(_pickle_in_archive(path)), storages).check()
        else:
            file.seek(0)
            for _ in range(LEGACY_PICKLES):
                Pickle(file, storages).check()
    # guard: storages-share-no-bytes
    if (stored := sum(storages.values())) > path.stat().st_size:
        raise OutOfProportionError(f"promises {stored:,} bytes of numbers")


def _pickle_in_archive(path: Path) -> bytes:
    """The pickle of an archive, as torch finds it there.

    Raises:
        ValueError: if an entry would unfold in memory: `torch.save` never compresses.
    """
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            # guard: compressed-checkpoint
            if entry.compress_type != zipfile.ZIP_STORED:
                raise InputError(f"the entry {entry.filename:.80} is compressed")
    reader = torch._C.PyTorchFileReader(str(path))
    if "constants.pkl" in reader.get_all_records():
        raise InputError("a TorchScript archive")
    return reader.get_record("data.pkl")


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
