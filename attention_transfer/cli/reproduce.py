"""`attention-transfer reproduce`."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from attention_transfer._colours import print_safely
from attention_transfer.cli.output import StatusLine
from attention_transfer.cli.parsing import PROGRAM, UsageError, parse, verb_parser
from attention_transfer.runs.recipe import Precision
from attention_transfer.runs.run import Interrupted

if TYPE_CHECKING:
    from attention_transfer.reproduction.jobs import Job, Plan
    from attention_transfer.reproduction.results import Results
    from attention_transfer.reproduction.runner import Failure
    from attention_transfer.reproduction.setting import Setting
    from attention_transfer.reproduction.tables import Library, Reproduction, Table

GPU_BYTES = 3 << 30  # that a run of a small net takes
CPU_BYTES = 2 << 30


def run(arguments: list[str]) -> None:
    flags = parse(_parser(), arguments)
    from attention_transfer.reproduction.tables import read_library

    library = read_library(_recipes(flags.recipes))
    if not flags.table:
        raise UsageError(f"reproduce: expected a table, got none. Tables: {', '.join(library.tables)}.")
    _check_numbers(flags)
    table = library.table(flags.table)
    cells = table.choose(_names(flags.rows), _names(flags.columns))
    if not cells:
        raise UsageError(f"reproduce: no number of {table.name} is in those rows and columns.")
    chosen = list({each.name: each for each in cells.values()}.values())
    data, described = _find_data(flags.data, table, chosen, download=not flags.plan)
    setting = _setting(flags, data)
    _check_models(library, chosen)
    from attention_transfer.reproduction.jobs import make_plan
    from attention_transfer.reproduction.results import find_results

    once = table.taught_once(cells)
    plan = make_plan(library, setting, chosen, flags.seeds, once)
    slots = flags.jobs or _side_by_side(len(plan.jobs))
    print_safely(_describe_plan(plan, slots, setting))
    failures = [] if flags.plan else _run(plan, slots, arguments)
    results = find_results(table, cells, setting, described, flags.seeds, once)
    _show(results, flags, arguments)
    if failures:
        raise UsageError(_describe_failures(failures))


def _parser() -> Any:
    parser = verb_parser(
        "reproduce", f"{PROGRAM} reproduce table1 --rows wrn-16-1/wrn-16-2 --seeds 3 --epochs-scale 0.05"
    )
    add = parser.add_argument
    add("table", nargs="?", metavar="TABLE", help="The table; without one, the known ones are listed.")
    add("--rows", help="Rows, with commas between. All if not given.")
    add("--columns", help="Columns, with commas between. All if not given.")
    add("--seeds", type=int, default=5, help="Runs of each number; one of a network that only teaches.")
    add("--epochs-scale", type=float, default=1.0, help="Share of the published epochs; 0.05 is 10 of 200.")
    add("--max-train", type=int, default=None, help="Train on this many images only.")
    add("--data", default=None, help="A folder with the table's data set. Looked for, or downloaded, if not.")
    add("--output", default="runs/reproduce", help="Folder for the runs; what is there is taken as it is.")
    add("--jobs", type=int, default=None, help="Runs side by side. As the machine has room, if not given.")
    add(
        "--views",
        default="auto",
        help='Fixed views of each image; 0 for none; "auto": one an epoch if short.',
    )
    add("--precision", choices=get_args(Precision), default="auto", help="As of `train`.")
    add("--compile", action="store_true", help="As of `train`: pays in long runs.")
    add("--plan", action="store_true", help="Say what would be run, show the table as it stands, and stop.")
    add("--dry-run", dest="plan", action="store_true", help="The same as --plan.")
    add(
        "--record", action="store_true", help="Write what was measured into the files of the recipes' folder."
    )
    add("--recipes", default=None, help="The folder of tables and recipes: reproductions/ of the checkout.")
    return parser


def _check_numbers(flags: Any) -> None:
    for name, value in (("seeds", flags.seeds), ("jobs", flags.jobs), ("max-train", flags.max_train)):
        if value is not None and value < 1:
            raise UsageError(f"reproduce: expected --{name} >= 1, got {value}.")
    if not 0 < flags.epochs_scale <= 1:
        raise UsageError(f"reproduce: expected --epochs-scale above 0 and up to 1, got {flags.epochs_scale}.")
    if flags.views != "auto" and not flags.views.isdigit():
        raise UsageError(f'reproduce: expected --views "auto" or a number, got {flags.views!r}.')


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",")]


def _recipes(given: str | None) -> Path:
    """The folder of recipes, which is part of the repository and not of the package."""
    folder = Path(given) if given else Path(__file__).parents[2] / "reproductions"
    if not folder.is_dir():
        raise UsageError(
            f"reproduce: no folder of recipes at {folder}. Run it in a checkout of the repository, "
            "or pass --recipes DIR."
        )
    return folder


def _find_data(
    given: str | None, table: Table, chosen: list[Reproduction], *, download: bool
) -> tuple[tuple[tuple[str, str], ...], str]:
    """The recipe's fields that name the data, and what these are in words; a look before hours of work."""
    name = chosen[0].recipe.images
    if given is not None and not Path(given).is_dir():
        raise UsageError(f"reproduce: expected a folder with {name} as --data, got {given}, which is none.")
    from attention_transfer.data.loading import find_source
    from attention_transfer.data.named import TORCHVISION

    changes: dict[str, str] = {}
    if given is not None:
        kept = name in TORCHVISION and (Path(given) / TORCHVISION[name][1]).is_dir()
        changes = {"data_root" if kept else "data": str(Path(given).absolute())}
    try:
        source = find_source(changes.get("data", name), changes.get("data_root"), download)
    except FileNotFoundError:
        if given is None and not download:
            return (), f"{name}, which is not here yet"
        raise
    if len(source.classes) != table.classes:
        raise UsageError(
            f"reproduce: {table.name} needs {name}, which has {table.classes} classes, got "
            f"{len(source.classes)} in {source.place}. Pass the folder of {name} as --data."
        )
    return tuple(changes.items()), f"{name}{_encoding(source.splits['train'].content)}"


