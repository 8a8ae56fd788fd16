"""The rule by which a run chooses its arithmetic, what it says of it, and compiled runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file

from attention_transfer import build_model
from attention_transfer.runs import Interrupted, Recipe
from attention_transfer.training import resume, speed, train
from attention_transfer.training.build import Teacher, build_distiller
from attention_transfer.training.callbacks import StopOnSignal
from attention_transfer.training.speed import choose_speed, computes_in_bfloat16, device_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning"),
    pytest.mark.usefixtures("one_thread"),
]

STUDENT_ALONE = Recipe(method="none", teacher=None)


@pytest.fixture(scope="module")
def base(image_folder: Path) -> Recipe:
    return Recipe(
        student="wrn-10-1",
        teacher="wrn-10-1",
        teacher_epochs=1,
        data=str(image_folder),
        validation=0.25,
        epochs=2,
        batch_size=10,
        accelerator="cpu",
        precision="32-true",
    )


def silent(line: str) -> None:
    pass


# The rule


@pytest.mark.parametrize(
    ("found", "fast"),
    [
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, False),
        ({"architecture": "aarch64", "neon": True}, False),
    ],
)
def test_cpus_that_compute_in_bfloat16(
    found: dict[str, object], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(found))
    assert computes_in_bfloat16("cpu") == fast
    assert not computes_in_bfloat16("mps")


@pytest.mark.parametrize(
    ("device", "fast", "said"),
    [
        ("cpu", True, "bf16-mixed (this CPU has bfloat16 arithmetic), channels-last, freed memory "),
        ("cpu", False, "32-true (this CPU has no known bfloat16 arithmetic), channels-last, freed memory "),
        ("cuda", True, "bf16-mixed (this GPU has bfloat16 arithmetic), channels-last, not compiled"),
        ("cuda", False, "32-true (this GPU has no known bfloat16 arithmetic), channels-last, not compiled"),
    ],
)
def test_the_rule_and_what_is_said_of_it(
    device: str, fast: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "computes_in_bfloat16", lambda device: fast)
    chosen = choose_speed(replace(STUDENT_ALONE, accelerator=device))
    assert str(chosen).startswith(f"speed: {said}")
    assert str(chosen).endswith(", not compiled")


def test_what_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "computes_in_bfloat16", lambda device: True)
    chosen = choose_speed(replace(STUDENT_ALONE, accelerator="cpu", precision="64-true"))
    assert chosen.precision == "64-true"
    assert str(chosen).startswith("speed: 64-true (as asked), channels-last")


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("auto", torch.float32), ("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)],
)
def test_the_teacher_computes_in_the_precision_asked_for(
    base: Recipe, precision: str, dtype: torch.dtype
) -> None:
    recipe = replace(base, teacher_precision=precision)
    student, teacher = (build_model("wrn-10-1", num_classes=3) for _ in range(2))
    images = torch.randn(2, 3, 16, 16)
    distiller = build_distiller(recipe, student, Teacher("wrn-10-1", teacher, 3, None), images)
    seen = distiller.observe(images, torch.tensor([0, 1]))
    assert (seen.student.logits.dtype, seen.teacher.logits.dtype) == (torch.float32, dtype)
    said = ", teacher bf16-mixed (as asked), channels-last"
    assert (said in str(choose_speed(recipe))) == (precision == "bf16-mixed")
    assert recipe.alone() == base.alone()


@pytest.mark.parametrize(
    ("cuda", "mps", "device"), [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_device_that_is_found(cuda: bool, mps: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert device_of(STUDENT_ALONE) == device
    assert device_of(replace(STUDENT_ALONE, accelerator="cpu")) == "cpu"


def test_a_run_says_what_it_chose_and_its_folder_keeps_it(
    base: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is resumed elsewhere goes on in the arithmetic that it began in."""
    monkeypatch.setattr(speed, "computes_in_bfloat16", lambda device: True)
    alone = replace(base, method="none", teacher=None)
    recipe = replace(alone, epochs=1, precision="auto", output=str(tmp_path / "run"))
    said: list[str] = []
    run = train(recipe, say=said.append)
    assert said[0].startswith("speed: bf16-mixed (this CPU has bfloat16 arithmetic)")
    assert run.recipe.precision == "bf16-mixed"
    monkeypatch.setattr(speed, "computes_in_bfloat16", lambda device: False)
    run.result_file.unlink()
    resume(run.folder, say=said.append)
    assert sum(line.startswith("speed: bf16-mixed (as asked)") for line in said) == 1


# Compiled runs


@pytest.mark.slow
def test_without_a_compiler_there_is_one_line(base: Recipe, tmp_path: Path) -> None:
    recipe = replace(base, method="none", compile=True, output=str(tmp_path / "run"))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "attention_transfer", "train", "--config", str(tmp_path / "recipe.yaml")]
    environment = os.environ | {"CXX": str(tmp_path / "no-compiler")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("attention-transfer: train: --compile needs PyTorch's compiler, which does")
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.unchecked
def test_compiled_run(base: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like the plain run to rounding, with the same names; and it resumes to the same bits."""
    torch._dynamo.reset()
    plain = train(replace(base, output=str(tmp_path / "plain")), say=silent)
    torch._dynamo.utils.counters.clear()
    recipe = replace(base, teacher=str(plain.teacher.folder), compile=True, output=str(tmp_path / "compiled"))
    compiled = train(recipe, say=silent)
    # student and teacher in training, the student in validation, the trial; no more for the smaller batches
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    assert load_file(compiled.student_weights).keys() == load_file(plain.student_weights).keys()
    for ours, theirs in zip(compiled.read_metrics(), plain.read_metrics(), strict=True):
        for column in ("train/loss", "train/ce", "train/at/group0", "train/at/group2", "val/loss"):
            assert float(ours[column]) == pytest.approx(float(theirs[column]), rel=1e-3), column
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(3, patch)
        train(replace(recipe, output=str(tmp_path / "resumed")), say=silent)
    resumed = load_file(resume(tmp_path / "resumed", say=silent).student_weights)
    weights = load_file(compiled.student_weights)
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    torch._dynamo.reset()


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a real SIGINT at the end of a step."""
    original = StopOnSignal.on_train_batch_end

    def hook(self: StopOnSignal, trainer, *rest) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step == step:
            signal.raise_signal(signal.SIGINT)
        original(self, trainer, *rest)

    monkeypatch.setattr(StopOnSignal, "on_train_batch_end", hook)
