"""Chains of layers that run faster as one, with the same numbers.

Two are recognised: BatchNorm with the Scale that alone reads it, and the attention branch from an activation
to its map, which goes to the package's kernels: [Reshape] - AbsVal - [Power 2] - [Power 2] - Convolution of
ones. Where a hook listens to one of the layers, or the ones are no longer ones, the layers run by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from attention_transfer.caffe.graph import Graph, Node
from attention_transfer.caffe.layers import Layer
from attention_transfer.caffe.layers.convolution import Convolution
from attention_transfer.caffe.layers.normalization import BatchNorm
from attention_transfer.functional import raw_energy


class Chain:
    """Layers one behind the other, with one way in and one out.

    Attributes:
        indices: the layers' places in the net; `end` the last one.
        bottom, top: names of the blobs at both ends.
        hidden: names of the blobs in between that stay to be seen.
    """

    def __init__(self, layers: Sequence[Layer], indices: Sequence[int]) -> None:
        self.layers, self.indices, self.end = layers, indices, indices[-1]
        self.bottom, self.top = layers[0].bottoms[0], layers[-1].tops[0]
        self.hidden = [layer.tops[0] for layer in layers[:-1] if layer.tops[0] != self.top]

    def applies(self) -> bool:
        """Whether nobody listens to a layer of the chain; an open tap pins its module's forward."""
        return not any(
            layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
            for layer in self.layers
        )

    def layer_by_layer(self, x: Tensor, place: int) -> Tensor:
        """The blob that the layer at this place of the chain gives."""
        for layer in self.layers[: place + 1]:
            x = layer.forward(x)
        return x

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class ScaledBatchNorm(Chain):
    """BatchNorm and the Scale on top of it in one pass."""

    def layer_by_layer(self, x: Tensor, place: int) -> Tensor:
        norm = self.layers[0]
        assert isinstance(norm, BatchNorm)
        return norm.again(x)

    def __call__(self, x: Tensor) -> Tensor:
        norm, scale = self.layers
        return norm.forward(x, *scale.blobs)


class AttentionMap(Chain):
    """An activation's energy, sum over c of |A|^p, with p = 2 to the number of squarings."""

    def __init__(self, layers: Sequence[Layer], indices: Sequence[int]) -> None:
        super().__init__(layers, indices)
        self.p = 2.0 ** sum(layer.type == "Power" for layer in layers)
        self.flat = layers[0].type == "Reshape"
        self._checked: tuple[int, int] | None = None
        self._all_ones = False

    def applies(self) -> bool:
        return super().applies() and self._ones()

    def _ones(self) -> bool:
        """Whether the convolution's weights are ones, looked at again only after they were written to."""
        weight = self.layers[-1].blobs[0]
        if self._checked != (id(weight), weight._version):
            self._all_ones = bool((weight == 1).all()) and not weight.requires_grad
            self._checked = (id(weight), weight._version)
        return self._all_ones

    def __call__(self, x: Tensor) -> Tensor:
        energy = raw_energy(x, self.p, "sum").to(x.dtype)
        return energy.flatten(1)[:, None, :, None] if self.flat else energy[:, None]


def fusable(layers: Sequence[Layer], graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> dict[int, Chain]:
    """The chains of a net, by the place of their first layer; `shapes` are those of its blobs."""
    found: dict[int, Chain] = {}
    for index, layer in enumerate(layers):
        if layer.type == "BatchNorm" and not layer.cut:
            chain = _chain(layers, graph.nodes[index], 1)
            if len(chain) == 2 and _is_channel_scale(layers[chain[1]]):
                found[index] = ScaledBatchNorm([layers[i] for i in chain], chain)
        elif layer.type in ("Reshape", "AbsVal") and len(shapes[layer.bottoms[0]]) == 4:
            chain = _map_chain(layers, _chain(layers, graph.nodes[index], 4))
            if chain and not any(i in other.indices for other in found.values() for i in chain):
                found[index] = AttentionMap([layers[i] for i in chain], chain)
    return found


def _chain(layers: Sequence[Layer], node: Node, most: int) -> list[int]:
    """The layers from `node` on in which each is the only reader of the one before."""
    chain = [node.index]
    while len(chain) <= most and len(node.outputs) == 1 and not any(node.loss_weights):
        users = node.outputs[0].users
        if len(users) != 1:
            break
        node = users[0][0]
        following = layers[node.index]
        if len(node.inputs) != 1 or following.cut or following.detached:
            break
        chain.append(node.index)
    return chain


def _is_channel_scale(layer: Layer) -> bool:
    param = layer.spec.scale_param
    return layer.type == "Scale" and layer.blobs[0].dim() == 1 and param.axis == 1


def _map_chain(layers: Sequence[Layer], chain: list[int]) -> list[int]:
    """The part of a chain that is an attention branch up to the map; empty if it is none."""
    kinds = [layers[index].type for index in chain]
    if "Convolution" not in kinds:
        return []
    end = kinds.index("Convolution")
    body = kinds[: end + 1]
    reshaped = body[0] == "Reshape"
    squarings = len(body) - reshaped - 2
    if body[reshaped:] != ["AbsVal", *["Power"] * squarings, "Convolution"] or squarings > 2:
        return []
    parts = [layers[index] for index in chain[: end + 1]]
    if not all(_is_squaring(layer) for layer in parts if layer.type == "Power"):
        return []
    fits = _sums_channels(parts[-1]) and not parts[0].cut and (not reshaped or _flattens_space(parts[0]))
    return chain[: end + 1] if fits else []


def _is_squaring(layer: Layer) -> bool:
    param = layer.spec.power_param
    return (param.power, param.scale, param.shift) == (2, 1, 0) and not layer.in_place


def _sums_channels(layer: Layer) -> bool:
    param = layer.spec.convolution_param
    assert isinstance(layer, Convolution)
    one_by_one = {*layer.kernel, *layer.stride} == {1} and set(layer.pad) == {0}
    return (
        one_by_one and param.num_output == 1 and param.group == 1 and not param.bias_term and param.axis == 1
    )


def _flattens_space(layer: Layer) -> bool:
    param = layer.spec.reshape_param
    known = ((0, [0, 0, -1, 1]), (1, [0, -1, 1]), (2, [-1, 1]))
    return param.num_axes == -1 and (param.axis, list(param.shape.dim)) in known
