"""`attention-transfer caffe train`."""

from __future__ import annotations

import csv
import io
import math
import shlex
import signal
import sys
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from attention_transfer._colours import print_safely
from attention_transfer._files import open_to_append, write_atomically
from attention_transfer._locks import locked
from attention_transfer._reading import parse_csv, read_text
from attention_transfer._tables import duration
from attention_transfer.cli.caffe import VERBS
from attention_transfer.cli.output import StatusLine
from attention_transfer.cli.parsing import PROGRAM, UsageError, parse, verb_parser
from attention_transfer.runs.run import Interrupted

if TYPE_CHECKING:
    from torch import Tensor

    from attention_transfer.caffe import Solver

LARGEST_LOG = 1 << 30  # bytes
SECONDS = 1.0  # between two lines of progress, and between two additions to the log


def run(arguments: list[str]) -> None:
    flags = parse(_parser(), arguments)
    if flags.weights and flags.snapshot:
        raise UsageError(
            "caffe train: expected --weights to start from or --snapshot to go on from, got both. "
            "A snapshot brings its weights."
        )
    if flags.max_iter is not None and flags.max_iter < 1:
        raise UsageError(f"caffe train: expected --max-iter of 1 or more, got {flags.max_iter}.")
    from attention_transfer.caffe import Solver

    weights = [name.strip() for name in flags.weights.split(",")] if flags.weights else None
    solver = Solver(flags.solver, weights, snapshot=flags.snapshot)
    if flags.max_iter:
        solver.param.max_iter = flags.max_iter
    _say_device(solver)
    if flags.snapshot and solver.iteration >= solver.param.max_iter:
        print_safely(f"{flags.snapshot} is of iteration {solver.iteration:,}; nothing is left to do.")
        return
    prefix = solver.snapshot_prefix
    path = flags.log or prefix.with_name(f"{prefix.name}_log.csv")
    # guard: one-training-a-prefix, one-training-a-log
    with _alone(prefix, "the snapshots", "snapshot_prefix"), _alone(path, "the log", "--log"):
        _Training(solver, _Log(path, solver), _resuming(flags)).run()


def _parser() -> Any:
    usage = f"{PROGRAM} caffe train --solver solver.prototxt --weights start.caffemodel"
    parser = verb_parser("caffe train", usage, VERBS["train"])
    parser.add_argument("--solver", type=Path, required=True, help="The solver's prototxt.")
    parser.add_argument(
        "--weights", help="Weights to start from, by commas, later ones over earlier ones: .caffemodel files."
    )
    parser.add_argument("--snapshot", type=Path, help="Go on from this .solverstate.")
    parser.add_argument(
        "--log", type=Path, help="CSV with a row for each iteration; PREFIX_log.csv beside the snapshots."
    )
    parser.add_argument("--max-iter", type=int, help="In place of the prototxt's max_iter, for poly too.")
    return parser


def _alone(path: Path, what: str, remedy: str) -> AbstractContextManager[None]:
    """Keep other trainings off files whose names begin with `path`."""
    message = (
        f"caffe train: {{holder}} is writing {what} {path}. "
        f"Wait until it has ended, or give another {remedy}."
    )
    return locked(path.parent, message, f".{path.name}.lock")


def _say_device(solver: Solver) -> None:
    if solver.device.type == "cuda":
        import torch

        print_safely(f"training on {torch.cuda.get_device_name(solver.device)}")
    elif solver.param.solver_mode == solver.param.GPU:
        print_safely("solver_mode is GPU, but no GPU is here: training on the CPU")


def _resuming(flags: Any) -> list[str]:
    """The command that goes on with this training, but for the snapshot."""
    command = [PROGRAM, "caffe", "train", "--solver", str(flags.solver)]
    command += ["--log", str(flags.log)] if flags.log else []
    return command + (["--max-iter", str(flags.max_iter)] if flags.max_iter else [])


