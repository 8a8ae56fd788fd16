"""Weights on disk: every kind of file, every kind of damage, atomic writing, fingerprints."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import torch as safetensors_torch
from torch import Tensor, nn

from attention_transfer.cli import main
from attention_transfer.models import (
    LoadReport,
    WideResNet,
    build_model,
    fingerprint,
    load_weights,
    read_metadata,
    save_weights,
)
from attention_transfer.runs import Recipe
from attention_transfer.training.build import build_student, load_splits


def net(**options: int) -> WideResNet:
    return WideResNet(10, 1, **options)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[WideResNet, Path]:
    model = net()
    model(torch.randn(4, 3, 8, 8))  # BatchNorm statistics that are not the initial ones
    save_weights(model, tmp_path / "w.safetensors")
    return model, tmp_path / "w.safetensors"


class Tied(nn.Module):
    """Two layers that are one parameter, a transposed weight, and a view of another's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)
        self.b = nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight
        self.c = nn.Parameter(torch.randn(3, 5).t())
        base = torch.randn(6)
        self.register_buffer("head", base[:4])
        self.register_buffer("tail", base[2:])
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("count", torch.tensor(3))


# Files that load


def test_save_and_load_return_the_same_weights(saved: tuple[WideResNet, Path]) -> None:
    model, path = saved
    other = net()
    report = load_weights(other, path)
    assert fingerprint(other) == fingerprint(model)
    assert report.complete
    assert report.loaded == len(model.state_dict())
    assert str(report) == f"{path}: {report.loaded} tensors loaded"


@pytest.mark.parametrize("keys", [(), ("state_dict",), ("model",), ("params",), ("model", "state_dict")])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_checkpoints_plain_and_nested(keys: tuple[str, ...], zipped: bool, tmp_path: Path) -> None:
    model = net()
    content: dict = model.state_dict()
    for key in keys:
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    other = net()
    assert load_weights(other, tmp_path / "w.pt").complete
    assert fingerprint(other) == fingerprint(model)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_wrapper_prefixes_are_ignored(prefix: str, tmp_path: Path) -> None:
    model = net()
    torch.save({prefix + name: value for name, value in model.state_dict().items()}, tmp_path / "w.pt")
    other = net()
    assert load_weights(other, tmp_path / "w.pt").complete
    assert fingerprint(other) == fingerprint(model)


def test_a_wrapped_model_loads_saves_and_fingerprints_like_a_bare_one(saved: tuple[WideResNet, Path]) -> None:
    model, path = saved
    wrapped = nn.DataParallel(torch.compile(net()))
    assert load_weights(wrapped, path).complete
    assert fingerprint(wrapped) == fingerprint(model)
    save_weights(wrapped, path.with_name("again.safetensors"))
    assert path.with_name("again.safetensors").read_bytes() == path.read_bytes()


def test_a_model_with_an_attribute_called_module_keeps_its_names(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)
            self.weight = nn.Parameter(torch.randn(2, 2))

    model, other = Holder(), Holder()
    save_weights(model, tmp_path / "w.safetensors")
    assert load_weights(other, tmp_path / "w.safetensors").loaded == 3
    assert torch.equal(other.module.weight, model.module.weight)
    assert torch.equal(other.weight, model.weight)


def lightning_checkpoint(path: Path, **models: nn.Module) -> None:
    state = {f"{part}.{name}": v for part, model in models.items() for name, v in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 7, "optimizer_states": [{"lr": 0.1}]}, path)


def test_lightning_checkpoints_give_the_part_that_fits(tmp_path: Path) -> None:
    student, teacher = WideResNet(10, 2), WideResNet(10, 4)  # equal names, other shapes
    lightning_checkpoint(tmp_path / "last.ckpt", teacher=teacher, student=student)
    taken, taught = WideResNet(10, 2), WideResNet(10, 4)
    report = load_weights(taken, tmp_path / "last.ckpt")
    assert report.prefix == "student."
    assert str(report).endswith('tensors loaded, under the prefix "student."')
    assert fingerprint(taken) == fingerprint(student)
    assert load_weights(taught, tmp_path / "last.ckpt").prefix == "teacher."
    assert fingerprint(taught) == fingerprint(teacher)


# Files with several networks


def under(prefix: str, model: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in model.state_dict().items()}


