"""Real tiny trainings: what a run leaves behind, that it repeats, and that interruptions change nothing."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from attention_transfer.runs import Interrupted, Recipe, Run
from attention_transfer.runs.recipe import field_types, parse_pairs
from attention_transfer.training import evaluate_model, resume, train
from attention_transfer.training.callbacks import StopOnSignal
from attention_transfer.training.card import ModelCard
from attention_transfer.training.module import Totals, build_schedule, seed_generators, step_seed
from attention_transfer.visualize.snapshots import Snapshots

# A teacher of one epoch knows less than chance, and the preflight rightly says so.
pytestmark = [
    pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning"),
    pytest.mark.usefixtures("one_thread"),
]

TIMES = ("images_per_second", "seconds", "data_share")


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="session")
def base(tiny: Recipe) -> Recipe:
    return replace(tiny, method="at", teacher="wrn-10-1", epochs=2)


@pytest.fixture(scope="module")
def finished(base: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An attention transfer run whose teacher was trained first."""
    folder = tmp_path_factory.mktemp("runs") / "at"
    return train(replace(base, output=str(folder), teacher_epochs=1), say=silent)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.student_weights)


def equal(one: Run, other: Run) -> bool:
    """Bit-identical weights and equal numbers in every epoch, but for the times."""
    rows = [
        [{k: v for k, v in row.items() if k not in TIMES} for row in run.read_metrics()]
        for run in (one, other)
    ]
    ours, theirs = weights(one), weights(other)
    return rows[0] == rows[1] and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_run_folder(finished: Run) -> None:
    for name in (
        "recipe.yaml",
        "metrics.csv",
        "result.json",
        "student.safetensors",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "teacher/recipe.yaml",
        "teacher/result.json",
        "teacher/student.safetensors",
    ):
        assert (finished.folder / name).is_file(), name
    assert list((finished.folder / "tensorboard").glob("events*"))


def test_metrics(finished: Run) -> None:
    with finished.metrics_file.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert list(rows[0]) == [
        *("epoch", "step", "lr", "train/loss", "train/ce"),
        *("train/at/group0", "train/at/group1", "train/at/group2"),
        *("train/error", "val/loss", "val/error", "weight/at", *TIMES),
    ]
    for row in rows:
        terms = [float(v) for k, v in row.items() if k in ("train/ce",) or k.startswith("train/at/")]
        assert sum(terms) == pytest.approx(float(row["train/loss"]), rel=1e-5)


def test_result(finished: Run) -> None:
    result = json.loads(finished.result_file.read_text())
    assert set(result) == {
        *("test_error", "test_top5_error", "validation_error", "best_epoch", "parameters", "seed"),
        *("images_per_second", "data_share", "wall_seconds", "method", "teacher_fingerprint", "plan"),
        *("weights", "machine", "test_unanswered"),
    }
    assert result["test_unanswered"] == 0
    assert [row["student"] for row in result["plan"]] == ["group0", "group1", "group2"]
    assert result["method"] == "at"
    assert result["teacher_fingerprint"]


def test_checkpoint_holds_the_student_and_the_teachers_fingerprint_only(finished: Run) -> None:
    checkpoint = torch.load(finished.last_checkpoint, weights_only=True)
    assert checkpoint["state_dict"].keys() == weights(finished).keys()
    assert checkpoint["teacher_fingerprint"] == finished.result["teacher_fingerprint"]


def test_recipe_yaml_repeats_the_run(finished: Run, tmp_path: Path) -> None:
    again = replace(Recipe.load(finished.recipe_file), output=str(tmp_path / "again"))
    assert equal(finished, train(again, say=silent))


def test_teacher_from_a_run_folder_is_the_teacher_trained_first(finished: Run, tmp_path: Path) -> None:
    recipe = replace(finished.recipe, teacher=str(finished.teacher.folder), output=str(tmp_path / "run"))
    run = train(recipe, say=silent)
    assert equal(finished, run)
    assert not run.teacher.exists


