"""Caffe's nets as PyTorch source with safetensors, and ONNX; and weights as a caffemodel again."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors_torch
from torch import Tensor, nn

from attention_transfer._errors import InputError
from attention_transfer._files import write_atomically
from attention_transfer._onnx import require_onnx
from attention_transfer.caffe.converting.back import to_caffemodel as to_caffemodel
from attention_transfer.caffe.converting.export import USER, agree, as_onnx, as_tuple
from attention_transfer.caffe.converting.selection import Selection, net_without_data, select_layers
from attention_transfer.caffe.converting.source import Source, state_of, write_source
from attention_transfer.caffe.files.caffemodel import read_caffemodel
from attention_transfer.caffe.graph import Blob
from attention_transfer.caffe.net import Net, Phase

File = str | PathLike[str]

SOURCE, WEIGHTS, ONNX = "model.py", "model.safetensors", "model.onnx"


class GradientWarning(UserWarning):
    """Caffe's backward pass of a layer is not the derivative, which PyTorch takes."""


@dataclass
class Conversion:
    """A converted net.

    Attributes:
        folder: where its files are.
        source: what was written.
    """

    folder: Path
    source: Source

    def differences(self) -> list[str]:
        """For each way in which Caffe's gradient is another one, a line that names the layers."""
        return [
            f"convert: Caffe's own gradient differs in {_listed(layers)}: {reason}."
            for reason, layers in self.source.differing.items()
        ]


def convert(
    prototxt: File | Any,
    weights: File | Any,
    folder: File,
    *,
    phase: Phase = "TEST",
    output: str | Sequence[str] = (),
    onnx: bool = False,
) -> Path:
    """Write a net as a PyTorch module: `model.py`, readable source, and `model.safetensors`.

    The source needs torch and safetensors, not this package: `model.load()` gives the module in evaluation
    mode. A net of one output gives its tensor, one of several a dict. Losses, accuracies, and what only makes
    their labels are left out. In float32, or in float64 if the weights are doubles.

    Args:
        prototxt: path of a net, or a NetParameter.
        weights: path of a .caffemodel, a NetParameter, or several.
        folder: where to write; made if it is not there. Former files are replaced.
        phase: which layers are in.
        output: the blobs to give, and with them which layers are needed; by default, all that no layer but a
            loss reads.
        onnx: also write `model.onnx`, in float32 with a free batch size, and compare it with the module in
            onnxruntime.

    Returns:
        The folder.

    Raises:
        ValueError: if the net cannot be built or converted, in one line that names the layer; or if what
            was written does not compute the same as the net.
        OSError: if a file cannot be read or written.
        ImportError: if `onnx` is asked for and its packages are missing.
    """
    done = convert_net(prototxt, weights, folder, phase=phase, output=output, onnx=onnx)
    for line in done.differences():
        warnings.warn(line, GradientWarning, stacklevel=2)
    return done.folder


def convert_net(
    prototxt: File | Any,
    weights: File | Any,
    folder: File,
    *,
    phase: Phase = "TEST",
    output: str | Sequence[str] = (),
    onnx: bool = False,
) -> Conversion:
    """Like `convert`, without warnings."""
    if onnx:
        require_onnx(USER)
    net = _read(prototxt, weights, phase)
    selection = select_layers(net, [output] if isinstance(output, str) else output)
    source = write_source(selection, net.dtype)
    folder = Path(folder)
    examples, blobs = _trial(selection, net.dtype)
    model = _instance(folder / SOURCE, source, net.dtype)
    _compare(selection, source, model, examples, blobs)
    files: dict[str, bytes | str] = {SOURCE: source.text, WEIGHTS: _packed(model)}
    if onnx:
        # in float32: onnxruntime lacks much in doubles
        inputs = dict(zip(source.inputs, (x.float() for x in examples), strict=True))
        files[ONNX] = as_onnx(model.float(), inputs, source.outputs, selection.share)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)
    return Conversion(folder, source)


