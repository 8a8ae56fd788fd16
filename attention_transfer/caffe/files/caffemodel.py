"""Reading and writing weights, snapshots and mean images: Caffe's binary files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from attention_transfer._errors import InputError
from attention_transfer._files import write_atomically
from attention_transfer._reading import read_bytes
from attention_transfer.caffe import schema
from attention_transfer.caffe.files.upgrade import upgrade_net
from attention_transfer.caffe.schema import DecodeError, UnknownFieldSet

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
# Settings of losses in several forks (weights of classes and the like), on which no blob depends.
HARMLESS = {"LossParameter field 4", "SoftmaxParameter field 3"}
MOST_ENTRIES = 2**31 - 1  # of a blob: Caffe counts them in an int


def read_caffemodel(path: str | PathLike[str]) -> Any:
    """The layers and blobs of a .caffemodel, as a NetParameter in the current form.

    Fields that the schema does not know are kept, and named in a warning.

    Raises:
        ValueError: if it is damaged, of another kind, or holds a blob whose data do not fit its shape.
        OSError: if it cannot be read.
    """
    net = read_binary(path, schema.NetParameter(), "read_caffemodel")
    for layer in (*net.layer, *net.layers):
        for index, blob in enumerate(layer.blobs):
            check_blob(blob, f"read_caffemodel: {path}: blob {index} of layer {layer.name!r}")
    return upgrade_net(net, "read_caffemodel")


def read_solverstate(path: str | PathLike[str]) -> Any:
    """The state of a solver in a .solverstate, as a SolverState.

    Raises:
        ValueError, OSError: as `read_caffemodel`.
    """
    state = read_binary(path, schema.SolverState(), "read_solverstate")
    for index, blob in enumerate(state.history):
        check_blob(blob, f"read_solverstate: {path}: history {index}")
    return state


def read_mean(path: str | PathLike[str]) -> np.ndarray:
    """The mean image of a .binaryproto, as an array (c, h, w).

    Raises:
        ValueError, OSError: as `read_caffemodel`.
    """
    blob = read_binary(path, schema.BlobProto(), "read_mean")
    check_blob(blob, f"read_mean: {path}: the mean")
    array = blob_array(blob)
    return array.reshape(array.shape[-3:])


def read_binary(path: str | PathLike[str], message: Any, user: str) -> Any:
    """Fill `message` from a binary file; returns it.

    Raises:
        ValueError: if the file is no such message.
        OSError: if it cannot be read.
    """
    data = read_bytes(path)
    kind = message.DESCRIPTOR.name
    if data.startswith(HDF5_MAGIC):
        raise InputError(
            f"{user}: expected protobuf's binary form, got HDF5 in {path}. "
            "Save it with `snapshot_format: BINARYPROTO`."
        )
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise InputError(
            f"{user}: expected a {kind} in protobuf's binary form, got something else in {path} "
            f"({len(data)} bytes): it is damaged, cut off, or of another kind."
        ) from None
    if unknown := sorted(unknown_names(message) - HARMLESS):
        listed = ", ".join(unknown[:6]) + (" and more" if len(unknown) > 6 else "")
        warnings.warn(f"{user}: {path}: kept without knowing what they mean: {listed}.", stacklevel=3)
    return message


def write_binary(message: Any, path: str | PathLike[str]) -> None:
    """Write a message in the binary form that Caffe reads, whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    write_atomically(Path(path), message.SerializeToString())


def unknown_names(message: Any) -> set[str]:
    """`MESSAGE field NUMBER` of the fields at every depth that the schema lacks."""
    name = message.DESCRIPTOR.name
    found = {f"{name} field {field.field_number}" for field in UnknownFieldSet(message)}
    for field, value in message.ListFields():
        if field.message_type:
            for part in value if field.is_repeated else (value,):
                found |= unknown_names(part)
    return found


# -------------------------------------------------------------------------------------------------- blobs


def blob_shape(blob: Any) -> tuple[int, ...]:
    """The shape of a BlobProto, its four legacy dimensions where it has no shape."""
    if _has_legacy_shape(blob):
        return blob.num, blob.channels, blob.height, blob.width
    return tuple(blob.shape.dim)


def _has_legacy_shape(blob: Any) -> bool:
    return any(blob.HasField(name) for name in ("num", "channels", "height", "width"))


def check_blob(blob: Any, what: str) -> None:
    """Compare the shape of a BlobProto with its data, without making an array.

    Raises:
        ValueError: if a dimension is negative, or the data are fewer or more than the shape says.
    """
    shape = blob_shape(blob)
    count, held = math.prod(shape), len(blob.double_data) or len(blob.data)
    if min(shape, default=0) < 0 or count > MOST_ENTRIES:
        raise InputError(f"{what}: expected dimensions of 0 to {MOST_ENTRIES} entries in all, got {shape}.")
    if count != held:
        raise InputError(
            f"{what}: expected as many numbers as its shape {shape} says, {count}, got {held}. "
            "The file is damaged, or was written without data."
        )


def blob_array(blob: Any) -> np.ndarray:
    """The data of a checked BlobProto, float64 where it holds doubles, else float32."""
    if blob.double_data:
        return np.array(blob.double_data, dtype=np.float64).reshape(blob_shape(blob))
    return np.array(blob.data, dtype=np.float32).reshape(blob_shape(blob))


def array_blob(array: np.ndarray) -> Any:
    """A BlobProto of an array; float64 goes into its doubles, anything else into its floats."""
    blob = schema.BlobProto()
    blob.shape.dim.extend(array.shape)
    data = blob.double_data if array.dtype == np.float64 else blob.data
    entries = array.ravel() if array.dtype == np.float64 else array.astype(np.float32).ravel()
    for start in range(0, entries.size, 1 << 20):  # as Python numbers they take ten times the memory
        data.extend(entries[start : start + (1 << 20)].tolist())
    return blob


def same_shape(blob: Any, shape: Sequence[int]) -> bool:
    """Whether a BlobProto fits a parameter of this shape: four legacy dimensions may have leading ones."""
    stored = blob_shape(blob)
    legacy = (1,) * (4 - len(shape)) + tuple(shape)
    return stored == (legacy if _has_legacy_shape(blob) else tuple(shape))
