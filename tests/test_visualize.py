"""Overlays, the confusion matrix and the HTML report, on real files."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from attention_transfer.runs import Run
from attention_transfer.visualize import (
    Examples,
    Seen,
    attention_maps,
    collect_examples,
    confusion_matrix,
    cosine_similarity,
    overlay,
    per_class_errors,
    save_maps,
    write_report,
)
from attention_transfer.visualize.charts import Axis, Series, draw, line_chart
from attention_transfer.visualize.groups import find_teachers, group_runs
from attention_transfer.visualize.summary import compare, summarise

HOSTILE = '<script>alert("1")</script>'
TAUGHT = "student with attention transfer"
VOID = {"meta", "link", "img", "input"}


def make_run(
    folder: Path,
    method: str,
    *,
    seed: int = 0,
    error: float | None = 30.0,
    student: str = "small",
    teacher: str | None = "large",
    epochs: int = 3,
    **settings: object,
) -> Path:
    """A run folder as training writes it; without result.json if `error` is None."""
    folder.mkdir(parents=True)
    recipe = {"student": student, "teacher": teacher, "method": method, "seed": seed, "data": "cifar10"}
    recipe |= {"epochs": epochs, "output": str(folder), **settings}
    (folder / "recipe.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in recipe.items()))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "train/loss", "train/ce", "train/at/layer1", "val/error"])
        for epoch in range(epochs):
            term = 0.5 / (epoch + 1) if "at" in method else ""
            writer.writerow([epoch, 2.0 / (epoch + 1), 1.5 / (epoch + 1), term, 60.0 / (epoch + 1) + seed])
    if error is not None:
        plan = [
            {"student": "layer1", "teacher": "layer1", "student_shape": [8, 4, 4], "shares": {"at": 0.25}}
        ]
        result = {"test_error": error, "validation_error": error + 1, "parameters": 175066, "seed": seed}
        result |= {"images_per_second": 8000.0, "wall_seconds": 75.0, "method": method}
        result["plan"] = plan if "at" in method else []
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def make_runs(root: Path, method: str, errors: list[float], **settings: object) -> list[Path]:
    return [
        make_run(root / f"{method}-{seed}", method, seed=seed, error=error, **settings)
        for seed, error in enumerate(errors)
    ]


def groups_of(folders: list[Path]):
    runs = [Run(folder).check() for folder in folders]
    return group_runs(runs, find_teachers(runs))


def make_examples(name: str = "cat", layer: str = "layer1") -> Examples:
    roles = ("teacher", "student alone", TAUGHT)
    seen = Seen(
        images=torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8),
        labels=torch.tensor([0, 1]),
        maps={role: {layer: torch.rand(2, 8, 8)} for role in roles},
        predictions={role: torch.tensor([0, 0]) for role in roles},
        cosines={"student alone": torch.tensor([[0.25], [0.75]]), TAUGHT: torch.tensor([[0.96], [0.79]])},
    )
    return Examples(seen, [name, "dog"], {role: [layer] for role in roles}, chosen=[0, 1])


class Page(HTMLParser):
    """Checks that the tags nest, and collects them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += " ".join(data.split()) + " "

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def report(tmp_path: Path, folders: list[Path], **options: object) -> tuple[str, Page]:
    html = write_report(folders, tmp_path / "out" / "report.html", **options).read_text(encoding="utf-8")
    return html, Page(html)


