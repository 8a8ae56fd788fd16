"""The model card: what a model is, how it was made, how often it errs, how to load each of its files."""

from __future__ import annotations

import contextlib
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from attention_transfer._reading import one_line
from attention_transfer._tables import printable
from attention_transfer.cache import Manifest
from attention_transfer.runs.recipe import Recipe
from attention_transfer.runs.run import Run
from attention_transfer.training.card import ModelCard
from attention_transfer.training.evaluation import TOP
from attention_transfer.visualize.groups import describe_method

from .base import Format
from .student import Student

README = "README.md"
SIGNATURE = "Written by `attention-transfer export`."
_MARKS = re.compile(r"[\\`*\[\]<>&|~]")

MACHINE = ("device", "torch", "version", "commit")

File = tuple[Format, int, float]
"""A format with the size of its file and the largest difference of its logits."""


def model_card(student: Student, files: Sequence[File]) -> str:
    """The card as Markdown. It holds no path of this machine."""
    name, data = plain(student.card.model), plain(_shown(student.run.recipe.images))
    sections = [
        f"# {name}, trained on {data}\n\n{_opening(student)}",
        f"## Errors\n\n{_errors(student)}",
        f"## Input and output\n\n{_input(student)}",
        "## Files\n\n" + "\n\n".join(_file(student, *file) for file in files),
        f"## Classes\n\n{_block(_classes(student))}",
        f"## Training\n\n{_training(student.run)}",
        "## Caveats\n\n" + "\n".join(f"- {line}" for line in _caveats(student.run)),
    ]
    return "\n\n".join(sections) + "\n"


def _opening(student: Student) -> str:
    card, run = student.card, student.run
    return (
        f"A {code(card.model)} of {run.result['parameters']:,} parameters that tells {len(card.classes)} "
        f"classes of images apart. {_lesson(run)} {SIGNATURE}"
    )


def _lesson(run: Run) -> str:
    """What it learned from, in a sentence."""
    method = describe_method(run.recipe.method)
    if run.recipe.method == "none":
        return "It learned from labels alone."
    if not run.recipe.needs_teacher:
        return f"It learned from labels, with {method}, without a teacher."
    return (
        f"It learned from labels and from a {code(teacher_name(run))}, by {method}; nothing of "
        "that teacher is in these files."
    )


def _errors(student: Student) -> str:
    run, result = student.run, student.run.result
    rows = {"test error, top-1": f"{result['test_error']:.2f} %"}
    if len(student.card.classes) > TOP and result["test_top5_error"] is not None:
        rows["test error, top-5"] = f"{result['test_top5_error']:.2f} %"
    if result["validation_error"] is not None:
        rows["validation error, top-1"] = f"{result['validation_error']:.2f} %"
    if (error := _teacher_error(run)) is not None:
        rows["its teacher's test error, top-1"] = f"{error:.2f} %"
    data = plain(_shown(run.recipe.images))
    return f"{_table(rows)}\n\nOf one run, seed {run.recipe.seed}. The test images of {data} chose nothing."


def _input(student: Student) -> str:
    card = student.card
    colours = {1: "grey", 3: "RGB"}.get(card.in_channels, f"{card.in_channels} channels")
    height, width = card.image_size
    programs = (
        "The programs (onnx, torch-export) take pixels as they are, uint8 from 0 to 255, and normalise them "
        "themselves."
        if student.input == "pixels"
        else "The programs (onnx, torch-export) take normalised images, float32, as the weights do."
    )
    share = f" of {100 * card.crop:g} % of the shorter side" if card.crop < 1 else ""
    square = f" Of a larger one, the central square{share}, resized." if height == width else ""
    return (
        f"Images (b, {card.in_channels}, {height}, {width}), {colours}, any b from 1 up.{square} "
        "A normalised image is (pixels / 255 - mean) / std, by channel, with\n\n"
        f"```\nmean = {card.mean}\nstd = {card.std}\n```\n\n"
        f"{programs} What comes out are logits (b, {len(card.classes)}), before any softmax."
    )


def _file(student: Student, format: Format, size: int, difference: float) -> str:
    return (
        f"### `{format.path}` ({format.name}, {size / 1e6:.2f} MB)\n\n{format.summary}\n\n"
        f"```python\n{format.snippet(student)}\n```\n\n"
        f"Loaded anew after it was written, it gave the student's logits to within {difference:.1e} of the "
        f"largest; {format.tolerance:.0e} was allowed."
    )


