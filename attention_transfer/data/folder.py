"""A folder of class folders, with or without train, validation and test folders above them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .._errors import InputError
from .._hints import did_you_mean
from .._pictures import FORMATS, begins_as_picture
from .._reading import check_regular, open_file
from .decode import EncodedFiles
from .sources import RawSplit, Source
from .split_names import BESIDE, SPLIT_NAMES, doubled, notes_of, splits_of_folders

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pbm", ".tif", ".tiff"}
"""Files with these endings are images; of all others, the content says it."""

NO_IMAGES = {
    *(".txt", ".xml", ".json", ".csv", ".md", ".html", ".yaml", ".yml", ".npy", ".npz", ".mat"),
    *(".dng", ".cr2", ".nef", ".arw", ".orf", ".rw2"),  # raw ones begin as TIFF, with a small preview
}
"""Endings whose files are something else, however they begin."""

CLUTTER = {
    *(".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX", ".ipynb_checkpoints"),
    *(".git", ".gitattributes", ".gitignore", ".cache"),
}
"""What systems and programs leave behind; so is what begins with `._`, as macOS names it."""

LISTED = 6  # names or endings in a message


@dataclass
class Folder:
    """What is in a folder.

    Attributes:
        images: the image files right in it.
        folders: the folders in it, sorted by their names.
        left_out: how many files are no images that can be read, by their endings.
    """

    path: Path
    images: list[Path] = field(default_factory=list)
    folders: list[Folder] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def walk(self) -> Iterator[Folder]:
        """Itself, and all folders at any depth."""
        yield self
        for folder in self.folders:
            yield from folder.walk()

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def holding(self) -> list[Folder]:
        """The folders with an image at any depth."""
        return [folder for folder in self.folders if any(each.images for each in folder.walk())]

    @property
    def holds_class_folders(self) -> bool:
        """Whether it looks like folders of images rather than like one of them."""
        return len(self.holding) > bool(self.images)


def read_folder(path: Path) -> Source:
    """Find the images; nothing is decoded yet. Classes are numbered in the order of their sorted names.

    Raises:
        ValueError: if there are no class folders, a class folder holds no image, a split has a class folder
            that training lacks, or it cannot be told which folders are splits and which are classes.
        OSError: if something that is called an image is no file.
    """
    root, notes = _unwrapped(scan_folder(path))
    roots, named = _find_splits(root)
    classes = [folder.name for folder in roots["train"].folders]
    for name, split in roots.items():
        _check_classes(name, split, classes)
    splits = {name: _read_split(split, classes) for name, split in roots.items()}
    return Source(splits, classes, str(path), notes=[*notes, *named, *_left_out(root, roots)])


def scan_folder(path: Path, above: tuple[tuple[int, int], ...] = ()) -> Folder:
    """Look through a folder, and those in it, links to folders too; `above` are those it is in.

    Raises:
        ValueError: if a link leads back into a folder that holds it, or a folder is called like an image.
        OSError: if something that is called an image is no file, or a folder cannot be read.
    """
    place = path.stat()
    if (place.st_dev, place.st_ino) in above:
        raise InputError(
            f"load_data: expected folders of images, got the link {path} to a folder that it lies "
            "in. Remove it."
        )
    above = (*above, (place.st_dev, place.st_ino))
    found = Folder(path)
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name in CLUTTER or entry.name.startswith("._"):
                continue
            _sort_in(entry, found, above)
    return found


def _sort_in(entry: os.DirEntry[str], found: Folder, above: tuple[tuple[int, int], ...]) -> None:
    path, ending = Path(entry.path), Path(entry.name).suffix.lower()
    if entry.name.startswith("."):
        found.left_out["hidden"] += 1
    elif ending in IMAGE_SUFFIXES:
        if not entry.is_file():
            check_regular(path)
        found.images.append(path)
    elif entry.is_dir():
        found.folders.append(scan_folder(path, above))
    elif entry.is_file() and ending not in NO_IMAGES and _is_picture(path):
        found.images.append(path)
    else:
        found.left_out[ending or "without an ending"] += 1


def _is_picture(path: Path) -> bool:
    with open_file(path) as file:
        return begins_as_picture(file)


def _unwrapped(root: Folder) -> tuple[Folder, list[str]]:
    """The folder of the class folders or of the splits, where others lie around it: images/train/cat/."""
    inner, notes = root, []
    while (next_ := _only_inside(inner)) is not None:
        inner = next_
    if inner is not root:
        notes.append(f"images found in {inner.path.relative_to(root.path)}")
    return inner, notes


def _only_inside(outer: Folder) -> Folder | None:
    """The one folder in a folder, if it only wraps: it is called like that one, or images, data, ..."""
    holding = outer.holding
    if len(holding) != 1 or outer.images or not holding[0].holds_class_folders:
        return None
    inner = holding[0]
    is_wrapping = inner.name == outer.name or inner.name.lower() in BESIDE
    return inner if is_wrapping or splits_of_folders(each.name for each in inner.folders) else None


def _find_splits(root: Folder) -> tuple[dict[str, Folder], list[str]]:
    """Splits by their names, and what is to be said of it; a folder of class folders is a training split."""
    by_name = {folder.name: folder for folder in root.folders}
    words = splits_of_folders(by_name)
    others = [folder.name for folder in root.holding if folder.name not in words]
    if not words or (others and not any(by_name[name].holds_class_folders for name in words)):
        _check_unlike_splits(root)
        return {"train": root}, []
    if same := doubled(words):
        raise InputError(
            f"load_data: expected one folder for each split in {root.path}, got {' and '.join(same)}, which "
            "both say the same. Rename one, or move it away."
        )
    if others:
        hint = did_you_mean(others[0], SPLIT_NAMES)
        raise InputError(
            f"load_data: expected folders named after splits in {root.path}, such as {', '.join(words)}, got "
            f"also {_listed(others)}. {f'{hint} ' if hint else ''}"
            "Rename it to train, validation or test, or move it away."
        )
    splits = {SPLIT_NAMES[word]: _unwrapped(by_name[name])[0] for name, word in words.items()}
    if "train" not in splits:
        raise InputError(
            f"load_data: expected a 'train' folder in {root.path}, got only {sorted(words)}. "
            "Add one, or pass the folder of class folders itself."
        )
    return splits, notes_of(words)


def _check_unlike_splits(root: Folder) -> None:
    """Refuse folders which all hold folders of the same names: more likely splits than classes."""
    if len(holding := root.holding) < 2 or any(folder.images for folder in holding):
        return
    inner = [{each.name for each in folder.holding} for folder in holding]
    if len(shared := set.intersection(*inner)) < 2:
        return
    raise InputError(
        f"load_data: expected class folders in {root.path}, got {_listed([each.name for each in holding])}, "
        f"all of which hold folders called {_listed(sorted(shared))}. If they are splits, name them train, "
        "validation and test; if each is a data set, pass one; if they are classes, move the images up into "
        "them."
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _check_classes(split: str, root: Folder, classes: list[str]) -> None:
    if not root.folders:
        raise InputError(
            f"load_data: expected class folders (or parquet files) in {root.path}, got none. "
            "Put the images of each class into a folder of its own, named after the class."
        )
    if strangers := sorted({folder.name for folder in root.folders} - set(classes)):
        raise InputError(
            f"load_data: expected the class folders of the {split} split of {root.path} among those of "
            f"the training split ({', '.join(classes[:10])}), got also {', '.join(strangers)}. "
            "Rename or remove them."
        )


def _read_split(root: Folder, classes: list[str]) -> RawSplit:
    paths: list[Path] = []
    labels: list[int] = []
    numbers = {name: number for number, name in enumerate(classes)}
    for folder in root.folders:
        images = sorted(path for each in folder.walk() for path in each.images)
        if not images:
            counts = _counts(_sum_left_out([folder]))
            raise InputError(
                f"load_data: expected images in the class folder {folder.path}, got none"
                f"{f' that can be read: {counts}' if counts else ''}. Add some ({', '.join(FORMATS)}), or "
                "remove the folder."
            )
        paths += images
        labels += [numbers[folder.name]] * len(images)
    return RawSplit(EncodedFiles(paths), torch.tensor(labels))


def _left_out(root: Folder, splits: dict[str, Folder]) -> list[str]:
    """What lies among the images and is none, and images that belong to no class."""
    notes = []
    counts = _sum_left_out([folder for split in splits.values() for folder in split.folders])
    if counts:
        notes.append(f"left out, as no images that can be read: {_counts(counts)}")
    above = [*splits.values(), *([] if root in splits.values() else [root])]
    if stray := [path for folder in above for path in folder.images]:
        notes.append(f"left out, as in no class folder: {len(stray):,} images, such as {stray[0].name}")
    return notes


def _sum_left_out(folders: list[Folder]) -> Counter[str]:
    return sum((each.left_out for folder in folders for each in folder.walk()), Counter())


def _counts(counts: Counter[str]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return _listed([f"{count:,} {ending}" for ending, count in ordered])