class Classifier(nn.Module):
    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def to_float(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 255 - 0.5


# Overlays


@pytest.mark.parametrize("shape", [(3, 40, 56), (1, 40, 56), (40, 56, 3)])
def test_overlay_peaks_where_the_map_does(shape):
    energy = torch.zeros(5, 7)
    energy[1, 5] = 2e-7
    picture = overlay(torch.full(shape, 30, dtype=torch.uint8), energy, alpha=0.5)
    assert picture.shape == (40, 56, 3) and picture.dtype == np.uint8
    brightness = picture.astype(int).sum(2)
    row, column = np.unravel_index(brightness.argmax(), brightness.shape)
    assert (row // 8, column // 8) == (1, 5)
    assert brightness.max() > 300 and brightness[30, 10] < 60


def test_overlay_of_a_zero_map_or_with_alpha_zero():
    image = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    assert np.array_equal(overlay(image, np.zeros((2, 2))), np.rint(0.4 * image + 0.6 * np.array([0, 0, 3])))
    assert np.array_equal(overlay(image, np.ones((2, 2)), alpha=0.0), image)


@pytest.mark.parametrize(
    ("image", "energy", "alpha", "message"),
    [
        (torch.zeros(3, 8, 8), torch.ones(2, 2), 0.5, r"overlay: expected a uint8 image .* got float32"),
        (torch.zeros(8, 8, dtype=torch.uint8), torch.ones(2, 2), 0.5, r"got uint8 \(8, 8\)"),
        (
            torch.zeros(3, 8, 8, dtype=torch.uint8),
            torch.ones(1, 2, 2),
            0.5,
            r"of shape \(h, w\), got \(1, 2, 2\)",
        ),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), torch.tensor([[math.nan]]), 0.5, "expected a finite"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), torch.tensor([[-1.0, 1.0]]), 0.5, "values from -1 to 1"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), torch.ones(2, 2), 1.5, "alpha between 0 and 1, got 1.5"),
    ],
)
def test_overlay_refuses(image, energy, alpha, message):
    with pytest.raises(ValueError, match=message):
        overlay(image, energy, alpha=alpha)


@pytest.mark.parametrize("side", [28, 32, 224])
def test_save_maps_shows_each_pixel_of_a_small_image(tmp_path, side):
    from PIL import Image

    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    maps = {
        "teacher": {"a": torch.rand(2, 4, 4), "$b_$": torch.rand(2, 2, 2)},
        "student": {"a": torch.rand(2, 4, 4)},
    }
    path = save_maps(tmp_path / "new" / "maps.png", images, maps, captions=["x.png", "a very long name" * 9])
    grid = np.asarray(Image.open(path).convert("RGB"))
    factor = math.ceil(160 / side)
    assert grid.shape[1] == 2 * 16 + 4 * side * factor + 6 + 2 * 22
    shown = grid[56 : 56 + side * factor, 16 : 16 + side * factor]
    assert np.array_equal(shown[::factor, ::factor], images[0].permute(1, 2, 0).numpy())
    assert np.array_equal(shown[factor - 1 :: factor, factor - 1 :: factor], shown[::factor, ::factor])


def test_save_maps_takes_images_of_several_sizes(tmp_path):
    images = [np.zeros((20, 30, 3), np.uint8), np.zeros((600, 400, 3), np.uint8)]
    assert save_maps(tmp_path / "maps.png", images, {"model": {"a": torch.rand(2, 3, 3)}}).stat().st_size > 0


def test_save_maps_refuses_unequal_numbers(tmp_path):
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="as many maps of teacher at a as images, got 3 for 2"):
        save_maps(tmp_path / "x.png", images, {"teacher": {"a": torch.rand(3, 2, 2)}})
    with pytest.raises(ValueError, match="as many captions as images, got 1 for 2"):
        save_maps(tmp_path / "x.png", images, {"teacher": {"a": torch.rand(2, 2, 2)}}, captions=["one"])
    with pytest.raises(ValueError, match="at least one image and one layer"):
        save_maps(tmp_path / "x.png", images, {"teacher": {}})


# Maps and their similarity


def test_attention_maps_follow_the_formula_and_leave_the_model_as_it_was():
    model = Classifier(4).train()
    model.body[2].eval()
    images = torch.randn(5, 3, 8, 8)
    statistics = model.body[1].running_mean.clone()
    maps = attention_maps(model, ["body.0", "body"], images, batch_size=2)
    with torch.no_grad():
        energy = model.body[0](images).pow(2).sum(1)
    expected = energy / energy.flatten(1).norm(dim=1)[:, None, None]
    torch.testing.assert_close(maps["body.0"], expected)
    assert list(maps) == ["body.0", "body"]
    assert torch.equal(model.body[1].running_mean, statistics)
    assert model.training and model.body[1].training and not model.body[2].training


