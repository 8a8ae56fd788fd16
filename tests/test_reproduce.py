"""Published tables: the recipes' files, the statistics, and a small table that is killed and gone on with."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from attention_transfer._locks import is_locked, locked
from attention_transfer.cli import main
from attention_transfer.reproduction.claims import describe
from attention_transfer.reproduction.estimate import time_left
from attention_transfer.reproduction.jobs import CacheBuild, Plan, Training, make_plan
from attention_transfer.reproduction.record import record
from attention_transfer.reproduction.results import as_csv, as_markdown, as_text, find_results
from attention_transfer.reproduction.runner import Runner, last_error
from attention_transfer.reproduction.setting import Setting, differences
from attention_transfer.reproduction.tables import UNITS, Library, read_library
from attention_transfer.runs.recipe import Recipe
from attention_transfer.runs.run import Run
from attention_transfer.runs.statistics import paired_difference

RECIPES = Path(__file__).parents[1] / "reproductions"

PUBLISHED = {
    "table1": {
        "nin-thin/nin-wide": [9.38, 8.93, 9.05, 8.55, 8.33, 7.28],
        "wrn-16-1/wrn-16-2": [8.77, 7.93, 8.51, 7.41, 7.51, 6.31],
        "wrn-16-1/wrn-40-1": [8.77, 8.25, 8.62, 8.39, 8.01, 6.58],
        "wrn-16-2/wrn-40-2": [6.31, 5.85, 6.24, 6.08, 5.71, 5.23],
    },
    "mapping": {"wrn-16-1/wrn-16-2": [8.77, 7.99, 7.93, 8.09, 8.08]},
    "gradient": {"nin-thin-plain/nin-wide-flips": [13.5, 12.5, 12.1, 12.1, 11.8, 11.2, None]},
    "repdistiller": {
        "wrn-16-2/wrn-40-2": [73.26, 74.08, 75.61],
        "wrn-40-1/wrn-40-2": [71.98, 72.77, 75.61],
    },
}


@pytest.fixture(scope="module")
def library() -> Library:
    return read_library(RECIPES)


# The files


def test_published_numbers_are_the_publications(library: Library) -> None:
    found = {
        name: {
            row: [cell.published for (r, _), cell in table.cells.items() if r == row] for row in table.rows
        }
        for name, table in library.tables.items()
        for table in [replace(table, cells=table.choose(None, None))]
    }
    assert found == PUBLISHED


def test_every_claim_is_what_the_publication_shows(library: Library) -> None:
    for table in library.tables.values():
        for row in table.rows:
            for better, worse in table.claims:
                first, second = (table.cells[row, column].published for column in (better, worse))
                assert first is not None and second is not None
                assert (first - second) * UNITS[table.unit] > 0


def test_recipes_are_the_authors(library: Library) -> None:
    for each in library.reproductions.values():
        recipe = each.recipe
        assert recipe == Recipe.load(each.file)  # and so `train --config` takes it
        assert (recipe.validation, recipe.keep, recipe.weight_decay, recipe.split_seed) == (
            0.0,
            "last",
            5e-4,
            0,
        )
        if recipe.data == "cifar10":
            drops = [round(share * recipe.epochs) for share in recipe.milestones]
            assert (recipe.epochs, recipe.batch_size, drops) == (200, 128, [59, 119, 159])
            assert recipe.reset_momentum and recipe.batchnorm_init == "uniform" and recipe.factor == 0.2
        if "at" in recipe.method_terms:
            assert (recipe.form, recipe.beta) == ("code", 1000.0)
        if "kd" in recipe.method_terms:
            assert (recipe.alpha, recipe.temperature) == (0.9, 4.0)
        assert (
            each.notes
            and each.source
            and f"{each.file.parent.name}/{each.name}.yaml" in each.file.read_text()
        )
        if each.teacher:
            assert library.reproductions[each.teacher].recipe.student == recipe.teacher


def test_models_can_be_built(library: Library) -> None:
    from attention_transfer.models import build_model

    for name in sorted({each.recipe.student for each in library.reproductions.values()}):
        build_model(name)


TABLE = """title: Tiny
source: nobody
unit: test error %
statistic: median
classes: 10
rows: {small: "wrn-10-1 / wrn-10-2"}
columns: {none: alone, at: AT, teacher: teacher}
claims: [[at, none]]
"""
FACTS = """# {name}
places: [{{table: tiny, row: small, column: {column}}}]
source: nobody
published: 5.0
statistic: one run
unit: test error %
teacher: {teacher}
notes: []  # none
ours: []
---
# the recipe
"""
RECIPE = """student: {student}
teacher: {model}
method: {method}
data: mnist-5k
validation: 0.0
epochs: 40
batch_size: 32
split_seed: 0
"""


def write_file(
    folder: Path, column: str, student: str, method: str = "none", teacher: str | None = None
) -> Path:
    path = folder / "tiny" / f"{column}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    model = "wrn-10-2" if teacher else "null"
    facts = FACTS.format(name=column, column=column, teacher=teacher or "null")
    path.write_text(facts + RECIPE.format(student=student, model=model, method=method))
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A table of three numbers."""
    folder = tmp_path / "recipes"
    write_file(folder, "teacher", "wrn-10-2")
    write_file(folder, "none", "wrn-10-1")
    write_file(folder, "at", "wrn-10-1", "at", "teacher")
    (folder / "tiny.yaml").write_text(TABLE)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("teacher: teacher", "teacher: taecher"),
            "as teacher in .*at.yaml, got 'taecher'. Did you mean teach",
        ),
        (("teacher: teacher", "teacher: null"), "a teacher where the method has one"),
        (("column: at", "column: an"), "places in the tables in .*, got tiny, small, an"),
        (("column: at", "column: none"), "a place of its own"),
        (("unit: test error %", "unit: furlongs"), "the table's unit, test error %"),
        (("published: 5.0", "published: five"), "a published number or null"),
        (("published: 5.0\n", ""), "the fields places, source"),
        (("---\n", "---\n{}\n---\n"), "2 YAML documents"),
        (("---\n", ""), "'teacher' is there twice"),
        (("method: at", "metod: at"), "unknown field 'metod'. Did you mean method"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tiny: Path, change: tuple[str, str], message: str) -> None:
    path = tiny / "tiny" / "at.yaml"
    path.write_text(path.read_text().replace(*change, 1))
    with pytest.raises(ValueError, match=message) as caught:
        read_library(tiny)
    assert "\n" not in str(caught.value)


