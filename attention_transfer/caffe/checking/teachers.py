"""Mistakes in freezing the teacher, in nets that have one: see `attention.py` for how it is told."""

from __future__ import annotations

from attention_transfer.caffe.checking.rules import Blame, Case, named, pitfall
from attention_transfer.caffe.graph import Node, tests_always

FREEZE = "Give each of their blobs a `param { lr_mult: 0 decay_mult: 0 }`"
CUT = "`propagate_down: true propagate_down: false` on the loss that compares the maps"


@pitfall("teacher_trains")
def teacher_trains(case: Case) -> Blame | None:
    """Teacher layers with nothing frozen, into which a gradient comes."""
    blamed = [node for node in _learning(case) if not _frozen_blobs(case, node)]
    if all(node.type == "Scale" for node in blamed):
        return None
    message = f"The teacher learns to look like the student, at {named(blamed)}. Caffe says nothing."
    return Blame(blamed, message, f"{FREEZE}, and {CUT}.")


@pitfall("teacher_scale_trains")
def teacher_scale_trains(case: Case) -> Blame | None:
    """The Scale layers behind BatchNorm are all that was not frozen."""
    blamed = [node for node in _learning(case) if not _frozen_blobs(case, node)]
    if not blamed or any(node.type != "Scale" for node in blamed):
        return None
    message = (
        f"The teacher is frozen but for {named(blamed)}, which learns: the factor and the shift that a "
        "BatchNorm lacks are parameters of the Scale layer behind it. Caffe says nothing."
    )
    return Blame(blamed, message, f"{FREEZE}, two of them on a Scale with bias_term, and {CUT}.")


@pitfall("teacher_bias_trains")
def teacher_bias_trains(case: Case) -> Blame | None:
    """Teacher layers with fewer `param` entries than blobs, into which a gradient comes."""
    blamed = [node for node in _learning(case) if _frozen_blobs(case, node)]
    if not blamed:
        return None
    message = (
        f"One `param` entry freezes one blob: of {named(blamed)} another, the bias, has the default lr_mult "
        "1 and learns. Caffe says nothing."
    )
    return Blame(blamed, message, f"{FREEZE}: two entries for a weight and a bias.")


@pitfall("teacher_decays")
def teacher_decays(case: Case) -> Blame | None:
    """Teacher layers that get no gradient but weight decay; harmless where the solver has none."""
    blamed = [node for node in _unfrozen(case) if node not in case.graph.backward]
    blamed = [node for node in blamed if any(lr and decay for lr, decay in case.graph.multipliers(node))]
    if not (blamed and case.decays):
        return None
    message = (
        f"No gradient comes to {named(blamed)}, yet weight decay pulls the teacher's weights to 0 in every "
        "step. Caffe says nothing."
    )
    return Blame(blamed, message, f"{FREEZE}.")


def _learning(case: Case) -> list[Node]:
    return [node for node in _unfrozen(case) if node in case.graph.backward]


def _unfrozen(case: Case) -> list[Node]:
    """Teacher layers with a blob that the solver may move; what the student shares is another pitfall."""
    if not case.train:
        return []
    return [
        node
        for node in case.graph.nodes
        if node in case.attention.teacher
        and node.type != "BatchNorm"
        and not _shared_with_student(case, node)
        if any(lr for lr, _ in case.graph.multipliers(node))
    ]


def _frozen_blobs(case: Case, node: Node) -> bool:
    return any(lr == 0 for lr, _ in case.graph.multipliers(node))


@pitfall("teacher_batchnorm_moves")
def teacher_batchnorm_moves(case: Case) -> Blame | None:
    """BatchNorm layers of the teacher that are left to the phase."""
    blamed = [
        node
        for node in case.graph.nodes
        if case.train and node in case.attention.teacher and node.type in ("BatchNorm", "BN")
        if not (_uses_stored(node) or tests_always(node.spec))
    ]
    if not blamed:
        return None
    message = (
        f"In the TRAIN phase {named(blamed)} of the teacher normalises by the batch, and its stored "
        "statistics move with every forward pass, lr_mult 0 or not. Caffe says nothing."
    )
    own = any(node.type == "BatchNorm" for node in blamed)
    setting = "batch_norm_param { use_global_stats: true }" if own else "bn_param { frozen: true }"
    return Blame(blamed, message, f"Set {setting}.")


