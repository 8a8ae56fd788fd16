"""What a pickle would make, worked out without making it.

torch's `weights_only` lets no code run. It does let a few hundred bytes ask for gigabytes, by `bytearray`, or
hash a tuple of tuples without end, or overflow the interpreter's stack. So each pickle is gone through first,
with stand-ins that cost no more than the bytes that ask for them: what it makes must be in proportion.
"""

from __future__ import annotations

import math
import pickle
import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeVar

import torch

from attention_transfer._errors import InputError

LARGEST = 64 << 20  # bytes of a pickle; that of 100,000 tensors takes 15 MB
MOST_STEPS = 10_000_000
DEEPEST = 64  # dicts, lists and tuples in each other; Lightning's checkpoints have 8
FREE_WORK = 1_000_000  # parts that are made, copied or hashed, whatever the size of the pickle
WORK_PER_BYTE = 16
MOST_ODD_KEYS = 4096  # neither text nor small numbers

_HASH_MODULUS = 2**61 - 1  # an int below it is its own hash
_CODECS = ("latin1", "latin-1", "utf-8", "ascii")  # others unfold ("hex"), or take their time ("punycode")

_ITEM_BYTES = {
    **dict.fromkeys(("ComplexDouble",), 16),
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    **dict.fromkeys(("Float", "Int", "QInt32"), 4),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Byte", "Char", "Bool", "QUInt8", "QInt8", "QUInt4x2", "QUInt2x4", "Untyped"), 1),
}
"""Bytes of a number in each kind of storage."""


class OutOfProportionError(InputError):
    """A pickle would make more than it is worth, or what no checkpoint has."""


@dataclass(frozen=True)
class Name:
    """A global, as the pickle names it."""

    full: str


@dataclass(frozen=True, eq=False)
class Storage:
    """The numbers of a tensor: how many bytes, and how many in each."""

    bytes: int
    item: int


@dataclass(frozen=True, eq=False)
class Made:
    """Whatever a call makes; of text, so many characters."""

    parts: int = 1
    is_text: bool = False


@dataclass(frozen=True, eq=False)
class Tuple:
    """A tuple with the number of its parts, all the way down, and how deep that is."""

    items: tuple[Any, ...]
    parts: int
    depth: int


@dataclass(eq=False)
class Dict:
    """A dict, or a set: the keys are never hashed here."""

    items: list[Any] = field(default_factory=list)