def test_cosine_similarity_is_the_plain_formula():
    one, other = torch.rand(4, 3, 5), torch.rand(4, 3, 5)
    expected = [
        (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt() for a, b in zip(one, other, strict=True)
    ]
    torch.testing.assert_close(cosine_similarity(one, other), torch.stack(expected))
    assert cosine_similarity(torch.zeros(1, 2, 2), torch.ones(1, 2, 2)).item() == 0


def test_cosine_similarity_resizes_the_students_map():
    large = torch.rand(2, 8, 8)
    means = large.reshape(2, 4, 2, 4, 2).mean((2, 4))
    torch.testing.assert_close(cosine_similarity(large, means), torch.ones(2))
    grown = nn.functional.interpolate(means[:, None], (8, 8), mode="bilinear")[:, 0]
    torch.testing.assert_close(cosine_similarity(means, large), cosine_similarity(grown, large))


def test_cosine_similarity_refuses_other_images():
    with pytest.raises(
        ValueError, match=r"cosine_similarity: expected maps of the same images, got 2 .* and 3"
    ):
        cosine_similarity(torch.rand(2, 4, 4), torch.rand(3, 4, 4))


def test_collect_examples_compares_over_all_images_and_keeps_a_few():
    teacher, student = Classifier(8), Classifier(4, stride=2)
    images = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 0])
    models = {
        "teacher": (teacher, ["body"]),
        "student alone": (student, ["body.1"]),
        TAUGHT: (teacher, ["body"]),
    }
    found = collect_examples(models, images, labels, to_float, ["a", "b", "c"], shown=4, batch_size=4)
    assert found.shown.labels.tolist() == [0, 1, 2, 0]
    assert torch.equal(found.shown.images, images[[0, 3, 5, 1]])
    assert found.compared == 9
    assert found.similarity[TAUGHT] == pytest.approx([1.0])
    inputs = to_float(images)
    own, other = (attention_maps(m, [n], inputs)[n] for m, n in ((student, "body.1"), (teacher, "body")))
    assert found.similarity["student alone"] == pytest.approx([cosine_similarity(own, other).mean().item()])
    expected = student.eval()(inputs).argmax(1)[[0, 3, 5, 1]]
    assert torch.equal(found.shown.predictions["student alone"], expected)


def test_examples_by_class_and_the_most_apart():
    cosines = torch.tensor([[0.9, 0.5], [0.7, 0.1], [0.2, 0.4], [0.8, 0.8]])
    maps = {"teacher": {"a": torch.rand(4, 2, 2)}, TAUGHT: {"a": torch.rand(4, 2, 2)}}
    labels = torch.tensor([2, 0, 2, 0])
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 1, 2, 2)
    predictions = dict.fromkeys(maps, labels)
    found = Examples(Seen(images, labels, maps, predictions, {TAUGHT: cosines}), list("abc"), {}, [3])
    by_class = found.similarity_by_class(TAUGHT)
    torch.testing.assert_close(by_class[0], torch.tensor([0.75, 0.45]))
    torch.testing.assert_close(by_class[2], torch.tensor([0.55, 0.45]))
    assert by_class[1].isnan().all()
    assert found.similarity[TAUGHT] == pytest.approx([0.65, 0.45])
    apart = found.apart(TAUGHT, 2)
    assert apart.images[:, 0, 0, 0].tolist() == [2, 1]
    assert torch.equal(apart.maps["teacher"]["a"], maps["teacher"]["a"][[2, 1]])
    assert found.shown.labels.tolist() == [0]


def test_collect_examples_normalises_for_each_role():
    model = Classifier(4)
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    models = {"teacher": (model, ["body"]), TAUGHT: (model, ["body"])}
    normalise = {"teacher": lambda x: to_float(x).flip(3), TAUGHT: to_float}
    found = collect_examples(models, images, torch.arange(3), normalise, list("abc"))
    assert found.similarity[TAUGHT][0] < 0.999


def test_collect_examples_refuses():
    model, images = Classifier(4), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    labels = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="expected the role 'teacher', got student alone"):
        collect_examples({"student alone": (model, ["body"])}, images, labels, to_float, ["a"])
    with pytest.raises(ValueError, match="as many layers for each model, got teacher: 1, student alone: 2"):
        both = {"teacher": (model, ["body"]), "student alone": (model, ["body", "body.0"])}
        collect_examples(both, images, labels, to_float, ["a"])
    with pytest.raises(ValueError, match="at least one image"):
        collect_examples({"teacher": (model, ["body"])}, images[:0], labels[:0], to_float, ["a"])
    with pytest.raises(ValueError, match=r"logits \(b, k\) from the teacher"):
        collect_examples({"teacher": (model.body, ["0"])}, images, labels, to_float, ["a"])


