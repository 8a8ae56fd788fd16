"""A whole training step: what the teacher, the term and the cache add to the student alone.

All contenders of a round train their own copy of the student on the same batch, with the same settings. How
this project's defaults fare against torchdistill's is measured in processes of their own, see `defaults`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attention_transfer as at
from attention_transfer._extras import require
from attention_transfer._memory import keep_freed_memory
from benchmarks import contenders, defaults
from benchmarks.cached import readings_from_disk
from benchmarks.kernels import not_measured
from benchmarks.measuring import (
    LAYOUTS,
    Run,
    Samples,
    Stopwatch,
    allocated_by,
    allocator,
    dtype_name,
    interleave,
)
from benchmarks.names import CACHED, LIVE, NO_TERM, STUDENT, TAPPED, TEACHER, TERM_ALONE, TORCHDISTILL
from benchmarks.rows import Results, Row
from benchmarks.session import Session

LAYOUT = "channels-last"  # as the command trains
DTYPES = [torch.float32, torch.bfloat16]
OPTIMIZER = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}

Step = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """Models and a batch."""

    student: str
    teacher: str
    batch: int
    size: int
    classes: int
    rounds: tuple[int, int]
    seconds: float

    @property
    def name(self) -> str:
        names = f"{self.student} from {self.teacher}".replace("torchvision:", "")
        return f"{names}, {self.batch}x3x{self.size}x{self.size}"

    def models(self) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        student, teacher = (
            at.build_model(name, num_classes=self.classes) for name in (self.student, self.teacher)
        )
        return student, teacher.requires_grad_(False).eval()

    def images_and_labels(self, device: torch.device) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, 3, self.size, self.size, generator=generator)
        labels = torch.randint(self.classes, (self.batch,), generator=generator)
        return images.to(device), labels.to(device)


SETTINGS = {
    "wrn": Setting("wrn-16-1", "wrn-16-2", 128, 32, 10, rounds=(12, 60), seconds=25),
    "resnet": Setting(
        "torchvision:resnet18", "torchvision:resnet34", 16, 224, 1000, rounds=(7, 60), seconds=25
    ),
}
QUICK = {"tiny": Setting("wrn-10-1", "wrn-10-2", 4, 16, 10, rounds=(2, 2), seconds=0)}


def settings(*, quick: bool) -> dict[str, Setting]:
    return QUICK if quick else SETTINGS


def run(results: Results, session: Session) -> None:
    """Measure each setting in float32 and under bfloat16 autocast, then the defaults of both projects."""
    keep_freed_memory()
    for name, setting in settings(quick=session.quick).items():
        for dtype in DTYPES[: 1 if session.quick else None]:
            case = {"benchmark": "step", "shape": setting.name, "dtype": dtype_name(dtype)}
            if not results.has(session.device, **case):
                session.status(f"step: {setting.name}, {dtype_name(dtype)}")
                results.append(measure(setting, dtype, session), session.device)
                session.say(f"step: {setting.name}, {dtype_name(dtype)}: {summary(results.rows)}")
        defaults.run(name, setting.name, results, session)


def measure(setting: Setting, dtype: torch.dtype, session: Session) -> list[Row]:
    """Rows of one setting: times, peak memory, and the ratios that the targets speak of."""
    bench = Bench(setting, dtype, session.device)
    steps, unmeasured = _made(bench)
    runs = {name: _timed(step) for name, step in steps.items()} | {TERM_ALONE: bench.term_alone()}
    samples = interleave(
        runs,
        session.device,
        seconds=setting.seconds,
        rounds=setting.rounds,
        evict_bytes=0,  # a step leaves nothing of the one before in the caches
        progress=lambda text: session.status(f"step: {setting.name}, {dtype_name(dtype)}: {text}"),
    )
    common = {
        "benchmark": "step",
        "shape": setting.name,
        "dtype": dtype_name(dtype),
        "layout": LAYOUT,
        "form": "code",
        "allocator": allocator(session.device),
    }
    rows = [
        _row("step", name, samples, common, allocated_by(session.device, step)[0])
        for name, step in steps.items()
    ]
    rows.append(_row("term", TERM_ALONE, samples, common))
    rows += [Row(op="step", backend=name, note=note, **common) for name, note in unmeasured.items()]
    comparisons = [
        (LIVE, (STUDENT, TEACHER)),
        (LIVE, (STUDENT,)),
        (CACHED, (STUDENT,)),
        (TORCHDISTILL, (LIVE,)),
    ]
    rows += [_ratio(name, against, samples, common) for name, against in comparisons if name in runs]
    rows += shares(samples, common)
    return [*rows, extra_memory(rows, bench.tapped_bytes, common)]


def _made(bench: Bench) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps of all contenders, and why some cannot be made."""
    steps, unmeasured = {}, {}
    for name in bench.makers:
        try:
            steps[name] = bench.step(name)
        except ImportError as error:
            unmeasured[name] = not_measured(error)
    return steps, unmeasured


