"""`attention-transfer cache build|info|verify`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from attention_transfer._choices import Stored
from attention_transfer._colours import print_safely
from attention_transfer._errors import InputError
from attention_transfer._ranks import is_first_process
from attention_transfer._tables import format_table
from attention_transfer.cli.memory import add_memory_flag, govern_memory
from attention_transfer.cli.output import StatusLine
from attention_transfer.cli.parsing import PROGRAM, VERBS, UsageError, dashed, parse, suggest, verb_parser
from attention_transfer.runs.recipe import (
    Recipe,
    cache_fields,
    check_models,
    field_texts,
    field_types,
    flag_of,
)

if TYPE_CHECKING:
    from attention_transfer.cache import Cache

_PLACES = ("devices", "nodes", "wait_minutes")
VIEWS = 4  # of each image, where nothing else is asked for

SUMMARIES = {
    "build": "Store a teacher's maps and logits for fixed views of every training image",
    "info": "Show what a cache holds, and whether it is finished",
    "verify": "Read a cache from beginning to end and compare every checksum",
}


def run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print_safely(_overview())
        return
    actions: dict[str, Callable[[list[str]], None]] = {"build": _build, "info": _info, "verify": _verify}
    action, *rest = arguments
    if action not in actions:
        raise UsageError(f"cache: unknown action {action!r}. {suggest(action, actions)}")
    actions[action](rest)


def _overview() -> str:
    width = max(map(len, SUMMARIES))
    actions = [f"  {name.ljust(width)}  {summary}" for name, summary in SUMMARIES.items()]
    usage = f"usage: {PROGRAM} cache {'|'.join(SUMMARIES)} [flags]"
    example = f"{PROGRAM} cache build --data cifar10 --teacher runs/teacher -o cache"
    return "\n".join([usage, "", f"{VERBS['cache']}. Example: {example}", "", *actions])


# Build


def _build(arguments: list[str]) -> None:
    arguments = [dashed(argument) for argument in arguments]
    flags = parse(_build_parser(), arguments).as_dict()
    resumed, output, keep_memory = (flags.pop(name) for name in ("resume", "output", "keep_memory"))
    if resumed:
        _check_alone(arguments)
        places = {name: flags[name] for name in _PLACES}
        flags, output = {**_settings_of(Path(resumed), flags["views"]), **places}, resumed
    elif not output or not flags["teacher"]:
        raise UsageError("cache build: expected --teacher and -o. `cache build --help` explains them.")
    layers, dtype = flags.pop("layers"), flags.pop("dtype")
    recipe = Recipe.from_mapping(flags | {"views": flags["views"] or VIEWS})
    names = None if layers == "auto" else layers.split(",")
    _start(Path(output), recipe, names, dtype, keep_memory)


def _start(folder: Path, recipe: Recipe, layers: list[str] | None, dtype: Stored, keep_memory: bool) -> None:
    """Build, and on Ctrl-C say how to go on."""
    line = StatusLine()
    try:
        from attention_transfer.training.caching import build_cache

        govern_memory(recipe, keep=keep_memory)
        cache = build_cache(recipe, folder, layers=layers, dtype=dtype, say=line.print, progress=line.show)
    except KeyboardInterrupt:
        line.clear()
        if (folder / "cache.json").exists() and is_first_process():
            command = f"{PROGRAM} cache build --resume {folder}"
            print_safely(f"\nStopped; nothing is lost. Go on with: {command}", stream=sys.stderr)
        raise
    line.clear()
    if not is_first_process():
        return
    print_safely(f"cache: {folder.absolute()}, {_state(cache)}")
    print_safely(f"train from it: {PROGRAM} train --cache {folder} --student NAME")


def _check_alone(arguments: list[str]) -> None:
    """A cache that is gone on with keeps its settings: other flags would be ignored without a word."""
    allowed = ("--resume", "--views", "--keep", *map(flag_of, _PLACES))
    others = [word for word in arguments if word.startswith("-") and not word.startswith(allowed)]
    if others:
        raise UsageError(
            f"cache build: --resume goes on with the cache's own settings, got {others[0]} beside it. "
            "Pass --views for more views; for other settings build another cache."
        )


def _settings_of(folder: Path, views: int | None) -> dict[str, Any]:
    """The flags that a cache is built with."""
    from attention_transfer.cache import Cache

    manifest = Cache.read(folder).manifest
    check_models(manifest.settings, folder)
    settings, views = manifest.settings, max(views or 0, manifest.views)
    layers = settings.get("layers", "none")
    if not {*cache_fields(), "layers", "dtype"} <= settings.keys() or not (
        layers is None or (isinstance(layers, list) and all(isinstance(name, str) for name in layers))
    ):
        raise InputError(
            f"cache: expected the settings that {folder} was begun with in its cache.json, got others. "
            "Go on with it by the flags that you built it with, and -o."
        )
    return {**settings, "views": views, "layers": ",".join(layers) if layers else "auto"}


def _build_parser() -> Any:
    usage = f"{PROGRAM} cache build --data cifar10 --teacher runs/teacher --views {VIEWS} -o cache"
    parser = verb_parser("cache build", usage, SUMMARIES["build"])
    parser.usage = f"{PROGRAM} cache build --teacher TEACHER -o DIR [flags]"
    parser.add_argument("-o", "--output", help="The cache folder; one that was begun is gone on with.")
    parser.add_argument("--resume", help="Go on with this cache as it was begun; with --views, add views.")
    parser.add_argument(
        "--layers", default="auto", help='The teacher\'s layers, "a,b"; "auto" takes its stage ends.'
    )
    parser.add_argument(
        "--dtype", choices=get_args(Stored), default="float16", help="How maps are stored; uint8 halves them."
    )
    add_memory_flag(parser)
    _add_recipe_fields(parser)
    return parser


def _add_recipe_fields(parser: Any) -> None:
    """The flags of `train` that concern images and teacher."""
    types, texts = field_types(), field_texts("cache build")
    texts |= {
        "teacher": "The teacher: a run folder, a weights file, or a name with --teacher-weights.",
        "views": f"Crops and flips of each image to store; {VIEWS} if not given.",
        "split_seed": "Seed of the validation split and of what --max-train picks; 0 if not given.",
        "batch_size": "Images that the teacher sees at a time, on each device.",
        "devices": "Devices on each machine, which share the work. All GPUs, or one CPU process.",
    }
    for name in field_types():
        if name in (*cache_fields(), *_PLACES, "views"):
            default = None if name == "teacher" else getattr(Recipe, name)
            parser.add_argument(flag_of(name), type=types[name], default=default, help=texts[name])


# Info and verify


def _info(arguments: list[str]) -> None:
    cache = _read("info", arguments)
    facts, size = cache.manifest, cache.layout.bytes
    rows = [
        ["state", _state(cache)],
        ["teacher", f"{facts.teacher}, fingerprint {facts.teacher_fingerprint}, in {facts.precision}"],
        ["layers", ", ".join(map(str, facts.layers))],
        ["maps", f"{facts.mapping} of |A|^{facts.p:g}, as {facts.dtype}"],
        ["record", f"{size:,} bytes an image and view, with {facts.classes} logits"],
        ["images", f"{facts.images:,} of {'x'.join(map(str, facts.shape))}, fingerprint {facts.data}"],
        ["from", ", ".join(f"{k} {v}" for k, v in {**_data(facts.settings), **facts.source}.items())],
        ["views", f"{facts.views} of seed {facts.view_seed}, pad {facts.pad}, flip {facts.flip}"],
    ]
    print_safely(format_table(["cache", str(cache.folder)], rows))


def _data(settings: dict[str, Any]) -> dict[str, Any]:
    return {"data": settings["data"]} if "data" in settings else {}


def _state(cache: Cache) -> str:
    """How much of it is there, and how much is not."""
    from attention_transfer.cache import megabytes

    faults = list(cache.faults())
    whole = [shard for shard, fault in faults if not fault]
    stored = megabytes(sum(shard.bytes for shard in whole))
    if len(whole) == len(faults):
        return f"{cache.manifest.views} views of {cache.manifest.images:,} images, {stored}"
    return f"unfinished, {len(whole)} of {len(faults)} files, {stored}; finish it: {cache.build_command}"


def _verify(arguments: list[str]) -> None:
    cache, line = _read("verify", arguments), StatusLine()
    bad, count = [], 0
    for shard, fault in cache.faults(deep=True):
        count += 1
        line.show(f"{shard.name}: {fault or 'good'}")
        if fault:
            bad.append(str(cache.folder / shard.name))
            line.print(f"{bad[-1]} {fault}")
    line.clear()
    if bad:
        raise UsageError(
            f"cache verify: {len(bad)} of {count} files are not as they should be. Delete what is damaged, "
            f"and build it anew: {cache.build_command}"
        )
    print_safely(f"{cache.folder}: {count} files, every checksum fits")


def _read(action: str, arguments: list[str]) -> Cache:
    parser = verb_parser(f"cache {action}", f"{PROGRAM} cache {action} cache", SUMMARIES[action])
    parser.add_argument("folder", metavar="DIR", help="The cache folder.")
    flags = parse(parser, arguments)
    from attention_transfer.cache import Cache

    return Cache.read(flags.folder)
