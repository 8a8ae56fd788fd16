"""Classes by name: a model that numbers those of the images otherwise is matched to them, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from attention_transfer.cache import Manifest
from attention_transfer.cli import main
from attention_transfer.cli.collecting import collect
from attention_transfer.cli.comparing import _beside
from attention_transfer.cli.loading import load_teacher
from attention_transfer.data import match_classes
from attention_transfer.models import build_model, save_weights
from attention_transfer.runs import Recipe, Run
from attention_transfer.training import train
from attention_transfer.training.build import build_distiller, build_student, build_teacher, load_splits
from attention_transfer.training.cached import CachedTeacher, take_over
from attention_transfer.training.caching import build_cache
from attention_transfer.training.callbacks import StopOnSignal
from attention_transfer.training.card import ModelCard

pytestmark = [
    pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning"),
    pytest.mark.usefixtures("one_thread"),
]

COLOURS = ("blue", "green", "red")
OTHERWISE = ("Blue", "Red", "green")  # as a folder of these names is sorted
ORDER = [0, 2, 1]


@pytest.fixture(scope="module")
def otherwise(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images, in folders that are sorted otherwise."""
    root = tmp_path_factory.mktemp("otherwise")
    for name in OTHERWISE:
        shutil.copytree(image_folder / name.lower(), root / name)
    return root


def card(classes: Sequence[str], model: str = "wrn-10-1") -> ModelCard:
    return ModelCard(model, list(classes), 3, [16, 16], [0.5] * 3, [0.25] * 3)


def weights(path: Path, classes: Sequence[str], answer: str | None = None) -> nn.Module:
    """A network whose file names these classes; one that always gives the same answer, if that is named."""
    model = build_model("wrn-10-1", num_classes=len(classes)).eval()
    if answer is not None:
        nn.init.zeros_(model.fc.weight)
        model.fc.bias.data.copy_(torch.eye(len(classes))[classes.index(answer)])
    save_weights(model, path, card(classes).as_metadata())
    return model


