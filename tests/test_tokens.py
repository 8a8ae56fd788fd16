"""Tokens: the grid, what stands around it, and the order, as the model says or as its answers show."""

from __future__ import annotations

import functools
import math
import re
import warnings
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from small_models import Registers
from torch import Tensor, nn

from attention_transfer import AttentionTransfer, Distiller, attention_map
from attention_transfer.locality import find_order
from attention_transfer.pairs import stage_ends, stages_to_store
from attention_transfer.preflight import PreflightWarning
from attention_transfer.taps import Taps, resolve

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def tapped(model: nn.Module, x: Tensor, *names: str, **options: Any) -> list[Tensor]:
    with torch.no_grad(), Taps(model, names, **options) as taps:
        model(x)
        return list(taps.pop().values())


# ------------------------------------------------------------------------------ what timm's models say

TIMM = {
    "vit_tiny_patch16_224": {"img_size": (64, 96), "depth": 2},
    "vit_base_patch14_reg4_dinov2": {"img_size": 70, "depth": 2, "embed_dim": 64, "num_heads": 2},
    "deit3_small_patch16_224": {"img_size": 64, "depth": 2},
    "deit_tiny_distilled_patch16_224": {"img_size": 64, "depth": 2},
    "eva02_tiny_patch14_224": {"img_size": 70, "depth": 2},
    "beit_base_patch16_224": {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 2},
    "cait_xxs24_224": {"img_size": 64, "depth": 2},
    "hiera_tiny_224": {"img_size": (64, 96), "stages": (1, 1, 1, 1), "embed_dim": 24},
}


@pytest.mark.parametrize("name", TIMM)
def test_maps_are_those_that_timm_hands_out_itself(name: str) -> None:
    options = TIMM[name]
    model = timm.create_model(name, **options).eval()
    height, width = size if isinstance(size := options["img_size"], tuple) else (size, size)
    x = torch.randn(2, 3, height, width)
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True)
    got = tapped(model, x, *(f"blocks.{i}" for i in range(len(expected))))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))


def test_an_attention_map_of_hiera_is_in_the_order_of_the_image() -> None:
    torch.manual_seed(0)
    model = timm.create_model("hiera_tiny_224", img_size=64, stages=(1, 1, 1, 1), embed_dim=24).eval()
    x = torch.randn(1, 3, 64, 64)
    [features] = tapped(model, x, "blocks.0")
    x[..., 16:32, 32:48] += 3  # rows 4 to 7 and columns 8 to 11 of the grid
    [other] = tapped(model, x, "blocks.0")
    change = attention_map(other - features)[0]
    assert change[4:9, 8:13].square().sum() > 0.99


def hiera(**options: Any) -> nn.Module:
    return timm.create_model(
        "hiera_tiny_224", img_size=64, stages=(1, 1, 1, 1), embed_dim=24, num_classes=5, **options
    )


@pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning")
def test_a_hiera_learns_at_each_of_its_stages() -> None:
    """The map is a copy in another order, and all the same the gradient at the layer is known."""
    x = torch.randn(2, 3, 64, 64)
    student = hiera()
    nn.init.normal_(student.head.fc.weight)
    distiller = Distiller(student, hiera(), terms=[AttentionTransfer(100.0)], example_input=x)
    assert [pair.student for pair in distiller.pairs] == [f"blocks.{i}" for i in range(4)]
    report = distiller.preflight(x, torch.tensor([0, 1]))
    for row in report.plan.rows:
        assert 0.01 < row.shares["ce"] < 0.99


@pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning")
def test_dropped_patches_are_refused_in_training() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, patch_drop_rate=0.75, num_classes=5)
    x = torch.randn(1, 3, 224, 224)
    assert tapped(model.eval(), x, "blocks.1")[0].shape == (1, 192, 14, 14)
    dropped = (
        r"tokens of a grid that VisionTransformer has, 14x14 and 1 in front, got 50 .* \(patch_drop_rate=0"
    )
    with pytest.raises(ValueError, match=dropped):
        tapped(model.train(), x, "blocks.1")
    teacher = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=5)
    distiller = Distiller(model, teacher, terms=[AttentionTransfer(1.0)], example_input=x)
    with pytest.raises(ValueError, match=dropped):
        distiller.preflight(x, torch.tensor([1]))


# ---------------------------------------------------------------------- what those of Hugging Face say


def test_hiera_of_hugging_face() -> None:
    config = hf.HieraConfig(image_size=[64, 64], depths=[1, 1, 2, 1], embed_dim=24, num_heads=[1, 2, 2, 4])
    model = hf.HieraModel(config).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x, output_hidden_states=True).reshaped_hidden_states[1:]
    got = tapped(model, x, *(f"encoder.stages.{i}" for i in range(4)))
    assert all(
        torch.equal(mine.permute(0, 2, 3, 1), theirs) for mine, theirs in zip(got, expected, strict=True)
    )