def _uses_stored(node: Node) -> bool:
    if node.type == "BN":
        return node.spec.bn_param.frozen or node.blob_count == 2
    return node.spec.batch_norm_param.use_global_stats


@pitfall("teacher_backward_runs")
def teacher_backward_runs(case: Case) -> Blame | None:
    """A wholly frozen teacher with BatchNorm through which the backward pass runs all the same."""
    graph, attention = case.graph, case.attention
    if not case.train or graph.force_backward or _unfrozen(case):
        return None
    asking = {node for node in attention.teacher & graph.backward if node.type == "BatchNorm"}
    losses = [
        meeting.node
        for meeting in attention.meetings
        for side in meeting.teachers
        if meeting.node.inputs[side.bottom] in graph.gradients and side.trunk & asking
    ]
    if not (asking and losses):
        return None
    message = (
        f"Nothing of the teacher learns, but the whole backward pass through it runs: {named(asking)} asks "
        f"for one, as every BatchNorm does (Caffe drops its three `param` entries), and {named(losses)} "
        "sends it a gradient. Caffe says nothing."
    )
    return Blame([*asking, *losses], message, f"Set {CUT}.")


@pitfall("force_backward_overrides")
def force_backward_overrides(case: Case) -> Blame | None:
    """force_backward in a net whose teacher is cut off or frozen; in other nets it may be meant."""
    if not (case.train and case.graph.force_backward):
        return None
    blamed = [
        meeting.node
        for meeting in case.attention.meetings
        if False in meeting.node.spec.propagate_down
        or any(_frozen_blobs(case, node) for side in meeting.teachers for node in side.trunk)
    ]
    if not blamed:
        return None
    message = (
        f"force_backward switches every gradient back on that {named(blamed)} or lr_mult 0 cuts off, those "
        "of frozen parameters included: wasted work"
    )
    clip = case.solver is not None and case.solver.clip_gradients > 0
    message += ", and this solver's clip_gradients counts them, so that the student's" if clip else ""
    message += (
        " steps shrink. Caffe says nothing."
        if clip
        else ", and clip_gradients counts them. Caffe says nothing."
    )
    return Blame(blamed, message, "Take force_backward out of the training net.")


@pitfall("same_parameter_name")
def same_parameter_name(case: Case) -> Blame | None:
    """A parameter that student and teacher name alike, unless both are to be frozen."""
    blamed: set[Node] = set()
    for sharers in case.graph.shared.values():
        stated = {param.lr_mult for _, param in sharers if param.HasField("lr_mult")}
        nodes = {node for node, _ in sharers}
        students = [param for node, param in sharers if node in case.attention.student]
        meant = all(param.HasField("lr_mult") and param.lr_mult == 0 for param in students)
        if nodes & case.attention.teacher and students and not meant and len(stated) < 2:
            blamed |= nodes
    if not (blamed and case.train):
        return None
    message = (
        f"{named(blamed)[0].upper()}{named(blamed)[1:]} name the same parameters, so they are one blob, "
        "with one multiplier: the teacher's lr_mult 0 stops the student's layer from learning, or without "
        "one the teacher learns. Caffe says nothing."
    )
    return Blame(blamed, message, "Give the parameters different names, or none.")


def _shared_with_student(case: Case, node: Node) -> bool:
    sharing = ({sharer for sharer, _ in sharers} for sharers in case.graph.shared.values())
    return any(node in nodes and nodes & case.attention.student for nodes in sharing)


@pitfall("teacher_dropout")
def teacher_dropout(case: Case) -> Blame | None:
    """Dropout below a tap of the teacher, in the TRAIN phase."""
    below = {node for meeting in case.attention.meetings for side in meeting.teachers for node in side.trunk}
    blamed = [
        node
        for node in case.graph.nodes
        if case.train and node in below & case.attention.teacher
        if node.type == "Dropout" and node.spec.dropout_param.dropout_ratio and not tests_always(node.spec)
    ]
    if not blamed:
        return None
    message = (
        f"In the TRAIN phase {named(blamed)} drops activations of the teacher, so its maps are noisy. Caffe "
        "says nothing."
    )
    return Blame(blamed, message, "Take it out of the teacher, which is the identity in the TEST phase.")
