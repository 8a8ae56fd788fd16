"""What a model answers to test images; a student beside its teacher: errors, size, speed in one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attention_transfer._errors import InputError
from attention_transfer._machine import commit, device_name
from attention_transfer._reading import one_line
from attention_transfer._tables import format_table
from attention_transfer.cli.loading import Loaded, load_teacher
from attention_transfer.data import Augment, Batches, Splits, match_classes, unknown_classes
from attention_transfer.runs.run import Run
from attention_transfer.training.build import Teacher
from attention_transfer.training.card import ModelCard
from attention_transfer.training.evaluation import Evaluation, evaluate_model
from attention_transfer.training.fit import evaluation_batches
from attention_transfer.training.latency import Size, Timing, size_of, time_batches

BATCHES = (1, 128)


@dataclass(frozen=True)
class Contender:
    """A model in evaluation mode, on the device it is measured on, and the way from pixels to its input."""

    name: str
    model: nn.Module
    prepare: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Measured(Contender):
    """A contender with its answers on the test images."""

    answers: Evaluation


def by_name(splits: Splits, card: ModelCard | None) -> Splits:
    """The images with the classes of a model whose card says them, found by their names.

    Raises:
        ValueError: if there are classes among them that the model does not know.
    """
    names = card.classes if card else None
    if strangers := unknown_classes(splits.classes, names):
        raise InputError(
            f"evaluate: expected images of classes that the model knows, got {strangers}. It knows "
            f"{', '.join(names or ())[:200]}. Name the classes of the images as the model does."
        )
    places = [place for place in match_classes(splits.classes, names) or () if place is not None]
    return splits.numbered_as(names, places) if names and places else splits


def measure(loaded: Loaded, splits: Splits) -> Measured:
    """A run's student, or the model of a weights file, on the test images, whose classes are its own."""
    mean, std = (loaded.card.mean, loaded.card.std) if loaded.card else (splits.mean, splits.std)
    normalise, resize = Augment(mean, std).to(_device()).normalise, loaded.input(splits.shape, mean, std)
    resize = resize.to(_device())
    contender = Contender(loaded.name, loaded.model, lambda pixels: resize(normalise(pixels)))
    return _measure(contender, splits, role="the model")


def _measure(contender: Contender, splits: Splits, *, role: str) -> Measured:
    model, prepare = contender.model, contender.prepare
    batches = evaluation_batches(splits)
    answers = evaluate_model(model, batches, prepare, device=_device(), name=role)
    return Measured(contender.name, model, prepare, answers)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compare_with_teacher(student: Measured, run: Run, splits: Splits) -> str:
    """The table of a student, and its teacher if it has one, with how it was measured."""
    try:
        teacher = load_teacher(run, splits) if run.exists else None
        missing = "no teacher beside it"
    except (ValueError, OSError) as error:
        teacher, missing = None, f"its teacher is not at hand: {one_line(str(error))}"
    if teacher is None:
        return f"{missing}\n\n{_table([student], splits)}"
    beside = _beside(teacher, splits)
    return f"its teacher: {beside.name}\n\n{_table([student, beside], splits)}"


def _beside(teacher: Teacher, splits: Splits) -> Contender:
    """The teacher, with its answers if it knows the data's classes."""
    normalise = Augment(splits.mean, splits.std).to(_device()).normalise
    transform = nn.Identity() if teacher.transform is None else teacher.transform.to(_device())
    model = teacher.model.eval().to(_device()).to(memory_format=torch.channels_last)
    contender = Contender(teacher.name, model, lambda pixels: transform(normalise(pixels)))
    if teacher.classes != splits.num_classes or unknown_classes(splits.classes, teacher.names):
        return contender
    if teacher.order and teacher.names:
        splits = splits.numbered_as(teacher.names, teacher.order)
    return _measure(contender, splits, role="its teacher")


def _table(contenders: Sequence[Contender], splits: Splits) -> str:
    inputs = {size: _inputs(contenders, splits, size) for size in BATCHES}
    sizes = [size_of(each.model, images) for each, images in zip(contenders, inputs[1], strict=True)]
    timings = {size: _time(contenders, images) for size, images in inputs.items()}
    rows = [*_error_rows(contenders), *_size_rows(sizes)]
    for size, found in timings.items():
        rows += _time_rows(size, found)
    header = ["", "student", "teacher", "student / teacher"][: 2 * len(contenders)]
    rounds = " and ".join(str(found[0].rounds) for found in timings.values())
    return "\n".join(
        [
            format_table(header, [row[: len(header)] for row in rows], numbers=True),
            "",
            "FLOPs: of convolutions and matrix products, 2 for each multiply-add (1 MAC).",
            f"Times: medians of {rounds} rounds, each network once a round in turn, after warm-up;",
            "of the network alone, from normalised images to logits, float32, channels-last.",
            f"{device_name(_device())}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"commit {commit()}",
        ]
    )


def _inputs(contenders: Sequence[Contender], splits: Splits, size: int) -> list[Tensor]:
    """Test images, again from the start where there are too few, as each contender takes them."""
    batches = Batches(splits.test, min(size, len(splits.test)), shuffle=False)
    pixels, _ = next(iter(batches))
    pixels = pixels.repeat(-(-size // len(pixels)), 1, 1, 1)[:size].to(_device())
    with torch.no_grad():
        prepared = [each.prepare(pixels) for each in contenders]
    return [images.contiguous(memory_format=torch.channels_last) for images in prepared]


def _time(contenders: Sequence[Contender], inputs: Sequence[Tensor]) -> list[Timing]:
    networks = {str(i): (each.model, inputs[i]) for i, each in enumerate(contenders)}
    return list(time_batches(networks).values())


def _error_rows(contenders: Sequence[Contender]) -> list[list[str]]:
    """The errors; of few classes there is no top-5 error."""
    top1 = [each.answers.error if isinstance(each, Measured) else None for each in contenders]
    top5 = [each.answers.top5_error if isinstance(each, Measured) else None for each in contenders]
    rows = [_error_row("test error, top-1 %", top1), _error_row("test error, top-5 %", top5)]
    return rows if any(error is not None for error in top5) else rows[:1]


def _error_row(label: str, errors: Sequence[float | None]) -> list[str]:
    student, teacher = errors[0], errors[-1]
    change = "-" if student is None or teacher is None else f"{student - teacher:+.2f} points"
    return [label, *("-" if error is None else f"{error:.2f}" for error in errors), change]


def _size_rows(sizes: Sequence[Size]) -> list[list[str]]:
    return [
        _row("parameters", [size.parameters for size in sizes], ",.0f"),
        _row("MFLOPs an image", [size.flops / 1e6 for size in sizes], ",.1f"),
        _row("weights, MB", [size.bytes / 1e6 for size in sizes], ",.2f"),
    ]


def _time_rows(size: int, timings: Sequence[Timing]) -> list[list[str]]:
    return [
        _row(f"ms a batch of {size}", [1000 * each.seconds for each in timings], ",.2f"),
        _row(f"images/s, batch {size}", [size / each.seconds for each in timings], ",.0f"),
    ]


def _row(label: str, values: Sequence[float], form: str) -> list[str]:
    ratio = values[0] / values[-1] if values[-1] else float("nan")
    return [label, *(format(value, form) for value in values), f"{ratio:.2f}"]
