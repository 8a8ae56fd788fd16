"""What would stop students of a table once their teachers are trained, found before anything is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from attention_transfer._errors import InputError
from attention_transfer.reproduction.jobs import Training
from attention_transfer.runs.recipe import IMAGES, SOURCE, Recipe, fields_of
from attention_transfer.training.build import build_student, load_splits
from attention_transfer.training.rehearsal import rehearse


def rehearse_students(trainings: Iterable[Training]) -> None:
    """Take a first step, all but the update, of one student of each kind that none has begun.

    Raises:
        ValueError: naming the training, for what would end it at its first step.
    """
    splits, known = None, None
    for job, teacher in _unbegun(trainings):
        if (images := _images(job.recipe)) != known:
            splits, known = load_splits(job.recipe), images
        assert splits is not None
        try:
            rehearse(job.recipe, splits, build_student(job.recipe, splits), teacher.recipe)
        except ValueError as error:
            raise InputError(f"reproduce: {job.title} cannot learn from {teacher.title}: {error}") from None


def _unbegun(trainings: Iterable[Training]) -> Iterator[tuple[Training, Training]]:
    """A student of each kind that has not been begun, with its teacher."""
    jobs = {job.key: job for job in trainings}
    begun = {job.kind for job in jobs.values() if job.done() or job.run.holds_work}
    for job in jobs.values():
        teachers = [jobs[key] for key in job.needs if key in jobs]
        if teachers and job.kind not in begun:
            begun.add(job.kind)
            yield job, teachers[0]


def _images(recipe: Recipe) -> list[object]:
    """What the images are chosen by."""
    seed = recipe.seed if recipe.split_seed is None else recipe.split_seed
    return [seed, *(getattr(recipe, name) for name in fields_of(SOURCE, IMAGES))]
