"""Several processes that train as one, as Lightning starts or finds them: how many, and which one this is.

They are started by Lightning itself (`--devices`), by torchrun, by SLURM's srun, or by hand with NODE_RANK,
MASTER_ADDR and MASTER_PORT on each machine. All that is ours is what they say to each other.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from attention_transfer._colours import print_safely
from attention_transfer._errors import InputError
from attention_transfer._extras import require
from attention_transfer._ranks import is_first_process
from attention_transfer._reading import shown
from attention_transfer.runs.recipe import PLACE, Concern, Recipe, fields_of, flag_of
from attention_transfer.runs.run import Interrupted
from attention_transfer.training.speed import device_of
from attention_transfer.training.telling import Say

GOODBYE = 3.0  # seconds for which another process may still say why it ends
PARTING = 20.0  # seconds in which this process ends in its own words after another one has died
DIFFERENCES = 5  # settings that an error lists


def only_first(say: Say) -> Say:
    """`say` on the first process, and silence on the others."""
    # guard: one-process-speaks
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
        raise InputError(
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
    _pulses: Pulses | None = None

    def wait(self) -> None:
        """Until all of them are here, however long they work, as long as they live.

        Raises:
            SilentError: if one has said nothing for long.
        """
        if self._pulses is not None:
            self._pulses.wait()

    def share_of(self, batch: int) -> int:
        """This process's images of a batch.

        Raises:
            ValueError: if the processes cannot share it equally, or have less than two images each.
        """
        if batch % self.size or batch < 2 * self.size:
            near = max(2, batch // self.size) * self.size
            raise InputError(
                f"train: expected a batch_size that {self.size} processes can share equally, two images each "
                f"at least, got {batch}. Pass --batch-size {near}, or other --devices."
            )
        return batch // self.size

    def plan(self, batch: int) -> str:
        """How a batch is shared, in a line."""
        return f"processes: {self.size}, each takes {self.share_of(batch)} of the {batch} images of a batch"


@contextmanager
def together(recipe: Recipe, facts: dict[str, Any], user: str) -> Iterator[Processes]:
    """Start the other processes, or find them, and work with them; one alone needs nothing.

    Args:
        recipe: where it takes place.
        facts: what all processes have to agree in, by name, besides the recipe's fields.
        user: whose errors these are.

    Raises:
        ValueError: as `layout`; or in all of them, if their settings or facts differ.
        ChildProcessError: if another process ends before this one, or says nothing for `wait_minutes`.
    """
    size = count(recipe)
    if size == 1:
        yield Processes()
        return
    names = fields_of(*set(Concern) - {PLACE})
    _at_work.set()
    try:
        with quiet():
            rank, size = _connect(recipe)
        store = torch.distributed.PrefixStore(
            f"attention_transfer/{next(_joined)}", torch.distributed.distributed_c10d._get_default_store()
        )
        pulses = Pulses(store, rank, size, 60 * recipe.wait_minutes)
        # guard: same-settings
        _compare(pulses.exchange({**{flag_of(name): getattr(recipe, name) for name in names}, **facts}), user)
        yield Processes(rank, size, pulses)
    except Interrupted:  # all of them have agreed to stop
        raise
    except Exception as error:
        what = _what_befell(error, size, recipe.wait_minutes) if is_about_others(error) else None
        _end_children()
        if what is None:
            raise
        raise ChildProcessError(
            f"{user}: {what}, so this one stops too. Look at the last lines of all of them, at the memory of "
            "their machines, and at the network."
        ) from error
    finally:
        _at_work.clear()


def _connect(recipe: Recipe) -> tuple[int, int]:
    """This process's rank, and how many there are, once all of them are connected."""
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy
    from lightning.fabric.strategies.launchers import subprocess_script

    # Lightning's own observer kills this process, before it can say why, when one that it started has died.
    # guard: process-left-alone
    subprocess_script._launch_process_observer = _watch  # type: ignore[assignment]
    devices, nodes = layout(recipe)
    strategy = DDPStrategy(timeout=timedelta(minutes=recipe.wait_minutes))
    fabric = Fabric(
        accelerator=recipe.accelerator, devices=devices or "auto", num_nodes=nodes, strategy=strategy
    )
    fabric.launch()
    return fabric.global_rank, fabric.world_size


def _compare(each: Sequence[dict[str, Any]], user: str) -> None:
    """Raise ValueError if the processes have not all been given the same."""
    names = [name for name in each[0] if any(other.get(name) != each[0][name] for other in each[1:])]
    if names:
        lines = []
        for name in names[:DIFFERENCES]:
            groups = {shown(facts.get(name)): rank for rank, facts in reversed([*enumerate(each)])}
            values = sorted((rank, value) for value, rank in groups.items())
            lines.append(f"{name} " + ", ".join(f"{value} in process {rank}" for rank, value in values))
        raise InputError(
            f"{user}: expected the same settings and images in all {len(each)} processes, got "
            f"{'; '.join(lines)}. Start all of them with one command, on the same files."
        )


