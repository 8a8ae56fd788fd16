"""What a student would fail of once its teacher is trained is said before the teacher is."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attention_transfer.cli import main
from attention_transfer.runs import Recipe, Run
from attention_transfer.training import train
from attention_transfer.training.build import build_student, load_splits
from attention_transfer.training.rehearsal import rehearse

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = ["--epochs", "1", "--batch-size", "10", "--accelerator", "cpu", "--precision", "32-true"]


@pytest.fixture
def recipe(tiny: Recipe, tmp_path: Path) -> Recipe:
    return replace(tiny, method="at", teacher="wrn-10-1", output=str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": "nowhere:group1"}, r"resolve: .*got 'nowhere'"),
        ({"pairs": "group1:nowhere"}, r"resolve: .*got 'nowhere'"),
        ({"pairs": "group0:group1"}, r"equal \(h, w\), got student \(16, 16\) and teacher \(8, 8\)"),
        ({"pairs": "group0:group1", "beta": "auto"}, r"got student \(16, 16\) and teacher \(8, 8\)"),
        (
            {"student": "resnet18", "pairs": "layer4:group2"},
            r"at the student's layer4, got a single position",
        ),
        ({"teacher": "squeezenet1_1", "image_size": 8}, r"expected a teacher that runs on images of shape"),
        ({"beta": 0.0}, r"preflight: .* no gradient from at/group0 \(value 0\): the term is dead"),
        ({"method": "kd", "alpha": 0.0}, r"preflight: .* no gradient from kd \(value 0\): the term is dead"),
        ({"method": "at+f-actt", "beta_f_actt": 0.0}, r"no gradient from f-actt/group0"),
        (
            {"student": "small_net:FeaturesFirst"},
            r"preflight: expected a student with an output for each of \d+ classes, got 64\. Let it return",
        ),
        (
            {"method": "kd", "teacher": "small_net:FeaturesFirst"},
            r"expected logits of equal shape, .* got student \(8, 3\) and teacher \(8, 64\)",
        ),
        ({"teacher": "wrn-10-one"}, r'build_model: .*got "wrn-10-one"'),
    ],
)
def test_what_does_not_fit_is_said_before_the_teacher_is_trained(
    recipe: Recipe, changes: dict, message: str
) -> None:
    said: list[str] = []
    with pytest.raises(ValueError, match=message) as caught:
        train(replace(recipe, **changes), say=said.append)
    assert "\n" not in str(caught.value)
    assert said == []
    assert not recipe.folder.exists()


def test_nothing_is_said_of_a_teacher_that_knows_nothing_yet(recipe: Recipe) -> None:
    """Neither a warning, nor that a student of its make and seed is its copy; and all is left as it was."""
    splits = load_splits(recipe)
    student = build_student(recipe, splits)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rehearse(
            replace(recipe, method="at+kd", teacher_precision="bf16-mixed"),
            splits,
            student,
            recipe.for_teacher(),
        )
    assert torch.equal(state, torch.get_rng_state())
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in student.parameters())


@pytest.fixture
def stopped(recipe: Recipe) -> Run:
    """A run whose teacher is trained, and whose student has pairs that do not fit."""
    run = train(recipe, say=lambda _: None)
    for name in ("result.json", "metrics.csv", "student.safetensors"):
        (run.folder / name).unlink()
    shutil.rmtree(run.checkpoints)
    run.recipe_file.write_text(replace(run.recipe, pairs="group0:group1").to_yaml())
    return Run(run.folder)


@pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning")
def test_a_trained_teacher_is_offered_to_a_run_that_cannot_go_on(
    stopped: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", "run"]) == 2
    said = capsys.readouterr().err
    (flags,) = re.findall(
        r"^Its teacher is trained.* add them to: attention-transfer (train .*)$", said, re.M
    )
    assert flags == "train --config run/recipe.yaml --teacher run/teacher --output run-2"
    assert main(["train", "--resume", "run", "--pairs", "group0:group0"]) == 2
    assert "For other settings start a new run: " + flags.removeprefix("train ") in capsys.readouterr().err
    assert main([*shlex.split(flags), "--pairs", "group1:group1", "--progress", "lines"]) == 0
    out = capsys.readouterr().out
    assert "group1 <- group1" in out
    assert "First the teacher" not in out
    assert Run(Path("run-2")).result["teacher_fingerprint"]


@pytest.mark.parametrize(
    ("flags", "unused"),
    [
        (["--method", "none", "--teacher", "wrn-16-2"], "wrn-16-2"),
        (["--method=none", "--teacher=wrn-10-2"], "wrn-10-2"),
        (["--method", "symmetry+min-l2", "--teacher", "wrn-10-1"], "wrn-10-1"),
        (["--method", "none", "--teacher_weights", "file.safetensors"], "file.safetensors"),
        (["--config", "recipe.yaml", "--method", "none", "--teacher", "wrn-10-1"], "wrn-10-1"),
    ],
)
def test_a_teacher_that_no_term_asks_is_refused(
    recipe: Recipe,
    flags: list[str],
    unused: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(recipe.to_yaml())
    assert (
        main(["train", "--student", "wrn-10-1", "--data", str(recipe.data), *flags, "--output", "run"]) == 2
    )
    message = capsys.readouterr().err
    assert re.search(
        f"learns from no teacher, got --teacher(-weights)? {unused}\\. Leave it out, or", message
    )
    assert message.count("\n") == 1
    assert not Path("run").exists()


def test_a_recipe_with_a_teacher_that_no_term_asks_is_refused(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In Python and in a file; a flag beside the file says what is meant."""
    unused = r'train: method "none" learns from no teacher, got wrn-10-1\. Leave it out \(teacher: null\), or'
    with pytest.raises(ValueError, match=unused):
        train(replace(recipe, method="none"))
    assert not recipe.folder.exists()
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(replace(recipe, method="none").to_yaml())
    assert main(["train", "--config", "recipe.yaml"]) == 2
    assert re.search(unused, capsys.readouterr().err)
    Path("recipe.yaml").write_text(recipe.to_yaml())
    assert main(["train", "--config", "recipe.yaml", "--method", "none"]) == 0
    out = capsys.readouterr().out
    assert out.startswith('note: method "none" learns from no teacher: wrn-10-1 is left out\n')
    assert Run(recipe.folder).recipe.teacher is None
    assert Recipe(method="none").unused_teacher is None
    assert Recipe(method="at").unused_teacher is None