# The confusion matrix


def test_per_class_errors():
    rows = per_class_errors(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1]), ["a", "b", "c"])
    assert [row[:2] for row in rows] == [("a", 3), ("b", 1), ("c", 0)]
    assert rows[0].error == pytest.approx(100 / 3) and rows[1].error == 0 and math.isnan(rows[2].error)


@pytest.mark.parametrize("k", [2, 10, 200])
def test_confusion_matrix_is_written(tmp_path, k):
    from PIL import Image

    labels = torch.arange(k)
    path = confusion_matrix(
        labels, labels, ["$x_$", *(f"class {i}" for i in range(1, k))], tmp_path / "new" / "c.png"
    )
    with Image.open(path) as picture:
        assert picture.size[0] > 500


def test_confusion_matrix_refuses(tmp_path):
    with pytest.raises(
        ValueError, match=r"confusion_matrix: expected one prediction a label, got .*\(2,\).*\(3,\)"
    ):
        confusion_matrix(torch.zeros(2).long(), torch.zeros(3).long(), ["a"], tmp_path / "c.png")
    with pytest.raises(ValueError, match="class indices from 0 to 1, got 0 to 5"):
        confusion_matrix(torch.tensor([5]), torch.tensor([0]), ["a", "b"], tmp_path / "c.png")


# Reading runs


def test_run_folder(tmp_path):
    run = Run(make_run(tmp_path / "r", "at", seed=2, error=12.5)).check()
    assert (run.method, run.model, run.finished, run.number("test_error")) == ("at", "small", True, 12.5)
    assert run.metrics["val/error"] == [62.0, 32.0, 22.0]
    assert run.number("nothing") is None
    alone = Run(make_run(tmp_path / "s", "none", error=None)).check()
    assert not alone.finished and math.isnan(alone.metrics["train/at/layer1"][0])


def test_a_run_that_has_just_begun_has_no_metrics(tmp_path):
    folder = make_run(tmp_path / "r", "at", error=None)
    (folder / "metrics.csv").unlink()
    assert Run(folder).check().metrics == {}
    _, page = report(tmp_path, [folder])
    assert "1 in progress (epoch 0 of 3)" in page.text and "No epoch has finished yet" in page.text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("recipe.yaml", "a: [", r"Run: expected YAML in .*recipe\.yaml, got .*the file is damaged"),
        ("recipe.yaml", "just text", r"expected lines of `field: value` in .*recipe\.yaml, got 'just text'"),
        ("result.json", '{"test_error": ', r"expected JSON in .*result\.json"),
        ("result.json", "[1]", r"expected a JSON object in .*result\.json, got \[1\]"),
        (
            "metrics.csv",
            "epoch,val/error\n0,many\n",
            r"a number in line 2, 'val/error' in .*metrics\.csv, got 'many'",
        ),
        ("metrics.csv", "", r"expected CSV in .*metrics\.csv, got no header"),
        ("metrics.csv", b"\xff\xfe\x00", r"expected UTF-8 text in .*metrics\.csv"),
    ],
)
def test_a_damaged_file_is_one_clear_line(tmp_path, name, text, message):
    folder = make_run(tmp_path / "r", "at")
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        write_report([folder], tmp_path / "report.html")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_a_missing_file_is_one_clear_line(tmp_path):
    folder = make_run(tmp_path / "r", "at")
    (folder / "metrics.csv").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"expected a run folder, got .*/r, which has no metrics\.csv"
    ):
        Run(folder).check()
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"which has no recipe\.yaml. Pass a folder that `train` wrote"
    ):
        Run(tmp_path / "empty").check()
    with pytest.raises(FileNotFoundError, match="nowhere, which is not a folder"):
        Run(tmp_path / "nowhere").check()
    with pytest.raises(ValueError, match="write_report: expected at least one run folder, got none"):
        write_report([], tmp_path / "report.html")


