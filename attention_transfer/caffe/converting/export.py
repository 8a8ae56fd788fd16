"""A converted module as ONNX, compared with onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attention_transfer._errors import InputError
from attention_transfer._onnx import open_onnx, to_onnx

USER = "convert: ONNX"


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
    traced = examples if examples is not None and free else inputs
    data = to_onnx(model, traced, outputs, free_batch=free, user=USER).SerializeToString()
    session = open_onnx(data, user=USER)
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


@torch.no_grad()
def _check(session: Any, model: nn.Module, inputs: Sequence[Tensor], share: float) -> None:
    names = [each.name for each in session.get_inputs()]
    got = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    wanted = as_tuple(model(*inputs))
    for place, (array, want) in enumerate(zip(got, wanted, strict=True)):
        if not agree(torch.from_numpy(array), want, 1e-4, share):
            name = session.get_outputs()[place].name
            raise InputError(
                f"{USER}: expected onnxruntime to give the module's {name!r} for inputs of shape "
                f"{[tuple(x.shape) for x in inputs]}, got other numbers. Please report the prototxt."
            )


def as_tuple(output: Any) -> tuple[Tensor, ...]:
    """The tensors that a converted module gives."""
    return tuple(output.values()) if isinstance(output, dict) else (output,)


def agree(got: Tensor, want: Tensor, tolerance: float, share: float) -> bool:
    """Whether two tensors differ by no more than `tolerance` times the largest entry; NaN equals NaN.

    Args:
        share: of the entries, from 0 to 1, must agree; see `Selection.share`.
    """
    if got.shape != want.shape:
        return False
    finite = want[want.isfinite()].abs()
    largest = float(finite.max()) if len(finite) else 0.0
    close = torch.isclose(got, want, rtol=0, atol=tolerance * largest + 1e-30, equal_nan=True)
    return float(close.sum()) >= share * close.numel()
