"""Taps: names, layouts, hazards. Each hazard test fails without its guard."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading
from collections import OrderedDict
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from attention_transfer.taps import Taps, resolve, unwrap


class Net(nn.Module):
    """Two stages, a shared ReLU and a branch that is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(4, 8, 3, 2, padding=1), nn.ReLU(inplace=True))
        self.unused = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.relu(self.stem(x))))
        return self.fc(self.relu(x).mean((2, 3)))


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def check_bare(model: nn.Module) -> None:
    """Nothing of taps is on it: as `Net` it has no `forward` of its own either."""
    assert hooks(model) == 0
    for module in model.modules():
        assert "forward" not in vars(module)
        assert type(module) in (Net, nn.Conv2d, nn.ReLU, nn.Sequential, nn.BatchNorm2d, nn.Linear)


# ------------------------------------------------------------------------------------ the plain service


def test_outputs_in_the_order_of_the_names_and_in_the_graph(net: Net, x: Tensor) -> None:
    with Taps(net, ["layer2", "layer1.0"]) as taps:
        net(x)
        maps = taps.pop()
    assert [(name, tuple(features.shape)) for name, features in maps.items()] == [
        ("layer2", (2, 8, 4, 4)),
        ("layer1.0", (2, 4, 8, 8)),
    ]
    torch.testing.assert_close(maps["layer1.0"], net.layer1[0](net.relu(net.stem(x))))
    maps["layer2"].square().sum().backward()
    assert net.stem.weight.grad.abs().sum() > 0
    assert net.fc.weight.grad is None


def test_pop_forgets(net: Net, x: Tensor) -> None:
    with Taps(net, ["layer1"]) as taps:
        net(x)
        taps.pop()
        with pytest.raises(ValueError, match="got no call since the last"):
            taps.pop()


def test_only_the_latest_forward_is_remembered(net: Net, x: Tensor) -> None:
    with Taps(net, ["layer1"]) as taps:
        net(x)
        net(x[:1])
        assert len(taps.pop()["layer1"]) == 1


def test_no_copies_are_made(net: Net, x: Tensor) -> None:
    model = Returns((x, x))
    with Taps(model, ["inner"]) as taps:
        model(x)
        assert taps.pop()["inner"] is x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(net: Net, x: Tensor, dtype: torch.dtype) -> None:
    with Taps(net.to(dtype), ["layer1"]) as taps:
        net(x.to(dtype))
        assert taps.pop()["layer1"].dtype == dtype


def test_inference_mode(net: Net, x: Tensor) -> None:
    with torch.inference_mode(), Taps(net, ["layer1", "layer2"]) as taps:
        net(x)
        assert taps.pop()["layer1"].is_inference()


# --------------------------------------------------------------------------------- what is left behind


def test_hooks_are_gone_afterwards(net: Net, x: Tensor) -> None:
    with Taps(net, ["layer1"]) as taps:
        assert hooks(net) == 1
        net(x)
    check_bare(net)
    assert taps._fired == []


def test_hooks_are_gone_after_an_exception_in_the_forward(net: Net) -> None:
    with pytest.raises(RuntimeError, match="channels"):
        with Taps(net, ["stem"]) as taps:
            net(torch.randn(2, 3, 8, 8))
            net(torch.randn(2, 7, 8, 8))
    check_bare(net)
    assert taps._fired == []


def test_taps_may_be_opened_again(net: Net, x: Tensor) -> None:
    taps = Taps(net, ["layer1"])
    for _ in range(2):
        with taps:
            net(x)
            assert list(taps.pop()) == ["layer1"]


def test_opening_twice(net: Net) -> None:
    with Taps(net, ["layer1"]) as taps:
        with pytest.raises(RuntimeError, match=r"Taps: expected to be closed .* Make a second Taps"):
            taps.__enter__()


def test_pop_when_closed(net: Net, x: Tensor) -> None:
    taps = Taps(net, ["layer1"])
    with pytest.raises(RuntimeError, match=r"Taps\.pop: expected to be called inside `with"):
        taps.pop()


def test_two_taps_at_once(net: Net, x: Tensor) -> None:
    with Taps(net, ["layer1"]) as outer, Taps(net, ["layer1", "layer2"]) as inner:
        net(x)
        assert outer.pop()["layer1"] is inner.pop()["layer1"]


