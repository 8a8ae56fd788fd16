"""The attention branches between two nets: from a pair of blobs to their maps and the loss between them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from attention_transfer._errors import InputError
from attention_transfer.caffe import schema
from attention_transfer.caffe.building.naming import free_prefix
from attention_transfer.caffe.building.networks import Network
from attention_transfer.caffe.building.options import SQUARINGS, Options
from attention_transfer.caffe.graph import Blob

PYCAFFE = Path(__file__).with_name("pycaffe")


@dataclass(frozen=True)
class BuiltPair:
    """Two blobs whose maps are compared.

    Attributes:
        student, teacher: names in the built net, with the shapes of the blobs, None where they are not known.
        pooled: which of the two maps is pooled to the size of the other, and by what factors (h, w).
        cropped: which is cropped by a row or column, after that, and what is left out (h, w) before the rest.
    """

    student: str
    teacher: str
    student_shape: tuple[int, ...] | None
    teacher_shape: tuple[int, ...] | None
    pooled: tuple[str, tuple[int, int]] | None = None
    cropped: tuple[str, tuple[int, int]] | None = None


def pair_up(ours: Network, theirs: Network, mine: Blob, other: Blob, renamed: str) -> BuiltPair:
    shapes = ours.graph.shape(mine), theirs.graph.shape(other)
    if shapes[0] is None or shapes[1] is None:
        warnings.warn(
            f"build: the shapes of {mine.name!r} and {other.name!r} cannot be told from here; they must be "
            "equal in height and width.",
            stacklevel=3,
        )
        return BuiltPair(mine.name, renamed, *shapes)
    sizes = shapes[0][2:], shapes[1][2:]
    if sizes[0] == sizes[1]:
        return BuiltPair(mine.name, renamed, *shapes)
    student_larger = all(one >= other for one, other in zip(*sizes, strict=True))
    large, small = sizes if student_larger else sizes[::-1]
    factors = (_factor(large[0], small[0]), _factor(large[1], small[1]))
    if 0 in factors:
        raise InputError(
            f"build: expected maps of which one is, but for a row or column, a whole multiple of the other, "
            f"got {mine.name!r} of {'x'.join(map(str, sizes[0]))} and {other.name!r} of "
            f"{'x'.join(map(str, sizes[1]))}. Tap layers of equal stride."
        )
    side = "s" if student_larger else "t"
    pooled = None if factors == (1, 1) else (side, factors)
    cropped = None
    if any(-(-size // factor) > least for size, factor, least in zip(large, factors, small, strict=True)):
        rasters = ours.raster(mine), theirs.raster(other)
        cropped = side, _offsets(large, small, factors, *(rasters if student_larger else rasters[::-1]))
    return BuiltPair(mine.name, renamed, *shapes, pooled, cropped)


def _factor(large: int, small: int) -> int:
    """What to pool an axis by, to get one of the size `small`, or one more; 0 if nothing does.

    Sizes that differ by one, at the finer one's resolution, belong to one and the same stride.
    """
    if large < small:
        return 0
    if large % small == 0:
        return large // small
    factor = 1 if large - small == 1 else round(large / small)
    return factor if abs(large - factor * small) == 1 else 0


Raster = list[tuple[float, float]] | None


def _offsets(
    large: Sequence[int], small: Sequence[int], factors: Sequence[int], finer: Raster, coarser: Raster
) -> tuple[int, int]:
    """For each axis, whether the first or the last of one position too many is left out: what lies closer."""
    offsets = []
    for axis, (size, least, factor) in enumerate(zip(large, small, factors, strict=True)):
        surplus = -(-size // factor) - least
        if not surplus or finer is None or coarser is None:
            offsets.append(0)
            continue
        step, start = finer[axis]
        start += step * (factor - 1) / 2
        apart = [abs(start + place * factor * step - coarser[axis][1]) for place in range(surplus + 1)]
        offsets.append(apart.index(min(apart)))
    return offsets[0], offsets[1]


class _Cropping(NamedTuple):
    """How a map is cropped: to the size of which blob, what is left out before it, and whether it learns."""

    reference: str
    offsets: tuple[int, int]
    learns: bool


def make_branches(options: Options, pairs: Sequence[BuiltPair], taken: set[str]) -> list[Any]:
    """The layers of all pairs, with names that are free."""
    numbered = [(pair, str(n) if len(pairs) > 1 else "") for n, pair in enumerate(pairs, start=1)]
    own = [layer.name for pair, number in numbered for layer in _of_pair(options, pair, number, "")]
    prefix = free_prefix(["", "at_"], taken, own)
    return [layer for pair, number in numbered for layer in _of_pair(options, pair, number, prefix)]


def _of_pair(options: Options, pair: BuiltPair, number: str, prefix: str) -> list[Any]:
    layers, ends = [], []
    taps = {"s": pair.student, "t": pair.teacher}
    for side, tap in taps.items():
        factors = pair.pooled[1] if pair.pooled and pair.pooled[0] == side else None
        crop = None
        if pair.cropped and pair.cropped[0] == side:
            crop = _Cropping(taps["t" if side == "s" else "s"], pair.cropped[1], side == "s")
        branch = _map(options, tap, f"{prefix}%s_{side}{number}", factors, crop)
        layers += branch
        ends.append(branch[-1].top[0])
    loss = _loss(options, f"{prefix}at_loss{number}")
    loss.bottom.extend(ends)
    loss.propagate_down.extend([True, False])
    return [*layers, loss]


def _map(
    options: Options,
    tap: str,
    name: str,
    factors: tuple[int, int] | None,
    crop: _Cropping | None,
) -> list[Any]:
    """From an activation to its map; one to be pooled or cropped keeps its two axes until it is."""
    chain = [(name % "abs", "AbsVal")]
    chain += [(name % power, "Power") for power in ("pow", "pow4")[: SQUARINGS[options.p]]]
    chain += [(name % "map", "Convolution")]
    chain += [(name % "pool", "Pooling")] if factors else []
    chain += [(name % "crop", "Crop")] if crop else []
    flat = (name % "flat", "Reshape")
    chain = [*chain, flat] if factors or crop else [flat, *chain]
    chain += [(name % "norm", "Normalize" if options.normalize == "ssd" else "Python")]
    layers = []
    for own, kind in chain:
        layer = schema.LayerParameter(name=own, type=kind, bottom=[tap], top=[own])
        layer.include.add(phase=schema.TRAIN)
        _fill_in(layer, factors)
        if kind == "Crop" and crop:
            layer.bottom.append(crop.reference)
            layer.propagate_down.extend([crop.learns, False])
            layer.crop_param.axis = 2
            layer.crop_param.offset.extend(crop.offsets)
        layers.append(layer)
        tap = own
    return layers


def _fill_in(layer: Any, factors: tuple[int, int] | None) -> None:
    if layer.type == "Reshape":
        layer.reshape_param.shape.dim.extend([0, 0, -1, 1])
    elif layer.type == "Power":
        layer.power_param.power = 2
    elif layer.type == "Convolution":
        layer.param.add(lr_mult=0, decay_mult=0)
        given = layer.convolution_param
        given.num_output, given.bias_term = 1, False
        given.kernel_size.append(1)
        given.weight_filler.type, given.weight_filler.value = "constant", 1
    elif layer.type == "Pooling" and factors:
        given = layer.pooling_param
        given.pool = given.AVE
        given.kernel_h = given.stride_h = factors[0]
        given.kernel_w = given.stride_w = factors[1]
    elif layer.type == "Normalize":
        layer.param.add(lr_mult=0, decay_mult=0)
        given = layer.norm_param
        given.across_spatial = given.channel_shared = True
        given.scale_filler.type, given.scale_filler.value = "constant", 1
    elif layer.type == "Python":
        _set_python(layer, "attention_normalize", "Normalize", {"eps": 1e-10})


def _loss(options: Options, name: str) -> Any:
    loss = schema.LayerParameter(name=name, type="EuclideanLoss", top=[name], loss_weight=[options.weight])
    loss.include.add(phase=schema.TRAIN)
    if options.form == "paper":
        loss.type, loss.loss_weight[0] = "Python", 1
        settings = {"beta": options.weight, "normalization": "BATCH_SIZE"}
        _set_python(loss, "attention_loss", "AttentionLoss", settings)
    return loss


def python_sources(options: Options) -> dict[str, str]:
    """The Python layers in use, by the name of their file."""
    used = {"attention_loss": options.form == "paper", "attention_normalize": options.normalize == "python"}
    names = [f"{module}.py" for module, there in used.items() if there]
    return {name: (PYCAFFE / name).read_text(encoding="utf-8") for name in names}


def _set_python(layer: Any, module: str, name: str, settings: dict[str, Any]) -> None:
    layer.python_param.module, layer.python_param.layer = module, name
    layer.python_param.param_str = json.dumps(settings)
