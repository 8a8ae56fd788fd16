# ruff: noqa: E501 (hostile text, each on its line)
"""No file that the package reads runs code, leaves its folder or unfolds: each is refused in one clear line.

Every hostile file here is real: read the careless way, it would do what it says.
"""

from __future__ import annotations

import ast
import collections
import copy
import gzip
import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hostile_pickles import BOMBS, PROTOCOL, TOWER, in_archive, in_old_format, keyed, text, view
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import attention_transfer as at
from attention_transfer._reading import parse_json
from attention_transfer.cache import Cache, Manifest
from attention_transfer.caffe.files.prototxt import parse_net
from attention_transfer.cli import main
from attention_transfer.data import load_data
from attention_transfer.data.parquet import read_parquet
from attention_transfer.data.sources import MOST_CLASSES
from attention_transfer.models import build_model, load_weights, read_metadata, save_weights, trusting
from attention_transfer.models.checkpoint import read_checkpoint
from attention_transfer.pairs import Stage
from attention_transfer.runs.recipe import Recipe
from attention_transfer.runs.run import Run
from attention_transfer.training import train
from attention_transfer.training.cached import name_teacher
from attention_transfer.training.card import ModelCard
from attention_transfer.training.checkpoints import checkpoint_to_resume
from attention_transfer.visualize import write_report
from attention_transfer.visualize.snapshots import Snapshots

MARKER = "marker"
FACTORY = f"""
from pathlib import Path

Path({MARKER!r}).touch()
import attention_transfer as at


def build(num_classes, in_channels):
    return at.build_model("wrn-10-1", num_classes=num_classes, in_channels=in_channels)
"""
CARD = ModelCard("wrn-10-1", ["0", "1", "2"], 3, [8, 8], [0.5] * 3, [0.5] * 3)


class Evil:
    """Makes the marker when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (MARKER,)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module in it, in which no marker may appear."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delenv("ATTENTION_TRANSFER_TRUST", raising=False)
    for name in ("hostile", "lying_around"):
        sys.modules.pop(name, None)
    (tmp_path / "hostile.py").write_text(FACTORY)
    yield tmp_path
    sys.modules.pop("hostile", None)


def refused(call: Callable[[], object], words: str) -> None:
    """`call` ends in one line with these words, and nothing ran."""
    with pytest.raises((ValueError, OSError), match=words) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert not Path(MARKER).exists()


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line with which the command refuses its input, while nothing ran."""
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert not Path(MARKER).exists()
    return lines[0]


# Pickles


def hostile_checkpoints() -> dict[str, Any]:
    return {
        "alone": Evil(),
        "beside weights": {"weight": torch.zeros(2), "extra": Evil()},
        "in the optimizer": {
            "state_dict": {"weight": torch.zeros(2)},
            "optimizer_states": [{"state": Evil()}],
        },
    }


@pytest.mark.parametrize("where", hostile_checkpoints())
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_no_weights_and_no_checkpoint(where: str, zipped: bool) -> None:
    run = Run(Path("run"))
    run.checkpoints.mkdir(parents=True)
    torch.save(hostile_checkpoints()[where], run.last_checkpoint, _use_new_zipfile_serialization=zipped)
    refused(
        lambda: load_weights(nn.Linear(2, 1), run.last_checkpoint), "load_weights: expected tensors alone"
    )
    refused(
        lambda: checkpoint_to_resume(run, print), "resume: expected a whole checkpoint .*damaged or foreign"
    )
    torch.load(run.last_checkpoint, weights_only=False)  # else the refusal would be no feat
    assert Path(MARKER).is_dir()


def test_a_plain_pickle_is_no_weights() -> None:
    Path("weights.pt").write_bytes(pickle.dumps({"weight": Evil()}))
    refused(lambda: load_weights(nn.Linear(2, 1), "weights.pt"), "load_weights: expected tensors alone")


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_checkpoint_takes_no_hours_and_no_gigabytes(name: str) -> None:
    content, words = BOMBS[name]
    assert len(content) < 3_000_000
    run = Run(Path("run"))
    run.checkpoints.mkdir(parents=True)
    run.last_checkpoint.write_bytes(content)
    start = time.process_time()
    refused(lambda: load_weights(nn.Linear(2, 1), run.last_checkpoint), words)
    refused(lambda: checkpoint_to_resume(run, print), "resume: expected a whole checkpoint")
    assert time.process_time() - start < 10


