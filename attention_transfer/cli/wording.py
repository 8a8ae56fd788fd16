"""What the library says in the words of the command: a function has arguments, a verb has flags."""

from __future__ import annotations

import re
from collections.abc import Collection
from contextvars import ContextVar

spoken: ContextVar[frozenset[str]] = ContextVar("spoken", default=frozenset())
"""The flags of the verb that runs."""

_OTHER_FLAGS = {
    "root": ("--data-root", "--root", "--data"),
    "input_size": ("--input-size", "--image-size"),
    "weights": ("--weights", "--teacher-weights"),
}
"""Arguments that are not named as their flag is: the first of these that the verb has."""

_PHRASES = (
    (r"(?<!\.)\.\.(?=\s|$)", "."),  # another's sentence within one of ours
    # what the verbs settle themselves, or do not offer, is no advice
    (r"Pass download=True, root=", "Pass root="),
    (r", or drop_last=False\b", ""),
    (r", or pass strict=False to load [^.;]*", ""),
    (r" See Distiller\(teacher_transform=\.\.\.\)\.", ""),
    (r"Build the student with num_classes=\d+ or mend", "Mend"),
    (r"Build the student with num_classes=2\.", "Pass data of two classes or more."),
    (r"Build the model with num_classes=\d+", "Give that number of classes"),
    (r"to adapt to in_channels=(\d+)", r"to adapt to \1 channels"),
    (r"Pass in_channels=(\d+),", r"Pass images of \1 channels,"),
    (
        r"the model's name, num_classes and in_channels",
        "the model's name, and the numbers of classes and channels",
    ),
    (r"`model\.named_modules\(\)` lists all\.", "`attention-transfer pairs` shows those of the stages."),
    (r"Pass layout=\{.*?\} or the other, or call it", "Call it"),
    (r"layout=\{.*?\} or (\"[^\"]*\" as its name)", r"\1"),
    (r", or pass another layout=", ""),
    (r"Say where they are, such as by \w+=\S+ or \w+=\S+, or return", "Return"),
    # what they offer under another name
    (r"pairs=\[Pair\(\"student\.layer\", \"teacher\.layer\"\)\]", "--pairs STUDENT_LAYER:TEACHER_LAYER"),
    (r"Pass example_input= \(teacher_input=\) of the size", "Pass an input_size of the size"),
    (r"a larger example input", "a larger input_size"),
    (r'resize="student" or "teacher"', 'resize="student|teacher"'),
)

_NAMED = re.compile(
    r"(?<![\w/.\-])([a-z]+(?:_[a-z0-9]+)*)=(\"[^\"]*\"|[\w.]+(?:\{[^}]*\})?|(?=[ .;,)]|$))(?![\w/=])"
)
_BARE = re.compile(r"(?<![\w/.\-\"'`=])([a-z]+(?:_[a-z0-9]+)+)(?![\w/=(\"'`]|\.\w)")


def in_flags(text: str, flags: Collection[str]) -> str:
    """An error or a warning of the library, as a verb with these flags says it.

    A recipe's fields are named as they stand in its file.
    """
    if text.startswith("Recipe"):
        return text
    for pattern, words in _PHRASES:
        text = re.sub(pattern, words, text)
    text = _NAMED.sub(lambda found: _with_value(found, flags), text)
    return _BARE.sub(lambda found: _flag(found[1], flags) or found[0], text)


def _with_value(found: re.Match[str], flags: Collection[str]) -> str:
    flag = _flag(found[1], flags)
    if flag is None:
        return found[0]
    value = found[2].strip('"')
    return f"{flag} {value}" if value else flag


def _flag(name: str, flags: Collection[str]) -> str | None:
    """The flag for a function's argument, or None if the verb has none."""
    candidates = _OTHER_FLAGS.get(name, ("--" + name.replace("_", "-"),))
    return next((flag for flag in candidates if flag in flags), None)
