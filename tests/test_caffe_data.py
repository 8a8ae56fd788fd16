"""Data layers: what they read, how they change it, in which order; and the command that writes LMDBs."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import h5py
import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from attention_transfer.caffe import Net, schema
from attention_transfer.caffe.files.caffemodel import array_blob, read_mean, write_binary
from attention_transfer.caffe.files.prototxt import parse_net
from attention_transfer.caffe.layers.data import resize
from attention_transfer.caffe.layers.records import decode_image, open_database
from attention_transfer.cli import main
from attention_transfer.data import load_data


def write_lmdb(path: Path, records: Iterable[Any]) -> Path:
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for number, record in enumerate(records):
            transaction.put(f"{number:08d}".encode(), record.SerializeToString())
    return path


def datum(pixels: np.ndarray, label: int = 0) -> Any:
    c, h, w = pixels.shape
    held = {"data": pixels.tobytes()} if pixels.dtype == np.uint8 else {"float_data": pixels.ravel().tolist()}
    return schema.Datum(channels=c, height=h, width=w, label=label, **held)


def encoded(image: Image.Image, label: int = 0, kind: str = "PNG") -> Any:
    file = io.BytesIO()
    image.save(file, kind)
    return schema.Datum(data=file.getvalue(), label=label, encoded=True)


@pytest.fixture
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (10, 3, 6, 8), dtype=np.uint8)


@pytest.fixture
def database(tmp_path: Path, pictures: np.ndarray) -> Path:
    return write_lmdb(tmp_path / "lmdb", [datum(image, label) for label, image in enumerate(pictures)])


def net_of(text: str, phase: Any = "TRAIN", seed: int = 1) -> Net:
    net = Net(parse_net(text), phase=phase)
    net.layers[0].seed = seed
    return net


def data_net(source: Path, batch: int = 4, transform: str = "", phase: Any = "TEST", more: str = "") -> Net:
    return net_of(
        f"""layer {{ name: "data" type: "Data" top: "data" top: "label" transform_param {{ {transform} }}
        data_param {{ source: "{source}" batch_size: {batch} backend: LMDB {more} }} }}""",
        phase,
    )


def take(net: Net, count: int = 1) -> tuple[Tensor, ...]:
    """The tops of `count` batches, one after another."""
    found = [net({}) for _ in range(count)]
    return tuple(torch.cat([blobs[name] for blobs in found]) for name in net.layers[0].tops)


# ---------------------------------------------------------------------------------------------------- Data


def test_lmdb_gives_its_records_in_order_and_begins_again(database: Path, pictures: np.ndarray) -> None:
    net = data_net(database)
    assert net.shapes == {"data": (4, 3, 6, 8), "label": (4,)}
    images, labels = take(net, 3)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert torch.equal(images, torch.from_numpy(pictures[labels.int()]).float())
    assert images.dtype == labels.dtype == torch.float32


def test_seek_and_double(database: Path) -> None:
    net = data_net(database).double()
    net.layers[0].seek(2)
    images, labels = take(net)
    assert labels.tolist() == [8, 9, 0, 1]
    assert images.dtype == labels.dtype == torch.float64


def test_a_net_with_data_layers_can_be_copied_and_one_lmdb_read_by_several(database: Path) -> None:
    net, other = data_net(database), data_net(database)
    take(net)
    twin = copy.deepcopy(net)
    assert all(torch.equal(take(one)[1], torch.tensor([4.0, 5, 6, 7])) for one in (net, twin))
    assert take(other)[1].tolist() == [0, 1, 2, 3]


def test_float_data_and_one_top(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(2, 2, 3, 3)).astype(np.float32)
    source = write_lmdb(tmp_path / "lmdb", map(datum, values))
    net = net_of(
        f"""layer {{ name: "d" type: "Data" top: "d"
        data_param {{ source: "{source}" batch_size: 2 backend: LMDB }} }}"""
    )
    assert torch.equal(net({})["d"], torch.from_numpy(values))


def test_encoded_images_come_as_opencv_reads_them(tmp_path: Path, pictures: np.ndarray) -> None:
    rgb = pictures[0].transpose(1, 2, 0).copy()
    image = Image.fromarray(rgb)
    record = encoded(image)
    source = write_lmdb(tmp_path / "lmdb", [record])
    want = cv2.imdecode(np.frombuffer(record.data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(take(data_net(source, 1))[0][0].numpy(), want.transpose(2, 0, 1))
    grey = take(data_net(source, 1, "force_gray: true"))[0]
    want = cv2.imdecode(np.frombuffer(record.data, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert grey.shape == (1, 1, 6, 8)
    assert np.abs(grey[0, 0].numpy() - want).max() <= 1


@pytest.mark.parametrize("turn", [1, 5, 6])  # by EXIF
@pytest.mark.parametrize(
    ("mode", "flag"), [("L", -1), ("L", 1), ("P", -1), ("RGBA", -1), ("RGBA", 1), ("RGB", 0)]
)
def test_modes_of_images(mode: str, flag: int, turn: int, pictures: np.ndarray) -> None:
    image = Image.fromarray(pictures[0].transpose(1, 2, 0).copy())
    image = image.quantize(16) if mode == "P" else image.convert(mode)
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = turn
    image.save(buffer, "png", exif=exif)
    data = buffer.getvalue()
    want = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    want = want[None] if want.ndim == 2 else want.transpose(2, 0, 1)
    got = decode_image(data, None if flag < 0 else bool(flag), "it")
    assert got.shape == want.shape
    assert np.abs(got.astype(int) - want).max() <= (1 if flag == 0 else 0)


# ----------------------------------------------------------------------------------------- transform_param


def test_centre_crop_mean_and_scale_in_the_precision_of_the_net(database: Path, pictures: np.ndarray) -> None:
    net = data_net(
        database, 4, "crop_size: 4 mean_value: 1.1 mean_value: 2.2 mean_value: 3.3 scale: 0.1"
    ).double()
    means = np.array([1.1, 2.2, 3.3], np.float32).astype(np.float64)[:, None, None]
    want = (pictures[:4, :, 1:5, 2:6] - means) * float(np.float32(0.1))
    assert net.shapes["data"] == (4, 3, 4, 4)
    np.testing.assert_allclose(take(net)[0].numpy(), want, rtol=1e-15)


def test_one_mean_value_serves_all_channels(database: Path, pictures: np.ndarray) -> None:
    assert np.array_equal(
        take(data_net(database, 2, "mean_value: 7"))[0].numpy(), pictures[:2] - np.float32(7)
    )


def windows(image: np.ndarray, crop: int) -> dict[bytes, tuple[int, int, bool]]:
    """Every crop of an image, plain and mirrored, with its place."""
    _, h, w = image.shape
    found = {}
    for top in range(h - crop + 1):
        for left in range(w - crop + 1):
            window = image[:, top : top + crop, left : left + crop].astype(np.float32)
            found[window.tobytes()] = (top, left, False)
            found[window[:, :, ::-1].tobytes()] = (top, left, True)
    return found


def test_training_crops_anywhere_and_mirrors_half(database: Path, pictures: np.ndarray) -> None:
    images, labels = take(data_net(database, 10, "crop_size: 4 mirror: true", phase="TRAIN"), 20)
    known = [windows(image, 4) for image in pictures]
    places = [known[int(label)][image.numpy().tobytes()] for image, label in zip(images, labels, strict=True)]
    assert {place[:2] for place in places} == {(top, left) for top in range(3) for left in range(5)}
    assert 70 <= sum(mirrored for *_, mirrored in places) <= 130


def test_mirror_is_by_chance_in_test_too_but_the_crop_is_central(
    database: Path, pictures: np.ndarray
) -> None:
    images, labels = take(data_net(database, 10, "crop_size: 4 mirror: true"), 4)
    places = [
        windows(pictures[int(label)], 4)[image.numpy().tobytes()]
        for image, label in zip(images, labels, strict=True)
    ]
    assert {place[:2] for place in places} == {(1, 2)}
    assert {mirrored for *_, mirrored in places} == {False, True}


def test_mean_image_is_cropped_like_the_image(tmp_path: Path, database: Path, pictures: np.ndarray) -> None:
    mean = np.random.default_rng(1).normal(100, 9, (3, 6, 8)).astype(np.float32)
    write_binary(array_blob(mean), tmp_path / "mean.binaryproto")
    transform = f'crop_size: 4 mirror: true mean_file: "{tmp_path / "mean.binaryproto"}"'
    images, labels = take(data_net(database, 10, transform, phase="TRAIN"), 2)
    for image, label in zip(images, labels, strict=True):
        assert image.numpy().tobytes() in windows(pictures[int(label)] - mean, 4)


def test_random_choices_depend_on_seed_and_batch_alone(database: Path) -> None:
    nets = [data_net(database, 4, "crop_size: 4", phase="TRAIN") for _ in range(3)]
    nets[2].layers[0].seed = 2
    nets[1].layers[0].seek(1)
    first, second, other = take(nets[0], 2)[0], take(nets[1])[0], take(nets[2])[0]
    assert torch.equal(first[4:], second)
    assert not torch.equal(first[:4], other)


# ----------------------------------------------------------------------------------------------- ImageData


@pytest.fixture
def image_list(tmp_path: Path, pictures: np.ndarray) -> Path:
    for number, picture in enumerate(pictures):
        Image.fromarray(picture.transpose(1, 2, 0).copy()).save(tmp_path / f"no {number}.png")
    (tmp_path / "list.txt").write_text("".join(f"no {number}.png {number * 10}\n" for number in range(10)))
    return tmp_path / "list.txt"


def image_net(source: Path, more: str = "", transform: str = "") -> Net:
    return net_of(
        f"""layer {{ name: "data" type: "ImageData" top: "data" top: "label" transform_param {{ {transform} }}
        image_data_param {{ source: "{source}" batch_size: 5 root_folder: "{source.parent}/" {more} }} }}"""
    )


def test_image_list(image_list: Path, pictures: np.ndarray) -> None:
    images, labels = take(image_net(image_list), 3)
    assert labels.tolist() == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 0, 10, 20, 30, 40]
    assert np.array_equal(images[:10].numpy(), pictures[:, ::-1])


def test_image_list_shuffled_anew_in_each_pass(image_list: Path) -> None:
    labels = take(image_net(image_list, "shuffle: true"), 4)[1].tolist()
    assert sorted(labels[:10]) == sorted(labels[10:]) == list(range(0, 100, 10))
    assert labels[:10] != labels[10:] != sorted(labels[10:]) != labels[:10]


def test_images_are_resized_as_opencv_does(image_list: Path, pictures: np.ndarray) -> None:
    net = image_net(image_list, "new_height: 9 new_width: 4 is_color: false")
    assert net.shapes["data"] == (5, 1, 9, 4)
    big = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    want = cv2.resize(big, (20, 31))
    got = resize(big.transpose(2, 0, 1), 31, 20).transpose(1, 2, 0)
    assert np.abs(got.astype(int) - want).max() <= 1


def test_rand_skip_starts_somewhere(image_list: Path) -> None:
    net = image_net(image_list, "rand_skip: 10")
    starts = set()
    for seed in range(20):
        net.layers[0].seed = seed
        net.layers[0].seek(0)
        starts.add(take(net)[1][0].item())
    assert len(starts) > 4


# ------------------------------------------------------------------------------------------------ HDF5Data


def hdf5_net(folder: Path, batch: int, more: str = "") -> Net:
    return net_of(
        f"""layer {{ name: "data" type: "HDF5Data" top: "data" top: "label"
        hdf5_data_param {{ source: "{folder / "list.txt"}" batch_size: {batch} {more} }} }}"""
    )


@pytest.fixture
def hdf5(tmp_path: Path) -> Path:
    for number, rows in enumerate((3, 4)):
        start = 3 * number
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            file["label"] = np.arange(start, start + rows)
            file["data"] = np.arange(start, start + rows)[:, None] + np.array([0.1, 0.2])
            file["other"] = np.zeros(2)
    (tmp_path / "list.txt").write_text(f"{tmp_path / '0.h5'}\n{tmp_path / '1.h5'}\n")
    return tmp_path


def test_hdf5_rows_run_over_the_files_and_begin_again(hdf5: Path) -> None:
    net = hdf5_net(hdf5, 5).double()
    assert net.shapes == {"data": (5, 2), "label": (5,)}
    data, labels = take(net, 3)
    assert labels.tolist() == [*range(7), *range(7), 0]
    assert torch.equal(data, labels[:, None] + torch.tensor([0.1, 0.2], dtype=torch.float64))


def test_hdf5_shuffles_files_and_rows_within_each(hdf5: Path) -> None:
    labels = take(hdf5_net(hdf5, 7, "shuffle: true"), 20)[1].reshape(20, 7).int().tolist()
    assert all(sorted(epoch) == list(range(7)) for epoch in labels)
    assert all(set(epoch[:3]) == {0, 1, 2} or set(epoch[:4]) == {3, 4, 5, 6} for epoch in labels)
    assert len({tuple(epoch) for epoch in labels}) > 15
    assert len({epoch[0] < 3 for epoch in labels}) == 2


# ----------------------------------------------------------------------------------------------- DummyData


def dummy_net(param: str, tops: str = 'top: "a" top: "b"') -> Net:
    return net_of(f'layer {{ name: "d" type: "DummyData" {tops} dummy_data_param {{ {param} }} }}')


def test_dummy_constants_stay_and_random_numbers_change() -> None:
    net = dummy_net(
        """data_filler { type: "constant" value: 3 } data_filler { type: "gaussian" std: 2 }
        shape { dim: 2 dim: 3 } shape { dim: 1000 }"""
    )
    (a, b), (again, other) = take(net), take(net)
    assert torch.equal(a, torch.full((2, 3), 3.0))
    assert again.data_ptr() != 0 and torch.equal(a, again)
    assert not torch.equal(b, other)
    assert 1.8 < b.std() < 2.2
    net.layers[0].seek(0)
    assert torch.equal(take(net)[1], b)


def test_dummy_draws_leave_the_generator_alone() -> None:
    net = dummy_net('data_filler { type: "uniform" } shape { dim: 4 }')
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    take(net)
    assert torch.equal(torch.rand(3), want)


def test_dummy_of_the_old_form_and_without_a_filler() -> None:
    net = dummy_net("num: 2 num: 5 channels: 3 height: 1 width: 4")
    assert net.shapes == {"a": (2, 3, 1, 4), "b": (5, 3, 1, 4)}
    assert all(not top.any() for top in take(net))


# ------------------------------------------------------------------------------------------------- refusals


def layer_text(kind: str, rest: str) -> str:
    return f'layer {{ name: "in" type: "{kind}" top: "a" top: "b" {rest} }}'


@pytest.mark.parametrize(
    ("kind", "rest", "words"),
    [
        (
            "Data",
            'data_param { source: "x" batch_size: 1 }',
            "got a LevelDB, .*`attention-transfer caffe lmdb`",
        ),
        ("Data", 'data_param { source: "x" backend: LMDB }', "expected a batch_size of 1 or more, got none"),
        ("Data", "data_param { batch_size: 1 backend: LMDB }", "expected a source, an LMDB, got none"),
        ("ImageData", "", "expected a source, a list of images, got none"),
        (
            "ImageData",
            "image_data_param { new_height: 3 }",
            "expected new_height and new_width both, or neither",
        ),
        ("HDF5Data", "hdf5_data_param { batch_size: 1 } transform_param { }", "expected no transform_param"),
        ("DummyData", "", "expected 1 shape, or one for each of 2 tops, got none"),
        ("DummyData", "dummy_data_param { num: 1 shape { dim: 1 } }", "either shape or num, .* got both"),
        (
            "DummyData",
            "dummy_data_param { num: 1 }",
            "1 or 2 each of num, channels, height and width, got 1, 0",
        ),
        ("DummyData", 'dummy_data_param { data_filler { type: "x" } }', "expected a filler out of constant"),
        ("MemoryData", "", "Make it an Input layer"),
    ],
)
def test_what_cannot_be_read_is_refused(kind: str, rest: str, words: str) -> None:
    with pytest.raises(ValueError, match=rf"^Net: layer 'in' \({kind}\): .*{words}"):
        net_of(layer_text(kind, rest))


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        ("crop_size: 7", r"a crop_size that fits into the first image of \(c, h, w\) \(3, 6, 8\), got 7"),
        ("mean_value: 1 mean_value: 2", "1 mean_value, or one for each of 3 channels, got 2"),
        ('mean_value: 1 mean_file: "m"', "either mean_file or mean_value, got both"),
        ("force_gray: true force_color: true", "either force_color or force_gray, got both"),
    ],
)
def test_transformations_that_do_not_fit_are_refused(database: Path, transform: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        data_net(database, 1, transform)


def test_a_mean_of_another_size_is_refused(tmp_path: Path, database: Path) -> None:
    write_binary(array_blob(np.zeros((3, 4, 4), np.float32)), tmp_path / "m")
    with pytest.raises(
        ValueError, match=r"expected a mean image of \(c, h, w\) \(3, 6, 8\), got \(3, 4, 4\)"
    ):
        data_net(database, 1, f'mean_file: "{tmp_path / "m"}"')


def test_missing_and_foreign_sources(tmp_path: Path, database: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected an LMDB in .*nowhere, got nothing there"):
        data_net(tmp_path / "nowhere")
    (tmp_path / "text").write_text("no database\n")
    with pytest.raises(ValueError, match=r"expected an LMDB in .*text, got something else"):
        data_net(tmp_path / "text")
    write_lmdb(tmp_path / "empty", [])
    with pytest.raises(ValueError, match=r"expected records in the LMDB .*empty, got none"):
        data_net(tmp_path / "empty")


def test_an_lmdb_that_was_cut_off_is_refused(tmp_path: Path, database: Path) -> None:
    whole = (database / "data.mdb").read_bytes()
    for share in (0.1, 0.5, 0.9):
        folder = tmp_path / str(share)
        folder.mkdir()
        (folder / "data.mdb").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"^Data: expected .*LMDB"):
            data_net(folder)


def test_tops_that_caffe_cannot_count_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected tops of at most 2147483647 entries, got the shape"):
        dummy_net("shape { dim: 70000 dim: 70000 }")


def test_damaged_records(tmp_path: Path, pictures: np.ndarray) -> None:
    short = datum(pictures[0])
    short.data = short.data[:-1]
    with pytest.raises(ValueError, match=r"\(3, 6, 8\) in the record '00000000' of .*lmdb, got 143 values"):
        data_net(write_lmdb(tmp_path / "lmdb", [short]))
    image = encoded(Image.fromarray(pictures[0].transpose(1, 2, 0).copy()))
    image.data = image.data[:60]
    with pytest.raises(ValueError, match="got what cannot be decoded"):
        data_net(write_lmdb(tmp_path / "other", [image]))
    net = data_net(write_lmdb(tmp_path / "mixed", [datum(pictures[0]), datum(pictures[1][:, :5])]), batch=1)
    take(net)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"expected images of one size, \(h, w\) \(6, 8\), got \(5, 8\)"):
            take(net)


def test_hdf5_without_a_data_set_names_those_it_has(hdf5: Path) -> None:
    text = layer_text("HDF5Data", f'hdf5_data_param {{ source: "{hdf5 / "list.txt"}" batch_size: 1 }}')
    with pytest.raises(ValueError, match=r"none for a, b\. The file has data, label, other"):
        net_of(text)


# ------------------------------------------------------------------------------------------------ caffe lmdb


def write(*arguments: object) -> int:
    return main(["caffe", "lmdb", *map(str, arguments)])


def test_command_writes_real_cifar(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, mean = tmp_path / "made" / "test.lmdb", tmp_path / "mean.binaryproto"
    for split in ("train", "test"):  # to decode 50,000 images more would take long
        (tmp_path / f"cifar10-{split}.parquet").symlink_to(shared_data / "cifar10-test.parquet")
    options = ["--root", tmp_path, "--split", "test", "--limit", 2500, "--keep-order", "--mean", mean]
    assert write("--data", "cifar10", *options, "-o", out) == 0
    printed = capsys.readouterr().out
    assert f"{out}: 2,500 images of 3 x 32 x 32 (c, h, w), 10 classes" in printed
    known = load_data("cifar10", root=tmp_path, validation=0)
    assert " ".join(f"mean_value: {255 * mean:.2f}" for mean in known.mean[::-1]) in printed
    images, labels = take(data_net(out, 500), 5)
    assert torch.equal(labels.long(), known.test.labels[:2500])
    assert torch.equal(images.flip(1).to(torch.uint8), known.test.images[:2500])
    np.testing.assert_allclose(read_mean(mean), images.double().mean(0), rtol=1e-6)
    keys = open_database(str(out)).keys
    assert keys[0] == b"00000000" and keys[-1] == b"00002499"
    assert sorted(path.name for path in out.iterdir()) == ["data.mdb"]


def test_command_pads_with_the_mean_colour_and_shuffles(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attention_transfer.cli.caffe.lmdb.FIRST_SIZE", 1 << 16)  # so that the map must grow
    plain, padded, other = (tmp_path / name for name in ("plain", "padded", "other"))
    data = ["--data", image_folder, "--split", "train"]
    assert write(*data, "-o", plain) == write(*data, "-o", padded, "--pad", 2) == 0
    assert write(*data, "-o", other, "--seed", 1) == 0
    (images, labels), (bordered, same) = (take(data_net(path, 48)) for path in (plain, padded))
    assert torch.equal(bordered[:, :, 2:-2, 2:-2], images) and torch.equal(labels, same)
    background = images.mean((0, 2, 3)).round()
    assert torch.equal(bordered[:, :, 0, 5], background.expand(48, 3))
    assert not torch.equal(take(data_net(other, 48))[1], labels)
    assert sorted(labels.tolist()) == [0.0] * 16 + [1.0] * 16 + [2.0] * 16
    assert labels.tolist() != sorted(labels.tolist())
    first = images[labels == 0].mean((0, 2, 3))  # bright in the first of red, green, blue
    assert first[2] > first[0] + 100


def test_command_overwrites_nothing_and_leaves_no_half(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    call = ["--data", image_folder, "--split", "test", "-o", out]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("attention_transfer.cli.caffe.lmdb._put", interrupt)
        assert write(*call) == 130
    assert not list(tmp_path.iterdir())
    assert write(*call) == 0
    before = (out / "data.mdb").read_bytes()
    assert write(*call) == 2
    assert f"{out} exists, so it stays" in capsys.readouterr().err
    assert (out / "data.mdb").read_bytes() == before
    assert write("--data", image_folder, "--split", "val", "-o", tmp_path / "x") == 2
    assert write("--data", tmp_path / "nowhere", "--split", "test", "-o", tmp_path / "x") == 2
    assert write(*call[:-1], tmp_path / "x", "--pad", -1) == 2
    assert capsys.readouterr().err.count("\n") == 3
