"""Layers of other forks: plain formulas in float64 written here, gradients, conversion, what check says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_caffe_conversion import assert_same, load
from torch import Tensor

from attention_transfer.caffe import Net, check, convert, schema, to_caffemodel
from attention_transfer.caffe.files.caffemodel import write_binary
from attention_transfer.caffe.files.prototxt import parse_net
from attention_transfer.caffe.layers import count_blobs

SHAPE = (2, 6, 7, 5)


def source(name: str, *dims: int) -> str:
    shape = " ".join(f"dim: {dim}" for dim in dims)
    return f'layer {{ name: "{name}" type: "Input" top: "{name}" input_param {{ shape {{ {shape} }} }} }}\n'


def net_of(
    kind: str, text: str = "", shapes: tuple[tuple[int, ...], ...] = (SHAPE,), phase: str = "TRAIN"
) -> Net:
    """A net in doubles of Input layers x0, x1, ... and one layer, its blobs drawn at random."""
    names = [f"x{place}" for place in range(len(shapes))]
    declared = "".join(source(name, *shape) for name, shape in zip(names, shapes, strict=True))
    bottoms = " ".join(f'bottom: "{name}"' for name in names)
    net = Net(
        parse_net(f'{declared}layer {{ name: "y" type: "{kind}" {bottoms} top: "y" {text} }}'), phase=phase
    )
    net.double()
    with torch.no_grad():
        for blob in net.params.get("y", []):
            blob.copy_(torch.rand(blob.shape, dtype=torch.float64) + 0.5)
    return net


def assert_agrees(net: Net, want: Any, inputs: list[Tensor]) -> None:
    """The top, and all gradients of its product with random numbers, are those of the formula."""
    blobs = [blob for blob in net.params.get("y", []) if blob.requires_grad]
    own = [blob.detach().clone().requires_grad_() for blob in blobs]
    expected = want(*[x.detach().clone().requires_grad_() for x in inputs], *own)
    top = net({f"x{place}": x.requires_grad_() for place, x in enumerate(inputs)})["y"]
    torch.testing.assert_close(top, expected[0], rtol=1e-12, atol=1e-12)
    weight = torch.randn(top.shape, dtype=torch.float64)
    asked = [*(inputs[place] for place in expected[2]), *blobs]
    got = torch.autograd.grad((top * weight).sum(), asked)
    wanted = torch.autograd.grad((expected[0] * weight).sum(), [*expected[1], *own])
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["DepthwiseConvolution", "ConvolutionDepthwise"])
@pytest.mark.parametrize("group", ["", "group: 6"])
@pytest.mark.parametrize("bias", ["true", "false"])
def test_a_depthwise_convolution_is_one_filter_a_channel(kind: str, group: str, bias: str) -> None:
    text = f"num_output: 6 kernel_size: 3 stride: 2 pad: 1 bias_term: {bias} {group}"
    net = net_of(kind, f"convolution_param {{ {text} }}")

    def want(x: Tensor, weight: Tensor, *shift: Tensor) -> Any:
        padded = F.pad(x, (1, 1, 1, 1))
        rows = [
            torch.stack(
                [(padded[:, :, i : i + 3, j : j + 3] * weight[:, 0]).sum((2, 3)) for j in (0, 2, 4)], 2
            )
            for i in (0, 2, 4, 6)
        ]
        top = torch.stack(rows, 2)
        return (top + shift[0].view(-1, 1, 1) if shift else top), [x], [0]

    assert_agrees(net, want, [draw(*SHAPE)])
    assert net.params["y"][0].shape == (6, 1, 3, 3)


def test_where_it_states_groups_only_one_kind_looks_at_them() -> None:
    text = "convolution_param { num_output: 6 kernel_size: 1 group: 3 }"
    assert net_of("DepthwiseConvolution", text).params["y"][0].shape == (6, 2, 1, 1)
    assert net_of("ConvolutionDepthwise", text).params["y"][0].shape == (6, 1, 1, 1)


@pytest.mark.parametrize(
    ("frozen", "phase"), [("false", "TRAIN"), ("false", "TEST"), ("true", "TRAIN"), ("true", "TEST")]
)
def test_bn_of_four_blobs(frozen: str, phase: str) -> None:
    net = net_of("BN", f"bn_param {{ frozen: {frozen} momentum: 0.75 eps: 0.001 }}", phase=phase)
    factor, shift, *stored = [blob.detach().clone() for blob in net.params["y"]]
    x = draw(*SHAPE)
    by_batch = frozen == "false" and phase == "TRAIN"
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)

    def want(x: Tensor, *own: Tensor) -> Any:
        mean, variance = stored
        if by_batch:
            mean = x.mean((0, 2, 3), keepdim=True)
            variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
        eps = torch.tensor(0.001, dtype=torch.float32).double()
        first, second = own or (factor, shift)
        return (x - mean) / (variance + eps).sqrt() * first + second, [x], [0]

    assert_agrees(net, want, [x])
    moved = [0.75 * old + 0.25 * new for old, new in zip(stored, (mean, variance), strict=True)]
    for got, expected in zip(net.params["y"][2:], moved if by_batch else stored, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert [entry.lr_mult for entry in net.learnable] == ([0] * 4 if frozen == "true" else [1, 1, 0, 0])


@pytest.mark.parametrize("mode", ["LEARN", "INFERENCE"])
@pytest.mark.parametrize("phase", ["TRAIN", "TEST"])
def test_bn_of_two_blobs(mode: str, phase: str) -> None:
    net = net_of("BN", f"bn_param {{ bn_mode: {mode} }}", phase=phase)
    assert [tuple(blob.shape) for blob in net.params["y"]] == [(1, 6, 1, 1)] * 2

    def want(x: Tensor, factor: Tensor, shift: Tensor) -> Any:
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        normalised = (x - mean) / (variance + 1e-9).sqrt() if mode == "LEARN" else x
        return normalised * factor + shift, [x], [0]

    assert_agrees(net, want, [draw(*SHAPE)])


@pytest.mark.parametrize(
    ("text", "blobs"),
    [
        ("", 4), ("param {} param {}", 2), ("param {} param {} param {} param {}", 4),
        ("bn_param { shift_filler {} }", 2), ("bn_param { slope_filler {} }", 4),
        ("param {} param {} bn_param { frozen: true }", 4),
    ],
)  # fmt: skip
def test_the_two_kinds_of_bn_are_told_apart_by_fields(text: str, blobs: int) -> None:
    net = net_of("BN", text)
    assert len(net.params["y"]) == blobs == count_blobs(net.proto.layer[-1])


@pytest.mark.parametrize("blobs", [2, 4])
def test_the_two_kinds_of_bn_are_told_apart_by_blobs(blobs: int, tmp_path: Path) -> None:
    text = source("x0", *SHAPE) + 'layer { name: "y" type: "BN" bottom: "x0" top: "y" }'
    stored = net_of("BN", "bn_param { bn_mode: LEARN }" if blobs == 2 else "").to_caffemodel()
    stored.layer[-1].ClearField("bn_param")
    net = Net(parse_net(text), stored)
    assert len(net.params["y"]) == blobs
    convert(parse_net(text), stored, tmp_path)


def test_a_bn_of_both_kinds_is_refused() -> None:
    with pytest.raises(ValueError, match="the fields of PSPNet's BN or of SegNet's, got both: bn_mode, eps"):
        net_of("BN", "bn_param { bn_mode: LEARN eps: 1 }")


@pytest.mark.parametrize("slope", [0.0, 0.25])
def test_relu6(slope: float) -> None:
    net = net_of("ReLU6", f"relu6_param {{ negative_slope: {slope} }}", ((5,),))
    x = torch.tensor([-8.0, 0.0, 2.0, 6.0, 9.0], dtype=torch.float64, requires_grad=True)
    top = net({"x0": x})["y"]
    assert top.tolist() == [-8 * slope, 0, 2, 6, 6]
    assert torch.autograd.grad(top.sum(), x)[0].tolist() == [slope, slope, 1, 0, 0]
    assert net({"x0": torch.full((5,), torch.nan)})["y"].isnan().all()


@pytest.mark.parametrize("trailing", [(1, 1), ()])
def test_axpy(trailing: tuple[int, ...]) -> None:
    net = net_of("Axpy", shapes=((2, 6, *trailing), SHAPE, SHAPE))

    def want(a: Tensor, x: Tensor, y: Tensor) -> Any:
        return torch.einsum("bc,bchw->bchw", a.reshape(2, 6), x) + y, [a, x, y], [0, 1, 2]

    assert_agrees(net, want, [draw(2, 6, *trailing), draw(*SHAPE), draw(*SHAPE)])
    with pytest.raises(ValueError, match=r"bottoms \(n, c, 1, 1\), and twice"):
        net_of("Axpy", shapes=((2, 6, 7, 5), SHAPE, SHAPE))


def interpolated(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear between places i (n - 1) / (m - 1), as matrices."""
    matrices = []
    for n, m in zip(x.shape[2:], size, strict=True):
        matrix = torch.zeros(m, n, dtype=torch.float64)
        for i in range(m):
            place = i * (n - 1) / (m - 1) if m > 1 else 0.0
            below = min(int(place), n - 1)
            matrix[i, below] += 1 - (place - below)
            matrix[i, min(below + 1, n - 1)] += place - below
        matrices.append(matrix)
    return torch.einsum("ij,bcjk,lk->bcil", matrices[0], x, matrices[1])


