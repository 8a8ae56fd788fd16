"""Which layers of a net a converted module has: those that its outputs need, and no losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attention_transfer._hints import did_you_mean
from attention_transfer.caffe import schema
from attention_transfer.caffe.files.prototxt import read_net
from attention_transfer.caffe.graph import Version, Wiring, connect
from attention_transfer.caffe.layers import Layer
from attention_transfer.caffe.layers.base import UnsupportedError
from attention_transfer.caffe.layers.forks import settle_meaning
from attention_transfer.caffe.layers.loss import Loss
from attention_transfer.caffe.net import Net, Phase
from attention_transfer.caffe.sizes import taken_channels, with_known_sizes

SCORES = ("Accuracy",)
DECIDING = ("ArgMax", "Threshold")


@dataclass
class Plan:
    """What is converted of a net.

    Attributes:
        layers: places of the layers that compute, in order.
        inputs, outputs: the blobs that come in and go out, each as the layer and top that make it.
        dropped: places of the layers that are left out.
    """

    net: Net
    wiring: Wiring
    layers: list[int]
    inputs: list[Version]
    outputs: list[Version]
    dropped: list[int]

    @property
    def share(self) -> float:
        """The share of entries in which two computations must agree: where a layer decides, rounding may."""
        layers = [self.net.layers[index] for index in self.layers]
        decides = any(layer.type in DECIDING or _gives_places(layer) for layer in layers)
        return 0.99 if decides else 1.0

    def name(self, version: Version) -> str:
        """The name of a blob."""
        return self.net.layers[version[0]].tops[version[1]]

    def shape(self, version: Version) -> tuple[int, ...]:
        """The shape of a blob, for the declared batch."""
        return self.net.shapes[self.name(version)]


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


def make_plan(net: Net, wanted: Sequence[str] = ()) -> Plan:
    """Choose the layers that the blobs `wanted` need; by default, all blobs that no layer but a loss reads.

    Raises:
        ValueError: if a blob is unknown, or is or depends on a loss; or if nothing is left.
    """
    layers, wiring = net.layers, connect(net.layers)
    losses = _losses(net, wiring, weighted=not wanted)
    outputs = _find(net, wiring, wanted, losses) if wanted else _ends(layers, wiring, losses)
    if not outputs:  # sums with a loss weight are losses only beside something else
        outputs = _ends(layers, wiring, _losses(net, wiring, weighted=False))
    needed = sorted(set().union(*(wiring.ancestors(layer) for layer, _ in outputs)))
    computing = [i for i in needed if not layers[i].is_source]
    inputs = list(dict.fromkeys(source for i in computing for source in wiring.sources[i]))
    dropped = [i for i in range(len(layers)) if i not in needed]
    sources = [version for version in inputs if layers[version[0]].is_source]
    if not computing:
        raise ValueError(
            "convert: expected layers that compute something besides losses, got none in "
            f"{net.proto.name or 'the net'!r}. Is it the right phase?"
        )
    return Plan(net, wiring, computing, sources, outputs, dropped)


def _gives_places(layer: Layer) -> bool:
    return layer.type == "Pooling" and len(layer.tops) > 1


def _losses(net: Net, wiring: Wiring, *, weighted: bool) -> set[int]:
    """Losses and scores, and what depends on them; with `weighted`, also other sums with a loss weight."""
    weights, shapes = net.loss_weights if weighted else {}, net.shapes
    found: set[int] = set()
    for index, layer in enumerate(net.layers):
        counted = [name for name in layer.tops if weights.get(name)]
        if (
            isinstance(layer, Loss)
            or layer.type in SCORES
            or (layer.type == "Python" and layer.spec.python_param.layer == "AttentionLoss")
            or (counted and all(shapes[name] == () for name in counted))
            or any(source in found for source, _ in wiring.sources[index])
        ):
            found.add(index)
    return found


def _ends(layers: Sequence[Layer], wiring: Wiring, losses: set[int]) -> list[Version]:
    """The blobs that only losses read, but for those that are silenced, or make labels without weights."""
    silent = {index for index, layer in enumerate(layers) if layer.type == "Silence"}
    labels: set[int] = set()
    ends: list[Version] = []
    for index in reversed(range(len(layers))):
        if index in losses or index in silent or layers[index].is_source:
            continue
        uses = {(index, top): wiring.uses[index, top] for top in range(len(layers[index].tops))}
        if all(each and all(user in silent for user, _ in each) for each in uses.values()):
            silent.add(index)
            continue
        for_labels = all(
            each and all(use[0] in labels or _is_label(layers, losses, use) for use in each)
            for each in uses.values()
        )
        if for_labels and not any(layers[i].blobs for i in wiring.ancestors(index)):
            labels.add(index)
            continue
        for version, each in uses.items():
            users = {user for user, _ in each}
            if users <= losses | silent | labels and not (users and users <= silent):
                ends.append(version)
    return sorted(ends)


def _is_label(layers: Sequence[Layer], losses: set[int], use: tuple[int, int]) -> bool:
    user, bottom = use
    return user in losses and bottom > 0 and layers[user].bottoms_expected == (2, 2)


def _find(net: Net, wiring: Wiring, wanted: Sequence[str], losses: set[int]) -> list[Version]:
    known = [name for name, (index, _) in wiring.last.items() if not net.layers[index].is_source]
    found = []
    for name in dict.fromkeys(wanted):
        if name not in known:
            hint = did_you_mean(name, known) or f"Known: {', '.join(known[-8:])}."
            raise ValueError(f"convert: expected a blob of the net as output, got {name!r}. {hint}")
        layer = net.layers[wiring.last[name][0]]
        if wiring.last[name][0] in losses:
            raise ValueError(
                f"convert: expected an output that needs no loss or labels, got {name!r} of the layer "
                f"{layer.name!r} ({layer.type}). Name the blob that it is computed from."
            )
        found.append(wiring.last[name])
    return found
