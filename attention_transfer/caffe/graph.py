"""A net's messages as a graph: which layers a phase has, who reads what, and where Caffe runs backward.

The rules are Caffe's. A graph needs no layers and computes nothing, so a net that Caffe refuses can be looked
at too; `Graph.faults` names what Caffe refuses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from attention_transfer._errors import InputError
from attention_transfer._hints import did_you_mean
from attention_transfer.caffe import schema
from attention_transfer.caffe.layers import Layer, count_blobs
from attention_transfer.caffe.layers.base import LayerError, loss_weights, top_names

PHASES = {"TRAIN": schema.TRAIN, "TEST": schema.TEST}


def in_phase(net: Any, phase: str, level: int = 0, stages: Collection[str] = ()) -> Any:
    """A copy of `net` with all its layers, whose state is that of the phase.

    Raises:
        ValueError: if the phase is unknown.
    """
    if phase not in PHASES:
        raise InputError(f"Net: expected the phase TRAIN or TEST, got {phase!r}.")
    copy = schema.NetParameter()
    copy.CopyFrom(net)
    copy.state.phase = PHASES[phase]
    copy.state.level = level or net.state.level
    copy.state.stage.extend(stages)
    return copy


def select(net: Any, phase: str, level: int = 0, stages: Collection[str] = ()) -> Any:
    """Like `in_phase`, with the layers alone that the state includes.

    A rule holds if all its parts hold; a list of rules if one of them does.

    Raises:
        ValueError: if a layer has both `include` and `exclude` rules, or the phase is unknown.
    """
    selected = in_phase(net, phase, level, stages)
    del selected.layer[:]
    selected.layer.extend(layer for layer in net.layer if is_in(layer, selected.state))
    return selected


def is_in(layer: Any, state: Any) -> bool:
    """Whether a layer's rules include it in a net of this NetState.

    Raises:
        ValueError: if it has both `include` and `exclude` rules.
    """
    if layer.include and layer.exclude:
        raise InputError(f"Net: layer {layer.name!r}: expected include or exclude rules, got both.")
    if layer.include:
        return any(_holds(rule, state) for rule in layer.include)
    return not any(_holds(rule, state) for rule in layer.exclude)


def _holds(rule: Any, state: Any) -> bool:
    return (
        (not rule.HasField("phase") or rule.phase == state.phase)
        and (not rule.HasField("min_level") or state.level >= rule.min_level)
        and (not rule.HasField("max_level") or state.level <= rule.max_level)
        and all(stage in state.stage for stage in rule.stage)
        and all(stage not in state.stage for stage in rule.not_stage)
    )


@dataclass(eq=False)
class Blob:
    """One value of a blob's name: an in-place layer makes a new one.

    Attributes:
        producer: the layer that writes it, None for a name that no layer writes.
        users: (layer, index of its bottom) of all that read this value.
    """

    name: str
    producer: Node | None
    users: list[tuple[Node, int]] = field(default_factory=list, repr=False)


@dataclass(eq=False)
class Node:
    """One layer of the graph.

    Attributes:
        index: its place among the net's `layer` entries, before the rules of phases leave any out.
        spec: its LayerParameter.
    """

    index: int
    spec: Any
    inputs: list[Blob] = field(repr=False)
    outputs: list[Blob] = field(default_factory=list, repr=False)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def type(self) -> str:
        return self.spec.type

    @property
    def in_place(self) -> bool:
        return bool(set(self.spec.bottom) & set(self.spec.top))

    @property
    def blob_count(self) -> int:
        return count_blobs(self.spec)

    @property
    def multipliers(self) -> list[tuple[float, float]]:
        """(lr_mult, decay_mult) of each blob; a blob without a `param` entry has Caffe's default, 1 and 1."""
        given = [(param.lr_mult, param.decay_mult) for param in self.spec.param]
        return (given + [(1.0, 1.0)] * self.blob_count)[: self.blob_count]

    @property
    def loss_weights(self) -> list[float]:
        """One of each top, as Caffe takes them where none is stated."""
        return loss_weights(self.spec)


def tests_always(spec: Any) -> bool:
    """Whether a layer is of the phase TEST, by its own word, in a net of either phase."""
    return spec.HasField("phase") and spec.phase == schema.TEST


