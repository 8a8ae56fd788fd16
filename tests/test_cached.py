"""Students that learn from a cache: the same as from a live teacher, and from the right cache only."""

from __future__ import annotations

import gc
import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from attention_transfer.cache import Cache
from attention_transfer.cli import main
from attention_transfer.data import Batches, Views
from attention_transfer.distiller import Distiller
from attention_transfer.models import WideResNet, build_model, save_weights
from attention_transfer.runs import Interrupted, Recipe, Run
from attention_transfer.terms import Term
from attention_transfer.training import build_cache, caching, resume, train
from attention_transfer.training.build import (
    build_augment,
    build_student,
    build_teacher,
    build_terms,
    load_splits,
)
from attention_transfer.training.cached import CachedTeacher, check_terms, take_over
from attention_transfer.training.callbacks import StopOnSignal

pytestmark = [
    pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning"),
    pytest.mark.usefixtures("one_thread"),
]

TIMES = ("images_per_second", "seconds", "data_share")


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def live(tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A student and its trained teacher, on two fixed views."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    alone = replace(tiny, epochs=2)
    train(replace(alone, epochs=1, output=str(folder)), say=silent)
    return replace(alone, method="at+kd", teacher=str(folder), views=2, split_seed=0)


@pytest.fixture(scope="module")
def folder(live: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of that teacher, in files of 14 images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching, "SHARD_BYTES", 10_000)
        return build_cache(live, tmp_path_factory.mktemp("caches") / "cache", say=silent).folder


@pytest.fixture
def recipe(live: Recipe, folder: Path, tmp_path: Path) -> Recipe:
    """The same student, learning from the cache; what the cache settles is left open."""
    left = {"teacher": None, "views": None, "split_seed": None, "validation": None, "pad": None}
    return replace(live, **left, cache=str(folder), output=str(tmp_path / "run"))


def numbers(run: Run) -> list[dict[str, float]]:
    return [{k: float(v) for k, v in row.items() if k not in TIMES} for row in run.read_metrics()]


def equal(one: Run, other: Run) -> bool:
    """Bit-identical weights and equal numbers in every epoch, but for the times."""
    ours, theirs = load_file(one.student_weights), load_file(other.student_weights)
    return numbers(one) == numbers(other) and all(torch.equal(ours[name], theirs[name]) for name in ours)


# As from a live teacher


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("uint8", 5e-3)])
def test_the_loss_is_that_of_a_live_teacher(
    live: Recipe, dtype: str, tolerance: float, tmp_path: Path
) -> None:
    """Term by term on every batch of both views; uint8 makes maps coarser, logits are as before."""
    cache = build_cache(live, tmp_path / "cache", dtype=dtype, say=silent)
    splits = load_splits(live)
    student, teacher = build_student(live, splits), build_teacher(live, splits, lambda: None)
    augment, views = build_augment(live, splits), Views(2)
    cached = CachedTeacher.of(take_over(replace(live, cache=str(cache.folder))), splits, student)
    distiller = Distiller(
        student,
        teacher.model,
        pairs=cached.pairs,
        terms=build_terms(live),
        teacher_transform=teacher.transform,
    )
    batches = Batches(splits.train, 19, shuffle=True, views=views)
    for view in range(2):
        batches.set_epoch(view)
        for images, labels, rows in batches:
            inputs = augment.view(images, rows, views, view)
            with torch.no_grad():
                ours = cached.distiller(live, student)(
                    inputs, labels, teacher=cached(rows, view, torch.device("cpu"))
                )
                theirs = distiller(inputs, labels)
            assert (
                ours.terms.keys()
                == theirs.terms.keys()
                == {"ce", "kd", "at/group0", "at/group1", "at/group2"}
            )
            for name, term in theirs.terms.items():
                torch.testing.assert_close(ours.terms[name], term, rtol=tolerance, atol=0)


