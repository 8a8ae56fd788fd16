"""Which of several processes this one is; whoever started them says so in the environment."""

from __future__ import annotations

import os


def is_first_process() -> bool:
    """Whether this process is the one of several that writes and prints."""
    if "RANK" in os.environ:  # torchrun
        return os.environ["RANK"] == "0"
    if "LOCAL_RANK" in os.environ or "NODE_RANK" in os.environ:  # Lightning's own launcher
        return all(os.environ.get(name, "0") == "0" for name in ("NODE_RANK", "LOCAL_RANK"))
    return os.environ.get("SLURM_PROCID", "0") == "0"


def process_name() -> str:
    """This process as a message names it, such as "process 1"; empty for the first."""
    if is_first_process():
        return ""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    rank = next((os.environ[name] for name in names if name in os.environ), "0")
    node = "" if "RANK" in os.environ else os.environ.get("NODE_RANK", "0")
    return f"process {rank}" + (f" of machine {node}" if node not in ("", "0") else "")
