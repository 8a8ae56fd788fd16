"""How a net's layers come together: made, shown their bottoms' shapes, their blobs shared and frozen.

All of it happens on the meta device, so a net can be tried out, a wrong one too, before it takes any memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attention_transfer._reading import first_line
from attention_transfer.caffe import schema
from attention_transfer.caffe.files.caffemodel import MOST_ENTRIES
from attention_transfer.caffe.graph import Graph, count_errors, in_phase
from attention_transfer.caffe.layers import Layer, Unknown, new_layer
from attention_transfer.caffe.layers.base import LayerError

Shapes = list[tuple[int, ...]]  # of the tops of a layer
Tie = tuple[Layer, int, Layer, int]  # a layer, the place of a blob of it, and the owner of that and its place


@dataclass
class Learnable:
    """One blob as the solver sees it; a shared one belongs to the first layer that has it.

    Attributes:
        owner: the layer; `index` the blob's place in it.
        lr_mult, decay_mult: multipliers of the learning rate and of the weight decay.
    """

    owner: Layer
    index: int
    lr_mult: float
    decay_mult: float

    @property
    def layer(self) -> str:
        return self.owner.name

    @property
    def tensor(self) -> Tensor:
        return self.owner.blobs[self.index]


def make_layer(spec: Any, phase: str) -> Layer:
    """The layer of a LayerParameter, in a net of this phase.

    Raises:
        ValueError: if this package does not run its type.
    """
    if not spec.HasField("phase"):
        spec.phase = schema.TRAIN if phase == "TRAIN" else schema.TEST
    return new_layer(spec, train_phase=spec.phase == schema.TRAIN)


# ------------------------------------------------------------------------------------------------ shapes


def set_up(layers: Sequence[Layer]) -> list[Shapes]:
    """Let each layer see tensors of its bottoms' shapes and make its blobs; the shapes of all tops.

    Raises:
        ValueError: if a layer cannot work on its bottoms.
    """
    tensors: dict[str, Tensor] = {}
    shapes = []
    for layer in layers:
        tops = _first_tops(layer, [tensors[name] for name in layer.bottoms])
        tensors.update(zip(layer.tops, tops, strict=True))
        shapes.append([tuple(top.shape) for top in tops])
    return shapes


def _first_tops(layer: Layer, bottoms: list[Tensor]) -> tuple[Tensor, ...]:
    if not layer.bottoms:
        layer.setup()
        layer.check_specs()
        return _countable(layer, layer.shapes())
    try:
        layer.setup(*bottoms)
        layer.check_specs()
        with torch.no_grad():
            tops = layer.forward(*bottoms)
    except (RuntimeError, IndexError, ZeroDivisionError, OverflowError) as error:
        shapes = ", ".join(str(tuple(bottom.shape)) for bottom in bottoms)
        raise layer.error("bottoms that it can work on", shapes, f"PyTorch: {first_line(error)}") from None
    return _countable(layer, [top.shape for top in (tops if isinstance(tops, tuple) else (tops,))])


def _countable(layer: Layer, shapes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    if len(shapes) != len(layer.tops):
        raise layer.error(f"{len(shapes)} tops for its bottoms", f"{len(layer.tops)}")
    for shape in shapes:
        if math.prod(shape) > MOST_ENTRIES:
            raise layer.error(f"tops of at most {MOST_ENTRIES} entries", f"the shape {tuple(shape)}")
        if math.prod(shape) < 1:
            remedy = "Caffe stops at the first forward pass."
            raise layer.error("tops with entries", f"the shape {tuple(shape)}", remedy)
    return tuple(torch.empty(tuple(shape), device="meta") for shape in shapes)


# ----------------------------------------------------------------------------------- sharing and freezing


def share_blobs(layers: Sequence[Layer]) -> tuple[list[Learnable], list[Tie]]:
    """Make blobs of one name one; each blob once, and who took another's over.

    Raises:
        ValueError: if sharers differ in shape, or state different multipliers.
    """
    learnable: list[Learnable] = []
    ties: list[Tie] = []
    named: dict[str, _Shared] = {}
    for layer in layers:
        for index, spec in enumerate(layer.blob_specs()):
            if spec.name and spec.name in named:
                ties.append(_share(named[spec.name], layer, index, spec))
                continue
            entry = Learnable(layer, index, spec.lr_mult, spec.decay_mult)
            learnable.append(entry)
            if spec.name:
                named[spec.name] = _Shared(entry, spec)
    return learnable, ties


@dataclass
class _Shared:
    entry: Learnable
    spec: Any  # the multipliers stated so far


def _share(shared: _Shared, layer: Layer, index: int, spec: Any) -> Tie:
    owner, own = shared.entry.owner, layer.blobs[index]
    blob = shared.entry.tensor
    if own.shape != blob.shape:  # share_mode PERMISSIVE, of other shapes, is left out
        shapes = f"{tuple(own.shape)}, and {tuple(blob.shape)} in {owner.name!r}"
        raise layer.error(f"the shape of the shared blob {spec.name!r}", shapes)
    for multiplier in ("lr_mult", "decay_mult"):
        if not spec.HasField(multiplier):
            continue
        value = getattr(spec, multiplier)
        if shared.spec.HasField(multiplier) and getattr(shared.spec, multiplier) != value:
            stated = getattr(shared.spec, multiplier)
            got = f"{value:g} here and {stated:g} in {owner.name!r}"
            raise layer.error(f"one {multiplier} for the shared blob {spec.name!r}", got)
        setattr(shared.spec, multiplier, value)
        setattr(shared.entry, multiplier, value)
    layer.share_blob(index, owner, shared.entry.index)
    return layer, index, owner, shared.entry.index


def freeze(layers: Sequence[Layer], force_backward: bool) -> None:
    """Let those blobs require a gradient that get one.

    Raises:
        ValueError: if a layer cannot run backward where it has to.
    """
    for layer in layers:
        layer.freeze(force_backward)
        for blob in layer.blobs:
            blob.requires_grad_(False)
    for layer in layers:
        for index, blob in enumerate(layer.blobs):
            if index not in layer.frozen and isinstance(blob, nn.Parameter):
                blob.requires_grad_(True)
    for layer in layers:
        layer.detached = [index for index in layer.frozen if layer.blobs[index].requires_grad]


# ------------------------------------------------------------------------------------------------- trials


@dataclass
class Trial:
    """What came of trying a net out. All by the place among the net's layers, those of other states too.

    Attributes:
        phase: in which.
        layers: those that were built, their blobs on the meta device.
        shapes: of their tops.
        refused: what is wrong with layers; what depends on them was not tried.
        lacking: those with too few bottoms or tops.
    """

    phase: str
    layers: dict[int, Layer] = field(default_factory=dict)
    shapes: dict[int, Shapes] = field(default_factory=dict)
    refused: dict[int, ValueError] = field(default_factory=dict)
    lacking: set[int] = field(default_factory=set)


def try_out(net: Any, phase: str = "TRAIN") -> Trial:
    """Build `net` as far as it can be: for looking at nets that are wrong somewhere.

    A data layer whose files are not there is left out without being wrong, and so is what depends on it.

    Raises:
        ValueError: if a layer has both `include` and `exclude` rules.
    """
    trial = Trial(phase)
    graph = Graph(in_phase(net, phase))
    made: dict[int, Layer] = {}
    for node in graph.nodes:
        try:
            made[node.index] = make_layer(node.spec, phase)
        except ValueError as error:
            trial.refused[node.index] = error
            made[node.index] = Unknown(node.spec, train_phase=phase == "TRAIN")
    places = {id(layer): place for place, layer in made.items()}

    def fault(error: LayerError) -> None:
        trial.refused.setdefault(places[id(error.layer)], error)

    trial.lacking = {place for place, layer in made.items() if _lacks(layer)}
    for found in graph.faults(made):
        fault(found)
    _build(made, trial, fault)
    if trial.layers.keys() == made.keys():
        try:
            share_blobs(list(made.values()))
            freeze(list(made.values()), net.force_backward)
        except LayerError as error:
            fault(error)
    return trial


def _lacks(layer: Layer) -> bool:
    return len(layer.bottoms) < layer.bottoms_expected[0] or len(layer.tops) < layer.tops_expected[0]


def _build(made: dict[int, Layer], trial: Trial, fault: Any) -> None:
    known: dict[str, Tensor] = {}
    for place, layer in made.items():
        ready = not isinstance(layer, Unknown) and not any(count_errors(layer))
        if ready and all(name in known for name in layer.bottoms):
            try:
                tops = _first_tops(layer, [known[name] for name in layer.bottoms])
                trial.layers[place] = layer
                trial.shapes[place] = [tuple(top.shape) for top in tops]
                known.update(zip(layer.tops, tops, strict=False))
                continue
            except LayerError as error:
                fault(error)
            except ValueError as error:
                trial.refused.setdefault(place, error)
            except (OSError, ImportError):
                pass
        for name in layer.tops:
            known.pop(name, None)
