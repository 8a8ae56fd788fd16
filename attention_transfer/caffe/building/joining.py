"""Putting a student, a frozen teacher and the attention branches between them into one net for training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from attention_transfer._errors import InputError
from attention_transfer._files import write_atomically
from attention_transfer.caffe import schema
from attention_transfer.caffe.assembly import try_out
from attention_transfer.caffe.building.branches import BuiltPair, make_branches, pair_up, python_sources
from attention_transfer.caffe.building.naming import all_names, free_name, free_prefix
from attention_transfer.caffe.building.networks import Network, suggest_blobs, survey_student, survey_teacher
from attention_transfer.caffe.building.options import File, Options
from attention_transfer.caffe.checking import check
from attention_transfer.caffe.files.caffemodel import blob_shape, read_caffemodel, same_shape, write_binary
from attention_transfer.caffe.files.prototxt import read_net, read_solver, write_prototxt
from attention_transfer.caffe.graph import Blob, Node
from attention_transfer.caffe.layers import SSDS_OWN, count_blobs
from attention_transfer.caffe.layers.forks import settle_meaning
from attention_transfer.caffe.sizes import OWN_PARAMS, USUAL, taken_channels, told_channels, with_known_sizes

DEFAULT_NAME = "at_train.prototxt"


@dataclass
class Built:
    """What `build` makes.

    Attributes:
        net: the net, student and teacher and branches, as a NetParameter.
        solver: its SolverParameter; `write` fills in where the net is and where snapshots go.
        weights: the start of the student, and the teacher under its new names; None without any.
        sources: the Python layers that the net needs: their text by the name of the file.
        pairs: what is compared with what.
        notes: what was taken for granted, left out, or runs in some Caffes only.
    """

    net: Any
    solver: Any
    weights: Any
    sources: dict[str, str]
    pairs: list[BuiltPair]
    notes: list[str]
    _comment: str = field(default="", repr=False)

    def write(self, path: File, *, force: bool = False) -> list[Path]:
        """Write the net to `path`, and beside it STEM_solver.prototxt, STEM.caffemodel and the Python layers.

        The solver names the net as `path` does, so Caffe is to be started in the directory that a relative
        `path` counts from.

        Returns:
            The files, the net first, the solver second.

        Raises:
            ValueError: if one of them exists and `force` is not set.
            OSError: if one cannot be written.
        """
        path = Path(path)
        solver_file = path.with_name(f"{path.stem}_solver.prototxt")
        weights_file = path.with_suffix(".caffemodel")
        sources = {path.with_name(name): text for name, text in self.sources.items()}
        files = [path, solver_file, *([weights_file] if self.weights is not None else []), *sources]
        if not force and (there := [str(file) for file in files if file.exists()]):
            listed = ", ".join(there)
            raise InputError(
                f"build: expected new files, got {listed} already there. Pass force to overwrite."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_prototxt(self.net, path, comment=self._comment)
        write_prototxt(self._placed_solver(path), solver_file)
        if self.weights is not None:
            write_binary(self.weights, weights_file)
        for file, text in sources.items():
            write_atomically(file, text)
        return files

    def _placed_solver(self, path: Path) -> Any:
        solver = _copy(self.solver)
        setattr(solver, "train_net" if solver.train_net else "net", path.as_posix())
        solver.snapshot_prefix = path.with_suffix("").as_posix()
        return solver


def build(student: File | Any, teacher: File | Any, options: Options | None = None, **changes: Any) -> Built:
    """One net in which a student learns its task, and to look where a frozen teacher looks.

    The student's layers stay as they are, for both phases; one without a loss gets a label and a
    cross-entropy. The layers of the teacher that a pair needs get new names, take the images of the student,
    are frozen, and are there in TRAIN phase only, as are the branches and losses. Maps of unequal size
    are made equal by average pooling of the larger map, and by a Crop where they differ by one row or column.
    Mistakes that the nets bring are warned about.

    Args:
        student, teacher: prototxts of nets for training or deployment, or NetParameters.
        options: how; see `Options`.
        changes: fields of the options, by name.

    Raises:
        ValueError: if a net, a pair or weights do not fit, in one line.
        OSError: if a file cannot be read.
    """
    options = replace(options or Options(), **changes)
    stored = _stored(options.student_weights), _stored(options.teacher_weights)
    nets = _read(student), _read(teacher)
    for each, weights in zip(nets, stored, strict=True):
        settle_meaning(each.layer, weights)
    channels, notes = _channels(nets, stored, options.channels)
    ours = survey_student(nets[0], channels)
    theirs = survey_teacher(nets[1], ours)
    _compare_images(ours, theirs)
    asked = suggest_blobs(ours, theirs) if options.pairs == "auto" else _parse_pairs(options.pairs)
    taps = [(ours.tap(mine), theirs.tap(other)) for mine, other in asked]
    net = _copy(ours.net)
    net.ClearField("force_backward")
    if _only_detects(ours):
        notes.append(_cut_off(net, ours, [tap for tap, _ in taps]))
    else:
        net.layer.extend(_task(ours))
    prefix = free_prefix(["teacher_"], all_names(net), all_names(theirs.net))
    frozen, renamed = _frozen(theirs, [tap for _, tap in taps], prefix, ours.image.name)
    net.layer.extend(frozen)
    pairs = [pair_up(ours, theirs, mine, other, renamed[other]) for mine, other in taps]
    net.layer.extend(make_branches(options, pairs, all_names(net)))
    net.name = f"{net.name or 'student'}_with_attention_transfer"
    merged = _merged_weights(net, frozen, prefix, stored, channels)
    comment = f"Made by `attention-transfer caffe build`: student {ours.title}, teacher {theirs.title}."
    solver = _solver(options.solver, ours)
    notes += _check_built(net, solver, channels)
    return Built(net, solver, merged, python_sources(options), pairs, notes, comment)


def _check_built(net: Any, solver: Any, channels: int | None) -> list[str]:
    """Warn of mistakes that the nets brought, as what is built here is clean by construction; and notes."""
    notes = []
    for finding in check(net, solver, channels=channels):
        said = f"{finding.message} {finding.mend}"
        if finding.note:
            notes.append(said)
        else:
            warnings.warn(f"build: the nets brought {finding.pitfall} with them. {said}", stacklevel=3)
    if detecting := sorted({layer.type for layer in net.layer} & SSDS_OWN):
        notes.append(f"{', '.join(detecting)}: in the SSD fork alone; `caffe train` cannot run this net.")
    return notes


def _parse_pairs(pairs: str | Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    given = [tuple(pair.split(":")) for pair in pairs.split(",")] if isinstance(pairs, str) else list(pairs)
    named = [tuple(name.strip() for name in pair) for pair in given]
    if not named or any(len(pair) != 2 or not all(pair) for pair in named):
        raise InputError(
            f"build: expected pairs STUDENT_BLOB:TEACHER_BLOB,... or auto, got {pairs!r}. Two names each."
        )
    return [(mine, other) for mine, other in named]


def _compare_images(ours: Network, theirs: Network) -> None:
    """Warn where the teacher was trained on images prepared in another way."""
    mine, other = ours.image.producer, theirs.image.producer
    assert mine is not None and other is not None
    source = next(layer for layer in theirs.net.layer if layer.name == other.name)
    if not source.HasField("transform_param") and not mine.spec.HasField("transform_param"):
        return
    kept = ("scale", "mean_file", "mean_value")
    prepared = [[str(getattr(spec.transform_param, name)) for name in kept] for spec in (mine.spec, source)]
    if source.type in ("Data", "ImageData") and prepared[0] != prepared[1]:
        warnings.warn(
            f"build: the teacher will see the images of {mine.name!r}, but its own {source.name!r} has "
            "another scale or mean. Prepare the student's images as the teacher's.",
            stacklevel=3,
        )


def _stored(weights: File | Any) -> list[Any]:
    """The weights that are given, one NetParameter or none."""
    if weights is None:
        return []
    return [weights if isinstance(weights, schema.NetParameter) else read_caffemodel(weights)]


def _channels(
    nets: tuple[Any, Any], stored: tuple[list[Any], list[Any]], stated: int | None
) -> tuple[int | None, list[str]]:
    """How many channels the student's images have, None where its prototxt says so, and a note about that.

    Raises:
        ValueError: if the weights take others than the data have.
    """
    data = [layer for layer in nets[0].layer if layer.type in OWN_PARAMS]
    if not data:
        return None, []
    files = {layer.data_param.source for layer in data} | {"is_color", "is_color: false"}
    told = next((told for layer in data if (told := told_channels(layer))), None)
    taken = taken_channels(nets[0], "TRAIN", stored[0])
    teachers = taken_channels(nets[1], "TRAIN", stored[1]) or taken_channels(nets[1], "TEST", stored[1])
    if stated is None and taken and told and taken != told[0] and told[1] in files:
        raise InputError(
            f"build: expected images of {taken} channels, as the student's weights take, got {told[0]} in "
            f"{told[1]}. Take the weights of this net, or its data."
        )
    found = [
        (stated, "as stated"),
        (taken, "as the student's weights take"),
        (told and told[0], f"as {told[1]} has" if told else ""),
        (teachers, "as the teacher's weights take"),
        (USUAL, "which is assumed: nothing tells. State the channels if they are others"),
    ]
    count, why = next((count, why) for count, why in found if count)
    return count, [f"images of {count} channel{'s' if count > 1 else ''}, {why}."]


# ------------------------------------------------------------------------------------------ student, teacher


def _only_detects(student: Network) -> bool:
    """Whether a student is a detector of the SSD fork without a loss, as for deployment."""
    nodes = student.graph.nodes
    return not any(weight for node in nodes for weight in node.loss_weights) and any(
        node.type in SSDS_OWN for node in nodes
    )


def _cut_off(net: Any, student: Network, taps: Sequence[Blob]) -> str:
    """Leave out what no tap needs, in place; what to say about it."""
    needed = {node.index for node in student.graph.below(taps)}
    kept = [layer for index, layer in enumerate(net.layer) if index in needed]
    left_out = len(net.layer) - len(kept)
    del net.layer[:]
    net.layer.extend(kept)
    return (
        f"{left_out} layers of the student behind its taps are left out: a detector without a loss, which "
        "learns to look as the teacher does, and nothing else."
    )


def _task(student: Network) -> list[Any]:
    """A label and a cross-entropy on the scores, for a student without a loss."""
    graph = student.graph
    if any(weight for node in graph.nodes for weight in node.loss_weights):
        return []
    softmax = [node.inputs[0].name for node in graph.nodes if node.type == "Softmax"]
    unread = [blob.name for blob in student.seen if not blob.users]
    if not softmax and len(unread) != 1:
        raise InputError(
            f"build: expected a student with a loss, a Softmax, or one output, got the outputs "
            f"{', '.join(unread)}. Add its loss."
        )
    taken, scores = all_names(student.net), graph.last[(softmax or unread)[-1]]
    label, loss = (free_name(name, taken) for name in ("label", "loss"))
    batch, _, *places = graph.shape(scores) or (1, 1)
    source = schema.LayerParameter(name=label, type="Input", top=[label])
    source.input_param.shape.add(dim=[batch, 1, *places] if math.prod(places) > 1 else [batch])
    crossed = schema.LayerParameter(
        name=loss, type="SoftmaxWithLoss", bottom=[scores.name, label], top=[loss]
    )
    return [source, crossed]


def _frozen(
    teacher: Network, taps: Sequence[Blob], prefix: str, image: str
) -> tuple[list[Any], dict[Blob, str]]:
    """The teacher's layers that the taps need, renamed and frozen, and the new name of each blob."""
    needed = teacher.graph.below(taps)
    renamed = {teacher.image: image}
    layers = []
    for node in teacher.graph.nodes:
        if node not in needed or teacher.image in node.outputs:
            continue
        if not node.inputs and node.type != "Parameter":
            raise InputError(
                f"build: expected a teacher that needs images alone, got the input {node.name!r} below a tap."
            )
        if node.type == "Dropout":  # the identity, in a teacher
            renamed[node.outputs[0]] = renamed[node.inputs[0]]
            continue
        renamed.update({blob: prefix + blob.name for blob in node.outputs})
        layers.append(_freeze(node, renamed, prefix))
    return layers, renamed


