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

from attention_transfer.models import (
    LoadReport,
    WideResNet,
    fingerprint,
    load_weights,
    read_metadata,
    save_weights,
)


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


def test_between_equal_parts_the_student_is_taken(tmp_path: Path) -> None:
    student, other = net(), net()
    lightning_checkpoint(tmp_path / "last.ckpt", ema=net(), student=student)
    assert load_weights(other, tmp_path / "last.ckpt").prefix == "student."
    assert fingerprint(other) == fingerprint(student)


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
    with pytest.raises(OSError, match=r"pipe: there is something there that is not a file\."):
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
