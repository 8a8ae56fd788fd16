"""Two processes on this machine against one: the same numbers, one log, one checkpoint, one cache.

The networks compute in float64, so what is left of a difference is that epoch means are summed in float32.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from attention_transfer._ranks import is_first_process
from attention_transfer.cache import Cache
from attention_transfer.data import Augment
from attention_transfer.distiller import Distiller
from attention_transfer.models import build_model, save_weights
from attention_transfer.runs import Recipe, Run
from attention_transfer.training import build_cache, train
from attention_transfer.training.build import has_unused_parameters, load_splits
from attention_transfer.training.fit import build_strategy
from attention_transfer.training.module import Totals
from attention_transfer.training.processes import (
    Processes,
    Pulses,
    SilentError,
    count,
    is_about_others,
    layout,
    local_device,
    only_first,
)
from attention_transfer.visualize.snapshots import FILE, Snapshots

pytestmark = [
    pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning"),
    pytest.mark.usefixtures("one_thread"),
]

TIMES = ("images_per_second", "seconds", "data_share")
TOLERANCE = 1e-6
LAUNCHED = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS")

COMMAND = [sys.executable, "-m", "attention_transfer"]
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"),
    "attention_transfer",
]

# A student with BatchNorm, and a layer that DDP waits for in vain unless it is told.
STUDENT = """
from torch import nn

class Student(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(in_channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 8, 3, 2, padding=1), nn.BatchNorm2d(8), nn.Softplus())
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.second(self.first(x)).mean((2, 3)))

def student(num_classes, in_channels=3):
    return Student(num_classes, in_channels)
"""


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of the test's own, with the student in it, in a process that no launcher started."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ATTENTION_TRANSFER_TRUST", "several_student:student")
    Path("several_student.py").write_text(STUDENT)
    yield
    sys.modules.pop("several_student", None)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    file = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_weights(build_model("wrn-10-1", num_classes=3), file)
    return file


@pytest.fixture
def recipe(image_folder: Path, weights: Path) -> Recipe:
    """37 images: the last of four batches holds 7, so that the shares are 4 and 3."""
    return Recipe(
        student="several_student:student",
        teacher="wrn-10-1",
        teacher_weights=str(weights),
        data=str(image_folder),
        validation=0.2,
        max_train=37,
        epochs=2,
        batch_size=10,
        pad=2,
        flip=True,
        accelerator="cpu",
        precision="64-true",
        method="at+kd+symmetry",
        pairs="first:group0,second:group1",
        beta="auto",
        lr=0.02,
        gradient_clip=1.0,
    )


def run_command(*words: object, launcher: list[str] = COMMAND) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*launcher, *map(str, words)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def numbers(run: Run) -> list[dict[str, float]]:
    return [
        {name: float(value) for name, value in row.items() if name not in TIMES} for row in run.read_metrics()
    ]


def same(one: Run, other: Run) -> None:
    """Equal numbers in every epoch, and equal weights."""
    assert len(numbers(one)) == len(numbers(other)) > 0
    for mine, theirs in zip(numbers(one), numbers(other), strict=True):
        assert theirs == pytest.approx(mine, rel=TOLERANCE, abs=1e-9)
    ours = load_file(other.student_weights)
    for name, value in load_file(one.student_weights).items():
        torch.testing.assert_close(ours[name], value, rtol=TOLERANCE, atol=1e-9)


def same_maps(one: Run, other: Run) -> None:
    """The maps that are kept for the report, in half precision."""
    mine, theirs = (Snapshots.read(run.folder / FILE) for run in (one, other))
    assert theirs.shows_images_of(mine) and theirs.epochs == mine.epochs == [0, 1, 2]
    for ours, others in zip(mine.maps + mine.teacher, theirs.maps + theirs.teacher, strict=True):
        torch.testing.assert_close(others, ours, rtol=0, atol=1e-3)


def checkpoints(run: Run) -> set[str]:
    return {str(path.relative_to(run.folder)) for path in run.folder.rglob("*.ckpt")}


def test_two_processes_train_as_one(recipe: Recipe) -> None:
    """Terms, error, the weight that is found, crops, flips and BatchNorm; one log and one checkpoint."""
    Path("recipe.yaml").write_text(recipe.to_yaml())
    words = ["train", "--config", "recipe.yaml", "--output", "two", "--devices", 2, "--sync-batchnorm"]
    said = run_command(*words).stdout
    two = Run(Path("two"))
    one = train(replace(recipe, output="one"), say=lambda line: None)
    same(one, two)
    same_maps(one, two)
    assert [line.split("  ")[0] for line in said.splitlines() if line.startswith("epoch ")] == [
        "epoch 1/2",
        "epoch 2/2",
    ]
    assert said.count("processes: 2, each takes 5 of the 10 images of a batch") == 1
    assert said.count("test error") == said.count("pair: student <- teacher") == 1
    assert checkpoints(two) == {f"checkpoints/{name}.ckpt" for name in ("last", "last.before", "best")}
    assert len(list(two.tensorboard.glob("events*"))) == 1
    saved = torch.load(two.last_checkpoint, weights_only=True)["state_dict"]
    assert saved.keys() == load_file(two.student_weights).keys()  # and nothing of the teacher


STOPPED = """
import signal, sys
from attention_transfer.cli import main
from attention_transfer.training import callbacks, processes

