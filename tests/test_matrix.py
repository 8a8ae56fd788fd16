"""The models that people have, family by family: the pairs an expert names, and terms that are alive."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from model_matrix import CLASSES, PAGE, ROWS, Row, step
from PIL import Image
from torch import Tensor, nn
from torchvision.models import segmentation
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from attention_transfer import AttentionTransfer, Distiller, Taps, attention_transfer_loss, build_model
from attention_transfer.cli import main
from attention_transfer.models import save_weights
from attention_transfer.pairs import Pair, suggest_pairs
from attention_transfer.runs import Recipe
from attention_transfer.training import train

pytestmark = [
    pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning"),
    pytest.mark.usefixtures("one_thread"),
]

BY_FAMILY = {row.family: row for row in ROWS}
COMPILED_FAST = ["wide ResNet", "ViT (Hugging Face)"]
COMPILED_FOR_REAL = ["ResNet", "MobileNetV3", "ConvNeXt", "MobileViT", "Swin", "ViT"]


def in_tiers(rows: list[Row]) -> list:
    slow = {True: [pytest.mark.slow], False: []}
    return [pytest.param(row, id=row.family, marks=slow[row.slow]) for row in rows]


@pytest.mark.parametrize("row", in_tiers(ROWS))
def test_pairs_and_a_training_step(row: Row) -> None:
    distiller, terms, gradient = step(row)
    assert distiller.pairs == row.expected
    check_alive(distiller, terms, gradient)


def check_alive(distiller: Distiller, terms: dict[str, Tensor], gradient: list[Tensor | None]) -> None:
    """Every pair has a term, all is finite, and the attention terms reach the layers at the pairs."""
    assert [name for name in terms if name != "ce"] == [f"at/{pair.student}" for pair in distiller.pairs]
    assert all(term.isfinite() and term > 0 for term in terms.values())
    named = zip(distiller.student.named_parameters(), gradient, strict=True)
    reached = {name.removeprefix("_orig_mod."): each for (name, _), each in named if each is not None}
    assert all(each.isfinite().all() for each in reached.values())
    for pair in distiller.pairs:
        inside = [each for name, each in reached.items() if name.startswith(pair.student.partition("#")[0])]
        assert not inside or any(each.count_nonzero() for each in inside), pair
    assert sum(bool(each.count_nonzero()) for each in reached.values()) > len(distiller.pairs)


def check_same(row: Row, backend: str) -> None:
    """Compiled, with random layers drawing alike, a step gives what it gives eager."""
    torch.compiler.reset()
    _, eager, expected = step(row)
    distiller, terms, gradient = step(row, backend=backend)
    check_alive(distiller, terms, gradient)
    assert distiller.pairs == row.expected
    for name, term in eager.items():
        if name != "ce":  # dropout before the head may draw in another order
            torch.testing.assert_close(terms[name], term, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(flat(distiller, gradient), flat(distiller, expected), rtol=1e-2, atol=1e-4)


def flat(distiller: Distiller, gradient: list[Tensor | None]) -> Tensor:
    """One vector of norm 1; what the terms do not reach, None or in compiled code zeros, is zero."""
    each = zip(distiller.student.parameters(), gradient, strict=True)
    whole = torch.cat([(torch.zeros_like(like) if g is None else g).flatten() for like, g in each])
    return whole / whole.norm()


@pytest.mark.unchecked
@pytest.mark.parametrize("family", COMPILED_FAST)
def test_compiled(family: str) -> None:
    check_same(BY_FAMILY[family], "eager")


@pytest.mark.slow
@pytest.mark.unchecked
@pytest.mark.parametrize("row", [pytest.param(row, id=row.family) for row in ROWS])
def test_the_whole_matrix_compiled(row: Row) -> None:
    check_same(row, "aot_eager")


@pytest.mark.slow
@pytest.mark.unchecked
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", COMPILED_FOR_REAL)
def test_compiled_by_inductor(family: str) -> None:
    check_same(BY_FAMILY[family], "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("row", [pytest.param(row, id=row.family) for row in ROWS])
def test_preflight_finds_every_term_alive(row: Row) -> None:
    student, teacher = row.models()
    images, labels = row.batch()
    plan = row.distiller(student, teacher, images).preflight(images, labels).plan
    assert [entry.pair for entry in plan.rows] == row.expected


def test_the_page_has_every_row() -> None:
    page = PAGE.read_text(encoding="utf-8").splitlines()
    for row in ROWS:
        line = next(line for line in page if line.startswith(f"| {row.family} |"))
        assert f"{row.expected[-1].student}" in line and line.endswith(f"| yes | yes | {row.note} |"), line


# ------------------------------------------------------------------------------------- auxiliary heads


def test_auxiliary_heads_are_left_alone() -> None:
    student, teacher = (
        torchvision.models.googlenet(weights=None, num_classes=CLASSES, aux_logits=True, init_weights=False)
        for _ in range(2)
    )
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    distiller = Distiller(student, teacher, terms=[AttentionTransfer(1.0)], example_input=images)
    out = distiller(images, labels)
    out.loss.backward()
    assert student.training and student.aux1 is not None
    assert all(parameter.grad is None for parameter in student.aux1.parameters())
    assert [pair.student for pair in distiller.pairs] == [
        "conv3",
        "inception3b",
        "inception4e",
        "inception5b",
    ]


# ---------------------------------------------------------------------- segmentation, detection, backbones


def lraspp(classes: int = CLASSES) -> nn.Module:
    return segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=classes)


def deeplab(classes: int = CLASSES) -> nn.Module:
    return segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=classes, aux_loss=True
    )


BACKBONE = [f"backbone.{place}" for place in (1, 3, 6, 15)]


@pytest.mark.parametrize("classes", [CLASSES, 40])
def test_heads_of_segmentation_models_are_no_stages(classes: int) -> None:
    """40 is what the third stage has of channels: it goes on into other modules, so it is no head."""
    images = torch.randn(2, 3, 64, 64)
    pairs = suggest_pairs(lraspp(classes), deeplab(classes), images)
    assert pairs == [Pair(name, name) for name in BACKBONE]


def test_a_segmentation_model_learns_from_labels_of_each_pixel() -> None:
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(CLASSES, (2, 64, 64))
    labels[:, :8] = -100
    distiller = Distiller(lraspp(), deeplab(), terms=[AttentionTransfer(1.0)], example_input=images)
    assert distiller.preflight(images, labels).plan.rows[0].pair == Pair(BACKBONE[0], BACKBONE[0])
    out = distiller(images, labels)
    assert out.logits.shape == (2, CLASSES, 64, 64)
    kept = labels != -100
    expected = nn.functional.cross_entropy(out.logits.movedim(1, -1)[kept], labels[kept])
    torch.testing.assert_close(out.terms["ce"], expected)
    gradient = torch.autograd.grad(
        sum(term for name, term in out.terms.items() if name != "ce"),
        next(distiller.student.parameters()),
    )[0]
    assert gradient.isfinite().all() and gradient.count_nonzero()


def test_labels_of_each_pixel_that_do_not_fit() -> None:
    images = torch.randn(2, 3, 64, 64)
    distiller = Distiller(lraspp(), deeplab(), terms=[AttentionTransfer(1.0)], example_input=images)
    with pytest.raises(ValueError, match=r"labels of shape \(2, 64, 64\), as the .* got \(2, 32, 32\)"):
        distiller.preflight(images, torch.randint(CLASSES, (2, 32, 32)))
    with pytest.raises(ValueError, match="expected labels that count, got none"):
        distiller.preflight(images, torch.full((2, 64, 64), -100))
    with pytest.raises(ValueError, match=r"logits \(b, k\), got OrderedDict"):
        distiller(images, torch.tensor([0, 1]))


def fpn(depth: int) -> nn.Module:
    return resnet_fpn_backbone(backbone_name=f"resnet{depth}", weights=None, trainable_layers=5)


def features_only(name: str, **options: object) -> nn.Module:
    return timm.create_model(name, features_only=True, **options)


BACKBONES = {
    "fpn": (lambda: (fpn(18), fpn(18)), [f"body.layer{i}" for i in (1, 2, 3, 4)]),
    "features_only": (
        lambda: (features_only("mobilenetv3_small_050"), features_only("mobilenetv3_small_075")),
        ["blocks.0", "blocks.1", "blocks.3", "blocks.4"],
    ),
    "features_only, of the last stage": (  # whose map is all there is, and no head
        lambda: (features_only("resnet18", out_indices=[4]), features_only("resnet18", out_indices=[4])),
        [f"layer{i}" for i in (1, 2, 3, 4)],
    ),
    "features_only, channels first and LayerNorm": (
        lambda: (features_only("convnext_atto"), features_only("convnext_femto")),
        [f"stages_{i}" for i in range(4)],
    ),
}


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_backbone_of_maps_without_logits(kind: str) -> None:
    build, layers = BACKBONES[kind]
    student, teacher = build()
    images = torch.randn(2, 3, 64, 64)
    pairs = suggest_pairs(student, teacher, images)
    assert pairs == [Pair(name, name) for name in layers]
    with Taps(student, layers) as mine, Taps(teacher, layers) as theirs:
        student(images)
        with torch.no_grad():
            teacher(images)
        ours, others = mine.pop(), theirs.pop()
    attention_transfer_loss(list(ours.values()), list(others.values()), beta=1.0).backward()
    first = next(student.parameters()).grad
    assert first is not None and first.isfinite().all() and first.count_nonzero()


# ------------------------------------------------------------------------------------------ the command

SMALL = ["--student", "small_models:resnet", "--teacher", "small_models:wide_resnet"]


def test_the_command_shows_pairs_of_hugging_face_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pairs", *SMALL, "--input-size", "64"]) == 0
    assert "resnet.encoder.stages.3" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["small_models:vit", "timm:convnext_atto"])
def test_the_command_draws_maps(name: str, tmp_path: Path) -> None:
    save_weights(build_model(name), tmp_path / "weights.safetensors")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    call = ["maps", tmp_path / "red.png", "--weights", tmp_path / "weights.safetensors", "--model", name]
    call += ["--num-classes", 10, "--image-size", 64, "-o", tmp_path]
    assert main([str(argument) for argument in call]) == 0
    assert (tmp_path / "red-maps.png").is_file()


@pytest.mark.slow
def test_training_between_hugging_face_models(tiny: Recipe, tmp_path: Path) -> None:
    pair = {"student": "small_models:resnet", "teacher": "small_models:wide_resnet"}
    recipe = replace(tiny, **pair, method="at+kd", output=str(tmp_path / "run"))
    run = train(recipe, say=lambda _: None)
    assert (run.folder / "student.safetensors").is_file()
    assert 0 <= run.result["test_error"] <= 100