class Pickle:
    """One pickle in a file, gone through from beginning to end by `check`."""

    def __init__(self, file: BinaryIO, storages: dict[str, int]) -> None:
        """`storages` takes the bytes of each storage by its key."""
        self._file = file
        self._storages = storages
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._work = 0
        self._odd_keys = 0

    def check(self) -> None:
        """Go through it; the file is at its end then.

        Raises:
            pickle.UnpicklingError: for what `weights_only` refuses.
            ValueError: if it is damaged, or out of proportion.
        """
        start = self._file.tell()
        for step, (opcode, argument, position) in enumerate(pickletools.genops(self._file)):
            if step > MOST_STEPS or (position or 0) - start > LARGEST:
                raise OutOfProportionError("has a pickle of too many parts")
            self._allowed = FREE_WORK + WORK_PER_BYTE * ((position or 0) - start)
            self._step(opcode.name, argument)
        value = self._stack.pop()
        parts, depth = _parts_and_depth(value)
        self.spend(parts)
        if depth > DEEPEST:
            raise OutOfProportionError("is nested too deeply")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "GLOBAL":
            stack.append(Name(_modern(argument)))
        elif name == "MARK":
            self._marks.append(stack)
            self._stack = []
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [self._tuple(stack[-count:])]
        elif name == "TUPLE":
            items = self._pop_mark()
            self._stack.append(self._tuple(items))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self._pop_mark()
            _only(self._stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._pop_mark()
            self._set_items(_only(self._stack[-1], Dict), items)
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = _only(stack.pop(), Tuple)
            stack[-1] = self.call(_only(stack[-1], Name).full, arguments.items, new=name == "NEWOBJ")
        elif name == "BUILD":
            state = stack.pop()
            self._build(stack[-1], state)
        elif name == "BINPERSID":
            stack[-1] = self._storage(_only(stack[-1], Tuple).items)
        elif name not in ("PROTO", "STOP"):
            raise pickle.UnpicklingError(f"Unsupported operand {name}")

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def spend(self, parts: int) -> None:
        """Count what is made, copied or hashed."""
        self._work += parts
        # guard: pickle-work
        if self._work > self._allowed:
            raise OutOfProportionError("would unfold to more than it is worth")

    def _tuple(self, items: list[Any]) -> Tuple:
        inner = [item for item in items if isinstance(item, Tuple)]
        parts = len(items) + sum(item.parts for item in inner)
        depth = 1 + max((item.depth for item in inner), default=0)
        # guard: pickle-depth
        if depth > DEEPEST:
            raise OutOfProportionError("is nested too deeply")
        return Tuple(tuple(items), parts, depth)

    def _set_items(self, target: Dict, items: list[Any]) -> None:
        for key in items[::2]:
            self.hash(key)
        target.items += items

    def hash(self, key: Any) -> None:
        """Count a key that is hashed, be it of a dict or of a set."""
        is_small = isinstance(key, int) and abs(key) < _HASH_MODULUS
        if not (is_small or isinstance(key, str | Name)):
            self._odd_keys += (
                1  # whose hashes can be made to collide, so that each is compared with all others
            )
            self.spend(self._odd_keys * key.parts if isinstance(key, Tuple) else 1)
        self.spend(1)
        # guard: pickle-odd-keys
        if self._odd_keys > MOST_ODD_KEYS:
            raise OutOfProportionError("has too many keys that are neither text nor small numbers")

    def call(self, name: str, arguments: tuple[Any, ...], *, new: bool = False) -> Any:
        """What a call makes, if it is one that checkpoints have."""
        if name not in _CALLS or (new and name not in _NEW):
            # guard: pickle-globals
            raise pickle.UnpicklingError(f"GLOBAL {name}")
        return _CALLS[name](self, name, arguments)

    def _build(self, target: Any, state: Any) -> None:
        """`OrderedDict.__dict__.update(state)`, by which a state dict keeps its versions."""
        if not isinstance(target, Dict):
            raise pickle.UnpicklingError("a state for something else than a dict")
        self.spend(_length(state))
        target.items += [None, state]

    def _storage(self, arguments: tuple[Any, ...]) -> Storage:
        what, kind, key, _, numel, *_ = arguments
        name = _only(kind, Name).full.rpartition(".")[2].removesuffix("Storage")
        if what not in ("storage", b"storage") or name not in _ITEM_BYTES:
            raise pickle.UnpicklingError("a reference to something else than numbers")
        storage = Storage(_count(numel) * _ITEM_BYTES[name], _ITEM_BYTES[name])
        key = key if isinstance(key, str) else str(_count(key))
        self._storages[key] = max(storage.bytes, self._storages.get(key, 0))
        return storage


def _container(reader: Pickle, name: str, arguments: tuple[Any, ...]) -> Dict:
    """OrderedDict, Counter or set: empty, or of a list or dict of what is hashed."""
    made = Dict()
    for items in arguments:
        listed = items.items if isinstance(items, Dict) else _only(items, list)
        for item in listed:
            for key in item if isinstance(item, list) else [item]:  # OrderedDict([[key, value], ...])
                reader.hash(key)
        made.items += listed
    return made


def _text(reader: Pickle, name: str, arguments: tuple[Any, ...]) -> Made:
    """Bytes, which old protocols keep as text that is encoded."""
    text, *codec = arguments or ("",)
    # guard: pickle-codecs
    if not all(isinstance(each, str) and each in _CODECS for each in codec):
        raise OutOfProportionError(f"asks {name} for what no checkpoint has")
    length = text.parts if isinstance(text, Made) and text.is_text else len(_only(text, str))
    reader.spend(length)
    return Made(length, is_text=True)


def _plain(reader: Pickle, name: str, arguments: tuple[Any, ...]) -> Made:
    """What has no more parts than it is given: a device, a parameter, a tensor without numbers."""
    reader.spend(sum(map(_length, arguments)))
    return Made()


def _size(reader: Pickle, name: str, arguments: tuple[Any, ...]) -> Tuple:
    (sizes,) = arguments
    reader.spend(_only(sizes, Tuple).parts)
    return sizes


def _tensor(reader: Pickle, name: str, arguments: tuple[Any, ...]) -> Made:
    """A view of a storage, which must not reach beyond it."""
    storage, offset, size, stride = arguments[:4]
    sizes, strides = ([_count(each) for each in _only(part, Tuple).items] for part in (size, stride))
    last = _count(offset) + sum((count - 1) * step for count, step in zip(sizes, strides, strict=True))
    needed = max(last + 1, math.prod(sizes)) if name.endswith("qtensor") else last + 1
    item = _item_bytes(arguments[6]) if name.endswith("_v3") else _only(storage, Storage).item
    # guard: tensor-in-its-storage
    if math.prod(sizes) and needed * item > _only(storage, Storage).bytes:
        raise OutOfProportionError("has a tensor of more numbers than are stored")
    reader.spend(len(sizes))
    return Made()


def _wrapped(reader: Pickle, name: str, arguments: tuple[Any, ...]) -> Made:
    """`_rebuild_from_type_v2(function, type, arguments, state)`: a tensor with attributes."""
    function, _, inner, state = arguments
    reader.spend(_length(state))
    reader.call(_only(function, Name).full, _only(inner, Tuple).items)
    return Made()


_CALLS: dict[str, Callable[[Pickle, str, tuple[Any, ...]], Any]] = {
    **dict.fromkeys(("collections.OrderedDict", "collections.Counter", "builtins.set"), _container),
    **dict.fromkeys(("_codecs.encode", "builtins.bytearray"), _text),
    **dict.fromkeys(("builtins.complex", "torch.device", "torch.serialization._get_layout"), _plain),
    "torch.Size": _size,
    **dict.fromkeys(
        (f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3")), _tensor
    ),
    "torch._utils._rebuild_qtensor": _tensor,
    "torch._utils._rebuild_sparse_tensor": _plain,
    "torch._utils._rebuild_meta_tensor_no_storage": _plain,
    "torch._utils._rebuild_parameter": _plain,
    "torch._utils._rebuild_parameter_with_state": _plain,
    "torch._tensor._rebuild_from_type_v2": _wrapped,
}
"""What checkpoints call, with what works out the cost. `weights_only` allows more: any tensor of any size."""

_NEW = ("collections.OrderedDict", "collections.Counter", "builtins.set", "torch.Size")
_RENAMED = {"__builtin__": "builtins", "torch.tensor": "torch._tensor"}
_LITERALS = ("BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": lambda: Tuple((), 0, 1),
    "EMPTY_LIST": list,
    "EMPTY_DICT": Dict,
    "EMPTY_SET": Dict,
}


def _modern(argument: str) -> str:
    module, _, name = argument.partition(" ")
    return f"{_RENAMED.get(module, module)}.{name}"


_T = TypeVar("_T")


def _only(value: Any, kind: type[_T]) -> _T:
    if not isinstance(value, kind):
        raise InputError(f"{type(value).__name__.lower()} where {kind.__name__.lower()} belongs")
    return value


def _length(value: Any) -> int:
    """How much it takes to copy a value, a level deep."""
    return 1 + (value.parts if isinstance(value, Tuple) else len(_items(value)))


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else value.items if isinstance(value, Tuple | Dict) else ()


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise InputError("a size that is none")
    return value


def _item_bytes(dtype: Any) -> int:
    found = getattr(torch, _only(dtype, Name).full.removeprefix("torch."), None)
    return _only(found, torch.dtype).itemsize


def _parts_and_depth(root: Any) -> tuple[int, int]:
    """The parts of a value, each as often as it is met on the way down, and how deep that way is.

    Of what contains itself each part is counted once: whoever goes down there meets its end at some depth.
    """
    found: dict[int, tuple[int, int]] = {}
    waiting = [(root, False)]
    while waiting:
        value, is_done = waiting.pop()
        inner = _items(value)
        if is_done:
            below = [found.get(id(each), (1, 1)) for each in inner]
            parts = min(1 + sum(parts for parts, _ in below), 1 << 62)
            found[id(value)] = parts, 1 + max((depth for _, depth in below), default=0)
        elif inner and id(value) not in found:
            found[id(value)] = 1, 1
            waiting.append((value, True))
            waiting += [(each, False) for each in inner]
    return found.get(id(root), (1, 1))