def test_runs_are_grouped_by_what_the_method_depends_on(tmp_path):
    folders = [
        *make_runs(tmp_path, "none", [33, 32], beta=1.0),
        make_run(tmp_path / "n3", "none", seed=3, beta=2.0),
        *make_runs(tmp_path, "at", [30, 31], beta=1.0),
        make_run(tmp_path / "a3", "at", beta=3.0),
        make_run(tmp_path / "at-0" / "teacher", "none", student="large", teacher=None),
    ]
    found = [(g.label, len(g.runs), g.style) for g in groups_of(folders)]
    assert found == [
        ("teacher", 1, "teacher"),
        ("student alone", 3, "alone"),
        ("attention transfer (beta 1.0)", 2, "method0"),
        ("attention transfer (beta 3.0)", 1, "method1"),
    ]


def test_the_teachers_run_is_found_wherever_it_is_named(tmp_path):
    own = make_run(tmp_path / "big", "none", student="large", teacher=None, error=20.0)
    (own / "student.safetensors").touch()
    for name in (str(own), str(own / "student.safetensors")):
        taught = make_run(tmp_path / f"{len(name)}", "at", teacher_weights=name)
        assert [(g.role, g.model) for g in groups_of([taught])] == [("teacher", "large"), ("at", "small")]
    taught = make_run(tmp_path / "by-name", "at")
    assert [g.role for g in groups_of([taught, own])] == ["teacher", "at"]
    _, page = report(tmp_path, [taught], teacher=own)
    assert "Teacher large 20.0" in page.text


# The sentence


def sentence(tmp_path: Path, **errors: list[float]) -> str:
    return summarise(groups_of([f for method, e in errors.items() for f in make_runs(tmp_path, method, e)]))


def test_summary_when_it_helps(tmp_path):
    assert sentence(tmp_path, none=[32, 32.2, 31.8], at=[29, 29.1, 29.2]) == (
        "Attention transfer lowered the test error by 2.9 points: "
        "29.1 ± 0.1 % against 32.0 ± 0.2 % for the student alone (3 seeds each)."
    )


def test_summary_when_it_hurts(tmp_path):
    assert sentence(tmp_path, none=[29, 29.1, 29.2], at=[32, 32.2, 31.8]) == (
        "Attention transfer did not help: the test error came out 2.9 points higher, "
        "32.0 ± 0.2 % against 29.1 ± 0.1 % for the student alone (3 seeds each)."
    )


def test_summary_within_the_noise(tmp_path):
    text = sentence(tmp_path, none=[32, 30, 34], at=[31, 33, 31.5])
    assert text.startswith(
        "Attention transfer made no clear difference to the test error: 31.8 ± 1.0 % against"
    )


def test_summary_of_single_runs_of_several_methods_and_of_what_is_missing(tmp_path):
    assert "which a single run cannot tell from chance" in sentence(tmp_path / "1", none=[32], at=[20])
    assert sentence(tmp_path / "2", none=[32, 32.2], at=[30, 30.2], kd=[32.3, 32.1]) == (
        "Against the student alone with 32.1 ± 0.1 % test error (2 seeds), attention transfer helped "
        "(2.0 points lower) and distillation made no clear difference (0.1 points higher)."
    )
    assert sentence(tmp_path / "3", at=[30]) == (
        "Attention transfer reached 30.0 % test error; there is no finished run of a student alone "
        "with the same model and data to compare with."
    )
    assert "no finished run of a taught student" in sentence(tmp_path / "4", none=[30])
    assert sentence(tmp_path / "5", none=[None], at=[None]).startswith("No run has finished yet")


def test_students_on_other_data_or_for_longer_are_not_compared(tmp_path):
    alone = make_run(tmp_path / "a", "none", error=40.0, epochs=5)
    assert "to compare with" in summarise(groups_of([alone, make_run(tmp_path / "b", "at")]))


def test_welch_interval_where_the_seeds_differ(tmp_path):
    # 95 % quantile of t at 4 degrees of freedom is 2.78; the standard error here is sqrt(2/3) = 0.816.
    for shift, clear in ((2.78 * 0.8165 + 0.02, True), (2.78 * 0.8165 - 0.02, False)):
        alone = [make_run(tmp_path / f"n{shift}{i}", "none", seed=i, error=9.0 + i) for i in range(3)]
        errors = enumerate([9.0 - shift, 10.0 - shift, 11.0 - shift], start=5)
        taught = [make_run(tmp_path / f"a{shift}{i}", "at", seed=i, error=error) for i, error in errors]
        before, after = groups_of([*alone, *taught])
        assert compare(after, before, "test_error").is_clear is clear