def two_networks(layout: str, path: Path) -> tuple[WideResNet, WideResNet]:
    """A file of two networks of one shape, as programs of these kinds write them."""
    one, other = net(), net()
    if layout == "safetensors":
        save_weights(nn.ModuleDict({"student": one, "teacher": other}), path)
        return one, other
    moco = {"encoder_q": under("module.encoder_q.", one), "encoder_k": under("module.encoder_k.", other)}
    content: dict = {
        "distillation": {"state_dict": under("student_model.", one) | under("teacher.", other)},
        "self-supervision": {"state_dict": moco["encoder_q"] | moco["encoder_k"], "arch": "resnet"},
        "averages": {"state_dict": under("model.", one) | under("ema.", other), "epoch": 3},
        "averages in a dict": {"state_dict": one.state_dict(), "state_dict_ema": other.state_dict()},
        "a wrapped average": {"model": one.state_dict(), "model_ema": under("module.", other)},
        "dicts alone": {"student": under("module.backbone.", one), "teacher": under("backbone.", other)},
        "beside it": {**one.state_dict(), **under("ema.", other)},
        "deep": {"nets": {"a": {"state_dict": one.state_dict()}, "b": {"state_dict": other.state_dict()}}},
        "numbers": {"folds": {0: one.state_dict(), 1: other.state_dict()}},
        "compiled": {**one.state_dict(), **under("_orig_mod.", other)},
    }[layout]
    torch.save(content, path)
    return one, other


@pytest.mark.parametrize(
    ("layout", "prefixes"),
    [
        ("distillation", ("teacher", "student_model")),
        ("safetensors", ("student", "teacher")),
        ("self-supervision", ("encoder_k", "encoder_q")),
        ("averages", ("ema", "model")),
        ("averages in a dict", ("", "state_dict_ema")),
        ("a wrapped average", ("", "model_ema")),
        ("dicts alone", ("student.backbone", "teacher.backbone")),
        ("beside it", ("", "ema")),
        ("deep", ("nets.a.state_dict", "nets.b.state_dict")),
        ("numbers", ("folds.0", "folds.1")),
        ("compiled", ("", "_orig_mod")),
    ],
)
def test_of_several_networks_none_is_taken_until_one_is_named(
    layout: str, prefixes: tuple[str, str], tmp_path: Path
) -> None:
    path, model = tmp_path / "w", net()
    networks = {fingerprint(each) for each in two_networks(layout, path)}
    before, listed = fingerprint(model), ", ".join(f'"{prefix}"' for prefix in prefixes)
    for strict in (True, False, "body"):
        with pytest.raises(ValueError, match=f"fits WideResNet, got several: {listed}. Name one of these "):
            load_weights(model, path, strict=strict)
    assert fingerprint(model) == before
    found = set()
    for prefix in prefixes:
        report = load_weights(model, path, prefix=prefix)
        assert report.complete and report.prefix.removesuffix(".") == prefix
        found.add(fingerprint(model))
        load_weights(model, f"{path}:{prefix}")
        assert fingerprint(model) in found
    assert found == networks


def test_a_prefix_may_end_before_the_names_begin(tmp_path: Path) -> None:
    student, _ = two_networks("dicts alone", tmp_path / "w.pt")
    model = net()
    assert load_weights(model, f"{tmp_path / 'w.pt'}:student").prefix == "student.backbone."
    assert fingerprint(model) == fingerprint(student)
    with pytest.raises(ValueError, match=r'got none under "ema"; there are: "student\.backbone", "teacher'):
        load_weights(model, tmp_path / "w.pt", prefix="ema")


def test_a_path_with_a_colon_is_a_path(saved: tuple[WideResNet, Path]) -> None:
    model, path = saved
    odd, other = path.with_name("w:teacher"), net()
    path.rename(odd)
    assert load_weights(other, odd).complete
    assert fingerprint(other) == fingerprint(model)
    with pytest.raises(FileNotFoundError, match="no:teacher, which does not exist"):
        load_weights(other, path.with_name("no:teacher"))


def test_one_network_under_two_names_is_one(tmp_path: Path) -> None:
    model, other = net(), net()
    lightning_checkpoint(tmp_path / "last.ckpt", distiller=nn.ModuleDict({"net": model}), net=model)
    assert load_weights(other, tmp_path / "last.ckpt").prefix == "net."
    assert fingerprint(other) == fingerprint(model)
    save_weights(nn.ModuleDict({"a": model, "b": model}), tmp_path / "w.safetensors")
    assert load_weights(net(), tmp_path / "w.safetensors").complete