def test_the_student_is_nearly_that_of_a_live_teacher(live: Recipe, recipe: Recipe, tmp_path: Path) -> None:
    cached = train(recipe, say=silent)
    with_teacher = train(replace(live, output=str(tmp_path / "live")), say=silent)
    assert cached.result["teacher_fingerprint"] == with_teacher.result["teacher_fingerprint"]
    assert cached.result["plan"] != [] and len(cached.result["plan"]) == len(with_teacher.result["plan"])
    for ours, theirs in zip(cached.result["plan"], with_teacher.result["plan"], strict=True):
        for name in ("student", "teacher", "student_shape", "teacher_shape", "resizing"):
            assert ours[name] == theirs[name]
    for ours, theirs in zip(numbers(cached), numbers(with_teacher), strict=True):
        assert ours == pytest.approx(theirs, rel=0.02)
    ours, theirs = load_file(cached.student_weights), load_file(with_teacher.student_weights)
    start = build_student(live, load_splits(live)).state_dict()
    for name in ("group0.block0.conv0.weight", "fc.weight"):
        moved = (theirs[name] - start[name]).norm()
        assert (ours[name] - theirs[name]).norm() < 0.01 * moved


def test_other_views_would_be_another_loss(live: Recipe, folder: Path) -> None:
    """What the test above holds is not held by just any maps: those of the other view are far off."""
    splits = load_splits(live)
    student = build_student(live, splits)
    cached = CachedTeacher.of(take_over(replace(live, cache=str(folder))), splits, student)
    rows, labels = torch.arange(10), splits.train.labels[:10]
    inputs = build_augment(live, splits).view(splits.train.images[:10], rows, Views(2), 0)
    distiller = cached.distiller(live, student).eval()
    right, wrong = (
        distiller(inputs, labels, teacher=cached(rows, view, torch.device("cpu"))) for view in (0, 1)
    )
    assert abs(right.terms["at/group0"] / wrong.terms["at/group0"] - 1) > 0.02


@pytest.mark.parametrize(
    "changes", [{"method": "kd"}, {"method": "at", "precision": "bf16-mixed", "views": 1}]
)
def test_methods_and_precisions(recipe: Recipe, changes: dict) -> None:
    run = train(replace(recipe, epochs=1, **changes), say=silent)
    names = {name for name in run.read_metrics()[0] if name.startswith("train/")}
    assert ("train/kd" in names, "train/at/group1" in names) == (
        changes["method"] == "kd",
        changes["method"] == "at",
    )


def test_pairs_by_name(recipe: Recipe) -> None:
    run = train(replace(recipe, epochs=1, pairs="group2.block0:group2:0.5", method="at"), say=silent)
    plan = [(row["student"], row["teacher"], row["weight"]) for row in run.result["plan"]]
    assert plan == [("group2.block0", "group2", 0.5)]


def living() -> set[int]:
    """All networks of the kind that student and teacher are."""
    return {id(each) for each in gc.get_objects() if type(each) is WideResNet}