def test_an_archive_at_its_end_does_not_hide_what_a_file_begins_with() -> None:
    torch.save({"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}, "plain.pt")
    Path("both.pt").write_bytes(in_old_format(keyed(TOWER)) + Path("plain.pt").read_bytes())
    assert zipfile.is_zipfile("both.pt")
    refused(lambda: load_weights(nn.Linear(2, 1), "both.pt"), "would unfold to more")


def test_entries_of_an_archive_that_lie_in_each_other_are_counted_each() -> None:
    entries, size = [str(i) for i in range(50)], 100_000
    floats = b"".join(text(key) + view(size, 0, (size,), (1,), key=key) for key in entries)
    Path("nested.pt").write_bytes(in_archive(PROTOCOL + b"}(" + floats + b"u.", {"0": bytes(4 * size)}))
    with zipfile.ZipFile("nested.pt", "a") as archive:
        archive.writestr("archive/last", "")  # so that the list of entries is written anew
        for key in entries[1:]:
            again = copy.copy(archive.getinfo("archive/data/0"))
            again.filename = f"archive/data/{key}"
            archive.filelist.append(again)
    assert Path("nested.pt").stat().st_size < 5 * size
    refused(lambda: load_weights(nn.Linear(2, 1), "nested.pt"), "which promises 20,000,000 bytes of numbers")


def test_what_real_checkpoints_hold_is_read() -> None:
    base = torch.arange(12.0)
    parameter = nn.Parameter(torch.ones(2))
    parameter.origin = "here"
    content = {
        "views": [base[2:5], base[::3], base.view(3, 4).t(), base[:0], base[0], base.expand(2, 12)],
        "kinds": [base.to(kind) for kind in (torch.bfloat16, torch.float64, torch.int8, torch.complex64)],
        "odd": (
            torch.Size([1, 2]),
            torch.device("cpu"),
            torch.float32,
            b"\xff",
            bytearray(b"\xff"),
            1 + 2j,
            1 << 90,
        ),
        "keys": {1: {1, "a"}, (0, 1): collections.Counter("aab"), None: random.getstate(), 0.5: [[[[]]]]},
        "parameters": [parameter, nn.Parameter(base)],
        "momenta": torch.optim.SGD([parameter], lr=0.1).state_dict(),
        "one list twice": [content_of := [1, 2], content_of],
    }
    for zipped in (True, False):
        torch.save(content, "real.pt", _use_new_zipfile_serialization=zipped)
        found = read_checkpoint(Path("real.pt"))
        for name in ("views", "kinds", "parameters"):
            assert all(map(torch.equal, found[name], content[name]))
        for name in ("odd", "keys", "momenta", "one list twice"):
            assert found[name] == content[name]
        assert found["parameters"][0].origin == "here"


def test_a_checkpoint_that_contains_itself_ends() -> None:
    cyclic: dict[str, Any] = {}
    cyclic["state_dict"] = cyclic
    torch.save(cyclic, "cyclic.pt")
    refused(lambda: load_weights(nn.Linear(2, 1), "cyclic.pt"), "expected a state dict")


def test_tensors_that_are_none_or_unfold_are_refused() -> None:
    for tensor in (
        torch.empty(2, 2, device="meta"),
        torch.eye(2).to_sparse(),
        torch.zeros(1).expand(1 << 40),
    ):
        torch.save({"weight": tensor, "bias": torch.zeros(1)}, "odd.pt")
        refused(lambda: load_weights(nn.Linear(2, 1), "odd.pt"), "expected dense tensors with their numbers")


def test_a_compressed_checkpoint_is_refused_before_it_unfolds() -> None:
    torch.save({"weight": torch.zeros(1 << 20)}, "plain.pt")
    with zipfile.ZipFile("plain.pt") as plain, zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    assert Path("bomb.pt").stat().st_size * 100 < Path("plain.pt").stat().st_size
    refused(lambda: load_weights(nn.Linear(2, 1), "bomb.pt"), "is compressed")


def test_a_name_of_a_million_dots_takes_no_memory_to_speak_of() -> None:
    torch.save({"a." * 1_000_000 + "weight": torch.zeros(1)}, "dots.pt")
    with pytest.raises(ValueError, match="does not fit Linear"):
        load_weights(nn.Linear(2, 1), "dots.pt")


# Names of code


def weights_naming(model: str) -> Path:
    save_weights(
        build_model("wrn-10-1", num_classes=3), "w.safetensors", replace(CARD, model=model).as_metadata()
    )
    return Path("w.safetensors")


@pytest.mark.parametrize("factory", ["os:system", "hostile:build", "subprocess:getoutput"])
def test_a_weights_file_names_no_factory(factory: str, image_folder: Path, capsys: Any) -> None:
    weights = weights_naming(factory)
    data = ["--data", image_folder, "--image-size", "8"]
    for words in (
        ["evaluate", weights, "--data", image_folder],
        ["maps", image_folder / "red/0.png", "--weights", weights],
        ["train", *data, "--teacher", weights, "--student", "wrn-10-1", "--output", "run"],
        ["cache", "build", *data, "--teacher", weights, "-o", "cache"],
    ):
        line = fails(capsys, *words)
        assert f"to name no code, got the factory {factory}" in line and f"--trust {factory}" in line
    assert "hostile" not in sys.modules


def test_a_recipe_and_a_run_name_no_factory(capsys: Any) -> None:
    run = Run(Path("run"))
    run.checkpoints.mkdir(parents=True)
    run.recipe_file.write_text("student: hostile:build\nmethod: none\nteacher: null\n")
    for words in (["train", "--config", run.recipe_file], ["train", "--resume", "run"], ["evaluate", "run"]):
        assert "recipe.yaml to name no code, got the factory hostile:build" in fails(capsys, *words)
    refused(lambda: Recipe.load(run.recipe_file), "trust: expected .*recipe.yaml to name no code")
    run.recipe_file.write_text("teacher: hostile:build\n")
    assert "hostile:build" in fails(capsys, "train", "--config", run.recipe_file)


def test_a_cache_names_no_factory(capsys: Any) -> None:
    settings = {"teacher": "hostile:build", "teacher_weights": "w.safetensors", "teacher_classes": 2}
    replace(MANIFEST, settings=settings).write(Path.cwd())
    weights_naming("wrn-10-1")
    assert "the factory hostile:build" in fails(capsys, "cache", "build", "--resume", ".")
    refused(lambda: name_teacher(Recipe(cache=".", teacher=None)), "got the factory hostile:build")


def test_code_that_names_a_factory_in_a_recipe_has_named_it(tiny: Recipe) -> None:
    """The teacher's card, which the run itself writes, does not ask for it again; nobody else is let in."""
    recipe = replace(
        tiny, teacher="hostile:build", method="kd", teacher_epochs=1, max_train=20, output="taught"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(".")
        assert train(recipe, say=lambda line: None).finished
    Path(MARKER).unlink()
    sys.modules.pop("hostile")
    card = ModelCard.read("taught/teacher")
    assert card is not None
    refused(lambda: card.build("taught/teacher"), "got the factory hostile:build")


def test_a_factory_that_the_user_names_too_is_built(image_folder: Path, capsys: Any) -> None:
    weights = weights_naming("hostile:build")
    with trusting("hostile:build"), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(".")
        assert ModelCard.read(weights).build(weights)
    Path(MARKER).unlink()
    sys.modules.pop("hostile")
    with pytest.raises(ValueError, match="to name no code"):  # trust ends with its block
        ModelCard.read(weights).build(weights)
    for trust in (["--trust", "hostile:build"], ["--trust=hostile:build"], ["--model", "hostile:build"]):
        assert main(["evaluate", str(weights), "--data", str(image_folder), *trust]) == 0
    capsys.readouterr()  # notes on the data
    assert Path(MARKER).exists()
    Path(MARKER).unlink()
    assert "--trust: expected a factory, package.module:name" in fails(
        capsys, "evaluate", "--trust", "wrn-10-1"
    )


def test_the_variable_trusts_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("recipe.yaml").write_text("student: hostile:build\n")
    monkeypatch.setenv("ATTENTION_TRANSFER_TRUST", "other:net, hostile:build")
    assert Recipe.load("recipe.yaml").student == "hostile:build"


def test_a_module_in_the_current_folder_stands_in_for_no_package(here: Path) -> None:
    (here / "lying_around.py").write_text(FACTORY)
    code = "import sys; from attention_transfer.cli import main; main(['--help']); import lying_around"
    command = [
        sys.executable,
        "-P",
        "-c",
        code,
    ]  # as the installed command starts, without the folder on its path
    done = subprocess.run(command, capture_output=True, text=True)
    assert "No module named 'lying_around'" in done.stderr and not Path(MARKER).exists()


def test_a_python_layer_is_not_imported() -> None:
    layer = 'layer { name: "p" type: "Python" bottom: "x" top: "y" python_param { module: "hostile" layer: "build" } }'
    Path("net.prototxt").write_text(INPUT + layer)
    refused(lambda: at.caffe.Net("net.prototxt"), "Its code is not in the prototxt")


# YAML and JSON


HOSTILE_YAML = {
    "object": "student: !!python/object/apply:os.mkdir [marker]",
    "name": "student: !!python/name:os.system",
    "module": "student: !!python/module:hostile",
    "bomb": "a: &a [1]\n" + "".join(f"{b}: &{b} [{f'*{a},' * 9}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "merge bomb": "a: &a {k: 1}\n" + "".join(f"{b}: &{b} {{<<: [{f'*{a},' * 9}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "itself": "&a [*a]",
    "deep": "[" * 5000,
    "huge number": "seed: " + "9" * 5000,
    "no date": "student: 2020-13-45",
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE_YAML)
def test_yaml_makes_no_objects_and_does_not_unfold(kind: str, capsys: Any) -> None:
    run = Path("run")
    run.mkdir()
    (run / "recipe.yaml").write_text(HOSTILE_YAML[kind])
    refused(lambda: Recipe.load(run / "recipe.yaml"), "Recipe.load: .*recipe.yaml is not readable as YAML")
    fails(capsys, "train", "--config", run / "recipe.yaml")
    fails(capsys, "report", run, "-o", "r.html")
    Path("tables").mkdir()
    (Path("tables") / "table1.yaml").write_text(HOSTILE_YAML[kind])
    assert "table1.yaml" in fails(capsys, "reproduce", "table1", "--recipes", "tables")


DECEPTIVE = {
    "epochs: 010": "line 1: 010: write a plain number",  # 8 to YAML
    "epochs: 1:30": "line 1: 1:30: write a plain number",  # 90
    "lr: 0:00:30.5": "line 1: 0:00:30.5: write a plain number",
    "pairs: 1:2": "line 1: 1:2: write a plain number, or quote it as text",
    "milestones: [0.5, 00]": "line 1: 00: write",
    'epochs: !!int "010"': "line 1: 010: write",
    "student: 2020-01-01": "line 1: the date 2020-01-01: quote it as text",
    "epochs: 1\nlr: 0.5\nepochs: 2": "line 3: 'epochs' is there twice",
    '"epochs": 1\nepochs: 2': "line 2: 'epochs' is there twice",
    "{lr: 1, lr: 1}": "line 1: 'lr' is there twice",
    "lr: 1\n<<: {epochs: 3}": "line 2: <<: write the fields themselves",
}


@pytest.mark.parametrize("text", DECEPTIVE)
def test_yaml_says_what_it_looks_like(text: str, capsys: Any) -> None:
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(text)
    assert DECEPTIVE[text] in fails(capsys, "train", "--config", "run/recipe.yaml")
    assert DECEPTIVE[text] in fails(capsys, "report", "run", "-o", "r.html")
    Path("tables").mkdir()
    Path("tables/table1.yaml").write_text(text)
    assert DECEPTIVE[text] in fails(capsys, "reproduce", "table1", "--recipes", "tables")


def test_plain_yaml_says_the_same_as_ever(capsys: Any) -> None:
    Path("r.yaml").write_text(
        'lr: 1e-3\nmomentum: .5\nepochs: 1_000\nseed: 0\nnesterov: yes\nstudent: "010"\npairs: "1:2"\nteacher: null\n'
        "method: none\nweight_decay: 0.0\nmilestones: [0.1, 0.5]\n"
    )
    recipe = Recipe.load("r.yaml")
    assert (recipe.lr, recipe.momentum, recipe.epochs, recipe.seed, recipe.nesterov) == (
        1e-3,
        0.5,
        1000,
        0,
        True,
    )
    assert (recipe.student, recipe.pairs, recipe.teacher, recipe.weight_decay) == ("010", "1:2", None, 0.0)
    Path("r2.yaml").write_text(recipe.to_yaml())
    assert Recipe.load("r2.yaml") == recipe


@pytest.mark.parametrize(
    "words",
    [
        ["--epochs", "010"],
        ["--epochs=1:30"],
        ["--lr", "-07"],
        ["--beta", "1:30"],
        ["--milestones", "[0.1,00]"],
    ],
    ids=str,
)
def test_flags_take_the_numbers_that_a_recipe_takes(words: list[str], capsys: Any) -> None:
    flag = words[0].partition("=")[0]
    assert f"train: {flag}: expected a plain number, got " in fails(capsys, "train", *words, "--print-config")
    assert main(["train", "--data", "010", "--pairs", "1:2", "--print-config"]) == 0
    assert "data: '010'" in capsys.readouterr().out


def test_json_has_every_name_once(capsys: Any) -> None:
    text = json.dumps(asdict(CARD)).replace('"in_channels": 3', '"in_channels": 3, "in_channels": 1')
    save_weights(nn.Linear(1, 1), "w.safetensors", {"attention_transfer": text})
    refused(lambda: ModelCard.read("w.safetensors"), "ModelCard.read: expected the metadata")
    with pytest.raises(ValueError, match=r"^not JSON: 'a' is there twice$"):
        parse_json('[{"b": {"a": 1, "c": 2, "a": 1}}]')


DEEP = "[" * 100_000


@pytest.mark.parametrize("text", [DEEP, "[" * 40 + "]" * 40], ids=["endless", "40 levels"])
def test_deep_json_is_refused(text: str) -> None:
    Path("result.json").write_text(text)
    Path("cache.json").write_text(text)
    refused(lambda: Run(Path.cwd()).result, "nested too deeply")
    refused(lambda: Manifest.read(Path.cwd()), "which is not JSON")
    save_weights(nn.Linear(1, 1), "w.safetensors", {"attention_transfer": text})
    refused(lambda: ModelCard.read("w.safetensors"), "nested too deeply")
    layer = f'layer {{ name: "p" type: "Python" bottom: "x" top: "y" python_param {{ layer: "Normalize" param_str: "{text}" }} }}'
    Path("net.prototxt").write_text(INPUT + layer)
    with pytest.raises(ValueError, match="a JSON object as param_str"):
        at.caffe.Net("net.prototxt")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("in_channels", 10**9),
        ("classes", 7),
        ("classes", []),
        ("mean", ["x"] * 3),
        ("std", [0, 1, 1]),
        ("model", 3),
    ],
)
def test_a_card_of_nonsense_is_refused(name: str, value: object) -> None:
    text = json.dumps(asdict(CARD) | {name: value})
    save_weights(nn.Linear(1, 1), "w.safetensors", {"attention_transfer": text})
    refused(lambda: ModelCard.read("w.safetensors"), "ModelCard.read: expected the metadata")


# Images and data


def bomb(width: int, height: int) -> bytes:
    """A PNG that says that it is so large; all of it is a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [10_000, 12_000, 60_000])  # Pillow warns of the first two, at most
def test_an_image_bomb_is_an_error_and_no_warning(side: int, capsys: Any) -> None:
    for name in ("a", "b"):
        Path("data", name).mkdir(parents=True)
        Path("data", name, "0.png").write_bytes(bomb(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(lambda: load_data("data"), r"load_data: .*0\.png is too large to decode safely")
        weights_naming("wrn-10-1")
        line = fails(capsys, "maps", "data/a/0.png", "--weights", "w.safetensors")
        assert "too large to decode safely" in line
        datum = at.caffe.files.caffemodel.schema.Datum(encoded=True, data=bomb(side, side))
        refused(lambda: at.caffe.layers.records.datum_pixels(datum, None, "a record"), "too large to decode")


def test_postscript_is_no_image(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    """Pillow hands it to Ghostscript, whatever the file is called."""
    (here / "gs").write_text(f"#!/bin/sh\nmkdir {here / MARKER}\n")
    (here / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(here), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n"
    for name in ("a", "b"):
        Path("data", name).mkdir(parents=True)
        Path("data", name, "0.png").write_bytes(text)
    refused(lambda: load_data("data"), r"cannot decode .*0\.png \(none of JPEG")
    with pytest.raises((OSError, subprocess.CalledProcessError)):
        Image.open(io.BytesIO(text)).load()
    assert Path(MARKER).exists()  # Pillow alone did run it


def png() -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(data, "png")
    return data.getvalue()


def test_parquet_that_unfolds_is_refused() -> None:
    image = png() + os.urandom(1 << 20)
    rows = pa.DictionaryArray.from_arrays(pa.array(np.zeros(40_000, np.int32)), pa.array([image]))
    pq.write_table(
        pa.table({"image": rows, "label": np.arange(40_000) % 2}), "train.parquet", store_schema=False
    )
    assert Path("train.parquet").stat().st_size < 3 << 20
    refused(lambda: load_data("train.parquet"), "it unfolds beyond measure")


@pytest.mark.parametrize("label", [1 << 62, (1 << 64) - 1])
def test_parquet_with_a_label_beyond_measure_is_refused(label: int) -> None:
    labels = pa.array([0, label], pa.uint64())
    pq.write_table(pa.table({"image": [png(), png()], "label": labels}), "train.parquet")
    refused(
        lambda: load_data("train.parquet"),
        r"load_data: expected (labels that number the classes|class numbers)",
    )


def test_the_largest_label_is_the_one_that_the_documentation_says() -> None:
    def of_largest(label: int) -> Any:
        pq.write_table(pa.table({"image": [png(), png()], "label": [0, label]}), "train.parquet")
        return read_parquet([Path("train.parquet")], Path("train.parquet"))

    assert len(of_largest(MOST_CLASSES - 1).classes) == MOST_CLASSES
    refused(lambda: of_largest(MOST_CLASSES), "load_data: expected labels that number the classes from 0")
    page = (Path(__file__).parents[1] / "docs" / "security.md").read_text(encoding="utf-8")
    assert f"labels below {MOST_CLASSES:,}" in page


def test_parquet_whose_statistics_are_of_another_type_is_refused() -> None:
    """To ask pyarrow for such a column's size ends the process."""
    table = pa.table({"image": [{"bytes": png(), "path": "a"}] * 2, "label": [0, 1]})
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}),
        "train.parquet",
    )
    data = Path("train.parquet").read_bytes()
    binary, double = b"\x15\x0c%\x02\x18\x05bytes", b"\x15\x0a%\x02\x18\x05bytes"
    assert data.count(binary) == 1
    Path("train.parquet").write_bytes(data.replace(binary, double))
    refused(lambda: load_data("train.parquet"), "load_data: ")


@pytest.mark.parametrize(
    "notes", [DEEP, "[]", '{"info": {"features": []}}', '{"info": {"features": {"label": 1, "image": {"_type": []}}}}']
)  # fmt: skip
def test_parquet_with_odd_notes_is_read_without_them(notes: str) -> None:
    table = pa.table({"image": [png()] * 4, "label": [0, 1, 0, 1]}).replace_schema_metadata(
        {"huggingface": notes}
    )
    for name in ("train", "test"):
        pq.write_table(table, f"{name}.parquet")
    assert load_data(".", validation=0).classes == ["0", "1"]


@pytest.mark.parametrize(
    "column", [pa.array([[1], [2]]), pa.array(["a", "b"]), pa.array([1.5, 2.5]), pa.nulls(2), pa.array([{}, {}])]
)  # fmt: skip
def test_parquet_of_other_types_is_refused(column: pa.Array) -> None:
    for table in ({"image": column, "label": [0, 1]}, {"image": [png()] * 2, "label": column}):
        try:
            pq.write_table(pa.table(table), "train.parquet")
        except pa.ArrowException:  # no struct without fields in parquet
            continue
        call = lambda: load_data("train.parquet", image_column="image", label_column="label")  # noqa: E731
        refused(call, "load_data: expected (encoded images|integer labels)")


def test_a_gzip_bomb_is_read_no_further_than_it_promises() -> None:
    from attention_transfer.data.named import read_idx

    head = b"\0\0\x08\x01" + (10).to_bytes(4, "big")
    Path("a.gz").write_bytes(gzip.compress(head + bytes(64 << 20)))
    tracemalloc.start()
    refused(lambda: read_idx(Path("a.gz")), "it holds more than 10")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    Path("b").write_bytes(b"\0\0\x08\xff" + b"\xff" * 1020)
    refused(lambda: read_idx(Path("b")), "does not start as one")
    Path("c").write_bytes(b"\0\0\x08\x02" + b"\xff" * 8)
    refused(lambda: read_idx(Path("c")), "its header promises")


INPUT = 'name: "n" layer { name: "in" type: "Input" top: "x" input_param { shape { dim: 1 dim: 3 dim: 4 dim: 4 } } }\n'


def hdf5_net(path: str) -> str:
    Path("list.txt").write_text(path)
    return 'layer { name: "d" type: "HDF5Data" top: "data" hdf5_data_param { source: "list.txt" batch_size: 1 } }'


@pytest.mark.parametrize("kind", ["link", "external", "virtual", "huge", "text", "group"])
def test_hdf5_reads_nothing_but_numbers_of_its_own(kind: str) -> None:
    h5py = pytest.importorskip("h5py")
    Path("secret").write_bytes(bytes(range(64)))
    with h5py.File("other.h5", "w") as other:
        other["data"] = np.zeros((2, 2))
    with h5py.File("a.h5", "w") as file:
        if kind == "link":
            file["data"] = h5py.ExternalLink("other.h5", "data")
        elif kind == "external":
            file.create_dataset("data", (8, 8), "u1", external=[("secret", 0, 64)])
        elif kind == "virtual":
            layout = h5py.VirtualLayout((2, 2), "f8")
            layout[:] = h5py.VirtualSource("other.h5", "data", (2, 2))
            file.create_virtual_dataset("data", layout)
        elif kind == "huge":
            file.create_dataset("data", (1 << 20, 1 << 20), "f8", chunks=(64, 64))
        elif kind == "text":
            file["data"] = np.array([b"a", b"b"])
        else:
            file.create_group("data")
    Path("net.prototxt").write_text(hdf5_net("a.h5"))
    refused(lambda: at.caffe.Net("net.prototxt"), r"layer 'd'.*expected (a data set|numbers)")


def write_lmdb(records: dict[bytes, bytes], removed: int = 0) -> Path:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open("db", map_size=64 << 20) as environment:
        with environment.begin(write=True) as transaction:
            for key, value in records.items():
                transaction.put(key, value)
        with environment.begin(write=True) as transaction:
            for key in list(records)[:removed]:
                transaction.delete(key)
    return Path("db/data.mdb")


@pytest.mark.parametrize(("count", "removed"), [(1, 0), (3000, 0), (3000, 1500)])
def test_an_lmdb_is_read_as_it_was_written(count: int, removed: int) -> None:
    from attention_transfer.caffe.files.lmdb import Pages

    draw = np.random.default_rng(0)
    sizes = [1, 200, 2100, 9000]
    records = {f"{draw.integers(1 << 40):x}{i}".encode(): draw.bytes(sizes[i % 4]) for i in range(count)}
    pages = Pages(write_lmdb(records, removed))
    kept = dict(list(records.items())[removed:])
    assert [(place.key, pages.value(place)) for place in pages.places] == sorted(kept.items())


def test_a_damaged_lmdb_does_not_end_the_process() -> None:
    """LMDB's own library is ended by a signal on some of these."""
    from attention_transfer.caffe.layers.records import Database

    path = write_lmdb({f"{i:08}".encode(): bytes(100) for i in range(500)})
    whole = path.read_bytes()
    size = struct.unpack_from("<I", whole, 16 + 24)[0]
    branch = next(start for start in range(2 * size, len(whole), size) if whole[start + 10] == 1)
    node = branch + struct.unpack_from("<H", whole, branch + 16)[0]
    own = struct.pack("<H", branch // size)
    for start, damage, words in (
        (branch, b"\xff" * size, "is no page of a tree"),
        (branch + 16, b"\xff\xff", "points outside itself"),
        (node, b"\xff\xff\xff", r"page \d+ is not in its tree"),
        (node, own, r"page \d+ is not in its tree"),  # itself
        (0, bytes(200), "it does not begin as one"),
    ):
        path.write_bytes(whole[:start] + damage + whole[start + len(damage) :])
        refused(lambda: Database(Path("db")), f"Data: expected an LMDB in db, .*{words}")


# Caches

MANIFEST = Manifest(
    teacher="wrn-10-2", teacher_fingerprint="0" * 16, teacher_input=None, classes=2,
    layers=(Stage("block1", (4, 4, 4), 1.0),), p=2.0, mapping="sum", dtype="float16", precision="32-true",
    data="1" * 16, images=6, shape=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, pad=1, flip=True, view_seed=0,
    views=1, shard_images=3,
)  # fmt: skip


def test_a_cache_serves_and_writes_nothing_outside_its_folder(here: Path) -> None:
    own, other = here / "own", here / "other"
    for folder in (own, other):
        cache = Cache.create(folder, MANIFEST)
        for shard in cache.shards(0):
            cache.write(shard, torch.zeros(len(shard), cache.layout.bytes, dtype=torch.uint8))
    cache = Cache.read(own)
    cache.require(1)
    first = own / cache.shards(0)[0].name
    first.unlink()
    first.symlink_to(other / cache.shards(0)[0].name)
    refused(lambda: Cache.read(own).require(1), "lies outside the cache, through a link")
    victim = here / "victim"
    victim.mkdir()
    (own / "view-0").rename(here / "away")
    (own / "view-0").symlink_to(victim)
    shard = cache.shards(0)[0]
    records = torch.zeros(len(shard), cache.layout.bytes, dtype=torch.uint8)
    refused(lambda: cache.write(shard, records), "lies outside the cache, through a link")
    assert not any(victim.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", 10**15), ("views", 10**12), ("views", "../../etc"), ("shard_images", 0.5), ("classes", True),
        ("shape", [10**9] * 3), ("layers", [{"name": "../x", "shape": [1], "stride": 1}]), ("mean", [[]]),
        ("view_seed", "/etc"), ("settings", []), ("dtype", []), ("p", "2"),
    ],
)  # fmt: skip
def test_a_manifest_of_nonsense_is_refused(name: str, value: object) -> None:
    MANIFEST.write(Path.cwd())
    values = json.loads(Path("cache.json").read_text())
    assert Manifest.read(Path.cwd()) == MANIFEST
    Path("cache.json").write_text(json.dumps(values | {name: value}))
    refused(lambda: Cache.read("."), r"cache: expected the manifest .* which is damaged \(")


# The report, the terminal and written source

HOSTILE_NAMES = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"'><b>",
    "{{ 7*7 }}",
    "$\\frac$",
]


class Page(HTMLParser):
    """Tags and attributes, as a browser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


CONTRADICTIONS: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]] = {
    "an epoch too many": lambda facts, parts: facts.update(epochs=[0, 1, 2]),
    "epochs as text": lambda facts, parts: facts.update(epochs=["0", "1"]),
    "epochs that go back": lambda facts, parts: facts.update(epochs=[1, 0]),
    "classes as a number": lambda facts, parts: facts.update(classes=3),
    "layers as numbers": lambda facts, parts: facts.update(layers=[1]),
    "an image too few": lambda facts, parts: parts.update(images=parts["images"][:1]),
    "images of two channels": lambda facts, parts: parts.update(images=parts["images"].repeat(1, 2, 1, 1)),
    "images of floats": lambda facts, parts: parts.update(images=parts["images"].float()),
    "labels of floats": lambda facts, parts: parts.update(labels=parts["labels"].float()),
    "maps without epochs": lambda facts, parts: parts.update({"student.0": parts["student.0"][0].clone()}),
    "maps that are nan": lambda facts, parts: parts["student.0"].fill_(float("nan")),
    "maps below zero": lambda facts, parts: parts["teacher.0"].fill_(-1),
    "a teacher's map too few": lambda facts, parts: parts.update(
        {"teacher.0": parts["teacher.0"][:1].clone()}
    ),
    "maps of no pixel": lambda facts, parts: parts.update({"teacher.0": torch.zeros(2, 0, 4)}),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_kept_maps_that_contradict_themselves_are_refused(kind: str, capsys: Any) -> None:
    run = Path("run")
    run.mkdir()
    (run / "recipe.yaml").write_text("student: wrn-10-1\nmethod: at\nteacher: wrn-10-1\n")
    maps = torch.rand(2, 3, 4)
    images, labels = torch.zeros(2, 1, 6, 8, dtype=torch.uint8), torch.tensor([0, 1])
    kept = Snapshots.start(images, labels, ["a", "b"], ["group0"]).with_teacher([maps])
    kept.add(0, [maps]).add(1, [maps]).save(run / "maps.safetensors")
    assert main(["report", "run", "-o", "r.html"]) == 0
    facts = json.loads(read_metadata(run / "maps.safetensors")["attention_transfer_maps"])
    parts = load_file(run / "maps.safetensors")
    CONTRADICTIONS[kind](facts, parts)
    save_file(parts, run / "maps.safetensors", {"attention_transfer_maps": json.dumps(facts)})
    assert "Snapshots.read: expected the maps that `train` keeps, got the damaged" in fails(
        capsys, "report", "run", "-o", "r.html"
    )


def test_the_report_escapes_every_name() -> None:
    folders = []
    for seed, name in enumerate(HOSTILE_NAMES):
        folder = Path("runs") / f"<script>{seed}"
        folder.mkdir(parents=True)
        recipe = {
            "student": name,
            "data": name,
            "method": "at",
            "seed": seed,
            "teacher": name,
            "epochs": name,
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (folder / "metrics.csv").write_text(
            f'epoch,val/error,"train/at/{name.replace(chr(34), chr(34) * 2)}"\n1,2,3\n2,1,2\n'
        )
        result = {"test_error": 1.0, "plan": [{"student": name, name: name, "shares": {name: 0.5}}]}
        (folder / "result.json").write_text(json.dumps(result))
        folders.append(folder)
    examples = hostile_examples()
    text = write_report(folders, "report.html", examples=examples).read_text()
    page = Page(text)
    assert page.tags.count("script") == 1 and not page.handlers and "b" not in page.tags
    assert "49" not in text[text.index("<body>") :].split("</table>")[0]
    assert text.count("</script>") == 1


def hostile_examples() -> Any:
    from attention_transfer.visualize import collect_examples

    model = build_model("wrn-10-1", num_classes=len(HOSTILE_NAMES))
    images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    models = {"teacher": (model, ["layer1"]), HOSTILE_NAMES[0]: (model, ["layer1"])}
    layers = [name for name, _ in model.named_children()][1:2]
    models = {role: (net.eval(), layers) for role, (net, _) in models.items()}
    normalise = dict.fromkeys(models, lambda x: x.float())
    return collect_examples(models, images, torch.arange(5), normalise, HOSTILE_NAMES)


HOSTILE_LAYERS = [
    'a"; import os; os.mkdir("marker"); "',
    "a\nimport os; os.mkdir('marker')\n",
    '"""\nimport os\nos.mkdir("marker")\n"""',
    "x'); __import__('os').mkdir('marker'); ('",
    "\\",
    "{__import__('os').mkdir('marker')}",
    "\u2028import os",
    "1\nimport os; os.mkdir('marker')\n#",  # one that stands in a comment, as its identifier is another
    "import",
    "__class__",
    "self",
]
CALLED = {"print", "open", "eval", "exec", "__import__", "compile", "getattr", "setattr"}


@pytest.mark.parametrize("name", HOSTILE_LAYERS)
def test_names_in_a_prototxt_become_no_code(name: str, capsys: Any) -> None:
    net = parse_net(INPUT)
    net.name = name
    for index, kind in enumerate(("Convolution", "Power", "Convolution")):
        layer = net.layer.add(name=f"{name}{index}", type=kind)
        layer.bottom.append("x" if index == 0 else f"{name}top{index - 1}")
        layer.top.append(f"{name}top{index}")
        if kind == "Convolution":
            layer.convolution_param.num_output = 2
            layer.convolution_param.kernel_size.append(1)
        else:
            layer.power_param.shift = float("nan")
    at.caffe.files.prototxt.write_prototxt(net, "net.prototxt")
    Path("w.caffemodel").write_bytes(at.caffe.Net("net.prototxt").to_caffemodel().SerializeToString())
    assert main(["caffe", "convert", "net.prototxt", "w.caffemodel", "-o", "out"]) == 0
    tree = ast.parse(Path("out/model.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"math", "torch", "torch.nn.functional"}
    assert modules <= {"pathlib", "safetensors.torch", "torch"}
    assert not {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & CALLED
    assert all(
        isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.Expr))
        for node in tree.body
    )
    assert not Path(MARKER).exists()


def test_an_escape_sequence_does_not_reach_the_terminal(capsys: Any) -> None:
    Path("recipe.yaml").write_text('method: "\\e]0;owned\\a\\e[2J"\n')
    line = fails(capsys, "train", "--config", "recipe.yaml")
    assert "\x1b" not in line and "\x07" not in line
    Path("bad\x1b[2J").write_text("a: [")
    assert "\x1b" not in fails(capsys, "train", "--config", "bad\x1b[2J")


ODD = ["\x1b]0;owned\x07", "<img src=x onerror=alert(1)>", "`|[a](b)**\u202ec\x9b31m"]


@pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning")  # an untrained teacher
def test_whatever_a_name_holds_the_terminal_and_the_card_show_it(
    image_folder: Path, tiny: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """Classes, folders and files with control characters, HTML and Markdown in their names, in every verb."""
    images = Path(f"images {ODD[2]} {ODD[0]}")
    for odd, folder in zip(ODD, sorted(image_folder.iterdir()), strict=True):
        (images / odd).parent.mkdir(exist_ok=True)
        shutil.copytree(folder, images / odd)
    run, picture = f"runs/{ODD[0]}{ODD[2]}", images / ODD[0] / "0.png"
    recipe = replace(tiny, data=str(images), max_train=20, output=run, method="at", teacher="wrn-10-1")
    Path("recipe.yaml").write_text(replace(recipe, teacher_epochs=1).to_yaml())
    verbs: list[list[object]] = [
        ["train", "--config", "recipe.yaml", "--progress", "lines"],
        ["train", "--config", "recipe.yaml", "--help"],
        ["train", "--resume", run],
        ["evaluate", run, "--plot", f"{ODD[0]}.png"],
        ["report", run, "-o", f"{ODD[0]}.html", "--images", 4],
        ["export", run, "--format", "torch", "-o", f"export{ODD[0]}"],
        ["maps", str(picture), "--weights", run, "-o", f"maps{ODD[0]}.png"],
        ["pairs", "--student", "wrn-10-1", "--teacher", "wrn-10-1"],
        ["cache", "build", "--data", images, "--teacher", run, "--accelerator", "cpu", "-o", f"c{ODD[0]}"],
        ["cache", "info", f"c{ODD[0]}"],
        ["cache", "verify", f"c{ODD[0]}"],
        ["caffe", "lmdb", "--data", images, "--split", "test", "-o", f"l{ODD[0]}"],
        ["train", "--config", "recipe.yaml"],
        ["evaluate", f"nowhere{ODD[0]}"],
    ]
    statuses = [main([*map(str, words)]) for words in verbs]
    said = capsys.readouterr()
    assert statuses == [0] * 12 + [2, 2], said.err
    for lines in (said.out, said.err):
        assert all(line.isprintable() for line in lines.split("\n")), ascii(lines)
    assert said.out.count("owned") > 5 and "\\x1b" in said.out
    card = Path(f"export{ODD[0]}/README.md").read_text()
    blocks = re.split("^```.*$", card, flags=re.MULTILINE)
    assert "<img" not in "".join(blocks[::2]) and "[a](b)" not in "".join(blocks[::2])
    assert all(line.isprintable() for line in card.split("\n"))


@pytest.mark.parametrize(
    ("value", "shown_as"),
    [
        ("<b>a</b> & c", "&lt;b&gt;a&lt;/b&gt; &amp; c"),
        ("a|b\n# c", "a\\|b # c"),
        ("[x](javascript:y)", "\\[x\\](javascript:y)"),
        ("\x1b[0m", "\\\\x1b\\[0m"),
        (3, "3"),
    ],
)
def test_markdown_is_escaped(value: object, shown_as: str) -> None:
    from attention_transfer.export.readme import code, plain

    assert plain(value) == shown_as
    assert code("a`b``c") == "``` a`b``c ```" and code("wrn") == "`wrn`"


@pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning")  # an untrained teacher
def test_a_damaged_run_beside_does_not_spoil_a_training(image_folder: Path, capsys: Any) -> None:
    Path("runs/other").mkdir(parents=True)
    Path("runs/other/recipe.yaml").write_text("student: hostile:build\n")
    Path("runs/other/result.json").write_text("{}")
    data = ["--data", str(image_folder), "--image-size", "8", "--epochs", "1", "--batch-size", "16"]
    weights_naming("wrn-10-1")
    words = ["train", *data, "--student", "wrn-10-1", "--teacher", "w.safetensors", "--output", "runs/own"]
    assert main(words) == 0
    assert not Path(MARKER).exists()


def test_metadata_of_a_foreign_file_is_data() -> None:
    save_file(
        {"weight": torch.zeros(2)},
        "w.safetensors",
        {"attention_transfer": "[]", "x": "!!python/name:os.system"},
    )
    assert read_metadata("w.safetensors")["x"].startswith("!!")
    refused(lambda: ModelCard.read("w.safetensors"), "ModelCard.read: expected the metadata")