def test_a_network_that_fits_whole_goes_before_one_whose_body_fits(tmp_path: Path) -> None:
    tuned, other = net(num_classes=10), net()
    lightning_checkpoint(tmp_path / "last.ckpt", before=net(num_classes=100), tuned=tuned)
    for strict in (True, False, "body"):
        assert load_weights(other, tmp_path / "last.ckpt", strict=strict).prefix == "tuned."
        assert fingerprint(other) == fingerprint(tuned)
    wider = net(num_classes=7)
    with pytest.raises(ValueError, match='got several: "tuned", "before"'):
        load_weights(wider, tmp_path / "last.ckpt", strict="body")
    assert load_weights(wider, tmp_path / "last.ckpt", strict="body", prefix="before").new_head


def test_parts_that_fit_alike_in_part_are_not_chosen_among(tmp_path: Path) -> None:
    lightning_checkpoint(tmp_path / "last.ckpt", a=net(), b=net(), small=nn.ModuleDict({"bn": net().bn}))
    model = WideResNet(16, 1)
    with pytest.raises(ValueError, match='got several: "a", "b"\\. Name'):
        load_weights(model, tmp_path / "last.ckpt", strict=False)
    assert load_weights(model, tmp_path / "last.ckpt", strict=False, prefix="b").prefix == "b."


