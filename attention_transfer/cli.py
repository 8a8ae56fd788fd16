"""The command `attention-transfer`: one verb a job, each composed of the package's rooms.

Exit status: 0; 2 for bad input, with one line on stderr; 130 on Ctrl-C, with the work saved.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from attention_transfer._extras import require
from attention_transfer.training.recipe import Recipe, field_types
from attention_transfer.training.run import Interrupted, Run

if TYPE_CHECKING:
    from torch import Tensor, nn

    from attention_transfer.data import Splits
    from attention_transfer.training.card import ModelCard
    from attention_transfer.training.demo import DemoRuns

PROGRAM = "attention-transfer"
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # what weights of unknown origin most likely expect


class UsageError(ValueError):
    """A command line that does not parse."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or bool(os.environ.get("ATTENTION_TRANSFER_DEBUG"))
    arguments = [argument for argument in arguments if argument != "--debug"]
    warnings.formatwarning = lambda message, *_, **__: f"warning: {_one_line(str(message))}\n"
    try:
        return _dispatch(arguments)
    except Interrupted as stop:
        return stop.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug or not _is_bad_input(error):
            raise
        print(f"{PROGRAM}: {_describe(error)}", file=sys.stderr)
        return 2


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("attention-transfer"))
        return 0
    verb = VERBS.get(arguments[0])
    if verb is None:
        raise UsageError(f"unknown verb {arguments[0]!r}. {_suggest(arguments[0], VERBS)}")
    try:
        verb.run(arguments[1:])
    except SystemExit as done:  # argparse leaves this way after --help
        return int(done.code or 0)
    return 0


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name.ljust(width)}  {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} VERB [flags]",
            "",
            "Train a small network (the student) to look where a large one (the teacher) looks.",
            "",
            *lines,
            "",
            "examples:",
            f"  {PROGRAM} demo",
            f"  {PROGRAM} train --data cifar10 --teacher wrn-16-2 --student wrn-16-1 --epochs 100",
            "",
            f"`{PROGRAM} VERB --help` lists a verb's flags; --debug shows the traceback of an error.",
        ]
    )


# Errors


def _is_bad_input(error: Exception) -> bool:
    """Whether an error is this package's answer to its input, or the system's refusal; else it is a bug."""
    if isinstance(error, UsageError | OSError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    raised_here = bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)
    of_our_kind = isinstance(error, ValueError | TypeError | ImportError | FloatingPointError)
    return of_our_kind and raised_here and re.match(r"[\w. ]+: ", str(error)) is not None


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return _one_line(str(error))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _suggest(word: str, known: Sequence[str] | dict[str, Any]) -> str:
    near = difflib.get_close_matches(word, list(known), n=3)
    return f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(known)}."


# Parsing


def _parser(verb: str, usage: str) -> Any:
    jsonargparse = require("jsonargparse", extra="train", user=verb)
    return jsonargparse.ArgumentParser(
        prog=f"{PROGRAM} {verb}",
        description=f"{VERBS[verb].summary}. Example: {usage}",
        exit_on_error=False,
    )


def _parse(parser: Any, arguments: list[str]) -> Any:
    """The flags' values; `--weight_decay` is read as `--weight-decay`.

    Raises:
        UsageError: in one line, with near matches for an unknown flag.
    """
    arguments = [_dashed(argument) for argument in arguments]
    try:
        return parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(_explain(parser, str(error))) from None


def _dashed(argument: str) -> str:
    flag, separator, value = argument.partition("=")
    return flag.replace("_", "-") + separator + value if flag.startswith("--") else argument


def _explain(parser: Any, message: str) -> str:
    verb = parser.prog.split()[-1]
    if unknown := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
        flags = [option for action in parser._actions for option in action.option_strings]
        flag = unknown[1].partition("=")[0]
        return f"{verb}: unknown argument {flag}. {_suggest(flag, flags) if flag[0] == '-' else ''}".strip()
    if wrong := re.match(r'Parser key "(\w+)":\s*(.*)', message, re.DOTALL):
        return f"{verb}: --{wrong[1].replace('_', '-')}: {_plain_types(_one_line(wrong[2]))}"
    return f"{verb}: {_one_line(message)}"


def _plain_types(text: str) -> str:
    return re.sub(r"<class '(\w+)'>", r"\1", text).replace("typing.", "")


