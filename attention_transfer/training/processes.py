"""Several processes that train as one, as Lightning starts or finds them: how many, and which one this is.

They are started by Lightning itself (`--devices`), by torchrun, by SLURM's srun, or by hand with NODE_RANK,
MASTER_ADDR and MASTER_PORT on each machine. All that is ours is what they say to each other.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from attention_transfer._extras import require
from attention_transfer._ranks import is_first_process
from attention_transfer.training.recipe import Recipe
from attention_transfer.training.speed import device_of
from attention_transfer.training.telling import Say


def only_first(say: Say) -> Say:
    """`say` on the first process, and silence on the others."""
    return say if is_first_process() else lambda line: None


def layout(recipe: Recipe) -> tuple[int | None, int]:
    """(processes a machine, machines): the launcher's where one started this process, else the recipe's.

    None stands for all GPUs of the machine, or one process on a CPU.

    Raises:
        ValueError: if the recipe asks for other numbers than the launcher started.
    """
    require("lightning", extra="train", user="train")
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        whole, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        return _agreed(recipe, "torchrun", here, whole // here)
    if "SLURM_NTASKS" in os.environ and SLURMEnvironment.detect():
        tasks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", "1"))
        return _agreed(recipe, "SLURM", tasks // nodes, nodes)
    return recipe.devices, recipe.nodes


def _agreed(recipe: Recipe, launcher: str, devices: int, nodes: int) -> tuple[int, int]:
    if recipe.devices not in (None, devices) or recipe.nodes not in (1, nodes):
        raise ValueError(
            f"train: expected --devices {devices} --nodes {nodes}, as {launcher} started, got "
            f"devices={recipe.devices} and nodes={recipe.nodes}. Leave both out: {launcher} says them."
        )
    return devices, nodes


def count(recipe: Recipe) -> int:
    """How many processes a run of this recipe has."""
    devices, nodes = layout(recipe)
    if devices is None:
        devices = torch.cuda.device_count() if device_of(recipe) == "cuda" else 1
    return devices * nodes


def local_device(recipe: Recipe) -> torch.device:
    """The device of this process."""
    kind = device_of(recipe)
    if kind != "cuda":
        return torch.device(kind)
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))))


@dataclass(frozen=True)
class Processes:
    """This process among those that work together."""

    rank: int = 0
    size: int = 1
    _fabric: Any = None

    def wait(self) -> None:
        """Until all of them are here."""
        if self._fabric is not None:
            self._fabric.barrier()

    def share_of(self, batch: int) -> int:
        """This process's images of a batch.

        Raises:
            ValueError: if the processes cannot share it equally, or have less than two images each.
        """
        if batch % self.size or batch < 2 * self.size:
            near = max(2, batch // self.size) * self.size
            raise ValueError(
                f"train: expected a batch_size that {self.size} processes can share equally, two images each "
                f"at least, got {batch}. Pass --batch-size {near}, or other --devices."
            )
        return batch // self.size

    def plan(self, batch: int) -> str:
        """How a batch is shared, in a line."""
        return f"processes: {self.size}, each takes {self.share_of(batch)} of the {batch} images of a batch"


def join(recipe: Recipe) -> Processes:
    """Start the other processes, or find them, and wait until all are connected; one alone needs nothing.

    Raises:
        ValueError: as `layout`.
    """
    size = count(recipe)
    if size == 1:
        return Processes()
    from lightning.fabric import Fabric

    devices, nodes = layout(recipe)
    fabric = Fabric(
        accelerator=recipe.accelerator, devices=devices or "auto", num_nodes=nodes, strategy="ddp"
    )
    fabric.launch()
    return Processes(fabric.global_rank, fabric.world_size, fabric)


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning without its tips and its advice on data loaders; its errors stay."""
    from lightning.fabric.utilities.warnings import PossibleUserWarning

    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=PossibleUserWarning)
        warnings.filterwarnings("ignore", module=r"lightning\.")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
