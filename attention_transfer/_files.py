"""Writing files so that a full disk or a kill never leaves half of one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_atomically(path: Path, data: bytes | memoryview | str, *, keep: Path | None = None) -> None:
    """Write beside `path`, then rename: at every moment `path` is the old file or the new one, whole.

    With `keep` the old file is renamed to that first: for the moment between the two, there is only that.

    Raises:
        OSError: if it cannot be written; the old file is intact.
    """
    if path.exists() and not path.is_file():
        raise OSError("there is something there that is not a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        temporary.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:  # a full disk is said without a name
            error.filename = str(path)
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
