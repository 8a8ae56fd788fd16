"""One trainer a folder: a lock that lives exactly as long as the process that writes there."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def lock(path: Path) -> int | None:
    """A file descriptor that holds the lock, None if another process does.

    A child that inherits it holds the lock too, beyond the death of its parent and until its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # no such locks on Windows
        return descriptor
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def trained_by_hand(folder: Path) -> bool:
    """Whether a process whose command line names the folder runs, where /proc tells."""
    if sys.platform != "linux":
        return False
    wanted = str(folder.absolute()).encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has just ended, or is none of ours
            continue
        if process.name != str(os.getpid()) and wanted in words:
            return True
    return False
