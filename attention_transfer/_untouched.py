"""Running a model to look at it, and leaving it as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module, *, training: bool | None = None) -> Iterator[None]:
    """Leave the model's buffers, training flags and all random states as they are before the block.

    Inside, the model is in the mode `training` (None: in its own), and runs eager, because compiled code
    hides the calls and gradients of the layers inside of it.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = {module: dict(module._buffers) for module in model.modules()}
    contents = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        if "torch._dynamo" in sys.modules:  # nothing is compiled before it is imported, which takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module, mode in modes.items():
            module.training = mode if training is None else training
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for module, own in buffers.items():
                module._buffers.clear()
                module._buffers.update(own)
            with torch.no_grad():
                for buffer, before in contents:
                    _restore(buffer, before)


def _restore(buffer: Tensor, before: Tensor) -> None:
    """Write what a buffer held into it; observers of quantisation give theirs another shape."""
    if buffer.shape != before.shape:
        buffer.resize_(before.shape)
    if not torch.equal(buffer, before):
        buffer.copy_(before)
