"""Weights on disk: loading without unpickling, atomic saving, and a fingerprint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor, nn

from .._errors import InputError
from .._files import write_atomically
from .._weights_path import split_prefix
from .checkpoint import STATE_DICT_REMEDY, damaged, read_checkpoint
from .fitting import Mismatch as Mismatch
from .fitting import (
    Part,
    UnclearError,
    are_alike,
    choose,
    convert,
    head_of,
    is_plain,
    memory,
    missing,
    shorten,
)
from .parts import NESTING_KEYS, Stored, clean_names, tensors_of, without_wrappers


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
        kinds: dict[str, Sequence[object]] = {
            "missing in the file": self.missing,
            "unexpected in the file": self.unexpected,
            "of another shape": [each for each in self.mismatched if not each.dtypes],
            "of another dtype": [each for each in self.mismatched if each.dtypes],
        }
        return [f"{len(names)} {kind}: {shorten(names)}" for kind, names in kinds.items() if names]

    def __str__(self) -> str:
        removed = f', under the prefix "{self.prefix}"' if self.prefix else ""
        afresh = f"; {self.new_head}" if self.new_head else ""
        loaded = f"{self.path}: {self.loaded} tensors loaded{removed}{afresh}"
        return "\n  ".join([loaded, *self.differences])


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    strict: bool | Literal["body"] = True,
    prefix: str | None = None,
) -> LoadReport:
    """Copy the weights of a file into `model`, in place, whatever the model's device.

    The file is a safetensors file; a `torch.save`d state dict, plain or in dicts of any names ("state_dict",
    "model", "params"); a Lightning checkpoint, of which the part ("student.", "teacher.", ...) that fits is
    taken; or a run folder, for its student.safetensors. Of several parts that fit, each with other numbers,
    none is taken until `prefix` names one. What DDP and `torch.compile` add to names is ignored. Nothing is
    unpickled. The model is unchanged if an error is raised.

    float16, bfloat16, float32 and float64 become each other. Integers, float8, booleans and quantised numbers
    are no weights of a float model without their scales, and are refused; an integer buffer takes what keeps
    its value in it.

    Args:
        path: the file; or FILE:PREFIX, which is a file with its `prefix`.
        strict: refuse a file that does not fit name by name and shape by shape (only BatchNorm's
            num_batches_tracked may be missing). With "body", a head of another number of classes is left
            as it is, and all else must fit. With False, what fits is loaded and the rest reported.
        prefix: which part of the file, such as "teacher" or "state_dict_ema"; "" for names without a prefix.

    Raises:
        FileNotFoundError: no such file, or a folder without student.safetensors.
        ValueError: the file is damaged, of a foreign format, or needs unpickling; it does not fit
            (`strict`); no tensor of it fits; several parts of it do; or numbers do not survive in the model.
    """
    path, named = split_prefix(path)
    path = _weights_file(path)
    stored = _read(path)
    own = tensors_of(model.state_dict())
    targets = without_wrappers(own)
    kind = type(model).__name__
    try:
        part = choose(targets, stored, strict, named if prefix is None else prefix)
    except UnclearError as unclear:
        raise InputError(_ask(path, kind, *unclear.args)) from None
    report = _compare(targets, stored, part, path)
    read = [*part.fitting, *(each.name for each in part.mismatched if not each.dtypes)]
    _check_plain({name: stored.tensors[part.prefix + name] for name in read}, path)
    if not _is_enough(report, strict):
        raise InputError(_explain(report, kind))
    fitting = {name: stored.tensors[part.prefix + name] for name in part.fitting}
    _check_tied(targets, fitting, path)
    converted = {name: _converted(name, tensor, targets[name], path) for name, tensor in fitting.items()}
    by_own_name = {name: converted[clean] for name, clean in clean_names(own).items() if clean in converted}
    model.load_state_dict(by_own_name, strict=False)
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
    tensors = _independent(without_wrappers(tensors_of(model.state_dict())))
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

    A prefix, as in FILE:PREFIX, makes no difference.

    Raises:
        FileNotFoundError, ValueError: as `load_weights`.
    """
    path = _weights_file(split_prefix(path)[0])
    if not _is_safetensors(path):
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, ValueError) as error:
        raise InputError(damaged(path, error)) from error


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits of the SHA-256 over the names, shapes, dtypes and bytes of the state dict.

    The device, the memory layout, the order of the modules and the names that DDP and `torch.compile` add
    make no difference; any change of a weight or of a BatchNorm statistic does.
    """
    return _digest(without_wrappers(tensors_of(model.state_dict())))


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    """What `fingerprint` says of the model whose weights `save_weights` put into this file.

    Raises:
        ValueError: if it is not such a file, or damaged.
    """
    path = _weights_file(Path(path))
    tensors = _read(path).tensors
    _check_plain(tensors, path)
    return _digest(tensors)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


# Comparing and reporting


def _compare(targets: Mapping[str, Tensor], stored: Stored, part: Part, path: Path) -> LoadReport:
    found = {*part.fitting, *(each.name for each in part.mismatched)}
    dicts = {stored.dicts[part.prefix + name] for name in found} or {stored.usual}
    start = len(part.prefix)
    unexpected = [
        stored.shown(name)
        for name in stored.tensors
        # what lies in other dicts, such as an optimizer's state, or in another network, is another matter
        if stored.dicts[name] in dicts and name.startswith(part.prefix) and not name.startswith(part.beside)
        if name[start:] not in found
    ]
    return LoadReport(
        path=path,
        loaded=len(part.fitting),
        missing=tuple(missing(targets, found, part.fitting)),
        unexpected=tuple(unexpected),
        mismatched=part.mismatched,
        prefix=stored.shown(part.prefix),
    )


def _is_enough(report: LoadReport, strict: bool | Literal["body"]) -> bool:
    allowed = strict == "body" and report.new_head is not None
    return bool(report.loaded) and (not strict or report.complete or allowed)


def _ask(path: Path, model: str, what: str, prefixes: Sequence[str]) -> str:
    names = [prefix.removesuffix(".") for prefix in prefixes]
    listed = shorten([f'"{name}"' for name in names])
    one = shorten(names[-1:])
    return (
        f"load_weights: expected one network in {path} that fits {model}, got {what}: {listed}. "
        f'Name one of these prefixes: {path}:{one}, or prefix="{one}" in Python.'
    )


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
    if any(each.dtypes for each in report.mismatched):
        return (
            f"{opening}{'; '.join(report.differences)}. Numbers of such dtypes are no weights without their "
            "scales: save them as float32, scaled, and pass that file."
        )
    return (
        f"{opening}{'; '.join(report.differences)}. "
        "Check the model's name, num_classes, in_channels and image_size, or pass strict=False to load what "
        "fits."
    )


def _head_mismatch(report: LoadReport) -> tuple[str, int, int] | None:
    """(modules, classes in the file, classes in the model) if the number of classes is all that differs."""
    return None if report.missing or report.unexpected else head_of(report.mismatched)


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
        raise InputError(f"load_weights: expected a file, got {path}, which is not one. Check the path.")
    return path


def _read(path: Path) -> Stored:
    if _is_safetensors(path):
        try:
            return Stored.of(safetensors_torch.load_file(path))
        # besides its own error a KeyError for a dtype that it does not know, and torch's for odd shapes
        except Exception as error:
            raise InputError(damaged(path, error)) from error
    return _stored(read_checkpoint(path), path)


def _is_safetensors(path: Path) -> bool:
    """A safetensors file begins with the length of its header, 8 bytes, and the header's brace."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _stored(checkpoint: object, path: Path) -> Stored:
    try:
        stored = Stored.of(checkpoint if isinstance(checkpoint, Mapping) else {})
    except ValueError as error:
        raise InputError(damaged(path, error)) from None
    if not stored.tensors:
        holds = (
            shorten(tuple(checkpoint))
            if isinstance(checkpoint, Mapping)
            else f"a {type(checkpoint).__name__}"
        )
        raise InputError(
            f"load_weights: expected a state dict, plain or under one of {', '.join(NESTING_KEYS)}, "
            f"got {path}, which holds {holds or 'nothing'}. {STATE_DICT_REMEDY}"
        )
    return stored


def _check_plain(tensors: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        # guard: plain-tensors
        if not is_plain(tensor):
            raise InputError(
                f"load_weights: expected dense tensors with their numbers, got {path}, where "
                f"{shorten((name,))} is none. {STATE_DICT_REMEDY}"
            )


def _check_tied(targets: Mapping[str, Tensor], fitting: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError if one piece of the model's memory would take two tensors that differ."""
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in fitting.items():
        other = first.setdefault(memory(targets[name]), name)
        if not are_alike(fitting[other], tensor):
            raise InputError(
                f"load_weights: expected one tensor in {path} for {shorten((other, name))}, which the model "
                "ties, got two that differ. Untie them there, or save the file from a model that ties them."
            )


def _converted(name: str, tensor: Tensor, target: Tensor, path: Path) -> Tensor:
    converted = tensor if tensor.dtype == target.dtype else convert(tensor, target.dtype)
    if converted is None:
        raise InputError(
            f"load_weights: expected numbers that {target.dtype} holds, got others, of {tensor.dtype}, in "
            f"{shorten((name,))} of {path}. Convert the model first: model.to({tensor.dtype})."
        )
    return converted


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
