"""Trainings that are killed, run out of disk, lose their images or their finite numbers."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest
import torch
from test_training import equal, interrupted, silent, weights
from torch import Tensor, nn

from attention_transfer._files import write_atomically
from attention_transfer.cli import main
from attention_transfer.data import Batches
from attention_transfer.distiller import Distiller
from attention_transfer.models import trusting
from attention_transfer.runs import Recipe, Run
from attention_transfer.training import resume, train
from attention_transfer.training.build import load_splits
from attention_transfer.training.callbacks import Checkpoints
from attention_transfer.training.card import ModelCard
from attention_transfer.training.finite import FirstBad
from attention_transfer.training.module import DistillationModule

pytestmark = [
    pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def base(tiny: Recipe) -> Recipe:
    """Saves after every step."""
    return replace(tiny, method="at", teacher="wrn-10-1", epochs=2, checkpoint_minutes=0.0)


@pytest.fixture(scope="module")
def whole(base: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nothing befell."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return train(replace(base, output=str(folder), teacher_epochs=1), say=silent)


def taught(whole: Run, folder: Path, **changes: object) -> Recipe:
    """The recipe of the same run elsewhere, from the same teacher."""
    return replace(whole.recipe, teacher=str(whole.teacher.folder), output=str(folder), **changes)


# --- SIGKILL ------------------------------------------------------------------------------------------------


def begin_or_go_on(recipe: Recipe) -> None:
    """What a user does, or a queue: start the run, or resume it if it was started."""
    torch.set_num_threads(1)
    if Run(recipe.folder).exists:
        resume(recipe.folder, say=silent)
    else:
        train(recipe, say=silent)


@pytest.fixture(scope="module")
def processes() -> Iterator[ForkServerContext]:
    """Processes that begin with everything imported: killing one costs no import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_survival", "attention_transfer.training.callbacks"])
    yield context


def lived(process: ForkServerProcess, seconds: float) -> bool:
    """Let a process run, then kill it; whether it had come to its end."""
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_weights_come_out_the_same(
    whole: Run, base: Recipe, kills: int, processes: ForkServerContext, tmp_path: Path
) -> None:
    """SIGKILL at random moments, the teacher's training among them; every step is a checkpoint."""
    draw = random.Random(kills)
    survived = finished = 0
    while survived < kills:
        recipe = replace(base, output=str(tmp_path / str(finished)), teacher_epochs=1)
        seconds = draw.uniform(0.1, 1.5)
        while not lived(processes.Process(target=begin_or_go_on, args=(recipe,)), seconds):
            survived += 1
            seconds = draw.uniform(0.1, 1.5) if survived < kills else 120
        assert equal(whole, Run(recipe.folder)), f"after {survived} kills"
        assert equal(whole.teacher, Run(recipe.folder).teacher)
        assert not list(recipe.folder.rglob("*.tmp"))
        finished += 1


def test_a_run_that_was_killed_before_its_first_step_starts_over(base: Recipe, tmp_path: Path) -> None:
    """The recipe is the first file; a half-written one is no file of the user's."""
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    (run.folder / ".attention-transfer-0123456789abcdef.tmp").write_text("student: wr")
    recipe = replace(base, method="none", teacher=None, epochs=1, max_train=20, output=str(run.folder))
    assert train(recipe, say=silent).finished
    assert not list(run.folder.glob(".*"))