def said(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> str:
    assert main([str(word) for word in words]) == status
    found = capsys.readouterr()
    return found.err if status else found.out


# Matching


@pytest.mark.parametrize(
    ("ours", "theirs", "places"),
    [
        (COLOURS, COLOURS, [0, 1, 2]),
        (COLOURS, OTHERWISE, [0, 2, 1]),
        (["green", "blue"], COLOURS, [1, 0]),
        (["T-shirt/top", "Bag"], ["bag", "T - shirt / top"], [1, 0]),
        (["a", "A"], ["A", "a"], [1, 0]),
        (["cat", "green"], COLOURS, [None, 1]),
        (["crane", "crane", "dog"], ["dog", "crane", "crane"], [None, None, 0]),
        (["crane", "crane"], ["crane", "crane"], [0, 1]),
        (["0", "1", "2"], COLOURS, None),
        (COLOURS, ["0", "1", "2"], None),
        (["0", "1", "2"], ["0", "1"], None),
        ([str(i) for i in range(11)], ["0", "1", "10", *"23456789"], [0, 1, *range(3, 11), 2]),
        (["+", "-"], ["-", "+"], [1, 0]),
        (COLOURS, None, None),
    ],
)
def test_classes_are_matched_by_name(
    ours: Sequence[str], theirs: Sequence[str] | None, places: list[int | None] | None
) -> None:
    assert match_classes(ours, theirs) == places


# evaluate


def table(text: str) -> dict[str, float]:
    rows = [line.split() for line in text.splitlines()]
    return {row[0]: float(row[2]) for row in rows if len(row) == 3 and row[2].replace(".", "").isdigit()}


@pytest.mark.parametrize("classes", [COLOURS, OTHERWISE, ("red", "blue", "green")])
def test_evaluate_finds_the_models_classes_by_name(
    classes: Sequence[str],
    image_folder: Path,
    otherwise: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights(tmp_path / "w.safetensors", classes, "green")
    for data in (image_folder, otherwise):
        text = said(capsys, "evaluate", tmp_path / "w.safetensors", "--data", data)
        found = {name.lower(): error for name, error in table(text).items()}
        assert found == {"blue": 100, "green": 0, "red": 100}
        assert "top-1 error 66.67 %" in text


def test_evaluate_of_some_classes_and_of_strange_ones(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights(tmp_path / "w.safetensors", COLOURS, "green")
    for name in ("green", "red"):
        shutil.copytree(image_folder / name, tmp_path / "some" / name)
    text = said(capsys, "evaluate", tmp_path / "w.safetensors", "--data", tmp_path / "some")
    assert "top-1 error 50.00 %" in text and table(text)["green"] == 0
    (tmp_path / "some" / "red").rename(tmp_path / "some" / "cherry")
    line = said(capsys, "evaluate", tmp_path / "w.safetensors", "--data", tmp_path / "some", status=2)
    assert "evaluate: expected images of classes that the model knows, got 'cherry'. It knows blue, " in line
    weights(tmp_path / "numbers.safetensors", ["0", "1", "2"], "1")
    assert "50.00 %" in said(
        capsys, "evaluate", tmp_path / "numbers.safetensors", "--data", tmp_path / "some"
    )


# Teachers


def recipe_of(tiny: Recipe, data: Path, method: str, **settings: object) -> Recipe:
    return replace(tiny, data=str(data), method=method, **settings)


@pytest.mark.parametrize("method", ["kd", "at+kd", "gradient"])
def test_a_teachers_answers_are_those_of_the_datas_classes(
    method: str, tiny: Recipe, otherwise: Path, tmp_path: Path
) -> None:
    model = weights(tmp_path / "w.safetensors", COLOURS)
    recipe = recipe_of(tiny, otherwise, method, teacher=str(tmp_path / "w.safetensors"))
    splits = load_splits(recipe)
    assert splits.classes == list(OTHERWISE)
    teacher = build_teacher(recipe, splits, lambda: pytest.fail("it is there"))
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 2])
    distiller = build_distiller(recipe, build_student(recipe, splits), teacher, images)
    seen = distiller.observe(images, labels)
    expected = model(teacher.transform(images))[:, ORDER]
    torch.testing.assert_close(seen.teacher.logits, expected)
    if method == "gradient":
        leaf = images.clone().requires_grad_()
        loss = nn.functional.cross_entropy(
            model(teacher.transform(leaf)), torch.tensor([0, 2, 1, 1]), reduction="sum"
        )
        torch.testing.assert_close(seen.teacher.input_gradient, torch.autograd.grad(loss, leaf)[0])
    assert "the teacher's classes are in another order: matched by name" in str(distiller.plan())


MORE = ("violet", "green", "black", "Blue", "red")


@pytest.mark.parametrize("method", ["kd", "gradient"])
def test_a_teacher_of_more_classes_answers_for_those_of_the_data(
    method: str, tiny: Recipe, otherwise: Path, tmp_path: Path
) -> None:
    """Live, and from a cache; what it thinks of the other classes is left out."""
    model = weights(tmp_path / "w.safetensors", MORE)
    recipe = recipe_of(tiny, otherwise, method, teacher=str(tmp_path / "w.safetensors"))
    splits = load_splits(recipe)
    teacher = build_teacher(recipe, splits, lambda: pytest.fail("it is there"))
    places = [3, 4, 1]
    assert list(OTHERWISE) == ["Blue", "Red", "green"] and teacher.order == places
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 2])
    distiller = build_distiller(recipe, build_student(recipe, splits), teacher, images)
    seen = distiller.observe(images, labels)
    torch.testing.assert_close(seen.teacher.logits, model(teacher.transform(images))[:, places])
    assert "the teacher has more classes: matched by name" in str(distiller.plan())
    if method == "kd":
        run = train(replace(recipe, output=str(tmp_path / "run")), say=lambda line: None)
        assert load_teacher(run, splits).order == places
        cache = build_cache(recipe, tmp_path / "cache", say=lambda line: None)
        assert cache.manifest.class_names == MORE
        recipe = take_over(replace(recipe, cache=str(tmp_path / "cache"), teacher=None))
        assert CachedTeacher.of(recipe, splits, build_student(recipe, splits)).order == places


