"""Finding attention transfer in a net by its structure: the branches, where they meet, and the teacher.

Names mean nothing here. A branch is a chain of one-bottom layers, from the tapped activation: [Reshape]
AbsVal, Power ..., a 1x1 Convolution to one channel, then Normalize and what else keeps a map a map. Where the
ends of branches meet, in a EuclideanLoss, a Python layer or the like, student and teacher are compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from attention_transfer.caffe.graph import Blob, Graph, Node

OF_THE_ENERGY = {"Power", "AbsVal", "Reshape", "Flatten"}  # between the tap and the 1x1 Convolution
OF_THE_MAP = {"Normalize", "Power", "Reshape", "Flatten", "Pooling", "Crop", "Python"}  # behind it


@dataclass(eq=False)
class Branch:
    """One attention map.

    Attributes:
        tap: the activation it is made of.
        energy: the layers before the 1x1 Convolution, in order from the tap.
        convolution: the sum over channels.
        tail: the layers behind it, in order.
        end: the map, as it is compared.
    """

    tap: Blob
    energy: list[Node]
    convolution: Node
    tail: list[Node]
    end: Blob

    @property
    def nodes(self) -> list[Node]:
        return [*self.energy, self.convolution, *self.tail]


@dataclass(eq=False)
class Side:
    """One bottom of a layer where maps meet: its branch, if it has one, and the network below."""

    bottom: int
    branch: Branch | None
    trunk: set[Node]


@dataclass(eq=False)
class Meeting:
    """A layer that compares maps; `teachers` are those of its sides that are not to learn."""

    node: Node
    sides: list[Side]
    teachers: list[Side] = field(default_factory=list)


class Attention:
    """What a net has of attention transfer.

    Attributes:
        branches: all of them, those that meet nothing too.
        meetings: the layers where branches end.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.meetings = [meeting for node in graph.nodes if (meeting := _meeting(graph, node))]
        met = [side.branch for meeting in self.meetings for side in meeting.sides if side.branch]
        self.branches = [*met, *_loose_branches(graph, {branch.convolution for branch in met})]
        for meeting in self.meetings:
            meeting.teachers = _teachers(meeting, self.task_layers)

    @cached_property
    def branch_nodes(self) -> set[Node]:
        return {node for branch in self.branches for node in branch.nodes}

    @cached_property
    def task_layers(self) -> set[Node]:
        """What lies below a loss that compares one network with something that nothing learns, a label."""
        compared = self.graph.above(meeting.node for meeting in self.meetings)
        compared |= {meeting.node for meeting in self.meetings}
        found: set[Node] = set()
        for node in self.graph.nodes:
            if node in compared or not any(node.loss_weights):
                continue
            learned = [blob for blob in node.inputs if any(n.blob_count for n in self.graph.below([blob]))]
            if len(learned) == 1:
                found |= self.graph.below(learned)
        return found

    @cached_property
    def student(self) -> set[Node]:
        """The layers below the sides that learn, short of those that the teacher has too."""
        return self._private(False)

    @cached_property
    def teacher(self) -> set[Node]:
        """The teacher's layers, also those behind its taps that its maps do not need."""
        own = self._private(True)
        behind = self.graph.above(own) - self.graph.above(self.student) - self.student - self.branch_nodes
        return own | (behind - {meeting.node for meeting in self.meetings})

    def _private(self, teacher: bool) -> set[Node]:
        found: set[Node] = set()
        for meeting in self.meetings:
            theirs = [side for side in meeting.sides if (side in meeting.teachers) == teacher]
            others = [side for side in meeting.sides if (side in meeting.teachers) != teacher]
            if meeting.teachers:
                found |= _union(theirs) - _union(others)
        return found


def _union(sides: list[Side]) -> set[Node]:
    return set().union(*(side.trunk for side in sides))


def is_map_convolution(node: Node) -> bool:
    """Whether a layer sums channels to one map: a 1x1 Convolution with one output."""
    given = node.spec.convolution_param
    sizes = {*given.kernel_size, *([given.kernel_h, given.kernel_w] if given.kernel_h else [])}
    return node.type == "Convolution" and given.num_output == 1 and sizes == {1} and len(node.inputs) == 1


