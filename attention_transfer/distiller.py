"""Student, frozen teacher, taps on both and the terms between them: from a batch to named losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import kernels
from ._outputs import logits_of
from ._untouched import untouched
from .functional import check_double_backward, input_gradient_of, leaf
from .losses import Energy, Observation, Reading, Shapes, Term, names_at_pairs
from .pairs import Pair, suggest_pairs
from .plan import Plan, PlanRow
from .preflight import (
    Preflight,
    check_models,
    check_observation,
    check_terms,
    gradient_norms_at_pairs,
    statistics_kept,
)
from .taps import Taps

AUTO_SHARE = 1.0
"""What `balance` makes of a term's gradient at the layer pairs, over the cross-entropy's there."""

Images = Float[Tensor, "b channels height width"]
Statistics = tuple[Sequence[float], Sequence[float]]
Layouts = str | Mapping[str, str]


@dataclass(frozen=True)
class Output:
    """What a step of the distiller gives: `loss` is the sum of `terms`, whose weights are in them."""

    loss: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    logits: Float[Tensor, "b k ..."]


class Distiller(nn.Module):
    """A student that learns from labels and from a frozen teacher.

    The teacher is frozen on the spot (no gradient, evaluation mode) and stays so whatever `train()` says. It
    follows `.to()` but is in neither `parameters()` nor `state_dict()`; these hold the student and the terms.

    Args:
        student: gives logits (b, k), or (b, k, h, w) of each pixel, then with labels (b, h, w) of which -100
            do not count: a tensor, an object with `.logits`, a tuple that begins with them, or a dict with
            them under "logits" or "out". What auxiliary heads give beside them is not used.
        teacher: any model of the same images. Its classes may differ unless a term compares logits. None for
            the student alone, or where each call is given the teacher's `Reading`, such as from a cache.
        pairs: "auto" lets `suggest_pairs` choose from `example_input`; or `Pair`s, or tuples of two names.
        terms: the terms beside the cross-entropy. What they learn themselves is among the parameters.
        example_input: a batch (b, channels, height, width) as the student will see it.
        teacher_transform: from the student's input to the teacher's, where they differ; see `InputTransform`.
        layout: how to read layers that leave a doubt, as in `Taps`: by name of a layer, or one for all; a
            tuple of two for student and teacher. A name may say it too: ("blocks.3@tokens+0+4", "layer3").
        teacher_dtype: the precision of the teacher's arithmetic, by autocast; None follows the student's.

    Raises:
        ValueError: if pairs are "auto" without example_input or a teacher, or if the teacher shares
            parameters with the student.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        *,
        pairs: Literal["auto"] | Iterable[Pair | tuple[str, str]] = "auto",
        terms: Iterable[Term] = (),
        example_input: Images | None = None,
        teacher_transform: Callable[[Images], Images] | None = None,
        teacher_dtype: torch.dtype | None = None,
        layout: Layouts | tuple[Layouts, Layouts] = "auto",
    ) -> None:
        super().__init__()
        self.student = student
        self.terms = nn.ModuleList(terms)
        self.teacher_dtype = teacher_dtype
        self._outside = (teacher, teacher_transform)  # in a tuple, so that neither becomes a submodule
        if teacher is not None:
            self._check_apart(teacher)
            teacher.requires_grad_(False).eval()
        self.pairs = self._resolve(pairs, example_input) if self._terms(at_pairs=True) else []
        self._layouts = _by_side(layout, self.pairs)
        self._plan = self._measure(example_input)
        self._prepare_terms()

    @property
    def teacher(self) -> nn.Module | None:
        return self._outside[0]

    @property
    def teacher_transform(self) -> Callable[[Images], Images] | None:
        return self._outside[1]

    def forward(self, x: Images, y: Int[Tensor, "b ..."], *, teacher: Reading | None = None) -> Output:
        """One pass of student and teacher over a batch: loss, its terms by name, and the student's logits.

        Args:
            x: the images, as the student sees them.
            y: the labels.
            teacher: what a teacher made of these very images, in place of running it now.
        """
        seen = self.observe(x, y, teacher=teacher)
        terms = self.addends(seen)
        return Output(torch.stack(list(terms.values())).sum(), terms, seen.student.logits)

    def advance(self, progress: float) -> None:
        """Take the share of the training that is done, from 0 to 1: the weights follow their schedules."""
        for term in self._terms():
            term.progress = progress

    def observe(
        self,
        x: Images,
        y: Int[Tensor, "b ..."],
        *,
        teacher: Reading | None = None,
        keep_features: bool = False,
    ) -> Observation:
        """Run student and teacher on the batch, and keep what the terms read; all activations if asked."""
        keep_features |= any(term.needs_features for term in self._terms())
        energies = list(dict.fromkeys(term.energy for term in self._terms() if term.energy))
        if teacher is None and any(term.needs_teacher for term in self._terms()):
            # first, while none of the student's activations are in memory
            teacher = self._ask_teacher(x, y, energies, keep_features)
        elif teacher is not None:
            self._check_reading(teacher)
        return Observation(self.pairs, self._ask_student(x, y, energies, keep_features), teacher, y)

    def _check_reading(self, reading: Reading) -> None:
        """A reading that comes from elsewhere holds what the terms read."""
        for term in self._terms():
            lacks = [
                *(["features"] if term.needs_features and not reading.features else []),
                *([str(term.energy)] if term.energy and term.energy not in reading.energies else []),
            ]
            if term.needs_teacher and term.needs_input_gradient and reading.input_gradient is None:
                lacks.append("input_gradient")
            if term.needs_teacher and lacks:
                raise ValueError(
                    f'Distiller: expected a teacher reading with what the term "{term.name}" reads, got one '
                    f"without {', '.join(lacks)}. Add it, or let the Distiller run the teacher."
                )

    def _ask_student(self, x: Images, y: Tensor, energies: list[Energy], keep_features: bool) -> Reading:
        names, layout = [pair.student for pair in self.pairs], self._layouts[0]
        if not any(term.needs_input_gradient for term in self._terms()):
            return _read(self.student, names, layout, x, energies, keep_features, dense=y.dim() > 1)
        check_double_backward(self.student, "Distiller")
        twice = torch.is_grad_enabled()
        flipped = any(term.needs_flip for term in self._terms())
        images, labels = (torch.cat([x, x.flip(-1)]), torch.cat([y, y])) if flipped else (x, y)
        with torch.enable_grad():
            images = leaf(images, "Distiller")
            seen = _read(self.student, names, layout, images, energies, keep_features)
            gradient = input_gradient_of(seen.logits, labels, images, create_graph=twice, user="Distiller")
        seen = seen.of_first(len(x))
        return replace(
            seen if twice else seen.detached(),
            input_gradient=gradient[: len(x)],
            input_gradient_of_flipped=gradient[len(x) :] if flipped else None,
        )

    def _ask_teacher(self, x: Images, y: Tensor, energies: list[Energy], keep_features: bool) -> Reading:
        if self.teacher is None:
            asking = [term for term in self._terms() if term.needs_teacher]
            raise ValueError(
                f"Distiller: expected a teacher for {asking}, got None. Pass one to the Distiller, "
                "or its reading of these images to each call: distiller(x, y, teacher=reading)."
            )
        names = [pair.teacher for pair in self.pairs]
        wanted = any(term.needs_teacher and term.needs_input_gradient for term in self._terms())
        with torch.set_grad_enabled(wanted), _precision(self.teacher_dtype, x.device):
            x = leaf(x, "Distiller") if wanted else x
            seen = _read(
                self.teacher, names, self._layouts[1], self._as_teacher_sees(x), energies, keep_features
            )
            if not wanted:
                return seen
            gradient = input_gradient_of(seen.logits, y, x, create_graph=False, user="Distiller (teacher)")
            return replace(seen.detached(), input_gradient=gradient)

    def addends(self, seen: Observation) -> dict[str, Float[Tensor, ""]]:
        """The loss as its named terms: "ce" and what each term contributes."""
        terms = self._terms()
        weight = math.prod(term.cross_entropy_weight for term in terms)
        addends = {"ce": weight * F.cross_entropy(seen.student.logits, seen.labels)}
        for term in terms:
            contributions = term.contributions(seen)
            if twice := addends.keys() & contributions.keys():
                raise ValueError(f"Distiller: two terms contribute {sorted(twice)}. Give one another name=.")
            addends |= contributions
        return addends

    def plan(self) -> Plan:
        """The layer pairs with shapes, resizing and weights; after `preflight`, with gradient shares too."""
        return self._plan

    def preflight(self, x: Images, y: Int[Tensor, "b ..."], *, teacher: Reading | None = None) -> Preflight:
        """Check one real batch for every way in which distillation fails without a word.

        Nothing is changed by it: no gradient, statistic or random state. Run it before the first step.

        Returns:
            The plan, with each term's share of the gradient at each pair, and the warnings it gave.

        Raises:
            ValueError: naming the layer or term, for a fault that makes the training wrong or a term dead.
        """
        check_models(self.student, self.teacher)
        with torch.enable_grad(), untouched(self.student), statistics_kept(self.teacher):
            seen = self.observe(x, y, teacher=teacher, keep_features=True)
            check_observation(seen, x)
            report = check_terms(self.addends(seen), seen, self._plan_of(seen), self.student)
        self._plan = report.plan
        return report

    def balance(
        self,
        x: Images,
        y: Int[Tensor, "b ..."],
        *,
        teacher: Reading | None = None,
        share: float = 1.0,
        total: Callable[[list[float]], list[float]] | None = None,
    ) -> dict[str, float]:
        """Find the weight of each term with weight "auto" on one batch, by name; nothing is changed by it.

        With that weight the gradient of the term with respect to the student's activations at the pairs has
        `AUTO_SHARE` times the L2 norm of the cross-entropy's, over all pairs. Give the mean of a few batches
        to `settle`.

        Where processes share a batch, `total` adds up squared norms over them, and `share` is what the means
        of this one count for: the weight is the same on each, and that of the whole batch.

        Raises:
            ValueError: if a term has no gradient there.
        """
        automatic = [term for term in self._terms() if term.automatic]
        if not automatic:
            return {}
        with torch.enable_grad(), untouched(self.student):
            seen = self.observe(x, y, teacher=teacher, keep_features=True)
            labels = share * F.cross_entropy(seen.student.logits, y)
            pulls = [_pull(term, seen, share) for term in automatic]
            norms = [gradient_norms_at_pairs(labels, seen), *pulls]
        if total is not None:
            norms = [math.sqrt(square) for square in total([norm**2 for norm in norms])]
        norm, *pulls = norms
        _check_pulls(automatic, pulls)
        return {term.name: AUTO_SHARE * norm / pull for term, pull in zip(automatic, pulls, strict=True)}

    def settle(self, weights: Mapping[str, float]) -> None:
        """Set the weights of terms, by name: those that `balance` found, or those of a run that goes on.

        Raises:
            ValueError: if there is no term of a name.
        """
        known = [term.name for term in self._terms()]
        if unknown := [name for name in weights if name not in known]:
            raise ValueError(f"settle: expected names among {known}, got {unknown[0]!r}.")
        for term in self._terms():
            term.full_weight = weights.get(term.name, term.full_weight)

    def weights(self) -> dict[str, float]:
        """The weight of each term now, by name."""
        return {term.name: term.weight for term in self._terms()}

    def train(self, mode: bool = True) -> Distiller:
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        for module in self._outside:
            if isinstance(module, nn.Module):
                module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _terms(self, *, at_pairs: bool = False) -> list[Term]:
        terms = cast("list[Term]", list(self.terms))
        return [term for term in terms if term.at_pairs] if at_pairs else terms

    def _prepare_terms(self) -> None:
        like = next(self.student.parameters(), torch.empty(0))
        shapes: list[Shapes | None] = [
            (row.student_shape, row.teacher_shape) if row.student_shape and row.teacher_shape else None
            for row in self._plan.rows
        ]
        for term in self._terms(at_pairs=True):
            term.prepare(shapes, like)

    def _check_apart(self, teacher: nn.Module) -> None:
        own = {id(parameter) for parameter in self.student.parameters()}
        if any(id(parameter) in own for parameter in teacher.parameters()):
            raise ValueError(
                "Distiller: expected a teacher apart from the student, got shared parameters, which freezing "
                "the teacher would freeze. Pass copy.deepcopy(student) to distil a model into itself."
            )

    def _resolve(
        self, pairs: Literal["auto"] | Iterable[Pair | tuple[str, str]], example_input: Images | None
    ) -> list[Pair]:
        if pairs != "auto":
            return [pair if isinstance(pair, Pair) else Pair(*pair) for pair in pairs]
        if self.teacher is None:
            raise ValueError(
                f'Distiller: expected a teacher for {list(self.terms)} with pairs="auto", got None. Pass the '
                "teacher; or, where its readings come from elsewhere, name the layers."
            )
        if example_input is None:
            raise ValueError(
                'Distiller: expected example_input with pairs="auto", got None. Pass a batch of images, '
                "or name the layers: pairs=[(student layer, teacher layer), ...]."
            )
        seen_by_teacher = self.teacher_transform(example_input) if self.teacher_transform else None
        return suggest_pairs(self.student, self.teacher, example_input, seen_by_teacher)

    def _measure(self, example_input: Images | None) -> Plan:
        if example_input is None or not self.pairs or self.teacher is None:
            return self._plan_of(None)
        names, others = [pair.student for pair in self.pairs], [pair.teacher for pair in self.pairs]
        with torch.no_grad(), untouched(self.student, training=False):
            student = _read(self.student, names, self._layouts[0], example_input, [], False)
            images = self._as_teacher_sees(example_input)
            teacher = _read(self.teacher, others, self._layouts[1], images, [], False)
            labels = torch.zeros(len(example_input), dtype=torch.long)
            return self._plan_of(Observation(self.pairs, student, teacher, labels))

    def _as_teacher_sees(self, x: Images) -> Float[Tensor, "b channels _ _"]:
        return self.teacher_transform(x) if self.teacher_transform else x

    def _plan_of(self, seen: Observation | None) -> Plan:
        """The plan with the shapes that one observation had."""
        terms = self._terms(at_pairs=True)
        resize = next((term.resize for term in terms if term.resize), None)
        rows = []
        for index, pair in enumerate(self.pairs):
            weights = {
                names_at_pairs(term.name, self.pairs)[index]: term.weight * pair.weight for term in terms
            }
            row = PlanRow(pair, resize=resize, weights=weights)
            if seen is not None and seen.teacher is not None:
                shapes = (seen.student.shapes[index], seen.teacher.shapes[index])
                row = replace(row, student_shape=shapes[0], teacher_shape=shapes[1])
            rows.append(row)
        return Plan(rows, [f"{type(term).__name__}({term.extra_repr()})" for term in self.terms])


