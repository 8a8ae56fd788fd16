"""Weights on disk: loading without unpickling, atomic saving, and a fingerprint."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor, nn

from .._files import write_atomically
from .._tables import printable

NESTING_KEYS = ("state_dict", "model_state_dict", "model", "params")
"""Where checkpoints keep their state dict; looked up in this order, again inside what is found."""

DEEPEST = 8
"""A state dict lies at most so many dicts deep in a checkpoint, which may contain itself."""

SMALL = 64 << 20
"""A tensor that repeats few stored numbers, as `expand` makes it, may come to so many bytes in full."""

LONGEST_NAME = 120
"""Characters of a name in a report."""

LISTED = 8
"""A report names this many tensors of a kind, and counts the rest."""

_WRAPPER_SEGMENT = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_STATE_DICT_REMEDY = "Save the weights alone, with save_weights(model, FILE), and pass that file."


@dataclass(frozen=True)
class Mismatch:
    """A tensor of one name and two shapes."""

    name: str
    expected: tuple[int, ...]
    got: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} (model {self.expected}, file {self.got})"


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` found. `str(report)` is readable: a line a kind, eight names at most in each.

    `missing` are in the model only, `unexpected` in the file only; `prefix` is what was removed from the
    file's names to fit the model's ("student." in a Lightning checkpoint, usually empty).
    """

    path: Path
    loaded: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    prefix: str = ""

    @property
    def complete(self) -> bool:
        """Whether model and file hold the same names with the same shapes."""
        return not (self.missing or self.unexpected or self.mismatched)

    @property
    def new_head(self) -> str | None:
        """The head that keeps the model's weights, in words, if its number of classes is all that differs."""
        head = _head_mismatch(self) if self.mismatched else None
        if head is None:
            return None
        return f"the head {head[0]} starts afresh: {head[1]} classes there, {head[2]} here"

    @property
    def differences(self) -> list[str]:
        """One sentence for each kind of difference between model and file."""
        kinds = {
            "missing in the file": self.missing,
            "unexpected in the file": self.unexpected,
            "of another shape": self.mismatched,
        }
        return [f"{len(names)} {kind}: {_shorten(names)}" for kind, names in kinds.items() if names]

    def __str__(self) -> str:
        removed = f', under the prefix "{self.prefix}"' if self.prefix else ""
        afresh = f"; {self.new_head}" if self.new_head else ""
        loaded = f"{self.path}: {self.loaded} tensors loaded{removed}{afresh}"
        return "\n  ".join([loaded, *self.differences])


def load_weights(
    model: nn.Module, path: str | os.PathLike[str], *, strict: bool | Literal["body"] = True
) -> LoadReport:
    """Copy the weights of a file into `model`, in place, whatever the file's dtype or the model's device.

    The file is a safetensors file; a `torch.save`d state dict, plain or nested under "state_dict", "model"
    or "params"; a Lightning checkpoint, of which the part ("student.", "teacher.", ...) that fits is taken;
    or a run folder, for its student.safetensors. What DDP and `torch.compile` add to names is ignored.
    Nothing is unpickled. The model is unchanged if an error is raised.

    Args:
        strict: refuse a file that does not fit name by name and shape by shape (only BatchNorm's
            num_batches_tracked may be missing). With "body", a head of another number of classes is left
            as it is, and all else must fit. With False, what fits is loaded and the rest reported.

    Raises:
        FileNotFoundError: no such file, or a folder without student.safetensors.
        ValueError: the file is damaged, of a foreign format, or needs unpickling; it does not fit
            (`strict`); or no tensor of it fits.
    """
    path = _weights_file(Path(path))
    targets = _without_wrappers(_tensors(model.state_dict()))
    stored = _without_wrappers(_read(path))
    prefix = _best_prefix(targets, stored)
    stored = {name[len(prefix) :]: tensor for name, tensor in stored.items() if name.startswith(prefix)}
    report = _compare(targets, stored, path, prefix)
    allowed = strict == "body" and report.new_head is not None
    if not report.loaded or (strict and not report.complete and not allowed):
        raise ValueError(_explain(report, type(model).__name__))
    fitting = {
        name: stored[clean]
        for name, clean in _clean_names(_tensors(model.state_dict())).items()
        if clean in stored and stored[clean].shape == targets[clean].shape
    }
    model.load_state_dict(fitting, strict=False)
    return report


