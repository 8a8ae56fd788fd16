"""The energy on the CPU, compiled by numba: one pass over memory forward, one backward.

A task is one image and a block of positions, so that the block's sums stay in the first-level cache while
the channels stream by; where channels are contiguous (channels-last), it is one reduction a position.
float16 and bfloat16 are read as they are and widened in registers. Samples are summed unscaled; only those
whose energies leave the range that `kernels.energy` promises are summed again, relative to a scale.

Each kernel is compiled twice. Small tensors, and all of them where torch has one thread, are computed in
the caller's thread; the others by numba's threads, which are told torch's number at each call. numba's
simplest threading layer must not be entered twice at once, hence a lock. None works in a forked process,
which computes in the caller's thread.
"""

from __future__ import annotations

import inspect
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import FunctionType
from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Float
from llvmlite import ir
from numba.core import config, types
from numba.extending import intrinsic, overload
from torch import Tensor

from .._reading import one_line
from . import reference
from .reference import LARGEST_ENERGY, SMALLEST_ENERGY, accumulation_dtype

GRAIN = 1 << 15  # elements from which on threads pay
BLOCK = 4096  # positions summed at a time, 16 KB of float32: mostly a whole map, read straight through
SLAB = 1 << 16  # elements that plain PyTorch works on at a time, so that its temporaries stay in the cache
COMPILED_POWERS = (1.0, 2.0, 4.0)
# numba has neither bfloat16 nor float16 on the CPU: they travel as integers, told apart by their sign
CARRIERS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
# Sums may be reordered, so that they are vectorised; a product and a sum are not contracted, so that the
# difference of equal numbers is zero; NaN stays NaN.
REORDERED = {"reassoc", "nsz"}
BITS = {2: torch.uint16, 4: torch.uint32, 8: torch.uint64}

_lock = threading.Lock()
_process = os.getpid()


# --- kernels ------------------------------------------------------------------------------------------------
#
# Tensors come as their memory (one flat array) with strides (b, c, row, column); `sizes` is (b, c, rows,
# columns). Maps are (b, rows * columns), contiguous.


def _inner(function: Callable) -> Callable:
    """Compile what kernels call; the checks of array shapes, in tests, wrap every function first.

    Always inlined: a function with a symbol of its own is linked with one copy in the process that compiles
    it, and with another, which may sum in another order, in those that load the kernel from the disk cache.
    """
    return numba.njit(fastmath=REORDERED, forceinline=True)(inspect.unwrap(function))


@intrinsic
def _half_to_single(typing_context: Any, bits: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), emit


@intrinsic
def _single_to_half(typing_context: Any, value: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), emit


@_inner
def _bfloat_to_single(bits):
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@_inner
def _single_to_bfloat(value):
    bits = np.float32(value).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
    return np.uint16(rounded) if value == value else np.uint16(0x7FC0)


def _wide(value):
    """An element as float32 or float64."""


@overload(_wide, inline="always")
def _(value):
    carriers = {types.uint16: _bfloat_to_single, types.int16: _half_to_single}
    if value in carriers:
        widen = carriers[value]
        return lambda value: widen(value)
    return lambda value: value


def _narrow(value, memory):
    """A float as an element of `memory`, rounded to nearest."""


@overload(_narrow, inline="always")
def _(value, memory):
    carriers = {types.uint16: _single_to_bfloat, types.int16: _single_to_half}
    if memory.dtype in carriers:
        narrow = carriers[memory.dtype]
        return lambda value, memory: narrow(value)
    return lambda value, memory: value


@_inner
def _power(x, p):
    """|x|^p for a compiled p."""
    if p == 2:
        return x * x
    if p == 1:
        return abs(x)
    return (x * x) * (x * x)


@_inner
def _slope(x, p):
    """sign(x) |x|^(p-1) for a compiled p."""
    if p == 2:
        return x
    if p == 1:
        return np.sign(x)
    return x * x * x


