"""A converted module as ONNX, compared with onnxruntime."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attention_transfer._extras import require

USER, EXTRA = "convert: ONNX", "onnx"


def require_onnx() -> None:
    """Look for the packages.

    Raises:
        ImportError: if one is missing.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, extra=EXTRA, user=USER)


def as_onnx(model: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], share: float) -> bytes:
    """`model` as an ONNX file, with a free batch size if the net has one, and compared in onnxruntime.

    Args:
        inputs: examples by their names.
        outputs: the names of what it gives.
        share: as `agree`.

    Raises:
        ValueError: if it cannot be exported, or onnxruntime gets other numbers.
    """
    examples = _with_batch(inputs)
    free = examples is not None and _runs(model, [*examples.values()])
    program = _export(model, examples if examples is not None and free else inputs, outputs, free)
    data = program.model_proto.SerializeToString()
    session = _session(data)
    _check(session, model, [*inputs.values()], share)
    if examples is not None and free:
        _check(session, model, [*examples.values()], share)
    return data


def _with_batch(inputs: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The inputs with a batch of another size, 3 or more; None where they have not one batch in common."""
    if len({x.shape[:1] for x in inputs.values()}) != 1 or any(x.dim() == 0 for x in inputs.values()):
        return None
    batch = len(next(iter(inputs.values())))
    size = 3 if batch != 3 else 4
    return {name: torch.cat([x] * size)[:size] if batch else x for name, x in inputs.items()}


def _runs(model: nn.Module, inputs: Sequence[Tensor]) -> bool:
    try:
        with torch.no_grad():
            model(*inputs)
    except RuntimeError:
        return False
    return True


def _export(model: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], free: bool) -> Any:
    batch = torch.export.Dim("batch", min=1)
    shapes = {name: {0: batch} for name in inputs} if free else None
    try:
        with _quiet(), torch.no_grad():
            return torch.onnx.export(
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
        raise ValueError(f"{USER}: expected a module that torch can export, got: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """The first line of what an error goes back to."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch and onnxscript use parts of each other and of themselves that they have deprecated
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _session(data: bytes) -> Any:
    onnxruntime = require("onnxruntime", extra=EXTRA, user=USER)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def _check(session: Any, model: nn.Module, inputs: Sequence[Tensor], share: float) -> None:
    names = [each.name for each in session.get_inputs()]
    got = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    wanted = as_tuple(model(*inputs))
    for place, (array, want) in enumerate(zip(got, wanted, strict=True)):
        if not agree(torch.from_numpy(array), want, 1e-4, share):
            name = session.get_outputs()[place].name
            raise ValueError(
                f"{USER}: expected onnxruntime to give the module's {name!r} for inputs of shape "
                f"{[tuple(x.shape) for x in inputs]}, got other numbers. Please report the prototxt."
            )


def as_tuple(output: Any) -> tuple[Tensor, ...]:
    """The tensors that a converted module gives."""
    return tuple(output.values()) if isinstance(output, dict) else (output,)


def agree(got: Tensor, want: Tensor, tolerance: float, share: float) -> bool:
    """Whether two tensors differ by no more than `tolerance` times the largest entry; NaN equals NaN.

    Args:
        share: of the entries, from 0 to 1, must agree; see `Plan.share`.
    """
    if got.shape != want.shape:
        return False
    finite = want[want.isfinite()].abs()
    largest = float(finite.max()) if len(finite) else 0.0
    close = torch.isclose(got, want, rtol=0, atol=tolerance * largest + 1e-30, equal_nan=True)
    return float(close.sum()) >= share * close.numel()