def save_weights(
    model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the state dict of `model` as a safetensors file: complete, or not at all.

    Tied and non-contiguous tensors are written out in full; the names DDP and `torch.compile` add are left
    out. `metadata` (text to text) comes back from `read_metadata`.

    Raises:
        OSError: the file could not be written (no space, no folder, no permission); an older file of this
            name is intact.
    """
    path = Path(path)
    tensors = _independent(_without_wrappers(_tensors(model.state_dict())))
    data = safetensors_torch.save(tensors, dict(metadata) if metadata else None)
    try:
        write_atomically(path, data)
    except OSError as error:
        raise type(error)(
            f"save_weights: could not write {path}: {error.strerror or error}. "
            "An older file there is intact. Free some space, or choose another folder."
        ) from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata that `save_weights` wrote into a safetensors file or run folder; empty if there is none.

    Raises:
        FileNotFoundError, ValueError: as `load_weights`.
    """
    path = _weights_file(Path(path))
    if not _is_safetensors(path):
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, ValueError) as error:
        raise ValueError(_damaged(path, error)) from error


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits of the SHA-256 over the names, shapes, dtypes and bytes of the state dict.

    The device, the memory layout, the order of the modules and the names that DDP and `torch.compile` add
    make no difference; any change of a weight or of a BatchNorm statistic does.
    """
    return _digest(_tensors(model.state_dict()))


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    """What `fingerprint` says of the model whose weights `save_weights` put into this file.

    Raises:
        ValueError: if it is not such a file, or damaged.
    """
    return _digest(_read(_weights_file(Path(path))))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(_without_wrappers(tensors).items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


# Names


def _tensors(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, without the extra state that a module may keep there."""
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {clean: tensors[name] for name, clean in _clean_names(tensors).items()}


def _clean_names(names: Iterable[str]) -> dict[str, str]:
    """Each name, and the name without what DDP, FSDP and torch.compile put into it."""
    clean = {name: _WRAPPER_SEGMENT.sub("", name) for name in names}
    # "module." may be an attribute of the user's own model: it is a wrapper only where every name has it
    while clean and all(name.startswith("module.") for name in clean.values()):
        clean = {name: short.removeprefix("module.") for name, short in clean.items()}
    return clean


