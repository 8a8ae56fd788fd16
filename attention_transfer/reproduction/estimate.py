"""How long it will take, from epochs that have been measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median

from attention_transfer._tables import duration
from attention_transfer.reproduction.jobs import CACHE_SHARE, Job, Training


def time_left(unfinished: Sequence[Job], trainings: Iterable[Training], slots: int) -> str:
    """ "about 2 h 10 min left"; "at least" where a kind of run has not been measured yet; or "estimating".

    A kind that has not been measured is taken to be as fast as others of the same model. What runs side by
    side was measured side by side.
    """
    if not unfinished:
        return "nothing left"
    kinds, models = _measured(trainings)
    times, guessed = [], False
    for job in unfinished:
        seconds = kinds.get(job.kind) if isinstance(job, Training) else None
        if seconds is None:
            guessed, seconds = True, models.get(job.model)
        if seconds is None:
            return "estimating the time left"
        share = 1.0 if isinstance(job, Training) else CACHE_SHARE
        times.append(seconds * share * max(0, job.epochs - job.epochs_done()))
    left = max(sum(times) / max(1, min(slots, len(times))), max(times))
    return f"{'at least' if guessed else 'about'} {duration(left)} left"


def _measured(trainings: Iterable[Training]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds an epoch, by kind and by model."""
    kinds, models = defaultdict(list), defaultdict(list)
    for each in trainings:
        if seconds := each.seconds_per_epoch():
            kinds[each.kind].append(seconds)
            models[each.model].append(seconds)
    return {k: median(v) for k, v in kinds.items()}, {k: median(v) for k, v in models.items()}
