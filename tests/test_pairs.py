"""suggest_pairs and stage_ends: an expert's choice, table by table, and no trace left behind."""

from __future__ import annotations

import time

import pytest
import small_models
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode

from attention_transfer.functional import attention_map, map_spread
from attention_transfer.models.nin import NetworkInNetwork
from attention_transfer.models.wide_resnet import WideResNet
from attention_transfer.pairs import Pair, Stage, stage_ends, stages_to_store, suggest_pairs
from attention_transfer.taps import Taps


class NoInitialisation(TorchFunctionMode):
    """Leaves weights as they lie in memory: drawing 100 million numbers takes longer than the test."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_):
            return args[0]
        return function(*args, **(kwargs or {}))


def build(name: str) -> nn.Module:
    library, _, model = name.partition(":")
    module = pytest.importorskip(library)
    with NoInitialisation():
        if library == "timm":
            return module.create_model(model)
        kwargs = (
            {"init_weights": False} if model == "googlenet" else {}
        )  # else it draws with SciPy, and warns
        return module.models.get_model(model, weights=None, **kwargs)


def images(size: int = 64) -> torch.Tensor:
    return torch.randn(1, 3, size, size)


def names(model: nn.Module, size: int = 64) -> str:
    return " ".join(stage.name for stage in stage_ends(model, images(size)))


EXPERT = {
    "torchvision:resnet18": "layer1 layer2 layer3 layer4",
    "torchvision:resnet50": "layer1 layer2 layer3 layer4",
    "timm:resnet18": "layer1 layer2 layer3 layer4",
    "timm:resnet26d": "layer1 layer2 layer3 layer4",  # a stem of three convolutions
    "timm:resnest14d": "layer1 layer2 layer3 layer4",  # blocks that pool after a full-size convolution
    "timm:regnety_002": "s1 s2 s3 s4",
    "torchvision:vgg11": "features.1 features.4 features.9 features.14 features.19",
    "torchvision:vgg16_bn": "features.5 features.12 features.22 features.32 features.42",
    "torchvision:mobilenet_v2": "features.1 features.3 features.6 features.13 features.17",
    "timm:mobilenetv2_050": "blocks.0 blocks.1 blocks.2 blocks.4 blocks.6",
    "torchvision:mobilenet_v3_small": "features.1 features.3 features.8 features.11",
    "timm:mobilenetv3_large_075": "blocks.0 blocks.1 blocks.2 blocks.4 blocks.5",
    "torchvision:efficientnet_b0": "features.1 features.2 features.3 features.5 features.7",
    "timm:efficientnet_b0": "blocks.0 blocks.1 blocks.2 blocks.4 blocks.6",
    "torchvision:convnext_tiny": "features.1 features.3 features.5 features.7",
    "timm:convnext_atto": "stages.0 stages.1 stages.2 stages.3",
    "torchvision:densenet121": (
        "features.denseblock1 features.denseblock2 features.denseblock3 features.denseblock4"
    ),
    "timm:densenet121": "features.denseblock1 features.denseblock2 features.denseblock3 features.denseblock4",
    "torchvision:swin_t": "features.1 features.3 features.5 features.7",
    "torchvision:googlenet": "conv3 inception3b inception4e inception5b",
    "torchvision:shufflenet_v2_x0_5": "stage2 stage3 stage4",
}
EXPERT_AT_224 = {
    "timm:swin_tiny_patch4_window7_224": "layers.0 layers.1 layers.2 layers.3",
    "timm:vit_tiny_patch16_224": "blocks.11",
    "timm:deit_tiny_distilled_patch16_224": "blocks.11",
    "torchvision:vit_b_32": "encoder.layers.encoder_layer_11",
    "torchvision:alexnet": "features.1 features.4 features.11",
}


@pytest.mark.parametrize("model", EXPERT)
def test_expert_choice(model: str) -> None:
    assert names(build(model)) == EXPERT[model]


@pytest.mark.parametrize("model", EXPERT_AT_224)
def test_expert_choice_at_224(model: str) -> None:
    assert names(build(model), 224) == EXPERT_AT_224[model]


@pytest.mark.parametrize("model", [WideResNet(10, 1), WideResNet(16, 2), NetworkInNetwork()])
def test_the_papers_own_networks(model: nn.Module) -> None:
    assert names(model, 32) == "group0 group1 group2"


PAIRED = {
    ("torchvision:resnet18", "torchvision:resnet34", 64): [(f"layer{i}",) * 2 for i in (1, 2, 3, 4)],
    ("torchvision:mobilenet_v2", "timm:resnet18", 64): [
        ("features.3", "layer1"),
        ("features.6", "layer2"),
        ("features.13", "layer3"),
        ("features.17", "layer4"),
    ],
    ("timm:convnext_atto", "torchvision:swin_t", 64): [
        (f"stages.{i}", f"features.{2 * i + 1}") for i in range(4)
    ],
    ("timm:resnet18", "timm:vit_tiny_patch16_224", 224): [("layer3", "blocks.11")],
    ("timm:vit_tiny_patch16_224", "torchvision:vit_b_32", 224): [
        (f"blocks.{i}", f"encoder.layers.encoder_layer_{i}") for i in (2, 5, 8, 11)
    ],
}


@pytest.mark.parametrize("student, teacher, size", PAIRED)
def test_pairs_across_models(student: str, teacher: str, size: int) -> None:
    one, other = build(student), build(teacher)
    pairs = suggest_pairs(one, other, images(size))
    assert [(pair.student, pair.teacher) for pair in pairs] == PAIRED[student, teacher, size]
    assert suggest_pairs(one, stages_to_store(other, images(size)), images(size)) == pairs
    back = suggest_pairs(other, one, images(size))
    assert suggest_pairs(other, stages_to_store(one, images(size)), images(size)) == back


def test_the_teachers_input_may_have_another_size() -> None:
    pairs = suggest_pairs(WideResNet(16, 1), WideResNet(16, 2), images(32), images(64))
    assert pairs == [Pair(f"group{i}", f"group{i}") for i in range(3)]


def test_every_suggestion_can_be_tapped() -> None:
    model = build("torchvision:vgg11")
    stages = stage_ends(model, images())
    with Taps(model, [stage.name for stage in stages]) as taps:
        model(images())
        shapes = [tuple(features.shape[1:]) for features in taps.pop().values()]
    assert shapes == [stage.shape for stage in stages]


def test_stages_know_their_shape_and_stride() -> None:
    assert stage_ends(WideResNet(10, 1), images(32)) == [
        Stage("group0", (16, 32, 32), 1.0),
        Stage("group1", (32, 16, 16), 2.0),
        Stage("group2", (64, 8, 8), 4.0),
    ]
    assert str(Stage("features.4", (192, 27, 27), 224 / 27)) == "features.4: 192x27x27, stride 8.3"


# ------------------------------------------------------------------------------------- home-made models


def conv(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, padding=1)


def test_a_stage_that_ends_with_its_pool_is_tapped_before_it() -> None:
    def stage(c_in: int, c_out: int) -> nn.Sequential:
        return nn.Sequential(conv(c_in, c_out), nn.ReLU(inplace=True), nn.MaxPool2d(2))

    model = nn.Sequential(stage(3, 8), stage(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    assert names(model, 16) == "0.1 1.1"


def test_dropout_and_identity_are_not_chosen() -> None:
    model = nn.Sequential(conv(3, 8), nn.ReLU(), nn.Dropout(), nn.Identity(), conv(8, 8, stride=2), nn.ReLU())
    assert names(model, 16) == "1 5"


class SharedReLU(nn.Module):
    """One ReLU called three times, and no submodule that is a stage."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(3, 8), conv(8, 8), conv(8, 16, stride=2)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.second(self.relu(self.first(x))))
        return self.relu(self.third(x)).mean((2, 3))