def test_checkpoints_come_as_often_as_asked(
    base: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    original = Checkpoints._save

    def save(self: Checkpoints, trainer) -> None:  # type: ignore[no-untyped-def]
        saved.append(trainer.global_step)
        original(self, trainer)

    monkeypatch.setattr(Checkpoints, "_save", save)
    recipe = replace(base, method="none", teacher=None, epochs=1)
    train(replace(recipe, output=str(tmp_path / "often")), say=silent)
    train(replace(recipe, checkpoint_minutes=60.0, output=str(tmp_path / "seldom")), say=silent)
    assert saved == [1, 2, 3, 4, 4]


# --- damaged checkpoints ------------------------------------------------------------------------------------


def stopped(whole: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that a SIGINT stopped in the middle of its second epoch."""
    interrupted(taught(whole, folder), 6, monkeypatch)
    return Run(folder)


def flip_a_byte(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-1000], flip_a_byte])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    whole: Run, damage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    run = stopped(whole, tmp_path / "run", monkeypatch)
    run.last_checkpoint.write_bytes(damage(run.last_checkpoint.read_bytes()))
    said: list[str] = []
    assert equal(whole, resume(run.folder, say=said.append))
    assert any(
        line.startswith("warning: damaged: last.ckpt (")
        and line.endswith("Going on from last.before.ckpt, the one before")
        for line in said
    )


def test_a_missing_checkpoint_falls_back_too(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill between the two renames."""
    run = stopped(whole, tmp_path / "run", monkeypatch)
    run.last_checkpoint.unlink()
    assert equal(whole, resume(run.folder, say=silent))


def test_no_whole_checkpoint_is_an_error(whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stopped(whole, tmp_path / "run", monkeypatch)
    for path in run.checkpoints.glob("*.ckpt"):
        path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"resume: expected a whole checkpoint .*last\.ckpt \(.*--overwrite"):
        resume(run.folder, say=silent)


def test_a_momentum_of_other_parameters_is_an_error(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(whole, tmp_path / "run", monkeypatch)
    state = torch.load(run.last_checkpoint, weights_only=True)
    next(iter(state["optimizer_states"][0]["state"].values()))["momentum_buffer"] = torch.zeros(7)
    torch.save(state, run.last_checkpoint)
    with pytest.raises(ValueError, match=r"resume: expected a whole checkpoint.*a momentum of \(7,\) for \("):
        resume(run.folder, say=silent)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state["state_dict"].popitem(), r"no \S+ in state_dict"),
        (
            lambda state: state["state_dict"].update(dict.fromkeys(state["state_dict"], torch.zeros(3))),
            "for ",
        ),
        (
            lambda state: state["state_dict"].update(strange=torch.zeros(3)),
            "strange in state_dict, which the",
        ),
        (lambda state: state.update(optimizer_states=[]), "no list of 1 under optimizer_states"),
        (lambda state: state["optimizer_states"][0].update(state={99999: {}}), "parameter 99999"),
        (
            lambda state: state["loops"]["fit_loop"].pop("epoch_progress"),
            "no epoch_progress in loops/fit_loop",
        ),
        (lambda state: state.update(training_totals={"sums": {}}), "no count in training_totals"),
        (lambda state: state.update(callbacks=[]), "no names under callbacks"),
        (lambda state: state.update(lr_schedulers=3), "no list of 1 under lr_schedulers"),
        (lambda state: state.update(epoch="two"), "no number under epoch"),
    ],
)
def test_a_foreign_checkpoint_is_found_before_the_training(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable, reason: str
) -> None:
    run = stopped(whole, tmp_path / "run", monkeypatch)
    state = torch.load(run.last_checkpoint, weights_only=True)
    change(state)
    torch.save(state, run.last_checkpoint)
    with pytest.raises(ValueError, match=rf"resume: expected a whole checkpoint.*{reason}"):
        resume(run.folder, say=silent)


@pytest.mark.parametrize(
    "error", [KeyError("missing"), ValueError("train: expected this"), RuntimeError("a bug")]
)
@pytest.mark.parametrize("part", [(Distiller, "forward"), (DistillationModule, "load_state_dict")])
def test_a_bug_in_a_model_is_no_damaged_checkpoint(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: tuple[type, str], error: Exception
) -> None:
    """What it raises when the run goes on comes out as it is."""
    run = stopped(whole, tmp_path / "run", monkeypatch)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(*part, fail)
    with pytest.raises(type(error)) as caught:
        resume(run.folder, say=silent)
    assert caught.value is error


# --- disks, files and workers -------------------------------------------------------------------------------


