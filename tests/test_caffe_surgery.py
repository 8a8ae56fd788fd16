"""`attention_transfer.caffe.build`: one net of a student, a frozen teacher and the attention branches."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED
from torch import Tensor

import attention_transfer as at
from attention_transfer.caffe import (
    Net,
    Solver,
    build,
    check,
    read_caffemodel,
    read_net,
    schema,
    write_prototxt,
)
from attention_transfer.caffe.building.networks import resolution_ends, survey_student
from attention_transfer.caffe.building.options import Options
from attention_transfer.caffe.files.caffemodel import array_blob, write_binary
from attention_transfer.caffe.files.prototxt import parse_net, read_solver
from attention_transfer.cli import main

REFERENCE = SHARED / "reference" / "caffe"
PYCAFFE = Path(at.__file__).parent / "caffe" / "building" / "pycaffe"


# ------------------------------------------------------------------------------------ nets of the reference


def part(net: Any, side: str) -> Any:
    """The student ("s") or the teacher ("t") of a reference net, without branches, as one would have them."""
    branch = {"Reshape", "AbsVal", "Power", "Normalize", "EuclideanLoss", "Python"}
    own = schema.NetParameter(name=side)
    for layer in net.layer:
        common = layer.type == "Input" or (side == "s" and layer.name in ("ce", "fc_s"))
        theirs = layer.name.endswith(f"_{side}") and not layer.name.startswith("map")
        if (common or theirs) and layer.type not in branch:
            copied = own.layer.add()
            copied.CopyFrom(layer)
            del copied.param[:]  # whoever freezes the teacher, it is not its own prototxt
            copied.ClearField("batch_norm_param")
    return own


def reference_pairs(net: Any) -> str:
    taps = {layer.name: layer.bottom[0] for layer in net.layer if layer.type == "Reshape"}
    return ",".join(f"{tap}:{taps[name.replace('_s', '_t')]}" for name, tap in taps.items() if "_s" in name)


def reference_beta(net: Any) -> tuple[str, float]:
    """(form, beta) that give the loss of a reference net; its Python layer sums over two samples or four."""
    for layer in net.layer:
        if layer.type == "Python":
            batch = net.layer[0].input_param.shape[0].dim[0]
            return "paper", json.loads(layer.python_param.param_str)["beta"] * batch
    loss = next(layer for layer in net.layer if layer.type == "EuclideanLoss")
    return "caffe", loss.loss_weight[0] if loss.loss_weight else 1.0


def rebuilt(path: Path, weights: Path | None) -> Any:
    """What `build` makes of the student and the teacher of a reference net, with the reference's weights."""
    net = read_net(path)
    form, beta = reference_beta(net)
    stored = None if weights is None else read_caffemodel(weights)
    return build(
        part(net, "s"), part(net, "t"), pairs=reference_pairs(net), form=form, beta=beta,
        student_weights=stored, teacher_weights=stored,
    )  # fmt: skip


def renamed(name: str, built: Net) -> str:
    """A layer's name in the built net: the teacher's have a prefix, and a single pair's no number."""
    return next(n for n in (name, f"teacher_{name}", name.rstrip("0123456789")) if n in built.params)


def inputs_of(file: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values) for name, values in np.load(file).items()}


def assert_agrees(got: Tensor, want: np.ndarray, key: str) -> None:
    np.testing.assert_allclose(
        got.numpy(force=True), want, rtol=0, atol=1e-10 * np.abs(want).max() + 1e-12, err_msg=key
    )


FORWARD = {
    "attention/at_two_pairs": "",
    "attention/at_student_teacher": "",
    "pitfalls/force_backward_overrides": "fixed/",
    "pitfalls/teacher_backward_runs": "fixed/",
    "pitfalls/tap_before_in_place_relu": "fixed/",
    "pitfalls/tap_name_is_rectified": "fixed/",
    "pitfalls/same_parameter_name_multipliers": "fixed/",
}


@pytest.mark.parametrize("case", FORWARD)
def test_a_built_net_computes_what_the_reference_does(shared_reference: Path, case: str) -> None:
    folder, prefix = shared_reference / "caffe" / case, FORWARD[case]
    weights = next(folder / f for f in ("fixed.caffemodel", "weights.caffemodel") if (folder / f).exists())
    path = folder / ("fixed.prototxt" if prefix else "net.prototxt")
    made = rebuilt(path, weights)
    assert check(made.net) == []
    net = Net(made.net, made.weights, phase="TRAIN").double()
    given = inputs_of(folder / "inputs.npz")
    has_task = any(layer.name == "ce" for layer in made.net.layer)
    blobs = net(given if has_task else {**given, "label": torch.zeros(2, 1, 3, 3)})
    compare_blobs(blobs, folder, prefix)
    if has_task:  # the reference without one weighs its two pairs differently
        compare_gradients(net, folder, prefix)


