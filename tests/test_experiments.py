"""Which fields of the recipe make two runs the same experiment, wherever that is asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_visualize import groups_of, make_run

from attention_transfer.cli.train import _alike_alone
from attention_transfer.reproduction.setting import differences
from attention_transfer.runs import Recipe
from attention_transfer.runs.recipe import EXPERIMENT, field_types, fields_of

BESIDE: list[tuple[str, Any]] = [
    ("loggers", "none"),
    ("strategy", "ddp"),
    ("checkpoint_minutes", 1.0),
    ("num_workers", 2),
    ("accelerator", "cpu"),
    ("compile", True),
    ("wait_minutes", 3.0),
    ("devices", 2),
    ("data_root", "elsewhere"),
]


@pytest.mark.parametrize(("field", "value"), [*BESIDE, ("view_seed", 3), ("split_seed", 3), ("seed", 5)])
def test_the_report_takes_seeds_of_one_experiment_together(tmp_path: Path, field: str, value: Any) -> None:
    first = make_run(tmp_path / "0", "at", **{field: getattr(Recipe, field)} if field != "seed" else {})
    second = make_run(tmp_path / "1", "at", **{"seed": 1, field: value})
    assert [len(group.runs) for group in groups_of([first, second])] == [2]


@pytest.mark.parametrize(("field", "value"), [("epochs", 4), ("lr", 0.5), ("flip", True), ("beta", 2.0)])
def test_the_report_keeps_experiments_apart(tmp_path: Path, field: str, value: Any) -> None:
    first = make_run(tmp_path / "0", "at")
    second = make_run(tmp_path / "1", "at", **{"seed": 1, field: value})
    assert [len(group.runs) for group in groups_of([first, second])] == [1, 1]


@pytest.mark.parametrize(("field", "value"), BESIDE)
def test_the_student_alone_is_found_whatever_it_ran_on(field: str, value: Any) -> None:
    taught, alone = Recipe(), Recipe(method="none", **{field: value})
    assert _alike_alone(alone, taught)


@pytest.mark.parametrize(
    ("field", "value"), [("epochs", 4), ("seed", 1), ("data", "mnist"), ("momentum", 0.5)]
)
def test_another_student_alone_is_none(field: str, value: Any) -> None:
    assert not _alike_alone(Recipe(method="none", **{field: value}), Recipe())


@pytest.mark.parametrize(("field", "value"), BESIDE)
def test_a_published_run_may_be_repeated_on_any_machine(field: str, value: Any) -> None:
    assert differences(Recipe(), replace(Recipe(), **{field: value})) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", 1), ("epochs", 4), ("beta", 2.0), ("method", "kd"), ("student", "wrn-16-2")],
)
def test_a_published_run_of_other_settings_is_told(field: str, value: Any) -> None:
    (found,) = differences(Recipe(), replace(Recipe(), **{field: value}))
    assert found.startswith(f"{field}: {value}, not ")


def test_a_field_that_the_method_does_not_read_makes_no_difference() -> None:
    assert differences(Recipe(), replace(Recipe(), alpha=0.5, temperature=2.0)) == []
    assert differences(Recipe(method="kd"), Recipe(method="kd", beta=3.0, pairs="a:b")) == []
    assert differences(Recipe(method="kd"), Recipe(method="kd", alpha=0.5)) == ["alpha: 0.5, not 0.9"]


def test_the_same_training_goes_on_elsewhere_only() -> None:
    for name in field_types():
        other = dict(BESIDE).get(name)
        if other is not None:
            assert Recipe().differences(replace(Recipe(), **{name: other})) == []
    assert set(fields_of(*EXPERIMENT)) >= {"student", "data", "method", "beta", "epochs", "keep"}