def test_a_module_called_several_times_is_named_with_its_call() -> None:
    assert names(SharedReLU(), 16) == "relu#1 relu#2"


class InPlaceBlock(nn.Module):
    """Begins with an in-place ReLU, so it overwrites the output of the block before."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv0, self.conv1 = conv(c_in, c_out, stride), conv(c_out, c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(x)
        return self.conv1(F.relu(self.conv0(x))) + self.skip(x)


def test_an_output_overwritten_in_place_is_replaced_by_the_in_place_module() -> None:
    model = nn.Sequential(conv(3, 8), InPlaceBlock(8, 8), InPlaceBlock(8, 16, 2), InPlaceBlock(16, 16))
    model.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    chosen = names(model, 16).split()
    assert chosen == ["2.relu", "3"]  # "1" is overwritten by "2.relu", and "2" by "3.relu"
    with Taps(model, chosen) as taps:
        model(images(16))
        taps.pop()


class Merging(nn.Module):
    """A stage of two residual blocks that ends by entering the next resolution, as in Hugging Face's Swin."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(InPlaceBlock(c_in, c_in) for _ in range(2))
        self.down = conv(c_in, c_out, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x.clone())
        return self.down(x.clone())


def test_a_stage_that_ends_by_going_down_ends_before() -> None:
    model = nn.Sequential(Merging(3, 8), Merging(8, 16), InPlaceBlock(16, 16), nn.AdaptiveAvgPool2d(1))
    assert names(model, 16) == "0.blocks.1 1.blocks.1 2"


