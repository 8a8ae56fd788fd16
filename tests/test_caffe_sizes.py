"""Images of nets whose data are elsewhere, maps of sizes that differ by one, detectors of the SSD fork."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from attention_transfer import attention_map
from attention_transfer.caffe import Net, build, check, convert, read_net, schema, write_prototxt
from attention_transfer.caffe.building.networks import survey_student
from attention_transfer.caffe.files.caffemodel import write_binary
from attention_transfer.caffe.files.prototxt import parse_net
from attention_transfer.cli import main


def head(bottom: str) -> str:
    param = "inner_product_param { num_output: 4 }"
    return f'layer {{ name: "fc" type: "InnerProduct" bottom: "{bottom}" top: "fc" {param} }}'


def conv(
    name: str, bottom: str, outputs: int, kernel: int = 3, stride: int = 1, pad: int = 1, more: str = ""
) -> str:
    return (
        f'layer {{ name: "{name}" type: "Convolution" bottom: "{bottom}" top: "{name}" convolution_param {{ '
        f"num_output: {outputs} kernel_size: {kernel} stride: {stride} pad: {pad} {more} "
        f'weight_filler {{ type: "msra" }} }} }}\n'
        f'layer {{ name: "{name}/r" type: "ReLU" bottom: "{name}" top: "{name}" }}\n'
    )


def image(channels: int = 3, size: int = 12, batch: int = 2) -> str:
    dims = f"dim: {batch} dim: {channels} dim: {size} dim: {size}"
    return f'layer {{ name: "data" type: "Input" top: "data" input_param {{ shape {{ {dims} }} }} }}\n'


# ------------------------------------------------------------------------------------------------- channels


def data(kind: str = "Data", transform: str = "crop_size: 12", own: str = "") -> str:
    named = {"Data": "data_param", "AnnotatedData": "data_param", "ImageData": "image_data_param"}[kind]
    return (
        f'layer {{ name: "data" type: "{kind}" top: "data" top: "label" transform_param {{ {transform} }} '
        f"{named} {{ {own} batch_size: 2 }} }}\n"
    )


def small(source: str) -> Any:
    loss = 'layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }'
    return parse_net(source + conv("c1", "data", 4) + head("c1") + loss)


def large(channels: int = 3) -> Any:
    return parse_net(image(channels) + conv("c1", "data", 5) + conv("c2", "c1", 6) + head("c2"))


def weights(channels: int, batch: int = 2) -> Any:
    """Of `small`, for images of so many channels."""
    net = small(data())
    net.layer[0].CopyFrom(parse_net(image(channels)).layer[0])
    net.layer.insert(1, schema.LayerParameter(name="label", type="Input", top=["label"]))
    net.layer[1].input_param.shape.add(dim=[batch])
    return Net(net).to_caffemodel()


def teacher_weights(channels: int) -> Any:
    return Net(large(channels)).to_caffemodel()


def database(folder: Path, channels: int, *, encoded: bool = False) -> str:
    pixels = np.zeros((channels, 14, 14), np.uint8)
    datum = schema.Datum(channels=channels, height=14, width=14, data=pixels.tobytes(), label=1)
    if encoded:
        file = io.BytesIO()
        Image.fromarray(pixels[0] if channels == 1 else pixels.transpose(1, 2, 0)).save(file, "png")
        datum = schema.Datum(data=file.getvalue(), encoded=True)
    with lmdb.open(str(folder)) as environment, environment.begin(write=True) as transaction:
        for number in range(3):
            transaction.put(b"%d" % number, datum.SerializeToString())
    return f'backend: LMDB source: "{folder}"'


@pytest.mark.parametrize("channels", [1, 3])
def test_one_mean_value_does_not_say_how_many_channels_there_are(channels: int, tmp_path: Path) -> None:
    """Caffe takes it from every channel: the weights tell."""
    net = small(data(transform="crop_size: 12 mean_value: 128", own='source: "absent"'))
    made = build(
        net, large(channels), student_weights=weights(channels), teacher_weights=teacher_weights(channels)
    )
    assert made.notes == [
        f"images of {channels} channel{'s' * (channels > 1)}, as the student's weights take."
    ]
    assert {record.name for record in made.weights.layer} >= {"c1", "teacher_c1"}
    assert build(net, large(), teacher_weights=teacher_weights(3)).notes[0].startswith("images of 3 channels")
    folder = convert(net, weights(channels), tmp_path, output="c1")
    assert f"nn.Conv2d({channels}, 4, 3" in (folder / "model.py").read_text()


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_data_tell_the_channels(channels: int, encoded: bool, tmp_path: Path) -> None:
    source = database(tmp_path / "db", channels, encoded=encoded)
    net = small(data(transform="crop_size: 12 mean_value: 128", own=source))
    made = build(net, large(channels), teacher_weights=teacher_weights(channels))
    assert made.notes == [f"images of {channels} channel{'s' * (channels > 1)}, as {tmp_path / 'db'} has."]
    with pytest.raises(
        ValueError, match=rf"images of {4 - channels} channels, as the student's weights take, got"
    ):
        build(net, large(channels), student_weights=weights(4 - channels))


@pytest.mark.parametrize(("color", "channels"), [("", 3), ("is_color: false", 1)])
def test_image_data_says_whether_it_is_colour(color: str, channels: int) -> None:
    net = small(data("ImageData", "mirror: true", f"{color} new_height: 12 new_width: 12"))
    made = build(net, large(channels), teacher_weights=teacher_weights(channels))
    assert made.notes[0].startswith(f"images of {channels} channel")


@pytest.mark.parametrize(
    ("transform", "why"),
    [
        ("force_gray: true", "images of 1 channel, as force_gray has"),
        ("force_color: true mean_value: 1", "images of 3 channels, as force_color has"),
        (
            "mean_value: 1 mean_value: 2 mean_value: 3 mean_value: 4",
            "images of 4 channels, as its mean_value has",
        ),
        ("", "images of 3 channels, which is assumed: nothing tells"),
    ],
)
def test_else_the_prototxt_tells_or_nothing(transform: str, why: str) -> None:
    net = small(data(transform=f"crop_size: 12 {transform}", own='source: "absent"'))
    assert build(net, large()).notes[0].startswith(why)


def test_the_teachers_weights_tell_where_nothing_else_does() -> None:
    net = small(data(transform="crop_size: 12 mean_value: 9"))
    teacher = large(1)
    teacher.layer[0].CopyFrom(parse_net(data(transform="crop_size: 12 mean_value: 9")).layer[0])
    made = build(net, teacher, teacher_weights=teacher_weights(1))
    assert made.notes == ["images of 1 channel, as the teacher's weights take."]


def test_the_channels_may_be_stated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = small(data(own='source: "absent"'))
    made = build(net, large(1), teacher_weights=teacher_weights(1), channels=1)
    assert made.notes == ["images of 1 channel, as stated."]
    with pytest.raises(ValueError, match="expected channels of 1 or more, got 0"):
        build(net, large(1), channels=0)
    files = tmp_path / "s.prototxt", tmp_path / "t.prototxt", tmp_path / "t.caffemodel"
    write_prototxt(net, files[0])
    write_prototxt(large(1), files[1])
    write_binary(teacher_weights(1), files[2])
    flags = ["--student", str(files[0]), "--teacher", str(files[1]), "--teacher-weights", str(files[2])]
    assert main(["caffe", "build", *flags, "--channels", "1", "-o", str(tmp_path / "at.prototxt")]) == 0
    assert "note: images of 1 channel, as stated.\n" in capsys.readouterr().out


def test_an_assumption_about_the_images_makes_no_mistake() -> None:
    """Of 1 channel the group is wrong, of 3 it is right, and the other way about; 5 groups suit neither."""
    for outputs, group, mistakes in ((3, 3, []), (4, 2, [["c"]]), (5, 5, [["c"]])):
        net = parse_net(data() + conv("c", "data", outputs, more=f"group: {group}"))
        assert [finding.layers for finding in check(net)] == mistakes
    net = parse_net(data() + conv("c", "data", 3, more="group: 3"))
    assert [finding.layers for finding in check(net, channels=1)] == [["c"]]
    net = parse_net(data() + 'layer { name: "s" type: "Slice" bottom: "data" top: "a" top: "b" top: "c" }')
    assert check(net) == []
    net = parse_net(data() + 'layer { name: "s" type: "Slice" bottom: "data" top: "a" top: "b" }')
    assert [finding.layers for finding in check(net)] == [["s"]]


# ---------------------------------------------------------------------------------- sizes that differ by one


def chain(first: str, name: str) -> Any:
    return parse_net(first + head(name))


def padded(size: int) -> Any:
    """Maps a of size / 2, b of size / 4, rounded up, whose centres are at 2 i and 4 i."""
    return chain(image(size=size) + conv("a", "data", 4, stride=2) + conv("b", "a", 5, stride=2), "b")


def bare(size: int) -> Any:
    """Maps without padding, one smaller where the size is odd, with centres at 2 i + 1 and 4 i + 3."""
    text = image(size=size) + conv("a", "data", 6, stride=2, pad=0) + conv("b", "a", 7, stride=2, pad=0)
    return chain(text, "b")


def cut(x: Tensor, offset: tuple[int, int], size: torch.Size) -> Tensor:
    return x[:, :, offset[0] : offset[0] + size[2], offset[1] : offset[1] + size[3]]


@pytest.mark.parametrize("student_larger", [True, False])
@pytest.mark.parametrize("normalize", ["ssd", "python"])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_maps_that_differ_by_one_are_cropped(student_larger: bool, normalize: str, p: int) -> None:
    nets = padded(19), bare(19)  # 10 and 5; 9 and 4
    made = build(*(nets if student_larger else nets[::-1]), p=p, beta=1.0, normalize=normalize)
    assert [(pair.student, pair.teacher) for pair in made.pairs] == [("a", "teacher_a"), ("b", "teacher_b")]
    side = "s" if student_larger else "t"
    # of b, 4 i + 3 lies closer to the next of 4 i; of a, 2 i + 1 is as close to both
    assert [pair.cropped for pair in made.pairs] == [(side, (0, 0)), (side, (1, 1))]
    assert all(pair.pooled is None for pair in made.pairs) and check(made.net) == []
    net = Net(made.net, phase="TRAIN").double()
    blobs = net({"data": torch.randn(2, 3, 19, 19, dtype=torch.float64), "label": torch.tensor([0, 1])})
    total = blobs["loss"].detach().clone()
    for name, offset in (("a", (0, 0)), ("b", (1, 1))):
        both = [blobs[name], blobs[f"teacher_{name}"]]
        large_one, small_one = both if student_larger else both[::-1]
        cropped = cut(large_one, offset, small_one.shape)
        one, other = (cropped, small_one) if student_larger else (small_one, cropped)
        maps = [attention_map(x, p=float(p)) for x in (one, other)]
        total += (maps[0] - maps[1]).square().sum() / 4
    torch.testing.assert_close(net.loss, total, rtol=1e-6, atol=0)
    net.loss.backward()
    for name, own in net.params.items():
        learns = not name.startswith(("teacher", "map", "norm"))
        assert all((blob.grad is not None and bool(blob.grad.any())) == learns for blob in own[:1]), name


def averaged(by: int) -> str:
    """A map b of size / by, rounded up."""
    param = f"pooling_param {{ pool: AVE kernel_size: {by} stride: {by} }}"
    return f'{conv("c", "data", 4)}layer {{ name: "b" type: "Pooling" bottom: "c" top: "b" {param} }}'


@pytest.mark.parametrize(
    ("size", "coarse", "pooled", "cropped"),
    [
        (8, conv("b", "data", 4, 2, 2, 0), (2, 2), None),
        (9, conv("b", "data", 4, 2, 2, 0), (2, 2), (0, 0)),
        (7, averaged(2), (2, 2), None),
        (57, conv("b", "data", 4, 4, 4, 0), (4, 4), (0, 0)),
        (55, averaged(4), (4, 4), None),
        (15, conv("b", "data", 4, 2, 1, 0), None, (0, 0)),
        (4, conv("b", "data", 4, 2, 1, 0), None, (0, 0)),
    ],
)
def test_a_multiple_but_for_one_is_pooled_too(
    size: int, coarse: str, pooled: tuple[int, int] | None, cropped: tuple[int, int] | None
) -> None:
    fine = chain(image(size=size) + conv("a", "data", 4), "a")
    made = build(chain(image(size=size) + coarse, "b"), fine, pairs="b:a", beta=1.0)
    (pair,) = made.pairs
    assert (pair.pooled, pair.cropped) == (pooled and ("t", pooled), cropped and ("t", cropped))
    assert check(made.net) == []
    net = Net(made.net, phase="TRAIN").double()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    blobs = net({"data": images, "label": torch.tensor([0, 1])})
    energy, by = attention_map(blobs["teacher_a"], norm=None)[:, None], pooled or (1, 1)
    energy = F.avg_pool2d(energy, by, ceil_mode=True)
    wanted = cut(energy, (0, 0), blobs["b"].shape).flatten(1)
    wanted = F.normalize(wanted) - attention_map(blobs["b"]).flatten(1)
    torch.testing.assert_close(net.loss - blobs["loss"], wanted.square().sum() / 4, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("sizes", [(10, 8), (6, 4), (54, 28)])
def test_maps_that_differ_by_more_are_refused(sizes: tuple[int, int]) -> None:
    fine = chain(image(size=sizes[0]) + conv("a", "data", 4), "a")
    coarse = chain(image(size=sizes[0]) + conv("b", "data", 4, sizes[0] - sizes[1] + 1, 1, 0), "b")
    with pytest.raises(ValueError, match="whole multiple of the other, got 'b' of"):
        build(coarse, fine, pairs="b:a")


def test_rows_and_columns_may_differ_apart() -> None:
    wide = image().replace("dim: 12 }", "dim: 9 }")
    low = conv("b", "data", 4).replace("kernel_size: 3", "kernel_h: 4 kernel_w: 3")
    low = low.replace("pad: 1", "pad_h: 1 pad_w: 1")
    student, teacher = chain(wide + low, "b"), chain(wide + conv("a", "data", 4), "a")
    assert (Net(student).shapes["b"][2:], Net(teacher).shapes["a"][2:]) == ((11, 9), (12, 9))
    (pair,) = build(student, teacher, pairs="b:a").pairs
    assert pair.cropped == ("t", (0, 0)) and pair.pooled is None


def test_the_command_says_what_is_cropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tmp_path / "s.prototxt", tmp_path / "t.prototxt"
    write_prototxt(bare(19), files[0])
    write_prototxt(padded(19), files[1])
    flags = ["--student", str(files[0]), "--teacher", str(files[1]), "-o", str(tmp_path / "at.prototxt")]
    assert main(["caffe", "build", *flags]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "a 6x9x9 teacher_a 4x10x10 9x9 (teacher's cropped from 0,0 on)" in printed
    assert "b 7x4x4 teacher_b 5x5x5 4x4 (teacher's cropped from 1,1 on)" in printed
    assert [layer.type for layer in read_net(tmp_path / "at.prototxt").layer].count("Crop") == 2


def test_where_the_positions_of_a_map_lie() -> None:
    """In the middle of the pixels that they see, each as often as it is seen."""
    text = image(size=65, batch=1) + conv("a", "data", 4, 7, 2, 3)
    mean = "pooling_param { pool: AVE kernel_size: 3 stride: 2 }"
    text += f'layer {{ name: "p" type: "Pooling" bottom: "a" top: "p" {mean} }}'
    text += conv("b", "p", 4, 3, 2, 0, "dilation: 2")
    network = survey_student(parse_net(text + head("b")))
    raster = network.raster(network.graph.last["b"])
    assert raster == [(8.0, 10.0), (8.0, 10.0)]
    net = Net(parse_net(text), phase="TEST")
    for layer in net.layers:
        for index, blob in enumerate(layer.blobs):
            layer.put_blob(index, torch.ones(blob.shape))
    x = torch.ones(1, 3, 65, 65, requires_grad=True)
    (seen,) = torch.autograd.grad(net({"data": x})["b"][0, 0, 2, 3], x)
    share = seen[0, 0] / seen[0, 0].sum()
    rows, columns = share.sum(1), share.sum(0)
    assert float(rows @ torch.arange(65.0)) == pytest.approx(10 + 2 * 8)
    assert float(columns @ torch.arange(65.0)) == pytest.approx(10 + 3 * 8)


# ------------------------------------------------------------------------------------------------ detectors


def detector(first: str, last: str) -> Any:
    """A small net of SSD's, with a head on two maps."""
    text = first + conv("c1", "data", 4, stride=2) + conv("c2", "c1", 6, stride=2)
    for name in ("c1", "c2"):
        text += f"""
layer {{ name: "{name}_loc" type: "Convolution" bottom: "{name}" top: "{name}_loc"
  convolution_param {{ num_output: 12 kernel_size: 3 pad: 1 }} }}
layer {{ name: "{name}_perm" type: "Permute" bottom: "{name}_loc" top: "{name}_perm"
  permute_param {{ order: 0 order: 2 order: 3 order: 1 }} }}
layer {{ name: "{name}_flat" type: "Flatten" bottom: "{name}_perm" top: "{name}_flat" }}
layer {{ name: "{name}_prior" type: "PriorBox" bottom: "{name}" bottom: "data" top: "{name}_prior"
  prior_box_param {{ min_size: 4 max_size: 8 }} }}"""
    return parse_net(f"""{text}
layer {{ name: "loc" type: "Concat" bottom: "c1_flat" bottom: "c2_flat" top: "loc" }}
layer {{ name: "prior" type: "Concat" bottom: "c1_prior" bottom: "c2_prior" top: "prior"
  concat_param {{ axis: 2 }} }}
{last}""")