class _Training:
    """Solves, with a line of progress, a log, and a snapshot when it is stopped."""

    def __init__(self, solver: Solver, log: _Log, command: list[str]) -> None:
        self.solver, self.log, self.command = solver, log, command
        self.line = StatusLine()
        self.received: int | None = None
        self._former: dict[int, Any] = {}
        self._first, self._started = solver.iteration, time.perf_counter()
        self._shown = self._started
        solver.watch, solver.say = self._after_iteration, self.line.print

    def run(self) -> None:
        self._catch_signals()
        try:
            self.solver.solve()
            self.log.add_last_test()
            self.log.flush()
        finally:
            self.line.clear()
            for number, handler in self._former.items():
                signal.signal(number, handler)
        print_safely(f"log: {self.log.path}")
        weights = self.solver.snapshot_path(".caffemodel")
        if weights.is_file():
            print_safely(f"weights: {weights}")

    def _after_iteration(self, solver: Solver) -> None:
        self.log.add()
        now = time.perf_counter()
        if now - self._shown >= SECONDS or solver.snapshot_due or self.received:
            self.log.flush()  # before a snapshot: it also looks for losses that are no numbers
            self._show(now)
        if self.received:
            self._stop()

    def _show(self, now: float) -> None:
        self._shown = now
        done, most = self.solver.iteration, self.solver.param.max_iter
        rate = (done - self._first) / (now - self._started)
        self.line.show(
            f"iteration {done:,} of {most:,}  loss {self.solver.smoothed_loss:.4g}  "
            f"learning rate {self.solver.learning_rate:.3g}  {rate:.3g} iterations/s  "
            f"{duration((most - done) / rate)} left"
        )

    def _stop(self) -> None:
        path = self.solver.snapshot()
        self.line.clear()
        command = shlex.join([*self.command, "--snapshot", str(path)])
        print_safely(f"\nStopped; nothing is lost. Go on with: {command}", stream=sys.stderr)
        raise Interrupted(self.received or signal.SIGINT)

    def _catch_signals(self) -> None:
        """Let Ctrl-C and SIGTERM wait for the end of an iteration; the second one stops at once."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            signal.signal(number, self._former[number])
            signal.raise_signal(number)
        self.received = number


class _Log:
    """A CSV with a row for each iteration, written as the training goes.

    A training that goes on from a snapshot keeps the rows before it, where they have the same columns; any
    other begins anew.
    """

    def __init__(self, path: Path, solver: Solver) -> None:
        self.path, self._solver = path, solver
        self._columns = ["iteration", "learning_rate", "loss", *self._train_columns(), *self._test_columns()]
        self._waiting: list[dict[str, int | float | Tensor]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows_before(solver.iteration))
        write_atomically(path, text.getvalue())

    def add(self) -> None:
        """Note the iteration last done, with the test before it."""
        solver = self._solver
        row: dict[str, Any] = {"iteration": solver.iteration - 1, "learning_rate": solver.learning_rate}
        row |= {f"train/{name}" if name else "loss": tensor for name, tensor in solver.tensors.items()}
        self._waiting.append(row | self._scores(solver.iteration - 1))

    def add_last_test(self) -> None:
        """Note a test after the last iteration."""
        if scores := self._scores(self._solver.iteration):
            self._waiting.append({"iteration": self._solver.iteration, **scores})

    def flush(self) -> None:
        """Write what is noted.

        Raises:
            FloatingPointError: if a loss is no finite number.
            OSError: if it cannot be written.
        """
        waiting, self._waiting = self._waiting, []
        rows = [{k: _text(v) for k, v in row.items() if k in self._columns} for row in waiting]
        with open_to_append(self.path) as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerows(rows)
        for row in waiting:
            if "loss" in row and not math.isfinite(row["loss"]):
                raise FloatingPointError(
                    f"caffe train: expected a finite loss, got {float(row['loss'])} at iteration "
                    f"{row['iteration']}. Lower base_lr, or set clip_gradients; the log is {self.path}."
                )

    def _rows_before(self, iteration: int) -> list[dict[str, str]]:
        if iteration == 0 or not self.path.is_file():
            return []
        try:
            columns, rows = parse_csv(read_text(self.path, LARGEST_LOG))
        except ValueError:  # the end of a row that a kill cut off, or another file
            columns, rows = [], []
        if columns != self._columns:
            return []
        return [row for row in rows if row["iteration"].isdecimal() and int(row["iteration"]) < iteration]

    def _train_columns(self) -> list[str]:
        net = self._solver.net
        names = dict.fromkeys([*net.outputs, *net.loss_weights])
        return [f"train/{name}" for name in names if math.prod(net.shapes[name]) == 1]

    def _test_columns(self) -> list[str]:
        columns = []
        for index, net in enumerate(self._solver.test_nets):
            names = [name for name in net.outputs if math.prod(net.shapes[name]) == 1]
            names += ["total_loss"] if self._solver.param.test_compute_loss else []
            columns += [f"{_test_name(index)}/{name}" for name in names]
        return columns

    def _scores(self, iteration: int) -> dict[str, Any]:
        tested, scores = self._solver.tested
        if tested != iteration:
            return {}
        pairs = enumerate(scores)
        return {f"{_test_name(index)}/{name}": value for index, net in pairs for name, value in net.items()}


def _test_name(index: int) -> str:
    return f"test{index}" if index else "test"


def _text(value: Any) -> str:
    return str(value) if isinstance(value, int) else f"{float(value):.8g}"