# ------------------------------------------------------------------------------------------------ copies


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def fresh(model: nn.Module) -> nn.Module:
    """A shallow copy, made one of its own."""
    clone = copy.copy(model)
    clone.__dict__["_modules"] = copy.deepcopy(model)._modules
    return clone


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": fresh,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle-2": lambda model: pickle.loads(pickle.dumps(model, protocol=2)),
    "torch.save": saved,
    "averaged": lambda model: unwrap(torch.optim.swa_utils.AveragedModel(model)),
    "ema": lambda model: ModelEmaV3(model).module,
    "compiled": lambda model: unwrap(copy.deepcopy(torch.compile(model, backend="eager"))),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_made_while_taps_are_open_is_one_of_its_own(net: Net, x: Tensor, how: str) -> None:
    net.eval()  # as an average of the weights is
    with Taps(net, ["layer1", "relu#1"]) as outer, Taps(net, ["layer1", "stem"]) as inner, torch.no_grad():
        output = net(x)
        clone = COPIES[how](net)
        check_bare(clone)
        torch.testing.assert_close(clone(x), output)
        for parameter in clone.parameters():
            parameter.zero_()
        assert not clone(x).any()
        assert len(outer.pop()["layer1"]) == len(x)  # the original is tapped as before
        torch.testing.assert_close(net(x + 1), net(x + 1))
        maps = inner.pop()
        torch.testing.assert_close(maps["layer1"], net.layer1(net.relu(net.stem(x + 1))))
    check_bare(net)
    pickle.dumps(clone)


class OwnWays(nn.Module):
    """Copies itself, as it says, and lets nobody define a subclass without a word."""

    made: ClassVar[list[str]] = []

    def __init_subclass__(cls, *, word: str) -> None:
        cls.made.append(word)

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 4, 1)
        self.lock = threading.Lock()  # cannot be copied

    def __deepcopy__(self, memo: dict) -> nn.Module:
        self.made.append("deepcopy")
        clone = OwnWays()
        clone.inner = copy.deepcopy(self.inner, memo)
        return clone

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_model_that_has_its_own_way_of_being_copied_keeps_it(x: Tensor) -> None:
    model = OwnWays()
    model.inner.forward = functools.partial(nn.Conv2d.forward, model.inner)  # as some libraries do
    own = model.inner.forward
    with Taps(model, ["", "inner"]):
        clone = copy.deepcopy(model)
        assert OwnWays.made == ["deepcopy"] and type(clone) is OwnWays and hooks(clone) == 0
        assert "lock" not in vars(pickle.loads(pickle.dumps(model)))
    assert model.inner.forward is own and "forward" not in vars(model)
    traced = torch.fx.symbolic_trace(model)
    with Taps(traced, ["inner"]) as taps:
        clone = copy.deepcopy(traced)
        torch.testing.assert_close(clone(x), traced(x))
        assert hooks(clone) == 0 and taps.pop()["inner"].shape == (2, 4, 8, 8)


def test_taps_may_close_in_any_order(net: Net, x: Tensor) -> None:
    first, second = Taps(net, ["layer1"]), Taps(net, ["layer1"])
    first.__enter__()
    second.__enter__()
    first.__exit__()
    for _ in range(2):
        net(x)
        assert second.pop()["layer1"].shape == (2, 4, 8, 8)
    second.__exit__()
    check_bare(net)


# ------------------------------------------------------------------------------------------------ names


def test_unknown_name_lists_near_matches(net: Net) -> None:
    with pytest.raises(
        ValueError, match=r"resolve: expected .* module of Net, got 'layer3'\. Near: layer\d, layer"
    ):
        Taps(net, ["layer3"])