class Graph:
    """The layers that a net has in its `state`, in order, wrong ones included.

    Attributes:
        nodes: the layers.
        unwritten: (layer, name) of bottoms that no layer before writes.
        last: the last value of each name.

    Args:
        net: a NetParameter.
        shapes: of the tops, by the index of their layer, as far as they are known.
        left_out: the indices of layers to pass over; their tops are values without a producer.
    """

    def __init__(
        self,
        net: Any,
        shapes: Mapping[int, Sequence[tuple[int, ...]]] | None = None,
        left_out: Collection[int] = (),
    ) -> None:
        self._made_of = net, shapes, left_out
        self._shapes = shapes or {}
        self.force_backward: bool = net.force_backward
        self.nodes: list[Node] = []
        self.unwritten: list[tuple[Node, str]] = []
        current: dict[str, Blob] = {}
        for index, spec in enumerate(net.layer):
            if is_in(spec, net.state) and index in left_out:
                current |= {name: Blob(name, None) for name in spec.top}
            elif is_in(spec, net.state):
                self._add(index, spec, current)
        self.last = current

    def _add(self, index: int, spec: Any, current: dict[str, Blob]) -> None:
        node = Node(index, spec, [])
        for position, name in enumerate(spec.bottom):
            if name not in current:
                self.unwritten.append((node, name))
                current[name] = Blob(name, None)
            current[name].users.append((node, position))
            node.inputs.append(current[name])
        node.outputs = [Blob(name, node) for name in top_names(spec)]
        current.update(zip(spec.top, node.outputs, strict=False))
        self.nodes.append(node)

    def __reduce__(self) -> tuple[Any, ...]:
        return Graph, self._made_of  # a copy made link by link would exceed the recursion limit

    def outputs(self) -> list[str]:
        """Names of the blobs that no layer reads, in the order in which they are made."""
        made = (blob for node in self.nodes for blob in node.outputs)
        return [blob.name for blob in made if not blob.users and self.last.get(blob.name) is blob]

    def faults(self, layers: Mapping[int, Layer]) -> Iterator[LayerError]:
        """What Caffe refuses in how the layers, by their index, are connected.

        That is too few or too many bottoms or tops, an unknown bottom, one blob that two layers make, and an
        in-place layer that would write onto a blob that another layer reads.
        """
        known: dict[str, None] = {}
        for node in self.nodes:
            layer = layers[node.index]
            yield from count_errors(layer)
            for name in layer.bottoms:
                if name not in known:
                    hint = did_you_mean(name, known) or "Layers read only what layers before them make."
                    yield layer.error("bottoms that earlier layers make", f"{name!r}", hint)
                known[name] = None
            for top, name in enumerate(layer.tops):
                at_same_place = layer.bottoms[top : top + 1] == [name]
                if at_same_place and not layer.allows_in_place:
                    remedy = "This type cannot work in place."
                    yield layer.error("a top of its own", f"{name!r}, its bottom", remedy)
                elif name in known and not at_same_place:
                    remedy = "Caffe: produced by multiple sources."
                    yield layer.error("a top that no other layer makes", f"{name!r}", remedy)
                known[name] = None
        for node in self.nodes:
            overwritten = zip(node.inputs, node.outputs, strict=False)
            shared = [old.name for old, new in overwritten if old.name == new.name and len(old.users) > 1]
            if shared:
                expected = f"to be the only reader of {shared[0]!r}, which it overwrites"
                remedy = "Caffe: the name is produced by multiple sources. Read it after this layer."
                yield layers[node.index].error(expected, "another one", remedy)

    def multipliers(self, node: Node) -> list[tuple[float, float]]:
        """(lr_mult, decay_mult) of each blob of a layer, which its sharers may have stated for it."""
        own = node.multipliers
        for i, param in enumerate(node.spec.param[: len(own)]):
            lr, decay = self._stated.get(param.name, (None, None))
            own[i] = (own[i][0] if lr is None else lr, own[i][1] if decay is None else decay)
        return own

    @cached_property
    def _stated(self) -> dict[str, tuple[float | None, float | None]]:
        """(lr_mult, decay_mult) of each shared parameter, None where nobody states it."""
        stated: dict[str, tuple[float | None, float | None]] = {}
        for name, sharers in self.shared.items():
            lr, decay = (
                [getattr(param, key) for _, param in sharers if param.HasField(key)]
                for key in ("lr_mult", "decay_mult")
            )
            stated[name] = (lr[0] if lr else None, decay[0] if decay else None)
        return stated

    @cached_property
    def shared(self) -> dict[str, list[tuple[Node, Any]]]:
        """(layer, its `param` entry) of all that name a parameter, by that name."""
        named: dict[str, list[tuple[Node, Any]]] = {}
        for node in self.nodes:
            for param in node.spec.param:
                if param.name:
                    named.setdefault(param.name, []).append((node, param))
        return {name: sharers for name, sharers in named.items() if len(sharers) > 1}

    def shape(self, blob: Blob) -> tuple[int, ...] | None:
        """The shape of a value, None if it is not known."""
        if blob.producer is None:
            return None
        tops = self._shapes.get(blob.producer.index, [])
        place = blob.producer.outputs.index(blob)
        return tops[place] if place < len(tops) else None

    def readers(self, blob: Blob) -> set[Node]:
        """The layers that this value reaches."""
        users = {user for user, _ in blob.users}
        return users | self.above(users)

    def below(self, blobs: Iterable[Blob]) -> set[Node]:
        """The layers that these values come from."""
        found: set[Node] = set()
        waiting = [blob.producer for blob in blobs]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in found:
                found.add(node)
                waiting.extend(blob.producer for blob in node.inputs)
        return found

    def above(self, nodes: Iterable[Node]) -> set[Node]:
        """The layers that these layers' tops reach."""
        found: set[Node] = set()
        waiting = list(nodes)
        while waiting:
            for blob in waiting.pop().outputs:
                for user, _ in blob.users:
                    if user not in found:
                        found.add(user)
                        waiting.append(user)
        return found

    @property
    def backward(self) -> set[Node]:
        """The layers whose backward pass Caffe runs."""
        return self._backward[0]

    @property
    def gradients(self) -> set[Blob]:
        """The values into which Caffe sends a gradient."""
        return self._backward[1]

    @cached_property
    def _backward(self) -> tuple[set[Node], set[Blob]]:
        """(`backward`, `gradients`), by the passes that Caffe makes over a net as it builds it."""
        needing = self._needing()
        running: set[Node] = set()
        sent: set[Blob] = set()
        for node in reversed(self.nodes):
            weighted = any(weight for _, weight in zip(node.outputs, node.loss_weights, strict=False))
            reached = weighted or any(blob in sent for blob in node.outputs)
            if self.force_backward or (node in needing and reached):
                running.add(node)
                sent.update(blob for i, blob in enumerate(node.inputs) if self._sends(node, i, needing))
        return running, sent

    def _needing(self) -> set[Node]:
        """The layers with something to learn at or below them; a BatchNorm counts, whatever it states."""
        needing: set[Node] = set()
        for node in self.nodes:
            learns = any(lr for lr, _ in node.multipliers)
            if learns or any(blob.producer in needing for blob in node.inputs):
                needing.add(node)
        return needing

    def _sends(self, node: Node, bottom: int, needing: set[Node]) -> bool:
        if self.force_backward:
            return not (node.type.endswith("Loss") and node.type != "EuclideanLoss" and bottom == 1)
        if node.spec.propagate_down:
            return bottom < len(node.spec.propagate_down) and node.spec.propagate_down[bottom]
        return node.inputs[bottom].producer in needing


def count_errors(layer: Layer) -> Iterator[LayerError]:
    """What is wrong with the numbers of a layer's bottoms and tops."""
    for what, count, (least, most) in (
        ("bottom", len(layer.bottoms), layer.bottoms_expected),
        ("top", len(layer.tops), layer.tops_expected),
    ):
        if count < least or (most is not None and count > most):
            numbers = f"{least} to {most}" if most is not None else f"{least} or more"
            numbers = f"{least}" if least == most else numbers
            yield layer.error(f"{numbers} {what}s", f"{count}")
