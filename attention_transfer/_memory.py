"""Keeping freed memory for the next step, on Linux with glibc's malloc.

glibc gives large blocks back to the system at every free, so each step of a training on the CPU waits again
for pages that the system finds and zeroes, which can take longer than the arithmetic on them.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and values of glibc's malloc.h
SETTINGS = ("mmap_max", "mmap_threshold", "top_pad", "trim_threshold")  # by which a user governs the same

_now = "freed memory given back"


def freed_memory() -> str:
    """What this process does with freed memory, in words."""
    return _now


def keep_freed_memory() -> None:
    """Let malloc keep what is freed, in the whole process and from now on; `freed_memory` says how it went.

    The peak hardly changes, but between peaks the memory stays taken. It is the same as starting with
    MALLOC_MMAP_MAX_=0 and an endless MALLOC_TRIM_THRESHOLD_. Nothing is touched where the user has set these
    or their like, under another allocator (jemalloc, tcmalloc), or on a system without glibc.
    """
    global _now
    libc, setting = _glibc(), _setting_of_the_user()
    if libc is None:
        _now = "freed memory left to this system's allocator"
    elif setting is not None:
        _now = f"freed memory as {setting} says"
    elif libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1):  # -1: never
        _now = "freed memory kept"


def _glibc() -> Any:
    """The C library, if it is glibc and its malloc is the one in use; else None."""
    if sys.platform != "linux":
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    own = _address(ctypes.CDLL(None).malloc) == _address(libc.malloc)
    return libc if own and hasattr(libc, "mallopt") else None


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


def _setting_of_the_user() -> str | None:
    """The name of an environment variable that governs freed memory, if one is set."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if any(f"glibc.malloc.{name}=" in tunables for name in SETTINGS):
        return "GLIBC_TUNABLES"
    names = (f"MALLOC_{name.upper()}_" for name in SETTINGS)
    return next((name for name in names if name in os.environ), None)