def _recipe_parser(defaults: Recipe) -> Any:
    """A parser with a flag for every field of the recipe."""
    parser = _parser(
        "train",
        f"{PROGRAM} train --data cifar10 --teacher wrn-16-2 --student wrn-16-1 --method at --epochs 10",
    )
    parser.add_argument(
        "--config", help="Recipe to start from, such as a run's recipe.yaml; flags override it."
    )
    parser.add_argument("--print-config", action="store_true", help="Print the recipe as YAML and stop.")
    parser.add_argument("--resume", help="Go on with this interrupted run folder.")
    parser.add_argument("--overwrite", action="store_true", help="Delete an earlier run in the same folder.")
    parser.usage = f"{PROGRAM} train [flags]"  # the whole list would fill the screen
    recipe = parser.add_argument_group("recipe")
    types, texts = field_types(), _field_texts()
    for field in fields(Recipe):
        flag = "--" + field.name.replace("_", "-")
        default = getattr(defaults, field.name)
        recipe.add_argument(flag, type=types[field.name], default=default, help=texts[field.name])
    return parser


def _field_texts() -> dict[str, str]:
    """The docstring of each field of the recipe."""
    docstring_parser = require("docstring_parser", extra="train", user="train")
    parsed = docstring_parser.parse_from_object(Recipe)
    return {parameter.arg_name: _one_line(parameter.description or "") for parameter in parsed.params}


def _config_of(arguments: list[str]) -> Recipe:
    """The recipe that --config names, or the defaults."""
    first = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    first.add_argument("--config")
    try:
        path = first.parse_known_args(arguments)[0].config
    except argparse.ArgumentError as error:
        raise UsageError(f"train: {error}") from None
    return Recipe.load(path) if path else Recipe()


# Verbs


def _train(arguments: list[str]) -> None:
    flags = _parse(_recipe_parser(_config_of(arguments)), arguments).as_dict()
    options = {name: flags.pop(name) for name in ("config", "print_config", "resume", "overwrite")}
    recipe = Recipe.from_mapping(flags)
    if options["print_config"]:
        print(recipe.to_yaml(), end="")
        return
    if options["resume"]:
        _check_alone(arguments)
        folder = Path(options["resume"])
        _start(folder, lambda: _resume(folder))
        return
    _start(recipe.folder, lambda: _train_new(recipe, options["overwrite"]))


def _check_alone(arguments: list[str]) -> None:
    """A resumed run follows its own recipe: other flags would be ignored without a word."""
    others = [word for word in arguments if word.startswith("--") and not word.startswith("--resume")]
    if others:
        raise UsageError(
            f"train: --resume goes on with the run's own recipe, got {others[0]} beside it. "
            "For other settings start a new run: --config RUN/recipe.yaml --output ..."
        )


def _train_new(recipe: Recipe, overwrite: bool) -> Run:
    from attention_transfer.training.fit import train

    return train(recipe, overwrite=overwrite)


def _resume(folder: Path) -> Run:
    run = Run(folder)
    _ = run.recipe  # an answer before the long imports
    if run.finished:
        print(f"{folder} is finished; nothing is left to do.")
        return run
    from attention_transfer.training.fit import resume

    return resume(folder)


def _start(folder: Path, work: Callable[[], Run]) -> None:
    """Train, report the outcome, and on Ctrl-C say how to go on."""
    try:
        run = work()
    except (Interrupted, KeyboardInterrupt):
        if Run(folder).exists:
            command = f"{PROGRAM} train --resume {folder}"
            print(f"\nStopped; nothing is lost. Go on with: {command}", file=sys.stderr)
        raise
    from attention_transfer.training.fit import is_first_process

    if not is_first_process():
        return
    result = run.result
    print(f"test error {result['test_error']:.2f} %, {result['parameters']:,} parameters")
    print(f"run folder: {run.folder.absolute()}")