@contextmanager
def full_from_the_sixth_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """From then on this process may not write files as large as a checkpoint."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = Checkpoints._save

    def save(self: Checkpoints, trainer) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        original(self, trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_save", save)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_midway_loses_nothing(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(taught(whole, run.folder).to_yaml())
    with full_from_the_sixth_step(monkeypatch):
        assert main(["train", "--config", str(recipe)]) == 2
    *_, how, what = capsys.readouterr().err.splitlines()
    assert how.startswith("Stopped by an error; what is saved is not lost.")
    assert how.endswith(f": attention-transfer train --resume {run.folder}")
    assert what == f"attention-transfer: File too large: {run.last_checkpoint}"
    assert torch.load(run.last_checkpoint, weights_only=True)["global_step"] == 5
    assert not list(run.checkpoints.glob(".*"))
    assert equal(whole, resume(run.folder, say=silent))


def test_whoever_reads_a_file_that_is_written_anew_has_the_old_one_whole(tmp_path: Path) -> None:
    """As whoever looks after a kill, at any moment of the writing: the new one takes its place at once."""
    path, kept = tmp_path / "file", tmp_path / "kept"
    write_atomically(path, "old" * 1000, keep=kept)
    assert not kept.exists()
    with path.open() as reader:
        write_atomically(path, "new")
        assert reader.read() == "old" * 1000
    write_atomically(path, b"newest", keep=kept)
    assert (path.read_text(), kept.read_text()) == ("newest", "new")
    assert sorted(tmp_path.iterdir()) == [path, kept]


def test_a_log_that_cannot_be_written_loses_nothing(whole: Run, tmp_path: Path) -> None:
    """The epoch's row has no place; the state within the epoch was saved, and its last step comes again."""
    run = Run(tmp_path / "run")
    recipe = taught(whole, run.folder)
    run.create(recipe)
    run.metrics_file.mkdir()
    with pytest.raises(OSError, match="expected a file, got a folder"):
        resume(run.folder, say=silent)
    run.metrics_file.rmdir()
    assert torch.load(run.last_checkpoint, weights_only=True)["global_step"] == 3
    assert equal(whole, resume(run.folder, say=silent))


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_transfer.data.loading.IN_MEMORY_BYTES", 0)


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_costs_no_step(
    base: Recipe, image_folder: Path, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = shutil.copytree(image_folder, tmp_path / "images")
    recipe = replace(
        base,
        method="none",
        teacher=None,
        data=str(images),
        image_size=16,
        num_workers=workers,
        checkpoint_minutes=60.0,
    )
    undisturbed = train(replace(recipe, output=str(tmp_path / "whole")), say=silent)
    run = Run(tmp_path / "run")
    original = Batches.rows

    def rows(self: Batches, epoch: int) -> list[Tensor]:
        """The files of the third batch are away while the first epoch is begun."""
        found = original(self, epoch)
        if self.shuffle and not run.checkpoints.exists():
            gone = self.images.encoded.paths[int(self.images.rows[found[2][0]])]
            gone.rename(tmp_path / gone.name)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "rows", rows)
        with pytest.raises(ValueError, match=r"load_data: cannot read .*\.png \(No such file or directory\)"):
            train(replace(recipe, output=str(run.folder)), say=silent)
    assert torch.load(run.last_checkpoint, weights_only=True)["global_step"] == 2
    for path in tmp_path.glob("*.png"):
        (name,) = {"blue", "green", "red"} - {
            folder.name for folder in images.iterdir() if (folder / path.name).exists()
        }
        path.rename(images / name / path.name)
    assert equal(undisturbed, resume(run.folder, say=silent))


class DyingWorkers(Batches):
    """Kills a worker at the third batch, as a system out of memory would."""

    def fetch(self, rows):  # type: ignore[no-untyped-def]
        for position, batch in enumerate(super().fetch(rows)):
            if position == 1 and self.shuffle:
                for child in multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGKILL)
                    child.join()
            yield batch