def test_a_masked_autoencoder_is_refused() -> None:
    model = hf.ViTMAEModel(hf.ViTMAEConfig(image_size=64, **SMALL)).eval()
    with pytest.raises(ValueError, match=r"that ViTMAEModel has, 4x4, got 5 with .*dropped or masked"):
        tapped(model, torch.randn(2, 3, 64, 64), "layers.1")


def test_detection_tokens_are_at_the_end() -> None:
    model = hf.YolosModel(
        hf.YolosConfig(image_size=[64, 96], use_mid_position_embeddings=False, **SMALL)
    ).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        tokens = model.encoder.layer[0](model.embeddings(x))
    assert tokens.shape[1] == 1 + 4 * 6 + 100
    [features] = tapped(model, x, "encoder.layer.0")
    assert torch.equal(features, tokens[:, 1:25].mT.unflatten(2, (4, 6)))


def test_swin_of_hugging_face_at_96_pixels() -> None:
    """Its last map has 9 tokens: 3x3 at stride 32, and never 2x2 with five in front."""
    config = hf.SwinConfig(image_size=96, window_size=3, depths=[1] * 4, num_heads=[1] * 4, embed_dim=24)
    stages = stage_ends(hf.SwinModel(config), torch.randn(1, 3, 96, 96))
    assert [stage.shape[1:] for stage in stages] == [(24, 24), (12, 12), (6, 6), (3, 3)]
    shapes = tapped(hf.SwinModel(config), torch.randn(1, 3, 96, 96), stages[-1].name)
    assert shapes[0].shape == (1, 192, 3, 3)


# ------------------------------------------------------------------------------- what the user says


@pytest.mark.parametrize("layout", ["tokens+1+4", "6x6+1+4", "6x6+1"])
def test_a_layout_may_say_what_stands_around_the_grid(layout: str) -> None:
    model, x = Registers(front=1).eval(), torch.randn(2, 3, 48, 48)
    whole = tapped(model, x, "blocks.0", layout="1x41")[0]  # all of them
    expected = whole[:, :, 0, 1:37].unflatten(2, (6, 6))
    for options in ({"layout": layout}, {"layout": {"blocks.0": layout}}):
        assert torch.equal(tapped(model, x, "blocks.0", **options)[0], expected)
    assert torch.equal(tapped(model, x, f"blocks.0#0@{layout}")[0], expected)
    with pytest.raises(ValueError, match=r"as layout='6x7' says, got shape \(2, 41, 24\)"):
        tapped(model, x, "blocks.0@6x7")
    with pytest.raises(ValueError, match=r"layout to be one of auto, .*got '6x' for 'blocks.0@6x'"):
        tapped(model, x, "blocks.0@6x")


def test_the_distiller_takes_a_layout_for_each_side() -> None:
    student, teacher, x = Registers(), Registers(front=1).eval(), torch.randn(2, 3, 48, 48)
    pairs, y = [("blocks.1", "blocks.1")], torch.tensor([0, 1])
    options = {"terms": [AttentionTransfer(1.0)], "example_input": x}
    by_side = ("tokens+0+4", {"blocks.1": "tokens+1+4"})
    distiller = Distiller(student, teacher, pairs=pairs, layout=by_side, **options)
    theirs = attention_map(tapped(teacher, x, "blocks.1", layout="tokens+1+4")[0])
    mine = attention_map(tapped(student, x, "blocks.1", layout="tokens+0+4")[0])
    expected = (mine - theirs).flatten(1).norm(dim=1).mean() / 2
    torch.testing.assert_close(distiller(x, y).terms["at/blocks.1"], expected)
    named = [("blocks.1@tokens+0+4", "blocks.1@6x6+1")]
    distiller = Distiller(student, teacher, pairs=named, **options)
    torch.testing.assert_close(distiller(x, y).terms["at/blocks.1@tokens+0+4"], expected)
    for layout in ({"blocks.7": "tokens"}, ("auto", {"blocks.7": "tokens"})):
        with pytest.raises(ValueError, match=r"Distiller: .*got one for 'blocks.7'. They are blocks.1\."):
            Distiller(student, teacher, pairs=pairs, layout=layout, **options)


