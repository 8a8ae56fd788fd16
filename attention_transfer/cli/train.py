"""`attention-transfer train`."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from attention_transfer._colours import print_safely
from attention_transfer._extras import check_installed
from attention_transfer._ranks import is_first_process
from attention_transfer._tables import printable
from attention_transfer._trust import trusted
from attention_transfer.cli.memory import add_memory_flag, govern_memory
from attention_transfer.cli.parsing import PROGRAM, UsageError, dashed, parse, verb_parser
from attention_transfer.runs.recipe import (
    LEFT_OPEN,
    PLACE,
    Recipe,
    facts_of,
    field_texts,
    field_types,
    fields_of,
    flag_of,
)
from attention_transfer.runs.run import Interrupted, Run
from attention_transfer.training.telling import Line, Progress, Say, say_text, teller

_OPTIONS = ("config", "print_config", "resume", "overwrite", "progress", "keep_memory")
"""Flags that no recipe holds."""


def run(arguments: list[str]) -> None:
    arguments = [dashed(argument) for argument in arguments]
    flags = parse(_recipe_parser(_config_of(arguments)), arguments).as_dict()
    options = {name: flags.pop(name) for name in _OPTIONS}
    recipe = Recipe.from_mapping(flags)
    if options["print_config"]:
        print_safely(recipe.to_yaml(), end="")
        return
    say = teller(options["progress"])
    if options["resume"]:
        folder = Path(options["resume"])
        _check_alone(arguments, folder)
        places = {name: flags[name] for name in fields_of(PLACE) if _is_named(name, arguments)}
        _start(folder, lambda: _resume(folder, options["keep_memory"], places, say), say or say_text)
        return
    recipe = _without_unused_teacher(recipe, arguments, say or say_text)
    if recipe.cache:
        from attention_transfer.training.cached import take_over

        recipe = take_over(recipe)
    new = (options["overwrite"], options["keep_memory"], say)
    _start(recipe.folder, lambda: _train_new(recipe, *new), say or say_text)


def _without_unused_teacher(recipe: Recipe, arguments: list[str], say: Say) -> Recipe:
    """A teacher on the command line is meant; --method there may leave out the one of a --config."""
    named = [name for name in ("teacher", "teacher-weights") if _is_named(name, arguments)]
    given = [
        (name, value) for name in named if (value := getattr(recipe, name.replace("-", "_"))) is not None
    ]
    if given and not recipe.needs_teacher:
        flag, value = given[0]
        raise UsageError(
            f'train: method "{recipe.method}" learns from no teacher, got --{flag} {value}. Leave it out, or '
            "name a method that learns from one, such as --method at."
        )
    if recipe.unused_teacher and _is_named("method", arguments):
        if is_first_process():
            say(f'note: method "{recipe.method}" learns from no teacher: {recipe.unused_teacher} is left out')
        return replace(recipe, teacher=None, teacher_weights=None)
    return recipe


def _check_alone(arguments: list[str], folder: Path) -> None:
    """A resumed run follows its own recipe: other flags would be ignored without a word."""
    allowed = ("--resume", "--progress", "--keep-memory", *map(flag_of, fields_of(PLACE)))
    others = [word for word in arguments if word.startswith("--") and not word.startswith(allowed)]
    if others:
        raise UsageError(
            f"train: --resume goes on with the run's own recipe, got {others[0]} beside it. "
            f"For other settings start a new run: {_command_anew(folder)}"
        )


def _is_named(name: str, arguments: list[str]) -> bool:
    return any(word.partition("=")[0] == flag_of(name) for word in arguments)


def _check_report() -> None:
    """What the report at the end needs is looked for at the start."""
    check_installed("jinja2", "matplotlib", "PIL", "scipy", extra="train", user="train")


def _train_new(recipe: Recipe, overwrite: bool, keep_memory: bool, say: Say | None) -> Run:
    _check_report()
    from attention_transfer.training.fit import train

    govern_memory(recipe, keep=keep_memory)
    return train(recipe, overwrite=overwrite, say=say)


def _resume(folder: Path, keep_memory: bool, places: dict[str, Any], say: Say | None) -> Run:
    run = Run(folder)
    recipe = replace(run.recipe, **places)  # an answer before the long imports
    if run.finished:
        (say or say_text)(f"{folder} is finished; nothing is left to do.")
        return run
    _check_report()
    from attention_transfer.training.fit import resume

    govern_memory(recipe, keep=keep_memory)
    return resume(folder, say=say, **places)


def _start(folder: Path, work: Callable[[], Run], say: Say) -> None:
    """Train, and report the outcome; where that ends early say how to go on."""
    start = time.time()
    try:
        run = work()
    except (Interrupted, KeyboardInterrupt):
        if Run(folder).exists:
            _say_how_to_go_on(folder, "\nStopped; nothing is lost. Go on with")
        raise
    except (OSError, ValueError, FloatingPointError) as error:
        if _saved_since(start, folder) and not isinstance(error, FloatingPointError):
            _say_how_to_go_on(
                folder, "Stopped by an error; what is saved is not lost. Go on, once it is mended, with"
            )
        if _only_the_teacher_is_trained(Run(folder)) and is_first_process():
            print_safely(
                f"Its teacher is trained. To go on from it with other settings, add them to: {PROGRAM} train "
                f"{_command_anew(folder)}",
                stream=sys.stderr,
            )
        raise
    if is_first_process():
        _say_outcome(run, say)


def _saved_since(start: float, folder: Path) -> bool:
    """Whether the run, or the teacher before it, has saved a state."""
    states = (run.last_checkpoint for run in (Run(folder), Run(folder).teacher))
    return any(state.is_file() and state.stat().st_mtime >= start for state in states)


def _only_the_teacher_is_trained(run: Run) -> bool:
    return run.exists and run.teacher.finished and not (run.finished or run.last_checkpoint.is_file())


def _command_anew(folder: Path) -> str:
    """The flags of a new run with a run's settings, and with the teacher that it has trained."""
    place = folder if folder.name not in ("", "..") else folder.resolve()
    others = (place.with_name(f"{place.name}-{number}") for number in itertools.count(2))
    free = next(other for other in others if not other.exists())
    teacher = f" --teacher {folder / 'teacher'}" if Run(folder).teacher.finished else ""
    return f"--config {folder / 'recipe.yaml'}{teacher} --output {free}{_own_factories()}"