def _best_prefix(targets: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> str:
    """The prefix of the stored names under which most of the model's tensors are found, shapes first.

    Where several fit equally well: none, then "student.", then the shortest.
    """
    prefixes = {""}
    lengths = {name.count(".") + 1 for name in targets}
    for name in stored:
        parts = name.split(".")
        prefixes.update(".".join([*parts[:-n], ""]) for n in lengths if n < len(parts))

    def fit(prefix: str) -> tuple[int, int, bool, bool, int]:
        found = [name for name in targets if prefix + name in stored]
        same_shape = sum(targets[name].shape == stored[prefix + name].shape for name in found)
        return same_shape, len(found), prefix == "", prefix == "student.", -len(prefix)

    if fit("")[0] == len(targets):
        return ""
    return max(sorted(prefixes), key=fit)


# Comparing and reporting


def _compare(
    targets: Mapping[str, Tensor], stored: Mapping[str, Tensor], path: Path, prefix: str
) -> LoadReport:
    common = [name for name in targets if name in stored]
    mismatched = [name for name in common if stored[name].shape != targets[name].shape]
    loaded = [name for name in common if stored[name].shape == targets[name].shape]
    # a tied tensor is stored under one of its names by some writers, and filled through that one
    filled = {_memory(targets[name]) for name in loaded}
    missing = [
        name
        for name, tensor in targets.items()
        if name not in stored and _memory(tensor) not in filled and not name.endswith("num_batches_tracked")
    ]
    return LoadReport(
        path=path,
        loaded=len(loaded),
        missing=tuple(missing),
        unexpected=tuple(prefix + name for name in stored if name not in targets),
        mismatched=tuple(
            Mismatch(name, tuple(targets[name].shape), tuple(stored[name].shape)) for name in mismatched
        ),
        prefix=prefix,
    )


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two tensors that are one piece of memory seen alike. Empty and meta tensors have none."""
    address: object = tensor.data_ptr() if tensor.numel() and tensor.device.type != "meta" else object()
    return address, tensor.device, tensor.shape, tensor.stride()


def _explain(report: LoadReport, model: str) -> str:
    opening = f"load_weights: {report.path} does not fit {model}: "
    if not report.loaded and not report.mismatched:
        return f"{opening}no tensor of it has a name of the model. {'; '.join(report.differences)}."
    head = _head_mismatch(report)
    if head is not None:
        modules, in_file, in_model = head
        return (
            f"{opening}the head {modules} has {in_file} classes in the file and {in_model} in the model. "
            f"Build the model with num_classes={in_file}, or pass strict=False to load all but the head."
        )
    return (
        f"{opening}{'; '.join(report.differences)}. "
        "Check the model's name, num_classes and in_channels, or pass strict=False to load what fits."
    )


def _head_mismatch(report: LoadReport) -> tuple[str, int, int] | None:
    """(modules, classes in the file, classes in the model) if the number of classes is all that differs."""
    if report.missing or report.unexpected or not all(m.got and m.expected for m in report.mismatched):
        return None
    classes = {(m.got[0], m.expected[0]) for m in report.mismatched}
    if len(classes) != 1 or any(m.got[1:] != m.expected[1:] for m in report.mismatched):
        return None
    modules = dict.fromkeys(m.name.rpartition(".")[0] for m in report.mismatched)
    return (_shorten(tuple(modules)), *classes.pop())


def _shorten(names: tuple[object, ...]) -> str:
    listed = ", ".join(printable(str(name)[:LONGEST_NAME]) for name in names[:LISTED])
    return listed if len(names) <= LISTED else f"{listed} and {len(names) - LISTED} more"


# Reading


def _weights_file(path: Path) -> Path:
    if path.is_dir():
        path = path / "student.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            "load_weights: expected a weights file, or a run folder with student.safetensors in it, "
            f"got {path}, which does not exist. Check the path."
        )
    if not path.is_file():
        raise ValueError(f"load_weights: expected a file, got {path}, which is not one. Check the path.")
    return path


def _read(path: Path) -> dict[str, Tensor]:
    if _is_safetensors(path):
        try:
            return safetensors_torch.load_file(path)
        # besides its own error a KeyError for a dtype that it does not know, and torch's for odd shapes
        except Exception as error:
            raise ValueError(_damaged(path, error)) from error
    return _state_dict_of(read_checkpoint(path), path)


def _is_safetensors(path: Path) -> bool:
    """A safetensors file begins with the length of its header, 8 bytes, and the header's brace."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


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
        raise ValueError(_damaged(path, error)) from error


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
        f"Unpickling can run any code, so it is refused. {_STATE_DICT_REMEDY}"
    )


def _damaged(path: Path, error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"load_weights: expected a safetensors file or a torch checkpoint, got {path}, "
        f"which is damaged or of another format ({reason[:160].rstrip('. ')}). Copy or download it again."
    )


def _state_dict_of(checkpoint: Any, path: Path) -> dict[str, Tensor]:
    found = checkpoint
    for _ in range(DEEPEST):
        if not isinstance(found, Mapping):
            break
        nested = next((key for key in NESTING_KEYS if isinstance(found.get(key), Mapping)), None)
        if nested is None:
            break
        found = found[nested]
    tensors = _tensors(found) if isinstance(found, Mapping) else {}
    if not tensors:
        holds = _shorten(tuple(found)) if isinstance(found, Mapping) else f"a {type(found).__name__}"
        raise ValueError(
            f"load_weights: expected a state dict, plain or under one of {', '.join(NESTING_KEYS)}, "
            f"got {path}, which holds {holds or 'nothing'}. {_STATE_DICT_REMEDY}"
        )
    for name, tensor in tensors.items():
        if not _is_plain(tensor):
            raise ValueError(
                f"load_weights: expected dense tensors with their numbers, got {path}, where "
                f"{_shorten((name,))} is none. {_STATE_DICT_REMEDY}"
            )
    return tensors


def _is_plain(tensor: Tensor) -> bool:
    """Whether a stored tensor is numbers on the CPU, and no more of them than are there."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    if tensor.is_quantized or tensor.is_nested:
        return False
    full = tensor.numel() * tensor.element_size()
    return full <= max(SMALL, tensor.untyped_storage().nbytes())


# Writing


def _independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors asks; copied only where they must be."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        result[name] = plain
    return result