# What is asked for


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a table, got none. Tables: tiny."),
        (["tony"], "unknown table 'tony'. Did you mean tiny? Tables: tiny."),
        (["tiny", "--rows", "smal"], "unknown row 'smal' of tiny. Did you mean small?"),
        (["tiny", "--columns", "kd"], "unknown column 'kd' of tiny. Known: none, at, teacher."),
        (["tiny", "--seeds", "0"], "expected --seeds >= 1, got 0."),
        (["tiny", "--epochs-scale", "2"], "expected --epochs-scale above 0 and up to 1, got 2.0."),
        (["tiny", "--views", "few"], 'expected --views "auto" or a number'),
        (["tiny", "--data", "nowhere"], "expected a folder with mnist-5k as --data, got nowhere"),
        (["tiny", "--sedes", "2"], "unknown argument --sedes. Did you mean --seeds"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tiny: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", *arguments, "--recipes", str(tiny)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("attention-transfer: reproduce: ") and error.count("\n") == 1
    assert message in error


def test_data_of_other_classes(
    tiny: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tiny", "--recipes", str(tiny), "--data", str(image_folder), "--output", str(tmp_path)]
    assert main(["reproduce", *words]) == 2
    assert "tiny needs mnist-5k, which has 10 classes, got 3 in" in capsys.readouterr().err


def test_a_model_that_cannot_be_built(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_file(tiny, "none", "wrn-11-1")
    assert main(["reproduce", "tiny", "--recipes", str(tiny), "--output", str(tmp_path)]) == 2
    assert "Try wrn-10-1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("pairs: group0:group1", r"got student \(28, 28\) and teacher \(14, 14\)"),
        ("pairs: group0:nowhere", "got 'nowhere'"),
        ("beta: 0.0", "the term is dead"),
    ],
)
@pytest.mark.parametrize("views", ["auto", "0"])  # from a cache, and from a live teacher
def test_a_student_that_cannot_learn_is_said_before_its_teacher_is_trained(
    tiny: Path, tmp_path: Path, field: str, message: str, views: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny / "tiny" / "at.yaml"
    path.write_text(f"{path.read_text()}{field}\n")
    words = ["tiny", "--recipes", str(tiny), "--output", str(tmp_path / "out"), "--epochs-scale", "0.05"]
    assert main(["reproduce", *words, "--views", views, "--max-train", "64"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("attention-transfer: reproduce: at seed 0 cannot learn from teacher seed 0: ")
    assert re.search(message, error) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_recipes_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "tiny", "--recipes", str(tmp_path / "none")]) == 2
    assert "or pass --recipes DIR" in capsys.readouterr().err
    assert main(["reproduce", "tiny", "--recipes", str(tmp_path)]) == 2
    assert "expected tables, TABLE.yaml" in capsys.readouterr().err


# The plan


def finish(run: Run, recipe: Recipe, error: float, seconds: float = 20.0) -> None:
    """A run folder as a finished training leaves it."""
    from attention_transfer.models import build_model, save_weights

    run.folder.mkdir(parents=True)
    run.recipe_file.write_text(replace(recipe, precision="32-true").to_yaml())
    run.metrics_file.write_text("epoch,lr,train/loss,seconds\n1,0.1,2.5,9\n2,0.02,1.25,9\n")
    machine = {"device": "CPU: one", "threads": 1, "torch": "2.0", "commit": "abc1234"}
    numbers = {"test_error": error, "wall_seconds": seconds, "images_per_second": 99.6}
    result = {**numbers, "data_share": 0.1, "parameters": 77_850, "plan": [], "machine": machine}
    run.result_file.write_text(json.dumps(result))
    save_weights(build_model("wrn-10-1"), run.student_weights)


def plan_of(folder: Path, setting: Setting, seeds: int = 2) -> tuple[Library, Plan]:
    library = read_library(folder)
    return library, make_plan(library, setting, list(library.tables["tiny"].cells.values()), seeds)


def test_plan_begins_with_the_teacher_and_shares_a_cache(tiny: Path, tmp_path: Path) -> None:
    setting = Setting(tmp_path, scale=0.05, max_train=200)
    _, plan = plan_of(tiny, setting)
    titles = [job.title for job in plan.jobs]
    assert titles[:2] == ["teacher seed 0", "teacher-p2-sum"] and titles[-1] == "teacher seed 1"
    assert sorted(titles[2:4]) == ["at seed 0", "none seed 0"]  # pairs first
    recipes = {job.title: job.recipe for job in plan.jobs if isinstance(job, Training)}
    assert recipes["at seed 0"].cache == str(setting.folder / "caches" / "teacher-p2-sum")
    assert recipes["at seed 0"].views == recipes["none seed 1"].views == 2
    assert recipes["teacher seed 0"].views is None  # it sees a fresh crop of every image in every epoch
    assert recipes["none seed 1"].epochs == 2 and recipes["none seed 1"].max_train == 200
    build = next(job for job in plan.jobs if isinstance(job, CacheBuild))
    words = build.arguments()
    assert words[words.index("--views") + 1] == "2" and "--validation" in words and "--max-train" in words


def test_networks_that_only_teach_are_trained_once(library: Library) -> None:
    table = library.table("table1")
    row = table.choose(["wrn-16-1/wrn-16-2"], None)
    assert table.taught_once(row) == {"wrn-16-2"}
    assert table.taught_once(table.choose(None, None)) == {"nin-wide", "wrn-40-1", "wrn-40-2"}


def test_long_schedules_have_a_live_teacher(tiny: Path, tmp_path: Path) -> None:
    _, plan = plan_of(tiny, Setting(tmp_path))
    assert not [job for job in plan.jobs if isinstance(job, CacheBuild)]
    assert all(job.recipe.views is None and job.recipe.cache is None for job in plan.trainings)
    assert Setting(tmp_path).tag == "full"
    assert Setting(tmp_path, scale=0.05, max_train=20000).tag == "scale-0.05-train-20000"


def test_finished_runs_are_taken_and_others_refused(tiny: Path, tmp_path: Path) -> None:
    setting = Setting(tmp_path, scale=0.05)
    library = read_library(tiny)
    recipe = setting.recipe(library, library.reproductions["none"], 0)
    finish(setting.run("none", 0), recipe, 9.0)
    _, plan = plan_of(tiny, setting)
    assert "none seed 0" not in [job.title for job in plan.jobs]
    finish(setting.run("none", 1), replace(recipe, lr=0.3, seed=1), 9.0)
    with pytest.raises(ValueError, match=r"holds a run of another recipe \(lr: 0.3, not 0.1\). Move it away"):
        plan_of(tiny, setting)


def test_students_of_another_teacher_are_refused(tiny: Path, tmp_path: Path) -> None:
    from attention_transfer.models import build_model, fingerprint, save_weights

    setting = Setting(tmp_path, scale=0.05)
    library, teacher = read_library(tiny), build_model("wrn-10-2", in_channels=1)
    for name in ("teacher", "at"):
        finish(setting.run(name, 0), setting.recipe(library, library.reproductions[name], 0), 9.0)
    save_weights(teacher, setting.run("teacher", 0).student_weights)
    student = setting.run("at", 0)
    student.result_file.write_text(json.dumps(student.result | {"teacher_fingerprint": fingerprint(teacher)}))
    plan_of(tiny, setting)
    student = setting.run("at", 0)
    student.result_file.write_text(json.dumps(student.result | {"teacher_fingerprint": "0123456789abcdef"}))
    with pytest.raises(
        ValueError, match=r"seed-0 learnt from a teacher of fingerprint 0123456789abcdef, got"
    ):
        plan_of(tiny, setting)


def test_what_makes_a_recipe_another_one() -> None:
    recipe = Recipe(method="at", data="/a/cifar10", cache="/a/cache", precision="auto")
    same = replace(recipe, data="/b/cifar10", cache=None, precision="32-true", alpha=0.5, num_workers=3)
    assert differences(recipe, same) == []
    assert differences(recipe, replace(same, p=4.0)) == ["p: 4.0, not 2.0"]
    assert differences(replace(recipe, precision="32-true"), replace(recipe, precision="bf16-mixed")) != []


def test_estimate_is_measured_or_says_so(tiny: Path, tmp_path: Path) -> None:
    setting = Setting(tmp_path, scale=0.05, views=0)
    library, plan = plan_of(tiny, setting)
    assert time_left(plan.jobs, plan.trainings, 1) == "estimating the time left"
    for name in ("teacher", "none"):
        finish(setting.run(name, 0), setting.recipe(library, library.reproductions[name], 0), 9.0)
    _, plan = plan_of(tiny, setting)
    assert time_left(plan.jobs, plan.trainings, 1) == "at least 80 s left"  # 4 runs of 20 s; AT is a guess
    assert time_left(plan.jobs, plan.trainings, 2) == "at least 40 s left"
    finish(setting.run("at", 0), setting.recipe(library, library.reproductions["at"], 0), 9.0, seconds=30)
    _, plan = plan_of(tiny, setting)
    assert time_left(plan.jobs, plan.trainings, 1) == "about 70 s left"


# Statistics and the table


def test_paired_interval_is_scipys() -> None:
    from scipy import stats

    first, second = {0: 1.0, 1: 2.5, 2: 2.0, 7: 9.0}, {0: 3.0, 1: 3.5, 2: 4.5, 9: 0.0}
    paired = paired_difference(first, second)
    assert paired is not None and paired.pairs == 3
    expected = stats.ttest_rel([1.0, 2.5, 2.0], [3.0, 3.5, 4.5]).confidence_interval(0.95)
    assert paired.interval == pytest.approx((expected.low, expected.high))
    # by hand: differences -2, -1, -2.5: mean -11/6, s.d. 0.7638, t(0.975, 2) = 4.3027
    assert paired.interval == pytest.approx((-11 / 6 - 1.8973, -11 / 6 + 1.8973), abs=1e-3)


def test_a_word_only_where_the_interval_excludes_zero() -> None:
    def said(differences: list[float], better: int = -1) -> str:
        ours = dict(enumerate(differences))
        return describe("A against B", paired_difference(ours, dict.fromkeys(ours, 0.0)), better)

    assert said([-2.0, -2.1, -1.9]).endswith(": better (n=3)")
    assert said([-2.0, -2.1, -1.9], better=1).endswith(": worse (n=3)")
    assert said([-2.0, 0.1, -1.9]).endswith(": no difference shown (n=3)")
    assert said([-2.0]) == "A against B: -2.00 points: no interval from one seed"
    assert said([-1.0, -1.0]) == "A against B: -1.00 points, 95 % interval -1.00 to -1.00: better (n=2)"
    assert said([0.0, 0.0]).endswith("no difference shown (n=2)")
    assert said([]) == "A against B: no seed of both is there yet"


@pytest.fixture
def measured(tiny: Path, tmp_path: Path) -> tuple[Path, Setting]:
    setting = Setting(tmp_path / "out", scale=0.05, max_train=200)
    library = read_library(tiny)
    for name, errors in {"none": [8.0, 9.0, 8.5], "at": [7.0, 8.1], "teacher": [6.0]}.items():
        for seed, error in enumerate(errors):
            recipe = setting.recipe(library, library.reproductions[name], seed)
            finish(setting.run(name, seed), recipe, error)
    return tiny, setting


def test_table_says_what_is_there_and_what_is_not(measured: tuple[Path, Setting]) -> None:
    tiny, setting = measured
    table = read_library(tiny).tables["tiny"]
    results = find_results(table, table.choose(None, None), setting, "digits as JPEG-compressed images", 3)
    text = as_text(results)
    for part in (
        "epochs scaled by 0.05 (2 of 40 epochs)",
        "200 training images",
        "JPEG-compressed",
        "augmentation: 2 fixed views of each image, one an epoch in turn; fresh in every epoch: teacher",
        "precision: 32-true",
        "commits: abc1234",
        "not there yet (3): at seed 2, teacher seed 1, teacher seed 2",
        "wrn-10-1 / wrn-10-2: AT against alone: -0.95 points, 95 % interval -1.59 to -0.31: better (n=2)",
    ):
        assert part in text
    (line,) = [line for line in text.splitlines() if "alone " in line and "±" in line]
    assert " ".join(line.split()) == ("wrn-10-1 / wrn-10-2 alone 5 8.50 8.50 ± 0.50 +3.50 3 8.00 9.00 8.50")
    page = as_markdown(results, "tiny.png")
    assert "| wrn-10-1 / wrn-10-2 | AT | 5 | 7.55 | 7.55 ± 0.78 | +2.55 | 2/3 | 7.00  8.10 |" in page
    assert (
        "JPEG-compressed" in page
        and "scaled by 0.05" in page
        and "![published against ours](tiny.png)" in page
    )
    rows = as_csv(results).splitlines()
    assert len(rows) == 7
    assert rows[1] == (
        "none,0,0.05,2,200,digits as JPEG-compressed images,32-true,8,20,100,CPU: one,1,2.0,abc1234"
    )


def test_nothing_run_yet_is_a_table_too(tiny: Path, tmp_path: Path) -> None:
    table = read_library(tiny).tables["tiny"]
    results = find_results(table, table.choose(None, ["AT"]), Setting(tmp_path), "digits", 2)
    assert "not run" in as_text(results) and "the published schedule" in as_text(results)


def test_record_writes_ours_and_nothing_else(measured: tuple[Path, Setting]) -> None:
    tiny, setting = measured
    before = (tiny / "tiny" / "at.yaml").read_text()
    for _ in range(2):  # a second time replaces the entry
        table = read_library(tiny).tables["tiny"]
        results = find_results(table, table.choose(None, None), setting, "digits", 3)
        record(results, "attention-transfer reproduce tiny --data DIR", tiny)
    after = (tiny / "tiny" / "at.yaml").read_text()
    head, tail = before.split("ours: []\n")
    assert after.startswith(head) and after.endswith(tail)
    (entry,) = read_library(tiny).reproductions["at"].ours
    assert entry["median"] == 7.55 and entry["each"] == {0: 7.0, 1: 8.1} and entry["max_train"] == 200
    assert entry["commit"] == "abc1234" and entry["command"].endswith("--data DIR")
    rows = (tiny / "results" / "tiny-scale-0.05-train-200.csv").read_text().splitlines()
    assert rows[1] == "none,0,1,0.1,2.5,,,9" and len(rows) == 13


# Processes


def test_a_training_begun_by_hand_is_waited_for(tiny: Path, tmp_path: Path) -> None:
    """And nobody is kept from looking: the job stays on the list, and is done by the other process."""
    job = Training(tmp_path / "seed-0", "one", "kind", "wrn-10-1", 1, recipe=Recipe())
    runner = Runner([job], [job], 1, 1, say=lambda line: None, show=lambda line: None)
    with job.run.alone():
        assert not runner._start(job) and not runner._running
    assert not is_locked(job.lock.parent, job.lock.name) and not is_locked(job.key)
    with locked(job.lock.parent, "", job.lock.name):  # by another reproduction, whose training begins
        assert not runner._start(job)


def test_last_error_is_the_commands_own(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("epoch 1\nattention-transfer: train: too hot. Cool it.\nwarning: bye\n")
    assert last_error(log, 2) == "train: too hot. Cool it. (exit status 2)"
    assert last_error(log, -9) == "ended by signal 9"


def command(tiny: Path, output: Path, *more: str) -> list[str]:
    words = ["tiny", "--recipes", str(tiny), "--output", str(output), "--seeds", "2", "--jobs", "2"]
    words += ["--epochs-scale", "0.05", "--max-train", "64", "--columns", "none,at", *more]
    return [sys.executable, "-m", "attention_transfer", "reproduce", *words]


def test_killed_and_gone_on_with(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    folder = output / "scale-0.05-train-64"
    first = subprocess.Popen(command(tiny, output), stdout=subprocess.DEVNULL)
    until = time.monotonic() + 240
    while not list(folder.glob("*/*/result.json")) and time.monotonic() < until:
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/result.json")}
    assert finished and len(finished) < 5
    second = subprocess.run(command(tiny, output), capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert len(list(folder.glob("*/*/result.json"))) == 5 and (folder / "caches" / "teacher-p2-sum").is_dir()
    assert (folder / "tiny.md").is_file() and (folder / "tiny.csv").is_file()
    assert (folder / "tiny.png").read_bytes().startswith(b"\x89PNG")
    assert "AT against alone" in second.stdout and "not there yet" not in second.stdout
    cached = Run(folder / "at" / "seed-0").recipe
    assert cached.cache is not None and cached.views == 2

    logs = {path: path.stat().st_mtime_ns for path in folder.rglob("*.log")}
    third = subprocess.run(command(tiny, output), capture_output=True, text=True)
    assert third.returncode == 0 and "4 of 4 runs of the table are there" in third.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.log")} == logs


@pytest.mark.slow
def test_a_failed_run_stops_no_other_and_ctrl_c_stops_all(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    folder = output / "scale-0.05-train-64"
    (folder / "teacher" / "seed-0").mkdir(parents=True)
    (folder / "teacher" / "seed-0" / "notes.txt").write_text("not a run")
    done = subprocess.run(command(tiny, output), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "teacher seed 0 and 3 more failed: train: " in done.stderr and "Log: " in done.stderr
    assert "it needs teacher seed 0, which failed" in done.stdout
    assert len(list(folder.glob("none/*/result.json"))) == 2

    stopped = subprocess.Popen(
        command(tiny, tmp_path / "other"), stdout=-1, stderr=-1, text=True, start_new_session=True
    )
    while not list((tmp_path / "other").glob("*/*/*/metrics.csv")):
        time.sleep(0.1)
    stopped.send_signal(signal.SIGTERM)
    _, error = stopped.communicate(timeout=120)
    assert stopped.returncode == 143 and "Stopped; nothing is lost. Go on with: " in error
    locks = list((tmp_path / "other").rglob("*.lock"))
    assert locks and not any(is_locked(path.parent, path.name) for path in locks)  # nobody trains any more