# Nets that have activations only; a student and a teacher pick them out of one image. The repair of
# power_4_at_zero is not among them: it squares the student's activations twice and the teacher's once.
BRANCHES = [
    *(f"attention/at_{name}" for name in ("equal", "large", "p1", "p1_no_reshape", "p2", "p2_no_reshape")),
    *(f"attention/at_{name}" for name in ("p2_weight", "p4", "p4_no_reshape", "p4_zeros", "python")),
    *(
        f"attention/at_{name}"
        for name in ("python_equal_sample", "python_no_reshape", "small", "zero_sample")
    ),
    *(f"pitfalls/{name}" for name in ("absval_in_place", "euclidean_counts", "euclidean_shapes")),
    *(f"pitfalls/{name}" for name in ("euclidean_shapes_no_reshape", "normalize_each_position")),
    *(f"pitfalls/{name}" for name in ("normalize_in_place", "power_in_place", "python_loss_without_weight")),
    *(f"pitfalls/{name}" for name in ("reshape_in_place", "reshape_merges_channels", "unknown_field")),
]


@pytest.mark.parametrize("case", BRANCHES)
def test_built_branches_compute_what_the_reference_does(shared_reference: Path, case: str) -> None:
    folder = shared_reference / "caffe" / case
    file, prefix = ("fixed.prototxt", "fixed/") if "pitfalls" in case else ("net.prototxt", "")
    given, expected = inputs_of(folder / "inputs.npz"), np.load(folder / "expected.npz")
    mine, other = (given.get(f"{side}@fixed", given[side]) for side in ("A_s", "A_t"))
    image = torch.cat([mine, other], 1).requires_grad_()
    first, second = mine.shape[1], other.shape[1]
    reference = read_net(folder / file)
    form, beta = reference_beta(reference)
    built = build(
        picking(image.shape, first),
        picking(image.shape, second),
        pairs="picked:picked",
        form=form,  # type: ignore[arg-type]
        p=2 ** (sum(layer.type == "Power" for layer in reference.layer) // 2),
        beta=beta,
        student_weights=picked(torch.eye(first + second)[:first]),
        teacher_weights=picked(torch.eye(first + second)[first:]),
    )
    assert check(built.net) == []
    net = Net(built.net, built.weights, phase="TRAIN").double()
    blobs = net({"data": image, "label": torch.zeros(len(image), 1, *image.shape[2:])})
    assert_agrees(blobs["at_loss"], expected[f"{prefix}blob/at_loss"], "at_loss")
    (gradient,) = torch.autograd.grad(blobs["at_loss"] * net.loss_weights["at_loss"], image)
    assert_agrees(gradient[:, :first], expected[f"{prefix}grad/A_s"], "A_s")
    assert not gradient[:, first:].any()


def picking(shape: tuple[int, ...], outputs: int) -> Any:
    """A net of one convolution, whose weights pick channels of its image."""
    param = f"convolution_param {{ num_output: {outputs} kernel_size: 1 bias_term: false }}"
    return parse_net(source("data", *shape) + layer("picked", "Convolution", "data", None, param))


def picked(weight: Tensor) -> Any:
    blob = array_blob(weight[:, :, None, None].numpy())
    return schema.NetParameter(layer=[schema.LayerParameter(name="picked", blobs=[blob])])


def compare_gradients(net: Net, folder: Path, prefix: str) -> None:
    expected = dict(np.load(folder / "expected.npz"))
    assert_agrees(net.loss, expected[f"{prefix}loss"], "loss")
    net.loss.backward()
    compared = 0
    for key, want in expected.items():
        if key.startswith(f"{prefix}param_grad/"):
            name, index = key.removeprefix(f"{prefix}param_grad/").rsplit("/", 1)
            blob = net.params[renamed(name, net)][int(index)]
            gradient = torch.zeros_like(blob) if blob.grad is None else blob.grad
            assert_agrees(gradient, want, key)
            compared += 1
    assert compared > 4


def compare_blobs(blobs: Any, folder: Path, prefix: str) -> None:
    compared = 0
    for key, want in np.load(folder / "expected.npz").items():
        name = key.removeprefix(f"{prefix}blob/")
        name = name if name in blobs else f"teacher_{name}"
        if key.startswith(f"{prefix}blob/") and name in blobs:
            assert_agrees(blobs[name], want, key)
            compared += 1
    assert compared > 8


TRAINED = sorted(path.parent.name for path in REFERENCE.glob("pitfalls/*/solver.prototxt"))


@pytest.mark.parametrize("name", TRAINED)
def test_training_a_built_net_gives_the_parameters_of_the_repair(shared_reference: Path, name: str) -> None:
    folder = shared_reference / "caffe" / "pitfalls" / name
    init = next(folder / f for f in ("init_fixed.caffemodel", "init.caffemodel") if (folder / f).exists())
    expected = dict(np.load(folder / "expected.npz"))
    train(folder, folder / "fixed.prototxt", init, expected, "fixed/")


@pytest.mark.parametrize("name", ["joint_attention", "joint_attention_batchnorm", "joint_attention_python"])
def test_training_a_built_net_gives_the_parameters_of_the_solver_cases(
    shared_reference: Path, name: str
) -> None:
    folder = shared_reference / "caffe" / "solvers" / name
    train(
        folder,
        folder / "net.prototxt",
        folder / "init.caffemodel",
        dict(np.load(folder / "expected.npz")),
        "",
    )


def train(folder: Path, path: Path, init: Path, expected: dict[str, np.ndarray], prefix: str) -> None:
    made = rebuilt(path, init)
    assert check(made.net, folder / "solver.prototxt") == []
    param = read_solver(folder / "solver.prototxt")
    param.ClearField("net")
    param.net_param.CopyFrom(made.net)
    data = inputs_of(folder / "data.npz")
    feed = [{name: values[i] for name, values in data.items()} for i in range(len(data["data"]))]
    solver = Solver(param, weights=made.weights, feed=feed)
    solver.net.double()
    solver.net.load(made.weights)
    solver.step(param.max_iter)
    compared = 0
    for key, want in expected.items():
        if key.startswith(f"{prefix}param/"):
            name, index = key.removeprefix(f"{prefix}param/").rsplit("/", 1)
            assert_agrees(solver.net.params[renamed(name, solver.net)][int(index)], want, key)
            compared += 1
    assert compared > 4


# ------------------------------------------------------------------------------------------ nets of our own

INPUT = 'layer {{ name: "{0}" type: "Input" top: "{0}" input_param {{ shape {{ {1} }} }} }}\n'


def source(name: str, *dims: int) -> str:
    return INPUT.format(name, " ".join(f"dim: {dim}" for dim in dims))


def layer(name: str, kind: str, bottoms: str, top: str | None = None, text: str = "") -> str:
    bottoms = " ".join(f'bottom: "{bottom}"' for bottom in bottoms.split())
    return f'layer {{ name: "{name}" type: "{kind}" {bottoms} top: "{top or name}" {text} }}\n'


def conv(name: str, bottom: str, outputs: int, stride: int = 1, more: str = "") -> str:
    filler = 'weight_filler { type: "msra" }'
    sizes = f"num_output: {outputs} kernel_size: 3 pad: 1 stride: {stride}"
    return layer(name, "Convolution", bottom, text=f"convolution_param {{ {sizes} {filler} {more} }}")


def plain(widths: tuple[int, ...], *, batch_norm: bool = False, task: str = "loss", size: int = 12) -> Any:
    """A net of convolutions, each but the first at half the resolution of the one before."""
    text = source("data", 2, 3, size, size)
    if task == "loss":
        text += source("label", 2)
    bottom = "data"
    for i, width in enumerate(widths, start=1):
        name = f"conv{i}"
        text += conv(name, bottom, width, 1 if i == 1 else 2, "bias_term: false" if batch_norm else "")
        if batch_norm:
            text += layer(f"bn{i}", "BatchNorm", name, name)
            text += layer(f"scale{i}", "Scale", name, name, "scale_param { bias_term: true }")
        text += layer(f"relu{i}", "ReLU", name, name)
        bottom = name
    text += layer("drop", "Dropout", bottom, "dropped")
    text += layer("fc", "InnerProduct", "dropped", text="inner_product_param { num_output: 4 }")
    if task == "loss":
        text += layer("loss", "SoftmaxWithLoss", "fc label")
        text += layer("accuracy", "Accuracy", "fc label", text="include { phase: TEST }")
    elif task == "softmax":
        text += layer("prob", "Softmax", "fc")
    return parse_net(f'name: "plain{len(widths)}" {text}')


OPTIONS = list(
    itertools.product(
        ["caffe", "paper"], [1, 2, 4], ["ssd", "python"], ["loss", "softmax", "none"], [False, True]
    )
)


@pytest.mark.parametrize(("form", "p", "normalize", "task", "batch_norm"), OPTIONS)
def test_a_built_net_is_clean_and_trains_the_student_alone(
    form: Any, p: int, normalize: Any, task: str, batch_norm: bool
) -> None:
    student, teacher = (
        plain((4, 6), task=task, batch_norm=batch_norm),
        plain((5, 8, 9), batch_norm=batch_norm),
    )
    made = build(student, teacher, form=form, p=p, normalize=normalize)
    assert check(made.net, made.solver) == []
    assert [(pair.student, pair.teacher) for pair in made.pairs] == [
        ("conv1", "teacher_conv1"),
        ("conv2", "teacher_conv2"),
    ]
    net = Net(made.net, phase="TRAIN")
    net({"data": torch.randn(2, 3, 12, 12), "label": torch.tensor([1, 3])})
    net.loss.backward()
    for name, blobs in net.params.items():
        learns = name in {layer.name for layer in student.layer} and not name.startswith("bn")
        assert all((blob.grad is not None and bool(blob.grad.any())) == learns for blob in blobs[:1]), name


def test_the_test_phase_runs_the_student_alone() -> None:
    made = build(plain((4, 6)), plain((5, 8)))
    assert [layer.name for layer in Net(made.net, phase="TEST").layers] == [
        layer.name for layer in plain((4, 6)).layer
    ]


@pytest.mark.parametrize("form", ["caffe", "paper"])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_the_term_is_that_of_the_package(form: Any, p: int) -> None:
    made = build(plain((4, 6)), plain((5, 8)), form=form, p=p, beta=3, pairs=[("conv2", "conv2")])
    net = Net(made.net, phase="TRAIN").double()
    blobs = net({"data": torch.randn(2, 3, 12, 12), "label": torch.tensor([1, 3])})
    want = at.attention_transfer_loss(blobs["conv2"], blobs["teacher_conv2"], beta=3, p=p, form=form)
    term = net.loss_weights["at_loss"] * blobs["at_loss"].sum()
    torch.testing.assert_close(term, want, rtol=1e-6, atol=0)


def test_options_may_be_a_record_or_keywords() -> None:
    nets = plain((4, 6)), plain((5, 8))
    record = Options(form="paper", p=4)
    one, two, three = build(*nets, record), build(*nets, form="paper", p=4), build(*nets, record, p=2)
    assert one.net == two.net != three.net == build(*nets, form="paper").net
    with pytest.raises(TypeError, match="unexpected keyword argument 'fomr'"):
        build(*nets, fomr="paper")


def test_without_beta_both_forms_pull_alike_where_maps_are_at_their_usual_distance() -> None:
    paper, caffe = (build(plain((4,)), plain((5,)), form=form) for form in ("paper", "caffe"))
    assert json.loads(paper.net.layer[-1].python_param.param_str)["beta"] == 1
    assert caffe.net.layer[-1].loss_weight[0] == 1.25


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_maps_of_unequal_size_are_pooled_as_maps(larger: str) -> None:
    sizes = ("conv1:conv2", "s") if larger == "student" else ("conv2:conv1", "t")
    made = build(plain((4, 6)), plain((5, 8)), pairs=sizes[0])
    assert made.pairs[0].pooled == (sizes[1], (2, 2))
    assert check(made.net) == []
    net = Net(made.net, phase="TRAIN").double()
    blobs = net({"data": torch.randn(2, 3, 12, 12), "label": torch.tensor([1, 3])})
    energies = [blobs[name].square().sum(1) for name in (made.pairs[0].student, made.pairs[0].teacher)]
    pooled = [torch.nn.functional.avg_pool2d(e, 2) if e.shape[-1] == 12 else e for e in energies]
    maps = [torch.nn.functional.normalize(e.flatten(1), dim=1) for e in pooled]
    want = (maps[0] - maps[1]).square().sum() / 4
    torch.testing.assert_close(blobs["at_loss"].sum(), want)


def test_the_teacher_reads_the_students_images_and_nothing_of_it_is_left_behind_its_last_tap() -> None:
    teacher = plain((5, 8, 9), batch_norm=True)
    for spec in teacher.layer:
        spec.name, spec.bottom[:] = f"t/{spec.name}", [f"t/{name}" for name in spec.bottom]
        spec.top[:] = [f"t/{name}" for name in spec.top]
        spec.propagate_down[:] = [True] * len(spec.bottom)
    teacher.layer[2].loss_weight.append(1)
    made = build(plain((4, 6)), teacher, pairs="conv1:t/conv1,conv2:t/conv2")
    theirs = [spec for spec in made.net.layer if spec.name.startswith("teacher_")]
    kinds = ["Convolution", "BatchNorm", "Scale", "ReLU"]
    assert [spec.type for spec in theirs] == kinds * 2
    assert [spec.name for spec in theirs[:2]] == ["teacher_t/conv1", "teacher_t/bn1"]
    assert theirs[0].bottom == ["data"]
    assert all(spec.include[0].phase == schema.TRAIN for spec in theirs)
    assert [len(spec.param) for spec in theirs[:4]] == [1, 0, 2, 0]
    assert not any(len(spec.loss_weight) or len(spec.propagate_down) for spec in theirs)


def test_dropout_and_old_layers_of_the_teacher_are_the_identity_and_new() -> None:
    text = 'input: "image" input_dim: 1 input_dim: 3 input_dim: 20 input_dim: 20\n'
    text += 'layers { name: "a" type: CONVOLUTION bottom: "image" top: "a" blobs_lr: 1 blobs_lr: 2 '
    text += "convolution_param { num_output: 2 kernel_size: 3 pad: 1 } }\n"
    text += 'layers { name: "d" type: DROPOUT bottom: "a" top: "d" }\n'
    text += 'layers { name: "r" type: RELU bottom: "d" top: "d" }\n'
    text += (
        'layers { name: "p" type: POOLING bottom: "d" top: "p" pooling_param { kernel_size: 2 stride: 2 } }'
    )
    made = build(plain((4, 6)), parse_net(text), pairs="conv1:d")
    theirs = [(spec.type, *spec.bottom, *spec.top) for spec in made.net.layer if "teacher" in spec.name]
    assert theirs == [
        ("Convolution", "data", "teacher_a"),
        ("ReLU", "teacher_a", "teacher_d"),
    ]
    assert check(made.net) == []


def test_a_teacher_that_prepares_its_images_in_place_leaves_the_students_alone() -> None:
    text = source("data", 1, 3, 12, 12) + layer("half", "Power", "data", "data", "power_param { scale: 0.5 }")
    made = build(plain((4,)), parse_net(text + conv("c", "data", 5)))
    prepared = next(spec for spec in made.net.layer if spec.name == "teacher_half")
    assert (prepared.bottom, prepared.top) == (["data"], ["teacher_data"])
    assert check(made.net) == []


def test_shared_parameters_of_the_teacher_stay_its_own() -> None:
    shared = 'param { name: "w" lr_mult: 1 } param { name: "b" }'
    text = source("data", 2, 3, 12, 12) + conv("a", "data", 3) + conv("b", "a", 3)
    teacher = parse_net(text.replace("convolution_param", shared + " convolution_param"))
    student = plain((3,))
    student.layer[2].param.add(name="w")
    made = build(student, teacher, pairs="conv1:b")
    names = [
        [param.name for param in spec.param] for spec in made.net.layer if spec.name.startswith("teacher_")
    ]
    assert names == [["teacher_w", "teacher_b"]] * 2
    assert check(made.net) == []


def test_names_that_are_taken_get_others() -> None:
    student = plain((4,))
    student.layer[2].name = "teacher_conv1"
    student.layer[3].name = "flat_s"
    made = build(student, plain((5,)))
    names = [spec.name for spec in made.net.layer]
    assert "teacher2_conv1" in names and "at_flat_s" in names and "at_at_loss" in names
    assert len(set(names)) == len(names)
    assert check(made.net) == []


def test_a_student_of_a_train_val_prototxt_keeps_its_data_layers() -> None:
    stored = 'data_param { source: "x" batch_size: 8 backend: LMDB }'
    data = (
        'layer { name: "data" type: "Data" top: "data" top: "label" include { phase: %s } '
        f"transform_param {{ crop_size: 12 scale: 0.1 }} {stored} }}\n"
    )
    student = plain((4, 6))
    del student.layer[:2]
    text = data % "TRAIN" + data % "TEST"
    both = parse_net(text)
    both.layer.extend(student.layer)
    made = build(both, plain((5, 8)))
    assert [pair.student_shape for pair in made.pairs] == [(8, 4, 12, 12), (8, 6, 6, 6)]
    assert [spec.name for spec in made.net.layer[:3]] == ["data", "data", "conv1"]
    assert made.solver.test_interval == 1000 and list(made.solver.test_iter) == [100]
    teacher = parse_net(text.replace("0.1", "0.2"))
    teacher.layer.extend(plain((5, 8)).layer[2:])
    with pytest.warns(UserWarning, match="another scale or mean"):
        build(both, teacher)


def test_shapes_that_cannot_be_told_are_warned_about() -> None:
    stored = 'data_param { source: "absent" backend: LMDB batch_size: 2 }'
    text = f'layer {{ name: "d" type: "Data" top: "data" top: "label" {stored} }}'
    student = parse_net(text)
    student.layer.extend(plain((4, 6)).layer[2:])
    with pytest.warns(UserWarning, match="must be equal in height and width"):
        made = build(student, plain((5, 8)), pairs="conv1:conv1")
    assert made.pairs[0].student_shape is None


# --------------------------------------------------------------------------------------------- auto pairs


def residual(name: str, bottom: str, outputs: int, stride: int = 1) -> str:
    shortcut = conv(f"{name}/p", bottom, outputs, stride)
    first = conv(f"{name}/a", bottom, outputs, stride) + layer(f"{name}/ra", "ReLU", f"{name}/a", f"{name}/a")
    added = layer(f"{name}/sum", "Eltwise", f"{name}/p {name}/b")
    return shortcut + first + conv(f"{name}/b", f"{name}/a", outputs) + added


def ends_of(text: str, size: int = 32) -> list[str]:
    return list(resolution_ends(survey_student(parse_net(source("data", 1, 3, size, size) + text))).values())


def test_the_end_of_a_stage_is_its_last_block() -> None:
    text = conv("stem", "data", 4, 2) + layer(
        "pool", "Pooling", "stem", text="pooling_param { kernel_size: 2 stride: 2 }"
    )
    text += residual("b1", "pool", 4) + layer("b1/r", "ReLU", "b1/sum", "b1/sum")
    text += residual("b2", "b1/sum", 4) + layer("b2/r", "ReLU", "b2/sum", "b2/out")
    text += residual("b3", "b2/out", 8, 2) + layer("bn", "BatchNorm", "b3/sum")
    assert ends_of(text) == ["b2/out", "b3/sum"]


def test_without_blocks_it_is_the_last_convolution_with_what_is_behind_it() -> None:
    pool = layer("pool", "Pooling", "c2", text="pooling_param { kernel_size: 2 stride: 2 }")
    text = conv("c1", "data", 4) + layer("r1", "ReLU", "c1", "c1") + conv("c2", "c1", 4)
    text += layer("r2", "ReLU", "c2", "c2") + pool + conv("c3", "pool", 4) + layer("r3", "ReLU", "c3")
    text += layer("global", "Pooling", "r3", text="pooling_param { pool: AVE global_pooling: true }")
    text += layer("fc", "InnerProduct", "global", text="inner_product_param { num_output: 4 }")
    assert ends_of(text) == ["c2", "r3"]


# ----------------------------------------------------------------------------------------------- weights


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A student and a teacher, prototxts and caffemodels."""
    for name, widths in (("student", (4, 6)), ("teacher", (5, 8))):
        net = plain(widths, batch_norm=True)
        write_prototxt(net, tmp_path / f"{name}.prototxt")
        write_binary(Net(net).to_caffemodel(), tmp_path / f"{name}.caffemodel")
    return tmp_path


def test_the_merged_weights_hold_the_students_start_and_the_teacher(files: Path) -> None:
    made = build(
        files / "student.prototxt", files / "teacher.prototxt",
        student_weights=files / "student.caffemodel", teacher_weights=files / "teacher.caffemodel",
    )  # fmt: skip
    net = Net(made.net, made.weights, phase="TRAIN")
    for role, prefix in (("student", ""), ("teacher", "teacher_")):
        alone = Net(files / f"{role}.prototxt", files / f"{role}.caffemodel")
        for name, blobs in alone.params.items():
            if prefix + name in net.params:
                for mine, other in zip(net.params[prefix + name], blobs, strict=True):
                    assert torch.equal(mine, other)
    assert {"conv1", "fc", "teacher_conv2", "teacher_bn1"} <= {record.name for record in made.weights.layer}
    assert "teacher_fc" not in {record.name for record in made.weights.layer}


def wrong_teacher(change: Callable[[Any], None]) -> Any:
    stored = Net(plain((5, 8))).to_caffemodel()
    change(stored)
    return stored


WRONG = [
    (lambda w: w.layer[2].blobs[0].shape.dim.__setitem__(0, 6), "as many numbers|weights of shapes"),
    (lambda w: w.layer[2].blobs.pop(), r"teacher weights of shapes .* for layer 'teacher_conv1'"),
    (lambda w: w.layer[2].ClearField("blobs"), "all layers of the teacher, got none for conv1"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_weights_that_do_not_fit_are_refused(change: Callable[[Any], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(plain((4, 6)), plain((5, 8)), teacher_weights=wrong_teacher(change))


def test_weights_of_another_net_are_refused() -> None:
    other = schema.NetParameter()
    other.layer.add(name="x").blobs.add(data=[1])
    with pytest.raises(ValueError, match="student weights with layers of the student, got none"):
        build(plain((4, 6)), plain((5, 8)), student_weights=other)


# ------------------------------------------------------------------------------------------- bad requests


BAD: list[tuple[dict[str, Any], str]] = [
    ({"p": 3}, "expected p 1, 2 or 4, got 3"),
    ({"form": "code"}, "expected form 'caffe' or 'paper', got 'code'"),
    ({"normalize": "l2"}, "expected normalize 'ssd' or 'python'"),
    ({"beta": 0}, "expected beta > 0"),
    ({"pairs": "conv1"}, "expected pairs STUDENT_BLOB:TEACHER_BLOB"),
    ({"pairs": []}, "expected pairs STUDENT_BLOB:TEACHER_BLOB"),
    ({"pairs": "conv3:conv1"}, r"expected a blob of the student, got 'conv3'. Did you mean conv"),
    ({"pairs": "conv1:fc"}, r"four axes in the teacher, got 'fc' of shape \(2, 4\)"),
    ({"pairs": "label:conv1"}, "expected a blob of the student, got 'label'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_a_bad_request_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(plain((4, 6)), plain((5, 8)), **options)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("build: ")


def test_a_mistake_that_a_net_brings_is_warned_about() -> None:
    student = plain((4, 6))
    student.layer[3].name = "conv1"
    student.layer[5].name = "conv1"
    with pytest.warns(UserWarning, match="the nets brought same_layer_name with them"):
        build(student, plain((5, 8)))


def test_maps_that_are_no_multiples_are_refused() -> None:
    student = parse_net(source("data", 1, 3, 12, 12) + conv("a", "data", 2, 3) + layer("fc", "Softmax", "a"))
    with pytest.raises(ValueError, match="whole multiple of the other, got 'a' of 4x4 and 'conv2' of 6x6"):
        build(student, plain((5, 8)), pairs="a:conv2")
    with pytest.raises(ValueError, match="got maps of 4x4 in the student and 12x12, 6x6 in the teacher"):
        build(student, plain((5, 8)))


NOT_NETS = [
    (source("x", 1, 3, 4, 4) + source("z", 1, 3, 4, 4) + conv("a", "x", 2) + conv("b", "z", 2), "got x, z"),
    (source("x", 1, 3, 4, 4), "images that the student's layers read, got none"),
    (conv("a", "x", 2), "got 'x' in layer 'a'"),
    (source("x", 1, 3, 4, 4) + layer("s", "Power", "x", "x") + conv("a", "x", 2), "'x' overwritten in place"),
    (source("x", 1, 3, 4, 4) + conv("a", "x", 2) + conv("b", "x", 2), "a loss, a Softmax, or one output"),
]


@pytest.mark.parametrize(("text", "message"), NOT_NETS)
def test_a_student_that_cannot_be_used_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(parse_net(text), plain((5, 8)), pairs="a:conv1")


# ------------------------------------------------------------------------------------- solver and command


def test_a_given_solver_gets_the_built_net(files: Path) -> None:
    given = schema.SolverParameter(
        net="student.prototxt", base_lr=0.5, snapshot_prefix="student", test_iter=[7]
    )
    made = build(files / "student.prototxt", files / "teacher.prototxt", solver=given)
    net, solver_file, *_ = made.write(files / "out" / "joint.prototxt")
    written = read_solver(solver_file)
    assert written.net == net.as_posix() and written.snapshot_prefix == (files / "out" / "joint").as_posix()
    assert (written.base_lr, list(written.test_iter)) == (0.5, [7])
    assert given.net == "student.prototxt"


def test_a_solver_with_test_nets_keeps_them(files: Path) -> None:
    given = schema.SolverParameter(train_net="student.prototxt", test_net=["test.prototxt"], base_lr=0.5)
    made = build(files / "student.prototxt", files / "teacher.prototxt", solver=given)
    net, solver_file, *_ = made.write(files / "joint.prototxt")
    written = read_solver(solver_file)
    assert (written.train_net, written.net, list(written.test_net)) == (net.as_posix(), "", ["test.prototxt"])


def test_the_command_builds_what_check_passes_and_the_solver_trains(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = files / "at_train.prototxt"
    flags = ["--student", str(files / "student.prototxt"), "--teacher", str(files / "teacher.prototxt")]
    flags += [
        "--teacher-weights",
        str(files / "teacher.caffemodel"),
        "--form",
        "paper",
        "--normalize",
        "python",
    ]
    assert main(["caffe", "build", *flags, "--pairs", "conv2:conv1", "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "conv2 6x6x6 teacher_conv1 5x12x12 6x6 (teacher's pooled 2x2)" in " ".join(printed.split())
    names = ["at_train.prototxt", "at_train_solver.prototxt", "at_train.caffemodel"]
    for name in [*names, "attention_loss.py", "attention_normalize.py"]:
        assert f"wrote {files / name}\n" in printed and (files / name).exists()
    command = f"caffe train --solver {files / names[1]} --weights {files / names[2]}"
    assert f"Next: attention-transfer {command}\n" in printed
    assert main(["caffe", "check", str(out), "--solver", str(files / names[1])]) == 0
    batch = {"data": torch.randn(2, 3, 12, 12), "label": torch.tensor([0, 1])}
    solver = Solver(files / names[1], weights=files / names[2], feed=[batch])
    before = {name: [blob.clone() for blob in blobs] for name, blobs in solver.net.params.items()}
    solver.step(2)
    for name, blobs in solver.net.params.items():
        for old, new in zip(before[name], blobs, strict=True):
            assert torch.equal(old, new) == name.startswith(("teacher", "map")), name
    assert main(["caffe", "build", *flags, "-o", str(out)]) == 2
    assert "already there" in capsys.readouterr().err
    assert main(["caffe", "build", *flags, "-o", str(out), "--force"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "student"),
        (["--student", "absent", "--teacher", "absent"], "absent"),
        (["--student", "a", "--teacher", "b", "--form", "code"], "--form"),
        (["--student", "a", "--teacher", "b", "--pear", "x"], "Did you mean --pairs"),
    ],
)
def test_the_command_refuses_bad_input(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["caffe", "build", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


# ------------------------------------------------------------------------------------------ Python layers


class Blob:
    """As pycaffe's: data and diff of one shape."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.diff = data, np.zeros_like(data)

    def reshape(self, *shape: int) -> None:
        self.data, self.diff = np.zeros(shape, self.data.dtype), np.zeros(shape, self.data.dtype)


@pytest.fixture
def pycaffe_layer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str, str], Any]]:
    """Makes a Python layer from its source, with a module `caffe` that has what these layers use of it."""
    caffe = types.ModuleType("caffe")
    caffe.Layer = type("Layer", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "caffe", caffe)

    def make(module: str, name: str, param_str: str) -> Any:
        spec = importlib.util.spec_from_file_location(module, PYCAFFE / f"{module}.py")
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        made = getattr(loaded, name)()
        made.param_str = param_str
        return made

    yield make