def _own_factories() -> str:
    return "".join(f" --trust {name}" for name in sorted(trusted()))


def _say_how_to_go_on(folder: Path, how: str) -> None:
    if is_first_process():
        print_safely(f"{how}: {PROGRAM} train --resume {folder}{_own_factories()}", stream=sys.stderr)


def _say_outcome(run: Run, say: Say) -> None:
    result = run.result
    rate, share = result["images_per_second"], result["data_share"]
    alone = _same_student_alone(run, say)
    lines = [
        f"test error {result['test_error']:.2f} %, {result['parameters']:,} parameters",
        f"{rate:,.0f} images/s; {share:.1%} of the training time was spent waiting for images",
        *(_against(other, result["test_error"]) for other in alone),
        f"report: {printable(str(_write_report(run, alone).absolute()))}",
        f"run folder: {printable(str(run.folder.absolute()))}",
    ]
    paths = {"folder": str(run.folder.absolute()), "report": str(run.report.absolute())}
    say(Line("\n".join(lines), "result", **paths, **result))


def _write_report(run: Run, alone: Sequence[Run]) -> Path:
    from attention_transfer.cli.collecting import collect
    from attention_transfer.cli.report import SIMILARITY_IMAGES
    from attention_transfer.visualize import write_report

    folders = [other.folder for other in (*alone, run)]
    return write_report(folders, run.report, examples=collect(folders, SIMILARITY_IMAGES))


def _same_student_alone(run: Run, say: Say) -> list[Run]:
    """Finished runs beside this one that differ from it only in having no teacher."""
    if run.recipe.method == "none":
        return []
    beside = [Run(folder) for folder in sorted(run.folder.absolute().parent.iterdir())]
    finished = [other for other in beside if other.exists and other.finished]
    return [other for other in finished if _is_alone(other, run.recipe, say)]


def _is_alone(other: Run, recipe: Recipe, say: Say) -> bool:
    """Whether a finished run is that of the same student alone; one that cannot be read is left out."""
    try:
        _ = other.result
        return other.recipe.method == "none" and _alike_alone(other.recipe, recipe)
    # guard: damaged-run-beside
    except (OSError, ValueError) as error:
        say(f"note: {error}")
        return False


def _alike_alone(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes are one but for the teacher; what one leaves to the data, a cache may have said."""
    ours, theirs = one.alone(), other.alone()
    return all(
        LEFT_OPEN in facts_of(name) and None in (getattr(ours, name), getattr(theirs, name))
        for name in ours.differences(theirs)
    )


def _against(alone: Run, error: float) -> str:
    change = error - alone.result["test_error"]
    name = printable(alone.folder.name)
    line = f"student alone {alone.result['test_error']:.2f} % ({name}): {change:+.2f} points"
    if change > 0:
        line += ". The teacher did not help; try a smaller --beta, other --pairs, or more seeds"
    return line


def _recipe_parser(defaults: Recipe) -> Any:
    """A parser with a flag for every field of the recipe."""
    parser = verb_parser(
        "train",
        f"{PROGRAM} train --data cifar10 --teacher wrn-16-2 --student wrn-16-1 --method at --epochs 10",
    )
    parser.add_argument(
        "--config", help="Recipe to start from, such as a run's recipe.yaml; flags override it."
    )
    parser.add_argument("--print-config", action="store_true", help="Print the recipe as YAML and stop.")
    parser.add_argument("--resume", help="Go on with this interrupted run folder.")
    parser.add_argument("--overwrite", action="store_true", help="Delete an earlier run in the same folder.")
    parser.add_argument(
        "--progress",
        type=Progress,
        default="auto",
        help="What is said: a bar on a terminal and lines elsewhere (auto), lines, a JSON object a line for "
        "scripts (json), or nothing but warnings and errors (none).",
    )
    add_memory_flag(parser)
    parser.usage = f"{PROGRAM} train [flags]"  # the whole list would fill the screen
    recipe = parser.add_argument_group("recipe")
    types, texts = field_types(), field_texts("train")
    for name, type_ in types.items():
        bare: dict[str, Any] = {"nargs": "?", "const": True} if type_ is bool else {}
        recipe.add_argument(
            flag_of(name), type=type_, default=getattr(defaults, name), help=texts[name], **bare
        )
    return parser


def _config_of(arguments: list[str]) -> Recipe:
    """The recipe that --config names, or the defaults."""
    first = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    first.add_argument("--config")
    try:
        path = first.parse_known_args(arguments)[0].config
    except argparse.ArgumentError as error:
        raise UsageError(f"train: {error}") from None
    return Recipe.load(path) if path else Recipe()
