"""`evaluate --latency`: counts that can be done by hand, and a table of student, teacher and their ratio."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from attention_transfer.cli import main
from attention_transfer.runs import Recipe, Run
from attention_transfer.training import train
from attention_transfer.training.latency import ROUNDS, WARM_UP, size_of, time_batches

pytestmark = [
    pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning"),
    pytest.mark.usefixtures("one_thread"),
]


def test_size_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(128, 5),
    ).eval()
    size = size_of(model, torch.randn(1, 3, 8, 8))
    assert size.parameters == 8 * 3 * 9 + 2 * 8 + 128 * 5 + 5
    assert size.bytes == 4 * size.parameters + 4 * 2 * 8 + 8  # running mean and variance, and the counter
    assert size.flops == 2 * (8 * 16 * 3 * 9 + 128 * 5)


def test_attention_is_counted_though_frozen_and_without_gradient() -> None:
    """Fused attention would hide its products from the counter."""
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True).eval()
    layer.requires_grad_(False)
    model = nn.Sequential(nn.Flatten(2), layer)  # (1, 3, 2, 4) -> three tokens of 8
    projections, scores, feed_forward = 3 * 8 * 24 + 3 * 8 * 8, 2 * 3 * 3 * 8, 2 * 3 * 8 * 16
    with torch.no_grad():
        assert size_of(model, torch.randn(1, 3, 2, 4)).flops == 2 * (projections + scores + feed_forward)


class Napper(nn.Module):
    """Takes so many seconds a call, the first time more, and notes when it was called."""

    def __init__(self, name: str, seconds: float, calls: list[str]) -> None:
        super().__init__()
        self.name, self.seconds, self.calls = name, seconds, calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert torch.is_inference_mode_enabled()
        time.sleep(self.seconds if self.name in self.calls else 0.2)
        self.calls.append(self.name)
        return x


def test_networks_take_turns_and_warm_up_first() -> None:
    calls: list[str] = []
    batch = torch.zeros(1)
    networks = {name: (Napper(name, seconds, calls), batch) for name, seconds in (("a", 0.001), ("b", 0.02))}
    found = time_batches(networks, seconds=0, rounds=(2, 9))
    assert "".join(calls) == "abbaabbaab"  # three to warm up, and no more than must be
    assert len(calls) == 2 * (WARM_UP + 2)
    assert found["a"].rounds == found["b"].rounds == 2
    assert 0.001 <= found["a"].seconds < 0.02 <= found["b"].seconds < 0.2
    assert len(time_batches({"a": networks["a"]}, seconds=60, rounds=(1, 4))) == 1
    assert calls.count("a") == WARM_UP + 2 + WARM_UP + 4
    assert ROUNDS[0] >= 3


@pytest.fixture(scope="module")
def taught(tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "taught"
    recipe = replace(tiny, method="at", teacher="wrn-10-2", validation=0.0, max_train=20, output=str(folder))
    return train(recipe, say=lambda _: None)


@pytest.fixture
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    from attention_transfer.cli import comparing

    monkeypatch.setattr(comparing, "time_batches", partial(time_batches, seconds=0, rounds=(1, 1)))


def table(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["evaluate", *(str(argument) for argument in arguments), "--latency"]) == 0
    return capsys.readouterr().out


def spoil(run: Run, value: float) -> None:
    """Give a run's weights a bias that makes the logits of every image NaN or infinite."""
    from attention_transfer.models import save_weights
    from attention_transfer.training.card import ModelCard

    card = ModelCard.read(run.folder)
    assert card is not None
    model = card.build(run.folder)
    with torch.no_grad():
        [*model.parameters()][-1][0] = value
    save_weights(model, run.student_weights, card.as_metadata())


def cells(text: str, label: str) -> list[str]:
    (row,) = re.findall(rf"^{re.escape(label)}  +(.+)$", text, re.MULTILINE)
    return re.split(r"  +", row)


@pytest.mark.usefixtures("_few_rounds")
def test_student_beside_its_teacher(taught: Run, capsys: pytest.CaptureFixture[str]) -> None:
    text = table(capsys, taught.folder)
    student, teacher = taught.result, taught.teacher.result
    assert "its teacher: wrn-10-2" in text
    own, others = student["test_error"], teacher["test_error"]
    assert cells(text, "test error, top-1 %") == [
        f"{own:.2f}",
        f"{others:.2f}",
        f"{own - others:+.2f} points",
    ]
    ratio = student["parameters"] / teacher["parameters"]
    counts = [f"{each['parameters']:,}" for each in (student, teacher)]
    assert cells(text, "parameters") == [*counts, f"{ratio:.2f}"]
    for batch in (1, 128):
        for label in (f"ms a batch of {batch}", f"images/s, batch {batch}"):
            left, right, quotient = (float(cell.replace(",", "")) for cell in cells(text, label))
            assert quotient == pytest.approx(left / right, abs=0.1, rel=0.1)
    assert re.search(r"^.+, 1 threads, torch \S+, commit \S+$", text, re.MULTILINE)


@pytest.mark.usefixtures("_few_rounds")
def test_a_student_without_a_teacher_at_hand(
    taught: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = table(capsys, taught.teacher.folder)
    assert "no teacher beside it" in text
    assert len(cells(text, "parameters")) == 1
    assert "no teacher beside it" in table(capsys, taught.student_weights, "--data", taught.recipe.data)
    run = Run(tmp_path / "run")
    shutil.copytree(taught.folder, run.folder)
    shutil.rmtree(run.teacher.folder)
    text = table(capsys, run.folder)
    assert "its teacher is not at hand: " in text
    assert len(cells(text, "parameters")) == 1


def test_a_teacher_without_finite_logits_is_not_compared(
    taught: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(taught.folder, run.folder)
    spoil(run.teacher, float("-inf"))
    assert main(["evaluate", str(run.folder), "--latency"]) == 2
    assert "expected finite logits from its teacher, got NaN or infinite ones" in capsys.readouterr().err


@pytest.mark.usefixtures("_few_rounds")
def test_a_teacher_of_other_classes_has_no_errors_here(
    taught: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from attention_transfer.models import build_model, save_weights

    save_weights(build_model("wrn-10-2", num_classes=7), tmp_path / "teacher.safetensors")
    run = Run(tmp_path / "run")
    shutil.copytree(taught.folder, run.folder)
    weights = {"teacher_weights": str(tmp_path / "teacher.safetensors"), "teacher_classes": 7}
    run.recipe_file.write_text(replace(taught.recipe, **weights).to_yaml())
    text = table(capsys, run.folder)
    assert cells(text, "test error, top-1 %")[1:] == ["-", "-"]
    assert len(cells(text, "parameters")) == 3
