"""What a term says of itself is all that the rest of the package knows of it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from attention_transfer._trust import load_factory
from attention_transfer.cli import main
from attention_transfer.runs import Recipe, Run
from attention_transfer.runs.recipe import Concern, facts_of, field_texts, field_types, fields_of, flag_of
from attention_transfer.terms.declaration import Declaration, built_in

TERMS = built_in()
OWN = "my_terms:LogitDistance"


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_what_is_read_of_the_source_is_what_the_class_says(term: Declaration) -> None:
    assert Declaration.of(load_factory(term.path, "test"), term.path) == term


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_settings_are_arguments_of_the_class_with_its_defaults(term: Declaration) -> None:
    parameters = inspect.signature(load_factory(term.path, "test")).parameters
    for setting in term.settings:
        if setting.is_argument:
            default = parameters[setting.argument or setting.name].default
            assert default in (setting.default, inspect.Parameter.empty)
    assert term.build(lambda name: getattr(Recipe(), name)).name == term.name


def test_the_page_has_every_term_as_it_says_of_itself() -> None:
    rows = ["| `--method` | class | what is added to the loss | weight | needs |", "|---|---|---|---|---|"]
    for name, term in TERMS.items():
        assert term.weight is not None
        needs = "" if not term.needs_teacher else "teacher or cache" if term.reads_cache else "live teacher"
        classes = ", same classes in any order" if term.compares_classes else ""
        cells = (
            f"`{name}`",
            f"`{term.path.partition(':')[2]}`",
            term.formula,
            f"`{flag_of(term.weight.name)}`",
        )
        rows.append(f"| {' | '.join(cells)} | {needs}{classes} |".replace("|  |", "| |"))
    page = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    table = page.partition("<!-- terms -->\n")[2].partition("\n<!-- /terms -->")[0]
    assert table.splitlines() == rows


def test_declarations_are_read_without_pytorch() -> None:
    code = "import sys; from attention_transfer.runs import Recipe; Recipe(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("name", field_types())
def test_every_field_concerns_one_thing_and_has_help(name: str) -> None:
    assert sum(isinstance(fact, Concern) for fact in facts_of(name)) == 1
    assert field_texts("test")[name]


def test_fields_of_terms_are_about_the_method() -> None:
    declared = {setting.name for term in TERMS.values() for setting in term.settings}
    assert set(fields_of(Concern.METHOD)) == {"method", "terms", "term_schedule", *declared}


@pytest.mark.parametrize(
    ("terms", "method", "message"),
    [
        (None, "at+logit-distance", "expected method"),
        ("my_terms:Unnamed", "at", "to have a name"),
        ("my_terms:not_a_class", "at", "expected a class derived from"),
        ("my_terms:Missing", "at", "expected a function or class Missing in my_terms"),
        ("no_such_module:Term", "at", "found no no_such_module"),
        (f"{OWN},{OWN}", "at", "a name of its own"),
        ("attention_transfer.terms:AttentionTransfer", "at", "a name of its own"),
    ],
)
def test_terms_that_are_none_are_refused(terms: str | None, method: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(method=method, terms=terms)


def test_a_file_names_no_term_that_the_user_has_not_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(Recipe(method="logit-distance", terms=OWN).to_yaml())
    with pytest.raises(ValueError, match=f"--trust {OWN}"):
        Recipe.load(tmp_path / "recipe.yaml")


@pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning")
@pytest.mark.usefixtures("one_thread")
def test_a_term_of_the_users_own_trains_by_the_command(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(image_folder), "--validation", "0", "--batch-size", "12", "--pad", "0"]
    arguments += ["--teacher", "wrn-10-2", "--student", "wrn-10-1", "--epochs", "2", "--accelerator", "cpu"]
    run = Run(tmp_path / "run")
    own = ["--terms", OWN, "--method", "logit-distance+at", "--term-schedule", "logit-distance:linear"]
    assert main(["train", *arguments, *own, "--output", str(run.folder)]) == 0
    said = capsys.readouterr().out
    assert "LogitDistance(gamma=1.0, schedule='linear')" in said
    result = run.result
    assert result["method"] == "at+logit-distance"
    assert result["weights"]["logit-distance"] == 1.0
    rows = run.read_metrics()
    assert float(rows[0]["train/logit-distance"]) > float(rows[-1]["train/logit-distance"]) > 0

    page = tmp_path / "page.html"
    assert main(["report", str(run.folder), "-o", str(page), "--trust", OWN]) == 0
    text = page.read_text()
    assert "attention transfer + logit-distance" in text.lower()
    assert "s-method0" in text

    with pytest.raises(ValueError, match="--trust"):
        _ = Run(run.folder).recipe
    assert main(["train", "--resume", str(run.folder), "--trust", OWN]) == 0


def test_a_compiled_student_is_refused_by_what_the_term_says() -> None:
    twice = [name for name, term in TERMS.items() if term.needs_input_gradient]
    assert twice == ["gradient", "symmetry", "min-l2"]
    for name in twice:
        with pytest.raises(ValueError, match="differentiates the student twice"):
            Recipe(method=name, compile=True)
    assert replace(Recipe(), compile=True).compile
