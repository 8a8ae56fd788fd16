"""Where weights are: a file or a run folder; and which of the networks in a file, as FILE:PREFIX."""

from __future__ import annotations

import os
from pathlib import Path


def split_prefix(name: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """The path, and the prefix that a colon behind a file sets apart; None where there is none.

    A path that is there as it stands is nothing else, and only a file has networks to choose from: no folder
    of the name `timm` makes `timm:resnet18` a path.
    """
    path, (before, colon, prefix) = Path(name), os.fspath(name).rpartition(":")
    if colon and not path.exists() and Path(before).is_file():
        return Path(before), prefix
    return path, None