INTERPS = [
    ("height: 9 width: 4", (9, 4), (0, 0)),
    ("height: 1 width: 1", (1, 1), (0, 0)),
    ("zoom_factor: 3", (19, 13), (0, 0)),
    ("shrink_factor: 2", (4, 3), (0, 0)),
    ("shrink_factor: 2 zoom_factor: 4", (13, 9), (0, 0)),
    ("shrink_factor: 2 height: 9 width: 4", (4, 3), (0, 0)),
    ("zoom_factor: 2 pad_beg: -1 pad_end: -2", (7, 3), (1, 2)),
    ("height: 7 width: 7 pad_beg: -1", (7, 7), (1, 0)),
]


@pytest.mark.parametrize(("text", "size", "cut"), INTERPS)
def test_interp(text: str, size: tuple[int, int], cut: tuple[int, int], tmp_path: Path) -> None:
    net = net_of("Interp", f"interp_param {{ {text} }}")

    def want(x: Tensor) -> Any:
        begin, end = cut
        return interpolated(x[:, :, begin : x.shape[2] - end, begin : x.shape[3] - end], size), [x], [0]

    assert_agrees(net, want, [draw(*SHAPE)])
    assert net.shapes["y"] == (2, 6, *size)
    model = load(convert(net.proto, net.to_caffemodel(), tmp_path, phase="TRAIN")).load().double()
    x = draw(*SHAPE)
    assert_same(model(x), net({"x0": x})["y"])


