"""Optional packages: imported when first needed, with one clear line when they are missing."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from attention_transfer._errors import MissingPackageError


def require(package: str, *, extra: str, user: str, name: str | None = None) -> ModuleType:
    """Import `package`, which belongs to the optional dependency group `extra`, on behalf of `user`.

    `name` is what is installed, where it is not called like the package.

    Raises:
        ImportError: if the package is not installed; the message holds the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != package.split(".")[0]:
            raise
        raise _missing(name or package.split(".")[0], extra, user) from None


def check_installed(*packages: str, extra: str, user: str) -> None:
    """Make sure of packages that are needed later on, after hours perhaps, without importing them now.

    Raises:
        ImportError: as `require`.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise _missing(package, extra, user)


def _missing(package: str, extra: str, user: str) -> MissingPackageError:
    return MissingPackageError(
        f"{user}: needs the package {package}, which is not installed. "
        f'Run: pip install "attention-transfer[{extra}]"'
    )
