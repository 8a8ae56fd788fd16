"""The energy, its gradient and the distance of maps on CUDA devices, in Triton.

How the work is cut, where nothing can be faster than memory; reasoned for an H200, and held by tests of the
compiled code as far as that shows it:

- A program takes a tile of BLOCK_C channels by BLOCK_N positions and walks over the channels; it adds tile
  to tile, register by register, and crosses threads once, at the end. There are no atomics, so that results
  do not depend on timing.
- Each thread loads 64 bytes at a time, 16 by 16 (in the gradient 32 of each of two tensors). With eight
  programs of 4 warps a multiprocessor then has 64 KB under way, twice what each of an H200's 132 needs to
  draw 4.8 TB/s at a latency of 0.8 us. Maps that allow shorter loads only have as many bytes under way.
- A row of a tile is 512 contiguous bytes, of positions in NCHW and of channels in channels-last. Where that
  makes fewer than 2048 programs, tiles get narrower, down to 128 bytes or one position, and deeper: several
  programs follow one another in each place, so that few are left to finish alone. For the same reason a
  program with many channels gets up to 16 warps, rather than more than four steps.
- Triton knows of a size or stride only whether 16 divides it, and would read 14x14 maps number by number.
  The sizes and strides in question are passed divided by the length of a vector, and multiplied back.
- Scale 1 suits nearly every sample. A second kernel, of one program a sample, looks at the largest energy,
  and only where that is out of bounds finds the scale and does the sample again. The host never waits.
- Distances of maps are computed by one program a sample, in float64: maps are small, and what counts is to
  have few launches.
- The gradient of "sum" is one pass over tiles. That of "max" reads a program's channels twice; programs are
  small enough (32 KB) that the second time they come from the cache.
"""

# ruff: noqa: N803, N806, SIM300 (compile-time constants are in capitals, as everywhere in Triton)

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from . import _requested, reference
from .reference import LARGEST_ENERGY, SMALLEST_ENERGY, accumulation_dtype

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OLDEST = 80  # ten times the compute capability from which on there is bfloat16

VECTOR_BYTES = 16
ROW_BYTES = 512
NARROWEST_ROW_BYTES = 128
BYTES_A_THREAD = 64
CACHED_BYTES = 32768  # that a program may read twice; all resident ones together stay under the 50 MB of L2
ENOUGH_PROGRAMS = 2048
MOST_STEPS = 4
WARPS = 4
MOST_WARPS = 16
LARGEST_OFFSET = 2**31 - 1  # of 32 bits
MAP_BLOCK = 4096
LARGEST_MAP = 65536  # that one program goes through as fast as plain PyTorch does in many launches
PARTS = 1024  # largest energies of blocks that are read at a time


# --- kernels ------------------------------------------------------------------------------------------------


@triton.jit
def _power(x, WHOLE: tl.constexpr, REST: tl.constexpr):
    """x^(WHOLE + REST) of x >= 0, or of any x where REST is 0.

    The whole part by multiplication, so that p = 2 and 4 are one and two products; exp2 and log2, whose error
    grows with the exponent, are left with a fraction.
    """
    result = 1.0
    square = x
    for bit in tl.static_range(7):
        if (WHOLE >> bit) & 1:
            result = result * square
        square = square * square
    if REST != 0:
        result = result * tl.exp2(REST * tl.log2(x))
    return result


@triton.jit
def _signed_power(x, WHOLE: tl.constexpr, REST: tl.constexpr):
    """sign(x) |x|^(WHOLE + REST), 0 at 0."""
    if REST == 0 and WHOLE % 2 == 1:
        result = _power(x, WHOLE, REST)
    else:
        size = _power(tl.abs(x), WHOLE, REST)
        result = tl.where(x == 0, 0.0, tl.where(x < 0, -size, size))
    return result


