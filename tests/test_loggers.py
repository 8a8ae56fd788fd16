"""The loggers that a run may have, for real: TensorBoard, Weights & Biases offline, MLflow in a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from attention_transfer.runs import Recipe, Run
from attention_transfer.training import resume, train
from attention_transfer.training.loggers import build_loggers

pytestmark = pytest.mark.usefixtures("one_thread")


def silent(line: str) -> None:
    pass


@pytest.fixture
def recipe(tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    return replace(tiny, validation=None, pad=None, epochs=2, output=str(tmp_path / "run"))


def unfinished(run: Run) -> None:
    """As a kill after the last epoch, before the result, leaves it."""
    run.result_file.unlink()


def test_no_logger_leaves_metrics_alone(recipe: Recipe) -> None:
    run = train(replace(recipe, loggers="none"), say=silent)
    assert len(run.read_metrics()) == 2
    assert not run.tensorboard.exists()


def test_tensorboard_shows_where_the_student_looks(recipe: Recipe) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(recipe, say=silent)
    events = EventAccumulator(str(run.tensorboard), size_guidance={"images": 0})
    events.Reload()
    shown = events.Images("maps/group2")
    assert [event.step for event in shown] == [0, 5, 10]
    assert {event.width * event.height for event in shown} == {4 * 16 * 16}  # four images in one
    assert len({event.encoded_image_string for event in shown}) == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_gets_every_epoch_in_one_run(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = train(replace(recipe, loggers="wandb"), say=silent)
    wandb.finish()
    identity = json.loads((run.folder / "loggers.json").read_text())["wandb"]
    unfinished(run)
    resume(run.folder, say=silent)
    wandb.finish()
    offline = list((run.folder / "wandb").glob("offline-run-*"))
    assert {folder.name.rpartition("-")[2] for folder in offline} == {identity}
    written = b"".join(path.read_bytes() for folder in offline for path in folder.glob("*.wandb"))
    assert b"train/loss" in written
    assert list((run.folder / "wandb").rglob("maps/*.png"))


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    pytest.importorskip("sqlalchemy")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///own.db")
    yield mlflow


@pytest.mark.parametrize("name", ["mlflow.db", "mlflow.db-journal", "mlruns", "mlruns/1", "mlruns/1/images"])
def test_mlflow_writes_through_no_link(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    """Its own files are made in the current folder; a place that the user names may be a link."""
    pytest.importorskip("mlflow")
    target = tmp_path / "elsewhere"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).symlink_to(target)
    with pytest.raises(OSError, match=f"got a link at {name}, which may lead anywhere. Remove it, or name"):
        build_loggers(Run(tmp_path / "run"), replace(recipe, loggers="mlflow"))
    assert not target.exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_gets_every_epoch_in_one_run(recipe: Recipe, mlflow) -> None:  # type: ignore[no-untyped-def]
    run = train(replace(recipe, loggers="tensorboard+mlflow"), say=silent)
    unfinished(run)
    resume(run.folder, say=silent)
    client = mlflow.tracking.MlflowClient("sqlite:///own.db")
    (experiment,) = [found for found in client.search_experiments() if found.name == "attention-transfer"]
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.data.params["student"] == "wrn-10-1"
    assert [each.value for each in client.get_metric_history(logged.info.run_id, "epoch")] == [1.0, 2.0]
    assert run.tensorboard.is_dir()
    assert [item.path for item in client.list_artifacts(logged.info.run_id)] == ["images"]


def test_a_logger_that_is_not_installed_names_its_extra(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ImportError, match=r"train: .*attention-transfer\[loggers\]"):
        train(replace(recipe, loggers="wandb"), say=silent)


def test_an_unknown_logger_lists_near_matches(recipe: Recipe) -> None:
    with pytest.raises(
        ValueError, match=r'expected loggers "none" or some of tensorboard, .*Did you mean tensorboard'
    ):
        replace(recipe, loggers="tensorbord")