def test_paired_interval_where_the_seeds_are_the_same(tmp_path):
    """Differences -1, -2, -3: mean -2, deviation 1; 4.3027 / sqrt(3) = 2.48 does not leave out zero."""
    for spread, clear in ((1.0, False), (0.5, True)):
        errors = {"none": [30.0, 20.0, 10.0], "at": [28.0 + spread, 18.0, 8.0 - spread]}
        folders = [
            f for name, values in errors.items() for f in make_runs(tmp_path / f"{spread}", name, values)
        ]
        before, after = (group for group in groups_of(folders) if group.role != "teacher")
        change = compare(after, before, "test_error")
        assert change.mean == pytest.approx(-2.0)
        assert change.half_width == pytest.approx(4.302653 * spread / 3**0.5)
        assert change.is_clear is clear


def test_a_single_run_is_never_clear(tmp_path):
    folders = [*make_runs(tmp_path, "none", [30.0]), *make_runs(tmp_path, "at", [5.0])]
    before, after = (group for group in groups_of(folders) if group.role != "teacher")
    assert not compare(after, before, "test_error").is_clear


# Charts


def test_axis_ticks_are_round_and_within():
    ticks = Axis(0.03, 0.17, 200, 0).ticks(5)
    assert [label for _, label in ticks] == ["0.05", "0.10", "0.15"]
    assert [label for _, label in Axis(1, 3, 0, 100).ticks(6, whole=True)] == ["1", "2", "3"]


def test_line_chart_has_thin_seeds_a_thick_mean_and_gaps(tmp_path):
    folders = make_runs(tmp_path, "at", [30, 31])
    text = (folders[1] / "metrics.csv").read_text().splitlines()
    text[2] = text[2].rsplit(",", 1)[0] + ","
    (folders[1] / "metrics.csv").write_text("\n".join(text))
    chart = line_chart("Validation error", "%", "val/error", groups_of(folders))
    assert [(line.is_mean, len(line.pieces), len(line.dots)) for line in chart.lines] == [
        (False, 1, 0),
        (False, 0, 2),
        (True, 0, 2),
    ]
    assert [point and point[0] for point in chart.hover["series"][0]["points"]] == [
        "60.5  (60.0 to 61.0)",
        None,
        "20.5  (20.0 to 21.0)",
    ]
    assert line_chart("x", "", "missing", groups_of(folders)) is None


def test_a_curve_goes_through_all_epochs_that_were_kept():
    kept = {0: 0.2, 1: 0.4, 2: 0.5, 4: 0.7, 6: 0.6, 30: 0.8}
    (line,) = draw("Likeness", "cosine", [Series("student", "at", [kept])]).lines
    assert [len(points.split()) for points in line.pieces] == [6]
    assert line.dots == []
    gap = kept | {4: math.nan}
    (line,) = draw("Likeness", "cosine", [Series("student", "at", [gap])]).lines
    assert [len(points.split()) for points in line.pieces] == [3, 2]


def test_runs_that_kept_other_epochs_have_lines_too():
    curves = [
        Series("alone", "alone", [{0: 0.2, 30: 0.4}]),
        Series("taught", "at", [{0: 0.3, 5: 0.5, 30: 1.0}]),
    ]
    chart = draw("Likeness", "cosine", curves)
    assert [([len(points.split()) for points in line.pieces], line.dots) for line in chart.lines] == [
        ([2], []),
        ([3], []),
    ]
    assert [epoch for epoch, _ in chart.hover["x"]] == [0, 5, 30]
    assert chart.hover["series"][0]["points"][1] is None


# The page