@triton.jit
def _bits(x, INT: tl.constexpr):
    """|x| as an integer: in the same order, with NaN above infinity, so that a maximum keeps it."""
    return tl.abs(x).to(INT, bitcast=True)


@triton.jit
def _inverse(scale):
    """1/scale in two factors: of 2^-149 it is no float32."""
    lift = tl.where(scale < 2.0**-100, 2.0**64, 1.0).to(scale.dtype)
    # "/" is exact in float64 only
    return lift, tl.div_rn(1.0, scale * lift) if scale.dtype == tl.float32 else 1.0 / (scale * lift)


@triton.jit
def _nearest_power_of_two(x, INT: tl.constexpr):
    """2^k with x / 2^k from sqrt(1/2) to sqrt(2), whose 64th power is from 2^-32 to 2^32; x > 0, finite."""
    tiny = x < 2.0**-100
    bits = tl.where(tiny, x * 2.0**64, x).to(INT, bitcast=True)
    # adding 1 minus the fraction of sqrt(2) carries into the exponent from sqrt(2) on
    if INT == tl.int32:
        bits = tl.minimum((bits + 0x4AFB0D) & 0x7F800000, 0x7F000000)
    else:
        bits = tl.minimum((bits + 0x95F619980C433) & 0x7FF0000000000000, 0x7FE0000000000000)
    power = bits.to(x.dtype, bitcast=True)
    return tl.where(tiny, power * 2.0**-64, power)


