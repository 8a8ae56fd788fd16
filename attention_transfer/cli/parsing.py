"""What the verbs share in reading their arguments, with one-line answers to what does not parse."""

from __future__ import annotations

import argparse
import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attention_transfer._colours import print_safely
from attention_transfer._errors import InputError
from attention_transfer._extras import require
from attention_transfer._hints import did_you_mean
from attention_transfer._reading import is_deceptive, one_line
from attention_transfer._trust import is_factory
from attention_transfer.cli.wording import spoken

PROGRAM = "attention-transfer"

FACTORY_FLAGS = ("--student", "--teacher", "--model", "--terms")
"""Flags whose value may name code of the user's own."""

VERBS = {
    "demo": "See attention transfer at work on real digits, in minutes, without a download",
    "train": "Train a student, alone or from a teacher, into a run folder",
    "evaluate": "Measure a run or a weights file on test images",
    "pairs": "Show which layers of a student and a teacher would be compared",
    "maps": "Draw a model's attention maps over images",
    "report": "Write one HTML page about some runs",
    "reproduce": "Run a published table again: what is missing of it, then the table, published and ours",
    "cache": "Store what a teacher sees in every image, to train any number of students from it",
    "caffe": "Attention transfer for Caffe's nets: build, check, train, convert",
    "export": "Write a run's student for others: safetensors, torch, onnx, torch-export, timm",
    "bench": "Measure what attention transfer costs, against the memory floor and others",
}


class UsageError(InputError):
    """A command line that does not parse."""


def verb_parser(verb: str, usage: str, summary: str | None = None) -> Any:
    """A parser for one verb's arguments; `usage` is an example of a call, `summary` what it does."""
    jsonargparse = require("jsonargparse", extra="train", user=verb)

    class Formatter(jsonargparse.DefaultHelpFormatter):  # type: ignore[misc, name-defined]
        def _get_type_str(self, action: argparse.Action) -> str | None:
            hint = _hint(action)
            return None if hint is None else " | ".join(type_names(hint))

        def _get_help_string(self, action: argparse.Action) -> str:
            text = super()._get_help_string(action)
            is_switch = action.nargs == 0
            if action.default in (None, "", []) or is_switch:  # the text says what it is if not given
                text = text.replace(" (default: %(default)s)", "").replace(", default: %(default)s", "")
            return text

    return jsonargparse.ArgumentParser(
        prog=f"{PROGRAM} {verb}",
        description=f"{summary or VERBS[verb]}. Example: {usage}",
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=Formatter,
    )


def parse(parser: Any, arguments: list[str]) -> Any:
    """The flags' values; `--weight_decay` is read as `--weight-decay`.

    Raises:
        UsageError: in one line, with near matches for an unknown flag.
    """
    arguments = [dashed(argument) for argument in arguments]
    spoken.set(frozenset(option for action in parser._actions for option in action.option_strings))
    _check_numbers(parser, arguments)
    try:
        if {"-h", "--help"} & {*arguments}:  # the defaults in it may be those of a --config
            print_safely(parser.format_help(), end="")
            raise SystemExit(0)
        return parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(_explain(parser, str(error))) from None


def _check_numbers(parser: Any, arguments: Sequence[str]) -> None:
    """Refuse numbers that a recipe would refuse: --epochs 010 is 10 here and 8 in YAML."""
    numeric = {
        option
        for action in parser._actions
        if re.search(r"\b(int|float)\b", str(getattr(action, "_typehint", "")))
        for option in action.option_strings
    }
    flag = ""
    for argument in arguments:
        name, separator, value = argument.partition("=")
        flag = name if name.startswith("--") else flag
        for word in re.split(r"[\[\],\s]+", value if separator else argument):
            if flag in numeric and is_deceptive(word):
                verb = parser.prog.removeprefix(f"{PROGRAM} ")
                raise UsageError(f"{verb}: {flag}: expected a plain number, got {word}.")


def split_trust(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments without --trust, and the factories that the user names: by it, or as a model's name.

    Raises:
        UsageError: if --trust is followed by nothing, or by what is no factory.
    """
    rest, factories = [], []
    words = iter(arguments)
    for word in words:
        flag, separator, value = word.partition("=")
        if flag == "--trust":
            value = value if separator else next(words, "")
            if not is_factory(value):
                raise UsageError(f"--trust: expected a factory, package.module:name, got {value!r:.80}.")
            factories.append(value)
            continue
        rest.append(word)
        if separator:
            named = value if flag in FACTORY_FLAGS else ""
        else:
            named = word if len(rest) > 1 and rest[-2] in FACTORY_FLAGS else ""
        factories += filter(is_factory, map(str.strip, named.split(",")))
    return rest, factories


def dashed(argument: str) -> str:
    """An argument in which `--weight_decay` is `--weight-decay`."""
    flag, separator, value = argument.partition("=")
    return flag.replace("_", "-") + separator + value if flag.startswith("--") else argument


def _explain(parser: Any, message: str) -> str:
    verb = parser.prog.removeprefix(f"{PROGRAM} ")
    if unknown := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
        flags = [option for action in parser._actions for option in action.option_strings]
        flag = unknown[1].partition("=")[0]
        return f"{verb}: unknown argument {flag}. {suggest(flag, flags) if flag[0] == '-' else ''}".strip()
    named = {action.dest: action for action in parser._actions}
    wrong = re.match(r'Parser key "(\w+)":.*(?:Got|Given) value: (.*)', message, re.DOTALL)
    if wrong and (hint := _hint(named[wrong[1]])):
        names = [name for name in type_names(hint) if name != "null"]
        article = "an" if names[0][0] in "aeiou" else "" if names[0][0] == '"' else "a"
        expected = f"{article} {' or '.join(names)}".strip()
        return f"{verb}: {_called(named[wrong[1]])}: Expected {expected}. Got value: {one_line(wrong[2])}"
    if missing := re.search(r"arguments are required: (.+)", message):
        words = ", ".join(_called(named[name]) for name in missing[1].split(", "))
        return f"{verb}: expected {words}, got none. `{parser.prog} --help` explains it."
    return f"{verb}: {one_line(message)}"


def _called(action: argparse.Action) -> str:
    """What an argument is called on the command line."""
    return action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)


def _hint(action: argparse.Action) -> Any:
    """The type of an argument's value; None for text of any kind."""
    return getattr(action, "_typehint", None) or action.type


def type_names(hint: Any) -> list[str]:
    """What values of a type are called, of a union each member: int, path, "auto", null."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    names = []
    for member in members:
        if typing.get_origin(member) is typing.Literal:
            names += [f'"{choice}"' for choice in typing.get_args(member)]
        elif typing.get_origin(member) is tuple:
            names.append(f"list of {typing.get_args(member)[0].__name__}s")
        else:
            names.append(
                {type(None): "null", Path: "path"}.get(member, getattr(member, "__name__", str(member)))
            )
    return names


def suggest(word: str, known: Iterable[str]) -> str:
    """Near matches of a misspelt word, or all that is known."""
    known = list(known)
    return did_you_mean(word, known) or f"Known: {', '.join(known)}."