def test_student_starts_alike_whatever_the_method(base: Recipe) -> None:
    from attention_transfer.training.build import build_student, load_splits

    splits = load_splits(base)
    alone, taught = (build_student(replace(base, method=m), splits).state_dict() for m in ("none", "at"))
    assert all(torch.equal(alone[name], taught[name]) for name in alone)


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a real SIGINT at the end of a step."""
    original = StopOnSignal.on_train_batch_end

    def hook(self: StopOnSignal, trainer, *rest) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step == step:
            signal.raise_signal(signal.SIGINT)
        original(self, trainer, *rest)

    monkeypatch.setattr(StopOnSignal, "on_train_batch_end", hook)


def interrupted(recipe: Recipe, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that a SIGINT stops at the end of a step."""
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        with pytest.raises(Interrupted) as stop:
            train(recipe, say=silent)
    assert stop.value.exit_status == 130


@pytest.mark.parametrize("step", [1, 4, 6, 8])  # mid-epoch, an epoch's end, mid-epoch, the very end
def test_resumed_run_equals_the_uninterrupted(
    finished: Run, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(finished.recipe, teacher=str(finished.teacher.folder), output=str(tmp_path / "run"))
    interrupted(recipe, step, monkeypatch)
    run = Run(tmp_path / "run")
    assert run.last_checkpoint.is_file()
    assert not run.finished
    assert equal(finished, resume(run.folder, say=silent))


def test_interrupted_run_resumes_after_it_was_moved(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(finished.recipe, teacher=str(finished.teacher.folder), output=str(tmp_path / "run"))
    interrupted(recipe, 5, monkeypatch)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert equal(finished, resume(moved, say=silent))


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("ending", ["interrupted", "failed"])
def test_ctrl_c_after_a_run_that_did_not_finish_is_an_ordinary_one(
    base: Recipe, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(base, method="none", teacher=None, output=str(tmp_path / "run"))
    if ending == "interrupted":
        interrupted(recipe, 2, monkeypatch)
    else:
        with pytest.raises(FloatingPointError):
            train(replace(recipe, lr=1e30), say=silent)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_interrupt_while_the_teacher_is_trained_resumes_there(
    finished: Run, base: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(replace(base, output=str(tmp_path / "run"), teacher_epochs=1), 2, monkeypatch)
    assert not Run(tmp_path / "run").last_checkpoint.exists()
    assert equal(finished, resume(tmp_path / "run", say=silent))


def test_other_teacher_on_resume_is_refused(
    finished: Run, base: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = train(
        replace(base, method="none", teacher=None, epochs=1, seed=1, output=str(tmp_path / "other")),
        say=silent,
    )
    recipe = replace(finished.recipe, teacher=str(finished.teacher.folder), output=str(tmp_path / "run"))
    interrupted(recipe, 2, monkeypatch)
    run = Run(tmp_path / "run")
    run.recipe_file.write_text(replace(recipe, teacher=str(other.folder)).to_yaml())
    with pytest.raises(ValueError, match=r"train: expected the teacher that had fingerprint \w+, got \w+\."):
        resume(run.folder, say=silent)


def test_fixed_views_are_shown_in_turn_to_students_of_any_seed(
    base: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attention_transfer.data import Views
    from attention_transfer.training.build import build_augment, load_splits
    from attention_transfer.training.module import DistillationModule

    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    original = DistillationModule._augmented

    def recorded(
        self: DistillationModule, images: torch.Tensor, index: int, rows: torch.Tensor
    ) -> torch.Tensor:
        seen.append((self.current_epoch, rows, original(self, images, index, rows)))
        return seen[-1][2]

    monkeypatch.setattr(DistillationModule, "_augmented", recorded)
    recipe = replace(base, method="none", teacher=None, epochs=3, views=2, view_seed=5, split_seed=1)
    for seed in (0, 1):
        train(replace(recipe, seed=seed, output=str(tmp_path / str(seed))), say=silent)
    splits = load_splits(recipe)
    augment, images = build_augment(recipe, splits), splits.train.images
    for epoch, rows, inputs in seen:
        assert torch.equal(inputs, augment.view(images[rows], rows, Views(2, 5), epoch % 2))
    orders = torch.cat([rows for _, rows, _ in seen]).view(2, 3, len(images))
    assert torch.equal(orders.sort(2).values, torch.arange(len(images)).expand(2, 3, -1))
    assert not torch.equal(orders[0], orders[1])


@pytest.mark.parametrize("step", [2, 6])
def test_resumed_run_of_fixed_views_equals_the_uninterrupted(
    base: Recipe, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(base, method="none", teacher=None, views=2, output=str(tmp_path / "whole"))
    whole = train(recipe, say=silent)
    interrupted(replace(recipe, output=str(tmp_path / "run")), step, monkeypatch)
    assert equal(whole, resume(tmp_path / "run", say=silent))


def test_the_split_follows_its_own_seed(base: Recipe) -> None:
    from attention_transfer.training.build import load_splits

    def rows(**seeds: int) -> torch.Tensor:
        return load_splits(replace(base, max_train=30, **seeds)).train.images

    assert torch.equal(rows(seed=3), rows(seed=0, split_seed=3))
    assert torch.equal(rows(seed=0, split_seed=3), rows(seed=1, split_seed=3))
    assert not torch.equal(rows(seed=3), rows(seed=3, split_seed=0))
    taught = replace(base, seed=3)
    assert taught.alone() == replace(taught, split_seed=3).alone()


def test_a_teacher_trained_first_sees_fresh_views(base: Recipe) -> None:
    teacher = replace(base, views=2, view_seed=1, seed=3).for_teacher()
    assert (teacher.views, teacher.view_seed, teacher.split_seed) == (None, None, 3)


def test_damaged_result_says_how_to_write_it_anew(finished: Run, tmp_path: Path) -> None:
    copied = Run(Path(shutil.copytree(finished.folder, tmp_path / "run")))
    copied.result_file.write_text("{")
    with pytest.raises(ValueError, match=r"Run: expected .* in .*result\.json, got .*: the file is damaged"):
        _ = copied.result


def test_finished_run_is_not_trained_again(finished: Run) -> None:
    before = finished.last_checkpoint.stat().st_mtime_ns
    assert resume(finished.folder, say=silent).folder == finished.folder
    assert finished.last_checkpoint.stat().st_mtime_ns == before


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(base: Recipe, tmp_path: Path) -> None:
    recipe = replace(base, method="none", teacher=None, lr=1e30, epochs=3, output=str(tmp_path / "run"))
    with pytest.raises(
        FloatingPointError,
        match=r"train: expected a finite loss, got none in epoch 1, batch \d, .*Lower",
    ):
        train(recipe, say=silent)
    assert not Run(tmp_path / "run").finished


@pytest.mark.parametrize("method", ["kd", "at+kd"])
def test_distillation_terms(base: Recipe, finished: Run, method: str, tmp_path: Path) -> None:
    recipe = replace(
        base, method=method, teacher=str(finished.teacher.folder), epochs=1, output=str(tmp_path / "run")
    )
    row = train(recipe, say=silent).read_metrics()[0]
    assert ("train/kd" in row, "train/at/group2" in row) == (True, method == "at+kd")


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_do_not_fit_in_memory_are_streamed(
    base: Recipe, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attention_transfer.data.loading.IN_MEMORY_BYTES", 0)
    said: list[str] = []
    recipe = replace(base, epochs=1, image_size=16, num_workers=workers, output=str(tmp_path / "run"))
    assert train(recipe, say=said.append).result["method"] == "at"
    assert any("streamed" in line for line in said)
    card = ModelCard.read(recipe.folder)
    assert card is not None and card.crop == 0.875
    kept = Snapshots.read(recipe.folder / "maps.safetensors")
    assert kept.epochs == [0, 1] and kept.images.float().std() > 1 and len(kept.teacher) == len(kept.maps)


def test_teacher_of_other_classes(base: Recipe, tmp_path: Path) -> None:
    from attention_transfer.models import build_model, save_weights

    save_weights(build_model("wrn-10-1", num_classes=5), tmp_path / "teacher.safetensors")
    recipe = replace(
        base, teacher_weights=str(tmp_path / "teacher.safetensors"), teacher_classes=5, epochs=1, max_train=20
    )
    assert train(replace(recipe, output=str(tmp_path / "at")), say=silent).finished
    with pytest.raises(ValueError, match=r"expected a teacher of 3 classes, as the data, got 5.*--method at"):
        train(replace(recipe, method="kd", output=str(tmp_path / "kd")), say=silent)


def test_teacher_of_other_channels(base: Recipe, finished: Run) -> None:
    from attention_transfer.training.build import build_teacher, load_splits

    splits = load_splits(base)
    grey = replace(splits, train=replace(splits.train, images=splits.train.images[:, :1]))
    with pytest.raises(
        ValueError, match="expected a teacher of images with 1 channels, as the data, got one of 3"
    ):
        build_teacher(replace(base, teacher=str(finished.folder)), grey, lambda: finished)


def test_teacher_with_its_own_normalisation(base: Recipe, finished: Run, tmp_path: Path) -> None:
    from attention_transfer.training.build import build_teacher, load_splits

    splits = load_splits(base)
    other = replace(splits, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))
    recipe = replace(base, teacher=str(finished.teacher.folder))
    assert build_teacher(recipe, splits, lambda: finished).transform is None
    transform = build_teacher(recipe, other, lambda: finished).transform
    images = splits.train.images[:4]
    assert torch.allclose(
        transform(other.augment().normalise(images)), splits.augment().normalise(images), atol=1e-5
    )


def test_best_weights_are_kept_on_request(base: Recipe, tmp_path: Path) -> None:
    run = train(
        replace(base, method="none", teacher=None, keep="best", output=str(tmp_path / "run")), say=silent
    )
    best = torch.load(run.best_checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(best[name], tensor) for name, tensor in weights(run).items())
    errors = [float(row["val/error"]) for row in run.read_metrics()]
    assert run.result["best_epoch"] == 1 + errors.index(min(errors))


def test_no_validation(base: Recipe, tmp_path: Path) -> None:
    run = train(
        replace(base, method="none", teacher=None, validation=0.0, epochs=1, output=str(tmp_path / "run")),
        say=silent,
    )
    assert run.result["validation_error"] is None
    assert "val/error" not in run.read_metrics()[0]


def test_last_batch_of_one_is_left_out(base: Recipe, tmp_path: Path) -> None:
    lines: list[str] = []
    recipe = replace(
        base,
        method="none",
        teacher=None,
        validation=0.0,
        max_train=21,
        epochs=1,
        output=str(tmp_path / "run"),
    )
    run = train(recipe, say=lines.append)
    assert run.read_metrics()[0]["step"] == "2"
    assert any("would leave a process less than two images" in line for line in lines)


def test_existing_run_folder(finished: Run, base: Recipe, tmp_path: Path) -> None:
    recipe = replace(base, output=str(finished.folder))
    with pytest.raises(
        FileExistsError, match=r"exists\. Go on with it: --resume .*; or start it over: --overwrite"
    ):
        train(recipe, say=silent)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no run folder"):
        train(replace(base, output=str(tmp_path)), overwrite=True, say=silent)
    assert (tmp_path / "notes.txt").exists()


def test_overwrite_and_a_folder_without_work(base: Recipe, tmp_path: Path) -> None:
    recipe = replace(base, method="none", teacher=None, epochs=1, max_train=20, output=str(tmp_path / "run"))
    Run(tmp_path / "run").create(recipe)
    train(recipe, say=silent)
    assert train(recipe, overwrite=True, say=silent).finished


def test_disk_that_is_too_small_ends_in_one_line(base: Recipe, tmp_path: Path) -> None:
    """A process that may not write files as large as a checkpoint."""
    recipe = replace(base, method="none", teacher=None, epochs=1, output=str(tmp_path / "run"))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "from attention_transfer.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--config", str(tmp_path / "recipe.yaml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr


def test_pretrained_teachers_get_the_images_that_their_weights_expect() -> None:
    """timm's Mixer wants 224 x 224 pixels of (x - 0.5) / 0.5; torchvision's models want ImageNet's."""
    from attention_transfer.data import Images, Splits
    from attention_transfer.models import build_model
    from attention_transfer.training.build import _pretrained_transform

    pixels, labels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    images = Images(pixels, labels)
    splits = Splits(images, None, images, ["a", "b"], "own", (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), True, 0)
    seen_by_student = splits.augment().normalise(pixels)
    expected = {
        "timm:resnet18": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "timm:mixer_s32_224": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        "torchvision:resnet18": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    }
    for name, (mean, std) in expected.items():
        transform = _pretrained_transform(build_model(name, num_classes=2), splits)
        want = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        got = transform(seen_by_student)
        size = transform.size or (8, 8)
        want = torch.nn.functional.interpolate(want, size, mode="bilinear", antialias=True)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_weights_carry_their_card(finished: Run, tmp_path: Path) -> None:
    moved = tmp_path / "student.safetensors"
    moved.write_bytes(finished.student_weights.read_bytes())
    card = ModelCard.read(moved)
    assert card is not None
    assert (card.model, card.classes) == ("wrn-10-1", ["blue", "green", "red"])
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    with torch.no_grad():
        assert card.build(moved)(card.augment().normalise(images)).shape == (2, 3)


def test_evaluation_of_labels_beyond_the_classes(finished: Run) -> None:
    model = ModelCard.read(finished.folder).build(finished.folder)
    batch = (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.tensor([0, 7]))
    with pytest.raises(ValueError, match=r"evaluate_model: expected labels below 3.*got 7"):
        evaluate_model(model, [batch], lambda x: x.float())
    with pytest.raises(ValueError, match="evaluate_model: expected at least one image"):
        evaluate_model(model, [], lambda x: x.float())


def test_evaluation_counts_images_without_finite_logits() -> None:
    answers = torch.eye(8)[:6]
    answers[2, 5], answers[4] = float("inf"), float("nan")
    batches = [(answers[:4], torch.arange(4)), (answers[4:], torch.tensor([4, 5]))]
    with pytest.raises(
        ValueError, match=r"from the student, got .* for 2 of 6 images, .* is number 3\. Look"
    ):
        evaluate_model(torch.nn.Identity(), batches, lambda x: x.view(-1, 8), name="the student")


@pytest.mark.parametrize(("classes", "error"), [(2, None), (5, None), (6, 25.0)])
def test_top5_error_needs_more_than_five_classes(classes: int, error: float | None) -> None:
    """Of six classes one alone is not among the five largest logits."""
    logits = torch.arange(float(classes)).repeat(4, 1)
    found = evaluate_model(torch.nn.Identity(), [(logits, torch.tensor([0, 1, 1, 1]))], lambda x: x)
    assert found.top5_error == error
    assert found.error == (25.0 if classes == 2 else 100.0)


def test_weights_with_a_foreign_card(finished: Run, tmp_path: Path) -> None:
    from attention_transfer.models import save_weights

    model = ModelCard.read(finished.folder).build(finished.folder)
    save_weights(model, tmp_path / "w.safetensors", {"attention_transfer": '{"model": "wrn-10-1"}'})
    with pytest.raises(ValueError, match=r"ModelCard\.read: expected the metadata that this package writes"):
        ModelCard.read(tmp_path / "w.safetensors")


# The recipe


def test_recipe_round_trip(tmp_path: Path) -> None:
    recipe = Recipe(method="at+kd", milestones=(0.5,), max_train=7, teacher="wrn-40-2", pairs="a:b:0.5,c")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


def test_every_field_has_a_default_a_type_and_survives_yaml() -> None:
    import yaml

    recipe = Recipe.from_mapping(yaml.safe_load(Recipe().to_yaml()))
    assert recipe == Recipe()
    assert field_types().keys() == {field.name for field in fields(Recipe)}


def test_yaml_that_writes_numbers_as_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("weight_decay: 5e-4\nlr: 1\n")
    assert Recipe.load(tmp_path / "recipe.yaml").weight_decay == 5e-4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0}, "Recipe: expected lr > 0, got 0. Change --lr."),
        ({"lr": "fast"}, "Recipe: expected lr to be a number, got 'fast'. Change --lr."),
        ({"epochs": 1.5}, "Recipe: expected epochs to be a whole number, got 1.5. Change --epochs."),
        ({"flip": "maybe"}, "Recipe: expected flip to be true or false or null, got 'maybe'. Change --flip."),
        (
            {"batch_size": 1},
            "Recipe: expected batch_size >= 2 (batch normalisation learns nothing from one image)",
        ),
        (
            {"method": "ta"},
            'Recipe: expected method "none" or some of at, kd, f-actt, gradient, symmetry, min-l2, got',
        ),
        ({"method": "at+at"}, "Recipe: expected each name once, got at twice in method 'at+at'."),
        ({"method": "kd", "teacher": None}, 'Recipe: method "kd" needs a teacher, got none.'),
        (
            {"method": "at+symmetry", "compile": True},
            "Recipe: a term over input gradients (symmetry) differentiates the student twice,",
        ),
        (
            {"reset_momentum": True, "schedule": "one-cycle"},
            'Recipe: reset_momentum needs the schedule "steps", whose rate drops, got "one-cycle".',
        ),
        ({"beta": "often"}, "Recipe: expected beta to be a number or \"auto\", got 'often'. Change --beta."),
        ({"term_schedule": "at:linaer"}, "Recipe: expected schedule of at as one of ['constant', 'linear',"),
        ({"milestones": [0.6, 0.3]}, "Recipe: expected milestones as rising shares between 0 and 1"),
        ({"validation": 1.0}, "Recipe: expected validation from 0 to below 1, got 1.0."),
        ({"views": 0}, "Recipe: expected views >= 1, got 0. Change --views."),
        ({"split_seed": -1}, "Recipe: expected split_seed from 0 to 2^32 - 1, got -1."),
        ({"view_seed": 1}, "Recipe: view_seed=1 is of fixed views, got none. Pass --views, such as 4."),
        (
            {"precision": "64-true", "teacher_precision": "bf16-mixed"},
            'Recipe: precision "64-true" puts the teacher in float64 too, got teacher_precision "bf16-',
        ),
        ({"studnet": "x"}, "Recipe: unknown field 'studnet'. Did you mean student"),
        (
            {"teacher": None},
            'Recipe: method "at" needs a teacher, got none. Pass --teacher, or --method none.',
        ),
        (
            {"pairs": "a:b:c"},
            'Recipe: expected pairs "auto" or STUDENT_LAYER:TEACHER_LAYER[:WEIGHT],..., got',
        ),
    ],
)
@pytest.mark.unchecked
def test_bad_recipe(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Recipe.from_mapping(values)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1", "expected `field: value` lines"), ("a: [", "is not readable as YAML"), ("", "got None")],
)
def test_bad_recipe_file(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Recipe.load(tmp_path / "recipe.yaml")


def test_recipe_is_never_unpickled_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("student: !!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match="is not readable as YAML"):
        Recipe.load(tmp_path / "recipe.yaml")


def test_parse_pairs() -> None:
    assert parse_pairs("auto") is None
    assert parse_pairs("a:b, c:d:0.5,e") == [("a", "b", 1.0), ("c", "d", 0.5), ("e", "e", 1.0)]


# Parts


@pytest.mark.parametrize(("schedule", "peak"), [("steps", 0), ("one-cycle", 6)])
def test_schedule(schedule: str, peak: int) -> None:
    recipe = Recipe(epochs=10, schedule=schedule, lr=0.5, milestones=(0.3, 0.6))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = build_schedule(optimizer, recipe, steps_per_epoch=2)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert abs(rates.index(max(rates)) - peak) <= 1
    if schedule == "steps":
        assert rates == pytest.approx([0.5] * 6 + [0.1] * 6 + [0.02] * 8)


def test_totals_weigh_batches_by_their_size() -> None:
    totals = Totals()
    totals.add({"loss": torch.tensor(1.0)}, 30)
    totals.add({"loss": torch.tensor(4.0)}, 10)
    assert totals.means() == {"loss": pytest.approx(1.75)}


def test_seeding_without_the_devices_that_are_not_used_draws_the_same_numbers() -> None:
    torch.manual_seed(7)
    expected = torch.rand(5)
    torch.rand(3)
    seed_generators(7, torch.device("cpu"))
    assert torch.equal(torch.rand(5), expected)


def test_step_seeds_differ() -> None:
    seeds = {
        step_seed(seed, epoch, batch, 0) for seed in range(4) for epoch in range(4) for batch in range(4)
    }
    assert len(seeds) == 64