def _freeze(node: Node, renamed: dict[Blob, str], prefix: str) -> Any:
    spec = _copy(node.spec)
    spec.name = prefix + spec.name
    spec.bottom[:] = [renamed[blob] for blob in node.inputs]
    spec.top[:] = [renamed[blob] for blob in node.outputs]
    for name in ("loss_weight", "propagate_down", "param", "blobs", "phase"):
        spec.ClearField(name)
    spec.include.add(phase=schema.TRAIN)
    if spec.type == "BatchNorm":
        spec.batch_norm_param.use_global_stats = True
        return spec
    if spec.type == "BN" and node.blob_count == 4:
        spec.bn_param.frozen = True
    for index in range(max(node.blob_count, len(node.spec.param))):
        frozen = spec.param.add(lr_mult=0, decay_mult=0)
        if index < len(node.spec.param) and node.spec.param[index].name:
            frozen.name = prefix + node.spec.param[index].name
            if node.spec.param[index].HasField("share_mode"):
                frozen.share_mode = node.spec.param[index].share_mode
    return spec


# ---------------------------------------------------------------------------------------- solver, weights


def _solver(given: File | Any, student: Network) -> Any:
    """The solver that is given, or SGD with momentum 0.9, without a net of its own."""
    if given is None:
        return _usual_solver(student)
    solver = _copy(given) if isinstance(given, schema.SolverParameter) else read_solver(given)
    for name in ("net", "net_param", "train_net", "train_net_param", "snapshot_prefix", "weights"):
        solver.ClearField(name)
    if solver.test_net or solver.test_net_param:  # which keep their own net for testing
        solver.train_net = DEFAULT_NAME
    return solver