class InputTransform(nn.Module):
    """From images as the student sees them to images as the teacher expects them.

    Args:
        student, teacher: (mean, std) by channel with which each side's images are normalised.
        size: (height, width) the teacher expects; None keeps the student's.
    """

    factor: Tensor
    offset: Tensor

    def __init__(
        self, student: Statistics, teacher: Statistics, *, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        (mean_s, std_s), (mean_t, std_t) = (
            [torch.tensor(values).view(-1, 1, 1) for values in statistics]
            for statistics in (student, teacher)
        )
        self.register_buffer("factor", std_s / std_t, persistent=False)
        self.register_buffer("offset", (mean_s - mean_t) / std_t, persistent=False)
        self.size = size

    def forward(self, x: Images) -> Float[Tensor, "b channels _ _"]:
        x = x * self.factor + self.offset
        if self.size is None or x.shape[2:] == self.size:
            return x
        return F.interpolate(x, self.size, mode="bilinear", antialias=True, align_corners=False)


def _pull(term: Term, seen: Observation, share: float) -> float:
    """The norm of the gradient of a term of weight 1 at the layer pairs; 0 where there is none."""
    addend = share * torch.stack(list(term.contributions(seen).values())).sum()
    return gradient_norms_at_pairs(addend, seen) / term.weight if term.weight else 0.0


def _check_pulls(terms: Sequence[Term], pulls: Sequence[float]) -> None:
    for term, pull in zip(terms, pulls, strict=True):
        if not pull:
            raise ValueError(
                f'balance: expected a gradient of the term "{term.name}" at the layer pairs, got none. '
                'Give it a weight in place of "auto", and see what `preflight` says of it.'
            )


def _precision(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[object]:
    """Autocast to `dtype`, or none of it for float32; None leaves things as they are."""
    if dtype is None:
        return nullcontext()
    low = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype=dtype if low else None, enabled=low)


def _by_side(layout: Layouts | tuple[Layouts, Layouts], pairs: Sequence[Pair]) -> tuple[Layouts, Layouts]:
    """For student and teacher, what is said of their own layers."""
    sides = layout if isinstance(layout, tuple) else (layout, layout)
    names = [pair.student for pair in pairs], [pair.teacher for pair in pairs]
    for name in [name for side in sides if not isinstance(side, str) for name in side]:
        if name not in (known := [*names[0], *names[1]]):
            raise ValueError(
                f"Distiller: expected layout= for layers of the pairs, got one for {name!r}. They are "
                f"{', '.join(dict.fromkeys(known)) or 'none'}."
            )
    own = (
        side if isinstance(side, str) else {name: side[name] for name in here if name in side}
        for side, here in zip(sides, names, strict=True)
    )
    first, second = own
    return first, second


class _Layer(NamedTuple):
    """What is read of one layer."""

    energies: list[Float[Tensor, "b h w"]]
    features: Float[Tensor, "b c h w"] | None
    shape: tuple[int, int, int]


def _read(
    model: nn.Module,
    names: list[str],
    layout: Layouts,
    x: Images,
    energies: list[Energy],
    keep_features: bool,
    *,
    dense: bool = True,
) -> Reading:
    """The model's logits, if `dense` perhaps of each pixel, and what is read at each of `names`."""
    if not names:
        return Reading(logits_of(model(x), user="Distiller", dense=dense))

    def read(features: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], _Layer]:
        passed, found = features, []
        for kind in energies:
            passed, energy, _ = kernels.pass_energy(passed, kind.p, kind.mapping)
            found.append(energy)
        _, c, h, w = features.shape
        return passed, _Layer(found, features if keep_features else None, (c, h, w))

    with Taps(model, list(dict.fromkeys(names)), layout=layout, read=read) as taps:
        logits = logits_of(model(x), user="Distiller", dense=dense)
        found = taps.pop()
    layers = [found[name] for name in names]
    return Reading(
        logits,
        {kind: [layer.energies[index] for layer in layers] for index, kind in enumerate(energies)},
        [layer.features for layer in layers] if keep_features else (),
        [layer.shape for layer in layers],
    )
