"""Caffe's files: read, upgraded, written, and refused in one line where they are damaged or hostile."""

from __future__ import annotations

import importlib.util
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from attention_transfer.caffe import (
    Net,
    check,
    read_caffemodel,
    read_net,
    read_solver,
    schema,
    write_prototxt,
)
from attention_transfer.caffe.files.caffemodel import (
    array_blob,
    blob_array,
    read_mean,
    read_solverstate,
    same_shape,
    write_binary,
)
from attention_transfer.caffe.files.prototxt import layer_lines, parse_net

NET = """
name: "a"
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 2 dim: 3 dim: 4 dim: 5 } } }
layer {
  name: "conv"  # not a layer { of its own
  type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 4 kernel_size: 3 }
}
"""


def model(*arrays: np.ndarray) -> schema.NetParameter:
    layer = schema.LayerParameter(
        name="conv", type="Convolution", blobs=[array_blob(array) for array in arrays]
    )
    return schema.NetParameter(name="a", layer=[layer])


def test_the_compiled_schema_is_the_written_one(tmp_path: Path) -> None:
    if importlib.util.find_spec("grpc_tools") is None:
        pytest.skip("grpcio-tools is not installed: the extra dev has it")
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--descriptor_set_out={tmp_path / 'out'}"]
    subprocess.run([*command, "caffe.proto"], cwd=schema.COMPILED.parent, check=True)
    assert (tmp_path / "out").read_bytes() == schema.COMPILED.read_bytes(), "run `make schema`"


def test_pycaffe_can_be_loaded_beside_it() -> None:
    from google.protobuf import descriptor_pool

    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("caffe.NetParameter")


def test_text_comes_back_as_it_was(shared_reference: Path, tmp_path: Path) -> None:
    nets = sorted((shared_reference / "caffe" / "nets").glob("*/net.prototxt"))
    solvers = sorted((shared_reference / "caffe" / "solvers").glob("*/solver.prototxt"))
    for read, files in ((read_net, nets), (read_solver, solvers)):
        assert files
        for file in files:
            message = read(file)
            write_prototxt(message, tmp_path / "again", comment="two\nlines")
            assert read(tmp_path / "again") == message


def test_blobs_come_back_as_they_were(tmp_path: Path) -> None:
    single = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    write_binary(model(single, single.astype(np.float64) / 3, np.float32(2)), tmp_path / "m")
    blobs = [blob_array(blob) for blob in read_caffemodel(tmp_path / "m").layer[0].blobs]
    assert [blob.dtype for blob in blobs] == [np.float32, np.float64, np.float32]
    assert [blob.shape for blob in blobs] == [(2, 3), (2, 3), ()]
    np.testing.assert_array_equal(blobs[0], single)
    np.testing.assert_array_equal(blobs[1], single.astype(np.float64) / 3)


def test_legacy_shapes_fit_with_leading_ones() -> None:
    blob = schema.BlobProto(num=1, channels=1, height=2, width=3, data=[0.0] * 6)
    assert same_shape(blob, (2, 3)) and same_shape(blob, (1, 1, 2, 3))
    assert not same_shape(blob, (6,)) and not same_shape(blob, (3, 2))


def test_a_mean_image_loses_its_batch_axis(tmp_path: Path) -> None:
    mean = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
    write_binary(array_blob(mean), tmp_path / "mean.binaryproto")
    np.testing.assert_array_equal(read_mean(tmp_path / "mean.binaryproto"), mean[0])


def test_transformations_move_out_of_the_data_layer() -> None:
    data = 'data_param { source: "x" scale: 0.5 crop_size: 7 mirror: true mean_file: "m" batch_size: 3 }'
    (layer,) = parse_net(f'layer {{ name: "d" type: "Data" top: "d" {data} }}').layer
    assert (layer.transform_param.scale, layer.transform_param.crop_size) == (0.5, 7)
    assert layer.transform_param.mirror and layer.transform_param.mean_file == "m"
    assert layer.data_param.batch_size == 3 and not layer.data_param.HasField("scale")


def test_v1_layers_keep_their_multipliers_names_and_rules() -> None:
    text = """layers { name: "ip" type: INNER_PRODUCT bottom: "x" top: "y" param: "w" param: "" blobs_lr: 0
        blobs_lr: 2 weight_decay: 0 weight_decay: 3 include: { phase: TEST } loss_weight: 2
        inner_product_param { num_output: 3 } }
        layers { name: "l" type: SOFTMAX_LOSS bottom: "y" bottom: "z" top: "l" }"""
    first, second = parse_net(text).layer
    assert [(spec.name, spec.lr_mult, spec.decay_mult) for spec in first.param] == [("w", 0, 0), ("", 2, 3)]
    assert first.include[0].phase == schema.TEST and list(first.loss_weight) == [2]
    assert (first.type, second.type) == ("InnerProduct", "SoftmaxWithLoss")