def _evaluate(arguments: list[str]) -> None:
    parser = _parser("evaluate", f"{PROGRAM} evaluate runs/cifar10-wrn-16-1-at-0 --plot confusion.png")
    parser.add_argument("weights", metavar="RUN|WEIGHTS", help="A run folder, or a weights file.")
    parser.add_argument("--data", help="Images with labels; those of the run if not given.")
    parser.add_argument("--model", help="The model's name, for a weights file that does not say it.")
    parser.add_argument("--plot", help="Write the confusion matrix into this PNG.")
    flags = _parse(parser, arguments)
    import torch

    from attention_transfer.data import Augment
    from attention_transfer.training.evaluation import evaluate_model
    from attention_transfer.training.fit import test_batches
    from attention_transfer.visualize import confusion_matrix, per_class_errors

    splits = _evaluation_data(flags.weights, flags.data)
    loaded = _load(flags.weights, flags.model, splits.num_classes, splits.in_channels)
    mean, std = (loaded.card.mean, loaded.card.std) if loaded.card else (splits.mean, splits.std)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    normalise = Augment(mean, std).to(device).normalise
    result = evaluate_model(loaded.model, test_batches(splits), normalise, device=device)
    print(f"{loaded.name} on the {len(result.labels):,} test images of {splits.name}")
    print(f"top-1 error {result.error:.2f} %   top-5 error {result.top5_error:.2f} %\n")
    rows = per_class_errors(result.predictions, result.labels, splits.classes)
    print(_table(["class", "images", "error %"], [[r.name, f"{r.images:,}", f"{r.error:.1f}"] for r in rows]))
    if flags.plot:
        plot = confusion_matrix(result.predictions, result.labels, splits.classes, flags.plot)
        print(f"\nconfusion matrix: {plot}")


def _evaluation_data(weights: str, data: str | None) -> Splits:
    from attention_transfer.training.build import load_splits

    run = Run(Path(weights))
    if run.exists:
        return load_splits(replace(run.recipe, data=data) if data else run.recipe)
    if data is None:
        raise UsageError("evaluate: a weights file says nothing of the images. Pass --data.")
    return load_splits(Recipe(data=data))


@dataclass(frozen=True)
class Loaded:
    """A model with its weights, and its card if the weights came with one."""

    model: nn.Module
    name: str
    card: ModelCard | None


def _load(weights: str, name: str | None, classes: int, channels: int) -> Loaded:
    """A model from a run folder, a weights file, or the word "pretrained"."""
    from attention_transfer.models import build_model, load_weights
    from attention_transfer.training.card import ModelCard

    if Run(Path(weights)).exists:
        _ = Run(Path(weights)).result
    card = None if weights == "pretrained" else ModelCard.read(weights)
    if card is not None and name in (None, card.model):
        return Loaded(card.build(weights), card.model, card)
    if name is None:
        raise UsageError(f"{weights} does not say which model it belongs to. Pass --model.")
    pretrained = weights == "pretrained"
    model = build_model(name, num_classes=classes, in_channels=channels, pretrained=pretrained)
    if not pretrained:
        load_weights(model, weights)
    return Loaded(model.eval(), name, None)


def _pairs(arguments: list[str]) -> None:
    parser = _parser("pairs", f"{PROGRAM} pairs --student resnet18 --teacher resnet34 --input-size 224")
    parser.add_argument("--student", required=True, help="The student's name.")
    parser.add_argument("--teacher", required=True, help="The teacher's name.")
    parser.add_argument("--input-size", type=int, default=224, help="Height and width of the images.")
    parser.add_argument("--in-channels", type=int, default=3, help="Channels of the images.")
    parser.add_argument("--num-classes", type=int, default=10, help="Number of classes.")
    flags = _parse(parser, arguments)
    import torch

    from attention_transfer.distiller import Distiller
    from attention_transfer.losses import AttentionTransfer
    from attention_transfer.models import build_model

    if min(flags.input_size, flags.in_channels, flags.num_classes) < 1:
        raise UsageError("pairs: expected --input-size, --in-channels and --num-classes of 1 or more.")
    student, teacher = (
        build_model(name, num_classes=flags.num_classes, in_channels=flags.in_channels)
        for name in (flags.student, flags.teacher)
    )
    images = torch.zeros(2, flags.in_channels, flags.input_size, flags.input_size)
    print(Distiller(student, teacher, terms=[AttentionTransfer(1.0)], example_input=images).plan())


