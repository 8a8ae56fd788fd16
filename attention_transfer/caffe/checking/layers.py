"""Mistakes in single layers and their names, in nets of any kind."""

from __future__ import annotations

from attention_transfer.caffe.checking.rules import Blame, Case, named, pitfall
from attention_transfer.caffe.graph import Node, tests_always
from attention_transfer.caffe.layers import FORKS
from attention_transfer.caffe.layers.pieces import count_windows

OWN_TOP = "Give it a top of its own name."
RECTIFIERS = {"AbsVal", "ReLU", "PReLU"}
KEEPS_ZEROS = {"Power", "Reshape", "Flatten", "Pooling", "Dropout", "Permute", "Split"}


@pitfall("absval_in_place")
def absval_in_place(case: Case) -> Blame | None:
    """AbsVal whose top is its bottom."""
    blamed = [node for node in case.graph.nodes if node.type == "AbsVal" and node.in_place]
    return _refused_in_place(blamed, "its backward pass needs the signs")


@pitfall("reshape_in_place")
def reshape_in_place(case: Case) -> Blame | None:
    """Reshape or Flatten whose top is its bottom."""
    blamed = [node for node in case.graph.nodes if node.type in ("Reshape", "Flatten") and node.in_place]
    return _refused_in_place(blamed, "it shares its bottom's memory anyway")


def _refused_in_place(nodes: list[Node], why: str) -> Blame | None:
    if not nodes:
        return None
    kinds = " and ".join(sorted({node.type for node in nodes}))
    message = f"Caffe stops while it builds the net at {named(nodes)}: {kinds} must not write onto its bottom"
    return Blame(nodes, f"{message} ({why}).", OWN_TOP)


@pitfall("power_in_place")
def power_in_place(case: Case) -> Blame | None:
    """Power, of another power than 0 and 1, whose top is its bottom, where a gradient may pass."""
    blamed = [node for node in _powers_in_place(case) if node.spec.power_param.power != 1]
    if not blamed:
        return None
    message = (
        f"Values are right, gradients are not: in its backward pass {named(blamed)} reads the bottom that "
        "it has overwritten and overwrites the gradient that it is still to multiply by, so what comes out "
        "does not depend on the loss at all. Caffe says nothing."
    )
    return Blame(blamed, message + case.unless_cut(blamed), OWN_TOP)


@pitfall("power_1_in_place")
def power_1_in_place(case: Case) -> Blame | None:
    """A linear Power whose top is its bottom, where a gradient may pass."""
    blamed = [node for node in _powers_in_place(case) if node.spec.power_param.power == 1]
    if not blamed:
        return None
    message = (
        f"Values are right, gradients are not: the backward pass of {named(blamed)} writes its scale over "
        "the gradient, then multiplies it by itself: the square of the scale everywhere, whatever the loss "
        "says. Caffe says nothing."
    )
    return Blame(blamed, message + case.unless_cut(blamed), OWN_TOP)


def _powers_in_place(case: Case) -> list[Node]:
    def constant(node: Node) -> bool:
        return node.spec.power_param.power * node.spec.power_param.scale == 0

    powers = [node for node in case.graph.nodes if node.type == "Power" and node.in_place]
    return [node for node in powers if not constant(node) and case.matters(node)]


@pitfall("power_3_at_zero")
def power_3_at_zero(case: Case) -> Blame | None:
    """A power of more than 1, but 2 and 4, without shift, on activations that can be 0."""
    blamed = [node for node, power in _powers_at_zero(case) if power != 4 and not 0 < power < 1]
    return _not_a_number(case, blamed, "Add a small shift, such as 1e-6, or compose the power of squarings.")


@pitfall("power_4_at_zero")
def power_4_at_zero(case: Case) -> Blame | None:
    """The power 4 in one layer, without shift, on activations that can be 0."""
    blamed = [node for node, power in _powers_at_zero(case) if power == 4]
    return _not_a_number(case, blamed, "Put two Power layers of power 2 in its place, one after the other.")


@pitfall("power_half_at_zero")
def power_half_at_zero(case: Case) -> Blame | None:
    """A root, a power between 0 and 1, without shift, on activations that can be 0."""
    blamed = [node for node, power in _powers_at_zero(case) if 0 < power < 1]
    return _not_a_number(case, blamed, "Add a small shift: with 1e-6 the gradient stays finite.")


def _powers_at_zero(case: Case) -> list[tuple[Node, float]]:
    """Power layers that divide by their bottom on the way back: in a branch, or behind what rectifies."""
    found = []
    for node in case.graph.nodes:
        if node.type != "Power" or not case.matters(node):
            continue
        given = node.spec.power_param
        divides = given.power not in (0, 1, 2) and given.scale != 0 and given.shift == 0
        if divides and (node in case.attention.branch_nodes or _rectified(node)):
            found.append((node, given.power))
    return found


def _rectified(node: Node) -> bool:
    while node.inputs and (below := node.inputs[0].producer):
        if below.type in RECTIFIERS:
            return True
        if below.type not in KEEPS_ZEROS or (below.type == "Power" and below.spec.power_param.shift != 0):
            return False
        node = below
    return False