@pytest.mark.parametrize(
    "names, error, message",
    [
        ("layer1", TypeError, r"Taps: expected a list of names, got the string 'layer1'\. Pass \['layer1'\]"),
        (["stem", "stem"], ValueError, "Taps: expected each name once"),
        (["relu#x"], ValueError, r'Taps: expected "name#k" with a whole number k'),
    ],
)
def test_bad_names(net: Net, names: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Taps(net, names)


def test_names_through_wrappers_at_the_root_and_inside(net: Net, x: Tensor) -> None:
    inner = net.layer1
    net.layer1 = torch.compile(nn.DataParallel(inner), backend="eager")
    wrapped = torch.compile(nn.DataParallel(torch.optim.swa_utils.AveragedModel(net)), backend="eager")
    averaged = unwrap(wrapped)
    for name in ("layer1.0", "module.layer1.0", "_orig_mod.module.layer1._orig_mod.module.0"):
        assert resolve(wrapped, name) is resolve(averaged, "layer1.0")
    assert resolve(wrapped, "layer1") is unwrap(averaged.layer1)
    assert isinstance(resolve(wrapped, "layer1"), nn.Sequential)
    assert resolve(net, "") is net


def test_a_users_own_module_called_module_is_not_a_wrapper() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Conv2d(3, 3, 1)

    model = Residual()
    assert unwrap(model) is model
    assert resolve(model, "module") is model.module


def test_ddp(net: Net, x: Tensor, tmp_path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
        with Taps(wrapped, ["layer1"]) as taps:
            loss = wrapped(x).sum() + taps.pop()["layer1"].square().mean()
        loss.backward()
    finally:
        dist.destroy_process_group()
    assert net.stem.weight.grad is not None


def test_data_parallel_over_several_devices_is_refused(net: Net) -> None:
    wrapped = nn.DataParallel(net)
    wrapped.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"Taps: .* DataParallel over 2 devices.*DistributedDataParallel"):
        Taps(wrapped, ["layer1"])


# ------------------------------------------------------------------------------------ outputs and layouts


class Returns(nn.Module):
    """A model whose module `inner` returns what it is given."""

    def __init__(self, value: object, *extra: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.forward = lambda: value
        self.extra = nn.ModuleList(extra)

    def forward(self, x: Tensor) -> Tensor:
        self.inner()
        return x


def read(value: object, *extra: nn.Module, hw: tuple[int, int] = (32, 32), layout: object = "auto") -> Tensor:
    model = Returns(value, *extra)
    with Taps(model, ["inner"], layout=layout) as taps:
        model(torch.zeros(2, 3, *hw))
        return taps.pop()["inner"]


FEATURES = torch.arange(2 * 6 * 8 * 8.0).reshape(2, 6, 8, 8)


@pytest.mark.parametrize(
    "value",
    [
        FEATURES,
        (FEATURES, torch.zeros(1)),
        [None, FEATURES],
        ((FEATURES,), None),
        (torch.zeros(8, 6, 8), FEATURES),
        (torch.zeros(()), torch.zeros(8, 6, 8), FEATURES, FEATURES + 1),
        {"loss": torch.zeros(()), "features": FEATURES, "more": torch.zeros(2, 1, 4, 4)},
        OrderedDict(features=torch.zeros(2, 1, 4, 4), last_hidden_state=FEATURES),
    ],
    ids=["tensor", "tuple", "list", "nested", "pixels and patches", "four tensors", "dict", "model-output"],
)
def test_the_tensor_taken_from_an_output(value: object) -> None:
    assert torch.equal(read(value), FEATURES)


@pytest.mark.parametrize("height, width", [(8, 8), (4, 8), (7, 5)])
def test_nchw_nhwc_and_tokens_are_told_apart(height: int, width: int) -> None:
    hw = (4 * height, 4 * width)
    features = torch.randn(2, 24, height, width)
    tokens = features.flatten(2).mT
    classed = torch.cat([torch.zeros(2, 1, 24), tokens], dim=1)
    for value in (features, features.permute(0, 2, 3, 1), tokens, classed):
        assert torch.equal(read(value, nn.LayerNorm(24), hw=hw), features)


def test_patches_that_do_not_divide_the_image() -> None:
    assert read(torch.randn(2, 27 * 27, 6), hw=(384, 384)).shape == (2, 6, 27, 27)


def test_register_tokens() -> None:
    assert read(torch.randn(2, 5 + 16 * 16, 6), hw=(224, 224)).shape == (2, 6, 16, 16)


def test_cubes_are_nchw_without_layer_norm_and_doubtful_with_it() -> None:
    cube = torch.randn(2, 8, 8, 8)
    assert torch.equal(read(cube), cube)
    with pytest.raises(
        ValueError, match=r"one way to read 'inner', .* nchw or nhwc\. Pass layout=\{'inner': 'nchw'"
    ):
        read(cube, nn.LayerNorm(8))
    assert torch.equal(read(cube, nn.LayerNorm(8), layout="nhwc"), cube.permute(0, 3, 1, 2))
    assert torch.equal(read(cube, nn.LayerNorm(8), layout={"inner": "nchw"}), cube)


class Cubes(nn.Module):
    """A model with LayerNorm whose modules return what they are given, the first of them a cube."""

    def __init__(self, *values: Tensor) -> None:
        super().__init__()
        self.outputs = nn.ModuleList(Returns(value) for value in values)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> None:
        for module in self.outputs:
            module.inner()

    def read(self, **options: object) -> list[object]:
        with Taps(self, [f"outputs.{i}.inner" for i in range(len(self.outputs))], **options) as taps:
            self(torch.zeros(2, 3, 32, 32))
            return list(taps.pop().values())


@pytest.mark.parametrize("kind", ["nchw", "nhwc"])
def test_a_doubtful_map_is_read_as_the_others_are(kind: str) -> None:
    cube, other = torch.randn(2, 8, 8, 8), torch.randn(2, 24, 4, 4)
    tokens = torch.randn(2, 16, 24)  # have no say
    seen = (cube, other, tokens) if kind == "nchw" else (cube, other.permute(0, 2, 3, 1), tokens)
    expected = cube if kind == "nchw" else cube.permute(0, 3, 1, 2)
    model = Cubes(*seen)
    first, second, _ = model.read()
    assert torch.equal(first, expected) and torch.equal(second, other)
    first, *_ = model.read(read=lambda features: (features, features.clone()))
    assert torch.equal(first, expected)


def test_a_doubtful_map_stays_so_where_the_others_do_not_agree() -> None:
    other = torch.randn(2, 24, 4, 4)
    model = Cubes(torch.randn(2, 8, 8, 8), other, other.permute(0, 2, 3, 1))
    for options in ({}, {"read": lambda features: (features, features.sum())}):
        with pytest.raises(ValueError, match=r"one way to read 'outputs.0.inner', .* nchw or nhwc"):
            model.read(**options)


def test_a_doubtful_number_of_prefix_tokens() -> None:
    tokens = torch.randn(2, 9, 6)  # 3x3, or 2x2 and five registers
    with pytest.raises(ValueError, match=r"may be tokens\+0 or tokens\+5\. Pass layout="):
        read(tokens, hw=(12, 12))
    assert torch.equal(read(tokens, hw=(12, 12), layout="tokens+5"), tokens[:, 5:].mT.unflatten(2, (2, 2)))


def test_what_is_no_map() -> None:
    for value in (torch.randn(2, 7), torch.randn(2, 31, 6), torch.randn(2, 3, 4, 8, 8)):
        with pytest.raises(ValueError, match=r"expected 'inner' to return a map .* a 32x32 input\. Tap a"):
            read(value)
    with pytest.raises(ValueError, match=r"expected 'inner' to return a tensor, .*got str\. Tap another"):
        read("text")
    with pytest.raises(ValueError, match=r"as layout='tokens' says"):
        read(FEATURES, layout="tokens")


def test_tokens_need_the_size_of_the_image() -> None:
    model = Returns(torch.randn(2, 16, 6))
    with Taps(model, ["inner"]) as taps:
        model.inner()
        with pytest.raises(ValueError, match="no image input seen by the model"):
            taps.pop()


def test_an_image_given_by_keyword(x: Tensor) -> None:
    model = Returns(torch.randn(2, 16, 6))
    with Taps(model, ["inner"]) as taps:
        model(x=x)
        assert taps.pop()["inner"].shape == (2, 6, 4, 4)


@pytest.mark.parametrize("layout", ["nwhc", "tokens+x", {"inner": "hwc"}])
def test_unknown_layout(layout: object) -> None:
    with pytest.raises(ValueError, match=r"Taps: expected layout to be one of auto, nchw, nhwc, tokens"):
        read(FEATURES, layout=layout)


def test_layout_for_a_name_that_is_not_tapped(net: Net) -> None:
    with pytest.raises(ValueError, match=r"got one for 'layer2'\. Near: layer1"):
        Taps(net, ["layer1"], layout={"layer2": "nchw"})


@pytest.mark.parametrize("convolution, shape", [(nn.Conv1d, (2, 3, 16)), (nn.Conv3d, (2, 3, 4, 8, 8))])
def test_signals_and_video_have_no_maps(convolution: type[nn.Module], shape: tuple[int, ...]) -> None:
    model = nn.Sequential(convolution(3, 4, 3, padding=1), nn.ReLU())
    with Taps(model, ["0"]) as taps:
        model(torch.randn(shape))
        with pytest.raises(
            ValueError, match=r"a model of images \(b, c, h, w\), got .*take video frame by frame"
        ):
            taps.pop()


def test_fake_tensors(net: Net) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), Taps(net, ["layer1", "layer2"]) as taps:
        net(torch.randn(2, 3, 8, 8))
        assert {name: tuple(each.shape) for name, each in taps.pop().items()} == {
            "layer1": (2, 4, 8, 8),
            "layer2": (2, 8, 4, 4),
        }


def test_functional_gradients_and_vmap(net: Net) -> None:
    x, parameters = torch.randn(3, 2, 3, 8, 8), {name: each.detach() for name, each in net.named_parameters()}
    net.eval()

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        with Taps(net, ["layer1"]) as taps:
            torch.func.functional_call(net, parameters, (x,))
            return taps.pop()["layer1"].square().mean()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, images in enumerate(x):
        alone = torch.func.grad(loss)(parameters, images)
        with Taps(net, ["layer1"]) as taps:
            net(images)
            [expected] = torch.autograd.grad(taps.pop()["layer1"].square().mean(), [net.stem.weight])
        torch.testing.assert_close(alone["stem.weight"], expected)
        torch.testing.assert_close(together["stem.weight"][i], expected)


# ---------------------------------------------------------------------------------------------- hazards


def test_a_tap_that_never_fires(net: Net, x: Tensor) -> None:
    with Taps(net, ["layer1", "unused"]) as taps:
        net(x)
        with pytest.raises(ValueError, match=r"expected 'unused' to run once, got no call .*torch\._dynamo"):
            taps.pop()


def test_a_module_called_several_times(net: Net, x: Tensor) -> None:
    with Taps(net, ["relu"]) as taps:
        net(x)
        with pytest.raises(ValueError, match=r'got 2 calls\. Name one: "relu#0" to "relu#1"'):
            taps.pop()
    with Taps(net, ["relu#1", "relu#0"]) as taps:
        net(x)
        assert [tuple(features.shape) for features in taps.pop().values()] == [(2, 8, 4, 4), (2, 4, 8, 8)]
        net(x)
    with Taps(net, ["relu#2"]) as taps:
        net(x)
        with pytest.raises(ValueError, match=r"expected call 2 of 'relu', got 2 .*\"relu#1\""):
            taps.pop()


def test_what_a_module_is_given(net: Net, x: Tensor) -> None:
    with Taps(net, ["layer1.input", "layer1"]) as taps:
        net(x)
        maps = taps.pop()
    torch.testing.assert_close(maps["layer1.input"], net.relu(net.stem(x)))
    torch.testing.assert_close(maps["layer1"], net.layer1(maps["layer1.input"]))
    maps["layer1.input"].square().sum().backward()
    assert net.stem.weight.grad.abs().sum() > 0
    with Taps(net, ["relu.input#1"]) as taps:
        net(x)
        assert taps.pop()["relu.input#1"].shape == (2, 8, 4, 4)
    assert hooks(net) == 0


def test_what_an_in_place_module_is_given_is_gone(net: Net, x: Tensor) -> None:
    with Taps(net, ["layer2.1.input"]) as taps:
        net(x)
        with pytest.raises(ValueError, match=r"expected 'layer2.1.input' to return .* got its own output"):
            taps.pop()


def test_a_child_of_the_name_input_is_that_child(x: Tensor) -> None:
    model = nn.ModuleDict({"body": nn.Sequential(OrderedDict(input=nn.Conv2d(3, 4, 1), output=nn.ReLU()))})
    model.forward = lambda x: model["body"](x)
    with Taps(model, ["body.input", "body.input.input"]) as taps:
        model(x)
        maps = taps.pop()
    torch.testing.assert_close(maps["body.input"], model["body"].input(x))
    assert maps["body.input.input"] is x


@pytest.mark.parametrize("grad", [True, False])
def test_an_output_overwritten_in_place(net: Net, x: Tensor, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        with Taps(net, ["layer2.0"]) as taps:
            net(x)
            with pytest.raises(
                ValueError, match=r"'layer2.0' unchanged, .* in place .* Tap that ReLU itself"
            ):
                taps.pop()
        with Taps(net, ["layer2.1"]) as taps:
            net(x)
            assert taps.pop()["layer2.1"].min() >= 0


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(4, 2, 1)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.stage, x, use_reentrant=self.reentrant))