def test_unknown_fields_are_kept_and_named(tmp_path: Path) -> None:
    known = model(np.zeros(3, np.float32))
    inner = known.layer[0].SerializeToString() + b"\xda\x12\x03abc"  # field 299 of LayerParameter: nobody's
    (tmp_path / "m").write_bytes(b"\xa2\x06" + bytes([len(inner)]) + inner)
    with pytest.warns(UserWarning, match=r"kept without knowing what they mean: LayerParameter field 299\."):
        net = read_caffemodel(tmp_path / "m")
    assert b"abc" in net.SerializeToString()


def test_the_lines_of_layers() -> None:
    assert layer_lines(NET) == [3, 4]


IDENTITY = 'layer { name: "y" type: "ReLU" bottom: "x" top: "y" }'
INPUT = 'layer { name: "x" type: "Input" top: "x" input_param { shape { dim: 2 dim: 3 } } }'
DIMS = "input_dim: 2 input_dim: 3 input_dim: 4 input_dim: 5 "


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        (f'input: "x" {INPUT}', (2, 3)),  # a published AlexNet has it
        (f'input: "x" {DIMS}', (2, 3, 4, 5)),
        (f'input: "x" {DIMS} input_dim: 9', (2, 3, 4, 5)),
        (f'input: "x" {DIMS * 2}', (2, 3, 4, 5)),
        ('input: "x" input_shape { dim: 7 } input_shape { dim: 8 }', (7,)),
        (f'input: "x" {DIMS} input_shape {{ dim: 7 dim: 6 }}', (7, 6)),
    ],
)
def test_inputs_are_upgraded_as_caffe_does(text: str, shape: tuple[int, ...]) -> None:
    net = Net(parse_net(f"{text} {IDENTITY}"))
    assert net.inputs == {"x": shape} and net.shapes["y"] == shape


def test_an_input_that_nothing_declares_is_missed_by_its_reader() -> None:
    with pytest.raises(ValueError, match=r"layer 'y' .*: expected bottoms that earlier layers make, got 'x'"):
        Net(parse_net(f'input: "x" {IDENTITY}'))


@pytest.mark.parametrize("encoding", ["latin-1", "gbk", "shift-jis", "utf-8"])
def test_comments_may_be_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    words = {"latin-1": "géné", "gbk": "网络 {", "shift-jis": "表 ソ }", "utf-8": "网"}[encoding]
    text = f'name: "n" # {words}\n{INPUT}  # {words}\n{IDENTITY}'
    (tmp_path / "net").write_bytes(text.encode(encoding))
    assert read_net(tmp_path / "net") == parse_net(f'name: "n" {INPUT} {IDENTITY}')


# ------------------------------------------------------------------------------------------ what is refused


