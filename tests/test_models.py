"""build_model: every form of name, every refusal, and the networks of the paper."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from attention_transfer.models import NetworkInNetwork, WideResNet, build_model, fingerprint, save_weights


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# The paper's networks


@pytest.mark.parametrize(
    ("name", "count"),
    [("wrn-16-1", 175_066), ("wrn-16-2", 691_674), ("wrn-40-1", 563_930), ("wrn-40-2", 2_243_546)],
)
def test_wide_resnets_have_the_published_parameter_counts(name: str, count: int) -> None:
    assert parameters(build_model(name)) == count


def test_network_in_network_has_the_sizes_of_the_paper() -> None:
    assert round(parameters(build_model("nin-thin")) / 1e6, 1) == 0.2
    assert round(parameters(build_model("nin-wide")) / 1e6, 1) == 1.0


@pytest.mark.parametrize("name", ["nin-thin-plain", "nin-wide-plain"])
def test_plain_networks_have_biases_in_place_of_batchnorm(name: str) -> None:
    plain, usual = build_model(name), build_model(name.removesuffix("-plain"))
    assert not [module for module in plain.modules() if isinstance(module, nn.BatchNorm2d)]
    biases = sum(module.bias.numel() for module in plain.modules() if isinstance(module, nn.Conv2d))
    assert parameters(usual) - parameters(plain) == biases  # a scale and a shift a channel against a bias


@pytest.mark.parametrize("name", ["wrn-16-1", "nin-thin", "nin-thin-plain"])
@pytest.mark.parametrize(("h", "w", "channels"), [(32, 32, 3), (8, 8, 3), (33, 21, 1), (28, 28, 1)])
def test_any_size_and_channels_forward_and_backward(name: str, h: int, w: int, channels: int) -> None:
    model = build_model(name, num_classes=7, in_channels=channels)
    logits = model(torch.randn(2, channels, h, w))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["wrn-16-2", "nin-thin"])
def test_group_outputs_are_never_overwritten(name: str) -> None:
    """Hazard 5: an in-place ReLU after a group would change the tensor that a tap has read."""
    model = build_model(name)
    seen: list[tuple[torch.Tensor, int, torch.Tensor]] = []
    for group in (model.group0, model.group1, model.group2):
        group.register_forward_hook(
            lambda _m, _i, out: seen.append((out, out._version, out.detach().clone()))
        )
    model(torch.randn(2, 3, 32, 32))
    assert [tuple(out.shape[2:]) for out, _, _ in seen] == [(32, 32), (16, 16), (8, 8)]
    for out, version, values in seen:
        assert out._version == version
        assert torch.equal(out, values)


def test_wide_resnet_groups_are_read_before_the_activation() -> None:
    model = WideResNet(16, 1)
    outputs: list[torch.Tensor] = []
    model.group2.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    model(torch.randn(2, 3, 16, 16))
    assert outputs[0].min() < 0


def test_weights_start_from_kaiming_normal() -> None:
    model = WideResNet(16, 4)
    weight = model.group2.block1.conv0.weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    assert model.fc.bias.abs().max() == 0


@pytest.mark.parametrize("depth", [4, 9, 15, 18])
def test_a_depth_that_is_not_6n_plus_4(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"expected a depth of 6n \+ 4 .*, got {depth}\. Try wrn-1"):
        build_model(f"wrn-{depth}-2")


def test_the_depth_error_names_its_neighbours() -> None:
    with pytest.raises(ValueError, match=r"got 18\. Try wrn-16-2 or wrn-22-2\.$"):
        build_model("wrn-18-2")
    with pytest.raises(ValueError, match=r"expected a width of 1 or more, got 0\. Try wrn-16-1\.$"):
        build_model("wrn-16-0")


# Libraries


def test_bare_names_are_searched_in_this_package_then_timm_then_torchvision() -> None:
    assert isinstance(build_model("nin-wide"), NetworkInNetwork)
    assert type(build_model("resnet18")).__module__.startswith("timm.")
    assert type(build_model("shufflenet_v2_x0_5")).__module__.startswith("torchvision.")


@pytest.mark.parametrize("name", ["timm:resnet18", "timm:resnet18.a1_in1k", "torchvision:resnet18"])
def test_library_models_take_classes_and_channels(name: str) -> None:
    model = build_model(name, num_classes=4, in_channels=2).eval()
    assert model(torch.randn(1, 2, 64, 64)).shape == (1, 4)


@pytest.mark.parametrize("name", ["torchvision:squeezenet1_1", "torchvision:mobilenet_v3_small"])
@pytest.mark.parametrize("channels", [1, 5])
def test_torchvision_first_convolution_is_adapted(name: str, channels: int) -> None:
    model = build_model(name, in_channels=channels).eval()
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert (first.in_channels, first.weight.shape[1]) == (channels, channels)
    assert model(torch.randn(1, channels, 64, 64)).shape == (1, 10)


def test_adapted_convolution_follows_the_documented_rule() -> None:
    torch.manual_seed(1)
    rgb = build_model("torchvision:squeezenet1_1").features[0].weight
    torch.manual_seed(1)
    grey = build_model("torchvision:squeezenet1_1", in_channels=1).features[0].weight
    torch.manual_seed(1)
    four = build_model("torchvision:squeezenet1_1", in_channels=4).features[0].weight
    torch.testing.assert_close(grey[:, 0], rgb.sum(1))
    torch.testing.assert_close(four, rgb[:, [0, 1, 2, 0]] * 0.75)


def test_googlenet_returns_logits_in_train_mode_too() -> None:
    model = build_model("torchvision:googlenet", num_classes=3)
    assert model.train()(torch.randn(2, 3, 64, 64)).shape == (2, 3)


# Pretrained weights


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_a_failed_download_is_one_line_with_a_remedy(no_network: Path) -> None:
    with pytest.raises(OSError, match=r"^build_model: could not fetch .* of torchvision:alexnet \(.*FILE\.$"):
        build_model("torchvision:alexnet", pretrained=True)


def test_a_failed_timm_download_is_one_line_too(tmp_path: Path) -> None:
    code = (
        "from attention_transfer.models import build_model\n"
        "try: build_model('timm:test_resnet', pretrained=True)\n"
        "except OSError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert out.startswith("build_model: could not fetch the pretrained weights of timm:test_resnet (")
    assert out.endswith("Check the network, or pass weights=FILE.\n")
    assert out.count("\n") == 1


def test_pretrained_torchvision_weights_keep_all_but_another_head(no_network: Path) -> None:
    original = build_model("torchvision:squeezenet1_1", num_classes=1000)
    torch.save(original.state_dict(), no_network / "squeezenet1_1-b8a52dc0.pth")
    same = build_model("torchvision:squeezenet1_1", num_classes=1000, pretrained=True)
    assert fingerprint(same) == fingerprint(original)
    other = build_model("torchvision:squeezenet1_1", num_classes=10, in_channels=1, pretrained=True)
    torch.testing.assert_close(other.features[0].weight[:, 0], original.features[0].weight.sum(1))
    assert torch.equal(other.features[3].squeeze.weight, original.features[3].squeeze.weight)
    assert other.classifier[1].weight.shape[0] == 10


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def test_pretrained_weights_are_never_unpickled(no_network: Path) -> None:
    marker = no_network / "code has run"
    torch.save({"x": Malicious(marker)}, no_network / "squeezenet1_1-b8a52dc0.pth")
    with pytest.raises(OSError, match=r"^build_model: could not fetch .*UnpicklingError"):
        build_model("torchvision:squeezenet1_1", pretrained=True)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["wrn-16-1", "timm:coatnet_0_224", "test_models:tiny"])
def test_models_without_pretrained_weights_say_so(name: str) -> None:
    with pytest.raises(ValueError, match=rf"got {name}: it has none\. Pass weights=FILE\.$"):
        build_model(name, pretrained=True)


# Factories


def tiny(num_classes: int, in_channels: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    )


def fixed() -> nn.Module:
    return tiny(10)


def returns_text(num_classes: int) -> str:
    return "a model"


def wants_more(num_classes: int, colour: str) -> nn.Module:
    return tiny(num_classes)


constant = 3


def test_factories_are_called_with_what_they_take() -> None:
    assert build_model("test_models:tiny", num_classes=5, in_channels=2)(torch.randn(1, 2, 8, 8)).shape == (
        1,
        5,
    )
    assert build_model("test_models:fixed", num_classes=5)(torch.randn(1, 3, 8, 8)).shape == (1, 10)
    assert isinstance(build_model("attention_transfer.models:NetworkInNetwork"), NetworkInNetwork)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("no_such_package.x:f", ValueError, r"found no no_such_package\. Install it"),
        ("attention_transfer.no_such:f", ValueError, r"found no attention_transfer\.no_such\. Install it"),
        ("test_models:tinny", ValueError, r"found nothing of that name\. Did you mean tiny\?$"),
        ("test_models:constant", ValueError, r"found a int\. Check the name after the colon\.$"),
        (
            "test_models:returns_text",
            TypeError,
            r"expected a torch\.nn\.Module .* got str\. Return the model\.$",
        ),
        ("test_models:wants_more", ValueError, r"which requires colour\. Give them defaults\.$"),
        ("builtins:dict", TypeError, r"got dict\. Return the model\.$"),
    ],
)
def test_factories_that_cannot_be_used(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^build_model: .*{message}"):
        build_model(name)


def test_a_factory_module_that_lacks_a_package_keeps_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needy_factory.py").write_text("import package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="package_that_is_not_there"):
        build_model("needy_factory:f")


# Names and arguments


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("wrn_16_2", "wrn-16-2"),
        ("WRN-40-2", "wrn-40-2"),
        ("nin-thinn", "nin-thin"),
        ("resnt18", "timm:resnet18, torchvision:resnet18"),
        ("timm:resnt18", "timm:resnet18, torchvision:resnet18"),
        ("timm:shufflenet_v2_x0_5", "torchvision:shufflenet_v2_x0_5"),
        ("torchvision:wrn-16-1", "wrn-16-1"),
        ("timm:resnet18.no_such_tag", "timm:resnet18"),
    ],
)
def test_a_misspelt_name_lists_near_matches_over_all_sources(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf'^build_model: .* got "{name}"\. Near matches: .*{near}'):
        build_model(name)


@pytest.mark.parametrize("name", ["", "zzzzqqqq", "timm:", ":", "a-b:c", "a:b:c", "timm:hf-hub:x/zzzzqqqq"])
def test_a_hopeless_name_lists_the_forms(name: str) -> None:
    with pytest.raises(ValueError, match=r"Use wrn-DEPTH-WIDTH, .* or package\.module:factory\.$"):
        build_model(name)


def test_without_the_libraries_the_error_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert parameters(build_model("wrn-16-1")) == 175_066
    with pytest.raises(ValueError, match=r"Not installed: timm, torchvision\. Run: pip install "):
        build_model("resnet18")
    with pytest.raises(ImportError, match=r"^build_model: needs the package timm"):
        build_model("timm:resnet18")


@pytest.mark.parametrize("argument", ["num_classes", "in_channels"])
@pytest.mark.parametrize("value", [0, -1, True])
def test_impossible_sizes(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^build_model: expected {argument} of 1 or more, got {value}"):
        build_model("wrn-16-1", **{argument: value})


def test_two_sources_of_weights() -> None:
    with pytest.raises(ValueError, match=r"expected one source of weights.*Drop one of them\.$"):
        build_model("resnet18", pretrained=True, weights="w.safetensors")


@pytest.mark.unchecked
def test_arguments_of_another_type() -> None:
    with pytest.raises(TypeError, match=r"^build_model: expected a name such as .* got int\.$"):
        build_model(16)
    with pytest.raises(ValueError, match=r"expected num_classes of 1 or more, got 2\.5"):
        build_model("wrn-16-1", num_classes=2.5)


def test_weights_are_loaded_and_must_fit(tmp_path: Path) -> None:
    teacher = build_model("wrn-16-1", num_classes=100)
    save_weights(teacher, tmp_path / "w.safetensors")
    again = build_model("wrn-16-1", num_classes=100, weights=tmp_path / "w.safetensors")
    assert fingerprint(again) == fingerprint(teacher)
    with pytest.raises(ValueError, match=r"the head fc has 100 classes in the file and 10 in the model"):
        build_model("wrn-16-1", weights=tmp_path / "w.safetensors")


def test_importing_the_models_loads_no_library() -> None:
    code = (
        "import sys, attention_transfer.models as m; m.build_model('wrn-16-1'); "
        "print([n for n in ('timm', 'torchvision', 'lightning', 'pandas') if n in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
