"""`caffe.check`: each mistake found, in the reference nets and in others; nothing in clean nets."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED

from attention_transfer.caffe import Net, check, schema, write_prototxt
from attention_transfer.caffe.checking import Finding
from attention_transfer.caffe.files.prototxt import layer_lines
from attention_transfer.caffe.graph import Graph
from attention_transfer.caffe.layers import REGISTRY
from attention_transfer.caffe.layers.base import UnsupportedError
from attention_transfer.caffe.schema import text_format
from attention_transfer.cli import main

REFERENCE = SHARED / "reference" / "caffe"


def folders(kind: str) -> list[str]:
    return sorted(path.name for path in (REFERENCE / kind).glob("*") if path.is_dir())


def found(net: Any, solver: Any = None) -> list[tuple[str, list[str]]]:
    return [(finding.pitfall, finding.layers) for finding in check(net, solver)]


# ---------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("name", folders("pitfalls"))
def test_a_reference_pitfall_is_found_and_its_repair_is_clean(name: str) -> None:
    folder = REFERENCE / "pitfalls" / name
    meta = json.loads((folder / "meta.json").read_text())
    solver = folder / "solver.prototxt" if (folder / "solver.prototxt").exists() else None
    expected = [(name, meta["layers"])] if meta["visible_in_prototxt"] else []
    assert found(folder / "net.prototxt", solver) == expected
    if (folder / "fixed.prototxt").exists():
        assert found(folder / "fixed.prototxt", solver) == found(folder / "fixed.prototxt") == []


@pytest.mark.parametrize("name", [n for n in folders("pitfalls") if n != "unknown_field"])
def test_the_line_is_that_of_the_first_layer(name: str) -> None:
    path = REFERENCE / "pitfalls" / name / "net.prototxt"
    lines = path.read_text().splitlines()
    for finding in check(path):
        assert lines[finding.line - 1] == "layer {"
        assert lines[finding.line] == f'  name: "{finding.layers[0]}"'
        assert all(layer in finding.message for layer in finding.layers)


@pytest.mark.parametrize("kind", ["layers", "attention", "nets", "solvers"])
def test_no_other_reference_net_raises_a_finding(shared_reference: Path, kind: str) -> None:
    findings = {path.parent.name: found(path) for path in REFERENCE.glob(f"{kind}/*/net.prototxt")}
    assert findings
    assert {name: wrong for name, wrong in findings.items() if wrong} == {}


# ------------------------------------------------------------------------------------------ nets of our own


def layer(name: str, kind: str, bottoms: str, top: str | None = None, text: str = "") -> Any:
    spec = schema.LayerParameter(name=name, type=kind, bottom=bottoms.split(), top=[top or name])
    return text_format.Parse(text, spec)


FROZEN = "param { lr_mult: 0 decay_mult: 0 }"
ONES = 'num_output: 1 kernel_size: 1 bias_term: false weight_filler { type: "constant" value: 1 }'


@dataclass(frozen=True)
class Shape:
    """What an attention transfer net looks like; `student` and `teacher` prefix the names of their layers."""

    student: str = "small"
    teacher: str = "large"
    depth: tuple[int, int] = (2, 3)  # blocks of student and teacher; the last is at half the resolution
    pairs: int = 1
    p: int = 2
    reshape: bool = True
    python: bool = False
    batch_norm: bool = False
    swapped: bool = False  # the teacher's map is the first bottom of the loss
    task: bool = True
    only_train: bool = False  # the teacher, the branches and the losses


def network(prefix: str, blocks: int, shape: Shape, frozen: bool) -> Iterator[Any]:
    bottom = "data"
    for block in range(1, blocks + 1):
        name = f"{prefix}/c{block}"
        stride = 2 if block == blocks else 1
        bias = "bias_term: false" if shape.batch_norm else ""
        specs = FROZEN * (1 if shape.batch_norm else 2) if frozen else ""
        text = (
            f"convolution_param {{ num_output: {3 + block} pad: 1 kernel_size: 3 stride: {stride} {bias} }}"
        )
        yield layer(name, "Convolution", bottom, text=f"{specs} {text}")
        if shape.batch_norm:
            stored = "batch_norm_param { use_global_stats: true }" if frozen else ""
            yield layer(f"{name}/bn", "BatchNorm", name, name, f"{FROZEN * 3} {stored}")
            specs = FROZEN * 2 if frozen else ""
            yield layer(f"{name}/scale", "Scale", name, name, f"{specs} scale_param {{ bias_term: true }}")
        yield layer(f"{name}/relu", "ReLU", name, name)
        bottom = name


def branch(tap: str, tag: str, shape: Shape) -> Iterator[Any]:
    bottom = tap
    if shape.reshape:
        bottom = f"flat/{tag}"
        yield layer(bottom, "Reshape", tap, text="reshape_param { shape { dim: 0 dim: 0 dim: -1 dim: 1 } }")
    yield layer(f"abs/{tag}", "AbsVal", bottom)
    bottom = f"abs/{tag}"
    for squaring in range({1: 0, 2: 1, 4: 2}[shape.p]):
        yield layer(f"pow{squaring}/{tag}", "Power", bottom, text="power_param { power: 2 }")
        bottom = f"pow{squaring}/{tag}"
    yield layer(f"map/{tag}", "Convolution", bottom, text=f"{FROZEN} convolution_param {{ {ONES} }}")
    unit = 'scale_filler { type: "constant" value: 1 }'
    yield layer(f"norm/{tag}", "Normalize", f"map/{tag}", text=f"{FROZEN} norm_param {{ {unit} }}")


def transfer(shape: Shape = Shape()) -> Any:
    """A clean attention transfer net."""
    net = schema.NetParameter(name="transfer")
    shapes = "shape { dim: 2 dim: 3 dim: 8 dim: 6 }"
    net.layer.add().CopyFrom(layer("data", "Input", "", text=f"input_param {{ {shapes} }}"))
    net.layer.add().CopyFrom(layer("label", "Input", "", text="input_param { shape { dim: 2 } }"))
    student, teacher = shape.student, shape.teacher
    net.layer.extend(network(student, shape.depth[0], shape, frozen=False))
    if shape.task:
        text = "inner_product_param { num_output: 4 }"
        net.layer.add().CopyFrom(layer("fc", "InnerProduct", f"{student}/c{shape.depth[0]}", text=text))
        net.layer.add().CopyFrom(layer("ce", "SoftmaxWithLoss", "fc label"))
        tested = "include { phase: TEST }"
        net.layer.add().CopyFrom(layer("accuracy", "Accuracy", "fc label", text=tested))
    added = len(net.layer)
    net.layer.extend(network(teacher, shape.depth[1], shape, frozen=True))
    for pair in range(shape.pairs):
        taps = [f"{student}/c{shape.depth[0] - pair}", f"{teacher}/c{shape.depth[1] - pair}"]
        net.layer.extend(branch(taps[0], f"s{pair}", shape))
        net.layer.extend(branch(taps[1], f"t{pair}", shape))
        maps = [f"norm/s{pair}", f"norm/t{pair}"]
        down = "propagate_down: true propagate_down: false"
        if shape.swapped:
            maps, down = maps[::-1], "propagate_down: false propagate_down: true"
        module = "python_param { module: 'attention_loss' layer: 'AttentionLoss' param_str: '{\"beta\": 1}' }"
        kind, own = ("Python", module) if shape.python else ("EuclideanLoss", "")
        text = f"{down} loss_weight: 2 {own}"
        net.layer.add().CopyFrom(layer(f"at{pair}", kind, " ".join(maps), text=text))
    if shape.only_train:
        for spec in net.layer[added:]:
            spec.include.add(phase=schema.TRAIN)
    return net


SHAPES = [
    Shape(),
    Shape(p=1),
    Shape(p=4, student="kleiner", teacher="grosser"),
    Shape(reshape=False, depth=(2, 2)),
    Shape(python=True, pairs=2),
    Shape(batch_norm=True, depth=(2, 4)),
    Shape(batch_norm=True, pairs=2, python=True, p=1, reshape=False),
    Shape(swapped=True, p=4, depth=(1, 1)),
    Shape(only_train=True, batch_norm=True),
    Shape(task=False),
]


def of(net: Any, name: str) -> Any:
    """The layer of this name."""
    (spec,) = (spec for spec in net.layer if spec.name == name)
    return spec


def in_place(net: Any, name: str) -> list[str]:
    """Make a layer write onto its bottom."""
    spec = of(net, name)
    old, new = spec.top[0], spec.bottom[0]
    spec.top[0] = new
    for other in net.layer:
        for i, bottom in enumerate(other.bottom):
            if bottom == old and other is not spec:
                other.bottom[i] = new
    return [name]


def thaw(net: Any, names: list[str]) -> list[str]:
    for name in names:
        del of(net, name).param[:]
    return names


def uncut(net: Any) -> list[str]:
    """Let every loss that compares maps send gradients to both."""
    losses = [spec for spec in net.layer if spec.name.startswith("at")]
    for spec in losses:
        del spec.propagate_down[:]
    return [spec.name for spec in losses]


def teachers(net: Any, shape: Shape, kind: str) -> list[str]:
    return [s.name for s in net.layer if s.name.startswith(f"{shape.teacher}/") and s.type == kind]


def thaw_teacher(net: Any, shape: Shape) -> list[str]:
    kinds = ("Convolution", "Scale")
    return thaw(
        net, [s.name for s in net.layer if s.name.startswith(f"{shape.teacher}/") and s.type in kinds]
    )


Mistake = Callable[
    [Any, Shape], "list[str] | None"
]  # changes the net; the layers to blame, None: does not apply
MISTAKES: dict[str, list[Mistake]] = {}


def mistake(name: str) -> Callable[[Mistake], Mistake]:
    def enter(make: Mistake) -> Mistake:
        MISTAKES.setdefault(name, []).append(make)
        return make

    return enter


@mistake("absval_in_place")
def _(net: Any, shape: Shape) -> list[str] | None:
    return in_place(net, "abs/t0") if shape.reshape else None


@mistake("reshape_in_place")
def _(net: Any, shape: Shape) -> list[str] | None:
    return in_place(net, "flat/t0") if shape.reshape and shape.teacher == "large" else None


@mistake("power_in_place")
def _(net: Any, shape: Shape) -> list[str] | None:
    return in_place(net, "pow0/s0") + in_place(net, "pow0/t0") if shape.p > 1 else None


@mistake("normalize_in_place")
def _(net: Any, shape: Shape) -> list[str] | None:
    return in_place(net, "norm/s0")


@mistake("normalize_in_place")
def _(net: Any, shape: Shape) -> list[str] | None:
    return in_place(net, "norm/t0")


@mistake("power_4_at_zero")
def _(net: Any, shape: Shape) -> list[str] | None:
    if shape.p != 2:
        return None
    of(net, "pow0/s0").power_param.power = 4
    return ["pow0/s0"]


@mistake("power_3_at_zero")
def _(net: Any, shape: Shape) -> list[str] | None:
    if shape.p != 2:
        return None
    of(net, "pow0/s0").power_param.power = 3
    of(net, "pow0/t0").power_param.power = 3
    return ["pow0/s0", "pow0/t0"]


@mistake("power_half_at_zero")
def _(net: Any, shape: Shape) -> list[str] | None:
    if shape.p != 4:
        return None
    of(net, "pow1/s0").power_param.power = 0.5
    return ["pow1/s0"]


@mistake("map_convolution_bias")
def _(net: Any, shape: Shape) -> list[str] | None:
    of(net, "map/s0").convolution_param.ClearField("bias_term")
    return ["map/s0"]


@mistake("map_convolution_bias")
def _(net: Any, shape: Shape) -> list[str] | None:
    of(net, "map/t0").convolution_param.bias_term = True
    return ["map/t0"]


@mistake("map_convolution_filler")
def _(net: Any, shape: Shape) -> list[str] | None:
    of(net, "map/t0").convolution_param.ClearField("weight_filler")
    return ["map/t0"]


@mistake("map_convolution_filler")
def _(net: Any, shape: Shape) -> list[str] | None:
    of(net, "map/s0").convolution_param.weight_filler.type = "xavier"
    return ["map/s0"]


@mistake("map_convolution_learns")
def _(net: Any, shape: Shape) -> list[str] | None:
    return thaw(net, ["map/s0"])


@mistake("normalize_scale_learns")
def _(net: Any, shape: Shape) -> list[str] | None:
    return thaw(net, ["norm/s0"])


@mistake("normalize_scale_decays")
def _(net: Any, shape: Shape) -> list[str] | None:
    return thaw(net, ["norm/t0"])


@mistake("normalize_each_position")
def _(net: Any, shape: Shape) -> list[str] | None:
    of(net, "norm/t0").norm_param.across_spatial = False
    return ["norm/t0"]


@mistake("reshape_merges_channels")
def _(net: Any, shape: Shape) -> list[str] | None:
    if not shape.reshape:
        return None
    for name in ("flat/s0", "flat/t0"):
        of(net, name).reshape_param.shape.dim[:] = [0, -1, 1, 1]
    return ["flat/s0", "flat/t0"]


@mistake("euclidean_counts")
def _(net: Any, shape: Shape) -> list[str] | None:
    tap = f"{shape.teacher}/c{shape.depth[1]}"
    of(net, tap).convolution_param.stride[:] = [1]
    return ["at0"]


@mistake("python_loss_without_weight")
def _(net: Any, shape: Shape) -> list[str] | None:
    losses = [spec for spec in net.layer if spec.type == "Python"]
    for spec in losses:
        del spec.loss_weight[:]
    return [spec.name for spec in losses] or None


@mistake("attention_without_loss")
def _(net: Any, shape: Shape) -> list[str] | None:
    of(net, "at0").loss_weight[:] = [0]
    return ["at0"] if shape.task else None


@mistake("teacher_trains")
def _(net: Any, shape: Shape) -> list[str] | None:
    uncut(net)
    return thaw_teacher(net, shape) if shape.task else None


@mistake("teacher_decays")
def _(net: Any, shape: Shape) -> list[str] | None:
    return thaw_teacher(net, shape)


@mistake("teacher_decays")
def _(net: Any, shape: Shape) -> list[str] | None:
    return thaw(net, [f"{shape.teacher}/c1"])


@mistake("teacher_bias_trains")
def _(net: Any, shape: Shape) -> list[str] | None:
    uncut(net)
    for name in (names := teachers(net, shape, "Convolution")):
        del of(net, name).param[1:]
    return None if shape.batch_norm else names


@mistake("teacher_scale_trains")
def _(net: Any, shape: Shape) -> list[str] | None:
    uncut(net)
    return thaw(net, teachers(net, shape, "Scale")) or None


@mistake("teacher_batchnorm_moves")
def _(net: Any, shape: Shape) -> list[str] | None:
    for name in (names := teachers(net, shape, "BatchNorm")):
        of(net, name).ClearField("batch_norm_param")
    return names or None


@mistake("teacher_backward_runs")
def _(net: Any, shape: Shape) -> list[str] | None:
    names = teachers(net, shape, "BatchNorm")
    return names + uncut(net) if names else None


@mistake("force_backward_overrides")
def _(net: Any, shape: Shape) -> list[str] | None:
    net.force_backward = True
    return [spec.name for spec in net.layer if spec.name.startswith("at")]


@mistake("accuracy_with_force_backward")
def _(net: Any, shape: Shape) -> list[str] | None:
    if not shape.task:
        return None
    accuracy = of(net, "accuracy")
    del net.layer[list(net.layer).index(accuracy) + 1 :]  # with a teacher, force_backward itself is a mistake
    net.force_backward = True
    del accuracy.include[:]
    return ["accuracy"]


@mistake("same_layer_name")
def _(net: Any, shape: Shape) -> list[str] | None:
    of(net, f"{shape.teacher}/c1").name = f"{shape.student}/c1"
    return [f"{shape.student}/c1"]


@mistake("same_parameter_name")
def _(net: Any, shape: Shape) -> list[str] | None:
    names = [f"{shape.student}/c1", f"{shape.teacher}/c1"]
    for name in names:
        if not of(net, name).param:
            of(net, name).param.add()
        of(net, name).param[0].name = "kernel"
    return names


@mistake("same_parameter_name_multipliers")
def _(net: Any, shape: Shape) -> list[str] | None:
    names = [f"{shape.student}/c1", f"{shape.teacher}/c1"]
    of(net, names[0]).param.add(lr_mult=1)
    for name in names:
        of(net, name).param[0].name = "kernel"
    return names


@mistake("softmax_loss_two_tops")
def _(net: Any, shape: Shape) -> list[str] | None:
    if not shape.task:
        return None
    of(net, "ce").top.append("probabilities")
    return ["ce"]


@mistake("tap_before_in_place_relu")
def _(net: Any, shape: Shape) -> list[str] | None:
    name = f"{shape.teacher}/c{shape.depth[1]}/relu"
    relu = of(net, name)
    later = schema.LayerParameter()
    later.CopyFrom(relu)
    net.layer.remove(relu)
    net.layer.add().CopyFrom(later)
    first = "flat/t0" if shape.reshape else "abs/t0"
    return [first, name]


@mistake("pooling_empty_window")
def _(net: Any, shape: Shape) -> list[str] | None:
    net.layer.add().CopyFrom(
        layer(
            "pool",
            "Pooling",
            "data",
            text="pooling_param { kernel_size: 1 stride: 2 } include { phase: TEST }",
        )
    )
    return ["pool"]


@mistake("teacher_dropout")
def _(net: Any, shape: Shape) -> list[str] | None:
    relu = of(net, f"{shape.teacher}/c1/relu")
    relu.type = "Dropout"
    return [relu.name]


def applies(make: Mistake, shape: Shape) -> bool:
    return make(transfer(shape), shape) is not None


CASES = [
    pytest.param(name, make, shape, id=f"{name}-{i}-{SHAPES.index(shape)}")
    for name, several in MISTAKES.items()
    for i, make in enumerate(several)
    for shape in SHAPES
    if applies(make, shape)
]


@pytest.mark.parametrize(("name", "make", "shape"), CASES)
def test_a_mistake_is_found_in_nets_of_every_shape(
    name: str, make: Mistake, shape: Shape, tmp_path: Path
) -> None:
    net = transfer(shape)
    blamed = make(net, shape)
    write_prototxt(net, tmp_path / "net.prototxt")
    order = [spec.name for spec in net.layer].index
    assert found(tmp_path / "net.prototxt") == [(name, sorted(blamed or [], key=order))]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_clean_net_of_every_shape_raises_nothing(shape: Shape) -> None:
    assert check(transfer(shape)) == []


def test_several_mistakes_are_found_together() -> None:
    net, shape = transfer(Shape(batch_norm=True)), Shape(batch_norm=True)
    in_place(net, "norm/s0")
    thaw(net, ["map/t0", "large/c2"])
    of(net, "large/c1/bn").ClearField("batch_norm_param")
    assert found(net) == [
        ("teacher_batchnorm_moves", ["large/c1/bn"]),
        ("teacher_decays", ["large/c2"]),
        ("normalize_in_place", ["norm/s0"]),
        ("map_convolution_learns", ["map/t0"]),
    ]
    assert shape.batch_norm


@pytest.mark.parametrize("size", [(12, 4), (4, 12)])
@pytest.mark.parametrize(
    ("reshape", "name"), [(True, "euclidean_shapes"), (False, "euclidean_shapes_no_reshape")]
)
def test_maps_of_equal_area_and_other_shape_are_found(
    size: tuple[int, int], reshape: bool, name: str
) -> None:
    net = transfer(Shape(reshape=reshape, depth=(1, 1)))
    shape = f"shape {{ dim: 2 dim: 3 dim: {size[0]} dim: {size[1]} }}"
    source = layer("other", "Input", "", text=f"input_param {{ {shape} }}")
    net.layer.insert(0, source)
    of(net, "large/c1").bottom[0] = "other"
    assert found(net) == [(name, ["at0"])]


# ---------------------------------------------------------------------------- where Caffe runs backward


@pytest.mark.parametrize("force", [False, True])
def test_backward_runs_where_something_learns_below_a_loss(force: bool) -> None:
    """The student learns up to its loss; what leads to no loss, or is cut off, is left out unless forced."""
    net = transfer(Shape(batch_norm=True))
    net.layer.add().CopyFrom(layer("unread", "TanH", "small/c2"))
    net.force_backward = force
    net.state.phase = schema.TRAIN
    graph = Graph(net)
    names = {node.name for node in graph.backward}
    alone = {"unread", "large/c1", "large/c1/bn", "flat/t0", "norm/t0"}
    assert names >= {"small/c1", "small/c1/bn", "flat/s0", "norm/s0", "at0", "fc", "ce"}
    assert names & alone == (alone if force else set())
    assert {blob.name for blob in graph.gradients} >= {"small/c1", "fc", "norm/s0"}
    assert ("norm/t0" in {blob.name for blob in graph.gradients}) == force


# ------------------------------------------------------------------------------------------------- solvers


def solver(**fields: Any) -> Any:
    return schema.SolverParameter(net="net.prototxt", base_lr=0.1, **fields)


def test_without_weight_decay_nothing_decays() -> None:
    net = transfer()
    thaw(net, ["norm/t0", "large/c1"])
    assert found(net, solver(weight_decay=0.1)) == found(net)
    assert [name for name, _ in found(net)] == ["teacher_decays", "normalize_scale_decays"]
    assert found(net, solver()) == []


def test_clipping_makes_force_backward_worse() -> None:
    net = transfer()
    net.force_backward = True
    (mild,), (worse,) = check(net, solver()), check(net, solver(clip_gradients=1))
    assert "steps shrink" in worse.message and "steps shrink" not in mild.message


def test_the_states_of_the_solver_are_looked_at() -> None:
    net = transfer()
    in_place(net, "norm/s0")
    for spec in net.layer:
        if spec.name.startswith(("at", "norm", "map")):
            spec.include.add(stage=["transfer"])
    assert found(net) == []
    staged = solver()
    staged.train_state.stage.append("transfer")
    assert found(net, staged) == [("normalize_in_place", ["norm/s0"])]


# --------------------------------------------------------------------------------------------- clean nets


def text(name: str, kind: str, bottoms: str, top: str | None = None, fields: str = "") -> str:
    return "layer {" + text_format.MessageToString(layer(name, kind, bottoms, top, fields)) + "} "


IMAGE = "input_param { shape { dim: 2 dim: 4 dim: 6 dim: 6 } }"
FOUR = "convolution_param { num_output: 4 kernel_size: 1 }"
NAMED = 'param { name: "w" } param { name: "b" }'
HALVED = "pooling_param { pool: AVE kernel_size: 2 stride: 2 }"
DATA = text("x", "Input", "", fields=IMAGE)
CONV = text("c", "Convolution", "x", fields=FOUR)
SQUARES = text("q", "Power", "c", fields="power_param { power: 2 }")
MAP = text("m", "Convolution", "q", fields=f"{FROZEN} convolution_param {{ {ONES} }}")


def classified(scores: str) -> str:
    """A label, and a classifier over a blob."""
    label = text("y", "Input", "", fields="input_param { shape { dim: 2 } }")
    fc = text("f", "InnerProduct", scores, fields="inner_product_param { num_output: 3 }")
    return label + fc + text("ce", "SoftmaxWithLoss", "f y")


CLEAN = {
    "SSD's Normalize learns its scale": DATA
    + CONV
    + text("n", "Normalize", "c", fields="norm_param { across_spatial: false }")
    + classified("n"),
    "input scaled in place": DATA
    + text("s", "Power", "x", "x", "power_param { scale: 0.004 }")
    + CONV
    + classified("c"),
    "twins": DATA
    + text("z", "Input", "", fields=IMAGE)
    + text("c", "Convolution", "x", fields=f"{NAMED} {FOUR}")
    + text("d", "Convolution", "z", fields=f"{NAMED} {FOUR}")
    + text("l", "EuclideanLoss", "c d"),
    "a density map": DATA
    + text("c", "Convolution", "x", fields="convolution_param { num_output: 1 kernel_size: 1 }")
    + text("t", "Input", "", fields=IMAGE.replace("4", "1"))
    + text("l", "EuclideanLoss", "c t"),
    "root mean square pooling with a shift": DATA
    + CONV
    + SQUARES
    + text("p", "Pooling", "q", fields=HALVED)
    + text("r", "Power", "p", fields="power_param { power: 0.5 shift: 1e-6 }")
    + classified("r"),
    "one name in two phases": text("x", "Input", "", fields=f"include {{ phase: TRAIN }} {IMAGE}")
    + text("x", "Input", "", fields=f"include {{ phase: TEST }} {IMAGE}")
    + CONV,
    "an output of maps": DATA + CONV + SQUARES + MAP + text("n", "Normalize", "m", fields=FROZEN),
}


@pytest.mark.parametrize("name", CLEAN)
def test_other_kinds_of_nets_are_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / "net.prototxt").write_text(CLEAN[name])
    assert check(tmp_path / "net.prototxt") == []


def test_a_teacher_with_a_loss_of_its_own_is_still_the_teacher() -> None:
    net = transfer(Shape(batch_norm=True))
    fc = layer(
        "fc/t", "InnerProduct", "large/c3", text=f"{FROZEN * 2} inner_product_param {{ num_output: 4 }}"
    )
    net.layer.extend([fc, layer("ce/t", "SoftmaxWithLoss", "fc/t label")])
    assert check(net) == []
    thaw(net, ["large/c1/scale"])
    assert found(net) == [("teacher_scale_trains", ["large/c1/scale"])]


def test_the_rest_of_the_teacher_behind_its_taps_counts_too() -> None:
    net = transfer()
    net.layer.add().CopyFrom(
        layer("fc/t", "InnerProduct", "large/c3", text="inner_product_param { num_output: 4 }")
    )
    assert found(net) == [("teacher_decays", ["fc/t"])]


@pytest.mark.parametrize("python", [True, False])
def test_a_second_loss_that_counts_for_nothing_may_watch(python: bool) -> None:
    net = transfer()
    watching = net.layer.add()
    watching.CopyFrom(of(transfer(Shape(python=python)), "at0"))
    watching.name, watching.top[0] = "watching", "watching"
    del watching.loss_weight[:]
    watching.loss_weight.extend([] if python else [0])
    assert check(net) == []
    net.layer.remove(of(net, "at0"))
    assert found(net) == [
        ("python_loss_without_weight" if python else "attention_without_loss", ["watching"])
    ]


def test_a_python_loss_between_scores_needs_a_weight_too() -> None:
    net = transfer()
    fc = layer(
        "fc/t", "InnerProduct", "large/c3", text=f"{FROZEN * 2} inner_product_param {{ num_output: 4 }}"
    )
    module = "python_param { module: 'soft' layer: 'DistillationLossLayer' }"
    net.layer.extend([fc, layer("kd", "Python", "fc fc/t", text=module)])
    assert found(net) == [("python_loss_without_weight", ["kd"])]
    of(net, "kd").loss_weight.append(1)
    assert check(net) == []


def test_layers_of_one_network_may_be_compared() -> None:
    """Self-distillation: the deeper layer is cut off as a teacher is, and still learns its own task."""
    net = transfer(Shape(depth=(3, 1)))
    of(net, "flat/t0").bottom[0] = "small/c3"
    of(net, "flat/s0").bottom[0] = "small/c2"
    kept = [spec for spec in net.layer if not spec.name.startswith("large")]
    del net.layer[:]
    net.layer.extend(kept)
    of(net, "small/c3").convolution_param.stride[:] = [1]
    assert check(net) == []


# ------------------------------------------------------------------------------- what does not build at all


def one(kind: str, text: str = "", bottoms: str = "x", top: str = "y") -> Any:
    """A net of an input (2, 3, 7, 7) and one layer."""
    net = schema.NetParameter()
    shape = "input_param { shape { dim: 2 dim: 3 dim: 7 dim: 7 } }"
    net.layer.extend([layer("x", "Input", "", text=shape), layer("y", kind, bottoms, top, text)])
    return net


REFUSED = [
    ("Convolution", "convolution_param { num_output: 2 }", "1 or 2 values of kernel"),
    ("Convolution", "convolution_param { num_output: 2 kernel_h: 3 }", "kernel_h and kernel_w"),
    ("Convolution", "convolution_param { num_output: 4 kernel_size: 3 group: 2 }", "multiples of group"),
    (
        "Convolution",
        "convolution_param { num_output: 4 kernel_size: 9 }",
        "bottoms that it can work on, got (2, 3, 7, 7)",
    ),
    (
        "Convolution",
        'convolution_param { num_output: 4 kernel_size: 3 weight_filler { type: "he" } }',
        "filler",
    ),
    ("Convolution", "convolution_param { num_output: 2 kernel_size: 3 kernel_h: 3 kernel_w: 3 }", "got both"),
    (
        "Convolution",
        "convolution_param { num_output: 2 kernel_size: 3 stride: 2 stride_h: 2 }",
        "either stride",
    ),
    ("Deconvolution", "convolution_param { num_output: 2 kernel_size: 3 pad: 1 pad_w: 1 }", "either pad, or"),
    ("Pooling", "pooling_param { }", "a kernel of 1 or more"),
    (
        "Pooling",
        "pooling_param { kernel_size: 2 kernel_h: 2 kernel_w: 2 }",
        "either kernel_size, or kernel_h",
    ),
    ("Pooling", "pooling_param { kernel_size: 2 stride: 2 stride_h: 2 stride_w: 2 }", "either stride, or"),
    ("Pooling", "pooling_param { kernel_size: 2 pad: 1 pad_h: 1 }", "either pad, or"),
    ("Pooling", "pooling_param { kernel_size: 2 pad_h: 1 }", "pad_h and pad_w, or pad, got one of the two"),
    ("Pooling", "pooling_param { kernel_h: 2 }", "kernel_h and kernel_w, or kernel_size, got one of the two"),
    ("Pooling", "pooling_param { kernel_size: 9 }", "a kernel that fits into its bottom"),
    ("Pooling", "pooling_param { global_pooling: true stride: 2 }", "a stride of 1 beside global_pooling"),
    ("Pooling", "pooling_param { global_pooling: true kernel_h: 2 kernel_w: 2 }", "beside global_pooling"),
    ("Dropout", "dropout_param { dropout_ratio: 1.5 }", "a dropout_ratio from 0 to 1"),
    ("Pooling", "pooling_param { global_pooling: true pad: 1 }", "beside global_pooling"),
    ("Relu", "", "a type that this package runs, got 'Relu'"),
    ("Softmax", "softmax_param { axis: 4 }", "an axis of its bottom"),
    ("ReLU", "loss_weight: 1 loss_weight: 1", "one for each of 1 tops"),
    ("InnerProduct", "", "num_output of 1 or more"),
]


@pytest.mark.parametrize(("kind", "text", "reason"), REFUSED)
def test_what_the_net_refuses_is_a_finding_in_both_phases(kind: str, text: str, reason: str) -> None:
    net = one(kind, text)
    with pytest.raises(ValueError, match=re.escape(reason)):
        Net(net)
    (finding,) = check(net)
    assert (finding.pitfall, finding.layers, finding.note) == ("does_not_build", ["y"], False)
    assert reason in finding.message and "in TRAIN and TEST" in finding.message


def test_two_layers_of_one_top_are_a_finding_and_so_is_all_that_is_wrong() -> None:
    net = one("ReLU")
    net.layer.extend(
        [layer("z", "TanH", "x", "y"), layer("q", "LRN", "y", text="lrn_param { local_size: 2 }")]
    )
    net.layer[3].include.add(phase=schema.TEST)
    findings = check(net)
    assert [(f.pitfall, f.layers) for f in findings] == [("does_not_build", ["z"]), ("does_not_build", ["q"])]
    assert "a top that no other layer makes" in findings[0].message
    assert "builds the net in TEST:" in findings[1].message


@pytest.mark.parametrize("kind", sorted(REGISTRY))
def test_a_layer_with_any_number_of_bottoms_and_tops_is_checked_as_the_net_takes_it(kind: str) -> None:
    """Never an exception, and a finding where, and only where, the net refuses."""
    for bottoms, tops, in_place in itertools.product(range(4), range(3), (False, True)):
        net = one("Convolution", "convolution_param { num_output: 3 kernel_size: 1 }", top="c")
        names = ["c" if in_place and tops else "t", "u"][:tops]
        net.layer.add(name="l", type=kind, bottom=["c", "x", "c"][:bottoms], top=names)
        refused = []
        for phase in ("TRAIN", "TEST"):
            try:
                Net(net, phase=phase)
            except UnsupportedError:  # which Caffe runs
                pass
            except ValueError as error:
                refused.append(error)
        findings = check(net)
        assert bool(findings) >= bool(refused), (bottoms, tops)
        assert bool(refused) >= any(f.pitfall == "does_not_build" for f in findings), (bottoms, tops)


@pytest.mark.parametrize("place", range(4))
def test_dimensions_of_0_are_refused(place: int) -> None:
    net = one("ReLU")
    net.layer[0].input_param.shape[0].dim[place] = 0
    with pytest.raises(ValueError, match="dimensions of 1 or more"):
        Net(net)
    assert [(finding.pitfall, finding.layers) for finding in check(net)] == [("does_not_build", ["x"])]


@pytest.mark.parametrize("kind", ["Convolution", "Deconvolution"])
@pytest.mark.parametrize(("bottoms", "tops"), [(1, 2), (2, 1), (2, 3)])
def test_a_layer_gives_a_top_for_each_bottom(kind: str, bottoms: int, tops: int) -> None:
    net = one(kind, "convolution_param { num_output: 2 kernel_size: 3 }")
    net.layer[1].bottom[:] = ["x"] * bottoms
    net.layer[1].top[:] = ["a", "b", "c"][:tops]
    with pytest.raises(ValueError, match=f"expected {bottoms} tops for its bottoms, got {tops}"):
        Net(net)
    assert found(net) == [("does_not_build", ["y"])]


def test_a_layer_without_its_top_is_found_where_another_misses_that() -> None:
    net = one("ReLU")
    net.layer.add().CopyFrom(layer("z", "TanH", "y"))
    for spec in net.layer[1:]:
        spec.include.add(phase=schema.TEST)
    net.layer[1].ClearField("top")
    assert found(net) == [("does_not_build", ["y"])]


def test_a_net_without_layers_is_refused() -> None:
    net = one("ReLU")
    for spec in net.layer:
        spec.include.add(phase=schema.TRAIN)
    with pytest.raises(ValueError, match="expected layers in the phase TEST, got none"):
        Net(net, phase="TEST")
    with pytest.raises(ValueError, match="check: expected a net with layers, got none"):
        check(schema.NetParameter())


def test_what_only_some_caffes_run_is_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = one("Convolution", "convolution_param { num_output: 2 kernel_size: 3 engine: CUDNN }")
    net.layer.add().CopyFrom(layer("z", "ReLU", "y", text="relu_param { engine: CAFFE }"))
    solver = schema.SolverParameter(lr_policy="plateau", base_lr=1, gamma=0.1, plateau_winsize=[3], net="n")
    notes = check(net, solver)
    expected = [("plateau_of_the_ssd_fork", []), ("engine_cudnn", ["y"])]
    assert [(f.pitfall, f.layers) for f in notes] == expected and all(f.note for f in notes)
    files = tmp_path / "net.prototxt", tmp_path / "solver.prototxt"
    write_prototxt(net, files[0])
    write_prototxt(solver, files[1])
    assert main(["caffe", "check", str(files[0]), "--solver", str(files[1])]) == 0
    printed = capsys.readouterr().out
    line = files[0].read_text().split('name: "y"')[0].count("\n")
    assert f"{files[0]}:{line}: note: engine_cudnn: y" in printed and f"{files[0]}: nothing found" in printed


def test_a_dropout_of_all_is_a_mistake_in_training_alone() -> None:
    net = one("Dropout", "dropout_param { dropout_ratio: 1 }")
    assert found(net) == [("dropout_of_all", ["y"])]
    net.layer[1].include.add(phase=schema.TEST)
    assert found(net) == []


def test_what_caffe_alone_runs_is_no_mistake() -> None:
    for kind in ("LSTM", "PriorBox", "MemoryData"):
        assert check(one(kind, bottoms="" if kind == "MemoryData" else "x")) == []


def test_a_phase_that_the_solver_asks_for_has_to_hold_together() -> None:
    net = one("ReLU")
    net.layer[0].include.add(phase=schema.TRAIN)
    assert check(net) == check(net, schema.SolverParameter()) == []
    (finding,) = check(net, schema.SolverParameter(test_iter=[1], test_interval=1))
    assert (finding.pitfall, finding.layers) == ("does_not_build", ["y"])
    assert "in TEST" in finding.message and "'x'" in finding.message


SOLVER = 'net: "a.prototxt"\nbase_lr: 0.1\nlr_policy: "fixed"\nmax_iter: 10\ntype: "SGD"\n'


def test_a_solver_in_the_place_of_a_net_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solver, net = tmp_path / "solver.prototxt", tmp_path / "net.prototxt"
    solver.write_text(SOLVER)
    write_prototxt(one("ReLU"), net)
    with pytest.raises(ValueError, match=r"expected a net's prototxt, got a solver's in .*--solver"):
        check(solver)
    with pytest.raises(ValueError, match="It is a field of a solver: is the file one"):
        Net(solver)
    with pytest.raises(ValueError, match="It is a field of a net: is the file one"):
        check(net, net)
    assert main(["caffe", "check", str(solver)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# --------------------------------------------------------------------------------------------------- files


def test_a_misspelt_field_is_read_as_the_one_that_is_meant(tmp_path: Path) -> None:
    text = text_format.MessageToString(transfer())
    path = tmp_path / "net.prototxt"
    path.write_text(text.replace("lr_mult: 0", "lr_mul: 0", 1))
    (finding,) = check(path)
    assert (finding.pitfall, finding.layers) == ("unknown_field", ["large/c1"])
    assert finding.line == text[: text.index("lr_mult")].count("\n") + 1
    assert "'lr_mul'" in finding.message and "lr_mult?" in finding.mend


def test_fields_that_do_not_exist_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "net.prototxt"
    path.write_text(
        "force_backwards: false\n"
        'layer { name: "x" type: "Input" top: "x" zz < a: \'b\' "c" > input_param { shape { dims: [1] } } }\n'
        'layer { name: "c" type: "Convolution" bottom: "x" top: "c" zz { outputs: -3 } kernel: 3 }'
    )
    fields = [finding for finding in check(path) if finding.pitfall == "unknown_field"]
    places = [(1, []), (2, ["x", "c"]), (2, ["x"]), (3, ["c"])]
    assert [(finding.line, finding.layers) for finding in fields] == places
    assert [finding.mend.startswith("Did you mean") for finding in fields] == [True, False, True, False]


def test_fields_of_other_caffes_are_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "net.prototxt"
    path.write_text(
        DATA + 'layer { name: "p" type: "PriorBox" bottom: "x" prior_box_param { min_size: 30 } }'
    )
    assert check(path) == []


def test_old_forms_are_checked_at_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "net.prototxt"
    path.write_text(
        'input: "x"\ninput_dim: 2 input_dim: 3 input_dim: 6 input_dim: 6\n'
        'layers { name: "p" type: POOLING bottom: "x" top: "p" pooling_param { kernel_size: 1 } }\n'
        'layers { name: "a" type: ABSVAL bottom: "p" top: "p" }\n'
    )
    (finding,) = check(path)
    assert (finding.pitfall, finding.layers, finding.line) == ("absval_in_place", ["a"], 4)


def test_shapes_of_data_layers_are_told_by_their_crop(tmp_path: Path) -> None:
    source = 'type: "Data" data_param { source: "absent" batch_size: 2 }'
    data = f'layer {{ name: "x" {source} top: "x" top: "y" transform_param {{ crop_size: %d }} }} '
    pool = (
        'layer { name: "p" type: "Pooling" bottom: "x" top: "p" pooling_param { kernel_size: 2 stride: 3 } }'
    )
    path = tmp_path / "net.prototxt"
    path.write_text(data % 6 + pool)
    assert found(path) == [("pooling_empty_window", ["p"])]
    path.write_text(data % 5 + pool)
    assert found(path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('layer { name: "a" type: "ReLU" bottom: "b" top: "a" }', "got 'b' in layer 'a'"),
        ("layer { pooling_param { pool: MIDDLE } }", 'has no value named "?MIDDLE'),
        ("layer {", "Expected"),
        ("layer { bottom: 3 }", "string"),
        ("layer { include { phase: TRAIN } exclude { phase: TEST } }", "got both"),
    ],
)
def test_bad_files_give_one_clear_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "net.prototxt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        check(path)
    assert main(["caffe", "check", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# ------------------------------------------------------------------------------------------------- command


def test_the_command_prints_findings_and_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = transfer()
    thaw(net, ["norm/t0"])
    path = tmp_path / "net.prototxt"
    write_prototxt(net, path)
    line = layer_lines(path.read_text())[[spec.name for spec in net.layer].index("norm/t0")]
    assert main(["caffe", "check", str(path)]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith(f"{path}:{line}: normalize_scale_decays: norm/t0\n")
    assert "weight decay" in printed and "Mend: Add `param { lr_mult: 0 decay_mult: 0 }`." in printed
    write_prototxt(solver(), tmp_path / "solver.prototxt")
    assert main(["caffe", "check", str(path), "--solver", str(tmp_path / "solver.prototxt")]) == 0
    assert capsys.readouterr().out == f"{path}: nothing found\n"


@pytest.mark.parametrize("arguments", [[], ["absent.prototxt"], ["net.prototxt", "--sover", "x"]])
def test_the_command_refuses_bad_input(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["caffe", "check", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1


def test_a_finding_is_a_value() -> None:
    finding = Finding("x", ["a"], 1, "m", "n")
    assert replace(finding, line=2) != finding == Finding("x", ["a"], 1, "m", "n")