callbacks.AGREE_EVERY = 2
finish = callbacks.StopOnSignal.on_train_batch_end

def hook(self, trainer, *rest):
    if trainer.global_step == 6 and trainer.is_global_zero:
        signal.raise_signal(signal.SIGTERM)
    finish(self, trainer, *rest)

callbacks.StopOnSignal.on_train_batch_end = hook
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_both_and_is_saved_once(recipe: Recipe) -> None:
    Path("recipe.yaml").write_text(replace(recipe, epochs=500).to_yaml())
    words = ["train", "--config", "recipe.yaml", "--output", "run", "--devices", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    going = subprocess.Popen([*COMMAND, *words], start_new_session=True, **pipes)
    assert going.stdout is not None
    assert any(line.startswith("epoch 2/500") for line in going.stdout)
    os.killpg(going.pid, signal.SIGINT)
    _, said = going.communicate(timeout=120)
    assert going.returncode == 130, said
    lines = [line for line in said.splitlines() if line and not line.startswith("warning: ")]
    how = "attention-transfer train --resume run --trust several_student:student"
    assert lines == [f"Stopped; nothing is lost. Go on with: {how}"]
    step = torch.load(Run(Path("run")).last_checkpoint, weights_only=True)["global_step"]
    assert 8 <= step < 2000


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_stop_of_two_processes_is_saved_once_and_gone_on_with(recipe: Recipe, devices: int) -> None:
    """SIGTERM to the first of two; the rest by one process or by two; as if nothing had happened."""
    Path("recipe.yaml").write_text(replace(recipe, sync_batchnorm=True).to_yaml())
    Path("stopped.py").write_text(STOPPED)
    words = ["stopped.py", "train", "--config", "recipe.yaml", "--output", "run", "--devices", "2"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith("warning: ")]
    how = "attention-transfer train --resume run --trust several_student:student"
    assert lines == [f"Stopped; nothing is lost. Go on with: {how}"]
    run = Run(Path("run"))
    assert torch.load(run.last_checkpoint, weights_only=True)["global_step"] in (6, 7)
    assert len(run.read_metrics()) == 1
    assert checkpoints(run) == {f"checkpoints/{name}.ckpt" for name in ("last", "last.before", "best")}
    run_command("train", "--resume", "run", "--devices", devices)
    same(train(replace(recipe, output="whole"), say=lambda line: None), run)


def flags(recipe: Recipe) -> list[object]:
    return [
        *("cache", "build", "--data", recipe.data, "--accelerator", "cpu", "--precision", "32-true"),
        *("--teacher", "wrn-10-1", "--teacher-weights", recipe.teacher_weights, "--validation", "0.2"),
        *("--batch-size", 4, "--pad", 2),
    ]


def contents(folder: str | Path) -> dict[str, bytes]:
    """The records in each file; the entries of its header have no fixed order."""
    files = Path(folder).rglob("*.safetensors")
    return {str(path.relative_to(folder)): load_file(path)["records"].numpy().tobytes() for path in files}


def cached(recipe: Recipe, views: int, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """The cache that one process builds."""
    monkeypatch.setattr("attention_transfer.training.caching.SHARD_BYTES", SHARD)
    alone = replace(
        recipe, student="wrn-10-1", precision="32-true", method="at", pairs="auto", batch_size=4, views=views
    )
    return build_cache(replace(alone, max_train=None, flip=None, beta=1.0), "alone", say=lambda line: None)


SHARD = 8000  # bytes: a few images a file
BUILD = f"""
import sys
from attention_transfer.training import caching
caching.SHARD_BYTES = {SHARD}
from attention_transfer.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_two_processes_build_the_cache_of_one(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("build.py").write_text(BUILD)
    words = [*flags(recipe), "--views", 2, "-o", "cache", "--devices", 2]
    said = run_command(*words, launcher=[sys.executable, "build.py"]).stdout
    assert said.count("records to go") == said.count("train from it") == 1
    assert " on 2 processes" in said
    alone = cached(recipe, 2, monkeypatch)
    assert contents("cache") == contents("alone")
    Cache.read("cache").require(2)
    there = Cache.read("cache").manifest
    assert (there.identity, there.views) == (alone.manifest.identity, 2)
    assert "devices" not in there.settings  # it may be gone on with anywhere


def begun(*words: object, own: dict[str, str] | None = None) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*COMMAND, *map(str, words)], env={**os.environ, **(own or {})}, **pipes)


def child_of(process: subprocess.Popen[str]) -> int:
    """The process that Lightning started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ours = [pid for pid in children if b"attention_transfer" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    (child,) = map(int, ours)
    return child


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


GONE = "another of 2 processes has ended, or cannot be reached"
SILENT = "another of 2 processes has said nothing for 1 minutes (--wait-minutes)"
KILLED = "process 1 of 2 was ended by signal 9, as the system does where memory runs out"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the processes")
@pytest.mark.parametrize(
    ("which", "sent", "what"),
    [
        ("child", signal.SIGKILL, KILLED),
        pytest.param("parent", signal.SIGKILL, GONE, marks=pytest.mark.slow),
        pytest.param("child", signal.SIGSTOP, SILENT, marks=pytest.mark.slow),
        pytest.param("parent", signal.SIGSTOP, SILENT, marks=pytest.mark.slow),
    ],
)
def test_who_is_left_alone_says_so_and_ends(
    recipe: Recipe, which: str, sent: signal.Signals, what: str
) -> None:
    Path("recipe.yaml").write_text(
        replace(recipe, method="none", teacher=None, teacher_weights=None, epochs=10_000).to_yaml()
    )
    patience = 1 if what == SILENT else 5  # a busy machine takes a minute for the imports
    words = ["train", "--config", "recipe.yaml", "--output", "run", "--devices", 2]
    parent = begun(*words, "--wait-minutes", patience)
    wait_for(Run(Path("run")).last_checkpoint, parent)
    child = child_of(parent)
    os.kill(child if which == "child" else parent.pid, sent)
    if which == "parent":
        status = Path(f"/proc/{child}/stat")
        while status.exists() and ") Z" not in status.read_text():
            time.sleep(0.1)
        parent.kill()
    _, said = parent.communicate(timeout=200)
    *_, line = said.splitlines()
    place = "process 1: " if which == "parent" else ""
    assert line.startswith(f"attention-transfer: {place}train: {what}"), said
    assert "so this one stops too. Look at the last lines of all of them" in line and "Traceback" not in said
    if which == "child":
        assert parent.returncode == 2
        assert "Go on, once it is mended, with: attention-transfer train --resume run" in said
        assert not Path(f"/proc/{child}/exe").exists()  # none is left behind, stopped as it may be


def by_hand(rank: int, port: int, *words: object) -> subprocess.Popen[str]:
    """One of two machines."""
    own = {"NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return begun(*words, "--devices", 1, "--nodes", 2, own=own)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_processes_with_other_settings_are_refused_in_all_of_them(recipe: Recipe) -> None:
    Path("recipe.yaml").write_text(recipe.to_yaml())
    words, port = ["train", "--config", "recipe.yaml", "--output", "run"], free_port()
    more = [["--epochs", 2, "--lr", 0.02], ["--epochs", 3, "--lr", 0.1, "--max-train", 36]]
    machines = [by_hand(rank, port, *words, *flags) for rank, flags in enumerate(more)]
    both = [machine.communicate(timeout=200)[1] for machine in machines]
    for rank, (machine, said) in enumerate(zip(machines, both, strict=True)):
        (line,) = said.splitlines()
        assert machine.returncode == 2
        place = "process 0 of machine 1: " if rank else ""
        assert line == (
            f"attention-transfer: {place}train: expected the same settings and images in all 2 processes, "
            "got --max-train 37 in process 0, 36 in process 1; --epochs 2 in process 0, 3 in process 1; "
            "--lr 0.02 in process 0, 0.1 in process 1; training images 37 in process 0, 36 in process 1. "
            "Start all of them with one command, on the same files."
        )


@pytest.mark.slow
def test_a_process_that_nobody_joins_gives_up(recipe: Recipe) -> None:
    Path("recipe.yaml").write_text(recipe.to_yaml())
    words = ["train", "--config", "recipe.yaml", "--output", "run", "--wait-minutes", 0.05]
    machine = by_hand(0, free_port(), *words)
    _, said = machine.communicate(timeout=200)
    (line,) = said.splitlines()
    assert machine.returncode == 2
    assert line.startswith(
        "attention-transfer: train: another of 2 processes has said nothing for 0.05 minutes (--wait-"
    )


# Slow: torchrun starts each process by itself


@pytest.mark.slow
def test_torchrun_trains_as_one_process(recipe: Recipe) -> None:
    Path("recipe.yaml").write_text(recipe.to_yaml())
    words = ["train", "--config", "recipe.yaml", "--output", "two", "--sync-batchnorm"]
    said = run_command(*words, launcher=TORCHRUN).stdout
    assert said.count("processes: 2, each takes 5 of the 10 images of a batch") == 1
    assert said.count("test error") == 1
    same(train(replace(recipe, output="one"), say=lambda line: None), Run(Path("two")))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "by hand"])
def test_two_machines_train_as_one_process(recipe: Recipe, launcher: str) -> None:
    """Two on this one: each is started by itself, and finds the other by an address and a port."""
    Path("recipe.yaml").write_text(recipe.to_yaml())
    words = ["train", "--config", "recipe.yaml", "--output", "two", "--sync-batchnorm"]
    port, machines = str(free_port()), []
    for rank in ("0", "1"):
        own = {"NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [*COMMAND, *words, "--devices", "1", "--nodes", "2"]
        if launcher == "torchrun":
            place = [f"--node-rank={rank}", "--master-addr=127.0.0.1", f"--master-port={port}"]
            run = [*TORCHRUN[:3], "--nnodes=2", "--nproc-per-node=1", *place, "-m", "attention_transfer"]
            own, command = {}, [*run, *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        machines.append(subprocess.Popen(command, env={**os.environ, **own}, **pipes))
    said = [machine.communicate(timeout=300) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert [out.count("test error") for out, _ in said] == [1, 0]
    same(train(replace(recipe, output="one"), say=lambda line: None), Run(Path("two")))


@pytest.mark.slow
def test_a_teacher_that_is_trained_first_and_batchnorm_of_each_share(recipe: Recipe) -> None:
    """Both trainings by the same two processes, which start once."""
    both = replace(
        recipe,
        teacher="several_student:student",
        teacher_weights=None,
        pairs="first,second",
        teacher_epochs=1,
    )
    Path("recipe.yaml").write_text(replace(both, method="at", beta=1.0).to_yaml())
    said = run_command("train", "--config", "recipe.yaml", "--output", "two", "--devices", 2).stdout
    assert said.count("First the teacher") == said.count("Now the student") == 1
    assert Run(Path("two/teacher")).finished and Run(Path("two")).finished


@pytest.mark.slow
def test_a_killed_build_of_two_processes_goes_on(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL to both while they write; gone on with by torchrun, it is the cache of one."""
    Path("build.py").write_text(BUILD)
    words = [*map(str, flags(recipe)), "--views", "12", "-o", "cache", "--devices", "2"]
    process = subprocess.Popen(
        [sys.executable, "build.py", *words], stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(contents_there()) < 12:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    faults = {fault for _, fault in Cache.read("cache").faults(deep=True)}
    assert faults == {None, "is missing"}
    before = contents("cache")
    run_command("cache", "build", "--resume", "cache", launcher=TORCHRUN)
    assert before.items() < contents("cache").items()
    cached(recipe, 12, monkeypatch)
    assert contents("cache") == contents("alone")


def contents_there() -> list[Path]:
    return list(Path("cache").rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.unchecked
def test_compiled_students_train_as_one(recipe: Recipe) -> None:
    """To 1e-5: compiled code orders its sums otherwise."""
    Path("recipe.yaml").write_text(
        replace(recipe, method="at+kd", compile=True, max_train=20, epochs=1, sync_batchnorm=True).to_yaml()
    )
    run_command("train", "--config", "recipe.yaml", "--output", "two", "--devices", 2)
    eager = replace(recipe, method="at+kd", max_train=20, epochs=1, output="one")
    one, two = train(eager, say=lambda line: None), Run(Path("two"))
    assert numbers(two)[0] == pytest.approx(numbers(one)[0], rel=1e-5, abs=1e-7)


# Without any other process


def test_who_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_first_process()
    for variables, first in (
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),  # torchrun, on the second machine
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"NODE_RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"SLURM_PROCID": "3"}, False),
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert is_first_process() is first, variables
            lines: list[str] = []
            only_first(lines.append)("said")
            assert bool(lines) is first


def test_the_launcher_says_how_many(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    assert layout(recipe) == (None, 1) and count(recipe) == 1
    assert layout(replace(recipe, devices=3, nodes=2)) == (3, 2)
    with monkeypatch.context() as patch:
        for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
            patch.setenv(name, value)
        assert layout(recipe) == (4, 2) and count(recipe) == 8
        assert layout(replace(recipe, devices=4, nodes=2)) == (4, 2)
        with pytest.raises(
            ValueError, match=r"expected --devices 4 --nodes 2, as torchrun started, got devi"
        ):
            layout(replace(recipe, devices=2))
    for name, value in {"SLURM_NTASKS": "6", "SLURM_NNODES": "3", "SLURM_JOB_NAME": "at"}.items():
        monkeypatch.setenv(name, value)
    assert layout(recipe) == (2, 3)
    with pytest.raises(ValueError, match=r"as SLURM started, got devices=None and nodes=2\. Leave both out"):
        layout(replace(recipe, nodes=2))


def test_a_device_for_each_process(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = replace(recipe, accelerator="cuda")
    assert local_device(gpu) == torch.device("cuda", 0)
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert local_device(gpu) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert local_device(gpu) == torch.device("cuda", 2)
    assert local_device(recipe) == torch.device("cpu")


def test_who_lives_is_waited_for_and_who_is_silent_is_not() -> None:
    store = torch.distributed.HashStore()
    one, other = (Pulses(store, rank, 2, patience=0.3) for rank in range(2))
    late = threading.Timer(1.0, other.wait)  # far longer than the patience, and with a pulse
    late.start()
    one.wait()
    late.join()
    third = Pulses(torch.distributed.PrefixStore("alone", store), 0, 2, patience=0.3)
    started = time.monotonic()
    with pytest.raises(SilentError, match="process 1 has no pulse"):
        third.wait()
    assert 0.3 <= time.monotonic() - started < 3


@pytest.mark.parametrize("error", [RuntimeError("no gloom here"), ValueError("/gloo/"), OSError("gone")])
def test_other_errors_are_not_about_other_processes(error: Exception) -> None:
    assert not is_about_others(error)
    assert is_about_others(RuntimeError("[/pytorch/third_party/gloo/gloo/pair.cc:545] Read error"))
    assert is_about_others(torch.distributed.DistStoreError("Timed out after 5 seconds"))


@pytest.mark.parametrize(("size", "batch", "near"), [(2, 127, 126), (4, 6, 8), (8, 100, 96)])
def test_batches_that_cannot_be_shared(size: int, batch: int, near: int) -> None:
    with pytest.raises(
        ValueError, match=rf"{size} processes can share equally.*Pass --batch-size {near}, or"
    ):
        Processes(size=size).share_of(batch)
    assert Processes(size=size).share_of(near) * size == near


def test_no_process_is_started_for_a_batch_that_cannot_be_shared(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="2 processes can share equally"):
        train(replace(recipe, batch_size=9, devices=2, output="run"), say=lambda line: None)
    assert not Path("run").exists()


def test_a_wrong_strategy_lists_the_known() -> None:
    with pytest.raises(
        ValueError, match=r'expected strategy to be "auto" or "ddp" or "ddp_find_unused_p.* got'
    ):
        Recipe(strategy="dpp")  # type: ignore[arg-type]


def test_the_strategy_heeds_unused_parameters(recipe: Recipe) -> None:
    splits = load_splits(recipe)
    import several_student

    student = several_student.student(3)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    assert has_unused_parameters(student, torch.randn(2, 3, 8, 8))
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    strategy = build_strategy(recipe, Distiller(student, None), splits, Processes(size=2))
    assert strategy._ddp_kwargs == {"find_unused_parameters": True}  # type: ignore[union-attr]
    student.unused.requires_grad_(False)
    assert not has_unused_parameters(student, torch.randn(2, 3, 8, 8))
    named = replace(recipe, strategy="ddp")
    assert build_strategy(named, Distiller(student, None), splits, Processes(size=2)) == "ddp"
    assert build_strategy(recipe, Distiller(student, None), splits, Processes()) == "auto"


def test_totals_are_kept_for_all_and_taken_up_once() -> None:
    """Two processes that have seen the same; whoever goes on has the sums of both."""
    totals = Totals()
    totals.add({"loss": torch.tensor(3.0)}, 4)
    kept = totals.state_dict(lambda tensor, reduce_op: 2 * tensor)
    assert (kept["sums"], kept["count"]) == ({"loss": torch.tensor(24.0)}, 8)
    parts = [Totals(), Totals()]
    for number, part in enumerate(parts):
        part.load_state_dict(kept, first=number == 0)
    assert parts[0].means() == {"loss": 3.0} and (parts[1].count, parts[1].sums) == (0, {"loss": 0})


def test_shared_batchnorm_refuses_layers_that_it_does_not_know() -> None:
    from attention_transfer.training.batchnorm import SharedBatchNorm

    class Scaled(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    with pytest.raises(
        ValueError, match=r"train: --sync-batchnorm knows BatchNorm .* got Scaled at 0\. Leave"
    ):
        SharedBatchNorm().apply(nn.Sequential(Scaled(3)))


def timm_layer() -> nn.Module:
    from timm.layers import BatchNormAct2d

    return BatchNormAct2d(3)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.BatchNorm2d(3),
        lambda: nn.BatchNorm2d(3, affine=False, momentum=None),
        lambda: nn.BatchNorm2d(3, track_running_stats=False),
        timm_layer,
    ],
    ids=["plain", "bare", "untracked", "timm"],
)
def test_shared_batchnorm_of_one_process_is_batchnorm(layer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Values, statistics, first and second derivatives; and it is as it was afterwards."""
    from attention_transfer.training.batchnorm import SharedBatchNorm

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        one, other = (layer().double() for _ in range(2))
        x = 5 + torch.randn(4, 3, 5, 2, dtype=torch.float64)
        shared = SharedBatchNorm().apply(other)
        results = [differentiated(each, x.clone()) for each in (one, shared)]
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(theirs, mine, rtol=1e-10, atol=1e-12)
        for mine, theirs in zip(one.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(theirs, mine, rtol=1e-12, atol=1e-14)
        assert "forward" in vars(other)
        SharedBatchNorm().revert(other)
        assert "forward" not in vars(other)
        torch.testing.assert_close(one.eval()(x), shared.eval()(x))
    finally:
        torch.distributed.destroy_process_group()


def differentiated(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x.requires_grad_()
    y = layer(x)
    (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), x)
    return [y, first, second]


def test_crops_and_flips_do_not_depend_on_how_a_batch_is_shared() -> None:
    augment = Augment([0.5] * 3, [0.2] * 3, pad=3)
    images = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8)
    whole = augment(images, torch.Generator().manual_seed(1))
    for rank in range(3):
        share = slice(rank, None, 3)
        ours = augment(images[share], torch.Generator().manual_seed(1), whole=7, share=share)
        assert torch.equal(ours, whole[share])
