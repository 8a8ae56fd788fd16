"""A disk that is full: one line that names the file, what was there as it was, and nothing half."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attention_transfer._files import new_folder, write_atomically
from attention_transfer._locks import LOCK
from attention_transfer.cli import main
from attention_transfer.kernels import cpu
from attention_transfer.runs import Recipe, Run
from attention_transfer.training import train

pytestmark = [
    pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def run(tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return train(replace(tiny, max_train=20, output=str(folder)), say=lambda line: None)


def fill(disk: Path, *, free: int) -> None:
    """Leave room for `free` bytes."""
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - free))


def there(disk: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(disk)): path.read_bytes() if path.is_file() else b""
        for path in disk.rglob("*")
        if path.name != LOCK
    }


VERBS: dict[str, Callable[[Run, Path], list[object]]] = {
    "report": lambda run, disk: ["report", run.folder, "-o", disk / "old"],
    "plot": lambda run, disk: ["evaluate", run.folder, "--plot", disk / "old"],
    "maps": lambda run, disk: ["maps", "image.png", "--weights", run.folder, "-o", disk / "maps.png"],
    "safetensors": lambda run, disk: ["export", run.folder, "--format", "safetensors", "-o", disk / "new"],
    "torch": lambda run, disk: ["export", run.folder, "--format", "torch", "-o", disk / "new"],
    "torch-export": lambda run, disk: ["export", run.folder, "--format", "torch-export", "-o", disk / "new"],
    "onnx": lambda run, disk: ["export", run.folder, "--format", "onnx", "-o", disk / "new"],
    "cache": lambda run, disk: [
        *("cache", "build", "--teacher", run.folder, "--data", run.recipe.data, "--accelerator", "cpu"),
        *("-o", disk / "cache"),
    ],
    "lmdb": lambda run, disk: [
        *("caffe", "lmdb", "--data", run.recipe.data, "--split", "train", "--image-size", 128),
        *("-o", disk / "lmdb"),
    ],
    "train": lambda run, disk: ["train", "--config", run.recipe_file, "--output", disk / "run"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_says_it_in_one_line_and_leaves_no_half(
    verb: str,
    run: Run,
    small_disk: Path,
    image_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("image.png").write_bytes(next(image_folder.rglob("*.png")).read_bytes())
    (small_disk / "old").write_bytes(b"as it was")
    fill(small_disk, free=16_384)
    before = there(small_disk)
    capsys.readouterr()
    assert main([*map(str, VERBS[verb](run, small_disk))]) == 2
    *notes, line = capsys.readouterr().err.splitlines()
    assert line.startswith("attention-transfer: ") and str(small_disk) in line, line
    assert "No space left on device" in line or "of room in" in line, line
    assert all(note.startswith(("note: ", "warning: ")) for note in notes), notes
    after = there(small_disk)
    assert after.items() >= before.items()
    left = {name for name in after.keys() - before.keys() if after[name]}
    assert left <= {"run/recipe.yaml", "cache/cache.json"} | {
        n for n in left if "events.out" in n or "hparams" in n
    }


def test_a_file_and_a_folder_come_whole_or_not_at_all(small_disk: Path) -> None:
    write_atomically(small_disk / "file", b"old")
    with pytest.raises(OSError, match="No space left on device") as found:
        write_atomically(small_disk / "file", bytes(1 << 20))
    assert found.value.filename == str(small_disk / "file")
    with pytest.raises(OSError, match="No space left"), new_folder(small_disk / "folder") as folder:
        write_atomically(folder / "one", b"1")
        write_atomically(folder / "two", bytes(1 << 20))
    assert there(small_disk) == {"file": b"old"}


def compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> cpu._Compiled:
    import numba

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(folder))
    monkeypatch.setattr(cpu._Compiled, "has_said", False)
    return cpu._Compiled(lambda out: out.fill(3), "fills_with_three", parallel=False)


def fills(function: cpu._Compiled) -> bool:
    out = torch.zeros(2)
    function(out.numpy())
    return out.tolist() == [3, 3]


def test_a_loss_is_compiled_where_its_cache_has_no_room(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    function = compiled(small_disk, monkeypatch)
    fill(small_disk, free=0)
    with pytest.warns(
        UserWarning, match=rf"numba's cache of compiled code in {small_disk}.*got .*No space left"
    ):
        assert fills(function)
    assert fills(function)  # and it is said once


@pytest.mark.parametrize("ending", ["nbi", "nbc"])
@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"\x80x"]
)
def test_a_loss_is_compiled_where_its_cache_is_damaged(
    ending: str, damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    assert fills(compiled(tmp_path, monkeypatch))
    (file,) = tmp_path.rglob(f"*.{ending}")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match=r"energy: expected numba's cache .* delete the \*\.nbi and \*\.nbc"):
        assert fills(compiled(tmp_path, monkeypatch))
