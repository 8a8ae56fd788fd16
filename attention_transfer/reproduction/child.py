"""`python -m attention_transfer.reproduction.child PARENT ARGUMENTS`: the command, stopped when PARENT dies.

A parent that is killed can stop nobody. Linux can do it for him, from within the child alone: asked here,
before the command takes this process over. Elsewhere the child goes on, and its lock says so.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # he died before
            sys.exit(128 + signal.SIGTERM)
    os.execv(sys.executable, [sys.executable, "-m", "attention_transfer", *arguments])


if __name__ == "__main__":
    main()