@pytest.mark.parametrize("seed", [0, 7])
def test_no_teacher_is_at_hand(
    recipe: Recipe, seed: int, live: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Students of any seed learn when the teacher's weights are gone, and no other network lives."""
    kept = Path(live.teacher).rename(tmp_path / "kept")
    gc.collect()
    before = living()
    seen: set[int] = set()
    original = CachedTeacher.__call__

    def watched(self: CachedTeacher, *rest: object):
        seen.update(living())
        return original(self, *rest)

    monkeypatch.setattr(CachedTeacher, "__call__", watched)
    try:
        run = train(replace(recipe, seed=seed, epochs=1), say=silent)
    finally:
        kept.rename(live.teacher)
    assert len(seen - before) == 1
    assert run.recipe.split_seed == 0


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt a run at the end of a step."""
    original = StopOnSignal.on_train_batch_end

    def hook(self: StopOnSignal, trainer, *rest) -> None:  # type: ignore[no-untyped-def]
        self.received = signal.SIGINT if trainer.global_step == step else None
        original(self, trainer, *rest)

    monkeypatch.setattr(StopOnSignal, "on_train_batch_end", hook)


@pytest.mark.parametrize("step", [2, 6])  # of four in an epoch
def test_resumed_run_equals_the_uninterrupted(
    recipe: Recipe, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(replace(recipe, output=str(tmp_path / "whole")), say=silent)
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        with pytest.raises(Interrupted):
            train(recipe, say=silent)
    assert not Run(tmp_path / "run").finished
    assert equal(whole, resume(tmp_path / "run", say=silent))


def test_a_cache_of_another_teacher_on_resume_is_refused(
    live: Recipe, recipe: Recipe, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "cache"))
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Interrupted):
            train(replace(recipe, cache=str(copied)), say=silent)
    shutil.rmtree(copied)
    save_weights(build_model("wrn-10-1", num_classes=3), tmp_path / "other.safetensors")
    other = replace(live, teacher="wrn-10-1", teacher_weights=str(tmp_path / "other.safetensors"))
    build_cache(other, copied, say=silent)
    with pytest.raises(ValueError, match=r"train: expected the teacher that had fingerprint \w+, got \w+\."):
        resume(tmp_path / "run", say=silent)


def test_streamed_images(live: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_transfer.data.loading.IN_MEMORY_BYTES", 0)
    streamed = replace(live, method="at", image_size=16, num_workers=0, pad=0, epochs=1)
    cache = build_cache(streamed, tmp_path / "cache", say=silent)
    runs = [
        train(replace(streamed, **source, output=str(tmp_path / name)), say=silent)
        for name, source in (("live", {}), ("cached", {"cache": str(cache.folder), "teacher": None}))
    ]
    assert numbers(runs[0])[0] == pytest.approx(numbers(runs[1])[0], rel=0.01)


def _as_before_there_was_a_rule(cache: Path) -> None:
    facts = json.loads((cache / "cache.json").read_text())
    del facts["decoding"]
    (cache / "cache.json").write_text(json.dumps(facts))


def test_a_cache_of_pixels_by_another_rule_is_refused_by_its_name(
    live: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attention_transfer.data.loading.IN_MEMORY_BYTES", 0)
    streamed = replace(live, method="at", image_size=16, num_workers=0, pad=0, epochs=1)
    with monkeypatch.context() as before:
        before.setattr("attention_transfer.data.identity.DECODING", "")
        cache = build_cache(streamed, tmp_path / "cache", say=silent)
    _as_before_there_was_a_rule(cache.folder)
    Cache.read(cache.folder).require(2)
    with pytest.raises(
        ValueError,
        match="built from images as they are stored, whatever EXIF says; images are now turned upright",
    ):
        train(
            replace(streamed, cache=str(cache.folder), teacher=None, output=str(tmp_path / "run")), say=silent
        )
    with pytest.raises(
        ValueError, match=r"data: \w+, not \w+; decoding: as they are stored, whatever EXIF says, not turned"
    ):
        build_cache(streamed, cache.folder, say=silent)


def test_a_cache_of_the_same_pixels_serves_whatever_the_rule(recipe: Recipe, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(recipe.cache or "", tmp_path / "cache"))
    _as_before_there_was_a_rule(copied)
    train(replace(recipe, cache=str(copied), epochs=1), say=silent)


TWO_PROCESSES = """
import sys
from attention_transfer.runs import Recipe
from attention_transfer.training import train

if __name__ == "__main__":
    train(Recipe.load(sys.argv[1]), say=lambda line: None)
"""


def test_two_processes_read_the_maps_of_their_own_images(
    recipe: Recipe, live: Recipe, tmp_path: Path
) -> None:
    """With next to no learning rate, the epoch's mean term is that of a live teacher over both shares."""
    two = replace(recipe, method="at", devices=2, epochs=1, lr=1e-12, batch_size=10)
    (tmp_path / "recipe.yaml").write_text(two.to_yaml())
    (tmp_path / "main.py").write_text(TWO_PROCESSES)
    command = [sys.executable, str(tmp_path / "main.py"), str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    splits = load_splits(live)
    student, teacher = build_student(live, splits).train(), build_teacher(live, splits, lambda: None)
    augment, views = build_augment(live, splits), Views(2)
    distiller = Distiller(
        student,
        teacher.model,
        terms=build_terms(replace(live, method="at")),
        example_input=torch.zeros(2, *splits.shape),
        teacher_transform=teacher.transform,
    )
    total = count = 0.0
    for rank in range(2):
        for images, labels, rows in Batches(
            splits.train, 5, shuffle=True, views=views, rank=rank, world_size=2
        ):
            with torch.no_grad():
                term = distiller(augment.view(images, rows, views, 0), labels).terms["at/group1"]
            total, count = total + term.item() * len(labels), count + len(labels)
    assert numbers(Run(tmp_path / "run"))[0]["train/at/group1"] == pytest.approx(total / count, rel=1e-3)


# The right cache only


def test_what_is_left_open_is_taken_over(recipe: Recipe, folder: Path) -> None:
    run = train(replace(recipe, epochs=1), say=silent)
    kept = run.recipe
    assert (kept.views, kept.view_seed, kept.split_seed, kept.validation) == (2, 0, 0, 0.2)
    assert (kept.pad, kept.flip, kept.max_train, kept.image_size) == (2, True, None, None)
    assert (kept.teacher, kept.cache) == (None, str(folder))
    assert take_over(kept) == kept
    assert take_over(replace(kept, cache=None, teacher="x")).teacher == "x"


def test_the_cache_may_hold_more_views_than_are_used(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "cache"))
    shutil.rmtree(copied / "view-1")
    run = train(replace(recipe, cache=str(copied), views=1), say=silent)
    assert run.recipe.views == 1
    with pytest.raises(ValueError, match=r"cache: .* is unfinished: 3 of 6 files are missing\. Finish it: "):
        train(replace(recipe, cache=str(copied), output=str(tmp_path / "all")), say=silent)
    assert not (tmp_path / "all").exists()


def test_the_cache_knows_its_images(
    live: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither --data nor what else says which images these are has to be given again."""
    monkeypatch.chdir(tmp_path)
    flags = ["--accelerator", "cpu", "--precision", "32-true"]
    built = ["--data", str(live.data), "--teacher", str(live.teacher), "--image-size", "12", "-o", "cache"]
    assert main(["cache", "build", *built, *flags, "--views", "2", "--max-train", "20"]) == 0
    command = re.findall(r"^train from it: attention-transfer (.*) NAME$", capsys.readouterr().out, re.M)[0]
    learnt = [*command.split(), "wrn-10-1", "--epochs", "1", "--batch-size", "10", *flags]
    assert main([*learnt, "--progress", "lines"]) == 0
    data = Path(live.data or "")
    run = Run(tmp_path / f"runs/{data.name}-wrn-10-1-at-0")
    kept = run.recipe
    assert (kept.data, kept.image_size, kept.max_train, kept.views) == (str(data), 12, 20, 2)
    said = f"data {data}, validation 0.1, max_train 20, image_size 12, split_seed 0, pad 4"
    assert f"  as the cache has it: {said}" in capsys.readouterr().out
    for data_set in ("cifar10", "nowhere"):
        assert main([*learnt, "--data", data_set, "--overwrite"]) == 2
        assert f"was built with data={data}, got {data_set}. Leave --data out" in capsys.readouterr().err
    assert equal(run, train(replace(kept, output=str(tmp_path / "again")), say=silent))


def test_a_cache_that_does_not_say_its_images_asks_for_them(
    recipe: Recipe, folder: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "cache"))
    manifest = json.loads((copied / "cache.json").read_text())
    (copied / "cache.json").write_text(json.dumps({**manifest, "settings": {}}))
    with pytest.raises(ValueError, match=r"to say which images it was built from, got nothing.* --data\."):
        take_over(replace(recipe, cache=str(copied), data=None))
    assert take_over(replace(recipe, cache=str(copied))).data == recipe.data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split_seed": 1}, r"was built with split_seed=0, got 1\. Leave --split-seed out, or"),
        ({"validation": 0.1}, r"was built with validation=0\.2, got 0\.1\. Leave --validation out, or"),
        ({"max_train": 20}, r"was built with max_train=None, got 20\. Leave --max-train out, or"),
        ({"pad": 4}, r"was built with pad=2, got 4\. Leave --pad out, or"),
        ({"flip": False}, r"was built with flip=True, got False\. Leave --flip out, or"),
        ({"view_seed": 3}, r"was built with view_seed=0, got 3\. Leave --view-seed out, or"),
        ({"teacher": "wrn-40-2"}, r"holds maps of wrn-10-1, got --teacher wrn-40-2\. Leave --teacher out"),
        (
            {"teacher_precision": "bf16-mixed"},
            r"ran in 32-true, got --teacher-precision bf16-mixed\.",
        ),
        ({"views": 3}, r"cache: expected 3 views in .*, got 2\. Pass --views 2, or add some: "),
        ({"p": 4.0}, r"maps of p=2 and mapping=sum, got p=4 and mapping=sum\. Pass --p 2 --mapping sum, or"),
        ({"mapping": "max"}, r"maps of p=2 and mapping=sum, got p=2 and mapping=max\."),
        (
            {"pairs": "group0:conv0"},
            r"holds the teacher's layers group0, group1, group2, got conv0 in --pairs",
        ),
        ({"cache": "nowhere"}, r"cache: expected a cache folder with a cache\.json, got nowhere"),
    ],
)
def test_what_does_not_fit_is_refused(recipe: Recipe, changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        train(replace(recipe, **changes), say=silent)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_other_images_are_refused(recipe: Recipe, image_folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(image_folder, tmp_path / "images"))
    moved = replace(recipe, data=str(copied), epochs=1)
    train(moved, say=silent)
    (copied / "red" / "0.png").write_bytes((copied / "red" / "1.png").read_bytes())
    splits = load_splits(take_over(moved))
    assert len(splits.train) == 38
    with pytest.raises(
        ValueError, match=r"train: the cache .* was built from 38 other images .*Pass the --data it was built"
    ):
        train(replace(moved, output=str(tmp_path / "other")), say=silent)


def test_a_teacher_beside_the_cache_must_be_its_own(recipe: Recipe, live: Recipe, tmp_path: Path) -> None:
    train(replace(recipe, epochs=1, teacher=live.teacher), say=silent)
    save_weights(build_model("wrn-10-1", num_classes=3), tmp_path / "other.safetensors")
    other = replace(recipe, teacher="wrn-10-1", teacher_weights=str(tmp_path / "other.safetensors"))
    with pytest.raises(
        ValueError, match=r"holds maps of a wrn-10-1 with fingerprint \w{16}, got \w{16} in .*other\.safetens"
    ):
        train(replace(other, output=str(tmp_path / "other")), say=silent)


def test_answers_of_other_classes_are_refused(live: Recipe, tmp_path: Path) -> None:
    save_weights(build_model("wrn-10-1", num_classes=5), tmp_path / "w.safetensors")
    five = replace(
        live, teacher="wrn-10-1", teacher_weights=str(tmp_path / "w.safetensors"), teacher_classes=5
    )
    cache = build_cache(replace(five, method="at"), tmp_path / "cache", say=silent)
    cached = replace(live, cache=str(cache.folder), teacher=None, epochs=1, output=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"expected a teacher of 3 classes, as the data, got 5.*--method at"):
        train(cached, say=silent)
    assert train(replace(cached, method="at"), say=silent).finished


def test_terms_that_read_activations_are_refused(
    live: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Activations(Term):
        name = "activations"
        needs_features = True

    check_terms(build_terms(live))
    with pytest.raises(
        ValueError, match='train: the term "activations" reads activations, and a cache holds'
    ):
        check_terms([*build_terms(live), Activations()])
    splits, recipe = load_splits(live), take_over(replace(live, cache=str(folder)))
    monkeypatch.setattr("attention_transfer.training.cached.build_terms", lambda recipe: [Activations()])
    with pytest.raises(ValueError, match="a cache holds maps and logits only"):
        CachedTeacher.of(recipe, splits, build_student(live, splits))


def test_recipes_of_caches() -> None:
    with pytest.raises(ValueError, match='Recipe: method "none" learns from no teacher, got a cache'):
        Recipe(method="none", cache="c")
    cached = Recipe(teacher=None, cache="c", view_seed=1)
    assert (cached.alone().cache, cached.alone().teacher) == (None, None)


# The command


def test_train_from_the_command_line(
    recipe: Recipe, live: Recipe, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The run, its report with the teacher at hand, and again when both teacher and cache are gone."""
    flags = ["train", "--cache", folder, "--data", recipe.data, "--student", "wrn-10-1", "--epochs", "1"]
    flags += ["--batch-size", "10", "--accelerator", "cpu", "--precision", "32-true"]
    assert main([*map(str, flags), "--views", "1", "--print-config"]) == 0
    assert {f"cache: {folder}", "views: 1"} <= set(capsys.readouterr().out.splitlines())
    alone = replace(live, method="none", teacher=None, pad=2, epochs=1, output=str(tmp_path / "alone"))
    train(alone, say=silent)
    train(replace(alone, views=1, output=str(tmp_path / "other")), say=silent)
    assert main([*map(str, flags), "--output", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"^student alone .* \((\w+)\)", text, re.MULTILINE) == ["alone"]
    assert re.search(
        rf"^teacher: wrn-10-1 \(\w{{16}}\), from {folder}, stored as float16$", text, re.MULTILINE
    )
    assert "group2 <- group2" in text
    assert "data:image/" in (tmp_path / "run" / "report.html").read_text()
    kept = Path(live.teacher).rename(tmp_path / "kept")
    try:
        assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "report.html")]) == 0
    finally:
        kept.rename(live.teacher)
    assert "is not at hand, so no maps are shown" in capsys.readouterr().out
    with_teacher, without = (
        path.read_text() for path in (tmp_path / "run/report.html", tmp_path / "report.html")
    )
    assert without.count("data:image/") < with_teacher.count("data:image/")  # the student's own course stays