def test_report_is_one_accessible_page_without_network(tmp_path):
    folders = [*make_runs(tmp_path, "none", [32, 33]), *make_runs(tmp_path, "at", [30, 30.5])]
    make_run(tmp_path / "at-0" / "teacher", "none", student="large", teacher=None, error=20.0)
    html, page = report(tmp_path, folders, examples=make_examples())
    assert "http:" not in html and "https:" not in html and "@import" not in html and "//cdn" not in html
    sources = [
        attrs.get("src") or attrs.get("href") for _, attrs in page.tags if {"src", "href"} & set(attrs)
    ]
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert len(page.all("img")) == 2 * 2 * 3  # shown, and the most apart
    assert all(attrs.get("alt") for attrs in page.all("img"))
    assert all(a.get("aria-label") for a in page.all("svg"))
    assert all(attrs.get("scope") for attrs in page.all("th"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert page.all("html")[0]["lang"] == "en"
    for words in (
        "small, taught by large",
        "175,066",
        "8,000",
        "1 min 15 s",
        "30.2 ± 0.4",
        "8 × 4 × 4",
        "at 25.0 %",
    ):
        assert words in page.text
    assert "Attention transfer, the term at layer1" in page.text and "0.875" in page.text
    assert len(page.all("details")) == 5 + 1 + 3  # recipes, tables of the curves, confusions


def test_hover_values_are_json(tmp_path):
    _, page = report(tmp_path, make_runs(tmp_path, "at", [30]))
    hover = [json.loads(attrs["data-hover"]) for attrs in page.all("svg") if "data-hover" in attrs]
    assert len(hover) == 4
    assert hover[0]["series"][0]["label"] == "attention transfer"


def test_every_name_is_escaped(tmp_path):
    folder = make_run(tmp_path / "<b>&'run", "at", student=HOSTILE, teacher=HOSTILE + "t", note=HOSTILE)
    text = (folder / "metrics.csv").read_text().replace("train/at/layer1", "train/at/<script>'\"")
    (folder / "metrics.csv").write_text(text.replace("train/at/<script>'\"", '"train/at/<script>\'"""'))
    result = json.loads((folder / "result.json").read_text())
    result["plan"] = [{HOSTILE: HOSTILE, "student": {HOSTILE: [HOSTILE]}}]
    (folder / "result.json").write_text(json.dumps(result))
    html, page = report(tmp_path, [folder], examples=make_examples(HOSTILE, "<script>layer"))
    assert len(page.all("script")) == 1 and not page.all("b")
    assert html.count("<script") == 1
    assert HOSTILE in page.text
    assert page.all("img")[0]["alt"].endswith(HOSTILE)


def test_a_difference_that_may_be_chance_has_a_question_mark(tmp_path):
    _, clear = report(
        tmp_path, [*make_runs(tmp_path, "none", [32, 32.1]), *make_runs(tmp_path, "at", [30, 30.1])]
    )
    assert "−2.0 175,066" in clear.text
    chance = [make_run(tmp_path / "x", "none", error=32), make_run(tmp_path / "y", "at", error=30)]
    assert "−2.0 ? 175,066" in report(tmp_path, chance)[1].text


def test_runs_in_progress_are_shown_as_such(tmp_path):
    folders = [make_run(tmp_path / "a", "none"), make_run(tmp_path / "b", "none", seed=1, error=None)]
    _, page = report(tmp_path, folders)
    assert "1 finished, 1 in progress (epoch 3 of 3)" in page.text
    assert "seed 1 (in progress)" in page.text


def test_large_and_grey_images_are_shown(tmp_path):
    examples = make_examples()
    seen = replace(examples.seen, images=torch.zeros(2, 1, 300, 400, dtype=torch.uint8))
    large = replace(examples, seen=seen)
    html, _ = report(tmp_path, [make_run(tmp_path / "r", "at")], examples=large)
    assert "data:image/jpeg" in html and "aspect-ratio: 400 / 300" in html


def test_report_needs_a_writable_place(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        write_report([make_run(tmp_path / "r", "at")], tmp_path / "file" / "report.html")


def test_importing_loads_nothing_heavy_and_drawing_leaves_pyplot_alone():
    code = (
        "import sys, torch, attention_transfer.visualize as v\n"
        "assert not {'matplotlib', 'jinja2', 'PIL', 'yaml'} & set(sys.modules), 'heavy import'\n"
        "import tempfile\n"
        "v.confusion_matrix(torch.tensor([0]), torch.tensor([0]), ['a'], tempfile.mkdtemp() + '/c.png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules, 'pyplot'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
