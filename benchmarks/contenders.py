"""The attention-transfer term as different hands write it, all with the same inputs and the same result.

Each contender is a function from the activations of student and teacher to the loss and to the student's
activations as the rest of the network sees them. The gradient that comes back through these, from the network
above, has to be added to the term's: contenders that pass the very tensor on leave that to autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_transfer import kernels
from attention_transfer._choices import Form
from attention_transfer._extras import require
from attention_transfer.functional import loss_of_energies
from benchmarks.measuring import Run, Stopwatch, activation, flat, interleave

BETA = {"code": 1000.0, "paper": 1.0}

Passed = Sequence[Tensor]
Term = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Passed, Tensor]]


@dataclass(frozen=True)
class Inputs:
    """A batch's activations at one or more layer pairs, and the gradients from the network above."""

    students: list[Tensor]
    teachers: list[Tensor]
    above: list[Tensor]

    @property
    def bytes(self) -> int:
        """Size of the student's activations."""
        return sum(x.numel() * x.element_size() for x in self.students)


Shapes = Sequence[Sequence[int]]


def make_inputs(
    shapes: Shapes, dtype: torch.dtype, layout: str, device: torch.device, teacher: Shapes | None = None
) -> Inputs:
    """Random activations of these shapes (b, c, h, w), a pair each; the teacher's may have other channels."""

    def draw(shapes: Shapes, seed: int) -> list[Tensor]:
        return [activation(shape, dtype, layout, device, 3 * i + seed) for i, shape in enumerate(shapes)]

    above = [x.mul_(1e-3) for x in draw(shapes, 2)]
    return Inputs([x.requires_grad_() for x in draw(shapes, 0)], draw(teacher or shapes, 1), above)


def project(form: str) -> Term:
    """This project, as its distiller does it: the activation is passed on with its energy beside it."""

    def term(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> tuple[Passed, Tensor]:
        passed, terms = [], []
        for student, teacher in zip(students, teachers, strict=True):
            activation, energy, _ = kernels.pass_energy(student, 2.0, "sum")
            with torch.no_grad():
                read, _ = kernels.energy(teacher, 2.0, "sum")
            passed.append(activation)
            terms.append(loss_of_energies(energy, read, beta=BETA[form], form=cast("Form", form)))
        return passed, torch.stack(terms).sum()

    return term


def authors(form: str) -> Term:
    """The formula of the authors' released code ("code") or of the paper's equation 2, in plain PyTorch."""
    total = _FORMULAS[form]

    def term(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> tuple[Passed, Tensor]:
        return [x.view_as(x) for x in students], total(students, teachers)

    return term


def compiled(form: str) -> Term:
    """The same through torch.compile.

    Raises:
        RuntimeError: at the first call, if there is no working compiler.
    """
    torch._dynamo.reset()
    total = torch.compile(_FORMULAS[form], dynamic=False)

    def term(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> tuple[Passed, Tensor]:
        return [x.view_as(x) for x in students], total(students, teachers)

    return term


def torchdistill(form: str) -> Term:
    """torchdistill's ATLoss, on the dictionaries that its forward hooks fill.

    Raises:
        ImportError: if torchdistill is not installed.
    """
    losses = require("torchdistill.losses.mid_level", extra="dev", user="bench")
    weight = {"code": BETA["code"], "paper": BETA["paper"] / 2}[form]

    def term(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> tuple[Passed, Tensor]:
        names = [str(i) for i in range(len(students))]
        loss = losses.ATLoss(at_pairs(zip(names, names, strict=True)), mode=form)
        seen = (
            {name: {"output": x} for name, x in zip(names, xs, strict=True)} for xs in (students, teachers)
        )
        return [x.view_as(x) for x in students], weight * loss(*seen)

    return term


def at_pairs(pairs: Any) -> dict[str, Any]:
    """Layer pairs (student, teacher) as torchdistill's ATLoss takes them."""
    return {
        f"pair{i}": {
            "student": {"io": "output", "path": student},
            "teacher": {"io": "output", "path": teacher},
            "weight": 1,
        }
        for i, (student, teacher) in enumerate(pairs)
    }


def _code(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    def attention(x: Tensor) -> Tensor:
        return F.normalize(x.pow(2).mean(1).view(len(x), -1))

    return BETA["code"] * sum(
        (attention(s) - attention(t)).pow(2).mean() for s, t in zip(students, teachers, strict=True)
    )


def _paper(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    def attention(x: Tensor) -> Tensor:
        return F.normalize(x.pow(2).sum(1).view(len(x), -1))

    return (BETA["paper"] / 2) * sum(
        (attention(s) - attention(t)).norm(dim=1).mean() for s, t in zip(students, teachers, strict=True)
    )


_FORMULAS = {"code": _code, "paper": _paper}


def gradients(inputs: Inputs, passed: Passed, loss: Tensor) -> tuple[Tensor, ...]:
    """Of the loss and the network above, at the student's activations."""
    return torch.autograd.grad([*passed, loss], inputs.students, [*inputs.above, torch.ones_like(loss)])


def timed(term: Term, inputs: Inputs) -> Run:
    """One run of forward and backward, on the watch."""

    def run(watch: Stopwatch) -> None:
        with watch("forward"):
            passed, loss = term(inputs.students, inputs.teachers)
        with watch("backward"):
            _ = gradients(inputs, passed, loss)

    return run


# --- the floor ----------------------------------------------------------------------------------------------

# A reduction computes little enough to wait for memory; which one waits least differs with dtype and device.
READS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(),
    "sum as float32": lambda x: x.view(torch.float32).sum(),
    "sum as float64": lambda x: x.view(torch.float64).sum(),
    "amax as int64": lambda x: x.view(torch.int64).amax(),
}


class Floor:
    """What the term must at least do: read both activations; read the gradient from above and A, write A's.

    Each part at the speed of torch's own streaming operators, into a buffer that is kept.
    """

    def __init__(self, inputs: Inputs, device: torch.device, evict_bytes: int) -> None:
        self.students = [flat(x.detach()) for x in inputs.students]
        self.teachers = [flat(x) for x in inputs.teachers]
        self.above = [flat(x) for x in inputs.above]
        self.kept = [torch.empty_like(x) for x in self.students]
        self.bytes = 5 * inputs.bytes
        self.way = fastest_read(max(self.students, key=len), device, evict_bytes)

    def __call__(self, watch: Stopwatch) -> None:
        read = READS[self.way]
        with watch("forward"):
            for x in (*self.students, *self.teachers):
                read(x)
        with watch("backward"):
            for above, x, out in zip(self.above, self.students, self.kept, strict=True):
                torch.add(above, x, out=out)


def fastest_read(x: Tensor, device: torch.device, evict_bytes: int) -> str:
    """The name of the fastest way to read a flat tensor from end to end."""
    ways = {name: _reading(read, x) for name, read in READS.items()}
    samples = interleave(ways, device, seconds=0, rounds=(7, 7), evict_bytes=evict_bytes)
    return min(ways, key=lambda name: float(samples.figures("read", name)["p50"]))


def _reading(read: Callable[[Tensor], Tensor], x: Tensor) -> Run:
    def run(watch: Stopwatch) -> None:
        with watch("read"):
            read(x)

    return run