@pytest.mark.usefixtures("streamed")
def test_a_worker_that_dies_costs_no_step(
    base: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(
        base,
        method="none",
        teacher=None,
        image_size=16,
        num_workers=1,
        batch_size=2,
        checkpoint_minutes=60.0,
        epochs=1,
    )
    undisturbed = train(replace(recipe, output=str(tmp_path / "whole")), say=silent)
    with monkeypatch.context() as patch:
        patch.setattr("attention_transfer.training.fit.Batches", DyingWorkers)
        with pytest.raises(
            ChildProcessError, match=r"Batches: expected 1 process.* that died .*num_workers=0"
        ):
            train(replace(recipe, output=str(tmp_path / "run")), say=silent)
    run = Run(tmp_path / "run")
    assert torch.load(run.last_checkpoint, weights_only=True)["global_step"] >= 2
    assert equal(undisturbed, resume(run.folder, say=silent))


# --- numbers that are not finite ----------------------------------------------------------------------------


class Standardised(nn.Module):
    """Divides each channel by its own deviation: a uniform image gives 0 / 0."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean((2, 3), keepdim=True)
        return self.head(self.body(centred / x.std((2, 3), keepdim=True)).mean((2, 3)))


@pytest.fixture
def uniform_image(base: Recipe, image_folder: Path, tmp_path: Path) -> Recipe:
    """A run whose images have a uniform one among them, at position 33 of the training images."""
    from PIL import Image

    images = shutil.copytree(image_folder, tmp_path / "images")
    recipe = replace(
        base,
        student="test_survival:Standardised",
        method="none",
        teacher=None,
        data=str(images),
        pad=0,
        flip=False,
        output=str(tmp_path / "run"),
    )
    for path in sorted(images.rglob("*.png")):
        kept = path.read_bytes()
        Image.new("RGB", (16, 16), (0, 0, 0)).save(path)
        if (load_splits(recipe).train.images[33] == 0).all():
            return recipe
        path.write_bytes(kept)
    raise AssertionError("no image is at position 33")


def dumped(run: Run) -> list[dict[str, object]]:
    folders = sorted((run.folder / "not-finite").iterdir())
    assert all((folder / "images.png").stat().st_size > 0 for folder in folders)
    return [json.loads((folder / "batch.json").read_text()) for folder in folders]


def test_a_loss_that_is_not_finite_stops_and_the_batch_is_there_to_look_at(uniform_image: Recipe) -> None:
    with pytest.raises(FloatingPointError, match=r"got none in epoch 1, batch \d, which is in .*epoch-1"):
        train(uniform_image, say=silent)
    (batch,) = dumped(Run(uniform_image.folder))
    assert 33 in batch["images"]  # type: ignore[operator]
    assert len(batch["images"]) == len(batch["labels"]) == 10  # type: ignore[arg-type]
    assert batch["parameters_are_finite"] is True


def test_a_batch_that_is_not_finite_is_skipped_without_a_trace(uniform_image: Recipe) -> None:
    said: list[str] = []
    run = train(replace(uniform_image, not_finite="skip"), say=said.append)
    assert all(33 in batch["images"] for batch in dumped(run))  # type: ignore[operator]
    assert len(dumped(run)) == 2  # an epoch each
    assert sum("warning: skipped a batch" in line for line in said) == 2
    assert all(torch.isfinite(value).all() for value in weights(run).values())


def test_weights_that_are_broken_stop_a_run_that_skips(uniform_image: Recipe) -> None:
    recipe = replace(uniform_image, not_finite="skip", lr=1e30, batch_size=2)
    with pytest.raises(FloatingPointError, match="expected a finite loss"):
        train(recipe, say=silent)
    assert len(dumped(Run(recipe.folder))) == 11  # ten that were skipped, and the one that was not


class FinerInTraining(Standardised):
    """In evaluation mode it has no answer to the red images."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        red = x.mean((2, 3)).argmax(1) == 2
        return logits if self.training else logits.masked_fill(red[:, None], float("nan"))


@pytest.fixture
def speechless(base: Recipe, tmp_path: Path) -> Recipe:
    student = "test_survival:FinerInTraining"
    return replace(
        base, student=student, method="none", teacher=None, validation=0.5, output=str(tmp_path / "run")
    )


def test_validation_logits_that_are_not_finite_stop_the_run(speechless: Recipe) -> None:
    with pytest.raises(
        FloatingPointError, match=r"infinite ones for (\d+) of 24 validation images in epoch 1;"
    ) as stop:
        train(speechless, say=silent)
    assert 0 < int(str(stop.value).split(" of 24")[0].split()[-1]) < 24
    assert not Run(speechless.folder).best_checkpoint.exists()


def test_validation_images_without_finite_logits_are_skipped_on_request(speechless: Recipe) -> None:
    """And test images are wrong answers: the run has a result, which says so."""
    said: list[str] = []
    run = train(replace(speechless, not_finite="skip"), say=said.append)
    assert sum("of 24 validation images in epoch" in line for line in said) == 2
    assert said[-1].startswith("warning: 4 of 12 test images have logits that are not finite, which count as")
    with trusting(speechless.student):
        model, splits = ModelCard.read(run.folder).build(run.folder), load_splits(run.recipe)
    answers = model(splits.augment().normalise(splits.test.images)).argmax(1)
    right = int((answers == splits.test.labels)[splits.test.labels != 2].sum())
    assert run.result["test_unanswered"] == 4
    assert run.result["test_error"] == pytest.approx(100 - 100 * right / 12)
    rows = run.read_metrics()
    assert all(0 < float(row["val/loss"]) < 10 and 0 <= float(row["val/error"]) <= 100 for row in rows)


class SpeechlessAtFirst(Standardised):
    """In evaluation mode it has no answer until it is mended."""

    mended = False

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits if self.training or self.mended else logits * float("nan")


def test_a_run_that_stops_at_its_test_images_goes_on_once_it_is_mended(
    speechless: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is trained is not lost: the student is there, and is then measured."""
    recipe = replace(speechless, student="test_survival:SpeechlessAtFirst", validation=0.0)
    with pytest.raises(
        ValueError, match=r"evaluate_model: expected finite logits from .* for 12 of 12 images"
    ):
        train(recipe, say=silent)
    run = Run(recipe.folder)
    kept = run.student_weights.read_bytes()
    monkeypatch.setattr(importlib.import_module("test_survival").SpeechlessAtFirst, "mended", True)
    with trusting(recipe.student):
        assert resume(run.folder, say=silent).result["test_unanswered"] == 0
    assert run.student_weights.read_bytes() == kept


def test_the_first_bad_step_is_kept() -> None:
    first = FirstBad()
    assert first.step() is None
    for step, loss in enumerate([1.0, float("inf"), float("nan"), 2.0]):
        first.note(torch.tensor(loss), step)
    assert first.step() == 1
    first.clear()
    assert first.step() is None
