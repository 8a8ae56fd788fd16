"""What version 0.1.0 wrote before its rooms were moved is read as it was: runs, a cache, a recipe, an export.

tests/fixtures/version-0.1.0 was made at commit 1446968, of the images of the fixture `image_folder` and the
network of fixture_net.py: a teacher; `student`, which learns from it and was stopped in its second epoch of
three; `whole`, the same run, not stopped; a cache of two views; and the export of `whole`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from fixture_net import Tiny
from safetensors.torch import load_file

from attention_transfer.cli import main
from attention_transfer.models import load_weights, trusting
from attention_transfer.runs import Run
from attention_transfer.training import resume

FIXTURES = Path(__file__).parent / "fixtures" / "version-0.1.0"
NET = "fixture_net:Tiny"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning"),
]


@pytest.fixture
def former(image_folder: Path, tmp_path: Path) -> Path:
    """A copy of the fixtures, whose files name the folder that they are in."""
    folder = tmp_path / "former"
    shutil.copytree(FIXTURES, folder)
    shutil.copytree(image_folder, folder / "images")
    for file in (*folder.rglob("*.yaml"), *folder.rglob("*.json")):
        file.write_text(file.read_text().replace("/made-before", str(folder)))
    return folder


def test_a_finished_run(former: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(former / "whole").check()
    with trusting(NET):
        assert (run.recipe.method, run.recipe.student, run.recipe.epochs) == ("at+kd", NET, 3)
    error = run.result["test_error"]
    assert main(["evaluate", str(run.folder), "--trust", NET]) == 0
    assert f"{error:.2f} %" in capsys.readouterr().out
    page = former / "page.html"
    runs = [str(former / name) for name in ("whole", "student", "teacher")]
    assert main(["report", *runs, "-o", str(page), "--trust", NET]) == 0
    assert "attention transfer + distillation" in page.read_text().lower()


def test_a_stopped_run_goes_on(former: Path) -> None:
    with trusting(NET):
        run = resume(former / "student", say=lambda line: None)
    whole = Run(former / "whole")
    for name, tensor in load_file(whole.student_weights).items():
        torch.testing.assert_close(load_file(run.student_weights)[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_cache(former: Path) -> None:
    assert main(["cache", "verify", str(former / "cache")]) == 0
    words = ["--cache", str(former / "cache"), "--student", NET, "--method", "at+kd", "--epochs", "1"]
    places = ["--output", str(former / "taught"), "--loggers", "none", "--accelerator", "cpu"]
    assert main(["train", *words, *places, "--batch-size", "16", "--trust", NET]) == 0


def test_an_export_and_a_recipe(former: Path) -> None:
    load_weights(Tiny(3), former / "exported" / "model.safetensors")
    words = ["--config", str(former / "whole" / "recipe.yaml"), "--epochs", "1", "--trust", NET]
    assert main(["train", *words, "--output", str(former / "again")]) == 0
