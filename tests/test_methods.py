"""Real tiny trainings with every method: each lowers its own term, is logged, and goes on after a stop."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from attention_transfer.cli import main
from attention_transfer.distiller import Distiller
from attention_transfer.models import build_model
from attention_transfer.runs import Recipe, Run
from attention_transfer.training import resume, train
from attention_transfer.training.build import (
    build_augment,
    build_student,
    build_terms,
    draw_batchnorm_scales,
    load_splits,
)
from attention_transfer.training.caching import build_cache
from attention_transfer.training.card import ModelCard
from attention_transfer.training.module import DistillationModule, rate_drops

# A teacher of a few steps knows little, and the preflight rightly says so.
pytestmark = [
    pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning"),
    pytest.mark.usefixtures("one_thread"),
]

WEIGHTS = {
    "at": {"beta": 5.0},
    "kd": {"alpha": 0.9},
    "f-actt": {"beta_f_actt": 5.0},
    "gradient": {"beta_gradient": 5.0},
    "symmetry": {"beta_symmetry": 5.0},
    "min-l2": {"beta_min_l2": 5.0},
}


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def teacher(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The recipe of a teacher that has been trained."""
    recipe = Recipe(
        student="wrn-10-2",
        teacher=None,
        method="none",
        data=str(image_folder),
        validation=0.0,
        epochs=3,
        batch_size=12,
        pad=0,
        accelerator="cpu",
        precision="32-true",
        output=str(tmp_path_factory.mktemp("runs") / "teacher"),
    )
    train(recipe, say=silent)
    return recipe


@pytest.fixture(scope="module")
def recipe(teacher: Recipe) -> Recipe:
    """A student's recipe, without a method."""
    return replace(teacher, student="wrn-10-1", teacher=teacher.output, epochs=3, lr=0.05)