def _not_a_number(case: Case, nodes: list[Node], mend: str) -> Blame | None:
    if not nodes:
        return None
    message = (
        f"The gradient of {named(nodes)} is NaN wherever the activation is 0, and after a ReLU many are: "
        "Caffe computes it as power * y / x, which is 0 / 0 there. It says nothing."
    )
    return Blame(nodes, message + case.unless_cut(nodes), mend)


@pitfall("normalize_in_place")
def normalize_in_place(case: Case) -> Blame | None:
    """SSD's Normalize whose top is its bottom, where a gradient may pass."""
    nodes = [node for node in case.graph.nodes if node.type == "Normalize" and node.in_place]
    blamed = [node for node in nodes if case.matters(node)]
    if not blamed:
        return None
    message = (
        f"The loss is right, but {named(blamed)} overwrites the gradient that its backward pass still "
        "reads, and exactly 0 comes out: the branch never learns. Caffe says nothing."
    )
    return Blame(blamed, message + case.unless_cut(blamed), OWN_TOP)


@pitfall("pooling_empty_window")
def pooling_empty_window(case: Case) -> Blame | None:
    """Pooling whose last window lies outside of its bottom, which Caffe's rounding up allows."""
    blamed = [node for node in case.graph.nodes if node.type == "Pooling" and _has_empty_window(case, node)]
    if not blamed:
        return None
    message = (
        f"Rounding up gives {named(blamed)} a last window that lies wholly outside of the image: its output "
        "is -3.4e38 (MAX) or not a number (AVE), and a backward pass writes beyond the blob. Caffe says "
        "nothing."
    )
    return Blame(blamed, message, "Take a kernel at least as large as the stride.")


def _has_empty_window(case: Case, node: Node) -> bool:
    given, shape = node.spec.pooling_param, case.graph.shape(node.inputs[0])
    if given.global_pooling or shape is None or len(shape) != 4:
        return False
    if given.pad or given.pad_h or given.pad_w:  # with padding, Caffe leaves such windows out
        return False
    for side, size in (("h", shape[2]), ("w", shape[3])):
        kernel = getattr(given, f"kernel_{side}") or given.kernel_size
        stride = getattr(given, f"stride_{side}") or given.stride
        if kernel and stride and (count_windows(size, kernel, stride, 0, drop=False) - 1) * stride >= size:
            return True
    return False


@pitfall("softmax_loss_two_tops")
def softmax_loss_two_tops(case: Case) -> Blame | None:
    """SoftmaxWithLoss that gives out its probabilities."""
    blamed = [node for node in case.graph.nodes if node.type == "SoftmaxWithLoss" and len(node.spec.top) > 1]
    if not blamed:
        return None
    message = (
        f"Caffe's SSD branch stops while it builds the net at {named(blamed)}: SoftmaxWithLoss sets the loss "
        "weight of one top, and it has two."
    )
    return Blame(blamed, message, "Leave the second top out and take the probabilities from a Softmax layer.")


@pitfall("accuracy_with_force_backward")
def accuracy_with_force_backward(case: Case) -> Blame | None:
    """Accuracy in the TRAIN phase of a net with force_backward."""
    blamed = [node for node in case.graph.nodes if node.type == "Accuracy"]
    if not (blamed and case.train and case.graph.force_backward):
        return None
    message = (
        "Caffe stops in the first backward pass, with 'Not Implemented Yet': force_backward sends one "
        f"through {named(blamed)} too, and Accuracy has none."
    )
    return Blame(blamed, message, "Take force_backward out, or give Accuracy `include { phase: TEST }`.")


@pitfall("python_loss_without_weight")
def python_loss_without_weight(case: Case) -> Blame | None:
    """A Python layer that compares maps, or is called a loss, whose value reaches no loss weight.

    Beside a loss that does compare the same maps, it may be meant for watching.
    """
    comparing = {meeting.node for meeting in case.attention.meetings}
    blamed = [
        node
        for node in case.graph.nodes
        if node.type == "Python" and not node.spec.loss_weight and not counts(case, node)
        if (node in comparing or _is_called_loss(node)) and not watches(case, node)
    ]
    if not (blamed and case.train):
        return None
    message = (
        f"The value of {named(blamed)} is printed but counts for nothing, and all its gradients are 0: to "
        "Caffe a Python layer is no loss layer, its loss weight is 0 unless stated. Caffe says nothing."
    )
    return Blame(blamed, message, "Add loss_weight: 1.")


def _is_called_loss(node: Node) -> bool:
    return node.spec.python_param.layer.lower().endswith(("loss", "losslayer"))


def watches(case: Case, node: Node) -> bool:
    """Whether another loss that counts reads the very bottoms of this one."""
    twins = (user for blob in node.inputs[:1] for user, _ in blob.users)
    return any(twin.inputs == node.inputs and counts(case, twin) for twin in twins)


