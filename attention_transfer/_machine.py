"""Where a number comes from: the device, and the commit of the code."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def device_name(device: torch.device) -> str:
    """The device, such as "CPU: AMD EPYC (AVX512)"."""
    if device.type == "cuda":
        return f"GPU: {torch.cuda.get_device_name(device)}"
    return f"CPU: {_cpu_model()} ({torch.backends.cpu.get_cpu_capability()})"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found[1].strip() if found else platform.machine()


def commit(*code: str) -> str:
    """The checkout's commit, with a + if the code, by default the package, differs from it.

    "unknown" outside of a checkout of this very package.
    """
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--", *(code or ("attention_transfer",))) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    """What git says of the checkout that this file is tracked in: a checkout around it is another project."""
    tracked = ["ls-files", "--error-unmatch", "attention_transfer/_machine.py"]
    for words in (tracked, arguments):
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()
