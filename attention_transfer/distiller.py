"""Student, frozen teacher, taps on both and the terms between them: from a batch to named losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ._outputs import logits_of
from ._untouched import untouched
from .losses import Observation, Term, names_at_pairs
from .pairs import Pair, suggest_pairs
from .plan import Plan, PlanRow
from .preflight import Preflight, check_models, check_observation, check_terms, statistics_kept
from .taps import Taps

Images = Float[Tensor, "b channels height width"]
Statistics = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Output:
    """What a step of the distiller gives: `loss` is the sum of `terms`, whose weights are in them."""

    loss: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    logits: Float[Tensor, "b k"]


class Distiller(nn.Module):
    """A student that learns from labels and from a frozen teacher.

    The teacher is frozen on the spot (no gradient, evaluation mode) and stays so whatever `train()` says. It
    follows `.to()` but is in neither `parameters()` nor `state_dict()`; these hold the student and the terms.

    Args:
        student: gives logits (b, k): a tensor, an object with `.logits`, or a tuple that begins with them.
        teacher: any model of the same images, or None for the student alone. Its classes may differ unless a
            term compares logits.
        pairs: "auto" lets `suggest_pairs` choose from `example_input`; or `Pair`s, or tuples of two names.
        terms: the terms beside the cross-entropy.
        example_input: a batch (b, channels, height, width) as the student will see it.
        teacher_transform: from the student's input to the teacher's, where they differ; see `InputTransform`.

    Raises:
        ValueError: if pairs are "auto" without example_input, if terms lack a teacher, or if the teacher
            shares parameters with the student.
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
    ) -> None:
        super().__init__()
        self.student = student
        self.terms = nn.ModuleList(terms)
        self._outside = (teacher, teacher_transform)  # in a tuple, so that neither becomes a submodule
        self._check_teacher()
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        self.pairs = self._resolve(pairs, example_input) if self._terms(of_features=True) else []
        self._plan = self._measure(example_input)

    @property
    def teacher(self) -> nn.Module | None:
        return self._outside[0]

    @property
    def teacher_transform(self) -> Callable[[Images], Images] | None:
        return self._outside[1]

    def forward(self, x: Images, y: Int[Tensor, " b"]) -> Output:
        """One pass of student and teacher over a batch: loss, its terms by name, and the student's logits."""
        seen = self.observe(x, y)
        terms = self.addends(seen)
        return Output(torch.stack(list(terms.values())).sum(), terms, seen.student_logits)

    def observe(self, x: Images, y: Int[Tensor, " b"]) -> Observation:
        """Run student and teacher on the batch, and keep what the terms read."""
        student_logits, student_features = _run(self.student, [pair.student for pair in self.pairs], x)
        teacher_logits, teacher_features = None, list[Tensor]()
        if self.teacher is not None and self.terms:
            with torch.no_grad():
                images = self.teacher_transform(x) if self.teacher_transform else x
                teacher_logits, teacher_features = _run(
                    self.teacher, [pair.teacher for pair in self.pairs], images
                )
        return Observation(self.pairs, student_features, teacher_features, student_logits, teacher_logits, y)

    def addends(self, seen: Observation) -> dict[str, Float[Tensor, ""]]:
        """The loss as its named terms: "ce" and what each term contributes."""
        terms = self._terms()
        weight = math.prod(term.cross_entropy_weight for term in terms)
        addends = {"ce": weight * F.cross_entropy(seen.student_logits, seen.labels)}
        for term in terms:
            contributions = term.contributions(seen)
            if twice := addends.keys() & contributions.keys():
                raise ValueError(f"Distiller: two terms contribute {sorted(twice)}. Give one another name=.")
            addends |= contributions
        return addends

    def plan(self) -> Plan:
        """The layer pairs with shapes, resizing and weights; after `preflight`, with gradient shares too."""
        return self._plan

    def preflight(self, x: Images, y: Int[Tensor, " b"]) -> Preflight:
        """Check one real batch for every way in which distillation fails without a word.

        Nothing is changed by it: no gradient, statistic or random state. Run it before the first step.

        Returns:
            The plan, with each term's share of the gradient at each pair, and the warnings it gave.

        Raises:
            ValueError: naming the layer or term, for a fault that makes the training wrong or a term dead.
        """
        check_models(self.student, self.teacher)
        with torch.enable_grad(), untouched(self.student), statistics_kept(self.teacher):
            seen = self.observe(x, y)
            check_observation(seen, x)
            report = check_terms(self.addends(seen), seen, self._plan_of(seen))
        self._plan = report.plan
        return report

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

    def _terms(self, *, of_features: bool = False) -> list[Term]:
        terms = cast("list[Term]", list(self.terms))
        return [term for term in terms if term.needs_features] if of_features else terms

    def _check_teacher(self) -> None:
        if self.teacher is None:
            if self.terms:
                raise ValueError(f"Distiller: expected a teacher for {list(self.terms)}, got None.")
            return
        own = {id(parameter) for parameter in self.student.parameters()}
        if any(id(parameter) in own for parameter in self.teacher.parameters()):
            raise ValueError(
                "Distiller: expected a teacher apart from the student, got shared parameters, which freezing "
                "the teacher would freeze. Pass copy.deepcopy(student) to distil a model into itself."
            )

    def _resolve(
        self, pairs: Literal["auto"] | Iterable[Pair | tuple[str, str]], example_input: Images | None
    ) -> list[Pair]:
        if pairs != "auto":
            return [pair if isinstance(pair, Pair) else Pair(*pair) for pair in pairs]
        if example_input is None:
            raise ValueError(
                'Distiller: expected example_input with pairs="auto", got None. Pass a batch of images, '
                "or name the layers: pairs=[(student layer, teacher layer), ...]."
            )
        assert self.teacher is not None  # there are terms
        seen_by_teacher = self.teacher_transform(example_input) if self.teacher_transform else None
        return suggest_pairs(self.student, self.teacher, example_input, seen_by_teacher)

    def _measure(self, example_input: Images | None) -> Plan:
        if example_input is None or not self.pairs:
            return self._plan_of(None)
        labels = torch.zeros(len(example_input), dtype=torch.long, device=example_input.device)
        with torch.no_grad(), untouched(self.student, training=False):
            return self._plan_of(self.observe(example_input, labels))

    def _plan_of(self, seen: Observation | None) -> Plan:
        """The plan with the shapes that one observation had."""
        terms = self._terms(of_features=True)
        resize = next((term.resize for term in terms if term.resize), None)
        rows = []
        for index, pair in enumerate(self.pairs):
            weights = {
                names_at_pairs(term.name, self.pairs)[index]: term.weight * pair.weight for term in terms
            }
            row = PlanRow(pair, resize=resize, weights=weights)
            if seen is not None:
                shapes = (_shape(seen.student_features[index]), _shape(seen.teacher_features[index]))
                row = replace(row, student_shape=shapes[0], teacher_shape=shapes[1])
            rows.append(row)
        return Plan(rows, [str(term) for term in self.terms])


def _shape(features: Float[Tensor, "b c h w"]) -> tuple[int, int, int]:
    _, c, h, w = features.shape
    return c, h, w


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


def _run(
    model: nn.Module, names: list[str], x: Images
) -> tuple[Float[Tensor, "b _"], list[Float[Tensor, "b _ _ _"]]]:
    """Logits, and the features at each of `names`, which may repeat."""
    if not names:
        return logits_of(model(x), user="Distiller"), []
    with Taps(model, list(dict.fromkeys(names))) as taps:
        logits = logits_of(model(x), user="Distiller")
        features = taps.pop()
    return logits, [features[name] for name in names]
