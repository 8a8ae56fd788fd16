"""What every reader of a data set hands over: encoded or decoded images with labels, split by split."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxtyping import Int64, UInt8
from torch import Tensor

from .._errors import InputError
from .decode import Encoded
from .split_names import SPLIT_NAMES, doubled, notes_of, split_of_file

LABEL_NAMES = ("label", "labels", "target", "class", "fine_label", "y")  # what labels are usually called

MOST_CLASSES = 1_000_000  # a higher label is an identifier of something


@dataclass(frozen=True)
class RawSplit:
    """Images as they were found: encoded, or already pixels."""

    content: Encoded | UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"]


@dataclass(frozen=True)
class Source:
    """A data set as it was found: the splits it came with, by "train", "validation", "test"."""

    splits: dict[str, RawSplit]
    classes: list[str]
    place: str
    flip: bool = True
    notes: list[str] = field(default_factory=list)


def group_by_split(files: Sequence[Path], place: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Files, sorted, by the split that their name, or a folder above them within `place`, speaks of.

    The last word counts: train, test, val, valid, validation, or one near to these, of which there is a note.
    If no name speaks of one, all are training files.

    Raises:
        ValueError: if some names speak of a split and some do not, or two words of the same one.
    """
    groups: dict[str | None, list[Path]] = defaultdict(list)
    for file in sorted(files):
        within = file.relative_to(place) if place.is_dir() else Path(file.name)
        groups[split_of_file(within.with_suffix("").as_posix())].append(file)
    nameless = groups.pop(None, [])
    if groups and nameless:
        raise InputError(
            f"load_data: expected every {nameless[0].suffix[1:]} file in {place} to be named after its "
            f"split, got {nameless[0].name}. "
            "Put train, validation or test into its name, or move it away."
        )
    words = {word: group for word, group in groups.items() if word}
    if same := doubled({word: word for word in words}):
        examples = " and ".join(words[word][0].name for word in same)
        raise InputError(
            f"load_data: expected one name for each split in {place}, got {' and '.join(same)}, which say "
            f"the same ({examples}). Rename some, or move them away."
        )
    notes = notes_of({word: word for word in words})
    return {SPLIT_NAMES[word]: group for word, group in words.items()} or {"train": nameless}, notes


def numbered_classes(splits: dict[str, RawSplit]) -> list[str]:
    """The names of classes that have none: their numbers.

    Raises:
        ValueError: if there would be millions of them.
    """
    highest = max([0, *(int(split.labels.max()) for split in splits.values() if len(split.labels))])
    if highest >= MOST_CLASSES:
        raise InputError(
            f"load_data: expected labels that number the classes from 0, got {highest}. "
            "Number the classes anew."
        )
    return [str(label) for label in range(highest + 1)]


def check_source(source: Source) -> None:
    """Refuse labels that cannot be trained on.

    Raises:
        ValueError: if there is no training split, a split is empty or unlabelled, the training images show
            fewer than two classes, or another split has a class that training lacks.
    """
    if "train" not in source.splits:
        raise InputError(
            f"load_data: expected a training split in {source.place}, got only {sorted(source.splits)}. "
            "Name the training files or folder 'train'."
        )
    for name, split in source.splits.items():
        _check_split(name, split.labels, len(source.classes), source.place)
    known = set(source.splits["train"].labels.tolist())
    if len(known) < 2:
        raise InputError(
            f"load_data: expected at least two classes in {source.place}, got {len(known)} "
            f"({', '.join(source.classes[label] for label in known)}). "
            "A classifier needs something to tell apart."
        )
    for name, split in source.splits.items():
        if strangers := set(split.labels.tolist()) - known:
            names = ", ".join(source.classes[label] for label in sorted(strangers))
            raise InputError(
                f"load_data: expected the {name} split of {source.place} to hold only classes of the "
                f"training split, got also {names}. Add training images of them, or remove them."
            )


def _check_split(name: str, labels: Int64[Tensor, " n"], classes: int, place: str) -> None:
    if len(labels) == 0:
        raise InputError(
            f"load_data: expected images in the {name} split of {place}, got none. Check the path."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InputError(
            f"load_data: expected labels 0 to {classes - 1} in the {name} split of {place}, "
            f"got {low} to {high}. "
            "A label of -1 marks an unlabelled split: leave that split out."
        )