MULTIBOX = """layer { name: "loss" type: "MultiBoxLoss" bottom: "loc" bottom: "loc" bottom: "prior"
  bottom: "label" top: "loss" multibox_loss_param { num_classes: 3 } }"""
OUTPUT = """layer { name: "out" type: "DetectionOutput" bottom: "loc" bottom: "loc" bottom: "prior" top: "out"
  detection_output_param { num_classes: 3 } }"""
ANNOTATED = data("AnnotatedData", "resize_param { height: 16 width: 16 }", 'source: "absent"')


@pytest.mark.parametrize(
    "teacher", [detector(image(size=16), OUTPUT), detector(ANNOTATED, MULTIBOX)], ids=["deploy", "train"]
)
def test_a_detector_is_a_teacher_without_its_head(teacher: Any) -> None:
    student = parse_net(
        image(size=16) + conv("a", "data", 3, stride=2) + conv("b", "a", 3, stride=2) + head("b")
    )
    made = build(student, teacher)
    assert [(pair.student, pair.teacher) for pair in made.pairs] == [("a", "teacher_c1"), ("b", "teacher_c2")]
    assert made.notes == [] and check(made.net) == []
    net = Net(made.net, phase="TRAIN")
    net({"data": torch.randn(2, 3, 16, 16), "label": torch.tensor([0, 1])})
    net.loss.backward()


