"""The way back: a state dict, of a converted module or of a Net, as a caffemodel."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from attention_transfer._errors import InputError
from attention_transfer._reading import first_line, read_bytes
from attention_transfer.caffe.converting.emit import Tensors
from attention_transfer.caffe.converting.selection import net_without_data, select_layers
from attention_transfer.caffe.converting.source import write_source
from attention_transfer.caffe.layers import Layer
from attention_transfer.caffe.net import Net, Phase

WRAPPERS = re.compile(r"(^|(?<=\.))(module|_orig_mod)\.")
COUNTERS = "num_batches_tracked"  # of nn.BatchNorm, which Caffe has not


def to_caffemodel(
    prototxt: str | PathLike[str] | Any,
    state: Mapping[str, Tensor] | str | PathLike[str],
    *,
    phase: Phase = "TEST",
) -> Any:
    """Weights that were trained in PyTorch, as Caffe reads them.

    Statistics of BatchNorm become Caffe's three blobs, with the factor 1. Layers of which the state has
    nothing, as after a conversion of a part of the net, are left out.

    Args:
        prototxt: path of the net, or a NetParameter.
        state: the state dict of the module that `convert` made of it, or of a Net; or a safetensors file of
            one.
        phase: that of the conversion.

    Returns:
        A NetParameter with blobs; doubles if the state has some.

    Raises:
        ValueError: if the state does not fit the net, in one line that names an entry.
        OSError: if a file cannot be read.
    """
    tensors = read_state(state) if isinstance(state, (str, PathLike)) else state
    tensors = {WRAPPERS.sub("", key): tensor for key, tensor in tensors.items()}
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(COUNTERS)}
    net = net_without_data(prototxt, phase)
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        net.double()
    if any(key.endswith("running_var") for key in tensors) or tensors.keys() != _own(net).keys():
        entries = write_source(select_layers(net), net.dtype).tensors
    else:
        entries = _own(net)
    _fill(entries, tensors)
    given = {id(entries[key].layer) for key in tensors}
    return _with_blobs(net, given)


def read_state(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: if it is none.
        OSError: if it cannot be read.
    """
    data = read_bytes(path)
    try:
        return safetensors_torch.load(data)
    except SafetensorError as error:
        raise InputError(
            f"to_caffemodel: expected a safetensors file, got {path}, which is none, or damaged: "
            f"{first_line(error)}."
        ) from None


def _own(net: Net) -> dict[str, Tensors]:
    """What each entry of a Net's own state dict is."""
    return {
        f"{name}.{blob}": Tensors(layer, index)
        for name, layer in net.named_children()
        if isinstance(layer, Layer)
        for index, blob in enumerate(layer.blob_names)
    }


def _fill(entries: Mapping[str, Tensors], state: Mapping[str, Tensor]) -> None:
    if unknown := [key for key in state if key not in entries]:
        raise InputError(
            f"to_caffemodel: expected the entries of the net's module, such as "
            f"{', '.join(list(entries)[:3]) or 'none'}, got {unknown[0]!r}. Is it the state of another net?"
        )
    begun = {id(entries[key].layer) for key in state}
    missing = [key for key, tensors in entries.items() if id(tensors.layer) in begun and key not in state]
    if missing:
        raise InputError(
            f"to_caffemodel: expected {missing[0]!r} beside the layer's other entries, got none."
        )
    for key, tensor in state.items():
        _put(key, entries[key], tensor.detach())


def _put(key: str, entry: Tensors, tensor: Tensor) -> None:
    layer, blob = entry.layer, entry.layer.blobs[entry.index]
    if [size for size in tensor.shape if size > 1] != [size for size in blob.shape if size > 1]:
        raise InputError(
            f"to_caffemodel: expected {tuple(blob.shape)} for {key!r}, got {tuple(tensor.shape)}. "
            "Is it the state of another net?"
        )
    layer.put_blob(entry.index, tensor.reshape(blob.shape))
    if entry.summed:
        layer.put_blob(2, torch.ones(1))


def _with_blobs(net: Net, given: set[int]) -> Any:
    stored = net.to_caffemodel()
    absent = [layer.name for layer in net.layers if layer.blobs and id(layer) not in given]
    for layer, record in zip(net.layers, stored.layer, strict=True):
        if id(layer) not in given:
            del record.blobs[:]
    if absent:
        warnings.warn(
            f"to_caffemodel: nothing for {', '.join(map(repr, absent[:6]))}: left out.", stacklevel=3
        )
    return stored
