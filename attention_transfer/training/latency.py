"""How large networks are, and how long they take for a batch, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor, nn

WARM_UP = 3
ROUNDS = (5, 200)
SECONDS = 5.0


@dataclass(frozen=True)
class Size:
    """A network's size.

    Attributes:
        parameters: how many there are.
        bytes: of parameters and buffers, such as BatchNorm's statistics.
        flops: of convolutions and matrix products for one image, 2 for each multiply-add; the rest, such as
            normalisation and activations, is not counted.
    """

    parameters: int
    bytes: int
    flops: int


def size_of(model: nn.Module, image: Float[Tensor, "1 c h w"]) -> Size:
    """The size of a model in evaluation mode, counted over one image as it expects it."""
    from torch.utils.flop_counter import FlopCounterMode

    # with a gradient to come, as attention then takes no fused path, which the counter cannot see into
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        model(image.clone().requires_grad_())
    return Size(
        parameters=sum(p.numel() for p in model.parameters()),
        bytes=sum(t.nbytes for t in chain(model.parameters(), model.buffers())),
        flops=counter.get_total_flops(),
    )


@dataclass(frozen=True)
class Timing:
    """The median time of a batch, in seconds, over so many rounds."""

    seconds: float
    rounds: int


@torch.inference_mode()
def time_batches(
    networks: Mapping[str, tuple[nn.Module, Float[Tensor, "b c h w"]]],
    *,
    seconds: float = SECONDS,
    rounds: tuple[int, int] = ROUNDS,
) -> dict[str, Timing]:
    """The forward pass of each network on its own batch, in turn, so that all meet the same machine.

    Each round runs every network once, and the next one in the opposite order; a few rounds to warm up do not
    count. It goes on until `seconds` are over, but at least and at most so many rounds.
    """
    found: dict[str, list[float]] = {name: [] for name in networks}
    order = list(networks)
    start = time.perf_counter()
    for done in range(-WARM_UP, rounds[1]):
        if done == 0:
            start = time.perf_counter()
        if done >= rounds[0] and time.perf_counter() - start > seconds:
            break
        for name in order:
            model, batch = networks[name]
            lap = _lap(model, batch)
            if done >= 0:
                found[name].append(lap)
        order.reverse()
    return {name: Timing(statistics.median(laps), len(laps)) for name, laps in found.items()}


def _lap(model: Callable[[Tensor], object], batch: Tensor) -> float:
    _synchronise(batch.device)
    start = time.perf_counter()
    model(batch)
    _synchronise(batch.device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