def _timed(step: Step) -> Run:
    def run(watch: Stopwatch) -> None:
        with watch("step"):
            step()

    return run


def _row(op: str, name: str, samples: Samples, common: dict[str, str], peak: int | None = None) -> Row:
    return Row(op=op, backend=name, bytes=peak, **samples.figures("step", name), **common)


def _ratio(name: str, against: Sequence[str], samples: Samples, common: dict[str, str]) -> Row:
    figures = {**samples.figures("step", name), **samples.ratio("step", name, *against)}
    return Row(op="step", backend=name, **figures, **common)


def shares(samples: Samples, common: dict[str, str]) -> list[Row]:
    """The term's share of the live step, seen in two ways: by what leaving it out saves, and by itself."""
    live = samples.of("step", LIVE)
    found = {
        "share, by leaving it out": 1 - samples.of("step", NO_TERM) / live,
        "share, by itself": samples.of("step", TERM_ALONE) / live,
    }
    rows = []
    for op, share in found.items():
        p20, p50, p80 = np.percentile(share, (20, 50, 80))
        figures = {"ratio": p50, "ratio_p20": p20, "ratio_p80": p80, "rounds": len(share)}
        rows.append(Row(op=op, backend=LIVE, against=LIVE, **figures, **common))
    return rows


def extra_memory(rows: Sequence[Row], tapped: int, common: dict[str, str]) -> Row:
    """What the term adds to the peak of a step, relative to the student's activations that it reads."""
    peaks = {row.backend: row.bytes for row in rows if row.bytes is not None}
    extra = peaks[LIVE] - peaks[NO_TERM]
    return Row(
        op="extra peak memory", backend=LIVE, against=TAPPED, ratio=extra / tapped, bytes=extra, **common
    )


class Bench:
    """All contenders of one setting; each has its own copy of the student and its own optimizer."""

    def __init__(self, setting: Setting, dtype: torch.dtype, device: torch.device) -> None:
        self.device, self.dtype = device, dtype
        self.images, self.labels = setting.images_and_labels(device)
        self.images = self.images.contiguous(memory_format=LAYOUTS[LAYOUT])
        self.student, self.teacher = (
            model.to(device, memory_format=LAYOUTS[LAYOUT]) for model in setting.models()
        )
        self.terms = [at.AttentionTransfer(contenders.BETA["code"], form="code")]
        self.live = at.Distiller(
            copy.deepcopy(self.student), self.teacher, terms=self.terms, example_input=self.images[:2]
        )
        self.students = {LIVE: self.live.student}  # by contender, once its step is made
        self.makers: dict[str, Callable[[], Step]] = {
            STUDENT: self._student_alone,
            TEACHER: lambda: self._teacher_alone,
            NO_TERM: self._no_term,
            LIVE: self._live,
            CACHED: self._cached,
            TORCHDISTILL: self._torchdistill,
        }

    def step(self, contender: str) -> Step:
        """A whole step.

        Raises:
            ImportError: if what it needs is not installed.
        """
        return self.makers[contender]()

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _student_of(self, contender: str) -> nn.Module:
        self.students[contender] = copy.deepcopy(self.student)
        return self.students[contender]

    def _trained(self, model: nn.Module, loss: Callable[[], Tensor]) -> Step:
        optimizer = torch.optim.SGD(model.train().parameters(), **OPTIMIZER)

        def step() -> None:
            with self.autocast():
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def _live(self) -> Step:
        return self._trained(self.live, lambda: self.live(self.images, self.labels).loss)

    def _student_alone(self) -> Step:
        student = self._student_of(STUDENT)
        return self._trained(student, lambda: F.cross_entropy(student(self.images), self.labels))

    def _teacher_alone(self) -> Tensor:
        with torch.no_grad(), self.autocast():
            return self.teacher(self.images)

    def _no_term(self) -> Step:
        """The live step without the term, in the distiller's order: teacher, student, loss."""
        student = self._student_of(NO_TERM)

        def loss() -> Tensor:
            self._teacher_alone()
            return F.cross_entropy(student(self.images), self.labels)

        return self._trained(student, loss)

    def _cached(self) -> Step:
        """Each step looks the teacher's reading up in a cache on disk."""
        alone = at.Distiller(self._student_of(CACHED), None, pairs=self.live.pairs, terms=self.terms)
        with torch.no_grad(), self.autocast():
            reading = copy.deepcopy(self.live).observe(self.images, self.labels).teacher
        assert reading is not None
        (energy,) = reading.energies
        names = [pair.teacher for pair in self.live.pairs]
        look_up = readings_from_disk(reading, energy, names, self.images)
        return self._trained(alone, lambda: alone(self.images, self.labels, teacher=look_up()).loss)

    def _torchdistill(self) -> Step:
        student, teacher = self._student_of(TORCHDISTILL), copy.deepcopy(self.teacher)
        return torchdistill_step(self.live.pairs, student, teacher, self.images, self.labels, self.autocast)

    def term_alone(self) -> Run:
        """The term on activations such as this step's, without the networks."""
        taps = at.Taps(self.live.student, [pair.student for pair in self.live.pairs])
        with taps, torch.no_grad(), self.autocast():
            self.live.student(self.images)
            dtype = next(iter(taps.pop().values())).dtype
        shapes = [
            [(len(self.images), *shape) for shape in side]
            for side in zip(
                *((row.student_shape, row.teacher_shape) for row in self.live.plan().rows), strict=True
            )
        ]
        inputs = contenders.make_inputs(shapes[0], dtype, LAYOUT, self.device, teacher=shapes[1])
        self.tapped_bytes = inputs.bytes
        term = contenders.project("code")

        def step() -> None:
            contenders.gradients(inputs, *term(inputs.students, inputs.teachers))

        return _timed(step)