def _maps(arguments: list[str]) -> None:
    parser = _parser("maps", f"{PROGRAM} maps cat.png --weights runs/cifar10-wrn-16-1-at-0 -o maps")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="Image files.")
    parser.add_argument("--weights", required=True, help='A run folder, a weights file, or "pretrained".')
    parser.add_argument("--model", help="The model's name, for weights that do not say it.")
    parser.add_argument("--teacher-weights", help="The same for a teacher to show beside it.")
    parser.add_argument("--teacher", help="The teacher's name, for weights that do not say it.")
    parser.add_argument("--layers", help="Layers, as in --pairs of train: a,b or a:teacher_a,b:teacher_b.")
    parser.add_argument(
        "--num-classes", type=int, default=1000, help="Classes of weights that do not say it."
    )
    parser.add_argument(
        "--image-size", type=int, help="Size of the images; that of training if known, or 224."
    )
    parser.add_argument("-o", "--output", default="maps", help="Folder for the PNGs.")
    flags = _parse(parser, arguments)
    from attention_transfer.visualize import attention_maps, save_maps

    models = {"student": _load(flags.weights, flags.model, flags.num_classes, 3)}
    if flags.teacher_weights:
        models = {"teacher": _load(flags.teacher_weights, flags.teacher, flags.num_classes, 3), **models}
    elif flags.teacher:
        raise UsageError(
            'maps: expected --teacher-weights beside --teacher, got none. "pretrained" is a choice.'
        )
    card = models["student"].card
    channels = card.in_channels if card else 3
    size = flags.image_size or (card.image_size[0] if card else 224)
    pixels = [_read_image(path, channels, size) for path in flags.images]
    layers = _map_layers(models, flags.layers, (2, channels, size, size))
    for path, image in zip(flags.images, pixels, strict=True):
        maps = {
            role: attention_maps(loaded.model, layers[role], _normalise(loaded)(image[None]))
            for role, loaded in models.items()
        }
        print(save_maps(Path(flags.output) / f"{Path(path).stem}-maps.png", [image], maps, captions=[path]))


def _normalise(loaded: Loaded) -> Callable[[Tensor], Tensor]:
    """From uint8 images to what a model expects, as far as its weights say it."""
    from attention_transfer.data import Augment

    if loaded.card:
        return loaded.card.augment().normalise
    own = getattr(loaded.model, "pretrained_cfg", None) or {}
    return Augment(own.get("mean", IMAGENET[0]), own.get("std", IMAGENET[1])).normalise


def _read_image(path: str, channels: int, size: int) -> Tensor:
    """A file as uint8 (c, h, w), its central square resized to `size`."""
    import torch

    image_module = require("PIL.Image", extra="plots", user="maps")
    operations = require("PIL.ImageOps", extra="plots", user="maps")
    if not Path(path).is_file():
        raise FileNotFoundError(f"maps: expected an image file, got {path}, which is not there.")
    try:
        with image_module.open(path) as file:
            image = operations.exif_transpose(file).convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"maps: {path} is not a readable image ({_one_line(str(error))}).") from None
    image = operations.fit(image, (size, size))
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, -1).permute(2, 0, 1)
    )


def _map_layers(models: dict[str, Loaded], text: str | None, shape: tuple[int, ...]) -> dict[str, list[str]]:
    """The layers to show of each model: those named, or the stage ends."""
    import torch

    from attention_transfer.pairs import suggest_pairs
    from attention_transfer.training.recipe import parse_pairs

    student = models["student"].model
    named = parse_pairs(text) if text else None
    if named is None:
        teacher = models.get("teacher", models["student"]).model
        named = [
            (p.student, p.teacher, p.weight) for p in suggest_pairs(student, teacher, torch.zeros(shape))
        ]
    own, others = [pair[0] for pair in named], [pair[1] for pair in named]
    return {"teacher": others, "student": own}


def _report(arguments: list[str]) -> None:
    parser = _parser("report", f"{PROGRAM} report runs/* -o report.html")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Run folders.")
    parser.add_argument(
        "-o", "--output", help="The page to write; report.html in the first run if not given."
    )
    parser.add_argument(
        "--images", type=int, default=500, help="Test images the map similarity is averaged over."
    )
    flags = _parse(parser, arguments)
    runs = [Path(folder) for folder in flags.runs]
    print(f"report: {make_report(runs, Path(flags.output or runs[0] / 'report.html'), flags.images)}")


def make_report(runs: Sequence[Path], output: Path, images: int = 500) -> Path:
    """The HTML page about some runs, with the maps of teacher, plain and taught student if there are such."""
    from attention_transfer.visualize import collect_examples, write_report

    found = [Run(folder) for folder in runs]
    taught = next((run for run in found if run.finished and "at" in run.recipe.method), None)
    if taught is None:
        return write_report(runs, output)
    from attention_transfer.training.build import load_splits

    splits = load_splits(taught.recipe)
    models, normalise = _report_models(taught, found, splits)
    chosen = slice(0, images)
    test = splits.test
    pixels = test.images[chosen] if hasattr(test, "images") else _decoded(test, images)
    examples = collect_examples(models, pixels, test.labels[chosen], normalise, splits.classes)
    return write_report(runs, output, examples=examples)


def _decoded(images: Any, count: int) -> Tensor:
    """The first of some streamed images."""
    import torch

    return torch.stack([images.decode(i) for i in range(min(count, len(images)))])