@triton.jit
def _row(
    tensor, b, n, width, stride_b, stride_h, stride_w,
    INDEX: tl.constexpr, FLAT: tl.constexpr, UNIT_C: tl.constexpr, UNIT_N: tl.constexpr,
):  # fmt: skip
    """Pointers to positions n of sample b, as a row of a tile; FLAT: they are stride_w apart throughout."""
    n = n.to(INDEX)
    if FLAT:
        offsets = n * (stride_w * UNIT_N)
    else:
        offsets = (n // width) * (stride_h * UNIT_N) + (n % width) * (stride_w * UNIT_N)
    return (tensor + b * stride_b * (UNIT_C * UNIT_N) + offsets)[None, :]


@triton.jit
def _load(row, c, channels, inside, stride_c, FLOAT: tl.constexpr, INDEX: tl.constexpr):
    """The tile of channels c at the row's positions, widened; 0 beyond the last channel or position."""
    mask = (c < channels)[:, None] & inside[None, :]
    return tl.load(row + (c.to(INDEX) * stride_c)[:, None], mask, other=0.0).to(FLOAT)


@triton.jit
def _block_energy(
    row, inside, channels, stride_c, near, far,
    WHOLE: tl.constexpr, REST: tl.constexpr, MAX: tl.constexpr,
    FLOAT: tl.constexpr, INT: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Energies of the row's positions over all channels, of features * near * far."""
    total = tl.zeros((BLOCK_C, BLOCK_N), INT if MAX else FLOAT)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        x = _load(row, c, channels, inside, stride_c, FLOAT, INDEX) * near * far
        if MAX:
            total = tl.maximum(total, _bits(x, INT))
        else:
            total += _power(tl.abs(x), WHOLE, REST)
    return _power(tl.max(total, 0).to(FLOAT, bitcast=True), WHOLE, REST) if MAX else tl.sum(total, 0)


@triton.jit
def _energy_kernel(
    features, energy, largest, stride_b, stride_c, stride_h, stride_w, channels, positions, width, blocks,
    WHOLE: tl.constexpr, REST: tl.constexpr, MAX: tl.constexpr,
    LARGE: tl.constexpr, FLAT: tl.constexpr, UNIT_C: tl.constexpr, UNIT_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of a sample's energies at scale 1, and the largest of them."""
    FLOAT: tl.constexpr = energy.dtype.element_ty
    INT: tl.constexpr = tl.int64 if FLOAT == tl.float64 else tl.int32
    INDEX: tl.constexpr = tl.int64 if LARGE else tl.int32
    channels, positions = channels * UNIT_N, positions * UNIT_C
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    q = _block_energy(
        _row(features, b, n, width, stride_b, stride_h, stride_w, INDEX, FLAT, UNIT_C, UNIT_N),
        n < positions, channels, stride_c * UNIT_C, 1.0, 1.0,
        WHOLE, REST, MAX, FLOAT, INT, INDEX, BLOCK_C, BLOCK_N,
    )  # fmt: skip
    tl.store(energy + b * positions + n, q, n < positions)
    tl.store(largest + tl.program_id(0), tl.max(_bits(q, INT), 0).to(FLOAT, bitcast=True))


@triton.jit
def _rescale_kernel(
    features, energy, largest, scale,
    stride_b, stride_c, stride_h, stride_w, channels, positions, width, blocks,
    WHOLE: tl.constexpr, REST: tl.constexpr, MAX: tl.constexpr,
    LARGE: tl.constexpr, FLAT: tl.constexpr, UNIT_C: tl.constexpr, UNIT_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A sample's scale; its energies again where the largest is out of bounds and a scale can mend that."""
    FLOAT: tl.constexpr = energy.dtype.element_ty
    INT: tl.constexpr = tl.int64 if FLOAT == tl.float64 else tl.int32
    INDEX: tl.constexpr = tl.int64 if LARGE else tl.int32
    channels, positions = channels * UNIT_N, positions * UNIT_C
    b = tl.program_id(0).to(tl.int64)
    bits = tl.zeros((PARTS,), INT)
    for start in range(0, blocks, PARTS):
        part = start + tl.arange(0, PARTS)
        bits = tl.maximum(bits, _bits(tl.load(largest + b * blocks + part, part < blocks, other=0.0), INT))
    top = tl.max(bits, 0).to(FLOAT, bitcast=True)
    divisor = tl.full((), 1.0, FLOAT)
    if (top < LOWEST) | (top > HIGHEST):
        sizes = tl.zeros((BLOCK_N,), INT)
        for start in range(0, positions, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            size = _block_energy(
                _row(features, b, n, width, stride_b, stride_h, stride_w, INDEX, FLAT, UNIT_C, UNIT_N),
                n < positions, channels, stride_c * UNIT_C, 1.0, 1.0,
                1, 0, True, FLOAT, INT, INDEX, BLOCK_C, BLOCK_N,
            )  # fmt: skip
            sizes = tl.maximum(sizes, _bits(size, INT))
        size = tl.max(sizes, 0).to(FLOAT, bitcast=True)
        if (size > 0) & (size < float("inf")):
            divisor = _nearest_power_of_two(size, INT)
            near, far = _inverse(divisor)
            for start in range(0, positions, BLOCK_N):
                n = start + tl.arange(0, BLOCK_N)
                q = _block_energy(
                    _row(features, b, n, width, stride_b, stride_h, stride_w, INDEX, FLAT, UNIT_C, UNIT_N),
                    n < positions, channels, stride_c * UNIT_C, near, far,
                    WHOLE, REST, MAX, FLOAT, INT, INDEX, BLOCK_C, BLOCK_N,
                )  # fmt: skip
                tl.store(energy + b * positions + n, q, n < positions)
    tl.store(scale + b, divisor)


@triton.jit
def _largest(
    row, inside, channels, stride_c,
    FLOAT: tl.constexpr, INT: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """At each of the row's positions: the largest |feature|, as `_bits`, and how many channels have it.

    Where the largest is 0, channels beyond the last are counted too; but there the slope is 0.
    """
    top = tl.zeros((BLOCK_C, BLOCK_N), INT)
    count = tl.zeros((BLOCK_C, BLOCK_N), tl.int32)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        bits = _bits(_load(row, c, channels, inside, stride_c, FLOAT, INDEX), INT)
        count = tl.where(bits > top, 1, count + (bits == top).to(tl.int32))
        top = tl.maximum(bits, top)
    peak = tl.max(top, 0)
    return peak, tl.sum(tl.where(top == peak[None, :], count, 0), 0)


@triton.jit
def _weight(grad_energy, scale, n, inside, P: tl.constexpr):
    """p / scale * grad_energy, and the factors of 1/scale."""
    near, far = _inverse(tl.load(scale))
    return tl.load(grad_energy + n, inside, other=0.0) * near * far * P, near, far


@triton.jit
def _store_gradient(
    row, x, above, c, channels, inside, stride_c, weight, near, far,
    WHOLE: tl.constexpr, REST: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """above + weight * sign(r) |r|^(p-1) with r = x * near * far, where WHOLE + REST is p - 1."""
    gradient = above + _signed_power(x * near * far, WHOLE, REST) * weight[None, :]
    mask = (c < channels)[:, None] & inside[None, :]
    tl.store(row + (c.to(INDEX) * stride_c)[:, None], gradient.to(row.dtype.element_ty), mask)


@triton.jit
def _gradient_kernel(
    features, upstream, result, grad_energy, scale,
    features_b, features_c, features_h, features_w, upstream_b, upstream_c, upstream_h, upstream_w,
    result_b, result_c, result_h, result_w, channels, positions, width, blocks_c, blocks_n,
    P: tl.constexpr, WHOLE: tl.constexpr, REST: tl.constexpr, MAX: tl.constexpr, ADD: tl.constexpr,
    LARGE: tl.constexpr, FLAT: tl.constexpr, UNIT_C: tl.constexpr, UNIT_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, CHANNELS_INNER: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient; for "max", where blocks_c is 1, all tiles of a block of positions."""
    FLOAT: tl.constexpr = scale.dtype.element_ty
    INT: tl.constexpr = tl.int64 if FLOAT == tl.float64 else tl.int32
    INDEX: tl.constexpr = tl.int64 if LARGE else tl.int32
    channels, positions = channels * UNIT_N, positions * UNIT_C
    features_c, upstream_c, result_c = features_c * UNIT_C, upstream_c * UNIT_C, result_c * UNIT_C
    b = (tl.program_id(0) // (blocks_c * blocks_n)).to(tl.int64)
    block = tl.program_id(0) % (blocks_c * blocks_n)
    if CHANNELS_INNER:
        block_c, block_n = block % blocks_c, block // blocks_c
    else:
        block_c, block_n = block // blocks_n, block % blocks_n
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < positions
    from_row = _row(features, b, n, width, features_b, features_h, features_w, INDEX, FLAT, UNIT_C, UNIT_N)
    above_row = _row(upstream, b, n, width, upstream_b, upstream_h, upstream_w, INDEX, FLAT, UNIT_C, UNIT_N)
    to_row = _row(result, b, n, width, result_b, result_h, result_w, INDEX, FLAT, UNIT_C, UNIT_N)
    if MAX:
        weight, near, far = _weight(grad_energy + b * positions, scale + b, n, inside, P)
        peak, ties = _largest(from_row, inside, channels, features_c, FLOAT, INT, INDEX, BLOCK_C, BLOCK_N)
        weight = weight / ties
        for start in range(0, channels, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            x = _load(from_row, c, channels, inside, features_c, FLOAT, INDEX)
            above = _load(above_row, c, channels, inside, upstream_c, FLOAT, INDEX) if ADD else 0.0
            x = tl.where(_bits(x, INT) == peak[None, :], x, 0.0)
            _store_gradient(
                to_row, x, above, c, channels, inside, result_c, weight, near, far, WHOLE, REST, INDEX
            )
    else:
        # the wide loads first: the narrow one goes through shared memory, and nothing passes its barrier
        c = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
        x = _load(from_row, c, channels, inside, features_c, FLOAT, INDEX)
        above = _load(above_row, c, channels, inside, upstream_c, FLOAT, INDEX) if ADD else 0.0
        weight, near, far = _weight(grad_energy + b * positions, scale + b, n, inside, P)
        _store_gradient(
            to_row, x, above, c, channels, inside, result_c, weight, near, far, WHOLE, REST, INDEX
        )


@triton.jit
def _maps(student, teacher, start, positions, BLOCK: tl.constexpr):
    """A block of two maps of energies, whose squares and their sums float64 can hold whatever their scale."""
    n = start + tl.arange(0, BLOCK)
    s = tl.load(student + n, n < positions, other=0.0).to(tl.float64)
    return s, tl.load(teacher + n, n < positions, other=0.0).to(tl.float64)


@triton.jit
def _shrink(squares):
    """1/||Q||, from the squares of Q; 0 for a map of zeros."""
    total = tl.sum(squares, 0)
    return tl.where(total == 0, 0.0, 1 / tl.sqrt(tl.where(total == 0, 1.0, total)))


@triton.jit
def _shrinks(student, teacher, positions, BLOCK: tl.constexpr):
    squares_s = tl.zeros((BLOCK,), tl.float64)
    squares_t = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, positions, BLOCK):
        s, t = _maps(student, teacher, start, positions, BLOCK)
        squares_s += s * s
        squares_t += t * t
    return _shrink(squares_s), _shrink(squares_t)


@triton.jit
def _distance_kernel(student, teacher, distance, positions, SQUARED: tl.constexpr, BLOCK: tl.constexpr):
    """||y_S - y_T|| of a sample, or its square, with y a map over its norm."""
    b = tl.program_id(0).to(tl.int64)
    student, teacher = student + b * positions, teacher + b * positions
    shrink_s, shrink_t = _shrinks(student, teacher, positions, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, positions, BLOCK):
        s, t = _maps(student, teacher, start, positions, BLOCK)
        difference = s * shrink_s - t * shrink_t
        squares += difference * difference
    total = tl.sum(squares, 0)
    total = total if SQUARED else tl.sqrt(total)
    tl.store(distance + b, total.to(distance.dtype.element_ty))


@triton.jit
def _distance_gradient_kernel(
    student, teacher, grad, result, positions, SQUARED: tl.constexpr, BLOCK: tl.constexpr
):
    """grad * dl/dy_S, carried through the normalisation: (l' - y_S <y_S, l'>) / ||Q_S||."""
    b = tl.program_id(0).to(tl.int64)
    student, teacher, result = student + b * positions, teacher + b * positions, result + b * positions
    shrink_s, shrink_t = _shrinks(student, teacher, positions, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float64)
    products = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, positions, BLOCK):
        s, t = _maps(student, teacher, start, positions, BLOCK)
        difference = s * shrink_s - t * shrink_t
        squares += difference * difference
        products += s * shrink_s * difference
    along = tl.sum(products, 0)
    factor = tl.load(grad + b).to(tl.float64) * shrink_s
    if SQUARED:
        factor *= 2
    else:
        total = tl.sum(squares, 0)
        factor = tl.where(total == 0, 0.0, factor / tl.sqrt(tl.where(total == 0, 1.0, total)))
    for start in range(0, positions, BLOCK):
        s, t = _maps(student, teacher, start, positions, BLOCK)
        slope = factor * (s * shrink_s - t * shrink_t - s * shrink_s * along)
        n = start + tl.arange(0, BLOCK)
        tl.store(result + n, slope.to(result.dtype.element_ty), n < positions)


# --- launchers ----------------------------------------------------------------------------------------------

INTERPRETED = not isinstance(_energy_kernel, triton.JITFunction)


def unsupported(features: Tensor, p: float, mapping: str) -> str | None:
    """Why these kernels cannot be had for the features, or None.

    Triton's interpreter (TRITON_INTERPRET=1) runs them on a CPU: for tests, slowly, and on request only.
    """
    if features.dtype not in DTYPES:
        return f"it covers {', '.join(map(str, DTYPES))}, not {features.dtype}"
    if features.is_cuda:
        return None if INTERPRETED else _device_problem(features.get_device())
    if INTERPRETED and features.device.type == "cpu" and _requested.get() == "cuda":
        return None
    return f"it needs features on a CUDA device, not on {features.device}"


@functools.cache
def _device_problem(device: int) -> str | None:
    """Why Triton cannot be used with a device: another make, too old, no C compiler for its launcher, ..."""
    try:
        with torch.cuda.device(device):
            target = triton.runtime.driver.active.get_current_target()
    except Exception as error:  # drivers and compilers fail in many ways
        return f"Triton does not start: {error}"
    if target.backend != "cuda" or target.arch < OLDEST:
        return f"it needs an NVIDIA device of compute capability 8.0 or more, not {target}"
    return None


def energy(
    features: Float[Tensor, "b c h w"], p: float, mapping: str
) -> tuple[Float[Tensor, "b h w"], Float[Tensor, " b"]]:
    """See `kernels.energy`."""
    b, _, h, w = features.shape
    dtype = accumulation_dtype(features.dtype)
    first, second = _energy_plans(features.shape, features.stride(), features.element_size(), p, mapping)
    energies = features.new_empty((b, h, w), dtype=dtype)
    largest = features.new_empty(first.grid, dtype=dtype)
    scale = features.new_empty((b,), dtype=dtype)
    with torch.cuda.device_of(features):
        first.launch(_energy_kernel, features, energies, largest)
        second.launch(_rescale_kernel, features, energies, largest, scale)
    return energies, scale


def raw_energy(features: Float[Tensor, "b c h w"], p: float, mapping: str) -> Float[Tensor, "b h w"]:
    """The energy as it is."""
    b, _, h, w = features.shape
    dtype = accumulation_dtype(features.dtype)
    first, _ = _energy_plans(features.shape, features.stride(), features.element_size(), p, mapping)
    energies = features.new_empty((b, h, w), dtype=dtype)
    with torch.cuda.device_of(features):
        first.launch(_energy_kernel, features, energies, features.new_empty(first.grid, dtype=dtype))
    return energies


def distance(
    student: Float[Tensor, "b h w"], teacher: Float[Tensor, "b h w"], squared: bool
) -> Float[Tensor, " b"]:
    """See `kernels.distance`."""
    plan = _map_plan(tuple(student.shape), squared)
    if plan is None:
        return reference.distance(student, teacher, squared)
    result = student.new_empty(len(student))
    with torch.cuda.device_of(student):
        plan.launch(_distance_kernel, student.contiguous(), teacher.contiguous(), result)
    return result


Shape = tuple[int, ...]


class _Plan(NamedTuple):
    grid: tuple[int]
    numbers: tuple[int, ...]
    constants: dict[str, Any]

    def launch(self, kernel: Any, *tensors: Tensor) -> None:
        kernel[self.grid](*tensors, *self.numbers, **self.constants)


@functools.lru_cache(maxsize=1024)
def _energy_plans(shape: Shape, strides: Shape, itemsize: int, p: float, mapping: str) -> tuple[_Plan, _Plan]:
    b, _, h, w = shape
    walk = _walk(shape, (strides,), itemsize)
    tile = _filling_tile(shape, itemsize, walk.channels_inner)
    blocks = _ceil(h * w, tile.block_n)
    numbers = (*walk.numbers, blocks)
    constants = {**_exponent(p), **walk.constants, "MAX": mapping == "max"}
    large = _tile(shape, itemsize, walk.channels_inner, BYTES_A_THREAD, MOST_WARPS)
    return (
        _Plan((b * blocks,), numbers, {**constants, **tile.constants}),
        _Plan((b,), numbers, {**constants, **large.constants, **_BOUNDS}),
    )


_BOUNDS = {"LOWEST": SMALLEST_ENERGY, "HIGHEST": LARGEST_ENERGY, "PARTS": PARTS}


def _exponent(exponent: float) -> dict[str, float]:
    # fusion of products and sums is said outright, because Triton 3.9 warns that it will not stay the default
    return {"WHOLE": int(exponent), "REST": exponent - int(exponent), "enable_fp_fusion": True}


@functools.lru_cache(maxsize=1024)
def _map_plan(shape: Shape, squared: bool) -> _Plan | None:
    """One program a sample, or None where maps are so large that this would take long."""
    b, h, w = shape
    if h * w > LARGEST_MAP:
        return None
    block = min(_power_of_two(h * w), MAP_BLOCK)
    warps = max(1, min(MOST_WARPS, block // 256))
    # a fused s * shrink_s - t * shrink_t would not be 0 for equal maps
    constants = {"SQUARED": squared, "BLOCK": block, "num_warps": warps, "enable_fp_fusion": False}
    return _Plan((b,), (h * w,), constants)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(x: int) -> int:
    """The smallest >= x."""
    return 1 << (x - 1).bit_length()


class _Tile(NamedTuple):
    block_c: int
    block_n: int
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        return {"BLOCK_C": self.block_c, "BLOCK_N": self.block_n, "num_warps": self.warps}


def _tile(
    shape: Shape, itemsize: int, channels_inner: bool, bytes_a_thread: int, warps: int = WARPS
) -> _Tile:
    """A tile of long rows, with one load of `bytes_a_thread` for each thread."""
    _, c, h, w = shape
    row = ROW_BYTES // itemsize
    entries = 32 * warps * bytes_a_thread // itemsize
    block_c = min(row if channels_inner else entries // row, _power_of_two(c))
    block_n = min(entries // block_c, _power_of_two(h * w))
    return _Tile(min(entries // block_n, _power_of_two(c)), block_n, warps)


def _filling_tile(shape: Shape, itemsize: int, channels_inner: bool, most_bytes: float = math.inf) -> _Tile:
    """A tile for programs that walk over all channels.

    There should be enough of them to fill a device, as long as each thread has a vector to read, and none
    should read more than `most_bytes`.
    """
    b, c, h, w = shape
    block_c, block_n, warps = _tile(shape, itemsize, channels_inner, BYTES_A_THREAD)
    narrowest = 1 if channels_inner else NARROWEST_ROW_BYTES // itemsize
    least = 32 * warps * VECTOR_BYTES // itemsize
    while block_n > narrowest and (
        (b * _ceil(h * w, block_n) < ENOUGH_PROGRAMS and block_c * block_n > least)
        or block_n * c * itemsize > most_bytes
    ):
        block_n //= 2
        block_c = min(2 * block_c, _power_of_two(c))
    while warps < MOST_WARPS and block_c * MOST_STEPS < c:
        warps *= 2
        block_c *= 2
    return _Tile(block_c, block_n, warps)


class _Walk(NamedTuple):
    """How kernels find their way through tensors of one shape: what they are told of strides and sizes."""

    numbers: tuple[int, ...]
    constants: dict[str, int]
    channels_inner: bool  # in the first tensor


def _walk(shape: Shape, strides: tuple[Shape, ...], itemsize: int) -> _Walk:
    _, c, h, w = shape
    # an axis of one entry has no stride to speak of
    steps = [tuple(s if n > 1 else 0 for n, s in zip(shape, one, strict=True)) for one in strides]
    span = max((c - 1) * by_c + (h - 1) * by_h + (w - 1) * by_w for _, by_c, by_h, by_w in steps)
    spacings = [_spacing(shape, one) for one in steps]
    flat = None not in spacings
    if flat:
        steps = [(by_b, by_c, 0, by_n or 0) for (by_b, by_c, *_), by_n in zip(steps, spacings, strict=True)]
    unit_c, unit_n = _units(shape, steps, flat, VECTOR_BYTES // itemsize)
    units = (unit_c * unit_n, unit_c, unit_n, unit_n)
    return _Walk(
        (
            *(step // unit for one in steps for step, unit in zip(one, units, strict=True)),
            c // unit_n,
            h * w // unit_c,
            w,
        ),
        {"LARGE": span > LARGEST_OFFSET, "FLAT": flat, "UNIT_C": unit_c, "UNIT_N": unit_n},
        channels_inner=steps[0][1] == 1,
    )


def _spacing(shape: Shape, steps: Shape) -> int | None:
    """Distance from each position to the next; None where it is not the same throughout."""
    _, _, h, w = shape
    _, _, by_h, by_w = steps
    if w == 1:
        return by_h
    return by_w if h == 1 or by_h == w * by_w else None


def _units(shape: Shape, steps: list[Shape], flat: bool, vector: int) -> tuple[int, int]:
    """Divisors, up to a vector's length, of the strides over c and of those over positions; one of them is 1.

    The one over c divides the number of positions too, so that no vector crosses from row to row, and the
    other way round.
    """
    _, c, h, w = shape
    if all(by_c == 1 for _, by_c, _, _ in steps):
        return 1, math.gcd(vector, c, *(step for by_b, _, by_h, by_w in steps for step in (by_b, by_h, by_w)))
    if flat and all(by_w == 1 for *_, by_w in steps):
        return math.gcd(vector, h * w, *(step for by_b, by_c, *_ in steps for step in (by_b, by_c))), 1
    return 1, 1


# --- gradient -----------------------------------------------------------------------------------------------


def gradient(
    features: Float[Tensor, "b c h w"],
    scale: Float[Tensor, " b"],
    grad_energy: Float[Tensor, "b h w"],
    grad_features: Float[Tensor, "b c h w"] | None,
    p: float,
    mapping: str,
) -> Float[Tensor, "b c h w"]:
    """See `kernels.energy_gradient`."""
    result = torch.empty_like(features)
    upstream = features if grad_features is None else grad_features
    strides = (features.stride(), upstream.stride(), result.stride())
    plan = _gradient_plan(
        features.shape, strides, features.element_size(), p, mapping, grad_features is not None
    )
    with torch.cuda.device_of(features):
        plan.launch(
            _gradient_kernel, features, upstream, result, grad_energy.contiguous(), scale.contiguous()
        )
    return result


@functools.lru_cache(maxsize=1024)
def _gradient_plan(
    shape: Shape, strides: tuple[Shape, ...], itemsize: int, p: float, mapping: str, add: bool
) -> _Plan:
    b, c, h, w = shape
    walk = _walk(shape, strides, itemsize)
    if mapping == "max":
        tile, blocks_c = _filling_tile(shape, itemsize, walk.channels_inner, CACHED_BYTES), 1
    else:
        tile = _tile(shape, itemsize, walk.channels_inner, BYTES_A_THREAD // 2)
        blocks_c = _ceil(c, tile.block_c)
    blocks_n = _ceil(h * w, tile.block_n)
    own = {"P": p, "MAX": mapping == "max", "ADD": add, "CHANNELS_INNER": walk.channels_inner}
    return _Plan(
        (b * blocks_c * blocks_n,),
        (*walk.numbers, blocks_c, blocks_n),
        {**own, **_exponent(p - 1), **walk.constants, **tile.constants},
    )


def distance_gradient(
    student: Float[Tensor, "b h w"], teacher: Float[Tensor, "b h w"], grad: Float[Tensor, " b"], squared: bool
) -> Float[Tensor, "b h w"]:
    """d(distance)/d(student), times `grad`."""
    plan = _map_plan(tuple(student.shape), squared)
    if plan is None:
        return reference.distance_gradient(student, teacher, grad, squared)
    result = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    with torch.cuda.device_of(student):
        plan.launch(
            _distance_gradient_kernel, student.contiguous(), teacher.contiguous(), grad.contiguous(), result
        )
    return result