class Attending(nn.Module):
    """Patches of 2 pixels, and two blocks with a weight layer on their attention matrices, `keys` wide."""

    def __init__(self, width: int = 8, keys: int = 64) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.blocks = nn.ModuleList(self.Block(width, keys) for _ in range(2))

    class Block(nn.Module):
        def __init__(self, width: int, keys: int) -> None:
            super().__init__()
            self.keys = keys
            self.value, self.heads, self.out = (
                nn.Linear(width, width),
                nn.Linear(2, 2),
                nn.Linear(width, width),
            )
            self.norm = nn.LayerNorm(width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            v = self.value(self.norm(x))
            attention = (x @ v[:, : self.keys].mT)[..., None].expand(-1, -1, -1, 2)
            weights = self.heads(attention).mean(-1).softmax(-1)
            return x + self.out(weights @ v[:, : self.keys])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


@pytest.mark.parametrize("keys", [64, 16])
def test_attention_matrices_are_no_maps(keys: int) -> None:
    """Neither tokens by tokens nor tokens by fewer keys, as where these are pooled."""
    assert names(Attending(keys=keys), 16) == "blocks.1"


class HiddenInPlace(nn.Module):
    """The end of the first stage is overwritten by a function that no module stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = InPlaceBlock(3, 8), InPlaceBlock(8, 8), conv(8, 8, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x * 1)).relu_()).mean((2, 3))


def test_without_such_a_module_the_end_before_it_is_chosen() -> None:
    assert names(HiddenInPlace(), 16) == "b.relu c"


class Backbone(nn.Module):
    """Named stages one level down, with a functional pool between, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([InPlaceBlock(c, 8) for c in (3, 8, 8)])

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for stage in self.stages:
            x = F.max_pool2d(stage(x.clone()), 2)
        return {"logits": x.mean((2, 3))}


def test_stages_in_a_module_list_inside_a_wrapper() -> None:
    model = nn.ModuleDict({"unused": nn.Linear(1, 1), "backbone": Backbone()})
    model.forward = lambda x: model["backbone"](x)["logits"]
    assert names(model, 16) == "backbone.stages.0 backbone.stages.1 backbone.stages.2"


def test_a_compiled_submodule_does_not_compile_and_keeps_its_plain_name() -> None:
    model = build("timm:resnet18")
    model.layer2 = torch.compile(model.layer2, backend=_refuse)
    assert names(torch.compile(model, backend=_refuse)) == "layer1 layer2 layer3 layer4"


def _refuse(*_: object) -> None:
    raise AssertionError("compiled")


class Pooling(nn.Module):
    """A block that works on a pooled map as well, as attention does with pooled keys."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = conv(width, width), conv(width, width)
        self.keys = nn.Sequential(conv(width, width, 2), nn.BatchNorm2d(width), conv(width, width))
        self.query = conv(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = F.interpolate(self.keys(x), x.shape[2:])
        return x + self.last(self.first(x) * self.query(x) * gate.sigmoid())


def test_what_blocks_pool_is_no_stage() -> None:
    model = nn.Sequential(
        InPlaceBlock(3, 8), conv(8, 16, 2), Pooling(16), Pooling(16), nn.AdaptiveAvgPool2d(1)
    )
    assert names(model, 16) == "0 3"


class NormedAfterwards(nn.Module):
    """A backbone that gives its stages, and normalises each only when the last has run."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([InPlaceBlock(3, 8, 2), InPlaceBlock(8, 8, 2), InPlaceBlock(8, 8, 2)])
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        found = []
        for stage in self.stages:
            x = stage(x.clone())
            found.append(x)
        return {str(i): norm(each) for i, (norm, each) in enumerate(zip(self.norms, found, strict=True))}


def test_a_first_stage_that_is_normalised_at_the_end_is_no_stem() -> None:
    assert names(NormedAfterwards(), 32) == "stages.0 stages.1 stages.2"


class Crossing(nn.Module):
    """Takes and gives maps of two sizes, and adds to each what a branch makes of both."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = InPlaceBlock(8, 8), InPlaceBlock(8, 8)
        self.drop = nn.Identity()

    def forward(
        self, same: torch.Tensor, fine: torch.Tensor, coarse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        branch = self.drop(self.fine(fine + F.interpolate(coarse, fine.shape[2:])))
        return same, fine + branch, coarse + self.drop(self.coarse(coarse * 1))


class Crossed(nn.Module):
    """Three stages, and then blocks of all three that leave the first as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([InPlaceBlock(3, 8, 2), InPlaceBlock(8, 8, 2), InPlaceBlock(8, 8, 2)])
        self.crossing = nn.ModuleList([Crossing(), Crossing()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = []
        for stage in self.stages:
            x = stage(x.clone())
            found.append(x)
        for crossing in self.crossing:
            found = crossing(*found)
        return sum(each.mean((2, 3)) for each in found)


def test_what_is_only_added_to_one_of_several_maps_ends_no_stage() -> None:
    assert names(Crossed(), 32) == "stages.0 stages.1 stages.2"


class WindowBlock(nn.Module):
    """Takes and returns windows, (4 b, n, c), and works on all of an image inside, (b, 4 n, c)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.all, self.mlp = LinearBlock(width), LinearBlock(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, n, c = x.shape
        return self.mlp(self.all(x.reshape(-1, 4 * n, c)).reshape(-1, n, c))


class InWindows(nn.Module):
    """Patches of 4 pixels in four windows, put together at the end for a neck, if there is one."""

    def __init__(self, neck: nn.Module | None = None, prefix: int = 0) -> None:
        super().__init__()
        self.patch, self.prefix = nn.Conv2d(3, 8, 4, 4), prefix
        self.blocks, self.neck = nn.Sequential(WindowBlock(8), WindowBlock(8)), neck

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x)
        b, c, h, w = x.shape
        x = x.view(b, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 3, 5, 1).reshape(4 * b, h * w // 4, c)
        x = self.blocks(F.pad(x, (0, 0, self.prefix, 0)))[:, self.prefix :]
        x = x.view(b, 2, 2, h // 2, w // 2, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)
        return (x if self.neck is None else self.neck(x)).mean((2, 3))


@pytest.mark.parametrize("prefix", [0, 1])
def test_what_is_put_together_inside_of_windows_is_no_map(prefix: int) -> None:
    assert names(InWindows(InPlaceBlock(8, 8), prefix), 16) == "neck"
    with pytest.raises(
        ValueError, match=r"8 layers .*, such as blocks.1.mlp.outer with \(8, ., 8\) .*neck\.input"
    ):
        stage_ends(InWindows(prefix=prefix), images(16))
    model, x = InWindows(conv(8, 8), prefix), images(16)
    with Taps(model, ["neck.input"]) as taps:
        expected = model(x)
        features = taps.pop()["neck.input"]
    torch.testing.assert_close(model.neck(features).mean((2, 3)), expected)


class Registers(nn.Module):
    """Four blocks of tokens behind a patch embedding, with as many in front that no grid is left."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.blocks = nn.Conv2d(3, 8, 4, 4), nn.Sequential(*(LinearBlock(8) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(F.pad(self.patch(x).flatten(2).mT, (0, 0, 13, 0))).mean(1)


def test_blocks_that_cannot_be_read_as_maps_are_refused() -> None:
    with pytest.raises(ValueError, match=r'8 layers .* with \(2, 29, 8\) .*"blocks\.3\.outer@14x14\+1"'):
        stage_ends(Registers(), images(16))
    model = Registers()
    with Taps(model, ["blocks.3@4x4+13"]) as taps:
        model(images(16))
        features = taps.pop()["blocks.3@4x4+13"]
    assert features.shape == (1, 8, 4, 4)


class LinearBlock(nn.Module):
    """Takes and returns (b, h, w, c)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(F.gelu(self.inner(self.norm(x))))


class ChannelsLastAtTheEnd(nn.Module):
    """Maps of 8x8x8, channels first, and then some that are surely channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = InPlaceBlock(3, 8, 2), conv(8, 16, 2)
        self.last = nn.Sequential(LinearBlock(16), LinearBlock(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.down(self.first(x * 1)).movedim(1, -1)).mean((1, 2))


def test_a_cube_is_read_as_its_layers_hold_it() -> None:
    """By the rule of `Taps` it would be read as the other map is."""
    model, batch = ChannelsLastAtTheEnd(), images(16)
    chosen = [stage.name for stage in stage_ends(model, batch)]
    assert chosen == ["first@nchw", "last"]
    with Taps(model, chosen) as taps:
        model(batch)
        torch.testing.assert_close(taps.pop()["first@nchw"], model.first(batch * 1))


# ------------------------------------------------------------------------------- layers that are no leaf


class PaddedByAChild(nn.Conv2d):
    """As the convolutions of efficientnet_pytorch."""

    def __init__(self, like: nn.Conv2d) -> None:
        super().__init__(like.in_channels, like.out_channels, like.kernel_size, like.stride, bias=False)
        self.groups, self.weight = like.groups, like.weight
        self.pad = nn.ZeroPad2d(like.padding[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(self.pad(x), self.weight, None, self.stride, 0, self.dilation, self.groups)


class UsesTheWeightAlone(nn.Module):
    """Never calls the convolution that it holds."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer, self.quantised = layer, nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        x = self.quantised(x)
        return F.conv2d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


class WithLowRank(nn.Module):
    """As an adapter of LoRA: the layer and a detour of low rank beside it."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Conv2d(layer.in_channels, 2, layer.kernel_size, layer.stride, layer.padding)
        self.up, self.dropout = nn.Conv2d(2, layer.out_channels, 1), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.up(self.down(self.dropout(x)))


WRAPPERS = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "two parametrisations": lambda layer: nn.utils.parametrizations.spectral_norm(
        nn.utils.parametrizations.weight_norm(layer)
    ),
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "padded by a child": PaddedByAChild,
    "its weight alone": UsesTheWeightAlone,
    "low rank": WithLowRank,
}


def wrap_convolutions(model: nn.Module, wrap) -> None:
    for name, child in model.named_children():
        if isinstance(child, nn.Conv2d):
            setattr(model, name, wrap(child))
        else:
            wrap_convolutions(child, wrap)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("model", ["timm:test_resnet", "timm:test_efficientnet"])
def test_a_wrapped_layer_is_the_layer(model: str, wrapper: str) -> None:
    wrapped = build(model)
    plain = names(wrapped)
    wrap_convolutions(wrapped, WRAPPERS[wrapper])
    assert names(wrapped) == plain


def test_a_part_of_the_layers_may_be_wrapped() -> None:
    model = build("torchvision:resnet18")
    for stage in (model.layer3, model.layer4):
        wrap_convolutions(stage, nn.utils.parametrizations.weight_norm)
    assert names(model) == "layer1 layer2 layer3 layer4"


@pytest.mark.parametrize("wrapper", ["weight_norm", "low rank"])
def test_wrapped_layers_without_blocks(wrapper: str) -> None:
    model = small_models.vgg()
    wrap_convolutions(model, WRAPPERS[wrapper])
    assert names(model) == EXPERT["torchvision:vgg11"]


def test_a_parametrised_weight_is_no_map() -> None:
    """Of two output channels, it has as many entries along its first axis as there are example images."""
    model = nn.Sequential(conv(3, 2), nn.ReLU(), conv(2, 2, stride=2), nn.ReLU())
    for layer in (model[0], model[2]):
        nn.utils.parametrizations.weight_norm(layer)
    assert names(model, 16) == "1 3"


# ------------------------------------------------------------------------------------------ norms at the end


class OverChannels(nn.Module):
    """A norm over the channels of (b, c, h, w) with weights as a training leaves them; of no known class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.randn(width) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias).movedim(-1, 1)


class NormedStage(nn.Module):
    """A residual block, and a norm of the output, which may be what a block of its own returns."""

    def __init__(self, c_in: int, c_out: int, stride: int, norm: nn.Module, *, added: bool) -> None:
        super().__init__()
        self.block, self.norm, self.added = InPlaceBlock(c_in, c_out, stride), norm, added
        self.skip = nn.Conv2d(c_in, c_out, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.block(x.clone())
        return self.norm(out + self.skip(x) if self.added else out).clone()


def normed_stages(norm, *, added: bool) -> nn.Module:
    sizes = [(3, 8, 1), (8, 12, 2), (12, 16, 2)]
    stages = [NormedStage(c_in, c_out, stride, norm(c_out), added=added) for c_in, c_out, stride in sizes]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1))


@pytest.mark.parametrize("norm", [OverChannels, lambda width: timm.layers.LayerNorm2d(width, affine=False)])
def test_a_stage_that_ends_with_a_norm_over_channels_ends_before(norm) -> None:
    assert names(normed_stages(norm, added=False), 16) == "0.block 1.block 2.block"


def test_where_no_module_returns_what_the_norm_is_given() -> None:
    model = normed_stages(OverChannels, added=True)
    stages = stage_ends(model, images(16))
    assert [stage.name for stage in stages] == ["0.norm.input", "1.norm.input", "2.norm.input"]
    given = []
    model[1].norm.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    with Taps(model, [stage.name for stage in stages]) as taps:
        model(images(16))
        features = taps.pop()
    torch.testing.assert_close(features["1.norm.input"], given[-1])
    assert [tuple(each.shape[1:]) for each in features.values()] == [stage.shape for stage in stages]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda width: nn.GroupNorm(4, width), lambda _: nn.ReLU()])
def test_other_layers_at_the_end_of_a_stage_stay(norm) -> None:
    model = normed_stages(norm, added=False)
    assert names(model, 16) == "0 1 2"
    assert all(
        torch.equal(module.running_mean, torch.zeros_like(module.running_mean))
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
    )


def test_post_norm_encoders_are_paired_before_their_last_norm() -> None:
    """As torch has them by default: what the second norm is given is a sum that no module returns."""
    student, teacher = encoder(16, norm_first=False), encoder(32, norm_first=False)
    pairs = suggest_pairs(student, teacher, images(32))
    assert pairs == [Pair(*[f"1.layers.{i}.norm2.input"] * 2) for i in range(4)]
    batch = torch.randn(2, 3, 32, 32)
    with Taps(student, [pair.student for pair in pairs]) as taps:
        student(batch)
        assert all(map_spread(attention_map(each)).min() > 0.01 for each in taps.pop().values())


def test_attention_of_torch_has_its_weights_in_a_layer_that_is_not_called() -> None:
    """What a block is made of is its attention and two more layers: four blocks to pair by depth."""
    model = encoder(16, norm_first=True)
    assert [f"1.layers.{i}" for i in range(4)] == [stage.name for stage in stages_to_store(model, images(32))]


class Transposed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mT


def encoder(width: int, *, norm_first: bool) -> nn.Module:
    """Patches of 4 pixels and four blocks of torch's own transformer."""
    layer = nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True, norm_first=norm_first)
    patches = nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.Flatten(2), Transposed())
    blocks = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return nn.Sequential(patches, blocks, Transposed())


# ---------------------------------------------------------------------------------------------- no trace


class Nosy(nn.Module):
    """Counts calls in a buffer, whatever its mode, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.Dropout(), conv(8, 8, stride=2))
        self.register_buffer("calls", torch.zeros(()))
        self.body[1].eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.body(x + torch.rand_like(x))


def test_models_are_left_as_found() -> None:
    model = Nosy().train()
    model.body[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    batch = images(16)
    random_state = torch.get_rng_state()
    stage_ends(model, batch)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(random_state, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_models_are_left_as_found_after_a_failure() -> None:
    model = Nosy().train()
    with pytest.raises(ValueError, match="expected images of 3 channels, as the model takes, got 5"):
        stage_ends(model, torch.randn(1, 5, 16, 16))
    assert model.calls == 0
    assert model.body[0].training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_half_precision_models_take_the_example_in_their_own_type() -> None:
    assert names(WideResNet(10, 1).to(torch.bfloat16), 32) == "group0 group1 group2"


def test_resnet50_at_224_takes_seconds() -> None:
    model, batch = build("torchvision:resnet50"), images(224)
    start = time.perf_counter()
    stage_ends(model, batch)
    assert time.perf_counter() - start < 10


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_pair_refuses_a_weight(weight: float) -> None:
    with pytest.raises(ValueError, match=r"Pair: expected a weight >= 0, got"):
        Pair("layer1", "layer1", weight)


@pytest.mark.unchecked
def test_pair_refuses_a_module_for_a_name() -> None:
    with pytest.raises(TypeError, match=r"Pair: expected the names of two modules, got ReLU"):
        Pair(nn.ReLU(), "layer1")


def test_pairs_print_readably() -> None:
    assert str(Pair("layer1", "stages.0")) == "layer1 <- stages.0"
    assert str(Pair("a", "b", 0.5)) == "a <- b (weight 0.5)"


def test_no_common_resolution() -> None:
    whole = nn.Sequential(conv(3, 8), nn.ReLU())
    eighth = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU())
    message = r"suggest_pairs: .* strides 1 in the student and 8 in the teacher\. Name .* for the term\.$"
    with pytest.raises(ValueError, match=message):
        suggest_pairs(whole, eighth, images(32))


def test_advice_without_a_common_resolution_is_of_use() -> None:
    """A larger input has stages that a small one leaves at one pixel, and no more than those."""
    blocks = (InPlaceBlock(3, 8, 2), InPlaceBlock(8, 8, 2), InPlaceBlock(8, 8, 2))
    student = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1))
    vit = timm.create_model("test_vit", img_size=32, patch_size=16, depth=2)
    with pytest.raises(ValueError, match=r'resize="student" or "teacher" for the term\.$'):
        suggest_pairs(student, vit, images(32))
    eighth = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU())
    with pytest.raises(ValueError, match=r"for the term, or pass a larger example input\.$"):
        suggest_pairs(student, eighth, images(8), images(32))
    assert suggest_pairs(student, eighth, images(32)) == [Pair("2", "1")]


def test_no_maps_at_all() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    with pytest.raises(ValueError, match=r"stage_ends: expected the model to have maps .* 8x8 input\. Pass"):
        stage_ends(flat, images(8))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is:DeprecationWarning")
def test_layers_that_nobody_sees() -> None:
    model = nn.Sequential(conv(3, 8), nn.Sequential(conv(8, 8, stride=2), nn.ReLU()))
    exported = torch.export.export(model.eval(), (torch.randn(2, 3, 8, 8),)).module()
    with pytest.raises(ValueError, match=r"layers as modules, got GraphModule.* as it was before that"):
        stage_ends(exported, images(8))
    model[1] = torch.jit.script(model[1])
    with pytest.raises(ValueError, match=r"of Python modules, got TorchScript at 1, .* before torch\.jit"):
        stage_ends(model, images(8))


@pytest.mark.unchecked
def test_bad_example_input() -> None:
    with pytest.raises(ValueError, match=r"stage_ends: expected images \(b, c, h, w\), got \(3, 8, 8\)"):
        stage_ends(nn.Sequential(conv(3, 8)), torch.randn(3, 8, 8))
    with pytest.raises(ValueError, match=r"expected a student that runs on images of shape \(2, 3, 1, 1\)"):
        suggest_pairs(nn.Conv2d(3, 8, 3), WideResNet(10, 1), images(1))
