"""The trainings and caches that a table takes, as jobs that are processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean

from attention_transfer._errors import InputError
from attention_transfer._files import write_atomically
from attention_transfer.cache import Cache
from attention_transfer.models.weights import file_fingerprint
from attention_transfer.reproduction.setting import Setting, differences
from attention_transfer.reproduction.tables import Library, Reproduction
from attention_transfer.runs.recipe import Recipe, cache_fields, flag_of
from attention_transfer.runs.run import Run

CACHE_SHARE = 0.4  # of a teacher's training epoch, that a view of its cache takes: forward only


@dataclass(frozen=True)
class Job:
    """One process's work: a training, or the building of a cache.

    Attributes:
        key: the folder that it fills; one job a folder.
        kind: runs of one kind take equally long: the reproduction's name, or the cache's.
        model: what is trained, for a guess where the kind has not been measured.
        epochs: how much work it is.
        needs: keys of the jobs that come before.
    """

    key: Path
    title: str
    kind: str
    model: str
    epochs: int
    needs: tuple[Path, ...] = field(default=(), repr=False)

    @property
    def log(self) -> Path:
        return self.key.with_name(f"{self.key.name}.log")

    @property
    def lock(self) -> Path:
        return self.key.with_name(f"{self.key.name}.lock")

    def arguments(self) -> list[str]:
        """What the command is called with, as things stand now."""
        raise NotImplementedError

    def done(self) -> bool:
        raise NotImplementedError

    def outcome(self) -> str:
        """What has come out, for a line."""
        raise NotImplementedError

    def epochs_done(self) -> int:
        raise NotImplementedError


@dataclass(frozen=True)
class Training(Job):
    """A run of `train`, begun or gone on with."""

    recipe: Recipe = field(default_factory=Recipe, repr=False)

    @property
    def run(self) -> Run:
        return Run(self.key)

    def arguments(self) -> list[str]:
        if self.run.exists and self.run.holds_work:
            return ["train", "--resume", str(self.key)]
        path = self.key.with_name(f"{self.key.name}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.recipe.to_yaml())
        return ["train", "--config", str(path), "--output", str(self.key)]

    def done(self) -> bool:
        return self.run.finished

    def outcome(self) -> str:
        return f"test error {self.run.result['test_error']:.2f} %"

    def epochs_done(self) -> int:
        return len(self.run.read_metrics())

    def seconds_per_epoch(self) -> float | None:
        """As measured, with all that a run takes besides its steps once it has ended."""
        if self.run.finished:
            return float(self.run.result["wall_seconds"]) / self.epochs
        rows = self.run.read_metrics()
        return fmean(float(row["seconds"]) for row in rows) if rows else None


@dataclass(frozen=True)
class CacheBuild(Job):
    """A run of `cache build`, which goes on with what is there."""

    recipe: Recipe = field(default_factory=Recipe, repr=False)

    def arguments(self) -> list[str]:
        words = ["cache", "build", "-o", str(self.key), "--views", str(self.epochs)]
        for name in cache_fields():
            value = getattr(self.recipe, name)
            if value not in (None, "auto"):
                text = str(value).lower() if isinstance(value, bool) else str(value)
                words += [flag_of(name), text]
        return words

    def done(self) -> bool:
        try:
            cache = Cache.read(self.key)
            cache.require(self.epochs)
        except (FileNotFoundError, ValueError):
            return False
        return True

    def outcome(self) -> str:
        return f"cache of {self.epochs} views"

    def epochs_done(self) -> int:
        return 0

    @property
    def bytes(self) -> int:
        """How large it is about to be, two bytes a map's pixel, if the images are 32 pixels high and wide."""
        count = self.recipe.max_train or 50_000
        return count * self.epochs * 2 * (32 * 32 + 16 * 16 + 8 * 8 + 100)


@dataclass(frozen=True)
class Plan:
    """All runs of some cells, and the jobs that are left."""

    runs: dict[tuple[str, int], Run]
    """{(reproduction, seed): its run folder} of all that the cells show"""
    trainings: list[Training]
    """all of them, finished ones too, and those of the teachers"""
    jobs: list[Job]
    """what is left, in the order in which it is begun"""


def make_plan(
    library: Library,
    setting: Setting,
    chosen: list[Reproduction],
    seeds: int,
    once: frozenset[str] = frozenset(),
) -> Plan:
    """What is there and what is left: teachers first, then seed by seed; those in `once` with seed 0 alone.

    Raises:
        ValueError: if a run folder holds a run of another recipe.
    """
    asked = [(each.name, seed) for each in chosen for seed in range(1 if each.name in once else seeds)]
    wanted = dict.fromkeys(asked)
    for each in chosen:
        _add_teacher(library, each, wanted)
    caches = _caches(library, setting, list(wanted))
    trainings = {
        (name, seed): _training(library, setting, name, seed, caches.get(name)) for name, seed in wanted
    }
    for training in trainings.values():
        _check_there(training)
    _check_teachers(library, setting, trainings)
    left = sorted((key for key in trainings if not trainings[key].done()), key=_order(library, trainings))
    builds = [build for build in caches.values() if not build.done()]
    needed = {need for key in left for need in trainings[key].needs}
    builds = list({build.key: build for build in builds if build.key in needed}.values())
    first = [trainings[key] for key in left if _teaches(library, *key)]
    rest = [trainings[key] for key in left if not _teaches(library, *key)]
    shown = {key: setting.run(*key) for key in asked}
    return Plan(shown, list(trainings.values()), [*first, *builds, *rest])


