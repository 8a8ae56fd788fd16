"""Running jobs side by side: what is ready starts, one process a job, none twice, and all stop together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attention_transfer._files import open_to_append
from attention_transfer._locks import InUseError, is_locked, locked
from attention_transfer._tables import duration
from attention_transfer.reproduction.estimate import time_left
from attention_transfer.reproduction.jobs import Job, Training
from attention_transfer.runs.run import Interrupted

POLL_SECONDS = 0.2
LOOK_AGAIN_SECONDS = 5.0  # at folders in which another process trains
SAVING_SECONDS = 120.0  # that a stopped training may take to finish its step and save

Say = Callable[[str], None]


@dataclass(frozen=True)
class Failure:
    """A job that came to no end."""

    job: Job
    reason: str


@dataclass
class _Started:
    job: Job
    process: subprocess.Popen[bytes]
    since: float
    held: ExitStack
    """the job's lock, which keeps other reproductions off until the process has that of its folder"""


@dataclass
class Runner:
    """Runs jobs, `slots` at a time.

    Attributes:
        jobs: in the order in which they are begun, as far as what they need is there.
        trainings: all runs, finished ones too: the estimate is measured on them.
        threads: of each process, where OMP_NUM_THREADS does not say it already.
        say: takes a line for each job that ends.
        show: takes the line of what is going on, in place of the one before.
    """

    jobs: Sequence[Job]
    trainings: Sequence[Training]
    slots: int
    threads: int
    say: Say
    show: Say
    failures: list[Failure] = field(default_factory=list)
    _running: list[_Started] = field(default_factory=list)
    _pending: list[Job] = field(default_factory=list)
    _elsewhere: dict[Path, float] = field(default_factory=dict)
    _ended: int = 0
    _shown: float = 0.0

    def run(self) -> list[Failure]:
        """Run everything, and return what failed; what needs it is left out.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, when all have saved and stopped.
        """
        self._pending = list(self.jobs)
        with _noted_signals() as received:
            try:
                while self._pending or self._running:
                    self._reap()
                    self._drop_the_hopeless()
                    self._start_ready()
                    self._report()
                    if received:
                        raise Interrupted(received[0])
                    time.sleep(POLL_SECONDS)
            finally:
                self._stop(received)
        return self.failures

    def _start_ready(self) -> None:
        for job in list(self._pending):
            if len(self._running) >= self.slots:
                return
            if self._is_ready(job) and self._start(job):
                self._pending.remove(job)

    def _is_ready(self, job: Job) -> bool:
        unfinished = {other.key for other in self._pending} | {each.job.key for each in self._running}
        looked = self._elsewhere.get(job.key, 0.0)
        return not unfinished & set(job.needs) and time.monotonic() - looked >= LOOK_AGAIN_SECONDS

    def _start(self, job: Job) -> bool:
        """Start it, unless it is done by now or another process is at it; whether it is off the list."""
        with ExitStack() as held:
            try:
                held.enter_context(locked(job.lock.parent, "", job.lock.name))
                elsewhere = not job.done() and is_locked(job.key)
            except InUseError:
                elsewhere = True
            if elsewhere:
                self._elsewhere[job.key] = time.monotonic()
                return False
            self._elsewhere.pop(job.key, None)
            if job.done():
                self._end(job, "trained by another process")
                return True
            self._running.append(_Started(job, self._spawn(job), time.monotonic(), held.pop_all()))
        return True

    def _spawn(self, job: Job) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", f"{__package__}.child", str(os.getpid()), *job.arguments()]
        environment = {"OMP_NUM_THREADS": str(self.threads), **os.environ}
        environment["PYTHONSAFEPATH"] = "1"  # -m would look for modules in the current folder first
        with open_to_append(job.log) as log:
            return subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a Ctrl-C on the terminal is for the parent, who tells them once
            )

    def _reap(self) -> None:
        for each in [each for each in self._running if each.process.poll() is not None]:
            self._running.remove(each)
            each.held.close()
            seconds = duration(time.monotonic() - each.since)
            if each.process.returncode == 0 and each.job.done():
                self._end(each.job, f"{each.job.outcome()}, {seconds}")
            else:
                self._fail(each.job, last_error(each.job.log, each.process.returncode))

    def _end(self, job: Job, what: str) -> None:
        self._ended += 1
        self.say(f"[{self._ended}/{len(self.jobs)}] {job.title}: {what}; {self._left()}")

    def _fail(self, job: Job, reason: str) -> None:
        self._ended += 1
        self.failures.append(Failure(job, reason))
        self.say(f"[{self._ended}/{len(self.jobs)}] {job.title} failed: {reason} (log: {job.log})")

    def _drop_the_hopeless(self) -> None:
        """Jobs whose teacher or cache failed."""
        failed = {failure.job.key: failure.job for failure in self.failures}
        for job in [job for job in self._pending if failed.keys() & set(job.needs)]:
            self._pending.remove(job)
            needed = next(failed[key] for key in job.needs if key in failed)
            self._fail(job, f"it needs {needed.title}, which failed")

    def _report(self) -> None:
        if time.monotonic() - self._shown < 1.0:
            return
        self._shown = time.monotonic()
        now = [
            f"{each.job.title} ({each.job.epochs_done()}/{each.job.epochs} epochs)"
            if isinstance(each.job, Training)
            else each.job.title
            for each in self._running
        ]
        now += [f"waiting for another process: {key.parent.name} {key.name}" for key in self._elsewhere]
        self.show(f"[{self._ended}/{len(self.jobs)}] {', '.join(now)}; {self._left()}")

    def _left(self) -> str:
        unfinished = [*(each.job for each in self._running), *self._pending]
        return time_left(unfinished, self.trainings, self.slots)

    def _stop(self, received: list[int]) -> None:
        """Tell all to save and stop, once, and wait; on a second signal, or after long, kill."""
        if not self._running:
            return
        self.say(f"stopping: {len(self._running)} trainings finish their step and save")
        for each in self._running:
            each.process.terminate()
        until, count = time.monotonic() + SAVING_SECONDS, len(received)
        for each in self._running:
            while each.process.poll() is None:
                if time.monotonic() > until or len(received) > count:
                    each.process.kill()
                time.sleep(POLL_SECONDS / 4)


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM as a list that grows, for a loop to look at."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)

    former = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def last_error(log: Path, status: int) -> str:
    """The last line that says what went wrong."""
    if status < 0:
        return f"ended by signal {-status}"
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("attention-transfer: ")]
    found = own[-1:] or lines[-1:] or ["nothing was said"]
    return f"{found[0].removeprefix('attention-transfer: ')} (exit status {status})"