class Grids(nn.Module):
    """Says nothing, and gives tokens of 6x6 and 3x3 patches for images of 96 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 16, 16), nn.Conv2d(12, 24, 2, 2)
        self.one, self.two = nn.LayerNorm(12), nn.LayerNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        return self.two(self.second(first).flatten(2).mT) + self.one(first.flatten(2).mT).mean()


def test_a_doubtful_grid_of_tokens_is_read_as_the_others_are() -> None:
    """9 tokens are 3x3, or 2x2 and five in front; 36 are 6x6."""
    model, x = Grids(), torch.randn(1, 3, 96, 96)
    assert tapped(model, x, "two", "one")[0].shape == (1, 24, 3, 3)
    read = {"read": lambda features: (features, features.shape)}
    assert tapped(model, x, "two", "one", **read)[0] == (1, 24, 3, 3)
    with pytest.raises(ValueError, match=r'tokens\+0 or tokens\+5\. Pass layout=.*call it "two@tokens\+0"'):
        tapped(model, x, "two")


# ------------------------------------------------------------------------ what a model's answers show


class Shuffled(Registers):
    """The same with its patches in another order: a fixed one, or one of each image's own, drawn anew."""

    def __init__(self, *, how: str, in_training_only: bool = False) -> None:
        super().__init__(behind=0)
        self.how, self.in_training_only = how, in_training_only
        self.order = torch.randperm(36, generator=torch.Generator().manual_seed(1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        if self.training or not self.in_training_only:
            order = torch.rand(len(x), 36).argsort(1) if self.how == "anew" else self.order.expand(len(x), -1)
            if self.how == "transposed":
                order = torch.arange(36).view(6, 6).T.flatten().expand(len(x), -1)
            tokens = tokens.gather(1, order[..., None].expand(-1, -1, 24))
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens.mean(1))


def distiller_of(student: nn.Module, teacher: nn.Module | None = None, **options: Any) -> Distiller:
    """Of a layer of tokens of the student, and of a plain stride of the teacher."""
    teacher = teacher or Registers(behind=0)
    return Distiller(
        student, teacher, pairs=[("blocks.1", "blocks.1")], terms=[AttentionTransfer(1.0)], **options
    )


BATCH = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])


def check(distiller: Distiller) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PreflightWarning)
        return [warning for warning in distiller.preflight(*BATCH).warnings if "follow the image" in warning]


@pytest.mark.parametrize("how", ["fixed", "anew", "transposed"])
def test_tokens_in_another_order_are_refused(how: str) -> None:
    message = (
        r"order of the image at the {}'s blocks.1, got .* read as 6x6\+0: .*name, such as \"blocks.1@6x6\+0\""
    )
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=message.format("student")):
        check(distiller_of(Shuffled(how=how, in_training_only=True)))
    with pytest.raises(ValueError, match=message.format("teacher")):
        check(distiller_of(Registers(behind=0), Shuffled(how=how)))
    told = distiller_of(Shuffled(how=how), layout=({"blocks.1": "6x6+0"}, "auto"))
    assert "student's map at blocks.1 does not follow the image" in check(told)[0]


@pytest.mark.parametrize("front, behind", [(0, 4), (0, 1), (1, 4), (2, 0)])
def test_tokens_behind_the_patches_are_noticed_and_named(front: int, behind: int) -> None:
    torch.manual_seed(0)
    student = Registers(front=front, behind=behind)
    if not behind:
        assert check(distiller_of(student)) == []
        return
    layout = f"6x6+{front}+{behind}"
    message = (
        f"from token {front + behind} on at the student's blocks.1, got patches that begin at token {front}."
    )
    with pytest.raises(ValueError, match=re.escape(f'{message} Say so in its name: "blocks.1@{layout}".')):
        check(distiller_of(student))
    assert check(distiller_of(student, layout=(layout, "auto"))) == []


def test_looking_at_the_order_leaves_no_trace() -> None:
    student = Registers()
    student.blocks[0].dropout.p = 0.5
    before, state = {name: each.clone() for name, each in student.state_dict().items()}, torch.get_rng_state()
    found = find_order(student, ["blocks.0"], BATCH[0], layout="tokens+0+4")
    assert found["blocks.0"].in_order and found["blocks.0"].told and student.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(each, before[name]) for name, each in student.state_dict().items())


def test_another_default_device_changes_nothing() -> None:
    model, x = hiera().eval(), torch.randn(4, 3, 64, 64)
    expected = find_order(model, ["blocks.0"], x)["blocks.0"]
    with torch.device("meta"):
        found = find_order(model, ["blocks.0"], x)["blocks.0"]
    assert expected.share == found.share > 0.99 and expected.peak == found.peak