def test_an_optimizers_state_is_another_matter(tmp_path: Path) -> None:
    model, other = net(), net()
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(2)}}}
    torch.save({**model.state_dict(), "optimizer": optimizer}, tmp_path / "w.pt")
    assert load_weights(other, tmp_path / "w.pt").complete
    assert fingerprint(other) == fingerprint(model)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    torch.save({1: torch.zeros(2), "1": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"damaged or of another format \(two tensors are called 1\)"):
        load_weights(nn.Linear(1, 1), tmp_path / "w.pt")


# Dtypes


class Numbers(nn.Module):
    """A weight, and buffers of whole numbers."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3, dtype=dtype))
        self.register_buffer("index", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("mask", torch.zeros(3, dtype=torch.bool))


NOT_WEIGHTS = [
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.bool, torch.uint8, torch.int8,
    torch.int16, torch.int32, torch.int64, torch.uint16, torch.complex64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", NOT_WEIGHTS, ids=str)
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_numbers_that_are_no_weights_without_a_scale_are_refused(
    dtype: torch.dtype, kind: str, tmp_path: Path
) -> None:
    path, model = tmp_path / f"w.{kind}", Numbers()
    state = Numbers().state_dict() | {"weight": torch.ones(2, 3).to(dtype)}
    torch.save(state, path) if kind == "pt" else safetensors_torch.save_file(state, path)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        ValueError, match=rf"1 of another dtype: weight \(model float32, file {name}\)\. Numbers of such"
    ):
        load_weights(model, path)
    assert "1 of another dtype" in str(load_weights(model, path, strict=False))
    assert not model.weight.any()


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells of its own deprecation of such tensors
        quantised = torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8)
        torch.save(Numbers().state_dict() | {"weight": quantised}, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=r"weight \(model float32, file qint8\)"):
            load_weights(Numbers(), tmp_path / "w.pt")


@pytest.mark.parametrize("model", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("file", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_become_each_other_and_none_becomes_infinite(
    model: torch.dtype, file: torch.dtype, tmp_path: Path
) -> None:
    values = torch.tensor([[0.5, -3.0, 65504.0], [float("inf"), 2**-10, 0.0]]).to(file)
    save_weights(source := Numbers(file), tmp_path / "w.safetensors")
    torch.save(source.state_dict() | {"weight": values}, tmp_path / "w.pt")
    ours = Numbers(model)
    if file == torch.bfloat16 and model == torch.float16:  # bfloat16 made 65536 of it
        with pytest.raises(ValueError, match=r"numbers that torch\.float16 holds, got others, of torch\.bf"):
            load_weights(ours, tmp_path / "w.pt")
        assert not ours.weight.any()
    else:
        assert load_weights(ours, tmp_path / "w.pt").complete
        assert torch.equal(ours.weight, values.to(model))


@pytest.mark.parametrize(
    ("index", "mask"),
    [
        (torch.tensor([1, 2, 3], dtype=torch.int32), torch.tensor([0, 1, 0], dtype=torch.uint8)),
        (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0], dtype=torch.bool)),
    ],
)
def test_whole_numbers_keep_their_values_or_are_refused(index: Tensor, mask: Tensor, tmp_path: Path) -> None:
    state, model = Numbers().state_dict(), Numbers()
    torch.save(state | {"index": index, "mask": mask}, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert model.index.tolist() == [1, 2, 3] and model.mask.tolist() == [False, True, False]
    for odd in ({"index": torch.tensor([1.5, 0, 0])}, {"mask": torch.tensor([0, 2, 1])}):
        torch.save(state | odd, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=r"got others, of torch.\w+, in (index|mask) of "):
            load_weights(Numbers(), tmp_path / "w.pt")


def test_one_tied_weight_takes_no_two_tensors(tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in Tied().state_dict().items()}
    torch.save(state | {"b.weight": state["b.weight"] + 1}, tmp_path / "w.pt")
    with pytest.raises(
        ValueError, match=r"for a\.weight, b\.weight, which the model ties, got two that differ"
    ):
        load_weights(Tied(), tmp_path / "w.pt")


def test_a_run_folder_gives_its_student(tmp_path: Path) -> None:
    model, other = net(), net()
    save_weights(model, tmp_path / "student.safetensors")
    load_weights(other, tmp_path)
    assert fingerprint(other) == fingerprint(model)


def test_old_checkpoints_without_batch_counters_load(tmp_path: Path) -> None:
    state = {name: v for name, v in net().state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pt")
    assert load_weights(net(), tmp_path / "w.pt").complete


def test_half_precision_files_load_into_float32(tmp_path: Path) -> None:
    model, other = net(), net()
    save_weights(model.half(), tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    assert other.fc.weight.dtype == torch.float32
    assert torch.equal(other.fc.weight.half(), model.fc.weight)


def test_tied_and_non_contiguous_tensors_survive(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    save_weights(model, tmp_path / "w.safetensors")
    assert load_weights(other, tmp_path / "w.safetensors").complete
    assert other.a.weight is other.b.weight
    for name, tensor in model.state_dict().items():
        if name not in ("head", "tail"):  # overlapping memory of its own cannot take two values at a place
            assert torch.equal(tensor, other.state_dict()[name])
    stored = safetensors_torch.load_file(tmp_path / "w.safetensors")
    assert torch.equal(stored["tail"], model.tail)


def test_a_tied_weight_stored_once_fills_both_names(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    state = {name: v.clone() for name, v in model.state_dict().items() if name != "b.weight"}
    torch.save(state, tmp_path / "w.pt")
    assert load_weights(other, tmp_path / "w.pt").missing == ()
    assert torch.equal(other.b.weight, model.b.weight)


def test_metadata_comes_back(tmp_path: Path) -> None:
    save_weights(net(), tmp_path / "student.safetensors", {"model": "wrn-10-1"})
    assert read_metadata(tmp_path / "student.safetensors") == {"model": "wrn-10-1"}
    assert read_metadata(tmp_path) == {"model": "wrn-10-1"}
    torch.save(net().state_dict(), tmp_path / "w.pt")
    assert read_metadata(tmp_path / "w.pt") == {}


# Files that do not fit


def test_another_number_of_classes_names_both(tmp_path: Path) -> None:
    save_weights(net(num_classes=100), tmp_path / "w.safetensors")
    model = net()
    before = fingerprint(model)
    message = (
        r"^load_weights: .*w\.safetensors does not fit WideResNet: the head fc has 100 classes in the file "
        r"and 10 in the model\. Build the model with num_classes=100, or pass strict=False to load all but"
    )
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "w.safetensors")
    assert fingerprint(model) == before
    report = load_weights(model, tmp_path / "w.safetensors", strict=False)
    assert [m.name for m in report.mismatched] == ["fc.weight", "fc.bias"]
    assert "2 of another shape: fc.weight (model (10, 64), file (100, 64))" in str(report)
    assert fingerprint(model) != before


def test_missing_and_unexpected_tensors_are_listed_and_counted(tmp_path: Path) -> None:
    small, large = WideResNet(10, 1), WideResNet(16, 1)
    save_weights(small, tmp_path / "small.safetensors")
    save_weights(large, tmp_path / "large.safetensors")
    with pytest.raises(
        ValueError, match=r"\d+ missing in the file: group0\.block1.* and \d+ more\. Check the"
    ):
        load_weights(large, tmp_path / "small.safetensors")
    with pytest.raises(
        ValueError, match=r"\d+ unexpected in the file: group\d\.block1.* and \d+ more\. Check"
    ):
        load_weights(small, tmp_path / "large.safetensors")
    report = load_weights(large, tmp_path / "small.safetensors", strict=False)
    assert len(str(report).splitlines()) == 2
    assert str(report).count(",") == 7


def test_other_channels_are_a_shape_not_a_head(tmp_path: Path) -> None:
    save_weights(net(in_channels=1), tmp_path / "w.safetensors")
    with pytest.raises(
        ValueError, match=r"1 of another shape: conv0\.weight \(model \(16, 3, 3, 3\), file \(16, 1"
    ):
        load_weights(net(), tmp_path / "w.safetensors")


def test_a_file_of_another_model_is_refused_even_if_not_strict(tmp_path: Path) -> None:
    save_weights(nn.Conv1d(2, 2, 1), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="no tensor of it has a name of the model"):
        load_weights(net(), tmp_path / "w.safetensors", strict=False)


def test_paths_that_hold_no_weights(tmp_path: Path) -> None:
    for path in (tmp_path / "no.safetensors", tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"^load_weights: expected .*which does not exist\. Check"
        ):
            load_weights(net(), path)
    with pytest.raises(ValueError, match=r"got /dev/null, which is not one\."):
        load_weights(net(), "/dev/null")


# Files that are damaged, foreign or dangerous


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle", "pickle protocol 2"])
def test_a_malicious_pickle_is_refused_and_does_not_run(writer: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "code has run", tmp_path / "w.pt"
    content = {"weight": torch.zeros(2), "x": Malicious(marker)}
    if writer.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=2 if "2" in writer else None))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
    with pytest.raises(
        ValueError, match=r"^load_weights: expected tensors alone.*so it is refused\. Save the"
    ):
        load_weights(net(), path)
    assert not marker.exists()
    if writer == "pickle protocol 2":
        with path.open("rb") as file:
            pickle.load(file)  # the same file does run elsewhere: the refusal is not an accident
        assert marker.exists()


def test_a_pickled_module_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "w.pt")
    with pytest.raises(
        ValueError, match=r"which holds the pickled object torch\.nn\.modules\.linear\.Linear\."
    ):
        load_weights(net(), tmp_path / "w.pt")


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"^load_weights: expected a safetensors file or a torch checkpoint"):
        load_weights(net(), tmp_path / "w.pt")


@pytest.mark.parametrize("keep", [0, 4, 9, 200, -7])
def test_a_truncated_safetensors_file(keep: int, saved: tuple[WideResNet, Path]) -> None:
    _, path = saved
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ValueError, match=r"^load_weights: expected .*, got .*w\.safetensors.*(again|file)\.$"
    ):
        load_weights(net(), path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_truncated_checkpoint(zipped: bool, share: float, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(net().state_dict(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"^load_weights: expected .*, got .*w\.pt") as caught:
        load_weights(net(), path)
    assert "\n" not in str(caught.value)


def test_a_damaged_header(saved: tuple[WideResNet, Path]) -> None:
    _, path = saved
    content = path.read_bytes()
    path.write_bytes(content[:60] + b"\xff\x00" + content[62:])
    with pytest.raises(
        ValueError, match=r"which is damaged or of another format \(.*\)\. Copy or download it again"
    ):
        load_weights(net(), path)
    with pytest.raises(ValueError, match="damaged"):
        read_metadata(path)


@pytest.mark.parametrize("content", [b"these are no weights\n", b"\x89PNG\r\n\x1a\n" + bytes(50), bytes(100)])
def test_a_foreign_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"^load_weights: expected .*, got .*w\.pt") as caught:
        load_weights(net(), tmp_path / "w.pt")
    assert "\n" not in str(caught.value)


def test_a_foreign_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("letter.txt", "dear reader")
    with pytest.raises(ValueError, match="damaged or of another format"):
        load_weights(net(), tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "holds"),
    [
        ({"epoch": 3, "lr": 0.1}, "epoch, lr"),
        ([1, 2], "a list"),
        ({}, "nothing"),
        (torch.zeros(3), "a Tensor"),
    ],
)
def test_a_checkpoint_without_weights(content: object, holds: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(
        ValueError, match=rf"expected a state dict, .* which holds {holds}\. Save the weights"
    ):
        load_weights(net(), tmp_path / "w.pt")


# Writing


def test_a_full_disk_leaves_the_old_file_intact(saved: tuple[WideResNet, Path]) -> None:
    """A real limit on the size of files, in a process of its own: the write fails half way."""
    _, path = saved
    before = path.read_bytes()
    code = f"""
import resource
from attention_transfer.models import WideResNet, save_weights
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save_weights(WideResNet(16, 1), {str(path)!r})
except OSError as error:
    print(type(error).__name__, error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"OSError save_weights: could not write {path}: File too large.")
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_targets_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "no folder" / "w", tmp_path / "file" / "w", Path("/proc/w"), tmp_path):
        with pytest.raises(
            OSError, match=rf"^save_weights: could not write {path}: .*or choose another folder\.$"
        ):
            save_weights(net(), path)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_device_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    """Renaming over /dev/null would succeed for root; a named pipe stands for it here."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"pipe: Something is there that is not a file\."):
        save_weights(net(), tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_saving_replaces_the_old_file_and_leaves_nothing_else(saved: tuple[WideResNet, Path]) -> None:
    _, path = saved
    model = net()
    save_weights(model, path)
    other = net()
    load_weights(other, path)
    assert fingerprint(other) == fingerprint(model)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


# Fingerprints


def test_a_fingerprint_is_short_hex_and_repeats() -> None:
    model = net()
    assert len(fingerprint(model)) == 16
    assert int(fingerprint(model), 16) >= 0
    assert fingerprint(model) == fingerprint(model)
    assert fingerprint(Tied()) != fingerprint(Tied())


def test_any_change_of_state_changes_the_fingerprint() -> None:
    model = net()
    seen = {fingerprint(model)}
    with torch.no_grad():
        model.fc.bias[3] += 1e-7
        seen.add(fingerprint(model))
        model.bn.running_mean[0] = 1e-7
        seen.add(fingerprint(model))
        seen.add(fingerprint(model.bfloat16()))
    assert len(seen) == 4


def test_names_and_shapes_count_too() -> None:
    def holder(name: str, value: Tensor) -> nn.Module:
        model = nn.Module()
        model.register_buffer(name, value)
        return model

    models = [holder("a", torch.zeros(4)), holder("b", torch.zeros(4)), holder("a", torch.zeros(2, 2))]
    assert len({fingerprint(model) for model in models}) == 3


def test_layout_mode_and_gradients_do_not_count() -> None:
    model = net()
    before = fingerprint(model)
    model.eval().requires_grad_(False)
    assert fingerprint(model.to(memory_format=torch.channels_last)) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_does_not_count() -> None:
    model = net()
    assert fingerprint(model) == fingerprint(model.cuda())


def test_a_report_lists_eight_names_of_a_kind() -> None:
    report = LoadReport(Path("w"), 1, missing=tuple("abcdefghijk"), unexpected=("x",))
    assert str(report) == (
        "w: 1 tensors loaded\n  11 missing in the file: a, b, c, d, e, f, g, h and 3 more\n"
        "  1 unexpected in the file: x"
    )


# The command


def test_the_command_asks_for_a_prefix_and_keeps_it(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    networks = {name: build_model("wrn-10-1", num_classes=3) for name in ("student_model", "teacher")}
    lightning_checkpoint(Path("last.ckpt"), **networks)
    image, output = f"{tiny.data}/red/0.png", ("--output", "run")
    train = ("train", "--data", tiny.data, "--student", "wrn-10-1", "--epochs", "1", "--accelerator", "cpu")
    taught = (*train, "--teacher", "wrn-10-1", "--teacher-weights")
    commands: list[tuple[str, ...]] = [
        (*train, "--method", "none", *output, "--student-weights"),
        (*taught, "last.ckpt:student_model", *output, "--student-weights"),
        (*taught,),
        ("evaluate", "--data", tiny.data, "--model", "wrn-10-1"),
        ("maps", image, "--model", "wrn-10-1", "--num-classes", "3", "--image-size", "16", "--weights"),
    ]
    for command in commands:
        assert main([*command, "last.ckpt"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert 'got several: "teacher", "student_model". Name one of these prefixes: ' in line
        assert 'last.ckpt:student_model, or prefix="student_model" in Python.' in line
    for command in (*commands[:1], *commands[3:]):
        assert main([*command, "last.ckpt:teacher"]) == 0
    recipe = Recipe.load("run/recipe.yaml")
    assert recipe.student_weights == f"{tmp_path}/last.ckpt:teacher"
    monkeypatch.chdir("run")
    student = build_student(recipe, load_splits(recipe))
    assert fingerprint(student) == fingerprint(networks["teacher"])
    assert recipe.resolved() == recipe