def _classes(student: Student) -> str:
    return "\n".join(
        f"{index} {printable(one_line(name))}" for index, name in enumerate(student.card.classes)
    )


def plain(value: object) -> str:
    """A value as Markdown shows it: on one line, no mark-up, no HTML, nothing that moves a cursor."""
    text = printable(one_line(value))
    # guard: markdown-of-names
    return _MARKS.sub(_without_meaning, text)


def _without_meaning(found: re.Match[str]) -> str:
    return html.escape(found[0]) if found[0] in "<>&" else f"\\{found[0]}"


def code(value: object) -> str:
    """A value in the type of code, whatever backticks it holds."""
    text = printable(one_line(value))
    fence = "`" * (_longest_fence(text) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _block(text: str) -> str:
    fence = "`" * max(3, _longest_fence(text) + 1)
    return f"{fence}\n{text}\n{fence}"


def _longest_fence(text: str) -> int:
    return max((len(found) for found in re.findall("`+", text)), default=0)


def _training(run: Run) -> str:
    recipe, result = run.recipe, run.result
    machine = {name: result["machine"].get(name, "unknown") for name in MACHINE}
    rows = {
        "method": recipe.method,
        "teacher": f"{teacher_name(run)}, weights {result['teacher_fingerprint'] or 'unknown'}"
        if recipe.needs_teacher
        else "none",
        **_weights(recipe, result["weights"]),
        "epochs": recipe.epochs,
        "batch size": recipe.batch_size,
        "learning rate": f"{recipe.lr:g}, {recipe.schedule}",
        "weight decay": f"{recipe.weight_decay:g}",
        "initial weights": "random" if recipe.student_weights is None else _shown(recipe.student_weights),
        "weights kept": f"those of the {recipe.keep} epoch",
        "precision": recipe.precision,
        "seed": recipe.seed,
        "device": machine["device"],
        "torch": machine["torch"],
        "attention-transfer": f"{machine['version']}, commit {machine['commit']}",
    }
    return _table(rows)


def _table(rows: Mapping[str, object]) -> str:
    lines = [f"| {plain(name)} | {plain(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _weights(recipe: Recipe, weights: dict[str, float]) -> dict[str, str]:
    """The terms' weights, with what else says how attention was compared."""
    course = "" if recipe.term_schedule == "constant" else f", {recipe.term_schedule}"
    rows = {f"weight of {term}": f"{weight:g}{course}" for term, weight in weights.items()}
    if recipe.reads_maps:
        rows["form of the term"] = f"{recipe.form}, p {recipe.p:g}, {recipe.mapping} over channels"
    return rows


def _caveats(run: Run) -> Iterable[str]:
    recipe = run.recipe
    yield f"One run with one seed ({recipe.seed}): another seed gives another error."
    if recipe.method != "none":
        yield (
            "Whether the extra terms helped cannot be seen from this run: train the same student with "
            "`--method none`, over several seeds, to compare."
        )
    if recipe.max_train is not None:
        yield f"It was trained on {recipe.max_train:,} images only (`max_train`)."
    if recipe.student_weights is not None:
        yield "It started from weights of another training, whose licence and data carry over."
    if str(run.result["machine"].get("commit", "")).endswith("+"):
        yield "The code that trained it differed from the commit above."
    yield "It answers with one of its classes whatever the image shows, and its confidence is not calibrated."


def teacher_name(run: Run) -> str:
    """The model of a run's teacher, as far as it can still be told."""
    recipe = run.recipe
    if recipe.cache is not None:
        try:
            return Manifest.read(Path(recipe.cache)).teacher
        except (FileNotFoundError, ValueError):
            return "a teacher read from a cache"
    named = Path(recipe.teacher or "")
    card = None
    if named.is_file() or Run(named).finished:
        with contextlib.suppress(ValueError, OSError):  # the student does without it
            card = ModelCard.read(named)
    return card.model if card else _shown(str(recipe.teacher))


def _teacher_error(run: Run) -> float | None:
    """The test error of a teacher that has a run folder, inside this one or named by the recipe."""
    if not run.recipe.needs_teacher or run.recipe.cache is not None:
        return None
    teachers = [run.teacher, Run(Path(run.recipe.teacher or ""))]
    return next((each.result["test_error"] for each in teachers if each.exists and each.finished), None)


def _shown(name: str) -> str:
    """A name as it is; of a path, the last part."""
    return Path(name).name if Path(name).is_absolute() else name