def run_layer(made: Any, bottoms: list[Blob], weight: np.ndarray | float, down: list[bool]) -> Blob:
    top = Blob(np.zeros(1))
    made.setup(bottoms, [top])
    made.reshape(bottoms, [top])
    made.forward(bottoms, [top])
    top.diff[...] = weight
    made.backward([top], down, bottoms)
    return top


PYTHON_CASES = ["at_python", "at_python_equal_sample", "at_python_no_reshape", "at_python_weight"]


@pytest.mark.parametrize("case", PYTHON_CASES)
def test_the_python_layers_compute_what_the_reference_does(
    shared_reference: Path, case: str, pycaffe_layer: Callable[[str, str, str], Any]
) -> None:
    folder = shared_reference / "caffe" / "attention" / case
    loss = read_net(folder / "net.prototxt").layer[-1]
    expected = np.load(folder / "expected.npz")
    given = dict(np.load(folder / "inputs.npz"))
    maps = {side: Blob(expected[f"blob/map_{side}"]) for side in "st"}
    norms = {}
    layers = {side: pycaffe_layer("attention_normalize", "Normalize", "") for side in "st"}
    for side, made in layers.items():
        norms[side] = Blob(np.zeros(1))
        made.setup([maps[side]], [norms[side]])
        made.reshape([maps[side]], [norms[side]])
        made.forward([maps[side]], [norms[side]])
        assert_agrees(torch.from_numpy(norms[side].data), expected[f"blob/norm_{side}"], side)
    made = pycaffe_layer("attention_loss", "AttentionLoss", loss.python_param.param_str)
    top = run_layer(made, [norms["s"], norms["t"]], loss.loss_weight[0], [True, True])
    assert top.data.shape == expected["blob/at_loss"].shape
    assert_agrees(torch.from_numpy(top.data), expected["blob/at_loss"], "at_loss")
    squarings = sum(layer.type == "Power" for layer in read_net(folder / "net.prototxt").layer) // 2
    for side, normalize in layers.items():
        normalize.backward([norms[side]], [True], [maps[side]])
        activation = given[f"A_{side}"]
        power = 2**squarings
        slope = power * np.sign(activation) * np.abs(activation) ** (power - 1)
        energy_gradient = maps[side].diff.reshape(len(activation), 1, *activation.shape[2:])
        assert_agrees(torch.from_numpy(slope * energy_gradient), expected[f"grad/A_{side}"], f"grad/A_{side}")