def test_maps_of_images_are_looked_at_only_in_doubt() -> None:
    """A map of 16 channels and 16x16 pixels, read along the wrong axes."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
    x = torch.randn(4, 3, 48, 48)
    assert find_order(model, ["0"], x)["0"].in_order
    wrong = find_order(model, ["0"], x, layout="nhwc")["0"]
    assert not wrong.in_order and wrong.told and wrong.share < 0.66
    assert find_order(nn.Sequential(nn.Conv2d(3, 24, 3, 3)), ["0"], x) == {}


# ------------------------------------------------------- no false alarm: untrained networks of every kind


class Plain(nn.Module):
    """torch's own encoder, of whatever depth, norms and scale of its weights."""

    def __init__(self, depth: int, *, norm_first: bool, scale: float) -> None:
        super().__init__()
        self.patches, self.position = nn.Conv2d(3, 32, 8, 8), nn.Parameter(torch.randn(1, 64, 32))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=norm_first)
            for _ in range(depth)
        )
        with torch.no_grad():
            for parameter in self.blocks.parameters():
                parameter *= scale

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT + self.position
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


@pytest.mark.parametrize("scale", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("norm_first", [True, False])
def test_no_false_alarm_on_encoders_of_random_weights(norm_first: bool, scale: float) -> None:
    for depth in (2, 12):
        torch.manual_seed(depth)
        model = Plain(depth, norm_first=norm_first, scale=scale)
        names = [f"blocks.{depth // 2}", f"blocks.{depth - 1}"]
        for training in (True, False):
            found = find_order(model.train(training), names, torch.randn(8, 3, 64, 64))
            assert all(finding.in_order for finding in found.values()), (depth, training, found)


TINY = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 40, 64]}
VIT = {"image_size": 64, "patch_size": 8, **SMALL}
SWIN = {
    "image_size": 64,
    "patch_size": 2,
    "window_size": 4,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "embed_dim": 24,
}
UNTRAINED: dict[str, tuple[int, dict[str, Any]]] = {  # by name: the size of the images and options
    "vit_tiny_patch16_224": (64, {"img_size": 64}),
    "eva02_tiny_patch14_224": (56, {"img_size": 56}),
    "cait_xxs24_224": (64, {"img_size": 64}),
    "xcit_nano_12_p8_224": (64, {}),
    "gmixer_12_224": (64, {"img_size": 64}),
    "levit_128": (128, {"img_size": 128}),
    "convit_tiny": (64, {"img_size": 64}),
    "twins_svt_small": (128, {}),
    "mvitv2_tiny": (128, {}),
    "hiera_tiny_224": (128, {"img_size": 128}),
    "tnt_s_patch16_224": (128, {"img_size": 128}),
    "vit_relpos_small_patch16_224": (128, {"img_size": 128}),
    "ViT": (64, VIT),
    "DeiT": (64, VIT),
    "Beit": (64, VIT),
    "Dinov2WithRegisters": (64, VIT),
    "DINOv3ViT": (64, {**VIT, "num_register_tokens": 4}),
    "CLIPVision": (64, VIT),
    "SiglipVision": (64, VIT),
    "IJepa": (64, VIT),
    "Swin": (64, SWIN),
    "Swinv2": (64, SWIN),
    "Segformer": (64, TINY),
}
SLOW = {"convit_tiny", "twins_svt_small", "mvitv2_tiny", "tnt_s_patch16_224"}
SLOW |= {"cait_xxs24_224", "xcit_nano_12_p8_224", "gmixer_12_224"}
SLOW |= {
    "vit_relpos_small_patch16_224",
    "hiera_tiny_224",
    "Swinv2",
    "Beit",
    "DINOv3ViT",
    "SiglipVision",
    "IJepa",
}


def untrained(name: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    if timm.is_model(name):
        return timm.create_model(name, **options)
    return getattr(hf, f"{name}Model")(getattr(hf, f"{name}Config")(**options))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in UNTRAINED]
)
def test_untrained_transformers_are_in_order_and_shuffled_ones_are_not(name: str) -> None:
    size, options = UNTRAINED[name]
    model, x = untrained(name, options), torch.randn(8, 3, size, size)
    names = [stage.name for stage in stages_to_store(model, x[:1]) if "#" not in stage.name]
    for training in (True, False):
        found = find_order(model.train(training), names, x)
        assert all(finding.in_order for finding in found.values()), found
    answering = {name: finding for name, finding in found.items() if finding.peak > 2}
    assert answering  # the first stage of each answers clearly
    for layer, finding in answering.items():
        count = finding.layout.prefix + math.prod(finding.layout.hw) + finding.layout.suffix
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
        handle = resolve(model, layer).register_forward_hook(functools.partial(shuffle, order))
        assert not find_order(model, [layer], x)[layer].in_order, layer
        handle.remove()


def shuffle(order: Tensor, module: nn.Module, args: tuple, output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(shuffle(order, module, args, each) for each in output)
    return output[:, order] if isinstance(output, Tensor) and output.shape[1:2] == order.shape else output