@pytest.mark.parametrize("package", ["jinja2", "scipy"])
def test_what_the_report_needs_is_looked_for_at_the_start(
    recipe: Recipe,
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)  # as Python marks what cannot be imported
    assert main(["train", "--data", str(recipe.data), "--teacher", "wrn-10-1", "--output", "run"]) == 2
    error = capsys.readouterr().err
    assert f"train: needs the package {package}, which is not installed. Run: pip install" in error
    assert not Path("run").exists()


def test_where_a_picture_goes_is_looked_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "nowhere", "--plot", str(tmp_path)]) == 2
    assert "evaluate: expected a file for --plot, got" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["evaluate", "nowhere", "--plot", "x.png"]) == 2
    assert "evaluate: needs the package matplotlib" in capsys.readouterr().err


def test_weights_of_a_teacher_are_given_once(recipe: Recipe, tmp_path: Path) -> None:
    alone = train(
        replace(recipe, method="none", teacher=None, output=str(tmp_path / "teacher")), say=lambda _: None
    )
    for teacher in (alone.folder, alone.student_weights):
        both = replace(recipe, teacher=str(teacher), teacher_weights=str(alone.student_weights))
        with pytest.raises(
            ValueError, match=r"train: expected the teacher's weights once, got .*\S+ as --teacher and"
        ):
            train(both, say=lambda _: None)
