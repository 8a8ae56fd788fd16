"""Networks that take images of one size alone: built for that of the data, fed in their own, or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attention_transfer.cli import main
from attention_transfer.models import build_model, fingerprint, native_size, save_weights, why_not
from attention_transfer.runs import Recipe, Run
from attention_transfer.training import train
from attention_transfer.training.build import build_teacher, load_splits
from attention_transfer.training.card import ModelCard
from attention_transfer.training.evaluation import evaluate_model

timm = pytest.importorskip("timm")

pytestmark = [
    pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning"),
    pytest.mark.usefixtures("one_thread"),
]

VIT = "timm:test_vit3"  # of 160 pixels; these tests have 16 and 32
FACTORIES = """
import attention_transfer as at
from torch import nn


class Fixed(nn.Module):
    def __init__(self, num_classes, image_size):
        super().__init__()
        self.layer = nn.Linear(3 * image_size * image_size, num_classes)

    def forward(self, x):
        return self.layer(x.flatten(1))


def fixed(num_classes=10, image_size=24):
    return Fixed(num_classes, image_size)


def grey(num_classes=10):
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

def rigid(num_classes=10):
    return Fixed(num_classes, 24)
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sized_models.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("size", [16, 48, 160, (32, 48)])
def test_a_vision_transformer_is_built_for_the_size_of_its_images(size: int | tuple[int, int]) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    model = build_model(VIT, num_classes=5, image_size=size).eval()
    assert model(torch.zeros(1, 3, height, width)).shape == (1, 5)
    assert model.pos_embed.shape[1] == (height // 16) * (width // 16) + model.num_prefix_tokens


def test_other_models_are_the_same_for_every_size(factories: None) -> None:
    for name in ("wrn-10-1", "timm:test_resnet", "torchvision:squeezenet1_1"):
        torch.manual_seed(0)
        plain = fingerprint(build_model(name))
        torch.manual_seed(0)
        assert fingerprint(build_model(name, image_size=96)) == plain
    assert build_model("sized_models:fixed", image_size=8).layer.in_features == 3 * 64
    assert build_model("sized_models:fixed").layer.in_features == 3 * 24 * 24
    assert build_model("sized_models:rigid", image_size=8).layer.in_features == 3 * 24 * 24
    for wrong in (0, (8,), "8", 8.0):
        with pytest.raises(ValueError, match="expected image_size as a number of pixels or"):
            build_model("wrn-10-1", image_size=wrong)


def test_torchvisions_vision_transformers() -> None:
    pytest.importorskip("torchvision")
    model = build_model("torchvision:vit_b_32", num_classes=3, image_size=64).eval()
    assert native_size(model) == (64, 64)
    assert why_not(model, (3, 64, 64)) is None
    assert "224" not in str(why_not(model, (3, 96, 96)))


def run_of(tiny: Recipe, folder: Path, **settings: object) -> Run:
    recipe = replace(tiny, output=str(folder), batch_size=20, epochs=1, **settings)
    return train(recipe, say=lambda line: None)


@pytest.fixture(scope="module")
def vit(tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained transformer for images of 32 pixels."""
    return run_of(tiny, tmp_path_factory.mktemp("runs") / "vit", student=VIT, image_size=32)


def test_a_run_folder_rebuilds_the_same_network(
    vit: Run, tiny: Recipe, tmp_path: Path, capsys: object
) -> None:
    card = ModelCard.read(vit.folder)
    assert card.image_size == [32, 32]
    assert card.build(vit.folder).pos_embed.shape[1] == 4 + 1
    assert main(["evaluate", str(vit.folder)]) == 0
    assert main(["evaluate", str(vit.student_weights), "--data", tiny.data]) == 0  # of 16 pixels
    image = f"{tiny.data}/red/0.png"
    for size in ([], ["--image-size", "64"]):
        assert main(["maps", image, "--weights", str(vit.folder), "-o", str(tmp_path), *size]) == 0


def test_a_teacher_sees_images_of_its_own_size(vit: Run, tiny: Recipe, tmp_path: Path) -> None:
    recipe = replace(tiny, method="at+kd", teacher=str(vit.folder), resize="teacher")
    splits = load_splits(recipe)
    assert splits.shape == (3, 16, 16)
    teacher = build_teacher(recipe, splits, lambda: pytest.fail("it is there"))
    assert teacher.transform.size == (32, 32)
    assert teacher.transform(torch.zeros(2, 3, 16, 16)).shape == (2, 3, 32, 32)
    taught = run_of(tiny, tmp_path / "run", method="kd", teacher=str(vit.folder))
    assert taught.finished
    assert main(["report", str(taught.folder), "-o", str(tmp_path / "report.html")]) == 0


def test_weights_without_a_card_are_of_their_usual_size_or_of_the_datas(tiny: Recipe, tmp_path: Path) -> None:
    splits = load_splits(tiny)
    for size, seen in ((None, (160, 160)), (16, None)):
        model = build_model(VIT, num_classes=3, image_size=size)
        save_weights(model, tmp_path / "w.safetensors")
        recipe = replace(tiny, method="kd", teacher=VIT, teacher_weights=str(tmp_path / "w.safetensors"))
        teacher = build_teacher(recipe, splits, lambda: pytest.fail("it is there"))
        assert fingerprint(teacher.model) == fingerprint(model)
        assert (teacher.transform and teacher.transform.size) == seen
        words = ["evaluate", str(tmp_path / "w.safetensors"), "--model", VIT, "--data", tiny.data]
        assert main(words) == 0


def test_a_transformer_teaches_a_smaller_one_of_the_same_images(tiny: Recipe, tmp_path: Path) -> None:
    run = run_of(
        tiny,
        tmp_path / "run",
        student=VIT,
        teacher="timm:test_vit_relpos",
        method="at",
        image_size=32,
        teacher_epochs=1,
    )
    assert ModelCard.read(run.teacher.folder).image_size == [32, 32]
    assert [row["student_shape"][1:] for row in run.result["plan"]] == [[2, 2]] * len(run.result["plan"])


def test_what_takes_no_such_images_is_refused_in_one_line(
    tiny: Recipe, factories: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", tiny.data, "--output", str(tmp_path / "run"), "--trust", "sized_models:rigid"]
    for words in (
        ["train", *flags, "--student", "sized_models:rigid", "--method", "none"],
        ["train", *flags, "--student", "wrn-10-1", "--teacher", "sized_models:rigid"],
        ["pairs", "--student", "sized_models:rigid", "--teacher", "wrn-10-1", "--input-size", "16"],
    ):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "sized_models:rigid" in line and "fails" in line and "shapes cannot be multiplied" in line
    model = build_model("sized_models:rigid", num_classes=3)
    save_weights(model, tmp_path / "w.safetensors")
    named = ["--model", "sized_models:rigid"]
    assert main(["evaluate", str(tmp_path / "w.safetensors"), *named, "--data", tiny.data]) == 2
    assert "expected images that it takes, got 3 x 16 x 16" in capsys.readouterr().err
    assert main(["pairs", "--student", VIT, "--teacher", VIT, "--input-size", "48"]) == 0
    assert "96 x 3 x 3" in capsys.readouterr().out


def test_images_of_other_channels_are_refused_in_one_line(
    tiny: Recipe, factories: None, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, weights = "sized_models:grey", str(tmp_path / "w.safetensors")
    save_weights(build_model(name, num_classes=3), weights)
    flags = ["--data", tiny.data, "--output", str(tmp_path / "run"), "--trust", name]
    wanted = (
        "of images with 3 channels, as the data, got sized_models:grey, which takes 1. Pass another model"
    )
    takes = "sized_models:grey: expected images of 1 channels, got 3. Pass such images, or another model."
    classes = ["--num-classes", "3", "-o", str(tmp_path / "maps")]
    for words, message in (
        (["train", *flags, "--student", name, "--method", "none"], f"expected a student {wanted}"),
        (["train", *flags, "--student", "wrn-10-1", "--teacher", name], f"expected a teacher {wanted}"),
        (
            ["train", *flags, "--student", "wrn-10-1", "--teacher", name, "--teacher-weights", weights],
            f"expected a teacher {wanted}",
        ),
        (["evaluate", weights, "--model", name, "--data", tiny.data], takes),
        (
            ["maps", str(image_folder / "red" / "0.png"), "--weights", weights, "--model", name, *classes],
            takes,
        ),
        (
            ["pairs", "--student", "wrn-10-1", "--teacher", name, "--input-size", "16"],
            "pairs: expected a model of images with 3 channels, got sized_models:grey, which takes 1",
        ),
    ):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    with pytest.raises(
        ValueError, match="evaluate_model: expected images of 1 channels, as the model takes, g"
    ):
        evaluate_model(build_model(name), [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))], lambda x: x)


def test_an_export_is_of_the_same_size(vit: Run, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = ["export", str(vit.folder), "--format", "safetensors,torch,timm", "-o", str(output)]
    assert main(words) == 0
    config = json.loads((output / "timm" / "config.json").read_text())
    assert config["model_args"]["img_size"] in (32, [32, 32])
    assert "image_size=(32, 32)" in (output / "README.md").read_text()


# Every family of timm that has a size of its own; crossvit takes any as it is, efficientformer its own alone.
TAKES_ITS_OWN = ("efficientformer",)


def fixed_models() -> dict[str, str]:
    """The smallest model, by its name, of each module of timm with models of a fixed size."""
    found: dict[str, str] = {}
    for name in timm.list_models():
        own = timm.get_pretrained_cfg(name)
        if own is not None and own.fixed_input_size:
            module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
            found.setdefault(module, name)
    return found


@pytest.mark.slow
def test_every_family_of_timm_of_a_fixed_size() -> None:
    families, size = fixed_models(), 96
    assert len(families) > 30
    refused = set()
    for family, name in families.items():
        with torch.device("meta"):
            model = build_model(f"timm:{name}", image_size=size)
            try:
                model.eval()(torch.zeros(1, 3, size, size))
            except RuntimeError:
                refused.add(family)
    assert refused == set(TAKES_ITS_OWN)
