"""The tensors of a weights file by name, and the prefixes under which those of a model are found.

A file of distillation, of self-supervision or with averaged weights holds several networks of one shape: in
dicts of their own ("state_dict_ema"), under prefixes of the names ("teacher.backbone."), or both. Here a
dict's name is a prefix like any other.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attention_transfer._errors import InputError

NESTING_KEYS = ("state_dict", "model_state_dict", "model", "params")
"""Where checkpoints keep their state dict; looked up in this order, again inside what is found."""

DEEPEST = 8
"""A state dict lies at most so many dicts deep in a checkpoint, which may contain itself."""

LONGEST_KEY = 64
"""Characters of a dict's name, which comes before the name of every tensor in it."""

_WRAPPER_SEGMENT = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class Stored:
    """The tensors of a file by name, the names of the dicts around them included.

    Attributes:
        usual: the prefix of the state dict where checkpoints usually keep it, which nobody needs to be told.
        dicts: of each name, the prefix of the dict that holds the tensor.
    """

    tensors: Mapping[str, Tensor]
    usual: str
    dicts: Mapping[str, str]

    @classmethod
    def of(cls, checkpoint: Mapping[Any, Any]) -> Stored:
        """Every tensor in a dict, or in a dict of dicts; a dict that is there twice counts once.

        Raises:
            ValueError: if two tensors have one name.
        """
        tensors: dict[str, Tensor] = {}
        dicts: dict[str, str] = {}
        for prefix, inner in _dicts_in(checkpoint):
            for name, tensor in without_wrappers(tensors_of(inner)).items():
                if prefix + name in tensors:
                    raise InputError(f"two tensors are called {(prefix + name)[:80]}")
                tensors[prefix + name], dicts[prefix + name] = tensor, prefix
        return cls(tensors, _usual_prefix(checkpoint), dicts)

    def shown(self, name: str) -> str:
        """A name or prefix without what goes without saying."""
        return name.removeprefix(self.usual)

    def shown_prefixes(self, prefixes: Iterable[str]) -> list[str]:
        """Prefixes as the user may name them, the shortest first."""
        full = list(prefixes)
        short = list(map(self.shown, full))
        return sorted(short if len({*short}) == len(full) else full, key=lambda each: (len(each), each))

    def prefixes(self, targets: Iterable[str]) -> dict[str, list[str]]:
        """Each prefix under which any of these names is stored, and the names that are."""
        wanted = set(targets)
        dots = sorted({name.count(".") for name in wanted})
        found: dict[str, list[str]] = defaultdict(list)
        for name in self.tensors:
            for count in dots:
                rest = name.rsplit(".", count + 1)[0] + "." if count < name.count(".") else ""
                if name[len(rest) :] in wanted:
                    found[rest].append(name[len(rest) :])
                if not rest:
                    break
        return found


def tensors_of(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, without the extra state that a module may keep there.

    Raises:
        ValueError: if two of them have one name.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(name, str | int) and isinstance(value, Tensor):
            if str(name) in tensors:
                raise InputError(f"two tensors are called {name}")
            tensors[str(name)] = value
    return tensors


def without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by what `clean_names` makes of their names."""
    return {clean: tensors[name] for name, clean in clean_names(tensors).items()}


def clean_names(names: Iterable[str]) -> dict[str, str]:
    """Each name, and the name without what DDP, FSDP and torch.compile put into it.

    Where two would become one they are two networks, and stay as they are.
    """
    clean = {name: _WRAPPER_SEGMENT.sub("", name) for name in names}
    if len(set(clean.values())) < len(clean):
        clean = {name: name for name in clean}
    # "module." may be an attribute of the user's own model: it is a wrapper only where every name has it
    while clean and all(name.startswith("module.") for name in clean.values()):
        clean = {name: short.removeprefix("module.") for name, short in clean.items()}
    return clean


def _dicts_in(checkpoint: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Each dict in a checkpoint with the names that lead to it, the usual ones first."""
    waiting, seen = [("", checkpoint, 0)], {id(checkpoint)}
    while waiting:
        prefix, found, depth = waiting.pop()
        yield prefix, found
        inner = [
            (f"{prefix}{key}.", value, depth + 1)
            for key, value in sorted(found.items(), key=lambda item: _usualness(item[0]))
            if isinstance(value, Mapping) and isinstance(key, str | int) and len(str(key)) <= LONGEST_KEY
        ]
        for each in inner if depth < DEEPEST else []:
            if id(each[1]) not in seen:
                seen.add(id(each[1]))
                waiting.append(each)


def _usualness(key: Any) -> int:
    """0 for the most usual key of a state dict, and more for others."""
    return NESTING_KEYS.index(key) if isinstance(key, str) and key in NESTING_KEYS else len(NESTING_KEYS)


def _usual_prefix(checkpoint: Mapping[Any, Any]) -> str:
    prefix, found = "", checkpoint
    # guard: state-dict-depth
    for _ in range(DEEPEST):
        nested = next((key for key in NESTING_KEYS if isinstance(found.get(key), Mapping)), None)
        if nested is None:
            break
        prefix, found = f"{prefix}{nested}.", found[nested]
    return prefix