def test_interp_takes_the_size_of_a_second_bottom() -> None:
    net = net_of("Interp", shapes=(SHAPE, (2, 1, 3, 11)))
    reference = draw(2, 1, 3, 11).requires_grad_()
    x = draw(*SHAPE)
    top = net({"x0": x, "x1": reference})["y"]
    torch.testing.assert_close(top, interpolated(x, (3, 11)), rtol=1e-12, atol=1e-12)
    assert not top.requires_grad


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "height and width, a factor, or a second bottom"),
        ("interp_param { height: 3 }", "height and width, a factor"),
        ("interp_param { zoom_factor: 0 }", "factors of 1 or more"),
        ("interp_param { zoom_factor: 2 pad_beg: 1 }", "pads of 0 or less"),
        ("interp_param { zoom_factor: 2 pad_beg: -5 }", "a size of 1 or more"),
    ],
)
def test_interp_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        net_of("Interp", text)


FORKED = (
    source("data", 2, 3, 9, 9)
    + """
layer { name: "c" type: "Convolution" bottom: "data" top: "c"
  convolution_param { num_output: 6 kernel_size: 3 weight_filler { type: "xavier" } } }
layer { name: "bn" type: "BN" bottom: "c" top: "c" bn_param { slope_filler { value: 1 } } }
layer { name: "r" type: "ReLU6" bottom: "c" top: "c" }
layer { name: "d" type: "DepthwiseConvolution" bottom: "c" top: "d"
  convolution_param { num_output: 6 kernel_size: 3 pad: 1 group: 6 weight_filler { type: "xavier" } } }
layer { name: "s" type: "BN" bottom: "d" top: "s" bn_param { bn_mode: INFERENCE scale_filler { value: 2 } } }
layer { name: "g" type: "Pooling" bottom: "s" top: "g" pooling_param { pool: AVE global_pooling: true } }
layer { name: "a" type: "Axpy" bottom: "g" bottom: "s" bottom: "c" top: "a" }
layer { name: "i" type: "Interp" bottom: "a" top: "i" interp_param { zoom_factor: 2 } }
layer { name: "k" type: "Parameter" top: "k" parameter_param { shape { dim: 1 dim: 6 dim: 1 dim: 1 } } }
layer { name: "t" type: "Tile" bottom: "k" top: "t" tile_param { axis: 0 tiles: 2 } }
layer { name: "m" type: "Axpy" bottom: "t" bottom: "i" bottom: "i" top: "m" }
"""
)


def test_a_net_of_them_converts_and_comes_back(tmp_path: Path) -> None:
    net = Net(parse_net(FORKED))
    for layer in net.layers:
        for index, blob in enumerate(layer.blobs):
            layer.put_blob(index, torch.rand(blob.shape) + 0.5)
    write_binary(net.to_caffemodel(), tmp_path / "w.caffemodel")
    folder = convert(parse_net(FORKED), tmp_path / "w.caffemodel", tmp_path / "c")
    model, x = load(folder).load(), torch.randn(2, 3, 9, 9)
    assert_same(model(x), net({"data": x})["m"])
    back = Net(parse_net(FORKED), to_caffemodel(parse_net(FORKED), model.state_dict()))
    for name, blobs in net.params.items():
        for one, other in zip(blobs, back.params[name], strict=True):
            assert torch.equal(one, other), name