def test_the_mean_over_samples_is_the_sum_by_their_number(
    pycaffe_layer: Callable[[str, str, str], Any],
) -> None:
    draw = np.random.default_rng(0)
    data = [draw.random((4, 1, 6, 1)) for _ in range(2)]
    results = []
    for param_str in ('{"beta": 8}', '{"beta": 8, "normalization": "BATCH_SIZE"}'):
        bottoms = [Blob(values.copy()) for values in data]
        top = run_layer(
            pycaffe_layer("attention_loss", "AttentionLoss", param_str), bottoms, 1, [True, False]
        )
        assert not bottoms[1].diff.any()
        results.append((top.data, bottoms[0].diff))
    np.testing.assert_allclose(results[0][0], 4 * results[1][0])
    np.testing.assert_allclose(results[0][1], 4 * results[1][1])


@pytest.mark.parametrize(
    ("shapes", "param_str", "message"),
    [
        ([(2, 1, 6, 1), (2, 1, 5, 1)], "", "equal size"),
        ([(2, 1, 6, 1)], "", "two bottoms"),
        ([(2, 3), (2, 3)], '{"normalization": "VALID"}', "SUM or BATCH_SIZE"),
    ],
)
def test_the_python_loss_refuses_what_it_cannot_compare(
    shapes: list[tuple[int, ...]], param_str: str, message: str, pycaffe_layer: Callable[[str, str, str], Any]
) -> None:
    bottoms = [Blob(np.zeros(shape)) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        run_layer(
            pycaffe_layer("attention_loss", "AttentionLoss", param_str), bottoms, 1, [True] * len(shapes)
        )


def test_the_python_sources_parse_in_python_2_too() -> None:
    for path in PYCAFFE.glob("*.py"):
        text = path.read_text()
        assert not set("→—…") & set(text) and text.isascii()
        assert 'f"' not in text and "print " not in text
