"""Which split the name of a file or a folder speaks of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

USUAL = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test",),
}  # need no word about what they were taken for
NEAR = {
    "train": ("trainval", "trn"),
    "validation": ("validate", "dev", "development", "eval", "evaluation", "holdout", "heldout"),
    "test": ("testing", "tst"),
}
SPLIT_NAMES = {word: split for names in (USUAL, NEAR) for split, words in names.items() for word in words}
USUAL_WORDS = {word for words in USUAL.values() for word in words}

BESIDE = ("set", "data", "dataset", "images", "image", "imgs", "img", "split", "folder")
"""Words that say nothing beside one of these: training_set, testdata, train_images."""

_GLUED = re.compile(rf"({'|'.join(SPLIT_NAMES)})(?:{'|'.join(BESIDE)})")


def words_of(name: str) -> list[str]:
    """The words of a name in lower case, with split names as `SPLIT_NAMES` has them: TestSet is test."""
    name = re.sub(r"(hold|held)[-_ ]?out", r"\1out", name, flags=re.IGNORECASE)
    found: list[str] = []
    for word in re.findall(r"[^\W\d_]+", name):
        camel = re.findall(r"[^\W\d_A-Z]+|[A-Z]+(?![^\W\d_A-Z])|[A-Z][^\W\d_A-Z]+", word)
        glued = _GLUED.fullmatch(word.lower())
        parts = [part.lower() for part in camel]
        found += [glued[1]] if glued else parts if SPLIT_NAMES.keys() & parts else [word.lower()]
    return found


def split_of_file(path: str) -> str | None:
    """The last word of a path that names a split."""
    words = words_of(path)
    return next((word for word in reversed(words) if word in SPLIT_NAMES), None)


def splits_of_folders(names: Iterable[str]) -> dict[str, str]:
    """The folders that are named after a split, each with the word that says so.

    train, TrainingSet, train_images and train2017 are; seg_train is where there is a seg_test too, and a
    class called train_station is not.
    """
    parsed = {name: found for name in names if (found := _parse(name))}
    return {
        name: word
        for name, (word, rest) in parsed.items()
        if not rest
        or any(
            rest == others and SPLIT_NAMES[word] != SPLIT_NAMES[other] for other, others in parsed.values()
        )
    }


def _parse(name: str) -> tuple[str, tuple[str, ...]] | None:
    """(the word that names a split, all others that say something), if there is just one such word."""
    words = words_of(name)
    named = [word for word in words if word in SPLIT_NAMES]
    if len(named) != 1:
        return None
    return named[0], tuple(word for word in words if word != named[0] and word not in BESIDE)


def doubled(found: Mapping[str, str]) -> list[str]:
    """The names of a split that goes by several, given each name's word; none where no split does."""
    by_split: dict[str, list[str]] = {}
    for name, word in found.items():
        by_split.setdefault(SPLIT_NAMES[word], []).append(name)
    return next((sorted(names) for names in by_split.values() if len(names) > 1), [])


def notes_of(found: Mapping[str, str]) -> list[str]:
    """What was taken for what, where the name is not one of the usual ones."""
    return [
        f"split {SPLIT_NAMES[word]}: {name}"
        for name, word in sorted(found.items())
        if name.lower() not in USUAL_WORDS
    ]
