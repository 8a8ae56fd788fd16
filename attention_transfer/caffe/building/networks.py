"""What `build` needs to know of a student or a teacher: its images, its blobs, and the ends of its stages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from attention_transfer._errors import InputError
from attention_transfer._hints import did_you_mean
from attention_transfer.caffe import schema
from attention_transfer.caffe.assembly import try_out
from attention_transfer.caffe.graph import Blob, Graph, Node, in_phase, select
from attention_transfer.caffe.layers import Layer
from attention_transfer.caffe.sizes import with_known_sizes

CONVOLUTIONS = {"Convolution", "DepthwiseConvolution", "ConvolutionDepthwise"}
WEIGHTED = {*CONVOLUTIONS, "Deconvolution"}
BLOCK_ENDS = {"Eltwise", "Concat", "Axpy"}
ACTIVATIONS = {"ReLU", "PReLU", "ELU", "ReLU6"}
BEHIND = {"BatchNorm", "BN", "Scale", "Bias", "Sigmoid", "TanH", *ACTIVATIONS, *BLOCK_ENDS}
RESAMPLING = {"Deconvolution", "Crop", "Interp", "Reshape", "Flatten", "Permute"}


@dataclass(eq=False)
class Network:
    """A student or a teacher in the phase in which it will run.

    Attributes:
        role: "student" or "teacher".
        net: its NetParameter; of the student with the layers of all phases.
        graph: the layers of that phase, with shapes as far as they are known.
        image: the blob of images.
        layers: those layers that could be built, by their place among all of the net.
    """

    role: str
    net: Any
    graph: Graph
    image: Blob
    layers: dict[int, Layer]

    @property
    def title(self) -> str:
        return self.net.name or f"a {self.role} without a name"

    @cached_property
    def seen(self) -> list[Blob]:
        """The last values of all blobs that depend on the images, in order."""
        nodes = self.graph.readers(self.image)
        return [blob for blob in self.graph.last.values() if blob.producer in nodes]

    def raster(self, blob: Blob) -> list[tuple[float, float]] | None:
        """For each spatial axis, (step, start) in pixels of the image of the centres of a map's positions.

        None where the layers between do not tell.
        """
        chain: list[Node] = []
        while blob is not self.image:
            node = blob.producer
            if node is None or not node.inputs or node.type in RESAMPLING or node.index not in self.layers:
                return None
            chain.append(node)
            blob = node.inputs[0]
        steps, starts = [1.0, 1.0], [0.0, 0.0]
        for node in reversed(chain):
            layer: Any = self.layers[node.index]
            if not (node.type in CONVOLUTIONS or node.type == "Pooling") or not hasattr(layer, "kernel"):
                continue
            for axis, dilation in enumerate(getattr(layer, "dilation", (1, 1))):
                half = dilation * (layer.kernel[axis] - 1) / 2
                starts[axis] += steps[axis] * (half - layer.pad[axis])
                steps[axis] *= layer.stride[axis]
        return list(zip(steps, starts, strict=True))

    def tap(self, name: str) -> Blob:
        """The last value of a blob, to make a map of.

        Raises:
            ValueError: if there is none of that name, or it is no map.
        """
        names = [blob.name for blob in self.seen]
        if name not in names:
            remedy = did_you_mean(name, names) or f"Known: {', '.join(names[:12])}."
            raise InputError(f"build: expected a blob of the {self.role}, got {name!r}. {remedy}")
        blob = self.graph.last[name]
        shape = self.graph.shape(blob)
        if shape is not None and len(shape) != 4:
            raise InputError(
                f"build: expected a blob of four axes in the {self.role}, got {name!r} of shape {shape}. "
                "Tap a layer before the classifier."
            )
        return blob


def survey_student(net: Any, channels: int | None = None) -> Network:
    """The student, in the phase TRAIN.

    Args:
        channels: of its images, where they are known from elsewhere.

    Raises:
        ValueError: if it does not hold together, or has several blobs of images, or overwrites them.
    """
    network = _network("student", net, net, "TRAIN", channels)
    if any(network.image.name in node.spec.top for node, _ in network.image.users):
        raise InputError(
            f"build: expected images that the teacher can read too, got {network.image.name!r} overwritten "
            "in place in the student. Give that layer a top of its own."
        )
    return network


def survey_teacher(net: Any, student: Network) -> Network:
    """The teacher as it runs on the student's images, in the phase TEST if it has layers there.

    Raises:
        ValueError: as `survey_student`.
    """
    tested = select(net, "TEST")
    phase = "TRAIN" if Graph(tested).unwritten or not tested.layer else "TEST"
    alone = select(net, phase)
    for layer in alone.layer:
        del layer.include[:], layer.exclude[:]
    network = _network("teacher", net, alone, phase, None)
    shape = student.graph.shape(student.image)
    if shape is None:
        return network
    fed = schema.NetParameter()
    fed.CopyFrom(alone)
    source = network.image.producer
    assert source is not None
    replaced = fed.layer[source.index]
    known = [network.graph.shape(blob) or (shape[0],) for blob in source.outputs]
    known[source.outputs.index(network.image)] = shape
    replaced.CopyFrom(schema.LayerParameter(name=replaced.name, type="Input", top=replaced.top))
    for dims in known:
        replaced.input_param.shape.add(dim=dims)
    return _network("teacher", net, fed, phase, None)


def _network(role: str, net: Any, view: Any, phase: str, channels: int | None) -> Network:
    view = in_phase(view, phase)
    trial = try_out(with_known_sizes(view, channels), phase)
    graph = Graph(view, trial.shapes)
    if graph.unwritten:
        layer, name = graph.unwritten[0]
        raise InputError(
            f"build: expected a {role} whose layers read what layers before them write, got {name!r} in "
            f"layer {layer.name!r}."
        )
    return Network(role, net, graph, _image(graph, role), trial.layers)


def _image(graph: Graph, role: str) -> Blob:
    """The blob that comes from outside and goes into layers with weights."""
    sources = [node for node in graph.nodes if not node.inputs and node.type != "Parameter"]
    found = [
        blob
        for node in sources
        for blob in node.outputs
        if any(reader.blob_count for reader in graph.readers(blob))
    ]
    if len(found) != 1:
        got = ", ".join(blob.name for blob in found) or "none"
        raise InputError(f"build: expected one blob of images that the {role}'s layers read, got {got}.")
    return found[0]


# ------------------------------------------------------------------------------------------------- pairs


def suggest_blobs(student: Network, teacher: Network) -> list[tuple[str, str]]:
    """The ends of the stages of equal resolution, but for one row and column, in the student's order.

    Raises:
        ValueError: if shapes are not known, or no resolution is common to both.
    """
    ours, theirs = resolution_ends(student), resolution_ends(teacher)
    pairs = []
    for size, name in ours.items():
        near = [other for other in theirs if other not in ours and _differ_by_one(size, other)]
        if size in theirs or near:
            pairs.append((name, theirs[size if size in theirs else near[0]]))
    if not pairs:
        sizes = [", ".join(f"{h}x{w}" for h, w in ends) or "none" for ends in (ours, theirs)]
        raise InputError(
            "build: expected convolutions of equal resolution, got maps of "
            f"{sizes[0]} in the student and {sizes[1]} in the teacher. Name the blobs: pairs='a:b,c:d'."
        )
    return pairs


def _differ_by_one(size: tuple[int, int], other: tuple[int, int]) -> bool:
    return max(abs(one - two) for one, two in zip(size, other, strict=True)) == 1


def resolution_ends(network: Network) -> dict[tuple[int, int], str]:
    """The last blob of each resolution (h, w) larger than 1x1, in order, by the rules of `pairs.stage_ends`.

    The end of a stage is its last block, an Eltwise or Concat with the activation behind it; without blocks,
    its last convolution with the norm and activation behind it. Pooling makes no stage. Nor does a stem, one
    layer of reduced resolution, when blocks follow.
    """
    graph, stages = network.graph, _stages(network)
    ends: dict[tuple[int, int], Blob] = {}
    for size, blobs in stages.items():
        blocks = [blob for blob in blobs if _is_block_end(blob)]
        ends[size] = blocks[-1] if blocks else blobs[-1]
    sizes = list(ends)
    image = graph.shape(network.image)
    blocks_follow = any(_is_block_end(ends[size]) for size in sizes[1:])
    if blocks_follow and image and sizes[0] != image[2:] and _is_stem(stages[sizes[0]]):
        del ends[sizes[0]]
    return {size: blob.name for size, blob in ends.items()}


def _stages(network: Network) -> dict[tuple[int, int], list[Blob]]:
    """The values that convolutions make, and what is behind them without another size, by resolution."""
    graph, nodes = network.graph, network.graph.readers(network.image)
    working: set[Blob] = set()
    stages: dict[tuple[int, int], list[Blob]] = {}
    for node in graph.nodes:
        if node not in nodes or len(node.outputs) != 1:
            continue
        shape = graph.shape(node.outputs[0])
        if shape is None or len(shape) != 4 or shape[2] * shape[3] <= 1:
            continue
        users = {user.type for user, _ in node.outputs[0].users}
        if node.type in WEIGHTED and users == {"Permute"}:  # a head of SSD's
            continue
        behind = node.type in BEHIND and any(blob in working for blob in node.inputs)
        if node.type in WEIGHTED or behind:
            working.add(node.outputs[0])
            if graph.last[node.outputs[0].name] is node.outputs[0]:
                stages.setdefault(shape[2:], []).append(node.outputs[0])
    return stages


def _is_block_end(blob: Blob) -> bool:
    """Whether a value is a block's: of an Eltwise or Concat, perhaps with an activation."""
    node = blob.producer
    while node is not None and node.type in ACTIVATIONS:
        node = node.inputs[0].producer
    return node is not None and node.type in BLOCK_ENDS


def _is_stem(blobs: list[Blob]) -> bool:
    """Whether a stage has one convolution, or goes straight into pooling."""
    below = {node for blob in blobs for node in _chain(blob)}
    pooled = all(user.type == "Pooling" for user, _ in blobs[-1].users)
    return sum(node.type in WEIGHTED for node in below) == 1 or pooled


def _chain(blob: Blob) -> list[Node]:
    """The layers from a value down to its convolution."""
    chain: list[Node] = []
    while (node := blob.producer) is not None:
        chain.append(node)
        if node.type in WEIGHTED:
            break
        blob = node.inputs[0]
    return chain