def _encoding(images: Any) -> str:
    """How encoded images are compressed, which changes pixels."""
    if not hasattr(images, "read"):
        return ""
    lossy = (images.read(0) or b"").startswith(b"\xff\xd8")
    return " as JPEG-compressed images" if lossy else " as losslessly encoded images"


def _setting(flags: Any, data: tuple[tuple[str, str], ...]) -> Setting:
    from attention_transfer.reproduction.setting import Setting

    return Setting(
        output=Path(flags.output).absolute(),
        scale=flags.epochs_scale,
        max_train=flags.max_train,
        data=data,
        views="auto" if flags.views == "auto" else int(flags.views),
        precision=flags.precision,
        compile=flags.compile,
    )


def _check_models(library: Library, chosen: list[Reproduction]) -> None:
    """Models that cannot be built are said before anything is trained."""
    from attention_transfer.models import build_model

    names = {each.recipe.student for each in chosen}
    names |= {library.reproductions[each.teacher].recipe.student for each in chosen if each.teacher}
    for name in sorted(names):
        build_model(name)


def _side_by_side(jobs: int) -> int:
    """As many as the device's memory and the cores have room for."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.cuda.is_available():
        room = torch.cuda.mem_get_info()[0] // GPU_BYTES
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // CPU_BYTES
    else:
        room = cores
    return max(1, min(cores, room, jobs))


def _describe_plan(plan: Plan, slots: int, setting: Setting) -> str:
    from attention_transfer.reproduction.estimate import time_left
    from attention_transfer.reproduction.jobs import CacheBuild

    done = sum(run.finished for run in plan.runs.values())
    lines = [f"{setting.folder}: {done} of {len(plan.runs)} runs of the table are there"]
    if plan.jobs:
        builds = [job for job in plan.jobs if isinstance(job, CacheBuild)]
        lines.append(f"to do, {slots} side by side: {_listing(plan.jobs)}")
        lines.append(time_left(plan.jobs, plan.trainings, slots))
        lines += [_room(builds)] if builds else []
    return "\n".join(lines)


def _listing(jobs: list[Job]) -> str:
    return ", ".join(job.title for job in jobs)


def _room(builds: list[Any]) -> str:
    """What the caches will take of the disk.

    Raises:
        UsageError: if it is more than there is.
    """
    needed = sum(build.bytes for build in builds)
    place = next(each for each in builds[0].key.absolute().parents if each.exists())
    free = shutil.disk_usage(place).free
    text = f"caches: {len(builds)}, about {needed / 1e9:.1f} GB in all, {free / 1e9:.1f} GB are free"
    if needed > free:
        raise UsageError(f"reproduce: {text}. Choose another --output, or pass --views 0 to do without.")
    return text


def _run(plan: Plan, slots: int, arguments: list[str]) -> list[Failure]:
    """Run what is missing, and on Ctrl-C say how to go on."""
    from attention_transfer.reproduction.rehearsals import rehearse_students
    from attention_transfer.reproduction.runner import Runner

    if not plan.jobs:
        return []
    rehearse_students(plan.trainings)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    line = StatusLine()
    runner = Runner(plan.jobs, plan.trainings, slots, max(1, cores // slots), line.print, _shortened(line))
    try:
        failures = runner.run()
    except Interrupted:
        line.clear()
        print_safely(
            f"Stopped; nothing is lost. Go on with: {PROGRAM} reproduce {shlex.join(arguments)}",
            stream=sys.stderr,
        )
        raise
    line.clear()
    return failures


def _shortened(line: StatusLine) -> Callable[[str], None]:
    """Showing no more than fits on the terminal's line."""
    return lambda text: line.show(text[: shutil.get_terminal_size().columns - 1])


def _show(results: Results, flags: Any, arguments: list[str]) -> None:
    from attention_transfer.reproduction.results import as_text, total_time, write_results

    print_safely("\n" + as_text(results))
    print_safely(f"\n{total_time(results)}")
    if flags.plan:
        return
    for path in write_results(results):
        print_safely(path)
    if flags.record:
        from attention_transfer.reproduction.record import record

        for path in record(results, _recorded_command(flags, arguments), _recipes(flags.recipes)):
            print_safely(f"recorded: {path}")


def _recorded_command(flags: Any, arguments: list[str]) -> str:
    """The call without what belongs to this machine."""
    kept, skip = [], False
    for word in arguments:
        name = word.partition("=")[0]
        if skip:
            skip = False
        elif name in ("--output", "--jobs", "--recipes", "--record"):
            skip = "=" not in word and name != "--record"
        else:
            kept.append(word)
    if flags.data:
        kept = ["DIR" if word == flags.data else word for word in kept]
        kept = [word if not word.startswith("--data=") else "--data=DIR" for word in kept]
    return f"{PROGRAM} reproduce {' '.join(kept)}"


def _describe_failures(failures: list[Failure]) -> str:
    first = failures[0]
    more = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
    return f"reproduce: {first.job.title}{more} failed: {first.reason}. Log: {first.job.log}"
