"""Writing modules as ONNX and opening them in onnxruntime, on behalf of whoever asks."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attention_transfer._errors import InputError
from attention_transfer._extras import require
from attention_transfer._quiet import muted

EXTRA = "onnx"


def require_onnx(user: str) -> None:
    """Look for the packages.

    Raises:
        ImportError: if one is missing.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, extra=EXTRA, user=user)


def to_onnx(
    model: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], *, free_batch: bool, user: str
) -> Any:
    """`model` as an ONNX ModelProto, traced with `inputs`, whose batch size stays free if that is wanted.

    What the exporter notes on where each node came from, paths of this machine among it, is left out.

    Raises:
        ValueError: if it cannot be exported.
    """
    shapes = ({0: free_dimension()},) * len(inputs) if free_batch else None
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                model,
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamo=True,
                dynamic_shapes=shapes,
                external_data=False,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        raise InputError(f"{user}: expected a module that torch can export, got: {root_of(error)}") from None
    assert program is not None
    proto = program.model_proto
    for node in (*proto.graph.node, *(node for function in proto.functions for node in function.node)):
        del node.metadata_props[:]
    return proto


def free_dimension() -> Any:
    """A batch size that an exported program leaves open, from 1 up."""
    return torch.export.Dim("batch", min=1)


def root_of(error: BaseException) -> str:
    """The first line of what an error goes back to."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def open_onnx(model: bytes | str | os.PathLike[str], *, user: str) -> Any:
    """An onnxruntime session for a model's bytes or file, on the CPU with as many threads as torch has."""
    onnxruntime = require("onnxruntime", extra=EXTRA, user=user)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' remarks on themselves, and the graphs that they print when they fail."""
    with muted(), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        # torch and onnxscript use parts of each other and of themselves that they have deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield
