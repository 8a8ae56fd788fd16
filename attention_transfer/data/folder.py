"""A folder of class folders, with or without train, validation and test folders above them."""

from __future__ import annotations

from pathlib import Path

import torch

from .decode import EncodedFiles
from .sources import SPLIT_NAMES, RawSplit, Source

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pbm", ".tif", ".tiff"}


def read_folder(path: Path) -> Source:
    """Find the images; nothing is decoded yet. Classes are numbered in the order of their sorted names.

    Raises:
        ValueError: if there are no class folders, a class folder holds no image, or a split has a class
            folder that training lacks.
    """
    roots = _split_folders(path)
    folders = {name: _class_folders(root) for name, root in roots.items()}
    classes = [folder.name for folder in folders["train"]]
    for name in folders:
        _check_classes(name, [folder.name for folder in folders[name]], classes, path)
    splits = {name: _read_split(found, classes) for name, found in folders.items()}
    return Source(splits, classes, str(path))


def _split_folders(path: Path) -> dict[str, Path]:
    by_split = {SPLIT_NAMES[f.name.lower()]: f for f in _subfolders(path) if f.name.lower() in SPLIT_NAMES}
    if "train" in by_split:
        return by_split
    if by_split and len(by_split) == len(_subfolders(path)):
        raise ValueError(
            f"load_data: expected a 'train' folder in {path}, "
            f"got only {sorted(f.name for f in by_split.values())}. "
            "Add one, or pass the folder of class folders itself."
        )
    return {"train": path}


def _class_folders(root: Path) -> list[Path]:
    if found := _subfolders(root):
        return found
    raise ValueError(
        f"load_data: expected class folders (or parquet files) in {root}, got none. "
        "Put the images of each class into a folder of its own, named after the class."
    )


def _subfolders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _check_classes(split: str, found: list[str], classes: list[str], path: Path) -> None:
    if strangers := sorted(set(found) - set(classes)):
        raise ValueError(
            f"load_data: expected the class folders of the {split} split of {path} among those of "
            f"the training split ({', '.join(classes[:10])}), got also {', '.join(strangers)}. "
            "Rename or remove them."
        )


def _read_split(folders: list[Path], classes: list[str]) -> RawSplit:
    paths: list[Path] = []
    labels: list[int] = []
    for folder in folders:
        images = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise ValueError(
                f"load_data: expected images in the class folder {folder}, got none "
                f"(known endings: {', '.join(sorted(IMAGE_SUFFIXES))}). Add some, or remove the folder."
            )
        paths += images
        labels += [classes.index(folder.name)] * len(images)
    return RawSplit(EncodedFiles(paths), torch.tensor(labels))
