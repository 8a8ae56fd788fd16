"""Timing contenders side by side, and counting the bytes that they allocate.

Machines are noisy and drift, so contenders take turns: every round runs each of them once, in a new
random order, and what is compared is the ratio of two times of the same round. Before each timed part a
buffer larger than the caches is read, so that all find their inputs in memory, whoever ran before.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attention_transfer._memory import freed_memory

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library reports its own comings and goings
CACHES = 256 * 2**20  # bytes; more than the last-level cache of what this runs on
HOST_LEAD = 4_000_000  # cycles a GPU sleeps while the host enqueues work, as it runs ahead in training

Say = Callable[[str], None]


@dataclass
class Samples:
    """Seconds of each contender, round by round, by what was timed."""

    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # op -> contender -> rounds

    def add(self, contender: str, laps: Mapping[str, float]) -> None:
        for op, seconds in laps.items():
            self.seconds.setdefault(op, {}).setdefault(contender, []).append(seconds)

    def of(self, op: str, contender: str) -> np.ndarray:
        return np.array(self.seconds[op][contender])

    def figures(self, op: str, contender: str) -> dict[str, Any]:
        """The columns p50, p20, p80 and rounds of a row."""
        p20, p50, p80 = np.percentile(self.of(op, contender), (20, 50, 80))
        return {"p50": p50, "p20": p20, "p80": p80, "rounds": len(self.of(op, contender))}

    def ratio(self, op: str, contender: str, *against: str) -> dict[str, Any]:
        """The columns of a comparison: one contender's time over the sum of others', paired by round."""
        ratios = self.of(op, contender) / sum(self.of(op, other) for other in against)
        p20, p50, p80 = np.percentile(ratios, (20, 50, 80))
        return {"against": " + ".join(against), "ratio": p50, "ratio_p20": p20, "ratio_p80": p80}


class Stopwatch:
    """Times the parts of one run: `with watch("forward"): ...`. On a GPU by events on its stream."""

    def __init__(self, device: torch.device, evict: Callable[[], None]) -> None:
        self.device, self.evict = device, evict
        self._laps: dict[str, float | tuple[Any, Any]] = {}

    @contextlib.contextmanager
    def __call__(self, op: str) -> Iterator[None]:
        self.evict()
        if self.device.type != "cuda":
            start = time.perf_counter()
            yield
            self._laps[op] = time.perf_counter() - start
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HOST_LEAD)
        begin.record()
        yield
        end.record()
        self._laps[op] = (begin, end)

    def laps(self) -> dict[str, float]:
        """Seconds by op, and their sum as "both" if there are two."""
        synchronise(self.device)
        seconds = {
            op: lap if isinstance(lap, float) else lap[0].elapsed_time(lap[1]) / 1000
            for op, lap in self._laps.items()
        }
        return {**seconds, "both": sum(seconds.values())} if len(seconds) == 2 else seconds


Run = Callable[[Stopwatch], None]


def interleave(
    contenders: Mapping[str, Run],
    device: torch.device,
    *,
    seconds: float,
    rounds: tuple[int, int],
    warm_up: int = 2,
    evict_bytes: int = CACHES,
    progress: Say = lambda _: None,
) -> Samples:
    """Run all contenders in turn, until `seconds` are over but at least and at most so many rounds."""
    samples, order = Samples(), list(contenders)
    evict = evicting(device, evict_bytes)
    shuffle = random.Random(0).shuffle
    for name in order * warm_up:
        contenders[name](Stopwatch(device, evict))
    with _no_garbage_collection():
        start = time.perf_counter()
        for done in range(rounds[1]):
            if done >= rounds[0] and time.perf_counter() - start > seconds:
                break
            progress(f"round {done + 1}")
            shuffle(order)
            for name in order:
                watch = Stopwatch(device, evict)
                contenders[name](watch)
                samples.add(name, watch.laps())
    return samples


def evicting(device: torch.device, size: int) -> Callable[[], None]:
    """A function that fills the caches with something else, without leaving anything to be written back."""
    if not size:
        return lambda: None
    other = torch.ones(size // 8, dtype=torch.float64, device=device)

    def evict() -> None:
        other.sum()
        synchronise(device)

    return evict


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- memory -------------------------------------------------------------------------------------------------


def allocated_by(device: torch.device, work: Callable[[], object]) -> tuple[int, int]:
    """Bytes that `work` allocates at its peak, and bytes still allocated while its result is held.

    On the CPU they are counted by torch's allocator, which reports every block that it hands out or takes
    back to the profiler: outputs and temporaries of torch's own operators, of autograd's accumulation, of
    compiled code and of custom operators, a numba kernel's too, because all get their tensors from it. That
    is exact and independent of the C library, whose resident set tells nothing once freed blocks are kept.
    Not counted is what code takes from `malloc` by itself: oneDNN's scratch space, and a numba kernel's flags
    and accumulators of a block, some kilobytes. A `TorchDispatchMode` would miss what custom operators drop.
    """
    gc.collect()
    if device.type == "cuda":
        return _allocated_on_gpu(device, work)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    live = np.cumsum([0, *(event.nbytes() for event in events)])
    del result
    return int(live.max()), int(live[-1])


def _allocated_on_gpu(device: torch.device, work: Callable[[], object]) -> tuple[int, int]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = work()
    torch.cuda.synchronize(device)
    after = torch.cuda.memory_allocated(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before, after - before


def allocator(device: torch.device) -> str:
    """The column of that name: what this process does with freed memory now."""
    return "kept" if device.type == "cuda" else freed_memory().removeprefix("freed memory ")


# --- shapes -------------------------------------------------------------------------------------------------

LAYOUTS = {"nchw": torch.contiguous_format, "channels-last": torch.channels_last}


def activation(
    shape: Sequence[int], dtype: torch.dtype, layout: str, device: torch.device, seed: int = 0
) -> Tensor:
    """A random activation (b, c, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tuple(shape), generator=generator).to(device=device, dtype=dtype)
    return values.contiguous(memory_format=LAYOUTS[layout])


def flat(x: Tensor) -> Tensor:
    """The same memory in the order in which it lies."""
    return x.as_strided((x.numel(),), (1,))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_name(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
