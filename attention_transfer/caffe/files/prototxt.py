"""Reading and writing nets and solvers as text, and where in the text each layer stands."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from attention_transfer._errors import InputError
from attention_transfer._files import write_atomically
from attention_transfer._hints import did_you_mean
from attention_transfer._reading import open_file
from attention_transfer.caffe import schema
from attention_transfer.caffe.files.upgrade import upgrade_net, upgrade_solver
from attention_transfer.caffe.schema import text_format

LARGEST_TEXT = 4 << 20  # bytes; the deepest published nets take 0.2 MB

NOT_UTF8 = re.compile("[\udc80-\udcff]")  # how such bytes come out of Python's decoding

TOKEN = re.compile(r"""#[^\n]*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|[{}<>]|[^\s{}<>"'#:;,\[\]]+|\S""")


def read_net(path: str | PathLike[str]) -> Any:
    """The net in a prototxt, as a NetParameter in the current form.

    Raises:
        ValueError: if it does not parse, in one line with the place and, for a misspelt field, near matches.
        OSError: if it cannot be read.
    """
    return parse_net(read_text(path, "read_net"), source=str(path))


def parse_net(text: str, source: str = "text") -> Any:
    """Like `read_net`, from the text itself."""
    return upgrade_net(parse(text, schema.NetParameter(), source, "read_net"), "read_net")


def read_solver(path: str | PathLike[str]) -> Any:
    """The solver in a prototxt, as a SolverParameter in the current form.

    Raises:
        ValueError, OSError: as `read_net`.
    """
    text = read_text(path, "read_solver")
    return upgrade_solver(parse(text, schema.SolverParameter(), str(path), "read_solver"))


def write_prototxt(message: Any, path: str | PathLike[str], *, comment: str = "") -> None:
    """Write a net or a solver as text that Caffe reads, whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    write_atomically(Path(path), head + text_format.MessageToString(message))


def read_text(path: str | PathLike[str], user: str) -> str:
    """The text of a file of bearable size. What is not UTF-8 in comments becomes question marks.

    Raises:
        ValueError: if it is too large, not UTF-8 outside of comments, or begins with a byte-order mark.
        OSError: if it cannot be read.
    """
    with open_file(path) as file:
        data = file.read(LARGEST_TEXT + 1)
    if len(data) > LARGEST_TEXT:
        raise InputError(
            f"{user}: expected a prototxt of at most {LARGEST_TEXT >> 20} MB, got more in {path}."
        )
    if data.startswith(BOM_UTF8):
        raise InputError(
            f"{user}: expected text, got a byte-order mark before it in {path}: Caffe cannot read it. "
            "Save the file as UTF-8 without one."
        )
    text = data.decode("utf-8", errors="surrogateescape")
    if not NOT_UTF8.search(text):
        return text
    if any(NOT_UTF8.search(token) for token, _, _ in tokens(text)):
        remedy = "A .caffemodel holds weights; the net is in a .prototxt."
        raise InputError(f"{user}: expected text in UTF-8, got other bytes in {path}. {remedy}")
    return NOT_UTF8.sub("?", text)


def parse(text: str, message: Any, source: str, user: str) -> Any:
    """Fill `message` from `text`; returns it.

    Raises:
        ValueError: with the place in `source` where it does not parse.
    """
    try:
        return text_format.Parse(text, message)
    except text_format.ParseError as error:
        raise InputError(f"{user}: {source}:{describe_parse_error(error)}") from None


def describe_parse_error(error: text_format.ParseError) -> str:
    """`LINE:COLUMN: what is wrong`, with near matches for a field that does not exist."""
    place = f"{error.GetLine()}:{error.GetColumn()}: " if error.GetLine() else " "
    if unknown := unknown_field(error):
        message, name = unknown
        fields = schema.fields(message)
        others = {"NetParameter": "SolverParameter", "SolverParameter": "NetParameter"}
        if message in others and name in schema.fields(others[message]):
            own = "solver" if message == "NetParameter" else "net"
            hint = f"It is a field of a {own}: is the file one?"
        elif message == "V1LayerParameter" and name == "layer":
            hint = "The V0 format must go through Caffe's upgrade_net_proto_text first."
        else:
            hint = did_you_mean(name, fields) or f"Known: {', '.join(fields[:12])}."
        return f"{place}{message} has no field {name!r}. {hint}"
    return place + re.sub(r"^\d+:\d+ : ", "", str(error)).replace("\n", " ")


def unknown_field(error: text_format.ParseError) -> tuple[str, str] | None:
    """(message, field) of an error that is about a field which does not exist."""
    found = re.search(r'Message type "caffe\.(\w+)" has no field named "(\w+)"', str(error))
    return (found[1], found[2]) if found else None


# ------------------------------------------------------------------------------------------------- places


def tokens(text: str) -> Iterator[tuple[str, int, int]]:
    """(token, line, offset) of everything but white space and comments."""
    line, end = 1, 0
    for match in TOKEN.finditer(text):
        line += text.count("\n", end, match.start())
        end = match.start()
        if not match[0].startswith("#"):
            yield match[0], line, match.start()


def layer_lines(text: str) -> list[int]:
    """The line on which each `layer` (or `layers`) of a net begins, in their order."""
    depth, lines = 0, []
    for token, line, _ in tokens(text):
        if token in "{<":
            depth += 1
        elif token in "}>":
            depth -= 1
        elif depth == 0 and token in ("layer", "layers"):
            lines.append(line)
    return lines