def _report_models(
    taught: Run, runs: Sequence[Run], splits: Splits
) -> tuple[dict[str, tuple[nn.Module, list[str]]], dict[str, Callable[[Tensor], Tensor]]]:
    """{role: (model, layers)} and {role: normalisation} of teacher, student alone, and the taught student."""
    from attention_transfer.training.build import build_teacher

    teacher = build_teacher(taught.recipe, splits, lambda: taught.teacher)
    if teacher is None:
        raise ValueError(f"report: expected a teacher in {taught.folder}, got none. Leave this run out.")
    plan = taught.result["plan"]
    own, others = [row["student"] for row in plan], [row["teacher"] for row in plan]
    normalise = splits.augment().normalise
    to_teacher = teacher.transform or (lambda x: x)
    models = {"teacher": (teacher.model.eval(), others)}
    roles = {"student alone": _alone(taught, runs), "student with attention transfer": taught}
    for role, run in roles.items():
        if run is not None:
            models[role] = (_load(str(run.folder), None, 0, 0).model, own)
    return models, dict.fromkeys(models, normalise) | {"teacher": lambda x: to_teacher(normalise(x))}


def _alone(taught: Run, runs: Sequence[Run]) -> Run | None:
    """The run of the same student without a teacher, of the same seed if there is one."""
    alone = [
        r
        for r in runs
        if r.finished and r.recipe.method == "none" and r.recipe.student == taught.recipe.student
    ]
    return min(alone, key=lambda run: run.recipe.seed != taught.recipe.seed, default=None)


def _demo(arguments: list[str]) -> None:
    parser = _parser("demo", f"{PROGRAM} demo")
    parser.add_argument(
        "--output", default="runs/demo", help="Folder for the runs; finished ones are reused."
    )
    parser.add_argument("--overwrite", action="store_true", help="Start over.")
    flags = _parse(parser, arguments)
    from attention_transfer.training import demo

    folder = Path(flags.output)
    line = StatusLine()
    try:
        runs = demo.run(folder, overwrite=flags.overwrite, say=line.print, progress=line.show)
    except (Interrupted, KeyboardInterrupt):
        line.clear()
        print(f"Stopped; nothing is lost. Go on with: {PROGRAM} demo --output {folder}", file=sys.stderr)
        raise
    line.clear()
    students = [run.folder for group in runs.students.values() for run in group]
    print("\n" + _comparison(runs))
    print(f"\nreport: {make_report(students, folder / 'report.html').absolute()}")


def _comparison(runs: DemoRuns) -> str:
    """Test errors with mean and spread, parameter counts, and what they say in a sentence."""
    from attention_transfer.training.demo import NAMES, STUDENT, TEACHER
    from attention_transfer.visualize.runs import Spread, group_runs, read_run
    from attention_transfer.visualize.summary import summarise

    named = {f"teacher {TEACHER.student}": [runs.teacher]}
    named |= {f"{NAMES[method]}, {STUDENT.student}": group for method, group in runs.students.items()}
    rows = []
    for name, group in named.items():
        errors = [run.result["test_error"] for run in group]
        each = "  ".join(f"{error:.1f}" for error in errors)
        rows.append([name, f"{group[0].result['parameters']:,}", str(Spread.of(errors)), each])
    students = [read_run(run.folder) for group in runs.students.values() for run in group]
    sentence = summarise(group_runs(students, []))
    return f"{_table(['', 'parameters', 'test error %', 'each seed'], rows)}\n\n{sentence}"


class StatusLine:
    """One line that is written over, for whoever watches; elsewhere it stays silent."""

    def __init__(self) -> None:
        self._visible = sys.stderr.isatty()

    def show(self, text: str) -> None:
        if self._visible:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        self.show("")

    def print(self, text: str) -> None:
        self.clear()
        print(text, flush=True)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as aligned text, the first column to the left and the others to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


class Verb(NamedTuple):
    """What a verb does, in a line, and the function that takes its arguments."""

    summary: str
    run: Callable[[list[str]], None]


VERBS = {
    "demo": Verb("See attention transfer at work on real digits, in minutes, without a download", _demo),
    "train": Verb("Train a student, alone or from a teacher, into a run folder", _train),
    "evaluate": Verb("Measure a run or a weights file on test images", _evaluate),
    "pairs": Verb("Show which layers of a student and a teacher would be compared", _pairs),
    "maps": Verb("Draw a model's attention maps over images", _maps),
    "report": Verb("Write one HTML page about some runs", _report),
}