def test_check_notes_the_types_of_forks() -> None:
    (finding,) = check(parse_net(FORKED))
    assert finding.note and finding.pitfall == "layer_of_a_fork"
    assert finding.layers == ["bn", "r", "d", "s", "a", "i", "m"]
    assert "Neither stock Caffe nor the SSD fork" in finding.message and "PSPNet's" in finding.message


# ------------------------------------------------------------------------------------- the SSD fork's schema

SSD = """
layer { name: "data" type: "AnnotatedData" top: "data" top: "label" include { phase: TRAIN }
  transform_param { scale: 0.007843 mirror: true mean_value: 127.5 mean_value: 127.5 mean_value: 127.5
    resize_param { prob: 1 resize_mode: WARP height: 300 width: 300 interp_mode: LINEAR interp_mode: AREA }
    emit_constraint { emit_type: CENTER } distort_param { brightness_prob: 0.5 brightness_delta: 32 }
    expand_param { prob: 0.5 max_expand_ratio: 4 } noise_param { prob: 0.1 saltpepper_param { value: 3 } }
    crop_h: 3 crop_w: 4 }
  data_param { source: "lmdb" batch_size: 4 backend: LMDB }
  annotated_data_param { label_map_file: "map" batch_sampler { max_sample: 1 max_trials: 50
    sampler { min_scale: 0.3 max_aspect_ratio: 2 } sample_constraint { min_jaccard_overlap: 0.1 } } } }
layer { name: "prior" type: "PriorBox" bottom: "c" bottom: "data" top: "prior"
  prior_box_param { min_size: 60 max_size: 105 aspect_ratio: 2 flip: true variance: 0.1 offset: 0.5 } }
layer { name: "loss" type: "MultiBoxLoss" bottom: "l" bottom: "c" bottom: "prior" bottom: "label" top: "loss"
  loss_param { normalization: VALID } multibox_loss_param { loc_loss_type: SMOOTH_L1 num_classes: 21
    code_type: CENTER_SIZE mining_type: MAX_NEGATIVE nms_param { nms_threshold: 0.4 } } }
layer { name: "out" type: "DetectionOutput" bottom: "l" bottom: "c" bottom: "prior" top: "out"
  detection_output_param { num_classes: 21 keep_top_k: 100 save_output_param { output_format: "VOC" }
    confidence_threshold: 0.25 } }
layer { name: "eval" type: "DetectionEvaluate" bottom: "out" bottom: "label" top: "eval"
  detection_evaluate_param { num_classes: 21 evaluate_difficult_gt: false } }
layer { name: "v" type: "VideoData" top: "v" video_data_param { video_type: VIDEO skip_frames: 2 } }
"""


def test_the_fields_of_the_ssd_fork_are_read_and_kept() -> None:
    net = parse_net(SSD)
    again = schema.NetParameter.FromString(net.SerializeToString())
    assert again == net
    data, prior, loss, *_ = net.layer
    assert data.transform_param.resize_param.height == 300
    assert data.annotated_data_param.batch_sampler[0].sampler.min_scale == pytest.approx(0.3)
    assert (prior.prior_box_param.clip, list(prior.prior_box_param.max_size)) == (False, [105])
    assert loss.multibox_loss_param.code_type == 2


@pytest.mark.parametrize(
    ("message", "field", "number"),
    [
        ("LayerParameter", "annotated_data_param", 200), ("LayerParameter", "multibox_loss_param", 201),
        ("LayerParameter", "prior_box_param", 203), ("LayerParameter", "detection_output_param", 204),
        ("LayerParameter", "detection_evaluate_param", 205), ("LayerParameter", "video_data_param", 207),
        ("TransformationParameter", "resize_param", 8), ("TransformationParameter", "crop_h", 11),
        ("TransformationParameter", "expand_param", 14), ("SolverState", "minimum_loss", 5),
        ("SolverState", "iter_last_event", 6), ("SolverParameter", "plateau_winsize", 43),
    ],
)  # fmt: skip
def test_the_numbers_are_those_of_the_fork(message: str, field: str, number: int) -> None:
    messages = schema.NetParameter.DESCRIPTOR.file.message_types_by_name
    assert messages[message].fields_by_name[field].number == number


@pytest.mark.parametrize(
    "kind", ["AnnotatedData", "PriorBox", "MultiBoxLoss", "DetectionOutput", "SmoothL1Loss"]
)
def test_its_layers_are_refused_only_where_they_would_run(kind: str) -> None:
    net = parse_net(f'layer {{ name: "y" type: "{kind}" top: "y" }}')
    with pytest.raises(ValueError, match=f"got '{kind}', which the SSD fork of Caffe alone runs"):
        Net(net)
