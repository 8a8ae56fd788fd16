"""Mistakes in the attention branches, and in what compares their maps."""

from __future__ import annotations

import math
from collections.abc import Callable

from attention_transfer.caffe.checking.attention import Branch
from attention_transfer.caffe.checking.layers import counts, watches
from attention_transfer.caffe.checking.rules import Blame, Case, named, pitfall
from attention_transfer.caffe.graph import Blob, Node

FREEZE = "Add `param { lr_mult: 0 decay_mult: 0 }`."
FLATTENING = ("Reshape", "Flatten")


def _convolutions(case: Case, wrong: Callable[[Node], bool]) -> list[Node]:
    nodes = {branch.convolution for branch in case.attention.branches}
    return [node for node in case.graph.nodes if node in nodes and wrong(node)]


def _normalizes(case: Case, wrong: Callable[[Node], bool]) -> list[Node]:
    nodes = {node for branch in case.attention.branches for node in branch.tail if node.type == "Normalize"}
    return [node for node in case.graph.nodes if node in nodes and wrong(node)]


@pitfall("map_convolution_bias")
def map_convolution_bias(case: Case) -> Blame | None:
    """The sum over channels has a bias that learns, or does not start at 0."""

    def biased(node: Node) -> bool:
        given = node.spec.convolution_param
        filled = given.bias_filler.type != "constant" or given.bias_filler.value != 0
        return given.bias_term and (filled or (case.train and case.graph.multipliers(node)[1][0] != 0))

    blamed = _convolutions(case, biased)
    if not blamed:
        return None
    message = (
        f"{named(blamed)} has a bias, by default or by its word: it starts at its filler's value, learns, "
        "and is added to the map. Caffe says nothing."
    )
    return Blame(blamed, _sentence(message) + case.unless_cut(blamed), "Add bias_term: false.")


@pitfall("map_convolution_filler")
def map_convolution_filler(case: Case) -> Blame | None:
    """The sum over channels does not start with equal weights other than 0."""

    def unequal(node: Node) -> bool:
        filler = node.spec.convolution_param.weight_filler
        return filler.type != "constant" or filler.value == 0

    blamed = _convolutions(case, unequal)
    if not blamed:
        return None
    message = (
        f"The weights of {named(blamed)} are not ones: without a weight_filler they are 0, so the map is 0 "
        "everywhere and no gradient passes; with a random one the map is a random mixture. Caffe says "
        "nothing."
    )
    return Blame(blamed, message, 'Add weight_filler { type: "constant" value: 1 }.')


@pitfall("map_convolution_learns")
def map_convolution_learns(case: Case) -> Blame | None:
    """The weights of the sum over channels are left to the solver."""
    blamed = _convolutions(case, lambda node: _moves(case, node) is not None)
    if not (blamed and case.train):
        return None
    message = (
        f"The weights of {named(blamed)} leave 1, by gradient or by weight decay: the map is no longer the "
        "sum over channels. Caffe says nothing."
    )
    return Blame(blamed, message, FREEZE)


@pitfall("normalize_scale_learns")
def normalize_scale_learns(case: Case) -> Blame | None:
    """The scale of a branch's Normalize learns (elsewhere, as in SSD, it is meant to)."""
    blamed = _normalizes(case, lambda node: _moves(case, node) == "learns")
    if not (blamed and case.train):
        return None
    message = (
        f"The scale of {named(blamed)} is a parameter, and training moves it: the map no longer has length "
        "1, and the term falls without any attention being transferred. Caffe says nothing."
    )
    return Blame(blamed, message, FREEZE)


@pitfall("normalize_scale_decays")
def normalize_scale_decays(case: Case) -> Blame | None:
    """The scale of a branch's Normalize gets no gradient, but weight decay."""
    blamed = _normalizes(case, lambda node: _moves(case, node) == "decays")
    if not (blamed and case.train):
        return None
    message = (
        f"No gradient reaches the scale of {named(blamed)}, but weight decay shrinks it in every step: the "
        "map becomes shorter than 1. Caffe says nothing."
    )
    return Blame(blamed, message, FREEZE)


def _moves(case: Case, node: Node) -> str | None:
    """What moves a layer's first blob in training: "learns", "decays", or nothing."""
    lr, decay = case.graph.multipliers(node)[0]
    if lr and node in case.graph.backward:
        return "learns"
    return "decays" if lr and decay and case.decays else None


@pitfall("normalize_each_position")
def normalize_each_position(case: Case) -> Blame | None:
    """Normalize over the channels of each position, where there is one channel."""

    def of_one_channel(node: Node) -> bool:
        shape = case.graph.shape(node.inputs[0])
        if shape is not None:
            return len(shape) > 1 and shape[1] == 1
        below = node.inputs[0].producer
        return below is not None and below.type == "Convolution"

    blamed = _normalizes(case, lambda n: not n.spec.norm_param.across_spatial and of_one_channel(n))
    if not blamed:
        return None
    message = (
        f"{named(blamed)} divides every position of the map by itself: the map is 1 everywhere, and its "
        "gradient (nearly) 0. Caffe says nothing."
    )
    return Blame(blamed, _sentence(message), "Set across_spatial: true, its default.")