class _Kernel:
    """A function compiled for one thread and for all, each when it is first used."""

    def __init__(self, function: Callable) -> None:
        self.serial = _Compiled(function, f"{function.__name__}_serial", parallel=False)
        self.parallel = _Compiled(function, f"{function.__name__}_parallel", parallel=True)

    def __call__(self, elements: int, *arguments: Any) -> None:
        """Run over `elements` elements of a tensor."""
        wanted = torch.get_num_threads()
        threads = min(wanted, config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        if threads == 1 or elements < GRAIN or os.getpid() != _process:
            self.serial(*arguments)
            return
        with _lock:
            numba.set_num_threads(threads)
            self.parallel(*arguments)
        if torch.get_num_threads() != wanted:  # numba's start sets OpenMP's number, which is torch's too
            torch.set_num_threads(wanted)


class _Compiled:
    """A function compiled into numba's disk cache, or without it where that cannot be read or written."""

    has_said = False  # that the cache is lost: once a process

    def __init__(self, function: Callable, name: str, *, parallel: bool) -> None:
        self._options: dict[str, Any] = {"parallel": parallel, "nogil": True, "fastmath": REORDERED}
        plain = inspect.unwrap(function)
        self._function = FunctionType(plain.__code__, plain.__globals__, name)  # the cache goes by names
        self._function.__qualname__ = name
        try:
            self._dispatcher = numba.njit(cache=True, **self._options)(self._function)
        except RuntimeError:  # numba found no folder it may write
            self._dispatcher = numba.njit(**self._options)(self._function)

    def __call__(self, *arguments: Any) -> None:
        try:
            self._dispatcher(*arguments)
        # a full disk is an OSError; what a damaged file of pickles ends in, nobody knows
        except Exception as error:
            place = self._dispatcher.stats.cache_path
            # guard: numba-cache-may-fail
            if place is None:
                raise
            self._dispatcher = numba.njit(**self._options)(self._function)
            self._dispatcher(*arguments)
            self._say_once(_lost_cache(place, error))

    @classmethod
    def _say_once(cls, message: str) -> None:
        if not cls.has_said:
            cls.has_said = True
            warnings.warn(message, stacklevel=2)


def _lost_cache(place: str, error: Exception) -> str:
    return (
        f"energy: expected numba's cache of compiled code in {place}, got {one_line(error)}. The loss is "
        "computed all the same, and compiled anew in every process, which takes seconds. Make room, or "
        "delete the *.nbi and *.nbc files there."
    )


@_inner
def _tasks(sizes):
    return sizes[0] * sizes[2] * ((sizes[3] + BLOCK - 1) // BLOCK)


@_inner
def _task(t, sizes):
    """(image, row, first column, end column) of task `t`."""
    pieces = (sizes[3] + BLOCK - 1) // BLOCK
    start = t % pieces * BLOCK
    return t // pieces // sizes[2], t // pieces % sizes[2], start, min(sizes[3], start + BLOCK)


@_inner
def _offset(at, image, row, column):
    return image * at[0] + row * at[2] + column * at[3]


@_Kernel
def _sum_kernel(x, at, sizes, p, total, suspect):
    """total = sum over c of |x|^p; by task, whether some of it is too large, or all of it too small."""
    for t in numba.prange(_tasks(sizes)):
        image, row, start, stop = _task(t, sizes)
        origin = _offset(at, image, row, start)
        block = total[image, row * sizes[3] + start : row * sizes[3] + stop]
        _add_powers(block, x, origin, at, sizes[1], p)
        small = 0
        large = 0
        for k in range(len(block)):
            small += not block[k] >= SMALLEST_ENERGY
            large += not block[k] <= LARGEST_ENERGY
        suspect[t] = small == len(block) or large > 0


@_inner
def _add_powers(block, x, origin, at, channels, p):
    block[:] = 0
    if at[1] == 1:  # where a stride is seen to be one, the compiler loads whole vectors
        for k in range(len(block)):
            run = x[origin + k * at[3] : origin + k * at[3] + channels]
            for j in range(channels):
                block[k] += _power(_wide(run[j]), p)
        return
    for j in range(channels):
        first = origin + j * at[1]
        if at[3] == 1:
            run = x[first : first + len(block)]
            for k in range(len(block)):
                block[k] += _power(_wide(run[k]), p)
        else:
            for k in range(len(block)):
                block[k] += _power(_wide(x[first + k * at[3]]), p)


@_Kernel
def _largest_kernel(bits, at, sizes, mask, largest):
    """Largest |x| over c. As bits without their sign, floats are in order, and NaN comes last."""
    for t in numba.prange(_tasks(sizes)):
        image, row, start, stop = _task(t, sizes)
        origin = _offset(at, image, row, start)
        block = largest[image, row * sizes[3] + start : row * sizes[3] + stop]
        _find_largest(block, bits, origin, at, sizes[1], mask)


@_inner
def _find_largest(block, bits, origin, at, channels, mask):
    block[:] = 0
    if at[1] == 1:
        for k in range(len(block)):
            run = bits[origin + k * at[3] : origin + k * at[3] + channels]
            for j in range(channels):
                block[k] = max(block[k], run[j] & mask)
        return
    for j in range(channels):
        first = origin + j * at[1]
        if at[3] == 1:
            run = bits[first : first + len(block)]
            for k in range(len(block)):
                block[k] = max(block[k], run[k] & mask)
        else:
            for k in range(len(block)):
                block[k] = max(block[k], bits[first + k * at[3]] & mask)


@_inner
def _count_ties(ties, largest, bits, origin, at, channels, mask):
    ties[:] = 0
    if at[1] == 1:
        for k in range(len(ties)):
            run = bits[origin + k * at[3] : origin + k * at[3] + channels]
            for j in range(channels):
                ties[k] += (run[j] & mask) == largest[k]
        return
    for j in range(channels):
        first = origin + j * at[1]
        if at[3] == 1:
            run = bits[first : first + len(ties)]
            for k in range(len(ties)):
                ties[k] += (run[k] & mask) == largest[k]
        else:
            for k in range(len(ties)):
                ties[k] += (bits[first + k * at[3]] & mask) == largest[k]


# Gradients. `at` holds the strides of x, above and out, a row each; `add` says whether there is an `above`.
# A run is contiguous in all three: channels of one position, or positions of one channel.


@_Kernel
def _sum_gradient_kernel(x, above, out, at, sizes, shrink, p, factor, add):
    """out = above + sign(x) |x * shrink|^(p-1) * factor."""
    for t in numba.prange(_tasks(sizes)):
        image, row, start, stop = _task(t, sizes)
        block = factor[image, row * sizes[3] + start : row * sizes[3] + stop]
        i, a, o = _offsets(at, image, row, start)
        small = shrink[image]
        if _unit(at, 1):
            for k in range(len(block)):
                xs, aboves, outs = _runs(x, i, above, a, out, o, sizes[1])
                for j in range(len(xs)):
                    outs[j] = _plus(aboves[j], _slope(_wide(xs[j]) * small, p) * block[k], add, out)
                i, a, o = i + at[0, 3], a + at[1, 3], o + at[2, 3]
        else:
            for _ in range(sizes[1]):
                if _unit(at, 3):
                    xs, aboves, outs = _runs(x, i, above, a, out, o, len(block))
                    for k in range(len(block)):
                        outs[k] = _plus(aboves[k], _slope(_wide(xs[k]) * small, p) * block[k], add, out)
                else:
                    for k in range(len(block)):
                        slope = _slope(_wide(x[i + k * at[0, 3]]) * small, p) * block[k]
                        out[o + k * at[2, 3]] = _plus(above[a + k * at[1, 3]], slope, add, out)
                i, a, o = i + at[0, 1], a + at[1, 1], o + at[2, 1]


@_Kernel
def _max_gradient_kernel(x, bits, mask, above, out, at, sizes, factor, add):
    """out = above + sign(x) * factor / ties at the channels of largest |x|, above elsewhere."""
    for t in numba.prange(_tasks(sizes)):
        image, row, start, stop = _task(t, sizes)
        i, a, o = _offsets(at, image, row, start)
        largest = np.empty(stop - start, bits.dtype)
        ties = np.empty(stop - start, np.int32)
        _find_largest(largest, bits, i, at[0], sizes[1], mask)
        _count_ties(ties, largest, bits, i, at[0], sizes[1], mask)
        share = factor[image, row * sizes[3] + start : row * sizes[3] + stop] / ties
        if _unit(at, 1):
            for k in range(len(share)):
                xs, aboves, outs = _runs(x, i, above, a, out, o, sizes[1])
                magnitudes = bits[i : i + sizes[1]]
                for j in range(len(xs)):
                    slope = _share(_wide(xs[j]), magnitudes[j] & mask, largest[k], share[k])
                    outs[j] = _plus(aboves[j], slope, add, out)
                i, a, o = i + at[0, 3], a + at[1, 3], o + at[2, 3]
        else:
            for _ in range(sizes[1]):
                if _unit(at, 3):
                    xs, aboves, outs = _runs(x, i, above, a, out, o, len(share))
                    magnitudes = bits[i : i + len(share)]
                    for k in range(len(share)):
                        slope = _share(_wide(xs[k]), magnitudes[k] & mask, largest[k], share[k])
                        outs[k] = _plus(aboves[k], slope, add, out)
                else:
                    for k in range(len(share)):
                        here = i + k * at[0, 3]
                        slope = _share(_wide(x[here]), bits[here] & mask, largest[k], share[k])
                        out[o + k * at[2, 3]] = _plus(above[a + k * at[1, 3]], slope, add, out)
                i, a, o = i + at[0, 1], a + at[1, 1], o + at[2, 1]


@_inner
def _share(x, magnitude, largest, share):
    return np.sign(x) * share if magnitude == largest else 0 * share


@_inner
def _plus(above, slope, add, out):
    return _narrow(_wide(above) + slope if add else slope, out)


@_inner
def _unit(at, axis):
    return at[0, axis] == 1 and at[1, axis] == 1 and at[2, axis] == 1


@_inner
def _runs(x, i, above, a, out, o, count):
    return x[i : i + count], above[a : a + count], out[o : o + count]


@_inner
def _offsets(at, image, row, column):
    return (
        _offset(at[0], image, row, column),
        _offset(at[1], image, row, column),
        _offset(at[2], image, row, column),
    )


@_Kernel
def _distance_kernel(student, teacher, squared, out):
    """||y_S - y_T||, or its square, with y the energies (b, n) over their norm."""
    for i in numba.prange(len(out)):
        shrink_s, shrink_t = _shrink(student[i]), _shrink(teacher[i])
        total = 0.0
        for k in range(student.shape[1]):
            difference = student[i, k] * shrink_s - teacher[i, k] * shrink_t
            total += difference * difference
        out[i] = total if squared else np.sqrt(total)


@_Kernel
def _distance_gradient_kernel(student, teacher, grad, squared, out):
    """grad * dl/dy_S, carried through the normalisation: (l' - y_S <y_S, l'>)/||Q_S||."""
    for i in numba.prange(len(out)):
        shrink_s, shrink_t = _shrink(student[i]), _shrink(teacher[i])
        total = 0.0
        along = 0.0
        for k in range(student.shape[1]):
            y = student[i, k] * shrink_s
            difference = y - teacher[i, k] * shrink_t
            total += difference * difference
            along += y * difference
        factor = 2 * grad[i] * shrink_s
        if not squared:
            factor = grad[i] * shrink_s / np.sqrt(total) if total != 0 else 0 * shrink_s
        for k in range(student.shape[1]):
            y = student[i, k] * shrink_s
            out[i, k] = factor * (y - teacher[i, k] * shrink_t - y * along)


@_inner
def _shrink(energy):
    """1/||energy||, and 0 for a map of zeros."""
    total = 0.0
    for k in range(len(energy)):
        total += np.float64(energy[k]) * energy[k]
    return 1 / np.sqrt(total) if total != 0 else 0.0


# --- launchers ----------------------------------------------------------------------------------------------


def _memory(tensor: Tensor, carrier: torch.dtype | None = None) -> np.ndarray:
    """The memory under a tensor as a flat array."""
    dtype = carrier or CARRIERS.get(tensor.dtype)
    tensor = tensor.detach()
    flat = tensor.as_strided((_extent(tensor.shape, tensor.stride()),), (1,))
    return (flat if dtype is None else flat.view(dtype)).numpy()


@lru_cache(maxsize=1024)
def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    return 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))