def _usual_solver(student: Network) -> Any:
    solver = schema.SolverParameter(base_lr=0.01, momentum=0.9, weight_decay=5e-4, lr_policy="multistep")
    if any(node.type == "BatchNorm" for node in student.graph.nodes):
        solver.base_lr = 0.1
    solver.gamma, solver.max_iter = 0.1, 64000
    solver.stepvalue.extend([32000, 48000])
    solver.display, solver.snapshot = 100, 8000
    if any(_only_in_test(layer) and not layer.bottom for layer in student.net.layer):
        solver.test_iter.append(100)
        solver.test_interval = 1000
    return solver


def _only_in_test(layer: Any) -> bool:
    return any(rule.phase == schema.TEST for rule in layer.include if rule.HasField("phase"))


def _merged_weights(
    net: Any, frozen: Sequence[Any], prefix: str, stored: tuple[list[Any], list[Any]], channels: int | None
) -> Any:
    """The student's start and the teacher's weights under the names of the built net, None without either.

    Raises:
        ValueError: if blobs do not fit, or the teacher's lack a layer.
    """
    if not any(stored):
        return None
    theirs = {layer.name for layer in frozen}
    built = {layer.name: layer for layer in try_out(with_known_sizes(net, channels)).layers.values()}
    merged = schema.NetParameter(name=net.name)
    for role, sources in zip(("student", "teacher"), stored, strict=True):
        for source in sources:
            own = [layer for layer in net.layer if (layer.name in theirs) == (role == "teacher")]
            records = _matching(own, source, prefix if role == "teacher" else "", role)
            for record in records:
                _check_record(record, built.get(record.name), role)
            merged.layer.extend(records)
    return merged