def test_recomputation_in_the_backward_of_a_checkpoint_is_ignored(x: Tensor) -> None:
    model = Checkpointed(reentrant=False)
    with Taps(model, ["stage"]) as taps, set_checkpoint_early_stop(False):
        model(x).sum().backward()
        features = taps.pop()["stage"]
        assert features.requires_grad
        model(x).sum().backward()
        taps.pop()
        with pytest.raises(ValueError, match="no call since"):
            taps.pop()
    plain = model.head(model.stage(x))
    torch.testing.assert_close(model.head(features), plain)


def test_reentrant_checkpointing_hands_out_a_tensor_without_grad(x: Tensor) -> None:
    model = Checkpointed(reentrant=True)
    with Taps(model, ["stage.0"]) as taps:
        model(x.requires_grad_()).sum().backward()
        assert not taps.pop()["stage.0"].requires_grad


# ---------------------------------------------------------------------------------------- torch.compile


def loss_and_maps(model: nn.Module, taps: Taps, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(x)
    maps = taps.pop()
    return logits.sum() + sum(features.square().mean() for features in maps.values()), maps


def check_step(compiled: nn.Module, taps: Taps, names: list[str], x: Tensor) -> None:
    """Values and gradients of one tapped step equal those of an uncompiled twin."""
    twin = Net()
    twin.load_state_dict(unwrap(compiled).state_dict())
    with Taps(twin, names) as plain:
        expected, expected_maps = loss_and_maps(twin, plain, x)
    loss, maps = loss_and_maps(compiled, taps, x)
    torch.testing.assert_close(maps, expected_maps)
    compiled.zero_grad()
    loss.backward()
    expected.backward()
    for ours, theirs in zip(unwrap(compiled).parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.fixture(params=["eager", "aot_eager"])
def compiled(net: Net, request: pytest.FixtureRequest):
    torch._dynamo.reset()
    yield torch.compile(net, backend=request.param, fullgraph=True)
    torch._dynamo.reset()


@pytest.mark.unchecked
def test_compiled_taps_kept_open(compiled: nn.Module) -> None:
    names = ["layer1", "layer2"]
    with Taps(compiled, names) as taps:
        for _ in range(3):
            check_step(compiled, taps, names, torch.randn(2, 3, 8, 8))


@pytest.mark.unchecked
def test_compiled_taps_of_what_a_module_is_given(compiled: nn.Module, x: Tensor) -> None:
    names = ["layer1.input", "layer2"]
    with Taps(compiled, names) as taps:
        check_step(compiled, taps, names, x)


@pytest.mark.unchecked
def test_compiled_taps_opened_around_each_step(
    compiled: nn.Module, x: Tensor, pytestconfig: pytest.Config
) -> None:
    torch._dynamo.utils.counters.clear()
    for step in range(3):
        with Taps(compiled, ["layer1", "layer2"]) as taps:
            check_step(compiled, taps, ["layer1", "layer2"], torch.randn(2, 3, 8, 8))
        compiled(x + step)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 2 or pytestconfig.getoption("--shapes")  # with taps, without; the checks add their own


@pytest.mark.unchecked
def test_compiled_taps_opened_after_calls_without_them(compiled: nn.Module, x: Tensor) -> None:
    for _ in range(3):
        compiled(x)
    for names in (["layer1"], ["layer2", "layer1"], ["layer1.0"]):
        with Taps(compiled, names) as taps:
            check_step(compiled, taps, names, torch.randn(2, 3, 8, 8))


@pytest.mark.unchecked
def test_compiled_in_place_overwriting(compiled: nn.Module, x: Tensor) -> None:
    with Taps(compiled, ["layer2.0"]) as taps:
        compiled(x)
        with pytest.raises(ValueError, match="in place"):
            taps.pop()


class Deep(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.unchecked
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_compiled_models_do_not_use_up_each_others_recompilations(x: Tensor) -> None:
    torch._dynamo.reset()
    for depth in range(1, 10):  # the limit is eight
        compiled = torch.compile(Deep(depth), backend="eager")
        with Taps(compiled, ["layers.0"]) as taps:
            compiled(x)
            assert taps.pop()["layers.0"].shape[0] == len(x)
    torch._dynamo.reset()


@pytest.mark.unchecked
def test_compiled_shared_module(compiled: nn.Module, x: Tensor) -> None:
    with Taps(compiled, ["relu#1"]) as taps:
        check_step(compiled, taps, ["relu#1"], x)


def test_compiled_in_place_of_the_call_and_inside_the_model(net: Net, x: Tensor) -> None:
    torch._dynamo.reset()
    net.layer1.compile(backend="aot_eager")
    net.layer2 = torch.compile(net.layer2, backend="aot_eager")
    net(x)
    with Taps(net, ["layer1", "layer2"]) as taps:
        net(x)
        assert [tuple(f.shape) for f in taps.pop().values()] == [(2, 4, 8, 8), (2, 8, 4, 4)]
    torch._dynamo.reset()


def test_a_compiled_graph_that_ignores_taps_is_an_error_and_never_stale(net: Net, x: Tensor) -> None:
    """What a compiled call would do without the classes that it is guarded by: run, and fire no hook."""
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    with Taps(compiled, ["layer1"]) as taps:
        del net.forward
        net.__class__, net.layer1.__class__ = Net, nn.Sequential
        compiled(x)
        with pytest.raises(ValueError, match=r"no call .*may need torch\._dynamo\.reset\(\)"):
            taps.pop()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_inductor(net: Net, x: Tensor) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(net)
    compiled(x)
    for _ in range(2):
        with Taps(compiled, ["layer1", "layer2"]) as taps:
            check_step(compiled, taps, ["layer1", "layer2"], x)
    torch._dynamo.reset()


# --- reading on the spot ------------------------------------------------------------------------------------


def scaled(features: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Goes on with twice the features, and keeps their shape."""
    return 2 * features, tuple(features.shape)


def test_what_is_read_takes_the_place_of_the_map_and_the_features_of_the_output() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid()), torch.randn(2, 3, 8, 8)
    with Taps(model, ["0"], read=scaled) as taps:
        got = model(x)
        assert taps.pop() == {"0": (2, 4, 8, 8)}
    assert torch.equal(got, model[1](2 * model[0](x)))


def test_only_the_call_that_is_meant_is_read() -> None:
    shared = nn.Identity()
    model = nn.Sequential(shared, nn.Conv2d(3, 5, 1), shared, nn.AvgPool2d(2), shared)
    with Taps(model, ["0#1"], read=scaled) as taps:
        got = model(torch.ones(1, 3, 8, 8))
        assert taps.pop() == {"0#1": (1, 5, 8, 8)}
    torch.testing.assert_close(got, 2 * model(torch.ones(1, 3, 8, 8)))


def test_a_layer_overwritten_after_it_was_read_is_refused_if_its_gradient_would_be_wrong() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    x = torch.randn(2, 3, 8, 8)
    with Taps(model, ["0"], read=lambda features: (features, features.sum())) as taps:
        model(x)
        with pytest.raises(ValueError, match="expected the output of '0' unchanged, got one that was overw"):
            taps.pop()
        with torch.no_grad():  # what was read is right, and there is no backward pass
            want = model[0](x).sum()
            model(x)
            torch.testing.assert_close(taps.pop()["0"], want)