def _geometry(*tensors: Tensor) -> tuple[np.ndarray, np.ndarray, int]:
    """Strides of each tensor, their common sizes, and the number of tasks."""
    return _layout(tensors[0].shape, *[tensor.stride() for tensor in tensors])


@lru_cache(maxsize=1024)
def _layout(shape: Sequence[int], *strides: Sequence[int]) -> tuple[np.ndarray, np.ndarray, int]:
    """`_geometry` of tensors of this shape; rows that follow without a gap are one long row."""
    b, c, h, w = shape
    at = np.array(strides)
    long = h == 1 or (at[:, 2] == w * at[:, 3]).all()
    sizes = np.array([b, c, 1, h * w] if long else [b, c, h, w])
    return at, sizes, int(sizes[0] * sizes[2] * -(-sizes[3] // BLOCK))


def _sum(features: Float[Tensor, "b c h w"], p: float) -> tuple[Float[Tensor, "b h w"], bool]:
    """Energies as they are, and whether some may be out of the promised range."""
    b, _, h, w = features.shape
    total = torch.empty((b, h, w), dtype=accumulation_dtype(features.dtype))
    at, sizes, tasks = _geometry(features)
    suspect = np.empty(tasks, bool)
    _sum_kernel(features.numel(), _memory(features), at[0], sizes, p, _rows(total), suspect)
    return total, bool(suspect.any())


def _largest(features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
    """Largest |A_c| over c, in the type that energies are summed in."""
    b, _, h, w = features.shape
    bits, mask = _bits(features)
    at, sizes, _ = _geometry(features)
    largest = np.empty((b, h * w), bits.dtype)
    _largest_kernel(features.numel(), bits, at[0], sizes, mask, largest)
    found = torch.from_numpy(largest).view(features.dtype)
    return found.view(b, h, w).to(accumulation_dtype(features.dtype))


def _bits(features: Tensor) -> tuple[np.ndarray, Any]:
    """The memory under a tensor as unsigned integers, and the mask that takes out the sign."""
    bits = _memory(features, BITS[features.itemsize])
    return bits, bits.dtype.type(2 ** (8 * features.itemsize - 1) - 1)


def _rows(maps: Float[Tensor, "b h w"]) -> np.ndarray:
    return maps.detach().numpy().reshape(len(maps), -1)


def _slabs(features: Tensor) -> list[slice]:
    """Images a few at a time."""
    step = max(1, SLAB // features[0].numel())
    return [slice(first, first + step) for first in range(0, len(features), step)]


# --- the backend --------------------------------------------------------------------------------------------


def unsupported(features: Tensor, p: float, mapping: str) -> str | None:
    """Dense CPU tensors are covered."""
    if features.device.type != "cpu" or features.layout != torch.strided:
        return f"it takes dense tensors on the CPU, got a {features.layout} one on {features.device}"
    if features.dtype not in (*CARRIERS, torch.float32, torch.float64):
        return f"it takes float16, bfloat16, float32 and float64, got {features.dtype}"
    return None


def energy(
    features: Float[Tensor, "b c h w"], p: float, mapping: str
) -> tuple[Float[Tensor, "b h w"], Float[Tensor, " b"]]:
    """See `kernels.energy`."""
    if mapping == "max":
        largest = _largest(features)
        scale = reference.power_of_two_near(largest.amax((1, 2)))
        return (largest / scale.view(-1, 1, 1)).pow_(p), scale
    if p not in COMPILED_POWERS:
        parts = [reference.energy(features[slab], p, mapping) for slab in _slabs(features)]
        return torch.cat([part for part, _ in parts]), torch.cat([scale for _, scale in parts])
    total, suspect = _sum(features, p)
    scale = torch.ones(len(features), dtype=total.dtype)
    if suspect:
        largest = total.amax((1, 2))
        again = ~((largest >= SMALLEST_ENERGY) & (largest <= LARGEST_ENERGY))
        total[again], scale[again] = reference.energy(features[again], p, mapping)
    return total, scale


def raw_energy(features: Float[Tensor, "b c h w"], p: float, mapping: str) -> Float[Tensor, "b h w"]:
    """The energy as it is."""
    if mapping == "max":
        return _largest(features).pow_(p)
    if p not in COMPILED_POWERS:
        return torch.cat([reference.raw_energy(features[slab], p, mapping) for slab in _slabs(features)])
    return _sum(features, p)[0]


def gradient(
    features: Float[Tensor, "b c h w"],
    scale: Float[Tensor, " b"],
    grad_energy: Float[Tensor, "b h w"],
    grad_features: Float[Tensor, "b c h w"] | None,
    p: float,
    mapping: str,
) -> Float[Tensor, "b c h w"]:
    """See `kernels.energy_gradient`."""
    out = torch.empty_like(features)
    if mapping == "sum" and p not in COMPILED_POWERS:
        for slab in _slabs(features):
            above = None if grad_features is None else grad_features[slab]
            out[slab] = reference.gradient(features[slab], scale[slab], grad_energy[slab], above, p, mapping)
        return out
    add = grad_features is not None
    above = out if grad_features is None else grad_features
    at, sizes, _ = _geometry(features, above, out)
    memory = (_memory(above), _memory(out), at, sizes)
    factor = grad_energy * (p / scale).view(-1, 1, 1)
    if mapping == "sum":
        shrink = scale.reciprocal().numpy()
        _sum_gradient_kernel(features.numel(), _memory(features), *memory, shrink, p, _rows(factor), add)
        return out
    factor = factor * (_largest(features) / scale.view(-1, 1, 1)).pow_(p - 1)
    _max_gradient_kernel(features.numel(), _memory(features), *_bits(features), *memory, _rows(factor), add)
    return out


def distance(
    student: Float[Tensor, "b h w"], teacher: Float[Tensor, "b h w"], squared: bool
) -> Float[Tensor, " b"]:
    """See `kernels.distance`."""
    out = torch.empty(len(student), dtype=student.dtype)
    _distance_kernel(student.numel(), _rows(student), _rows(teacher), squared, out.numpy())
    return out


def distance_gradient(
    student: Float[Tensor, "b h w"], teacher: Float[Tensor, "b h w"], grad: Float[Tensor, " b"], squared: bool
) -> Float[Tensor, "b h w"]:
    """d(distance)/d(student), times `grad`."""
    out = torch.empty(student.shape, dtype=student.dtype)
    grads = grad.contiguous().numpy()
    _distance_gradient_kernel(student.numel(), _rows(student), _rows(teacher), grads, squared, _rows(out))
    return out
