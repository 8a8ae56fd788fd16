"""`attention-transfer evaluate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from attention_transfer._tables import format_table
from attention_transfer.cli.parsing import PROGRAM, UsageError, parse, verb_parser
from attention_transfer.training.recipe import Recipe
from attention_transfer.training.run import Run

if TYPE_CHECKING:
    from attention_transfer.data import Splits
    from attention_transfer.training.evaluation import Evaluation


def run(arguments: list[str]) -> None:
    parser = verb_parser("evaluate", f"{PROGRAM} evaluate runs/cifar10-wrn-16-1-at-0 --plot confusion.png")
    parser.add_argument("weights", metavar="RUN|WEIGHTS", help="A run folder, or a weights file.")
    parser.add_argument("--data", help="Images with labels; those of the run if not given.")
    parser.add_argument("--model", help="The model's name, for a weights file that does not say it.")
    parser.add_argument("--plot", help="Write the confusion matrix into this PNG.")
    flags = parse(parser, arguments)
    splits = _evaluation_data(flags.weights, flags.data)
    name, result = _measure(flags.weights, flags.model, splits)
    print(f"{name} on the {len(result.labels):,} test images of {splits.name}")
    print(f"top-1 error {result.error:.2f} %   top-5 error {result.top5_error:.2f} %\n")
    _show_classes(result, splits, flags.plot)


def _measure(weights: str, model: str | None, splits: Splits) -> tuple[str, Evaluation]:
    """The model's name, and its answers on the test images."""
    import torch

    from attention_transfer.cli.loading import load
    from attention_transfer.data import Augment
    from attention_transfer.training.evaluation import evaluate_model
    from attention_transfer.training.fit import evaluation_batches

    loaded = load(weights, model, splits.num_classes, splits.in_channels)
    mean, std = (loaded.card.mean, loaded.card.std) if loaded.card else (splits.mean, splits.std)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    normalise = Augment(mean, std).to(device).normalise
    return loaded.name, evaluate_model(loaded.model, evaluation_batches(splits), normalise, device=device)


def _show_classes(result: Evaluation, splits: Splits, plot: str | None) -> None:
    """Each class's error as a table, and the confusion matrix as a PNG if asked for."""
    from attention_transfer.visualize import confusion_matrix, per_class_errors

    found = per_class_errors(result.predictions, result.labels, splits.classes)
    rows = [[each.name, f"{each.images:,}", f"{each.error:.1f}"] for each in found]
    print(format_table(["class", "images", "error %"], rows, numbers=True))
    if plot:
        picture = confusion_matrix(result.predictions, result.labels, splits.classes, plot)
        print(f"\nconfusion matrix: {picture}")


def _evaluation_data(weights: str, data: str | None) -> Splits:
    if not Path(weights).exists():
        raise FileNotFoundError(
            f"evaluate: expected a run folder or a weights file, got {weights}: not there."
        )
    run = Run(Path(weights))
    if not run.exists and data is None:
        raise UsageError("evaluate: a weights file says nothing of the images. Pass --data.")
    from attention_transfer.training.build import load_splits

    recipe = run.recipe if run.exists else Recipe()
    return load_splits(replace(recipe, data=data) if data else recipe)
