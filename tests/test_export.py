"""Leaving with the model: every format loads where it says it does, and gives the student's logits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_transfer.cli import main
from attention_transfer.export import FORMATS, export_run
from attention_transfer.runs import Recipe, Run
from attention_transfer.training import train
from attention_transfer.training.card import ModelCard

pytestmark = [
    pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning"),
    pytest.mark.usefixtures("one_thread"),
]

MODELS = """
import torch
from torch import nn

class Verbose(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(in_channels, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3))), "and more than logits"

class Random(Verbose):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x)[0])

class Branching(Verbose):
    def forward(self, x):
        logits = super().forward(x)[0]
        return logits if logits.sum() > 0 else -logits
"""


OWN = "exported_models:Verbose"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the user's own models."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "exported_models.py").write_text(MODELS)
    return folder


@pytest.fixture(autouse=True)
def _in_the_workplace(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(str(workplace))
    monkeypatch.delenv("ATTENTION_TRANSFER_DEBUG", raising=False)
    own = ("Verbose", "Random", "Branching")
    monkeypatch.setenv("ATTENTION_TRANSFER_TRUST", ",".join(f"exported_models:{name}" for name in own))


@pytest.fixture(scope="module")
def base(tiny: Recipe, workplace: Path) -> Recipe:
    return replace(tiny, validation=0.0, max_train=20)


@pytest.fixture(scope="module")
def taught(base: Recipe, workplace: Path) -> Run:
    """A wide residual network that learned from a NIN, which was trained first, in RUN/teacher."""
    recipe = replace(base, method="at", teacher="nin-thin", seed=3, output=str(workplace / "taught"))
    return train(recipe, say=lambda _: None)


@pytest.fixture(scope="module")
def exported(taught: Run, workplace: Path) -> Path:
    """An export of the taught student."""
    formats = ("safetensors", "torch", "onnx", "torch-export")
    return export_run(taught.folder, formats, workplace / "exported").folder


def alone(base: Recipe, student: str, workplace: Path) -> Run:
    """A run of one model, trained in the workplace if it is not there."""
    run = Run(workplace / re.sub(r"\W", "-", student))
    return run if run.exists else train(replace(base, student=student, output=str(run.folder)), say=str)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on stderr of an export that ends with status 2."""
    assert main(["export", *(str(argument) for argument in arguments)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err.removeprefix("attention-transfer: ").strip()


def export(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["export", *(str(argument) for argument in arguments)]) == 0
    return capsys.readouterr().out


def student_logits(run: Run, pixels: Tensor) -> Tensor:
    """What a run's student says, by its weights and card, without the export's code."""
    card = ModelCard.read(run.folder)
    assert card is not None
    with torch.no_grad():
        output = card.build(run.folder)(card.augment().normalise(pixels))
    return output[0] if isinstance(output, tuple) else output


def snippets(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


def with_batch(snippet: str, batch: int) -> str:
    changed = snippet.replace("randint(0, 256, (4, ", f"randint(0, 256, ({batch}, ")
    assert changed != snippet
    return changed


# Every format, as its snippet in the README loads it

ELSEWHERE = """
import os, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "attention_transfer":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotInstalled())
import json, torch

for i, (folder, snippet) in enumerate(json.load(sys.stdin)):
    names = {}
    os.chdir(folder)
    exec(snippet, names)
    torch.save([names["pixels"], torch.as_tensor(names["logits"])], f"answers-{i}.pt")
"""


def answers_elsewhere(folders: Sequence[Path]) -> list[list[tuple[Tensor, Tensor]]]:
    """Pixels and logits of each folder's snippets that need not this package, for one image and three.

    They run in one process that cannot import it.
    """
    jobs = [
        (str(folder), with_batch(snippet, batch))
        for folder in folders
        for snippet in snippets(folder)
        for batch in (1, 3)
        if "attention_transfer" not in snippet
    ]
    command = [sys.executable, "-c", ELSEWHERE]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [(folder, torch.load(f"{folder}/answers-{i}.pt")) for i, (folder, _) in enumerate(jobs)]
    return [[tuple(answer) for place, answer in found if place == str(folder)] for folder in folders]


def check_elsewhere(runs: Sequence[Run], folders: Sequence[Path], programs: Sequence[int]) -> None:
    """That every run's export gives its student's logits, out of so many snippets."""
    for run, answers, count in zip(runs, answers_elsewhere(folders), programs, strict=True):
        assert [len(pixels) for pixels, _ in answers] == [1, 3] * count
        for pixels, logits in answers:
            torch.testing.assert_close(logits, student_logits(run, pixels), rtol=1e-4, atol=1e-4)


def test_programs_and_timm_folders_need_nothing_of_this_package(
    base: Recipe, taught: Run, exported: Path, workplace: Path
) -> None:
    chosen = {OWN: ["torch-export"], "nin-thin": ["onnx"], "timm:test_resnet": ["timm"]}
    runs = [alone(base, student, workplace) for student in chosen]
    folders = [export_run(run.folder, chosen[run.recipe.student]).folder for run in runs]
    check_elsewhere([*runs, taught], [*folders, exported], [1, 1, 1, 2])


@pytest.mark.slow
@pytest.mark.parametrize(
    "student", [OWN, "nin-thin", "nin-wide-plain", "timm:test_resnet", "timm:test_convnext", "timm:test_vit"]
)
def test_every_format_of_every_kind_of_model(student: str, base: Recipe, tmp_path: Path) -> None:
    size = {"timm:test_vit": 160, "timm:test_convnext": 64}.get(student)  # what these can do with
    run = alone(replace(base, image_size=size), student, tmp_path)
    formats = [name for name in FORMATS if name != "timm" or student.startswith("timm:")]
    done = export_run(run.folder, formats)
    assert [each.format.name for each in done.written] == formats
    check_elsewhere([run], [done.folder], [len(formats) - 2])


def run_here(snippet: str, folder: Path, batch: int) -> dict[str, Any]:
    """The names that a snippet leaves, run beside its files."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(with_batch(snippet, batch), names)
    return names


def test_weights_load_as_the_card_says(taught: Run, exported: Path) -> None:
    loading = [snippet for snippet in snippets(exported) if "at.build_model" in snippet]
    assert len(loading) == 2
    for snippet in loading:
        names = run_here(snippet, exported, 3)
        assert names["logits"].shape == (3, 3)
        torch.testing.assert_close(names["logits"], student_logits(taught, names["pixels"]))
        assert not any(module._forward_hooks for module in names["model"].modules())
    card = ModelCard.read(taught.folder)
    assert card is not None
    state = torch.load(exported / "model.pt", weights_only=True)
    assert state.keys() == card.build(taught.folder).state_dict().keys()
    assert ModelCard.read(exported / "model.safetensors") == card


def test_what_is_printed(taught: Run, capsys: pytest.CaptureFixture[str]) -> None:
    text = export(
        capsys, taught.folder, "--format", "torch,safetensors", "--format", "torch", "-o", "printed"
    )
    error = taught.result["test_error"]
    head, _, _, *files, difference, card = text.splitlines()
    assert head == f"wrn-10-1: 77,395 parameters, test error {error:.2f} %"
    assert [line.split()[:2] for line in files] == [
        ["torch", "model.pt"],
        ["safetensors", "model.safetensors"],
    ]
    assert re.fullmatch(r"torch +model\.pt +0\.3\d +\d\.\de[+-]\d\d +1e-06", files[0])
    assert difference.endswith("at batch sizes 1, 2, 5")
    assert card == "model card, with a snippet for each file: printed/README.md"


def test_a_timm_folder_says_what_images_it_wants(
    base: Recipe, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    monkeypatch.setattr("attention_transfer.data.loading.IN_MEMORY_BYTES", 0)
    recipe = replace(base, student="timm:test_resnet", image_size=16, epochs=1, output=str(tmp_path / "run"))
    run = train(recipe, say=str)
    export_run(run.folder, ["timm"], "described")
    config = json.loads(Path("described/timm/config.json").read_text())
    assert config["architecture"] == "test_resnet"
    assert config["label_names"] == ["blue", "green", "red"]
    assert not {"tag", "origin_url", "license", "test_input_size"} & config["pretrained_cfg"].keys()
    model = timm.create_model("local-dir:described/timm", pretrained=True)
    wanted, card = timm.data.resolve_model_data_config(model), ModelCard.read(run.folder)
    assert card is not None
    assert (wanted["input_size"], wanted["crop_pct"]) == ((3, 16, 16), 0.875)
    assert "central square of 87.5 % of the shorter side" in Path("described/README.md").read_text()
    assert (list(wanted["mean"]), list(wanted["std"])) == (card.mean, card.std)


@pytest.mark.parametrize("given", ["pixels", "normalised"])
def test_the_input_of_onnx_is_told_by_its_name_and_type(given: str, taught: Run, exported: Path) -> None:
    import onnxruntime

    folder = exported
    if given == "normalised":
        folder = export_run(taught.folder, ["onnx"], "normalised", input="normalised").folder
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (taken,), (gives,) = session.get_inputs(), session.get_outputs()
    name, kind = {"pixels": ("pixels", "uint8"), "normalised": ("images", "float")}[given]
    assert (taken.name, taken.type, taken.shape[1:]) == (name, f"tensor({kind})", [3, 16, 16])
    assert gives.name == "logits"
    held = json.loads(session.get_modelmeta().custom_metadata_map["attention_transfer"])
    assert held["classes"] == ["blue", "green", "red"]
    for snippet in [code for code in snippets(folder) if "build_model" not in code]:
        names = run_here(snippet, folder, 5)
        wanted = student_logits(taught, names["pixels"])
        torch.testing.assert_close(torch.as_tensor(names["logits"]), wanted, rtol=1e-4, atol=1e-4)


# The model card


def test_the_model_card_tells_the_run_and_no_path(
    taught: Run, exported: Path, workplace: Path, image_folder: Path
) -> None:
    text, result = (exported / "README.md").read_text(), taught.result
    assert text.startswith(f"# wrn-10-1, trained on {image_folder.name}\n")
    assert "from a `nin-thin`, by attention transfer; nothing of that teacher is in these files" in text
    assert f"| test error, top-1 | {result['test_error']:.2f} % |" in text
    assert f"| its teacher's test error, top-1 | {taught.teacher.result['test_error']:.2f} % |" in text
    assert "top-5" not in text  # of three classes it says nothing
    assert "| weight of at | 1 |" in text
    assert "| form of the term | paper, p 2, sum over channels |" in text
    assert "Images (b, 3, 16, 16), RGB" in text
    assert "0 blue\n1 green\n2 red" in text
    assert f"commit {result['machine']['commit']} |" in text
    assert "One run with one seed (3)" in text
    assert "trained on 20 images only" in text
    for file in exported.iterdir():
        data = file.read_bytes()
        assert str(workplace).encode() not in data, file
        assert str(Path(__file__).parents[1]).encode() not in data, file


def test_a_teachers_run_is_exported_as_what_it_is(taught: Run, capsys: pytest.CaptureFixture[str]) -> None:
    text = export(capsys, taught.teacher.folder, "--format", "torch", "-o", "teachers")
    assert f"note: this is the teacher of {taught.folder}. Its student: " in text
    assert "It learned from labels alone." in Path("teachers/README.md").read_text()
    assert "note:" not in export(capsys, taught.folder, "--format", "torch", "-o", "students")


@pytest.mark.parametrize("teacher", ["/gone/teacher-run", "damaged"])
def test_a_teacher_that_is_gone_stops_nothing(
    teacher: str, taught: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = taught.teacher.student_weights.read_bytes()
    (tmp_path / "damaged").write_bytes(whole[:100])
    run = Run(tmp_path / "run")
    recipe = replace(taught.recipe, teacher=str(tmp_path / teacher), output=str(run.folder))
    run.create(recipe)
    run.student_weights.write_bytes(taught.student_weights.read_bytes())
    run.write_result(taught.result)
    export(capsys, run.folder, "--format", "torch")
    text = (run.folder / "export" / "README.md").read_text()
    assert f"from a `{Path(teacher).name}`" in text
    assert "/gone" not in text


# Refusals, each of which leaves nothing behind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onxx"], "export: unknown format 'onxx'. Did you mean onnx?"),
        (["--format", "torch,pickle"], "export: unknown format 'pickle'. Known: safetensors, torch, onnx, t"),
        ([], "export: expected --format, got none. Known: safetensors, torch, onnx, torch-export, timm."),
        (["--format", "onnx", "--input", "rgb"], "export: expected --input pixels or normalised, got 'rgb'."),
    ],
)
def test_bad_flags(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "nowhere", *arguments).startswith(message)


def test_what_is_no_finished_run(taught: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--format", "torch")
    assert "expected a run folder, got nowhere" in refused(capsys, "nowhere", *flags)
    file = refused(capsys, taught.student_weights, *flags)
    assert file == f"export: expected a run folder, got {taught.student_weights}, which is a file."
    unfinished = Run(tmp_path / "unfinished")
    unfinished.create(taught.recipe)
    message = refused(capsys, unfinished.folder, *flags)
    assert message.endswith(f"Finish it: attention-transfer train --resume {unfinished.folder}")
    unfinished.write_result(taught.result)
    assert "unfinished" in refused(capsys, unfinished.folder, *flags)  # there are no weights
    (tmp_path / "cache.json").write_text("{}")
    assert "is a teacher's cache, which holds no model" in refused(capsys, tmp_path, *flags)


def test_weights_from_elsewhere_and_weights_of_no_use(
    taught: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from attention_transfer.models import build_model, save_weights

    run = Run(tmp_path / "run")
    run.create(taught.recipe)
    run.write_result(taught.result)
    model, card = build_model("wrn-10-1", num_classes=3), ModelCard.read(taught.folder)
    assert card is not None
    save_weights(model, run.student_weights)
    assert "got some from elsewhere" in refused(capsys, run.folder, "--format", "torch")
    torch.nn.init.constant_(model.fc.bias, float("nan"))
    save_weights(model, run.student_weights, card.as_metadata())
    assert "its training diverged" in refused(capsys, run.folder, "--format", "torch")


def test_a_folder_that_is_there(taught: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "there"
    arguments = (taught.folder, "--format", "safetensors", "-o", folder)
    folder.mkdir()
    export(capsys, *arguments)  # an empty one will do
    assert refused(capsys, *arguments).endswith("Replace it: --overwrite; or pass another -o.")
    export(capsys, taught.folder, "--format", "torch", "-o", folder, "--overwrite")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.pt"]
    (folder / "thesis.tex").write_text("years")
    assert "thesis.tex, which no export writes" in refused(capsys, *arguments, "--overwrite")
    assert (folder / "thesis.tex").read_text() == "years"
    (tmp_path / "file").write_text("")
    assert "which is a file" in refused(capsys, *arguments[:-1], tmp_path / "file")
    assert "no export writes" in refused(capsys, *arguments[:-1], taught.folder, "--overwrite")


def test_a_model_that_timm_does_not_know(
    taught: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, taught.folder, "--format", "torch,timm", "-o", tmp_path / "out")
    assert message.startswith(
        "export: timm: expected a model of timm, got wrn-10-1, which timm does not know."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_named(
    taught: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = refused(capsys, taught.folder, "--format", "torch,onnx", "-o", tmp_path / "out")
    assert message == (
        "export: onnx: needs the package onnxruntime, which is not installed. "
        'Run: pip install "attention-transfer[onnx]"'
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("student", "formats", "message"),
    [
        (
            "Random",
            "safetensors",
            "expected the student's logits to within 1e-06 of the largest, got a differ",
        ),
        ("Branching", "torch,torch-export", "torch-export: expected a module that torch can export, got: "),
        ("Branching", "torch,onnx", "onnx: expected a module that torch can export, got: "),
    ],
)
def test_a_failed_export_leaves_what_was_there(
    student: str,
    formats: str,
    message: str,
    base: Recipe,
    workplace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = alone(base, f"exported_models:{student}", workplace)
    folder = tmp_path / "deep" / "out"
    assert message in refused(capsys, run.folder, "--format", formats, "-o", folder)
    assert list(folder.parent.iterdir()) == []
    folder.mkdir()
    (folder / "model.pt").write_text("of last week")
    refused(capsys, run.folder, "--format", formats, "-o", folder, "--overwrite")
    assert list(folder.parent.iterdir()) == [folder]
    assert [path.read_text() for path in folder.iterdir()] == ["of last week"]


def test_a_file_that_answers_otherwise_is_refused(
    taught: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The comparison is with the file: one whose weights are off by little does not pass."""
    from attention_transfer.export.weights import StateDict

    honest = StateDict.write

    def off_by_little(self: StateDict, student: Any, path: Path) -> None:
        honest(self, student, path)
        state = torch.load(path, weights_only=True)
        state["fc.bias"][0] += 1e-3
        torch.save(state, path)

    monkeypatch.setattr(StateDict, "write", off_by_little)
    message = refused(capsys, taught.folder, "--format", "torch", "-o", tmp_path / "out")
    assert re.search(
        r"torch: expected the student's logits .* got a difference of [\d.e-]+ for a batch of 1", message
    )
    assert list(tmp_path.iterdir()) == []


def test_exported_weights_can_be_evaluated(
    taught: Run, exported: Path, base: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(exported / "model.safetensors"), "--data", base.data]) == 0
    assert f"top-1 error {taught.result['test_error']:.2f} %" in capsys.readouterr().out
