"""What the command says: flags where the library names arguments, plain types, one full stop."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from test_docs import text_of

from attention_transfer._reading import first_line
from attention_transfer.cli import VERBS, main
from attention_transfer.cli.parsing import type_names
from attention_transfer.cli.wording import in_flags
from attention_transfer.runs.recipe import field_types

PACKAGE = Path(__file__).parents[1] / "attention_transfer"
ROOMS = ("cache", "data", "export", "models", "training", "visualize")  # and the files beside them
FLAGS = {"--" + name.replace("_", "-") for name in field_types()}

# What no verb runs into, because it gives these arguments itself, or what is said of a model's own code.
ARGUMENTS_OF_CODE = {"use_reentrant", "inplace", "requires_grad", "patch_drop_rate", "mask_ratio", "prefix"}
OF_PYTHON_ALONE = (
    "ActivationTransfer: ",
    "AttentionMatrixTransfer: ",
    "attention_map: ",
    "build_model: expected one source of weights",
    "Distiller: ",
    "load_data: 7 holds plain pixels, nothing to stream",
    "overlay: ",
    "save_maps: ",
    "Taps: ",
    "Taps.pop: expected 7 to return a map",
)


def sentences() -> list[tuple[str, str]]:
    """(place, text) of what the library raises, with 7 for what is filled in."""
    found = []
    files = [*PACKAGE.glob("*.py"), *(file for room in ROOMS for file in (PACKAGE / room).rglob("*.py"))]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = " ".join(text_of(node.exc.args[0]).replace("…", "7").split())
                found += [(f"{file.relative_to(PACKAGE)}:{node.lineno}", text)] if text else []
    return found


def test_no_message_names_an_argument_where_the_verb_has_a_flag() -> None:
    assert len(sentences()) > 200
    for place, text in sentences():
        if text.startswith(("Recipe", *OF_PYTHON_ALONE)):
            continue
        said = in_flags(text, FLAGS)
        left = set(re.findall(r"(?<![\w./-])([a-z_]+)=(?!=)", said)) - ARGUMENTS_OF_CODE
        assert not left, f"{place}: {said}"
        assert not re.search(r"\b(Pair|Distiller)\(", said), f"{place}: {said}"


def test_messages_have_one_full_stop() -> None:
    for place, text in sentences():
        assert not re.search(r"(?<!\.)\.\.(?=\s|$)|\.\)\.|\. \.", text), f"{place}: {text}"


def test_bad_input_is_one_class() -> None:
    """The command tells its own answers from bugs by it."""
    plain = [
        f"{file.relative_to(PACKAGE)}:{node.lineno}"
        for file in PACKAGE.rglob("*.py")
        if "pycaffe" not in file.parts
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id in ("ValueError", "TypeError", "ImportError")
    ]
    assert plain == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('a: pass resize="student". (At x.)', "a: pass --resize student. (At x.)"),
        ("a: Pass image_size, such as image_size=224.", "a: Pass --image-size, such as --image-size 224."),
        ("a: Pass download=True, root=FOLDER, or", "a: Pass --data-root FOLDER, or"),
        ("a: Pass a smaller batch_size, or drop_last=False.", "a: Pass a smaller --batch-size."),
        (
            'a: the layers, pairs=[Pair("student.layer", "teacher.layer")], or pass a larger example input.',
            "a: the layers, --pairs STUDENT_LAYER:TEACHER_LAYER, or pass a larger --image-size.",
        ),
        (
            "a: no /data/seed=0/x, seed=0/x or image_size.png",
            "a: no /data/seed=0/x, seed=0/x or image_size.png",
        ),
        ("Recipe: expected batch_size >= 2, got 1.", "Recipe: expected batch_size >= 2, got 1."),
        ("a: got RuntimeError: too small.. Pass ... or", "a: got RuntimeError: too small. Pass ... or"),
        ('a: Say where they are, such as by logits=1 or logits="p", or return them.', "a: Return them."),
        ("a: x == y, unknown=3, lr==3", "a: x == y, unknown=3, lr==3"),
    ],
)
def test_arguments_are_flags(text: str, said: str) -> None:
    assert in_flags(text, FLAGS) == said


def test_each_verb_has_its_own_flags() -> None:
    text = "a: got none. Pass example_input= (teacher_input=) of the size and channels it was built for."
    assert "Pass an --input-size of the size" in in_flags(text, {"--input-size"})
    assert "Pass an --image-size of the size" in in_flags(text, {"--image-size"})
    assert in_flags("a: pass root=FOLDER.", {"--root"}) == "a: pass --root FOLDER."
    assert in_flags("a: pass root=FOLDER.", set()) == "a: pass root=FOLDER."


def test_a_students_classes_are_not_called_a_teachers() -> None:
    train = {"--student", "--teacher", "--teacher-classes", "--teacher-weights", "--data"}
    for text in ("Build the student with num_classes=2.", "expected num_classes of 2 or more, got 1."):
        assert "--teacher-classes" not in in_flags(f"a: {text}", train)
    assert (
        in_flags("a: Build the student with num_classes=2.", train) == "a: Pass data of two classes or more."
    )
    assert in_flags("a: pass teacher_classes=5.", train) == "a: pass --teacher-classes 5."
    assert in_flags("a: pass num_classes=5.", {"--num-classes"}) == "a: pass --num-classes 5."


def test_the_command_speaks_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for side, name in enumerate("abab", start=10):
        Path("images", name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side)).save(Path("images", name, f"{side}.png"))
    assert main(["train", "--data", "images", "--method", "none"]) == 2
    assert re.search(
        r"got 10x10 in .* Pass --image-size, such as --image-size 10\.\n$", capsys.readouterr().err
    )
    assert main(["train", "--data", "cifar10", "--data-root", "nowhere", "--epochs", "x"]) == 2
    assert capsys.readouterr().err == "attention-transfer: train: --epochs: Expected an int. Got value: x\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--epochs", "1.5"], "train: --epochs: Expected an int. Got value: 1.5"),
        (["train", "--beta", "x"], 'train: --beta: Expected a float or "auto". Got value: x'),
        (["train", "--schedule", "x"], 'train: --schedule: Expected "steps" or "one-cycle". Got value: x'),
        (["train", "--resize", "x"], 'train: --resize: Expected "student" or "teacher". Got value: x'),
        (["train", "--milestones", "x"], "train: --milestones: Expected a list of floats. Got value: x"),
        (["cache", "build", "--views", "x"], "cache build: --views: Expected an int. Got value: x"),
        (
            ["pairs", "--student", "a"],
            "pairs: expected --teacher, got none. `attention-transfer pairs --help`",
        ),
        (["maps"], "maps: expected IMAGE, got none."),
    ],
)
def test_types_are_named_plainly(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"attention-transfer: {said}")


@pytest.mark.parametrize(
    "words",
    [
        *([verb] for verb in VERBS),
        *(["cache", action] for action in ("build", "info", "verify")),
        *(["caffe", action] for action in ("build", "check", "train", "convert", "lmdb")),
    ],
)
def test_help_names_plain_types(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert not re.search(r"<class|Union\[|Literal\[|NoneType|PosixPath|typing\.", text)
    assert not re.search(r"default: (null|\[\]|\))|, \)|\(\)", text)
    assert not re.search(r"(?<!\.)\.\.(?=\s|$)", text)


def test_names_of_types() -> None:
    for hint in field_types().values():
        assert all(
            re.fullmatch(r'"[^"]+"|int|float|bool|str|null|list of floats', name) for name in type_names(hint)
        )
    assert type_names(Path | None) == ["path", "null"]


def test_first_line_of_anothers_error() -> None:
    assert first_line(RuntimeError("Output size is too small.\n more")) == "Output size is too small"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(AssertionError("")) == "AssertionError"