def counts(case: Case, node: Node) -> bool:
    """Whether a layer's top adds to the net's loss, by itself or through layers above."""
    return any(weight for above in {node, *case.graph.above([node])} for weight in above.loss_weights)


@pitfall("dropout_of_all")
def dropout_of_all(case: Case) -> Blame | None:
    """A Dropout of everything, in the TRAIN phase."""
    blamed = [
        node
        for node in case.graph.nodes
        if case.train and node.type == "Dropout" and node.spec.dropout_param.dropout_ratio == 1
    ]
    if not blamed or all(tests_always(node.spec) for node in blamed):
        return None
    message = f"What {named(blamed)} gives in training is 0 times infinity, not a number. Caffe says nothing."
    return Blame(blamed, message, "Take a dropout_ratio below 1.")


@pitfall("layer_of_a_fork")
def layer_of_a_fork(case: Case) -> Blame | None:
    """Layers that neither stock Caffe nor the SSD fork has."""
    blamed = [node for node in case.graph.nodes if node.type in FORKS]
    if not blamed:
        return None
    kinds = "; ".join(f"{kind} is {FORKS[kind]}" for kind in sorted({node.type for node in blamed}))
    message = f"Neither stock Caffe nor the SSD fork has the types of {named(blamed)}: {kinds}."
    return Blame(blamed, message, "Train it in this package, or in a Caffe that has them.", note=True)


@pitfall("engine_cudnn")
def engine_cudnn(case: Case) -> Blame | None:
    """Layers that ask for cuDNN."""
    blamed = [node for node in case.graph.nodes if _asks_for_cudnn(node)]
    if not blamed:
        return None
    message = f"A Caffe without cuDNN, such as one for CPUs, stops at {named(blamed)}: unknown engine."
    return Blame(blamed, message, "Leave the engine out: Caffe takes cuDNN where it has it.", note=True)


def _asks_for_cudnn(node: Node) -> bool:
    params = [value for field, value in node.spec.ListFields() if field.name.endswith("_param")]
    engines = [param for param in params if "engine" in param.DESCRIPTOR.fields_by_name]
    return any(param.engine == param.CUDNN for param in engines)


@pitfall("plateau_of_the_ssd_fork")
def plateau_of_the_ssd_fork(case: Case) -> Blame | None:
    """A learning rate policy that stock Caffe has not."""
    if case.solver is None or case.solver.lr_policy != "plateau":
        return None
    message = "The solver's lr_policy 'plateau' is the SSD fork's; stock Caffe stops at the first iteration."
    return Blame(
        [], message, "Name the iterations yourself: lr_policy 'multistep' with stepvalue.", note=True
    )


@pitfall("same_layer_name")
def same_layer_name(case: Case) -> Blame | None:
    """Two layers of one name in one phase, at least one of them with parameters."""
    by_name: dict[str, list[Node]] = {}
    for node in case.graph.nodes:
        by_name.setdefault(node.name, []).append(node)
    several = [
        nodes for nodes in by_name.values() if len(nodes) > 1 and any(node.blob_count for node in nodes)
    ]
    blamed = [node for nodes in several for node in nodes]
    if not blamed:
        return None
    message = (
        f"Several layers have the name of {named(blamed)}. Loading a caffemodel fills the first of them "
        "only; saving writes them all, so the saved file, loaded again, puts the last one's weights into "
        "the first. Caffe says nothing."
    )
    return Blame(blamed, message, "Give each a name of its own, in the caffemodel too.")


@pitfall("same_parameter_name_multipliers")
def same_parameter_name_multipliers(case: Case) -> Blame | None:
    """Sharers of a parameter that state different multipliers."""
    blamed = [
        node
        for sharers in case.graph.shared.values()
        for key in ("lr_mult", "decay_mult")
        if len({getattr(param, key) for _, param in sharers if param.HasField(key)}) > 1
        for node, _ in sharers
    ]
    if not blamed:
        return None
    message = (
        f"Caffe stops while it builds the net: {named(blamed)} share a parameter but state other multipliers."
    )
    return Blame(
        blamed, message, "Give the parameters different names, or none; or state the same multipliers."
    )


@pitfall("tap_before_in_place_relu")
def tap_before_in_place_layer(case: Case) -> Blame | None:
    """A value that several layers read, one of which overwrites it."""
    blamed: list[Node] = []
    overwriting: list[Node] = []
    for node in case.graph.nodes:
        for blob in node.outputs:
            writers = [user for user, _ in blob.users if blob.name in user.spec.top]
            weighted = dict(zip(node.outputs, node.loss_weights, strict=False)).get(blob)
            if writers and (len(blob.users) > 1 or weighted):
                overwriting += writers
                blamed += [user for user, _ in blob.users]
    if not blamed:
        return None
    message = (
        f"Caffe stops while it builds the net, with 'produced by multiple sources': {named(blamed)} read one "
        f"blob, so it is split, but {named(overwriting)} writes onto it in place."
    )
    mend = (
        "Place the other reader behind the in-place layer, whose result it then sees, or give that a top "
        "of its own."
    )
    return Blame(blamed, message, mend)