def test_a_detector_for_deployment_is_a_student_without_its_head() -> None:
    made = build(detector(image(size=16), OUTPUT), large_of(16))
    assert {layer.type for layer in made.net.layer} & {"PriorBox", "DetectionOutput", "Permute"} == set()
    assert "a detector without a loss" in made.notes[0]
    net = Net(made.net, phase="TRAIN")
    net({"data": torch.randn(2, 3, 16, 16)})
    net.loss.backward()
    assert net.params["c1"][0].grad is not None and net.params["teacher_a"][0].grad is None


def test_a_detector_in_training_keeps_its_head_for_the_ssd_fork() -> None:
    made = build(detector(ANNOTATED, MULTIBOX), large_of(16))
    assert made.notes[0].startswith("images of 3 channels, which is assumed")
    assert made.notes[-1] == (
        "AnnotatedData, MultiBoxLoss, PriorBox: in the SSD fork alone; `caffe train` cannot run this net."
    )
    assert [pair.student for pair in made.pairs] == ["c1", "c2"]
    with pytest.raises(ValueError, match="which the SSD fork of Caffe alone runs"):
        Net(made.net, phase="TRAIN")


def large_of(size: int) -> Any:
    text = image(size=size) + conv("a", "data", 5, stride=2) + conv("b", "a", 5, stride=2)
    return parse_net(text + head("b"))
