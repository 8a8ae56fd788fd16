"""The demo: a teacher, then a small student alone and with attention transfer, on real digits, in minutes.

It is a handful of recipes, each trained by `train` as any other; finished runs are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from attention_transfer.runs.recipe import Recipe
from attention_transfer.runs.run import Run
from attention_transfer.training.fit import resume, train

SEEDS = (0, 1, 2, 3, 4)
NAMES: dict[str, str] = {"none": "student alone", "at": "student with attention transfer"}

TEACHER = Recipe(
    student="wrn-10-2",
    teacher=None,
    method="none",
    data="mnist-5k",
    validation=0.0,
    epochs=5,
    schedule="one-cycle",
    lr=0.1,
    batch_size=64,
    precision="32-true",  # not what suits the machine; the number of threads still shows in some numbers
)
STUDENT = replace(TEACHER, student="wrn-10-1", max_train=200, epochs=30, batch_size=32)


@dataclass(frozen=True)
class DemoRuns:
    """The teacher's run, and the students' by method, a run a seed."""

    teacher: Run
    students: dict[str, list[Run]]


def run(
    folder: Path, *, overwrite: bool = False, say: Callable[[str], None], progress: Callable[[str], None]
) -> DemoRuns:
    """Train what is not there yet.

    Args:
        folder: holds a run folder for each training.
        overwrite: start over.
        say: takes a line for each finished run.
        progress: takes each epoch's line.

    Raises:
        FileExistsError: if a run of another recipe is where one is to be trained.
        Interrupted, OSError, ValueError: as `train`.
    """
    total = 1 + len(NAMES) * len(SEEDS)
    count = 0

    def get(recipe: Recipe, name: str) -> Run:
        nonlocal count
        count += 1
        title = f"[{count}/{total}] {name}"
        done = _train_or_reuse(recipe, overwrite, lambda line: progress(f"{title}: {line.splitlines()[0]}"))
        say(f"{title}: test error {done.result['test_error']:.1f} %, {done.result['wall_seconds']:.0f} s")
        return done

    teacher = get(replace(TEACHER, output=str(folder / "teacher")), f"teacher {TEACHER.student}")
    students: dict[str, list[Run]] = {method: [] for method in NAMES}
    for seed in SEEDS:
        for method, name in NAMES.items():
            recipe = student_recipe(folder, method, seed)
            students[method].append(get(recipe, f"{name}, seed {seed}"))
    return DemoRuns(teacher, students)


def student_recipe(folder: Path, method: str, seed: int) -> Recipe:
    """The recipe of one student; those of a seed differ in the method alone."""
    teacher = None if method == "none" else str(folder / "teacher")
    return replace(
        STUDENT, method=method, teacher=teacher, seed=seed, output=str(folder / f"{method}-{seed}")
    )


def _train_or_reuse(recipe: Recipe, overwrite: bool, say: Callable[[str], None]) -> Run:
    """A finished run of the very same recipe as it is, an interrupted one continued, else a new one.

    Raises:
        FileExistsError: if there is a run of another recipe, which is not to be overwritten.
    """
    run = Run(recipe.folder.absolute())
    if overwrite or not run.exists:
        return train(recipe, overwrite=overwrite, say=say)
    # guard: demo-of-other-settings
    if differences := run.recipe.differences(recipe.resolved()):
        raise FileExistsError(
            f"demo: {run.folder} holds another run, with {', '.join(differences)} of its own, so it stays. "
            "Pass another --output, or --overwrite."
        )
    return resume(run.folder, say=say)