def torchdistill_step(
    pairs: Sequence[at.Pair],
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    labels: Tensor,
    autocast: Callable[[], contextlib.AbstractContextManager[object]],
) -> Step:
    """A step as torchdistill's own training loop makes it, with its hooks, its loss and its optimizer.

    Raises:
        ImportError: if torchdistill is not installed.
    """
    distillation = require("torchdistill.core.distillation", extra="dev", user="bench")
    config = {
        "num_epochs": 1,
        "teacher": {**_torchdistill_model([pair.teacher for pair in pairs]), "requires_grad": False},
        "student": _torchdistill_model([pair.student for pair in pairs]),
        "optimizer": {"key": "SGD", "kwargs": dict(OPTIMIZER)},
        "criterion": _torchdistill_criterion([(pair.student, pair.teacher) for pair in pairs]),
    }
    box = distillation.get_distillation_box(teacher, student, {}, config, images.device, None, False, 1)
    box.pre_epoch_process()
    box.teacher_model.eval()

    def step() -> None:
        box.pre_forward_process()
        with autocast():
            loss = box.forward_process(images, labels)
        box.post_forward_process(loss=loss)

    return step


def _torchdistill_model(hooked: Sequence[str]) -> dict[str, object]:
    return {"forward_hook": {"output": list(hooked)}, "forward_proc": "forward_batch_only"}


def _torchdistill_criterion(pairs: Sequence[tuple[str, str]]) -> dict[str, object]:
    cross_entropy = {
        "criterion": {"key": "CrossEntropyLoss", "kwargs": {"reduction": "mean"}},
        "criterion_wrapper": {
            "key": "SimpleLossWrapper",
            "kwargs": {
                "input": {"is_from_teacher": False, "module_path": ".", "io": "output"},
                "target": {"uses_label": True},
            },
        },
        "weight": 1.0,
    }
    attention = {
        "criterion": {"key": "ATLoss", "kwargs": {"at_pairs": contenders.at_pairs(pairs), "mode": "code"}},
        "weight": contenders.BETA["code"],
    }
    terms = {"ce": cross_entropy, "at": attention}
    return {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}}


def summary(rows: Sequence[Row]) -> str:
    """The last ratios, in a line."""
    last = {(row.backend, row.against): row.ratio for row in rows if row.op == "step" and row.ratio}
    return ", ".join(f"{name} / ({against}) {ratio:.2f}" for (name, against), ratio in last.items())
