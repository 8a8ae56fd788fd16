"""Fine-tuning transfer as its users run it: pretrained weights, a fine-tuned teacher, class folders."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from attention_transfer.cli import main
from attention_transfer.data import Images, Splits, load_data
from attention_transfer.models import build_model, fingerprint, load_weights, save_weights
from attention_transfer.runs import Recipe, Run
from attention_transfer.training.build import build_student

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "fine_tuning"
FAST = ["--accelerator", "cpu", "--precision", "32-true", "--validation", "0", "--batch-size", "32"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning"),
    pytest.mark.usefixtures("one_thread"),
]


def write_digits(root: Path, digits: range, count: int) -> Path:
    """So many mnist-5k digits of each class, halved to 14 pixels, as a folder of class folders of PNGs."""
    found = load_data("mnist-5k", validation=0.0, image_size=14).train
    assert isinstance(found, Images)
    for digit in digits:
        (root / str(digit)).mkdir(parents=True)
        rows = (found.labels == digit).nonzero().flatten()[:count]
        for i, pixels in enumerate(found.images[rows]):
            Image.fromarray(pixels[0].numpy()).save(root / str(digit) / f"{i}.png")
    return root


def train(*arguments: object) -> None:
    assert main(["train", *map(str, arguments), *FAST]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits to pretrain on, digits to fine-tune on, and pretrained runs of a teacher and a student."""
    root = tmp_path_factory.mktemp("fine-tuning")
    write_digits(root / "before", range(4), 60)
    write_digits(root / "digits", range(5, 10), 60)
    for name in ("wrn-10-2", "wrn-10-1"):
        flags = ["--data", root / "before", "--student", name, "--method", "none", "--epochs", 1]
        train(*flags, "--output", root / "pretrained" / name)
    return root


@pytest.fixture(scope="module")
def splits(folder: Path) -> Splits:
    return load_data(str(folder / "digits"), validation=0.0)


def test_teacher_and_student_are_fine_tuned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrained = folder / "pretrained"
    yaml = ["--image-size", 14, "--pad", 1, "--flip", "false", "--epochs", 2, "--data", folder / "digits"]
    first = ["--config", EXAMPLES / "teacher.yaml", "--student", "wrn-10-2", *yaml]
    train(*first, "--student-weights", pretrained / "wrn-10-2", "--output", folder / "teacher")
    new_head = r"the head fc starts afresh: 4 classes [^,]+, 5 "
    assert re.search(new_head, capsys.readouterr().out)

    file = pretrained / "wrn-10-1" / "student.safetensors"
    student = ["--config", EXAMPLES / "student.yaml", "--student", "wrn-10-1", *yaml]
    student += ["--student-weights", file]
    train(*student, "--method", "none", "--output", folder / "alone")
    capsys.readouterr()
    taught = ["--teacher", folder / "teacher", "--pairs", "group1,group2", "--output", folder / "taught"]
    train(*student, *taught)
    printed = capsys.readouterr().out
    assert re.search(new_head, printed)
    assert re.search(r"student alone \d+\.\d+ % \(alone\)", printed)

    run = Run(folder / "taught")
    assert [(row["student"], row["teacher"]) for row in run.result["plan"]] == [
        ("group1", "group1"),
        ("group2", "group2"),
    ]
    teacher = build_model("wrn-10-2", num_classes=5, in_channels=1)
    load_weights(teacher, folder / "teacher")
    assert run.result["teacher_fingerprint"] == fingerprint(teacher)
    weights, before = load_file(run.student_weights), load_file(file)
    assert weights["fc.weight"].shape == (5, 64)
    fresh = build_model("wrn-10-1", num_classes=5, in_channels=1).state_dict()
    name = "group2.block0.conv1.weight"  # fine-tuned: still near to where it started
    assert (weights[name] - before[name]).norm() < 0.5 * (weights[name] - fresh[name]).norm()


def test_the_body_is_the_pretrained_one_and_the_head_is_drawn_by_the_seed(
    folder: Path, splits: Splits, tmp_path: Path
) -> None:
    weights = folder / "pretrained" / "wrn-10-1"
    recipe = Recipe(student="wrn-10-1", student_weights=str(weights), method="none", batchnorm_init="uniform")
    student, again = (build_student(recipe, splits).state_dict() for _ in range(2))
    stored = load_file(weights / "student.safetensors")
    assert stored["fc.weight"].shape == (4, 64)
    for name, tensor in student.items():
        assert torch.equal(tensor, again[name] if name.startswith("fc.") else stored[name]), name
    assert student["fc.weight"].shape == (5, 64)


def test_a_torchvision_checkpoint_of_a_thousand_classes(
    splits: Splits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchvision")
    stored = build_model("torchvision:resnet18", num_classes=1000, in_channels=1).state_dict()
    torch.save(stored, tmp_path / "resnet18.pth")
    weights = str(tmp_path / "resnet18.pth")
    student = build_student(
        Recipe(student="torchvision:resnet18", student_weights=weights, method="none"), splits
    )
    assert "the head fc starts afresh: 1000 classes" in capsys.readouterr().out
    assert torch.equal(student.state_dict()["layer4.1.conv2.weight"], stored["layer4.1.conv2.weight"])


def test_a_head_of_as_many_classes_is_kept(
    splits: Splits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = build_model("wrn-10-1", num_classes=5, in_channels=1)
    save_weights(stored, tmp_path / "w.safetensors")
    recipe = Recipe(student="wrn-10-1", student_weights=str(tmp_path / "w.safetensors"), method="none")
    assert fingerprint(build_student(recipe, splits)) == fingerprint(stored)
    assert "afresh" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "channels", "message"),
    [
        ("wrn-10-2", 1, r".*34 of another shape: group0\.block0\.conv0\.weight "),
        ("wrn-16-1", 1, r"\d+ unexpected in the file: group0\.block1"),
        ("wrn-10-1", 3, r"3 of another shape: conv0\.weight "),
        ("torchvision:resnet18", 1, r"no tensor of it has a name of the model|\d+ missing in the file"),
    ],
)
def test_weights_that_differ_beyond_the_head_are_refused_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, channels: int, message: str
) -> None:
    save_weights(build_model(model, num_classes=4, in_channels=channels), tmp_path / "w.safetensors")
    flags = ["--data", folder / "digits", "--student", "wrn-10-1", "--method", "none", *FAST]
    weights = ["--student-weights", tmp_path / "w.safetensors", "--output", tmp_path / "run"]
    assert main(["train", *map(str, [*flags, *weights])]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.match(
        rf"attention-transfer: load_weights: .*w\.safetensors does not fit WideResNet: ({message})", err
    )
    assert not (tmp_path / "run").exists()


def test_the_recipes_differ_in_the_model_and_the_teacher_alone() -> None:
    teacher, student = (Recipe.load(EXAMPLES / f"{name}.yaml") for name in ("teacher", "student"))
    assert (teacher.student, teacher.method) == ("torchvision:resnet34", "none")
    assert (student.student, student.method, student.pairs) == ("torchvision:resnet18", "at", "layer3,layer4")
    for recipe in (teacher, student):
        assert (recipe.student_weights, recipe.image_size) == ("pretrained", 224)
    settings = ("epochs", "batch_size", "lr", "weight_decay", "milestones", "factor", "schedule", "flip")
    assert [getattr(teacher, name) for name in settings] == [getattr(student, name) for name in settings]
