"""Which layers of a net a converted module has: those that its outputs need, and no losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attention_transfer._errors import InputError
from attention_transfer._hints import did_you_mean
from attention_transfer.caffe import schema
from attention_transfer.caffe.files.prototxt import read_net
from attention_transfer.caffe.graph import Blob, Graph, Node
from attention_transfer.caffe.layers import Layer
from attention_transfer.caffe.layers.base import UnsupportedError
from attention_transfer.caffe.layers.forks import settle_meaning
from attention_transfer.caffe.layers.loss import Loss
from attention_transfer.caffe.net import Net, Phase
from attention_transfer.caffe.sizes import taken_channels, with_known_sizes

SCORES = ("Accuracy",)
DECIDING = ("ArgMax", "Threshold")


@dataclass
class Selection:
    """What is converted of a net.

    Attributes:
        graph: all of the net.
        layers: places of the layers that compute, in order.
        inputs, outputs: the blobs that come in and go out.
        dropped: places of the layers that are left out.
    """

    net: Net
    graph: Graph
    layers: list[int]
    inputs: list[Blob]
    outputs: list[Blob]
    dropped: list[int]

    @property
    def share(self) -> float:
        """The share of entries in which two computations must agree: where a layer decides, rounding may."""
        layers = [self.net.layers[index] for index in self.layers]
        decides = any(layer.type in DECIDING or _gives_places(layer) for layer in layers)
        return 0.99 if decides else 1.0

    def shape(self, blob: Blob) -> tuple[int, ...]:
        """The shape of a blob, for the declared batch."""
        return self.net.shapes[blob.name]


def net_without_data(prototxt: Any, phase: Phase, stored: Sequence[Any] = ()) -> Net:
    """A net whose data need not be there, if its prototxt tells the size of the images.

    Args:
        stored: its weights, NetParameters, which tell what the prototxt leaves open.

    Raises:
        ValueError, OSError: as `Net`.
    """
    net = schema.NetParameter()
    net.CopyFrom(prototxt if isinstance(prototxt, schema.NetParameter) else read_net(prototxt))
    settle_meaning(net.layer, stored)
    try:
        return Net(net, phase=phase)
    except (FileNotFoundError, UnsupportedError):  # data that are elsewhere, or for Caffe alone
        known = with_known_sizes(net, taken_channels(net, phase, stored))
        if known == net:
            raise
        return Net(known, phase=phase)


def select_layers(net: Net, wanted: Sequence[str] = ()) -> Selection:
    """Choose the layers that the blobs `wanted` need; by default, all blobs that no layer but a loss reads.

    Raises:
        ValueError: if a blob is unknown, or is or depends on a loss; or if nothing is left.
    """
    layers, graph = net.layers, Graph(net.proto)
    losses = _losses(net, graph, weighted=not wanted)
    outputs = _find(net, graph, wanted, losses) if wanted else _ends(layers, graph, losses)
    if not outputs:  # sums with a loss weight are losses only beside something else
        outputs = _ends(layers, graph, _losses(net, graph, weighted=False))
    below = graph.below(outputs)
    computing = [node for node in graph.nodes if node in below and not layers[node.index].is_source]
    read = dict.fromkeys(blob for node in computing for blob in node.inputs)
    inputs = [blob for blob in read if blob.producer and layers[blob.producer.index].is_source]
    dropped = [node.index for node in graph.nodes if node not in below]
    if not computing:
        raise InputError(
            "convert: expected layers that compute something besides losses, got none in "
            f"{net.proto.name or 'the net'!r}. Is it the right phase?"
        )
    return Selection(net, graph, [node.index for node in computing], inputs, outputs, dropped)


def _gives_places(layer: Layer) -> bool:
    return layer.type == "Pooling" and len(layer.tops) > 1


def _losses(net: Net, graph: Graph, *, weighted: bool) -> set[Node]:
    """Losses and scores, and what depends on them; with `weighted`, also other sums with a loss weight."""
    weights, shapes = net.loss_weights if weighted else {}, net.shapes
    found: set[Node] = set()
    for node, layer in zip(graph.nodes, net.layers, strict=True):
        counted = [name for name in layer.tops if weights.get(name)]
        if (
            isinstance(layer, Loss)
            or layer.type in SCORES
            or (layer.type == "Python" and layer.spec.python_param.layer == "AttentionLoss")
            or (counted and all(shapes[name] == () for name in counted))
            or any(blob.producer in found for blob in node.inputs)
        ):
            found.add(node)
    return found


def _ends(layers: Sequence[Layer], graph: Graph, losses: set[Node]) -> list[Blob]:
    """The blobs that only losses read, but for those that are silenced, or make labels without weights."""
    silent = {node for node in graph.nodes if node.type == "Silence"}
    labels: set[Node] = set()
    ends: list[Blob] = []
    for node in reversed(graph.nodes):
        if node in losses or node in silent or layers[node.index].is_source:
            continue
        if all(blob.users and all(user in silent for user, _ in blob.users) for blob in node.outputs):
            silent.add(node)
            continue
        for_labels = all(
            blob.users and all(user in labels or _is_label(layers, losses, user, i) for user, i in blob.users)
            for blob in node.outputs
        )
        if for_labels and not any(layers[below.index].blobs for below in graph.below(node.outputs)):
            labels.add(node)
            continue
        for blob in reversed(node.outputs):
            users = {user for user, _ in blob.users}
            if users <= losses | silent | labels and not (users and users <= silent):
                ends.append(blob)
    return ends[::-1]


def _is_label(layers: Sequence[Layer], losses: set[Node], user: Node, bottom: int) -> bool:
    return user in losses and bottom > 0 and layers[user.index].bottoms_expected == (2, 2)


def _find(net: Net, graph: Graph, wanted: Sequence[str], losses: set[Node]) -> list[Blob]:
    known = {
        name: (blob, blob.producer)
        for name, blob in graph.last.items()
        if blob.producer and not net.layers[blob.producer.index].is_source
    }
    found = []
    for name in dict.fromkeys(wanted):
        if name not in known:
            hint = did_you_mean(name, known) or f"Known: {', '.join(list(known)[-8:])}."
            raise InputError(f"convert: expected a blob of the net as output, got {name!r}. {hint}")
        blob, node = known[name]
        if node in losses:
            raise InputError(
                f"convert: expected an output that needs no loss or labels, got {name!r} of the layer "
                f"{node.name!r} ({node.type}). Name the blob that it is computed from."
            )
        found.append(blob)
    return found
