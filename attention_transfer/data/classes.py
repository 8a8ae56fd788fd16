"""Classes by name: two data sets, or a model and a data set, may number the same ones otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

SHOWN = 5  # names in an error


def match_classes(ours: Sequence[str], theirs: Sequence[str] | None) -> list[int | None] | None:
    """Where each of our classes is among theirs, None for one that is not there, or there twice.

    Names are compared by their letters and digits alone, as far as that tells them apart. None where they say
    nothing: where theirs are not known, or the names on one side are numbers, as those of classes without a
    name, and some of ours are not among theirs.
    """
    if theirs is None:
        return None
    if list(ours) == list(theirs):
        return list(range(len(ours)))
    own, others = list(map(_plain, ours)), list(map(_plain, theirs))
    if len(set(own)) < len(own) or len(set(others)) < len(others):
        own, others = list(ours), list(theirs)
    times = Counter(own), Counter(others)
    places = {key: place for place, key in enumerate(others) if times[0][key] == times[1][key] == 1}
    found = [places.get(key) for key in own]
    return None if None in found and (_are_numbers(ours) or _are_numbers(theirs)) else found


def unknown_classes(ours: Sequence[str], theirs: Sequence[str] | None) -> str:
    """Those of our classes that are not among theirs, in words; "" where all are, or names say nothing."""
    places = match_classes(ours, theirs) or ()
    names = [repr(name[: SHOWN * 10]) for name, place in zip(ours, places, strict=False) if place is None]
    return ", ".join([*names[:SHOWN], *(["..."] if len(names) > SHOWN else [])])


def class_order(ours: Sequence[str], theirs: Sequence[str] | None) -> list[int] | None:
    """The place of each of our classes among theirs, where these are in another order or more; else None.

    That there are more of them takes names: numbers would say nothing of which are the same.
    """
    places = [place for place in match_classes(ours, theirs) or () if place is not None]
    if theirs is None or len(places) < len(ours):
        return None
    if len(theirs) > len(ours):
        return None if _are_numbers(ours) or _are_numbers(theirs) else places
    return places if places != list(range(len(ours))) else None


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))


def _are_numbers(names: Sequence[str]) -> bool:
    return list(names) == [str(number) for number in range(len(names))]