def test_an_unfinished_cache_is_one_line(
    recipe: Recipe, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "cache"))
    next((copied / "view-1").glob("*00.safetensors")).unlink()
    flags = ["train", "--cache", str(copied), "--data", recipe.data, "--student", "wrn-10-1"]
    assert main([*flags, "--output", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err == (
        f"attention-transfer: cache: {copied} is unfinished: 1 of 6 files are missing. "
        f"Finish it: attention-transfer cache build --resume {copied}\n"
    )


def test_a_flipped_bit_stops_the_training_where_it_would_be_learnt(
    recipe: Recipe, live: Recipe, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In the second view, after an epoch of the first; built anew, the run goes on as if nothing had been."""
    whole = train(replace(recipe, output=str(tmp_path / "whole")), say=silent)
    copied = Path(shutil.copytree(folder, tmp_path / "cache"))
    path = copied / Cache.read(copied).shards(1)[1].name
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    run = tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(replace(recipe, cache=str(copied), output=str(run)).to_yaml())
    assert main(["train", "--config", str(tmp_path / "recipe.yaml"), "--progress", "none"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"cache: .*view-1/0+\d+\.safetensors is damaged: its checksum does not fit", error)
    path.unlink()
    build_cache(live, copied, say=silent)
    assert equal(whole, resume(run, say=silent))


def test_a_damaged_cache_is_one_line(
    recipe: Recipe, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "cache"))
    path = copied / Cache.read(copied).shards(1)[0].name
    path.write_bytes(path.read_bytes()[:-10])
    flags = ["train", "--cache", str(copied), "--data", recipe.data, "--student", "wrn-10-1"]
    assert main([*flags, "--output", str(tmp_path / "run")]) == 2
    assert re.search(r"view-1/0+\.safetensors is damaged: it has [\d,]+ bytes, not", capsys.readouterr().err)