@pytest.fixture(scope="module")
def alone(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(
        replace(recipe, teacher=None, output=str(tmp_path_factory.mktemp("alone") / "run")), say=silent
    )


def measured(run: Run, recipe: Recipe) -> float:
    """The recipe's term on all test images, by what the run has learnt; BatchNorm as in training."""
    splits = load_splits(recipe)
    student = ModelCard.read(run.folder).build(run.folder)
    teacher = ModelCard.read(Path(recipe.teacher)).build(Path(recipe.teacher))
    images = build_augment(recipe, splits).normalise(splits.test.images)
    distiller = Distiller(student.train(), teacher, terms=build_terms(recipe), example_input=images)
    if recipe.method == "f-actt":  # what it regresses with is part of the checkpoint
        state = torch.load(run.last_checkpoint, weights_only=True)["terms"] if run.recipe.method_terms else {}
        distiller.terms.load_state_dict(state or distiller.terms.state_dict())
    addends = distiller(images, splits.test.labels.long()).terms
    return sum(value.item() for name, value in addends.items() if name.startswith(recipe.method))


@pytest.mark.parametrize("method", WEIGHTS)
def test_every_method_lowers_its_own_term(method: str, recipe: Recipe, alone: Run, tmp_path: Path) -> None:
    own = replace(recipe, method=method, output=str(tmp_path / "run"), **WEIGHTS[method])
    run = train(own if own.needs_teacher else replace(own, teacher=None), say=silent)
    assert measured(run, own) < 0.9 * measured(alone, own)
    assert set(run.result["weights"]) == {method}
    rows = run.read_metrics()
    assert any(name.startswith(f"train/{method}") for name in rows[0])


def test_all_terms_train_together(recipe: Recipe, tmp_path: Path) -> None:
    everything = replace(
        recipe,
        method="+".join(reversed(WEIGHTS)),
        term_schedule="at:linear,kd:cosine,gradient:step",
        epochs=2,
        output=str(tmp_path / "run"),
    )
    assert everything.method == "at+kd+f-actt+gradient+symmetry+min-l2"
    rows = train(everything, say=silent).read_metrics()
    steps = int(rows[0]["step"])
    done = (steps - 1) / (2 * steps)  # at the last step of the first epoch
    assert float(rows[0]["weight/at"]) == pytest.approx(1 - done)
    assert [float(row["weight/symmetry"]) for row in rows] == [1.0, 1.0]
    assert float(rows[0]["weight/gradient"]) == pytest.approx(0.2)
    assert float(rows[1]["weight/kd"]) < float(rows[0]["weight/kd"]) < 0.9


def test_resuming_brings_back_regressors_and_found_weights(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by an error at the start of the second epoch, and resumed from the checkpoint of the first."""
    own = replace(
        recipe,
        method="at+f-actt",
        beta="auto",
        beta_f_actt="auto",
        reset_momentum=True,
        milestones=(0.5,),
        epochs=2,
    )
    whole = train(replace(own, output=str(tmp_path / "whole")), say=silent)
    step = DistillationModule.training_step

    def stopped(self: DistillationModule, batch, batch_idx: int):
        if self.current_epoch == 1:
            raise KeyError("the lights went out")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DistillationModule, "training_step", stopped)
    with pytest.raises(KeyError, match="lights"):
        train(replace(own, output=str(tmp_path / "cut")), say=silent)
    monkeypatch.undo()
    cut = resume(tmp_path / "cut", say=silent)
    for name, value in load_file(whole.student_weights).items():
        assert torch.equal(value, load_file(cut.student_weights)[name]), name
    assert cut.result["weights"] == whole.result["weights"]
    assert set(cut.result["weights"]) == {"at", "f-actt"} and 1.0 not in cut.result["weights"].values()
    checkpoint = torch.load(cut.last_checkpoint, weights_only=True)
    assert checkpoint["terms"] and not [name for name in checkpoint["state_dict"] if "regress" in name]


# --- the authors' quirks ------------------------------------------------------------------------------------


def test_the_momentum_is_lost_at_each_drop(recipe: Recipe, tmp_path: Path) -> None:
    """The same weights as by a loop that makes its optimizer anew where the rate drops."""
    own = replace(
        recipe, teacher=None, reset_momentum=True, milestones=(0.34, 0.67), output=str(tmp_path / "run")
    )
    run = train(own, say=silent)
    kept = train(replace(own, reset_momentum=False, output=str(tmp_path / "kept")), say=silent)
    theirs, found = by_hand(own), load_file(run.student_weights)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    gap = max((load_file(kept.student_weights)[name] - found[name]).abs().max() for name in found)
    assert gap > 1e-3


def by_hand(recipe: Recipe) -> nn.Module:
    """A plain loop over the batches that the recipe's run sees."""
    from attention_transfer.data import Batches
    from attention_transfer.training.module import step_seed

    splits = load_splits(recipe)
    model = build_student(recipe, splits).train()
    model.to(memory_format=torch.channels_last)
    augment = build_augment(recipe, splits)
    batches = Batches(splits.train, recipe.batch_size, shuffle=True, seed=recipe.seed)
    drops, rate, count = rate_drops(recipe, len(batches)), recipe.lr, 0
    optimizer = torch.optim.SGD(model.parameters(), rate, recipe.momentum, weight_decay=recipe.weight_decay)
    for epoch in range(recipe.epochs):
        batches.set_epoch(epoch)
        for index, (images, labels) in enumerate(batches):
            if count in drops:
                rate *= recipe.factor
                optimizer = torch.optim.SGD(
                    model.parameters(), rate, recipe.momentum, weight_decay=recipe.weight_decay
                )
            torch.manual_seed(step_seed(recipe.seed, epoch, index, 0))
            logits = model(augment(images).contiguous(memory_format=torch.channels_last))
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, labels).backward()
            optimizer.step()
            count += 1
    return model


def test_batchnorm_starts_uniform(recipe: Recipe) -> None:
    splits = load_splits(recipe)
    ones, uniform = (
        build_student(replace(recipe, batchnorm_init=name), splits) for name in ("ones", "uniform")
    )
    scales = torch.cat([m.weight for m in uniform.modules() if isinstance(m, nn.BatchNorm2d)])
    assert scales.min() >= 0 and scales.max() < 1 and scales.mean().item() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(ones.conv0.weight, uniform.conv0.weight)
    assert all((m.weight == 1).all() for m in ones.modules() if isinstance(m, nn.BatchNorm2d))
    model = copy.deepcopy(ones)
    draw_batchnorm_scales(model)
    assert not torch.equal(model.bn.weight, ones.bn.weight)


# --- what does not go together ------------------------------------------------------------------------------


def test_methods_without_a_teacher_train_none(recipe: Recipe, tmp_path: Path) -> None:
    run = train(
        replace(recipe, method="symmetry+min-l2", teacher=None, epochs=1, output=str(tmp_path / "run")),
        say=silent,
    )
    assert not run.teacher.exists and run.result["teacher_fingerprint"] is None


def test_a_cache_serves_maps_and_logits_only(recipe: Recipe, tmp_path: Path) -> None:
    cache = build_cache(replace(recipe, method="at", views=1), tmp_path / "cache", say=silent)
    cached = replace(
        recipe, method="at", teacher=None, cache=str(cache.folder), epochs=1, output=str(tmp_path / "run")
    )
    for method, read in (("at+f-actt", "activations"), ("gradient", "input gradients")):
        with pytest.raises(ValueError, match=f"reads {read}, and a cache holds maps and logits only"):
            train(replace(cached, method=method), say=silent)
    with pytest.raises(ValueError, match='method "symmetry" learns from no teacher, got a cache'):
        replace(cached, method="symmetry")
    assert train(replace(cached, method="at+kd+symmetry"), say=silent).finished


@pytest.mark.parametrize("method", ["kd", "gradient"])
def test_answers_are_compared_over_the_same_classes(method: str, recipe: Recipe, tmp_path: Path) -> None:
    from attention_transfer.models import save_weights

    save_weights(build_model("wrn-10-2", num_classes=5), tmp_path / "five.safetensors")
    other = replace(
        recipe,
        method=method,
        teacher="wrn-10-2",
        teacher_weights=str(tmp_path / "five.safetensors"),
        teacher_classes=5,
        output=str(tmp_path / "run"),
    )
    with pytest.raises(
        ValueError, match=r"train: method .* compares answers: expected a teacher of 3 classes"
    ):
        train(other, say=silent)


def test_the_command_knows_the_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--print-config", "--method", "symmetry+kd+at", "--beta", "auto"]) == 0
    printed = capsys.readouterr().out
    assert "method: at+kd+symmetry\n" in printed and "beta: auto\n" in printed
    assert main(["train", "--print-config", "--method", "kd", "--term-schedule", "kd:linaer"]) == 2
    assert "Recipe: expected schedule of kd as one of" in capsys.readouterr().err
