"""From images to a taught student, by the command alone: lmdb, build, check, train, convert."""

from __future__ import annotations

import csv
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from attention_transfer.caffe import Net, read_caffemodel, read_solver, write_prototxt
from attention_transfer.caffe.files.caffemodel import blob_array
from attention_transfer.cli import main

EXAMPLE = Path(__file__).parents[1] / "examples" / "caffe_resnet.py"


def command(text: str) -> None:
    assert main(["caffe", *text.split()]) == 0


def write_resnet(name: str, depth: int, images: int, batch: int, iterations: int) -> None:
    example = runpy.run_path(str(EXAMPLE))
    net = example["resnet"](depth, "train.lmdb", "test.lmdb", batch=batch, test_batch=100)
    write_prototxt(net, f"{name}.prototxt")
    solver = example["solver"](f"{name}.prototxt", name, iterations, test_images=images)
    solver.test_interval = iterations
    solver.solver_mode = solver.CPU
    write_prototxt(solver, f"{name}_solver.prototxt")


def column(path: str, name: str) -> list[float]:
    with Path(path).open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.mark.parametrize(
    ("depths", "images", "batch", "iterations"),
    [
        pytest.param((8, 14), 200, 16, 12, id="resnet8 from resnet14"),
        pytest.param((20, 56), 2000, 64, 60, id="resnet20 from resnet56", marks=pytest.mark.slow),
    ],
)
def test_a_student_is_taught_and_its_teacher_stays_as_it_was(
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    depths: tuple[int, int],
    images: int,
    batch: int,
    iterations: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        command(
            f"lmdb --data cifar10 --root {shared_data} --split {split} --pad 4 --limit {images} "
            f"-o {split}.lmdb"
        )
    for name, depth in zip(("student", "teacher"), depths, strict=True):
        write_resnet(name, depth, images, batch, iterations)
    command("train --solver teacher_solver.prototxt")
    teacher = f"teacher_iter_{iterations}.caffemodel"
    command(
        "build --student student.prototxt --teacher teacher.prototxt --solver student_solver.prototxt "
        f"--teacher-weights {teacher} -o at.prototxt"
    )
    command("check at.prototxt --solver at_solver.prototxt")
    command("train --solver at_solver.prototxt --weights at.caffemodel")

    assert "group3" in capsys.readouterr().out
    for log in ("teacher_log.csv", "at_log.csv"):
        losses = column(log, "train/loss")
        assert np.mean(losses[-4:]) < np.mean(losses[:4]), log
    assert sorted(n for n in Path("at_log.csv").read_text().splitlines()[0].split(",") if "at_loss" in n) == [
        "train/at_loss1", "train/at_loss2", "train/at_loss3",
    ]  # fmt: skip
    assert read_solver("at_solver.prototxt").net == "at.prototxt"

    taught = f"at_iter_{iterations}.caffemodel"
    before, after = (
        {layer.name: [blob_array(blob) for blob in layer.blobs] for layer in read_caffemodel(file).layer}
        for file in (teacher, taught)
    )
    frozen = [name for name in after if name.startswith("teacher_") and after[name]]
    assert len(frozen) > 3 * depths[1] // 2
    for name in frozen:
        for one, other in zip(before[name.removeprefix("teacher_")], after[name], strict=True):
            np.testing.assert_array_equal(one, other)

    command(f"convert student.prototxt {taught} --output fc -o student")
    module = runpy.run_path("student/model.py")["load"]("student")
    x = torch.randn(3, 3, 32, 32)
    net = Net("student.prototxt", taught, phase="TEST")
    torch.testing.assert_close(module(x), net(x), rtol=1e-4, atol=1e-4)
    command("convert student.prototxt student/model.safetensors -o back.caffemodel")
    torch.testing.assert_close(Net("student.prototxt", "back.caffemodel")(x), net(x), rtol=1e-4, atol=1e-4)
    assert re.search(r"def forward\(self, data", Path("student/model.py").read_text())