def is_about_others(error: BaseException) -> bool:
    """Whether an error says that another process has gone, hangs or cannot be reached."""
    words = str(error)
    return isinstance(error, SilentError | torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and ("/gloo/" in words or "NCCL" in words or "ProcessGroup" in words)
    )


def _what_befell(error: BaseException, size: int, minutes: float) -> str:
    until = time.monotonic() + GOODBYE
    while _children and time.monotonic() < until and all(child.poll() is None for child in _children):
        time.sleep(0.05)  # who has just been killed is known to be dead a little later
    for rank, child in enumerate(_children, start=1):
        if child.returncode:
            return f"process {rank} of {size} {_end_of(child.returncode)}"
    if isinstance(error, SilentError) or re.search("time(d )?out", str(error), re.IGNORECASE):
        return f"another of {size} processes has said nothing for {minutes:g} minutes (--wait-minutes)"
    return f"another of {size} processes has ended, or cannot be reached"


def _end_of(status: int) -> str:
    if status > 0:
        return f"ended with exit status {status}"
    memory = ", as the system does where memory runs out" if status == -signal.SIGKILL else ""
    return f"was ended by signal {-status}{memory}"


_children: list[subprocess.Popen[bytes]] = []
"""The processes that Lightning started from this one."""

_at_work = threading.Event()
_joined = itertools.count()


def _watch(children: list[subprocess.Popen[bytes]]) -> None:
    """See to it that this process does not wait for ever for one of its children that has died."""
    _children[:] = children
    threading.Thread(target=_leave_after_a_death, daemon=True).start()


def _leave_after_a_death() -> None:
    while not any(child.poll() for child in _children):
        if all(child.poll() == 0 for child in _children):
            return
        time.sleep(0.5)
    time.sleep(PARTING)  # mostly the connection has told it by then, and it has ended in its own words
    if _at_work.is_set():
        rank, status = next((i, child.returncode) for i, child in enumerate(_children, 1) if child.poll())
        what = f"process {rank} of {len(_children) + 1} {_end_of(status)}, so this one stops too."
        print_safely(f"attention-transfer: {what}", stream=sys.stderr)
        _end_children()
        os._exit(2)


def _end_children() -> None:
    """Give the children a moment to say what they have to say, and leave none behind."""
    until = time.monotonic() + GOODBYE
    while any(child.poll() is None for child in _children) and time.monotonic() < until:
        time.sleep(0.05)
    for child in _children:
        child.kill()


class SilentError(RuntimeError):
    """Another process has said nothing for long."""


class Pulses:
    """What processes tell each other besides tensors: that they live, how far they are, what they were given.

    By a store that they share: the one through which they found each other.
    """

    def __init__(self, store: torch.distributed.Store, rank: int, size: int, patience: float) -> None:
        """`patience` is in seconds."""
        self.rank, self.size, self.patience = rank, size, patience
        self._store = store
        self._met = 0
        threading.Thread(target=self._beat, daemon=True).start()

    def exchange(self, facts: dict[str, Any]) -> list[dict[str, Any]]:
        """What each process says."""
        self._store.set(f"facts/{self.rank}", json.dumps(facts))
        self.wait()
        return [json.loads(self._store.get(f"facts/{rank}")) for rank in range(self.size)]

    def wait(self) -> None:
        """Until all are here.

        Raises:
            SilentError: if one that is not here has had no pulse for `patience`.
        """
        self._met += 1
        self._store.set(f"met/{self._met}/{self.rank}", "")
        last = {rank: (b"", time.monotonic()) for rank in range(self.size)}
        while away := [rank for rank in last if not self._store.check([f"met/{self._met}/{rank}"])]:
            for rank in away:
                there = self._store.check([f"pulse/{rank}"])
                pulse = self._store.get(f"pulse/{rank}") if there else b""
                if pulse != last[rank][0]:
                    last[rank] = pulse, time.monotonic()
                # guard: silent-process
                elif time.monotonic() - last[rank][1] > self.patience:
                    raise SilentError(f"process {rank} has no pulse")
            time.sleep(0.02)

    def _beat(self) -> None:
        for number in itertools.count():
            try:
                self._store.set(f"pulse/{self.rank}", str(number))
            except RuntimeError:  # the store has gone, as this process will see for itself
                return
            time.sleep(min(5.0, self.patience / 10))


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
