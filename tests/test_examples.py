"""The examples run, and what they print is so."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from attention_transfer.cli import main

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_custom_loop(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "custom_loop.py"))["main"](epochs=1)
    printed = capsys.readouterr().out
    assert "group2 <- group2" in printed
    assert re.search(r"epoch 1: ce \d\.\d+  at/group0 0\.\d+  at/group1 0\.\d+  at/group2 0\.\d+\n", printed)
    assert re.search(r"test error: teacher \d+\.\d %, student \d+\.\d %\n", printed)


def test_caffe_resnet(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        options = ["--split", split, "--image-size", "32", "--pad", "4", "-o", f"{split}.lmdb"]
        assert main(["caffe", "lmdb", "--data", str(image_folder), *options]) == 0
    example = runpy.run_path(str(EXAMPLES / "caffe_resnet.py"))
    files = ["--train", "train.lmdb", "--test", "test.lmdb", "-o", "resnet8"]
    example["main"](["--depth", "8", "--batch", "4", "--iterations", "3", "--test-images", "100", *files])
    assert main(["caffe", "train", "--solver", "resnet8_solver.prototxt"]) == 0
    assert (tmp_path / "resnet8_iter_3.caffemodel").exists()
    net = example["resnet"](20, "train.lmdb", "test.lmdb")
    kinds = [layer.type for layer in net.layer]
    assert kinds.count("Convolution") + kinds.count("InnerProduct") == 20 + 2  # two shortcuts are not counted
    with pytest.raises(SystemExit, match="expected a depth of 6 k \\+ 2 layers, got 19"):
        example["resnet"](19, "", "")
