"""Which factories, `package.module:name`, a file may name: those that the user named himself, and no others.

To build a factory is to import its module, which runs its code. A recipe, a run folder, a weights file or a
cache may come from anyone, and the module may be any that can be imported: a name in a file is no reason to.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from attention_transfer._errors import InputError
from attention_transfer._hints import did_you_mean

VARIABLE = "ATTENTION_TRANSFER_TRUST"
"""Factories that every file may name, with commas between them."""

FACTORY = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")
LIBRARIES = ("timm", "torchvision")  # what stands before the colon there is no module to import

_named: list[str] = []


def is_factory(name: object) -> bool:
    """Whether a model's name is a factory's."""
    found = FACTORY.fullmatch(name) if isinstance(name, str) else None
    return found is not None and found[1] not in LIBRARIES


def trusted() -> frozenset[str]:
    """The factories that files may name now."""
    listed = (name.strip() for name in os.environ.get(VARIABLE, "").split(","))
    return frozenset(_named) | {name for name in listed if name}


@contextmanager
def trusting(*names: str) -> Iterator[None]:
    """Inside, files may name these factories, such as "my_models:small_net", besides those of $VARIABLE.

    Raises:
        ValueError: if a name is not that of a factory.
    """
    for name in names:
        if not is_factory(name):
            raise InputError(
                f"trusting: expected the name of a factory, package.module:name, got {name!r:.80}. "
                "All other models may be named without."
            )
    before = list(_named)
    _named.extend(names)
    try:
        yield
    finally:
        _named[:] = before


def check_trusted(name: object, place: object) -> None:
    """Refuse a factory that a file names and the user does not.

    Args:
        place: the file.

    Raises:
        ValueError: with what to pass if the factory is his own.
    """
    if is_factory(name) and name not in trusted():
        module = str(name).partition(":")[0]
        raise InputError(
            f"trust: expected {place} to name no code, got the factory {name}, which would run the module "
            f"{module}. If that is yours, pass --trust {name} or set ${VARIABLE}; "
            "in Python, `with trusting(...)`."
        )


def load_factory(name: str, user: str) -> Callable[..., Any]:
    """The function or class "package.module:name", imported on behalf of `user`.

    Raises:
        ValueError: if there is none.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # a package that the user's module needs is another matter, and keeps its own message
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise InputError(
            f"{user}: expected an importable module before the colon of {name}, found no {error.name}. "
            "Install it, or put its folder on PYTHONPATH."
        ) from None
    factory = getattr(module, attribute, None)
    if not callable(factory):
        near = did_you_mean(attribute, [key for key, value in vars(module).items() if callable(value)])
        found = "nothing of that name" if factory is None else f"a {type(factory).__name__}"
        raise InputError(
            f"{user}: expected a function or class {attribute} in {module_name}, found {found}. "
            f"{near or 'Check the name after the colon.'}"
        )
    return factory