def _matching(layers: Sequence[Any], stored: Any, prefix: str, role: str) -> list[Any]:
    """The stored layers that these layers have under `prefix`, renamed."""
    by_name = {prefix + record.name: record for record in reversed(stored.layer) if record.blobs}
    missing = [
        layer.name.removeprefix(prefix)
        for layer in layers
        if count_blobs(layer) and layer.name not in by_name
    ]
    if role == "teacher" and missing:
        raise InputError(
            f"build: expected weights for all layers of the teacher, got none for {', '.join(missing[:6])}. "
            "A frozen layer would keep its filler. Take the teacher's own caffemodel."
        )
    names = list(dict.fromkeys(layer.name for layer in layers if layer.name in by_name))
    if not names:
        raise InputError(
            f"build: expected {role} weights with layers of the {role}, got none. Is it the file of another "
            "net?"
        )
    return [
        schema.LayerParameter(name=name, type=by_name[name].type, blobs=by_name[name].blobs) for name in names
    ]


def _check_record(record: Any, layer: Any, role: str) -> None:
    if layer is None:  # it cannot be built here: Caffe will check
        return
    wanted = [tuple(blob.shape) for blob in layer.blobs]
    fits = len(wanted) == len(record.blobs) and all(map(same_shape, record.blobs, wanted))
    if not fits:
        got = [blob_shape(blob) for blob in record.blobs]
        raise InputError(
            f"build: expected {role} weights of shapes {wanted} for layer {record.name!r}, got {got}. "
            "Rename the layer to let it start anew, or take the right file."
        )


def _read(net: File | Any) -> Any:
    return _copy(net) if isinstance(net, schema.NetParameter) else read_net(net)


def _copy(message: Any) -> Any:
    return type(message).FromString(message.SerializeToString())
