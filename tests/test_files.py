"""What is written and deleted: whole or not at all, no link followed, one process a folder."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attention_transfer import _files
from attention_transfer._files import (
    is_leftover,
    new_folder,
    open_to_append,
    remove_leftovers,
    remove_written,
    write_atomically,
)
from attention_transfer._locks import LOCK, InUseError, is_locked, locked
from attention_transfer._patterns import cache_folder
from attention_transfer.cli import main
from attention_transfer.runs import Recipe, Run
from attention_transfer.runs.run import NUMBERS
from attention_transfer.training import resume, train

pytestmark = [
    pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def silent(line: str) -> None:
    pass


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line with which the command refuses."""
    capsys.readouterr()
    assert main([*map(str, words)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    return line.removeprefix("attention-transfer: ")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != LOCK
    }


# --- writing ------------------------------------------------------------------------------------------------

WRITERS = {
    "text": lambda path: write_atomically(path, "new"),
    "function": lambda path: write_atomically(path, lambda file: file.write(b"new")),
    "append": lambda path: open_to_append(path).close(),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_nothing_is_written_through_a_link(kind: str, tmp_path: Path) -> None:
    Path("mine").write_text("mine")
    Path("folder").mkdir()
    Path("link").symlink_to("mine")
    Path("dangling").symlink_to("nowhere")
    Path("other").symlink_to("folder")
    os.mkfifo("pipe")
    for name in ("link", "dangling", "other"):
        with pytest.raises(OSError, match="A link is there, through which nothing is written; remove it"):
            WRITERS[kind](Path(name))
    for name in ("folder", "pipe"):
        with pytest.raises(OSError, match=f"Something is there that is not a file: '{name}'"):
            WRITERS[kind](Path(name))
    assert Path("mine").read_text() == "mine" and not Path("nowhere").exists()
    assert not list(tmp_path.glob(".*")) and not list(Path("folder").iterdir())


def test_the_folder_that_is_named_may_be_a_link() -> None:
    Path("folder").mkdir()
    Path("link").symlink_to("folder")
    write_atomically(Path("link/file"), "new")
    with open_to_append(Path("link/file")) as file:
        file.write("er")
    assert Path("folder/file").read_text() == "newer"


def test_a_temporary_name_cannot_be_known_and_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {_files._temporary_name() for _ in range(100)}
    assert len(names) == 100 and all(is_leftover(Path(name)) for name in names)
    Path("mine").write_text("mine")
    trap = Path(names.pop())
    trap.symlink_to("mine")
    monkeypatch.setattr(_files, "_temporary_name", lambda: trap.name)
    with pytest.raises(FileExistsError):
        write_atomically(Path("file"), "new")
    assert Path("mine").read_text() == "mine" and not Path("file").exists()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_mode_is_that_of_the_umask(mask: int) -> None:
    former = os.umask(mask)
    try:
        write_atomically(Path("file"), "new")
        open_to_append(Path("rows")).close()
        with new_folder(Path("folder")) as folder:
            write_atomically(folder / "file", "new")
    finally:
        os.umask(former)
    for name in ("file", "rows", "folder/file"):
        assert Path(name).stat().st_mode & 0o777 == 0o666 & ~mask
    assert Path("folder").stat().st_mode & 0o777 == 0o777 & ~mask


def test_names_may_be_as_long_as_the_disk_allows() -> None:
    write_atomically(Path("n" * 255), "new")
    with pytest.raises(OSError, match="File name too long") as found:
        write_atomically(Path("n" * 256), "new")
    assert found.value.filename == "n" * 256


# --- deleting -----------------------------------------------------------------------------------------------


def test_only_what_fits_the_patterns_is_deleted(tmp_path: Path) -> None:
    for name in ("a/x.ckpt", "a/notes", "b/x.ckpt", "x.ckpt", "elsewhere/x.ckpt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(name)
    Path("c").symlink_to("elsewhere")
    Path("y.ckpt").symlink_to("a/notes")
    remove_written(tmp_path, ["*/x.ckpt", "?.ckpt"])
    assert contents(tmp_path) == {"a/notes": b"a/notes", "y.ckpt": b"a/notes"}
    assert not Path("b").exists() and Path("c").is_symlink()


def test_leftovers_are_those_of_this_package() -> None:
    for name in (".attention-transfer-0123456789abcdef.tmp", ".notes.tmp", "x.tmp", ".recipe.yaml.12.tmp"):
        Path(name).write_text(name)
    remove_leftovers(Path())
    assert sorted(path.name for path in Path().iterdir()) == [".notes.tmp", ".recipe.yaml.12.tmp", "x.tmp"]


def test_a_new_folder_is_there_whole_or_not_at_all() -> None:
    with pytest.raises(ValueError, match="no"), new_folder(Path("deep/folder")) as folder:
        write_atomically(folder / "file", "half")
        raise ValueError("no")
    assert not list(Path("deep").iterdir())
    with new_folder(Path("deep/folder")) as folder:
        write_atomically(folder / "file", "whole")
        assert not Path("deep/folder").exists()
    assert sorted(Path("deep").rglob("*")) == [Path("deep/folder"), Path("deep/folder/file")]
    with pytest.raises(OSError, match="not empty"), new_folder(Path("deep/folder")):
        pass
    assert contents(Path("deep")) == {"folder/file": b"whole"}


KILLED = """
import os, signal
from pathlib import Path
from attention_transfer._files import new_folder, write_atomically

with new_folder(Path("folder")) as folder:
    write_atomically(folder / "file", "half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_one_deletes_what_a_killed_one_left() -> None:
    assert subprocess.run([sys.executable, "-c", KILLED]).returncode == -9
    (left,) = Path().iterdir()
    assert is_leftover(left) and (left / "file").read_text() == "half"
    with new_folder(Path("one")) as one, new_folder(Path("two")):
        assert one.is_dir() and not left.exists()  # those that are being filled stay
    assert sorted(path.name for path in Path().iterdir()) == ["one", "two"]


# --- locks --------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from attention_transfer._locks import locked

with locked(Path("folder"), ""):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=-1, stdout=-1, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_lock_names_its_holder_and_ends_with_it(holder: subprocess.Popen[str]) -> None:
    folder = Path("folder")
    assert is_locked(folder)
    with (
        pytest.raises(InUseError, match=rf"^process {holder.pid} has it$"),
        locked(folder, "{holder} has it"),
    ):
        pass
    holder.kill()
    holder.communicate()
    assert not is_locked(folder)
    with locked(folder, ""):
        assert is_locked(folder)
    assert not is_locked(folder)


def test_a_child_that_outlives_its_parent_holds_no_lock() -> None:
    with locked(Path("folder"), ""):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        assert not is_locked(Path("folder"))
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_lock_follows_no_link() -> None:
    Path("folder").mkdir()
    Path("mine").write_text("mine")
    Path("folder", LOCK).symlink_to("../mine")
    with pytest.raises(OSError) as found, locked(Path("folder"), ""):
        pass
    assert found.value.errno == errno.ELOOP and Path("mine").read_text() == "mine"


# --- run folders --------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tiny: Recipe) -> Recipe:
    return replace(tiny, max_train=20)


def test_files_beside_a_recipe_stay(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    """As they were deleted by `--config recipe.yaml --output .` once."""
    Path("thesis.tex").write_text("years")
    Path("recipe.yaml").write_text(f"# mine\n{recipe.to_yaml()}")
    Path("checkpoints").mkdir()
    Path("checkpoints/best.pt").write_text("weeks")
    before = contents(Path())
    for words in ((), ("--overwrite",)):
        told = error_of(capsys, "train", "--config", "recipe.yaml", "--output", ".", *words)
        assert "holds recipe.yaml, which no run wrote, so it stays. Pass another --output, such as " in told
        assert contents(Path()) == before


@pytest.mark.parametrize("edited", ["comment", "place", "other file"])
def test_a_recipe_that_no_run_wrote_stays(recipe: Recipe, edited: str, tmp_path: Path) -> None:
    text = replace(recipe, output=str(tmp_path)).to_yaml()
    if edited == "comment":
        text += "# mine\n"
    if edited == "place":
        text = text.replace(f"output: {tmp_path}", "output: null")
    if edited == "other file":
        Path("a.txt").write_text("mine")
    Path("recipe.yaml").write_text(text)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"holds (recipe\.yaml|a\.txt), which no run wrote"):
        train(replace(recipe, output="."), say=silent)
    assert contents(tmp_path) == before


def test_a_run_that_was_killed_before_it_saved_is_started_over(recipe: Recipe) -> None:
    run = Run(Path("run").absolute())
    run.create(replace(recipe, output="run").resolved())
    assert train(replace(recipe, output="run", seed=1), say=silent).recipe.seed == 1


def test_starting_over_deletes_the_run_and_no_more(recipe: Recipe, tmp_path: Path) -> None:
    taught = replace(recipe, teacher="wrn-10-1", method="at", teacher_epochs=1, output="run")
    run = train(taught, say=silent)
    for name in ("notes.txt", "checkpoints/mine.ckpt", "teacher/notes.txt", ".x.tmp", "export/README.md"):
        (run.folder / name).parent.mkdir(exist_ok=True)
        (run.folder / name).write_text(name)
    for name in ("tensorboard/plugin.txt", "not-finite/epoch-1/mine.png"):
        (run.folder / name).parent.mkdir(exist_ok=True, parents=True)
        (run.folder / name).write_text(name)
    run.create(replace(taught, seed=3).resolved(), overwrite=True)
    left = contents(run.folder)
    assert left.pop("recipe.yaml").decode() == replace(taught, seed=3).resolved().to_yaml()
    assert {name: data.decode() for name, data in left.items()} == {name: name for name in left}
    assert len(left) == 7


def test_a_run_that_lies_where_the_teacher_would_be_is_kept_and_not_learned_from(recipe: Recipe) -> None:
    other = train(replace(recipe, output="run/teacher", seed=7), say=silent)
    before = contents(other.folder)
    taught = replace(recipe, teacher="wrn-10-1", method="at", output="run")
    with pytest.raises(FileExistsError, match="run exists and is no run folder, so it stays"):
        train(taught, overwrite=True, say=silent)
    write_atomically(Path("run/recipe.yaml"), replace(taught, output="run").resolved().to_yaml())
    with pytest.raises(
        FileExistsError, match=r"another run than that of this teacher: they differ in seed, split_seed\."
    ):
        resume("run", say=silent)
    with pytest.raises(FileExistsError, match="they differ in seed"):
        train(taught, overwrite=True, say=silent)
    assert contents(other.folder) == before


def test_the_demo_deletes_no_run_of_others(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    other = train(replace(recipe, output="runs/teacher"), say=silent)
    before = contents(other.folder)
    told = error_of(capsys, "demo", "--output", "runs")
    assert told.startswith(f"demo: {other.folder} holds another run, with student, ") and "data" in told
    assert contents(other.folder) == before


@pytest.mark.parametrize("name", ["report.html", "checkpoints", "tensorboard", "teacher", "wandb"])
def test_nothing_in_a_run_folder_leads_out_of_it(
    name: str, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run")
    run.create(replace(recipe, output="run").resolved())
    (tmp_path / "victim").mkdir()
    (run.folder / name).symlink_to(tmp_path / "victim")
    for words in (["--resume", "run"], ["--config", "run/recipe.yaml", "--output", "run"]):
        assert f"without links, got {run.folder / name}, which may lead anywhere" in error_of(
            capsys, "train", *words
        )
    assert not list((tmp_path / "victim").iterdir())


def test_the_folder_itself_may_be_a_link_and_wandb_links_to_its_own(recipe: Recipe, tmp_path: Path) -> None:
    Path("disk/wandb/run-1").mkdir(parents=True)
    Path("disk/wandb/latest-run").symlink_to("run-1")
    Run(tmp_path / "disk").check_links()
    Path("disk/wandb/latest-run").unlink()
    Path("disk/wandb/run-1").rmdir()
    Path("disk/wandb").rmdir()
    Path("link").symlink_to("disk")
    assert train(replace(recipe, output="link"), say=silent).finished
    assert Path("disk/result.json").is_file()


def test_the_page_is_not_written_through_a_link(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(replace(recipe, output="run"), say=silent)
    Path("bashrc").write_text("mine")
    run.report.symlink_to("../bashrc")
    assert error_of(capsys, "report", "run", "--images", 4).startswith("A link is there, through which ")
    Path("picture.png").symlink_to("bashrc")
    told = error_of(capsys, "evaluate", "run", "--plot", "picture.png")
    assert told == "A link is there, through which nothing is written; remove it: picture.png"
    Path("run/export").symlink_to("../")
    assert "is a link" in error_of(capsys, "export", "run", "--format", "torch")
    assert Path("bashrc").read_text() == "mine" and Run(Path("run")).finished


# --- two trainings and one folder ---------------------------------------------------------------------------


def test_a_second_training_is_refused_while_the_first_goes_on(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    refusals: list[str] = []

    def say(line: str) -> None:
        """In the midst of the first one, a second is begun in the same folder."""
        if line.startswith("epoch 1") and not refusals:
            for words in (
                ["--config", "run/recipe.yaml", "--output", "run", "--overwrite"],
                ["--resume", "run"],
            ):
                refusals.append(error_of(capsys, "train", *words))

    run = train(replace(recipe, output="run", epochs=2), say=say)
    assert run.finished and len(run.read_metrics()) == 2
    assert len(refusals) == 2
    for line in refusals:
        assert f"is in use: process {os.getpid()} trains there. Wait until" in line and "/run" in line
    assert resume("run", say=silent).finished


def test_a_place_with_braces_in_its_name_is_in_use_too() -> None:
    run = Run(Path("run{0}"))
    with run.alone(), pytest.raises(InUseError, match=r"run\{0\} is in use: process \d+ trains"), run.alone():
        pass


def test_a_cache_is_built_by_one_process_at_a_time(tiny: Recipe, image_folder: Path) -> None:
    from attention_transfer.models import build_model, save_weights
    from attention_transfer.training import build_cache

    save_weights(build_model("wrn-10-1", num_classes=3), Path("w.safetensors"))
    recipe = replace(tiny, method="at", teacher="wrn-10-1", teacher_weights="w.safetensors", max_train=4)
    with locked(Path("cache"), ""):
        with pytest.raises(InUseError, match=rf"cache: cache is in use: process {os.getpid()} builds there"):
            build_cache(recipe, "cache", say=silent)
    build_cache(recipe, "cache", say=silent).require(1)


# --- odd places and damaged numbers -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a teacher of its own, of three epochs."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    recipe = replace(tiny, max_train=20, epochs=3, method="at", teacher="wrn-10-1", teacher_epochs=1)
    return train(replace(recipe, output=str(folder)), say=silent)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (os.fsdecode(b"run\xff"), r"expected an --output whose name is UTF-8, got .*run\\udcff"),
        ("n" * 256, "File name too long: "),
        ("/".join(["n" * 250] * 16), "File name too long: "),
        ("file", "expected a folder, got .*file, which is a file"),
        ("file/run", "Not a directory: "),
        ("dangling", "File exists: .*dangling"),
        ("fixed/run", "Read-only file system: "),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_anything_is_trained(
    name: str, told: str, recipe: Recipe, capsys: pytest.CaptureFixture[str], small_disk: Path, tmp_path: Path
) -> None:
    Path("file").write_text("mine")
    Path("dangling").symlink_to("nowhere")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    Path("fixed").symlink_to(small_disk)
    Path("recipe.yaml").write_text(recipe.to_yaml())
    capsys.readouterr()
    assert main(["train", "--config", "recipe.yaml", "--output", name, "--progress", "lines"]) == 2
    said = capsys.readouterr()
    *_, line = said.err.splitlines()
    assert re.search(told, line) and "epoch 1" not in said.out
    assert Path("file").read_text() == "mine" and not Path("nowhere").exists()


def test_a_name_of_any_characters_is_a_run_folders(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a\nb \t'\"é\u202e#[x]*?{1..2}"
    run = train(replace(recipe, output=name), say=silent)
    assert Run(Path(name)).recipe.folder == run.folder and resume(name, say=silent).finished
    for words in (["evaluate", name], ["report", name], ["export", name, "--format", "torch,safetensors"]):
        assert main(words) == 0
    assert all(line.isprintable() for line in capsys.readouterr().out.split("\n"))


def test_a_run_folder_that_goes_away_stops_the_training_and_is_not_made_anew(recipe: Recipe) -> None:
    def say(line: str) -> None:
        if line.startswith("epoch 1"):
            Path("run").rename("elsewhere")

    with pytest.raises(FileNotFoundError, match=r"No such file or directory: .*run/"):
        train(replace(recipe, output="run", epochs=2), say=say)
    assert not Path("run").exists() and Run(Path("elsewhere")).read_metrics()


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
def test_no_file_has_a_nul_in_its_name(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("output", "data", "teacher_weights", "student"):
        with pytest.raises(ValueError, match=f"Recipe: expected {name} to be text"):
            Recipe(**{name: text})
    for words in (["report"], ["evaluate"], ["cache", "info"], ["export", "--format", "torch"], ["maps"]):
        assert error_of(capsys, *words, text)


def test_a_nul_in_a_prototxt_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    data = r'data_param { source: "a\000b" backend: LMDB batch_size: 1 }'
    Path("net.prototxt").write_text(f'layer {{ name: "d" type: "Data" top: "d" {data} }}')
    Path("solver.prototxt").write_text('net: "net.prototxt" base_lr: 1 lr_policy: "fixed" max_iter: 1')
    assert "a\\x00b" in error_of(capsys, "caffe", "train", "--solver", "solver.prototxt")


def test_a_user_without_a_home_is_told_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pwd

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    told = error_of(capsys, "train", "--method", "none", "--data", "~nobody-of-this-name/images")
    assert "~nobody-of-this-name/images" in told
    for name in ("HOME", "ATTENTION_TRANSFER_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)  # as in a container that runs under any number
    assert cache_folder() is None
    assert "a user without a home" in error_of(capsys, "train", "--method", "none", "--data", "cifar10")


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda result: result.pop(name)  # type: ignore[return-value]


MAY_LACK = (
    "seed",
    "method",
    "validation_error",
    "test_top5_error",
    "weights",
    "machine",
    "best_epoch",
    "test_unanswered",
)
OPTIONAL = {f"no {name}" for name in MAY_LACK}
RESULTS = {
    **{f"no {name}": without(name) for name in (*NUMBERS, "plan", "teacher_fingerprint", *MAY_LACK)},
    "a pair without its teacher": lambda result: result["plan"][0].pop("teacher"),
    "a pair that is a number": lambda result: result["plan"].append(3),
    "a weight that is text": lambda result: result.update(weights={"at": "1"}),
    "a machine that is text": lambda result: result.update(machine="here"),
    "an infinite error": lambda result: result.update(test_error=float("inf")),
    "an error without measure": lambda result: result.update(test_error=10**400),
    "a seed that is a list": lambda result: result.update(seed=[1]),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_a_result_that_lacks_something_is_read_without_it_or_refused(
    kind: str, done: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done.folder, "run")
    result = json.loads(done.result_file.read_text())
    RESULTS[kind](result)
    Path("run/result.json").write_text(json.dumps(result))
    for words in ("report run --images 2", "evaluate run", "export run --format torch", "train --resume run"):
        capsys.readouterr()
        status = main(words.split())
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
        assert (status, len(lines)) in ((0, 0), (2, 1)), lines
        if kind in OPTIONAL:
            assert status == 0


@pytest.mark.parametrize("value", ["1e308", "-1e308", "1e-320", "nan", "inf", ""])
def test_a_report_draws_whatever_numbers_there_are(value: str, done: Run, tmp_path: Path) -> None:
    shutil.copytree(done.folder, "run")
    columns, *rows = done.metrics_file.read_text().splitlines()
    opposite = value and str(-float(value))
    for cells in ([value, opposite, "1"], [value, value, value]):
        wide = [f",{cell}" * columns.count(",") for cell in cells]
        lines = [row.split(",")[0] + rest for row, rest in zip(rows, wide, strict=True)]
        Path("run/metrics.csv").write_text("\n".join([columns, *lines]) + "\n")
        assert main(["report", "run", "--images", "2"]) == 0
        page = Path("run/report.html").read_text()
        assert "</html>" in page and not re.search(r'(?:points|cx|cy|x1|y1|d)="[^"]*(?:nan|inf)', page)


def test_maps_with_notes_nested_deeply_are_damaged(done: Run, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    shutil.copytree(done.folder, "run")
    with safe_open("run/maps.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        (key,) = file.metadata()
    save_file(tensors, "run/maps.safetensors", {key: "[" * 200_000 + "]" * 200_000})
    assert "nested too deeply" in error_of(capsys, "report", "run", "--images", 2)


def test_damaged_names_of_loggers_are_refused(done: Run) -> None:
    from attention_transfer.training.loggers import _identities

    shutil.copytree(done.folder, "run")
    for text in ("[" * 200_000, "[]", '{"wandb": 3}', "\xff"):
        Path("run/loggers.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"train: expected the run's names with its loggers .* Delete it: "
        ):
            _identities(Run(Path("run")))
