"""`attention-transfer evaluate`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from attention_transfer._colours import print_safely
from attention_transfer._extras import check_installed
from attention_transfer._tables import format_table
from attention_transfer._weights_path import split_prefix
from attention_transfer.cli.parsing import PROGRAM, UsageError, parse, verb_parser
from attention_transfer.runs.recipe import Recipe
from attention_transfer.runs.run import Run

if TYPE_CHECKING:
    from attention_transfer.data import Splits
    from attention_transfer.training.evaluation import Evaluation


def run(arguments: list[str]) -> None:
    parser = verb_parser("evaluate", f"{PROGRAM} evaluate runs/cifar10-wrn-16-1-at-0 --plot confusion.png")
    parser.add_argument(
        "weights", metavar="RUN|WEIGHTS", help="A run folder, a weights file, or FILE:PREFIX."
    )
    parser.add_argument(
        "--data", help="Images with labels, resized as the model knows them; those of the run if not given."
    )
    parser.add_argument("--model", help="The model's name, for a weights file that does not say it.")
    parser.add_argument("--plot", help="Write the confusion matrix into this PNG.")
    parser.add_argument(
        "--latency",
        action="store_true",
        help="In place of the classes: parameters, FLOPs, MB and the time of a batch, beside those of the "
        "run's teacher if it has one.",
    )
    flags = parse(parser, arguments)
    if flags.plot:
        _check_plot(Path(flags.plot))
    splits = _evaluation_data(flags.weights, flags.data)
    from attention_transfer.cli.comparing import by_name, compare_with_teacher, measure
    from attention_transfer.cli.loading import load

    height, width = splits.shape[1:]
    loaded = load(flags.weights, flags.model, splits.num_classes, splits.in_channels, (height, width))
    splits = by_name(splits, loaded.card)
    student = measure(loaded, splits)
    result = student.answers
    for note in splits.notes:
        print_safely(f"note: {note}", stream=sys.stderr)
    print_safely(f"{student.name} on the {len(result.labels):,} test images of {splits.name}")
    if flags.latency:
        print_safely(compare_with_teacher(student, Run(Path(flags.weights)), splits))
    else:
        errors = {"top-1": result.error, "top-5": result.top5_error}
        known = [f"{name} error {error:.2f} %" for name, error in errors.items() if error is not None]
        print_safely("   ".join(known) + "\n")
        _show_classes(result, splits)
    if flags.plot:
        _plot(result, splits, flags.plot)


def _show_classes(result: Evaluation, splits: Splits) -> None:
    """Each class's error as a table."""
    from attention_transfer.visualize import per_class_errors

    found = per_class_errors(result.predictions, result.labels, splits.classes)
    rows = [[each.name, f"{each.images:,}", f"{each.error:.1f}"] for each in found]
    print_safely(format_table(["class", "images", "error %"], rows, numbers=True))


def _check_plot(path: Path) -> None:
    """What would stop the picture after all images have been looked at."""
    check_installed("matplotlib", extra="train", user="evaluate")
    if path.is_dir():
        raise UsageError(f"evaluate: expected a file for --plot, got {path}, which is a folder.")


def _plot(result: Evaluation, splits: Splits, path: str) -> None:
    """The confusion matrix as a PNG."""
    from attention_transfer.visualize import confusion_matrix

    picture = confusion_matrix(result.predictions, result.labels, splits.classes, path)
    print_safely(f"\nconfusion matrix: {picture}")


def _evaluation_data(weights: str, data: str | None) -> Splits:
    if not split_prefix(weights)[0].exists():
        raise FileNotFoundError(
            f"evaluate: expected a run folder or a weights file, got {weights}: not there."
        )
    run = Run(Path(weights))
    if not run.exists and data is None:
        raise UsageError("evaluate: a weights file says nothing of the images. Pass --data.")
    from attention_transfer.training.build import load_splits
    from attention_transfer.training.card import ModelCard

    recipe = run.recipe if run.exists else Recipe()
    if data is None:
        return load_splits(recipe)
    card = ModelCard.read(weights)
    square = card.image_size[0] if card and len({*card.image_size}) == 1 else None
    return load_splits(replace(recipe, data=data, image_size=recipe.image_size or square))
