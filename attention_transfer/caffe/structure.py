"""A net's messages as a graph: which layers a phase has, who reads what, and where Caffe runs backward.

Nothing is computed and no layer is built, so a net that Caffe refuses can be looked at too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from attention_transfer.caffe import schema
from attention_transfer.caffe.graph import is_in
from attention_transfer.caffe.layers.forks import is_segnets

WITH_BIAS_TERM = {
    "Convolution": "convolution_param",
    "Deconvolution": "convolution_param",
    "InnerProduct": "inner_product_param",
    "Embed": "embed_param",
}


@dataclass(eq=False)
class Blob:
    """One value of a blob's name: an in-place layer makes a new one.

    Attributes:
        producer: the layer that writes it, None for a name that no layer writes.
        users: (layer, index of its bottom) of all that read this value.
    """

    name: str
    producer: Node | None
    users: list[tuple[Node, int]] = field(default_factory=list)


@dataclass(eq=False)
class Node:
    """One layer of the graph.

    Attributes:
        index: its place among the net's `layer` entries, before the rules of phases leave any out.
        spec: its LayerParameter.
    """

    index: int
    spec: Any
    inputs: list[Blob]
    outputs: list[Blob] = field(default_factory=list)

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
        if self.spec.loss_weight:
            return list(self.spec.loss_weight)
        default = 1.0 if self.type.endswith("Loss") else 0.0
        return [default] + [0.0] * (len(self.outputs) - 1)


def count_blobs(spec: Any) -> int:
    """The number of a layer's blobs, from its message alone; 0 for a type without any, or an unknown one."""
    if spec.type in WITH_BIAS_TERM:
        return 1 + getattr(spec, WITH_BIAS_TERM[spec.type]).bias_term
    if spec.HasField("convolution_param"):  # a depthwise one of some fork
        return 1 + spec.convolution_param.bias_term
    if spec.type == "Scale":
        return (len(spec.bottom) == 1) + spec.scale_param.bias_term
    if spec.type == "Bias":
        return int(len(spec.bottom) == 1)
    if spec.type == "BN":
        return 2 if is_segnets(spec) else 4
    return {"BatchNorm": 3, "PReLU": 1, "Normalize": 1, "Parameter": 1}.get(spec.type, 0)


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
        for name in spec.top:
            current[name] = Blob(name, node)
            node.outputs.append(current[name])
        if not spec.top and spec.type.endswith("Loss"):  # Caffe adds the top by itself
            node.outputs.append(Blob(f"({spec.name})", node))
        self.nodes.append(node)

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