def find_branch(end: Blob) -> Branch | None:
    """The attention branch that ends in this value, if one does."""
    tail, blob = _climb(end, OF_THE_MAP)
    convolution = blob.producer
    if convolution is None or not is_map_convolution(convolution):
        return None
    energy, tap = _climb(convolution.inputs[0], OF_THE_ENERGY)
    energy = _from_the_absolute_value(energy)
    if energy:
        tap = energy[0].inputs[0]
    made_positive = any(node.type in ("AbsVal", "Power") for node in energy)
    if not made_positive and not any(is_normalize(node) for node in tail):
        return None
    return Branch(tap if energy else convolution.inputs[0], energy, convolution, tail, end)


def is_normalize(node: Node) -> bool:
    """Whether a layer makes maps of length 1: SSD's Normalize, or a Python layer with one bottom and top."""
    return node.type == "Normalize" or (node.type == "Python" and len(node.inputs) == len(node.outputs) == 1)


def _climb(blob: Blob, types: set[str]) -> tuple[list[Node], Blob]:
    """The chain of layers of these types that ends in `blob`, in order, and what it starts from."""
    chain: list[Node] = []
    while (node := blob.producer) and node.type in types and len(node.outputs) == 1:
        if len(node.inputs) != (2 if node.type == "Crop" else 1):
            break
        chain.insert(0, node)
        blob = node.inputs[0]
    return chain, blob


def _from_the_absolute_value(energy: list[Node]) -> list[Node]:
    """A branch begins with its AbsVal and the Reshape before it: a Power below that is the network's own."""
    first = max((i for i, node in enumerate(energy) if node.type == "AbsVal"), default=0)
    while first and energy[first - 1].type in ("Reshape", "Flatten"):
        first -= 1
    return energy[first:]


def _meeting(graph: Graph, node: Node) -> Meeting | None:
    if len(node.inputs) < 2:
        return None
    branches = [find_branch(blob) for blob in node.inputs]
    found = sum(branch is not None for branch in branches)
    compares = node.type.endswith("Loss") or node.type == "Python" or found >= 2
    if not found or not compares:
        return None
    sides = []
    for bottom, (blob, branch) in enumerate(zip(node.inputs, branches, strict=True)):
        trunk = graph.below([branch.tap if branch else blob])
        sides.append(Side(bottom, branch, {below for below in trunk if below.type != "Input"}))
    return Meeting(node, sides)


def _loose_branches(graph: Graph, known: set[Node]) -> list[Branch]:
    """Branches that end in a Normalize, or in nothing, and meet no other."""
    found = []
    for node in graph.nodes:
        if not is_map_convolution(node) or node in known:
            continue
        end = node.outputs[0]
        while len(end.users) == 1 and end.users[0][0].type in OF_THE_MAP and end.users[0][0].outputs:
            end = end.users[0][0].outputs[0]
        branch = find_branch(end)
        if branch and branch.energy and any(is_normalize(node) for node in branch.tail):
            found.append(branch)
    return found


def _teachers(meeting: Meeting, task_layers: set[Node]) -> list[Side]:
    """The sides that are not to learn, none where nothing tells.

    The student is what has a task of its own, a cross-entropy. Where both have one, or neither, the teacher
    is the side that `propagate_down: false` cuts off, or else the one with frozen layers.
    """
    own = {side: _own_layers(side, meeting) for side in meeting.sides}
    with_blobs = [side for side in meeting.sides if any(node.blob_count for node in own[side])]
    with_task = [side for side in with_blobs if own[side] & task_layers]
    without = [side for side in with_blobs if side not in with_task]
    if with_task and without:
        return without
    frozen = [side for side in with_blobs if any(map(_states_frozen, own[side]))]
    down = list(meeting.node.spec.propagate_down)
    cut = [side for side in with_blobs if down[side.bottom : side.bottom + 1] == [False]]
    if cut and (not with_task or set(cut) <= set(frozen)):
        return cut
    return frozen if len(frozen) < len(with_blobs) else []


def _own_layers(side: Side, meeting: Meeting) -> set[Node]:
    return side.trunk - _union([other for other in meeting.sides if other is not side])


def _states_frozen(node: Node) -> bool:
    return node.type != "BatchNorm" and any(lr == 0 for lr, _ in node.multipliers)