def test_a_teacher_of_more_classes_without_names_is_refused(
    tiny: Recipe, otherwise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for names in (["0", "1", "2", "3"], ["Blue", "green", "black", "white"]):
        weights(tmp_path / "w.safetensors", names)
        words = ["--data", otherwise, "--student", "wrn-10-1", "--teacher", tmp_path / "w.safetensors"]
        line = said(capsys, "train", *words, "--method", "kd", "--output", tmp_path / "run", status=2)
        assert "expected a teacher of 3 classes, as the data, got 4. It may have more where its file" in line


@pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning")
def test_a_run_on_other_images_is_not_the_student_alone(
    tiny: Recipe, image_folder: Path, otherwise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights(tmp_path / "teacher.safetensors", COLOURS, "green")

    def run_on(data: Path, name: str, **settings: object) -> Path:
        recipe = replace(tiny, data=str(data), output=str(tmp_path / name), **settings)
        return train(recipe, say=lambda line: None).folder

    taught = run_on(image_folder, "at", method="at", teacher=str(tmp_path / "teacher.safetensors"))
    moved, two = tmp_path / "moved" / image_folder.name, tmp_path / "two" / image_folder.name
    shutil.copytree(image_folder, moved)
    for name in COLOURS[:2]:
        shutil.copytree(image_folder / name, two / name)
    others = {
        "other classes": run_on(two, "a"),
        "other sizes of images": run_on(image_folder, "b", image_size=8),
        "other images": run_on(moved, "c"),
    }
    for what, other in others.items():
        capsys.readouterr()
        examples = collect([other, taught], 12)
        assert "student alone" not in examples.seen.predictions
        assert f"note: {other} is not shown as the student alone: it has {what}" in capsys.readouterr().out
    shutil.rmtree(moved)  # where it was is no longer known: it may be where the other is
    assert "student alone" in collect([others["other images"], taught], 12).seen.predictions


def test_a_teacher_of_other_classes_is_refused_where_answers_are_compared(
    tiny: Recipe, otherwise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights(tmp_path / "w.safetensors", ("cherry", "grass", "sky"))
    flags = ["train", "--data", otherwise, "--student", "wrn-10-1", "--teacher", tmp_path / "w.safetensors"]
    for method in ("kd", "gradient", "at+kd"):
        line = said(capsys, *flags, "--method", method, "--output", tmp_path / "run", status=2)
        assert "got one that does not know 'Blue', 'Red', 'green'. Name them alike, or" in line
    recipe = recipe_of(tiny, otherwise, "at", teacher=str(tmp_path / "w.safetensors"))
    assert build_teacher(recipe, load_splits(recipe), lambda: pytest.fail("it is there")).order is None
    weights(tmp_path / "numbers.safetensors", ["0", "1", "2"])
    recipe = recipe_of(tiny, otherwise, "kd", teacher=str(tmp_path / "numbers.safetensors"))
    assert build_teacher(recipe, load_splits(recipe), lambda: pytest.fail("it is there")).order is None


def test_a_run_says_that_classes_were_matched_and_its_report_matches_them_too(
    tiny: Recipe, image_folder: Path, otherwise: Path, tmp_path: Path
) -> None:
    weights(tmp_path / "teacher.safetensors", COLOURS, "green")
    lines: list[str] = []
    recipe = recipe_of(tiny, otherwise, "at+kd", teacher=str(tmp_path / "teacher.safetensors"))
    run = train(replace(recipe, output=str(tmp_path / "run")), say=lines.append)
    assert any("the teacher's classes are in another order" in line for line in lines)
    examples = collect([run.folder], 12)
    assert examples.classes == list(OTHERWISE)
    assert examples.seen.predictions["teacher"].tolist() == [2] * examples.compared
    splits = load_splits(run.recipe)
    found = _beside(load_teacher(run, splits), splits)
    assert found.answers.error == pytest.approx(100 * 2 / 3)
    assert found.answers.labels.bincount().tolist() == [4, 4, 4]
    assert found.answers.predictions.unique().tolist() == [1]  # the teacher's own number of green


def test_a_cache_keeps_the_teachers_classes(tiny: Recipe, otherwise: Path, tmp_path: Path) -> None:
    weights(tmp_path / "w.safetensors", COLOURS)
    recipe = recipe_of(tiny, otherwise, "kd", teacher=str(tmp_path / "w.safetensors"))
    cache = build_cache(recipe, tmp_path / "cache", say=lambda line: None)
    assert cache.manifest.class_names == COLOURS
    recipe = take_over(replace(recipe, cache=str(tmp_path / "cache"), teacher=None))
    splits = load_splits(recipe)
    student = build_student(recipe, splits)
    cached = CachedTeacher.of(recipe, splits, student)
    rows = torch.arange(4)
    reading, labels = cached(rows, 0, torch.device("cpu")), splits.train.labels[:4]
    distiller = cached.distiller(recipe, student)
    seen = distiller.observe(torch.zeros(4, *splits.shape), labels, teacher=reading)
    assert torch.equal(seen.teacher.logits, reading.logits[:, ORDER])
    assert "matched by name" in str(distiller.plan())
    facts = json.loads((tmp_path / "cache" / "cache.json").read_text())
    for names, expected in ((["sky", "grass", "cherry"], "does not know 'Blue'"), (["a"], "damaged")):
        (tmp_path / "cache" / "cache.json").write_text(json.dumps(facts | {"class_names": names}))
        with pytest.raises(ValueError, match=expected):
            CachedTeacher.of(recipe, splits, student)
    del facts["class_names"]  # as caches were before
    (tmp_path / "cache" / "cache.json").write_text(json.dumps(facts))
    assert Manifest.read(tmp_path / "cache").class_names is None
    assert CachedTeacher.of(recipe, splits, student).order is None


# Students


def test_a_head_is_matched_to_the_classes_by_name(
    tiny: Recipe, otherwise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = weights(tmp_path / "w.safetensors", COLOURS)
    recipe = recipe_of(tiny, otherwise, "none", student_weights=str(tmp_path / "w.safetensors"))
    splits, images = load_splits(recipe), torch.randn(4, 3, 16, 16)
    student = build_student(recipe, splits).eval()
    torch.testing.assert_close(student(images), model(images)[:, ORDER])
    assert "the classes of its head are in another order: matched by name" in capsys.readouterr().out


def test_a_head_for_other_classes_starts_afresh(
    tiny: Recipe, otherwise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = weights(tmp_path / "w.safetensors", ("cherry", "grass", "sky"))
    recipe = recipe_of(tiny, otherwise, "none")
    fresh = build_student(recipe, load_splits(recipe)).state_dict()
    recipe = replace(recipe, student_weights=str(tmp_path / "w.safetensors"))
    student = build_student(recipe, load_splits(recipe)).state_dict()
    assert "the head starts afresh: it did not know 'Blue', 'Red', 'green'" in capsys.readouterr().out
    for name, tensor in model.state_dict().items():
        assert torch.equal(student[name], fresh[name] if name.startswith("fc.") else tensor)


def test_a_run_does_not_go_on_with_other_classes(
    tiny: Recipe,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(image_folder, tmp_path / "images")
    recipe = recipe_of(tiny, tmp_path / "images", "none", output=str(tmp_path / "run"), epochs=2)
    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "_should_stop", lambda self, trainer, batch_idx: trainer.global_step == 2)
        with pytest.raises(BaseException, match="stopped by signal"):
            train(recipe, say=lambda line: None)
    (tmp_path / "images" / "blue").rename(tmp_path / "images" / "turquoise")
    line = said(capsys, "train", "--resume", tmp_path / "run", status=2).splitlines()[0]
    assert "the classes that the run began with, blue, green, red, got green, red, turquoise. Put" in line
    (tmp_path / "images" / "turquoise").rename(tmp_path / "images" / "blue")
    assert main(["train", "--resume", str(tmp_path / "run"), "--progress", "none"]) == 0
    assert Run(tmp_path / "run").finished
