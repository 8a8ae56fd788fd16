"""The command as its users meet it: help, exit statuses, one-line errors, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_latency import spoil

from attention_transfer.cli import VERBS, main
from attention_transfer.runs import Recipe, Run
from attention_transfer.training import train
from attention_transfer.training.telling import say_text

pytestmark = [
    pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ATTENTION_TRANSFER_DEBUG", raising=False)


@pytest.fixture(scope="module")
def base(tiny: Recipe) -> Recipe:
    return tiny


@pytest.fixture(scope="module")
def alone(base: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(replace(base, output=str(tmp_path_factory.mktemp("runs") / "alone")), say=lambda _: None)


@pytest.fixture(scope="module")
def taught(base: Recipe, alone: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "taught"
    recipe = replace(base, method="at", teacher=str(alone.folder), output=str(folder))
    return train(recipe, say=lambda _: None)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on stderr of a command that ends with status 2."""
    assert main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert err.startswith("attention-transfer: ")
    return err.removeprefix("attention-transfer: ").strip()


def output(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command prints that ends with status 0."""
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


# Help


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_overview_teaches(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, *arguments)
    for name, summary in VERBS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", text, re.MULTILINE)
    assert "attention-transfer demo\n" in text
    assert "attention-transfer train --data" in text


@pytest.mark.parametrize("verb", ["demo", "train", "evaluate", "pairs", "maps", "report"])
def test_each_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(output(capsys, verb, "--help").split())
    assert f"usage: attention-transfer {verb}" in text
    assert f"{VERBS[verb]}. Example: attention-transfer {verb}" in text


def test_train_help_lists_every_field_with_text_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(output(capsys, "train", "--help").split())
    for field in fields(Recipe):
        assert f"--{field.name.replace('_', '-')} " in text, field.name
    assert "Weight decay of SGD, on every parameter. (type: float, default: 0.0005)" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", output(capsys, "--version"))


def test_help_and_refusals_load_nothing_heavy() -> None:
    calls = [[], ["--help"], ["--version"], ["trian"], *([verb, "--help"] for verb in VERBS)]
    calls += [["train", "--print-config"], ["train", "--epoch-s", "3"], ["train", "--resume", "nowhere"]]
    code = f"""
import contextlib, sys
from attention_transfer.cli import main

for call in {calls}:
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        main(call)
    heavy = {{"torch", "numpy", "lightning", "matplotlib"}} & sys.modules.keys()
    assert not heavy, (call, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Flags and recipes


def test_print_config_round_trip(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--weight-decay", "1e-3", "--max-train=50", "--milestones", "[0.5]", "--flip", "false"]
    text = output(capsys, "train", *flags, "--print-config")
    (tmp_path / "recipe.yaml").write_text(text)
    expected = Recipe(weight_decay=1e-3, max_train=50, milestones=(0.5,), flip=False)
    assert Recipe.load(tmp_path / "recipe.yaml") == expected
    assert output(capsys, "train", "--config", "recipe.yaml", "--print-config") == text


def test_flags_override_the_config_whatever_their_order(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text("lr: 0.3\nepochs: 7\n")
    for arguments in (["--lr", "0.5", "--config", "recipe.yaml"], ["--config=recipe.yaml", "--lr=0.5"]):
        text = output(capsys, "train", *arguments, "--print-config")
        assert "lr: 0.5\n" in text
        assert "epochs: 7\n" in text


def test_switches_need_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "train", "--compile", "--nesterov", "--print-config")
    assert "compile: true\n" in text
    assert "nesterov: true\n" in text
    assert "compile: false\n" in output(capsys, "train", "--compile", "false", "--print-config")


def test_underscores_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    assert "weight_decay: 0.25\n" in output(capsys, "train", "--weight_decay", "0.25", "--print_config")


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown verb 'trian'. Did you mean train?"),
        (["train", "--epoch-s", "3"], "train: unknown argument --epoch-s. Did you mean --epochs"),
        (["evaluate", "nowhere"], "evaluate: expected a run folder or a weights file, got nowhere"),
        (["train", "--weight-decay", "much"], "train: --weight-decay: Expected a float. Got value: much"),
        (["train", "--method", "ta"], 'Recipe: expected method "none" or some of at, kd, f-actt'),
        (["train", "--lr", "-1"], "Recipe: expected lr > 0, got -1.0. Change --lr."),
        (["train", "--lr"], "train: argument --lr: expected one argument"),
        (["train", "--config", "none.yaml"], "Recipe.load: expected a YAML recipe, got none.yaml"),
        (["train", "--resume", "nowhere"], "Run: expected a run folder, got "),
        (
            ["train", "--resume", "r", "--lr", "1"],
            "train: --resume goes on with the run's own recipe, got --lr",
        ),
        (["train", "--data", "cifra10"], "load_data: "),
        (["train", "--data", "cifar10", "--batch-size", "1"], "Recipe: expected batch_size >= 2"),
        (["evaluate"], "evaluate: "),
        (["evaluate", "none.safetensors", "--data", "mnist-5k"], ""),
        (["pairs", "--student", "resnet18"], "pairs: "),
        (["pairs", "--student", "wrn-16-1", "--teacher", "wrn-161"], "build_model: "),
        (["pairs", "--student", "wrn-16-1", "--teacher", "wrn-16-2", "--input-size", "0"], "pairs: expected"),
        (["maps", "none.png", "--weights", "none.safetensors"], ""),
        (["maps", "none.png"], "maps: expected --weights or --teacher-weights, got neither."),
        (
            ["maps", "none.png", "--teacher-weights", "w", "--model", "wrn-16-1"],
            "maps: expected --weights beside --model, got none.",
        ),
        (
            ["maps", "none.png", "--weights", "w", "--teacher", "wrn-16-1"],
            "maps: expected --teacher-weights beside --teacher, got none.",
        ),
        (["report", "nowhere"], "Run: expected a run folder, got nowhere"),
        (["demo", "--what"], "demo: unknown argument --what."),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, *arguments).startswith(message)


def test_weights_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    Path("w.safetensors").touch()
    message = refused(capsys, "evaluate", "w.safetensors")
    assert message == "evaluate: a weights file says nothing of the images. Pass --data."


def test_bad_model_names_list_near_matches(base: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "train", "--data", base.data, "--student", "resnet81", "--method", "none")
    assert "resnet18" in message
    assert not Path("runs").exists()


def test_unknown_layer(base: Recipe, alone: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (Path("recipe.yaml")).write_text(replace(base, method="at", teacher=str(alone.folder)).to_yaml())
    message = refused(
        capsys, "train", "--config", "recipe.yaml", "--pairs", "gruop1:group1", "--output", "run"
    )
    assert "group1" in message


def test_damaged_weights(base: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.safetensors").write_bytes(b"not weights")
    arguments = ["--model", "wrn-10-1", "--data", base.data]
    assert "bad.safetensors" in refused(capsys, "evaluate", "bad.safetensors", *arguments)


def test_folder_of_one_class(capsys: pytest.CaptureFixture[str]) -> None:
    Path("images/only").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save("images/only/0.png")
    refused(capsys, "train", "--data", "images", "--output", "run")
    assert not Path("run").exists()


def plain_training(base: Recipe) -> list[str]:
    return ["train", "--data", base.data, "--student", base.student, "--method", "none"]


def test_run_folder_that_exists(alone: Run, base: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, *plain_training(base), "--output", alone.folder)
    assert "--resume" in message
    assert "--overwrite" in message


def test_run_folder_that_cannot_be_made(base: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    message = refused(capsys, *plain_training(base), "--output", "file/run")
    assert message.startswith("Not a directory: ")


def test_a_bug_is_not_taken_for_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: list[str]) -> None:
        int("x")

    monkeypatch.setattr("attention_transfer.cli.train.run", broken)
    with pytest.raises(ValueError, match="invalid literal"):
        main(["train"])


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="unknown verb"):
        main(["trian", "--debug"])


# Verbs


def test_train_from_flags(base: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--student",
        "wrn-10-1",
        "--method",
        "none",
        "--epochs",
        1,
        "--batch-size",
        10,
        "--max-train",
        20,
    ]
    text = output(capsys, "train", "--data", base.data, *flags, "--output", "run")
    assert re.search(r"^epoch 1/1  loss \d", text, re.MULTILINE)
    assert f"run folder: {Path('run').absolute()}" in text
    assert Run(Path("run")).finished
    assert "is finished" in output(capsys, "train", "--resume", "run")


def test_train_keeps_freed_memory_unless_told_otherwise(
    base: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attention_transfer.cli.memory.keep_freed_memory", lambda: print("kept"))
    arguments = ["train", "--data", base.data, "--student", "wrn-10-1", "--method", "none", "--epochs", "1"]
    arguments += ["--max-train", "20", "--batch-size", "10", "--accelerator", "cpu", "--output", "run"]
    text = output(capsys, *arguments, "--keep-memory", "false")
    assert re.search(r"^speed: .*, channels-last, freed memory \w+", text, re.MULTILINE)
    assert "kept\n" not in text
    Path("run/result.json").unlink()
    assert "kept\n" not in output(capsys, "train", "--resume", "run", "--keep_memory=false")
    Path("run/result.json").unlink()
    assert output(capsys, "train", "--resume", "run").startswith("kept\nspeed: ")
    assert output(capsys, *arguments, "--overwrite").startswith("kept\nspeed: ")


def test_evaluate_a_run_equals_its_result(alone: Run, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "evaluate", alone.folder, "--plot", "plots/confusion.png")
    result = alone.result
    assert f"top-1 error {result['test_error']:.2f} %\n" in text
    assert "top-5" not in text  # of three classes it says nothing
    assert result["test_top5_error"] is None
    assert re.search(r"^green +4 +\d", text, re.MULTILINE)
    assert Path("plots/confusion.png").stat().st_size > 1000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_no_answers(
    taught: Run, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(taught.folder, "run")
    spoil(Run(Path("run")), value)
    counted = r"got NaN or infinite ones for 12 of 12 images, the first of which is number 1\."
    for arguments in (
        ["run"],
        ["run", "--latency"],
        ["run/student.safetensors", "--data", taught.recipe.data],
    ):
        message = refused(capsys, "evaluate", *arguments)
        assert re.match(f"evaluate_model: expected finite logits from the model, {counted}", message)
    message = refused(capsys, "report", "run")
    role = "the student with attention transfer"
    assert re.match(f"collect_examples: expected finite logits from {role}, {counted}", message)


def test_evaluate_a_weights_file(alone: Run, base: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "evaluate", alone.student_weights, "--data", base.data)
    assert f"top-1 error {alone.result['test_error']:.2f} %" in text


def test_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "pairs", "--student", "wrn-16-1", "--teacher", "wrn-16-2", "--input-size", 32)
    assert "group2 <- group2" in text
    assert "64 x 8 x 8" in text


def test_maps(taught: Run, alone: Run, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = image_folder / "red" / "0.png"
    text = output(
        capsys, "maps", image, "--weights", taught.folder, "--teacher-weights", alone.folder, "-o", "maps"
    )
    assert text.strip() == "maps/0-maps.png"
    both = size_of("maps/0-maps.png")
    output(capsys, "maps", image, "--weights", taught.folder, "--layers", "group1", "-o", "maps")
    assert size_of("maps/0-maps.png") < both


def test_maps_of_all_images_in_one_picture(
    taught: Run, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [image_folder / "red" / f"{i}.png" for i in range(3)]
    weights = ["--weights", taught.folder, "--layers", "group1"]
    output(capsys, "maps", *images, *weights, "-o", "each")
    assert output(capsys, "maps", *images, *weights, "-o", "all.png") == "all.png\n"
    one, (width, height) = size_of("each/0-maps.png"), size_of("all.png")
    assert len(list(Path("each").iterdir())) == 3
    assert width == one[0] and height > 2 * one[1]
    output(capsys, "maps", *images, *weights, "--tile", 32, "-o", "all.png")
    assert size_of("all.png")[0] < width
    assert "tile of 1 pixel or more, got 0" in refused(capsys, "maps", *images, *weights, "--tile", 0)


def test_maps_of_images_that_are_called_alike(
    taught: Run, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture each, which are those of the images alone."""
    places = ["a/x.png", "b/x.png", "b/X.jpg", "x-1.png", "y.png"]
    for place, colour in zip(places, ("red", "green", "blue", "red", "green"), strict=True):
        Path(place).parent.mkdir(exist_ok=True)
        Image.open(image_folder / colour / "1.png").save(place)
    weights = ["--weights", taught.folder, "--layers", "group1"]
    assert main(["maps", *places, *map(str, weights), "-o", "each"]) == 0
    said = capsys.readouterr()
    names = ["x-2", "x-3", "X-4", "x-1", "y"]
    assert said.out.splitlines() == [f"each/{name}-maps.png" for name in names]
    notes = [f"each/{name}-maps.png is of {place}" for name, place in zip(names[:3], places[:3], strict=True)]
    assert said.err.splitlines() == [f"note: {note}, as several are called alike" for note in notes]
    for name, place in zip(names, places, strict=True):
        path = output(capsys, "maps", place, *weights, "-o", f"alone-{name}").strip()
        found, wanted = (pixels(each) for each in (f"each/{name}-maps.png", path))
        assert found.shape == wanted.shape and np.abs(found - wanted).max() <= 8  # rounding of a batch


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_maps_take_no_images_place(
    taught: Run, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Path(shutil.copy(image_folder / "red" / "0.png", "0-maps.png"))
    before = image.read_bytes()
    weights = ["--weights", str(taught.folder), "--layers", "group1"]
    for words in (
        ["0-maps.png", "-o", "0-maps.png"],
        ["0-maps.png", image_folder / "red" / "0.png", "-o", "."],
    ):
        assert "expected an --output beside the images, got 0-maps.png, which is one" in refused(
            capsys, "maps", *words, *weights
        )
    assert image.read_bytes() == before


def test_maps_take_the_size_that_pretrained_weights_say(
    image_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("own_net.py").write_text(
        "import attention_transfer as at\n"
        "def build(pretrained):\n"
        "    net = at.build_model('wrn-10-1')\n"
        "    net.pretrained_cfg = {'input_size': (3, 176, 176)}\n"
        "    return net\n"
    )
    monkeypatch.syspath_prepend(".")
    image = image_folder / "red" / "0.png"
    options = ["--model", "own_net:build", "--weights", "pretrained", "--layers", "group2", "-o", "maps.png"]
    output(capsys, "maps", image, *options)
    assert size_of("maps.png")[0] == 2 * 16 + 2 * 176 + 22


def size_of(path: str) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_maps_of_what_is_no_image(taught: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.png").write_text("no image")
    assert "text.png is not a readable image" in refused(
        capsys, "maps", "text.png", "--weights", taught.folder
    )
    assert "none.png" in refused(capsys, "maps", "none.png", "--weights", taught.folder)


def test_report_with_maps(taught: Run, alone: Run, capsys: pytest.CaptureFixture[str]) -> None:
    output(capsys, "report", alone.folder, taught.folder, "-o", "report.html")
    page = Path("report.html").read_text()
    assert "data:image/" in page
    assert "group2" in page


def test_report_of_a_run_alone(alone: Run, capsys: pytest.CaptureFixture[str]) -> None:
    output(capsys, "report", alone.folder, "-o", "report.html")
    assert Path("report.html").is_file()


OWN_MODEL = """
from torch import nn

def build(num_classes, in_channels):
    def stage(c_in, c_out):
        return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.BatchNorm2d(c_out), nn.ReLU())
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes)]
    return nn.Sequential(stage(in_channels, 8), stage(8, 16), *head)

class Verbose(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.body = build(num_classes, in_channels)

    def forward(self, x):
        return self.body(x), "and more than logits"
"""


@pytest.mark.parametrize("student", ["mynet:build", "mynet:Verbose", "timm:resnet10t"])
def test_a_model_of_your_own_and_one_of_timm_learn_without_glue(
    student: str, base: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mynet.py").write_text(OWN_MODEL)
    recipe = replace(base, student=student, teacher="timm:resnet18", method="at", image_size=32, output="run")
    Path("recipe.yaml").write_text(recipe.to_yaml())
    trust = ["--trust", student] if student.startswith("mynet") else []
    text = output(capsys, "train", "--config", "recipe.yaml", *trust)
    assert re.search(r"<- layer1 .* ce \d+%, at/", text)
    assert float(Run(Path("run")).read_metrics()[0]["train/loss"]) > 0
    assert output(capsys, "evaluate", "run", *trust).startswith(f"{student} on the 12 test images")


@pytest.mark.parametrize(("error", "words"), [(99.0, "-"), (-1.0, "The teacher did not help")])
def test_train_compares_with_the_student_alone_beside_it(
    alone: Run, base: Recipe, error: float, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(alone.folder, "runs/alone")
    result = Path("runs/alone/result.json")
    result.write_text(json.dumps(alone.result | {"test_error": error}))
    taught = replace(base, method="at", teacher=str(alone.folder), output="runs/taught")
    Path("recipe.yaml").write_text(taught.to_yaml())
    text = output(capsys, "train", "--config", "recipe.yaml")
    assert re.search(rf"^student alone {error:.2f} % \(alone\): .*{words}", text, re.MULTILINE)
    assert "student alone" in Path("runs/taught/report.html").read_text()


def test_demo_composes_and_reuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole demo, with less of everything."""
    from attention_transfer.training import demo

    small = {"epochs": 1, "max_train": 20, "batch_size": 10}
    monkeypatch.setattr(demo, "TEACHER", replace(demo.TEACHER, student="wrn-10-1", **small))
    monkeypatch.setattr(demo, "STUDENT", replace(demo.STUDENT, student="wrn-10-1", **small))
    monkeypatch.setattr(demo, "SEEDS", (0, 1))
    text = output(capsys, "demo", "--output", "demo")
    assert re.search(r"^student with attention transfer, wrn-10-1 +77,562 +\d", text, re.MULTILINE)
    assert re.search(r"^Attention transfer .*test error.*\(2 seeds each\)", text, re.MULTILINE)
    assert Path(text.strip().splitlines()[-1].removeprefix("report: ")).is_file()
    stamps = {path: path.stat().st_mtime_ns for path in Path("demo").rglob("last.ckpt")}
    assert len(stamps) == 5
    Path("demo/at-1/result.json").unlink()
    output(capsys, "demo", "--output", "demo")
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


# What is said


def said_by_train(base: Recipe, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    Path("recipe.yaml").write_text(replace(base, method="none", epochs=2, output="run").to_yaml())
    assert main(["train", "--config", "recipe.yaml", *flags]) == 0
    return capsys.readouterr().out


def test_json_for_scripts(base: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    events = [json.loads(line) for line in said_by_train(base, capsys, "--progress", "json").splitlines()]
    epochs = [event for event in events if event["event"] == "epoch"]
    assert [event["epoch"] for event in epochs] == [1, 2]
    assert epochs[0]["seconds_left"] > 0 == epochs[1]["seconds_left"]
    assert epochs[0]["train/loss"] == pytest.approx(float(Run(Path("run")).read_metrics()[0]["train/loss"]))
    assert events[-1]["event"] == "result"
    assert events[-1]["test_error"] == Run(Path("run")).result["test_error"]
    assert Path(events[-1]["report"]).is_file()
    assert {event["event"] for event in events} == {"note", "epoch", "result"}


def test_quiet_says_nothing(base: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert said_by_train(base, capsys, "--progress", "none") == ""
    assert Run(Path("run")).finished


def test_lines_say_the_time_that_is_left(base: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said_by_train(base, capsys, "--progress", "lines").splitlines()
    first, second = (line for line in lines if line.startswith("epoch "))
    assert re.search(r"images/s  \d+ s left$", first)
    assert second.endswith("images/s")


# Ctrl-C


def test_ctrl_c_saves_and_says_how_to_resume(base: Recipe) -> None:
    Path("recipe.yaml").write_text(replace(base, epochs=10_000, output="run").to_yaml())
    command = [sys.executable, "-m", "attention_transfer", "train", "--config", "recipe.yaml"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(Path("run/metrics.csv"), process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "\nStopped; nothing is lost. Go on with: attention-transfer train --resume run\n"
    checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] >= 4


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colours_are_for_terminals(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NO_COLOR": "", "TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "attention_transfer", "no-such-verb"]
    assert subprocess.run(command, stderr=theirs, stdout=subprocess.DEVNULL).returncode == 2
    with monkeypatch.context() as patch, os.fdopen(theirs, "w") as terminal:
        patch.setattr(sys, "stdout", terminal)
        say_text("a line\nwarning: of a warning:")
    said = ""
    with suppress(OSError), os.fdopen(ours, "rb", buffering=0) as terminal:  # its end, once nobody writes
        while part := terminal.read(1000):
            said += part.decode()
    if environment:
        assert "\033" not in said
    else:
        assert "\033[31mattention-transfer:\033[0m unknown verb" in said
        assert "a line\r\n\033[33mwarning:\033[0m of a warning:\r\n" in said


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK"])
def test_errors_say_which_process_speaks(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "1")
    assert main(["no-such-verb"]) == 2
    assert capsys.readouterr().err.startswith("attention-transfer: process 1: unknown verb")


def test_a_pipe_gets_no_colours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert main(["no-such-verb"]) == 2
    say_text("warning: a")
    said = capsys.readouterr()
    assert said.err.startswith("attention-transfer: unknown verb") and said.out == "warning: a\n"
