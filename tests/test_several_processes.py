"""Two processes on this machine against one: the same numbers, one log, one checkpoint, one cache.

The networks compute in float64, so what is left of a difference is that epoch means are summed in float32.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from attention_transfer.cache import Cache
from attention_transfer.models import build_model, save_weights
from attention_transfer.training import Recipe, Run, build_cache, resume, train

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


def checkpoints(run: Run) -> set[str]:
    return {str(path.relative_to(run.folder)) for path in run.folder.rglob("*.ckpt")}


def test_two_processes_train_as_one(recipe: Recipe) -> None:
    """Every term, the error, the weight found, crops and flips, BatchNorm; one log, one checkpoint."""
    Path("recipe.yaml").write_text(recipe.to_yaml())
    words = ["train", "--config", "recipe.yaml", "--output", "two", "--devices", 2, "--sync-batchnorm"]
    said = run_command(*words).stdout
    two = Run(Path("two"))
    same(train(replace(recipe, output="one"), say=lambda line: None), two)
    assert [line.split("  ")[0] for line in said.splitlines() if line.startswith("epoch ")] == [
        "epoch 1/2",
        "epoch 2/2",
    ]
    assert said.count("processes: 2, each takes 5 of the 10 images of a batch") == 1
    assert said.count("test error") == said.count("pair: student <- teacher") == 1
    assert checkpoints(two) == {"checkpoints/last.ckpt", "checkpoints/best.ckpt"}
    assert len(list(two.tensorboard.glob("events*"))) == 1
    saved = torch.load(two.last_checkpoint, weights_only=True)["state_dict"]
    assert saved.keys() == load_file(two.student_weights).keys()  # and nothing of the teacher


STOPPED = """
import signal, sys
from attention_transfer.cli import main
from attention_transfer.training import callbacks, processes

callbacks.STOP_CHECK_EVERY = 2
finish = callbacks.StopOnSignal.on_train_batch_end

def hook(self, trainer, *rest):
    if trainer.global_step == 6 and trainer.is_global_zero:
        signal.raise_signal(signal.SIGTERM)
    finish(self, trainer, *rest)

callbacks.StopOnSignal.on_train_batch_end = hook
sys.exit(main(sys.argv[1:]))
"""


def test_a_stop_of_two_processes_is_saved_once_and_gone_on_with(recipe: Recipe) -> None:
    """SIGTERM to the first of two; the rest of the run by one process; as if nothing had happened."""
    Path("recipe.yaml").write_text(replace(recipe, sync_batchnorm=True).to_yaml())
    Path("stopped.py").write_text(STOPPED)
    words = ["stopped.py", "train", "--config", "recipe.yaml", "--output", "run", "--devices", "2"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith("warning: ")]
    assert lines == ["Stopped; nothing is lost. Go on with: attention-transfer train --resume run"]
    run = Run(Path("run"))
    assert torch.load(run.last_checkpoint, weights_only=True)["global_step"] in (6, 7)
    assert len(run.read_metrics()) == 1
    assert checkpoints(run) == {"checkpoints/last.ckpt", "checkpoints/best.ckpt"}
    resumed = resume(run.folder, say=lambda line: None, devices=1)
    same(train(replace(recipe, output="whole"), say=lambda line: None), resumed)


def flags(recipe: Recipe) -> list[object]:
    return [
        *("cache", "build", "--data", recipe.data, "--accelerator", "cpu", "--precision", "32-true"),
        *("--teacher", "wrn-10-1", "--teacher-weights", recipe.teacher_weights, "--validation", "0.2"),
        *("--batch-size", 4, "--pad", 2),
    ]


def contents(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*.safetensors")}


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
    there = Cache.read("cache").manifest
    assert (there.identity, there.settings, there.views) == (
        alone.manifest.identity,
        there.settings,
        alone.manifest.views,
    )
    assert "devices" not in there.settings  # it may be gone on with anywhere