def test_a_byte_order_mark_and_other_bytes_outside_of_comments_are_refused(tmp_path: Path) -> None:
    (tmp_path / "net").write_text(INPUT, encoding="utf-8-sig")
    with pytest.raises(ValueError, match="got a byte-order mark before it"):
        read_net(tmp_path / "net")
    (tmp_path / "net").write_bytes('name: "géné" # é'.encode("latin-1"))
    with pytest.raises(ValueError, match="expected text in UTF-8, got other bytes"):
        read_net(tmp_path / "net")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer { nam: 'x' }", r"1:9: LayerParameter has no field 'nam'. Did you mean name"),
        ("layer { name: 'x' top: 3 }", r"1:24: "),
        ("layer { name: 'x'", r'1:15: Expected "}"'),
        ("layer { convolution_param { num_output: -1 } }", r"1:41"),
        ("layers { type: RELUX }", "RELUX"),
        ("layers { name: 'x' } layer { name: 'y' }", "expected either `layer` or the older `layers`"),
        ("layers { layer { name: 'x' } }", "upgrade_net_proto_text"),
        ("layers { name: 'x' }", "expected a type for the layer 'x'"),
        ("input: 'x' input_dim: 3", "four input_dim"),
        ("{" * 5000, "1:1"),
    ],
)
def test_a_net_that_does_not_parse_is_refused_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "net").write_text(text)
    with pytest.raises(ValueError, match=r"^read_net: ") as error:
        read_net(tmp_path / "net")
    assert re.search(message, str(error.value)) and "\n" not in str(error.value)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    write_binary(model(np.zeros(3, np.float32)), tmp_path / "m")
    with pytest.raises(ValueError, match=r"A \.caffemodel holds weights"):
        (tmp_path / "latin").write_bytes(b"\xff\xfe")
        read_net(tmp_path / "latin")
    with pytest.raises(ValueError, match="expected a prototxt of at most 4 MB"):
        (tmp_path / "large").write_bytes(b" " * (5 << 20))
        read_net(tmp_path / "large")
    with pytest.raises(ValueError, match="got HDF5"):
        (tmp_path / "h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
        read_caffemodel(tmp_path / "h5")
    with pytest.raises(ValueError, match="damaged, cut off, or of another kind"):
        (tmp_path / "text").write_text(NET)
        read_caffemodel(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        read_caffemodel(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("shape", "count", "message"),
    [
        ([3, -1], 3, "expected dimensions of 0 to"),
        ([1 << 40], 0, "expected dimensions of 0 to"),
        ([2, 2], 3, ".*says, 4, got 3"),
        ([2], 0, ".*says, 2, got 0"),
    ],
)
def test_a_blob_is_compared_with_its_shape(
    tmp_path: Path, shape: list[int], count: int, message: str
) -> None:
    blob = schema.BlobProto(data=[0.0] * count)
    blob.shape.dim.extend(shape)
    write_binary(schema.SolverState(history=[blob]), tmp_path / "s")
    with pytest.raises(ValueError, match=r"^read_solverstate: .*history 0: " + message):
        read_solverstate(tmp_path / "s")


HOSTILE = """
import resource, sys, warnings
from pathlib import Path

from attention_transfer.caffe.files.caffemodel import read_caffemodel

warnings.simplefilter("ignore")
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
for file in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_caffemodel(file)
    except ValueError as error:
        assert "\\n" not in str(error) and str(error).startswith("read_caffemodel: "), error
print("survived")
"""


def test_hostile_binaries_cost_neither_time_nor_memory(tmp_path: Path) -> None:
    whole = model(np.ones((4, 3, 3, 3), np.float32), np.ones(4)).SerializeToString()
    chance = random.Random(0)
    samples = [whole[:cut] for cut in range(0, len(whole), 7)]
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        samples.append(bytes(damaged))
    samples += [chance.randbytes(chance.randint(1, 400)) for _ in range(100)]
    samples.append(b"\xa2\x06\xff\xff\xff\xff\x07")  # a layer of 2 GB, without them
    samples.append(b"\x0b" * 100_000)  # groups in groups
    samples.append(b"\xa2\x06\x02\x3a\x00" * 20_000)  # as many layers with an empty blob
    for index, sample in enumerate(samples):
        (tmp_path / f"{index:04}").write_bytes(sample)
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "survived\n", done.stderr


EXTREMES = [
    "0", "-1", "1", "7", "65536", "2147483647", "4294967295", "9223372036854775807", "-9223372036854775808",
    "1e38", "nan", "inf", "true", '"x"', "{", "}", "",
]  # fmt: skip


def test_hostile_numbers_in_a_net_are_refused_in_one_line(shared_reference: Path) -> None:
    files = sorted((shared_reference / "caffe").glob("*/*/net.prototxt"))
    chance = random.Random(0)
    refused = 0
    for _ in range(400):
        text = chance.choice(files).read_text()
        value = chance.choice(list(re.finditer(r"(?<=: )\S+", text)))
        text = text[: value.start()] + chance.choice(EXTREMES) + text[value.end() :]
        try:
            Net(parse_net(text), phase="TRAIN")
        except ValueError as error:
            assert re.match(r"(Net|read_net): [^\n]+$", str(error)), error
            refused += 1
    assert refused > 100


def test_damaged_nets_are_checked_or_refused_in_one_line(shared_reference: Path, tmp_path: Path) -> None:
    files = sorted((shared_reference / "caffe").glob("*/*/net.prototxt"))
    chance = random.Random(0)
    refused = 0
    for _ in range(200):
        text = chance.choice(files).read_text()
        place = chance.randrange(len(text))
        rest = chance.choice(["", chr(chance.randrange(32, 127)) + text[place + 1 :], text[place + 20 :]])
        (tmp_path / "net").write_text(text[:place] + rest)
        try:
            check(tmp_path / "net")
        except ValueError as error:
            assert re.match(r"(check|read_net|Net): [^\n]+$", str(error)), error
            refused += 1
    assert 50 < refused < 200
