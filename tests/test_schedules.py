"""Schedules of a term's weight, and the setting that names them."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise
from typing import get_args

import pytest

from attention_transfer._choices import Schedule
from attention_transfer.schedules import parse_schedules, schedule_factor

SCHEDULES = get_args(Schedule)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]),
        ("step", [1, 1, 0.2, 0.04, 0.008]),
    ],
)
def test_factors_over_a_training(schedule, factors) -> None:
    got = [schedule_factor(schedule, quarter / 4) for quarter in range(5)]
    assert got == pytest.approx(factors, abs=1e-15)


@pytest.mark.parametrize("epochs", [5, 10, 20, 50, 100, 200])
def test_step_drops_at_the_milestone_itself(epochs) -> None:
    """After 60, 120 and 160 of 200 epochs, as the learning rate of the paper's recipe; to the epoch."""
    steps = [schedule_factor("step", epoch / epochs) for epoch in range(epochs)]
    drops = [epoch for epoch in range(1, epochs) if steps[epoch] < steps[epoch - 1]]
    assert drops == [math.ceil(epochs * tenths / 10) for tenths in (3, 6, 8)]
    assert schedule_factor("step", 0.5, milestones=[0.5, 0.9], factor=0.1) == 0.1
    assert schedule_factor("step", 1.0, milestones=[]) == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_starts_at_one_and_never_rises(schedule) -> None:
    factors = [schedule_factor(schedule, step / 100) for step in range(101)]
    assert factors[0] == 1
    assert all(0 <= after <= before for before, after in pairwise(factors))


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("liner", 0.5),
            r"schedule as one of .*'linear', 'cosine', 'step'\], got 'liner'\. Did you mean linear\?$",
        ),
        (
            ("wavelet", 0.5),
            r"schedule as one of \['constant', 'linear', 'cosine', 'step'\], got 'wavelet'\.$",
        ),
        (("linear", 1.5), r"progress from 0 to 1, got 1\.5\. Give the share that is done\."),
        (("constant", -0.1), r"progress from 0 to 1, got -0\.1\."),
        (("cosine", math.nan), r"progress from 0 to 1, got nan\."),
    ],
)
def test_schedule_factor_refuses(arguments, message) -> None:
    with pytest.raises(ValueError, match=rf"^schedule_factor: expected {message}"):
        schedule_factor(*arguments)


def test_milestones_in_epochs_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"milestones from 0 to 1, got \[60, 120\]\. Give shares of the training"
    ):
        schedule_factor("step", 0.5, milestones=[60, 120])


@pytest.mark.parametrize(
    ("text", "schedules"),
    [
        ("linear", {"at": "linear", "kd": "linear"}),
        (" cosine ", {"at": "cosine", "kd": "cosine"}),
        ("at:linear", {"at": "linear", "kd": "constant"}),
        ("kd:step, at : cosine", {"at": "cosine", "kd": "step"}),
    ],
)
def test_parse_schedules(text, schedules) -> None:
    got = parse_schedules(text, ["at", "kd"])
    assert got == schedules
    assert list(got) == ["at", "kd"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"schedule as one of \[.*\], got ''\."),
        ("Linear", r"schedule as one of \[.*\], got 'Linear'\. Did you mean linear\?"),
        ("at:cosin", r"schedule of at as one of \[.*\], got 'cosin'\. Did you mean cosine\?"),
        ("att:linear", r"schedules of terms among \['at', 'kd'\], got 'att'\. Did you mean at\?"),
        (
            "linear,kd:step",
            r'schedules as one name or as .*, got \'linear,kd:step\'\. Write it such as "at:linear"',
        ),
        ("at:linear,", r"schedules as one name or as term:name,term:name, got 'at:linear,'\."),
        ("at:linear,at:step", r"each term once, got at twice in schedules 'at:linear,at:step'\."),
        ("at:linear:kd", r"schedule of at as one of \[.*\], got 'linear:kd'\."),
    ],
)
def test_parse_schedules_refuses_in_its_users_name(text, message) -> None:
    with pytest.raises(ValueError, match=rf"^Recipe: expected {message}"):
        parse_schedules(text, ["at", "kd"])
    with pytest.raises(ValueError, match=r"^train: expected "):
        parse_schedules(text, ["at", "kd"], user="train")


def test_schedules_load_no_torch() -> None:
    code = "import sys, attention_transfer.schedules; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