def _read(prototxt: Any, weights: Any, phase: Phase) -> Net:
    given = weights if isinstance(weights, (list, tuple)) else [weights]
    stored = [read_caffemodel(each) if isinstance(each, (str, PathLike)) else each for each in given]
    net = net_without_data(prototxt, phase, stored)
    net.load(stored)
    doubles = any(blob.double_data for each in stored for layer in each.layer for blob in layer.blobs)
    known = {layer.name for each in stored for layer in each.layer}
    if missing := [name for name, blobs in net.params.items() if name not in known and not _constant(blobs)]:
        warnings.warn(f"convert: no weights for {_listed(missing)}: they start from fillers.", stacklevel=4)
    return net.double() if doubles else net


def _constant(blobs: Sequence[Tensor]) -> bool:
    """Whether these are parameters that are never learned, so that their fillers say all."""
    return all(isinstance(blob, nn.Parameter) and not blob.requires_grad for blob in blobs)


def _listed(names: Sequence[str]) -> str:
    shown = [repr(name) for name in names[:6]]
    return ", ".join(shown) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _instance(path: Path, source: Source, dtype: torch.dtype) -> nn.Module:
    """The module with its weights, made of the source that is going to be at `path`."""
    namespace: dict[str, Any] = {"__name__": "converted", "__file__": str(path)}
    exec(compile(source.text, str(path), "exec"), namespace)
    model = namespace[source.name]().to(dtype)
    own = model.state_dict()
    state = {key: value.reshape(own[key].shape) for key, value in state_of(source).items()}
    model.load_state_dict({**own, **state})
    return model.eval()


def _packed(model: nn.Module) -> bytes:
    """The state dict as safetensors; shared parameters in full under each name."""
    return safetensors_torch.save({key: value.clone() for key, value in model.state_dict().items()})


def _trial(selection: Selection, dtype: torch.dtype) -> tuple[list[Tensor], dict[Blob, Tensor]]:
    """Random inputs, and the blobs that the net makes of them.

    They are two samples, if the net can do with fewer than it declares.

    Raises:
        ValueError: if the blobs would not fit into memory.
    """
    shapes = [selection.shape(blob) for blob in selection.inputs]
    for few in (True, False):
        generator = torch.Generator().manual_seed(0)
        sizes = [(min(shape[0], 2), *shape[1:]) if few and shape else shape for shape in shapes]
        _check_memory(selection, math.prod(sizes[0]) / max(math.prod(shapes[0]), 1), dtype)
        examples = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
        try:
            return examples, _blobs(selection, examples)
        except (RuntimeError, ValueError):  # such as a Reshape to a fixed batch
            if not few:
                raise
    raise AssertionError


def _check_memory(selection: Selection, share: float, dtype: torch.dtype) -> None:
    shapes = selection.net.shapes
    names = {name for index in selection.layers for name in selection.net.layers[index].tops}
    entries = sum(math.prod(shapes[name]) for name in (*names, *(blob.name for blob in selection.inputs)))
    needed = int(entries * share * dtype.itemsize)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise InputError(
            f"convert: expected blobs that fit into {there >> 30} GB of memory, to try the net out, got "
            f"{needed >> 30} GB. Declare smaller inputs."
        )


@torch.no_grad()
def _blobs(selection: Selection, examples: Sequence[Tensor]) -> dict[Blob, Tensor]:
    selection.net.eval()
    blobs = dict(zip(selection.inputs, examples, strict=True))
    for index in selection.layers:
        node = selection.graph.nodes[index]
        tops = selection.net.layers[index](*(blobs[blob] for blob in node.inputs))
        blobs.update(zip(node.outputs, tops if isinstance(tops, tuple) else (tops,), strict=True))
    return blobs


@torch.no_grad()
def _compare(
    selection: Selection,
    source: Source,
    model: nn.Module,
    examples: Sequence[Tensor],
    blobs: Mapping[Blob, Tensor],
) -> None:
    tolerance = 1e-4 if selection.net.dtype == torch.float32 else 1e-9
    for mine, blob in zip(as_tuple(model(*examples)), selection.outputs, strict=True):
        if not agree(mine, blobs[blob], tolerance, selection.share):
            raise InputError(
                f"convert: expected the module to give the net's {blob.name!r}, got other numbers "
                f"in {source.name}. Please report the prototxt: this is a bug."
            )
