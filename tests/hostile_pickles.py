# ruff: noqa: E501 (opcodes, each file on its line)
"""Small checkpoints that would take hours, gigabytes or the process itself, opcode by opcode."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile

PROTOCOL = b"\x80\x02"
STORED = {"0": bytes(4)}


def in_archive(pickled: bytes, records: dict[str, bytes] | None = None) -> bytes:
    """A checkpoint as `torch.save` writes it, around any pickle."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        for name, content in (STORED if records is None else records).items():
            archive.writestr(f"archive/data/{name}", content)
    return data.getvalue()


def in_old_format(pickled: bytes) -> bytes:
    """The same in the format before archives: five pickles, and the numbers."""
    before = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    start = b"".join(pickle.dumps(each, 2) for each in before)
    return start + pickled + pickle.dumps(["0"], 2) + struct.pack("<q", 1) + bytes(4)


def called(name: str, arguments: bytes) -> bytes:
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode() + b"(" + arguments + b"tR"


def value(content: object) -> bytes:
    return pickle.dumps(content, 2)[2:-1]


def text(content: str) -> bytes:
    return b"X" + struct.pack("<I", len(content)) + content.encode()


def storage(numbers: int, key: str, *, old: bool) -> bytes:
    end = b"NtQ" if old else b"tQ"
    return b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + value(numbers) + end


def view(
    numbers: int,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    *,
    key: str = "0",
    old: bool = False,
) -> bytes:
    place = value(offset) + value(size) + value(stride)
    empty = b"ccollections\nOrderedDict\n)R"
    return called("torch._utils._rebuild_tensor_v2", storage(numbers, key, old=old) + place + b"\x89" + empty)


def state(tensor: bytes) -> bytes:
    """{"weight": what this makes}."""
    return PROTOCOL + b"}" + text("weight") + tensor + b"s."


def keyed(key: bytes) -> bytes:
    """{what this makes: None}."""
    return PROTOCOL + b"}" + key + b"Ns."


TOWER = b")" + b"q\x00h\x00\x86" * 60
"""(x, x) of (x, x) of ..., sixty times."""

LIST_TOWER = b")q\x00" + b"](h\x00h\x00eq\x00" * 60
HEX = called("_codecs.encode", text("ab") + text("latin1")) + b"".join(
    b"q\x00" + called("_codecs.encode", b"h\x00" + text("hex")) for _ in range(26)
)
UNFOLDS, DEEP, BEYOND = "would unfold to more", "is nested too deeply", "of more numbers than are stored"
KEYS, FOREIGN, DAMAGED = (
    "too many keys that are neither",
    "holds the pickled object ",
    "damaged or of another format",
)

BOMBS: dict[str, tuple[bytes, str]] = {
    "a key of tuples in tuples": (in_archive(keyed(TOWER)), UNFOLDS),
    "a set of tuples in tuples": (in_archive(state(called("builtins.set", b"]" + TOWER + b"a"))), UNFOLDS),
    "a Counter of tuples in tuples": (
        in_archive(state(called("collections.Counter", b"]" + TOWER + b"a"))),
        UNFOLDS,
    ),
    "an OrderedDict of pairs": (
        in_archive(state(called("collections.OrderedDict", b"](](" + TOWER + b"Nee"))),
        UNFOLDS,
    ),
    "one large key, again and again": (
        in_archive(PROTOCOL + b"}q\x01" + b")" + b"q\x00h\x00\x86" * 16 + b"q\x00" + b"h\x01(" + b"h\x00N" * 2000 + b"u."),
        UNFOLDS,
    ),
    "lists in lists": (in_archive(PROTOCOL + b"}q\x01" + LIST_TOWER + b"h\x01" + text("a") + b"h\x00s."), UNFOLDS),
    "a tuple too deep to hash": (in_archive(keyed(b")" + b"\x85" * 200_000)), DEEP),
    "a list too deep to go down": (in_archive(PROTOCOL + b"]" * 20_000 + b"a" * 19_999 + b"."), DEEP),
    "numbers of one hash": (
        in_archive(PROTOCOL + b"}(" + b"".join(value(k * (2**61 - 1)) + b"N" for k in range(1, 60_000)) + b"u."),
        KEYS,
    ),
    "tuples of one hash": (
        in_archive(PROTOCOL + b"}(" + b"".join(value((0, k * (2**61 - 1))) + b"N" for k in range(1, 5000)) + b"u."),
        UNFOLDS,
    ),
    "an empty bytearray": (in_archive(state(called("builtins.bytearray", value(6 << 30)))), DAMAGED),
    "text that doubles": (in_archive(state(HEX)), "asks _codecs.encode for what no checkpoint has"),
    "text again and again": (
        in_archive(
            PROTOCOL + text("a" * 100_000) + b"q\x00](" + called("_codecs.encode", b"h\x00" + text("latin1")) * 300 + b"e."
        ),
        UNFOLDS,
    ),
    "an empty tensor": (in_archive(state(called("torch.FloatTensor", value(1 << 31)))), FOREIGN + "torch.FloatT"),
    "a tensor that is made anew": (
        in_archive(state(b"ctorch\nTensor\n" + value((1 << 31,)) + b"\x81")),
        FOREIGN + "torch.Tensor",
    ),
    "a tensor longer than its numbers": (in_archive(state(view(1, 0, (1 << 31,), (1,)))), BEYOND),
    "a tensor behind its numbers": (in_archive(state(view(1, 1 << 31, (1,), (1,)))), BEYOND),
    "steps too long": (in_archive(state(view(1, 0, (2,), (1 << 40,)))), BEYOND),
    "more numbers than there are": (in_archive(state(view(1 << 40, 0, (2,), (1,)))), "promises 4,398,046,511,104"),
    "the same, in the old format": (
        in_old_format(state(view(1 << 31, 0, (2,), (1,), old=True))),
        "promises 8,589,934,592",
    ),
    "a view, in the old format": (in_old_format(state(view(1, 0, (1 << 31,), (1,), old=True))), BEYOND),
    "tuples in tuples, in the old format": (in_old_format(keyed(TOWER)), UNFOLDS),
}  # fmt: skip
"""Name: the file, and what is said of it."""