def _add_teacher(library: Library, each: Reproduction, wanted: dict[tuple[str, int], None]) -> None:
    while each.teacher is not None:
        each = library.reproductions[each.teacher]
        wanted[each.name, 0] = None


def _teaches(library: Library, name: str, seed: int) -> bool:
    return seed == 0 and library.is_teacher(name)


def _order(
    library: Library, trainings: dict[tuple[str, int], Training]
) -> Callable[[tuple[str, int]], tuple[bool, int, int]]:
    """Seed by seed, so that an unfinished table holds pairs; last, teachers for their spread alone."""
    place = {key: i for i, key in enumerate(trainings)}
    return lambda key: (library.is_teacher(key[0]) and key[1] > 0, key[1], place[key])


def _caches(library: Library, setting: Setting, wanted: list[tuple[str, int]]) -> dict[str, CacheBuild]:
    """{reproduction: the cache that it learns from}, where two unfinished runs or more want the same."""
    readers: dict[Path, list[str]] = {}
    for name, seed in sorted(wanted, key=lambda key: not library.reproductions[key[0]].recipe.reads_maps):
        each = library.reproductions[name]
        if setting.can_cache(library, each) and not setting.run(name, seed).finished:
            readers.setdefault(_shared(setting, each, readers), []).append(name)
    found: dict[str, CacheBuild] = {}
    for path, names in readers.items():
        build = _build(library, setting, library.reproductions[names[0]], path)
        if len(names) > 1 or build.done():
            found |= dict.fromkeys(names, build)
    return found


def _shared(setting: Setting, each: Reproduction, planned: dict[Path, list[str]]) -> Path:
    """The cache for its maps; without maps, any of its teacher that is planned or there."""
    if not each.recipe.reads_maps:
        for path in planned:
            if path.name.startswith(f"{each.teacher}-p"):
                return path
    return setting.cache(each)


def _build(library: Library, setting: Setting, each: Reproduction, path: Path) -> CacheBuild:
    assert each.teacher is not None
    teacher = setting.run(each.teacher, 0)
    recipe = setting.recipe(library, each, 0)
    p, _, mapping = path.name.rpartition("-p")[2].partition("-")
    energy = {"p": float(p), "mapping": mapping}
    recipe = Recipe.from_mapping({**asdict(recipe), **energy, "teacher": str(teacher.folder.absolute())})
    model = library.reproductions[each.teacher].recipe.student
    views = setting.views_of(library, each) or 1
    needs = () if teacher.finished else (teacher.folder,)
    return CacheBuild(path, path.name, path.name, model, views, needs, recipe)


def _training(library: Library, setting: Setting, name: str, seed: int, cache: CacheBuild | None) -> Training:
    each = library.reproductions[name]
    recipe = setting.recipe(library, each, seed, cache=cache.key.absolute() if cache else None)
    needs = []
    if each.teacher is not None:
        needs.append(setting.run(each.teacher, 0).folder)
    if cache is not None:
        needs.append(cache.key)
    folder = setting.run(name, seed).folder
    return Training(folder, f"{name} seed {seed}", name, recipe.student, recipe.epochs, tuple(needs), recipe)


def _check_teachers(library: Library, setting: Setting, trainings: dict[tuple[str, int], Training]) -> None:
    """Students that are there have learnt from the very teacher that is there."""
    found: dict[str, str] = {}
    for (name, _), job in trainings.items():
        teacher = library.reproductions[name].teacher
        if teacher is None or not job.run.finished or not setting.run(teacher, 0).finished:
            continue
        weights = setting.run(teacher, 0).student_weights
        if teacher not in found:
            found[teacher] = file_fingerprint(weights)
        theirs = job.run.result.get("teacher_fingerprint")
        if theirs not in (None, found[teacher]):
            raise InputError(
                f"reproduce: {job.key} learnt from a teacher of fingerprint {theirs}, got {found[teacher]} "
                f"in {weights}. Move the student's run away, or put its teacher back."
            )


def _check_there(job: Training) -> None:
    if not (job.run.exists and (job.run.finished or job.run.holds_work)):
        return
    if others := differences(job.recipe, job.run.recipe):
        raise InputError(
            f"reproduce: {job.key} holds a run of another recipe ({'; '.join(others)}). "
            "Move it away, or pass another --output."
        )