@pitfall("reshape_merges_channels")
def reshape_merges_channels(case: Case) -> Blame | None:
    """A Reshape or Flatten before the sum over channels after which the channels are others."""
    flattening = {
        node for branch in case.attention.branches for node in branch.energy if node.type in FLATTENING
    }
    blamed = [node for node in case.graph.nodes if node in flattening and _merges_channels(case, node)]
    if not blamed:
        return None
    message = (
        f"{named(blamed)} folds channels and positions into one axis, and the 1x1 Convolution sums over "
        "that: the map is one number, normalised to 1; the loss is 0 and the gradient (nearly) 0. Caffe "
        "says nothing."
    )
    return Blame(blamed, _sentence(message), "Use shape { dim: 0 dim: 0 dim: -1 dim: 1 }.")


def _merges_channels(case: Case, node: Node) -> bool:
    before, after = case.graph.shape(node.inputs[0]), case.graph.shape(node.outputs[0])
    if before and after:
        return len(before) > 2 and before[1] != after[1:2][0]
    if node.type == "Flatten":
        return node.spec.flatten_param.axis == 1
    given = node.spec.reshape_param
    return given.axis == 0 and len(given.shape.dim) > 1 and given.shape.dim[1] == -1


@pitfall("euclidean_counts")
def euclidean_counts(case: Case) -> Blame | None:
    """EuclideanLoss, or a Python layer behind two branches, on maps of different size."""
    comparing = {meeting.node for meeting in case.attention.meetings}
    blamed, sizes = [], []
    for node in case.graph.nodes:
        if len(node.inputs) != 2 or not (node.type == "EuclideanLoss" or node in comparing):
            continue
        first, second = (case.graph.shape(blob) for blob in node.inputs)
        if first and second and math.prod(first[1:]) != math.prod(second[1:]):
            blamed.append(node)
            sizes.append(f"{math.prod(first[1:])} and {math.prod(second[1:])}")
    if not blamed:
        return None
    message = (
        f"Caffe stops while it builds the net: the bottoms of {named(blamed)} hold {'; '.join(sizes)} "
        "entries a sample."
    )
    return Blame(blamed, message, "Pool the larger map, so that both have the same height and width.")


@pitfall("euclidean_shapes")
def euclidean_shapes(case: Case) -> Blame | None:
    """Maps of different height and width but equal area, flattened by a Reshape."""
    return _unequal_layouts(case, flattened=True)


@pitfall("euclidean_shapes_no_reshape")
def euclidean_shapes_no_reshape(case: Case) -> Blame | None:
    """Maps of different height and width but equal area."""
    return _unequal_layouts(case, flattened=False)


def _unequal_layouts(case: Case, *, flattened: bool) -> Blame | None:
    blamed, layouts = [], []
    for meeting in case.attention.meetings:
        both = [side.branch for side in meeting.sides if side.branch]
        if len(both) != 2 or any(_flattens(branch) for branch in both) != flattened:
            continue
        first, second = (_layout(case, branch) for branch in both)
        if first and second and first != second and math.prod(first) == math.prod(second):
            blamed.append(meeting.node)
            layouts.append(f"{first[0]}x{first[1]} and {second[0]}x{second[1]}")
    if not blamed:
        return None
    message = (
        f"The maps of {named(blamed)} are {'; '.join(layouts)}, of equal area: only counts are compared, so "
        "each position of one map is compared with an unrelated position of the other. Caffe says nothing."
    )
    return Blame(blamed, message, "Compare maps of equal height and width.")


def _flattens(branch: Branch) -> bool:
    return any(node.type in FLATTENING for node in branch.nodes)


def _layout(case: Case, branch: Branch) -> tuple[int, ...] | None:
    """(h, w) of a map, before a Reshape made one axis of them."""
    blob: Blob = branch.end
    for node in reversed(branch.nodes):
        if node.type == "Pooling":
            break
        if node.type in FLATTENING:
            blob = node.inputs[0]
    shape = case.graph.shape(blob)
    return shape[2:] if shape and len(shape) == 4 else None


@pitfall("attention_without_loss")
def attention_without_loss(case: Case) -> Blame | None:
    """In a net that trains, maps that reach no loss, or one of weight 0."""
    if not case.train or not any(weight for node in case.graph.nodes for weight in node.loss_weights):
        return None
    met = {side.branch for meeting in case.attention.meetings for side in meeting.sides}
    loose = [branch.nodes[-1] for branch in case.attention.branches if branch not in met]
    loose = [node for node in loose if not counts(case, node)]
    comparing = [meeting.node for meeting in case.attention.meetings]
    weightless = [node for node in comparing if _stated_to_be_nothing(case, node)]
    blamed = loose + weightless
    if not blamed:
        return None
    message = (
        f"The maps at {named(blamed)} add nothing to the loss, so no attention is transferred. Caffe says "
        "nothing."
    )
    return Blame(blamed, message, "Compare them in a loss with a loss_weight other than 0.")


def _stated_to_be_nothing(case: Case, node: Node) -> bool:
    """Whether maps are compared with the weight 0 alone; a Python layer without weight is another pitfall."""
    left_out = node.type == "Python" and not node.spec.loss_weight
    return not (left_out or counts(case, node) or watches(case, node))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
