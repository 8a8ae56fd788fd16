"""Student, frozen teacher, taps on both and the terms between them: from a batch to named losses."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import kernels
from ._channels import wrong_channels
from ._errors import InputError, InputTypeError
from ._outputs import Place, logits_of, rivals
from ._untouched import untouched
from .functional import (
    check_both_distributed,
    check_double_backward,
    check_labels_are_a_tensor,
    class_targets,
    cross_entropy,
    input_gradient_of,
    leaf,
)
from .locality import find_order
from .pairs import Pair, suggest_pairs
from .plan import Plan, PlanRow
from .preflight import (
    Preflight,
    check_models,
    check_observation,
    check_order,
    check_terms,
    gradient_norms_at_pairs,
    statistics_kept,
)
from .taps import Taps
from .terms.declaration import Energy
from .terms.term import Observation, Reading, Shapes, Term, names_at_pairs

AUTO_SHARE = 1.0
"""What `balance` makes of a term's gradient at the layer pairs, over the cross-entropy's there."""

Images = Float[Tensor, "b channels height width"]
Labels = Num[Tensor, "b ..."]
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
            do not count: a tensor, an object with `.logits`, a tuple of which they are the first such tensor,
            or a dict with them under "logits" or "out". What auxiliary heads give beside them is not used.
        teacher: any model of the same images. Its classes may differ unless a term compares logits. None for
            the student alone, or where each call is given the teacher's `Reading`, such as from a cache.
        pairs: "auto" lets `suggest_pairs` choose from `example_input`; or `Pair`s, or tuples of two names.
        terms: the terms beside the cross-entropy, or the only one. What they learn themselves is among the
            parameters.
        example_input: a batch (b, channels, height, width) as the student will see it.
        teacher_transform: from the student's input to the teacher's, where they differ; see `InputTransform`.
            What it gives is converted to the type of the teacher's parameters.
        teacher_dtype: the precision of the teacher's arithmetic, float32, or bfloat16 or float16 by autocast;
            None follows the student's.
        layout: how to read layers that leave a doubt, as in `Taps`: by name of a layer, or one for all; a
            tuple of two for student and teacher. A name may say it too: ("blocks.3@tokens+0+4", "layer3").
        logits, teacher_logits: where the logits are in what the student and the teacher return, if it is
            not as above: an index, a key, the name of an attribute, or a function of the output.
        teacher_classes: for each class of the student's logits and of the labels its number in the
            teacher's, where these are in another order or more.

    Raises:
        TypeError: if a model, a term, the transform or the example is not what it should be.
        ValueError: if pairs are "auto" without example_input or a teacher or are no pairs, on another
            teacher_dtype, or if the teacher shares parameters with the student.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        *,
        pairs: Literal["auto"] | Pair | Iterable[Pair | tuple[str, str]] = "auto",
        terms: Term | Iterable[Term] = (),
        example_input: Images | None = None,
        teacher_transform: Callable[[Images], Images] | None = None,
        teacher_dtype: torch.dtype | None = None,
        layout: Layouts | tuple[Layouts, Layouts] = "auto",
        logits: Place | None = None,
        teacher_logits: Place | None = None,
        teacher_classes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        _check_model("student", student)
        if teacher is not None:
            _check_model("teacher", teacher)
        _check_teacher_options(teacher_transform, teacher_dtype)
        order = None if teacher_classes is None else torch.tensor(teacher_classes)
        self.register_buffer("_teacher_classes", order, persistent=False)
        self.student = student
        self.terms = nn.ModuleList(_terms(terms))
        self.teacher_dtype = teacher_dtype
        self._places = {"student": logits, "teacher": teacher_logits}
        self._outside = (teacher, teacher_transform)  # in a tuple, so that neither becomes a submodule
        if teacher is not None:
            self._check_apart(teacher)
            teacher.requires_grad_(False).eval()
        self.pairs = self._resolve(pairs, example_input) if self._terms(at_pairs=True) else []
        self._layouts = _by_side(layout, self.pairs)
        self._plan = self._measure(example_input)
        self._prepare_terms()

    _teacher_classes: Tensor | None

    @property
    def teacher(self) -> nn.Module | None:
        return self._outside[0]

    @property
    def teacher_transform(self) -> Callable[[Images], Images] | None:
        return self._outside[1]

    def forward(self, x: Images, y: Labels, *, teacher: Reading | None = None) -> Output:
        """One pass of student and teacher over a batch: loss, its terms by name, and the student's logits.

        Args:
            x: the images, as the student sees them.
            y: the labels: whole numbers of any type; or probabilities of each class, of the logits' shape.
            teacher: what a teacher made of these very images, in place of running it now.

        Raises:
            TypeError: if images or labels are no tensor, or of them and a model some alone are DTensors.
            ValueError: if the batch is empty, not of images where layers are paired, of a type that a model
                fails on, or its labels are not those of the logits.
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
        y: Labels,
        *,
        teacher: Reading | None = None,
        keep_features: bool = False,
    ) -> Observation:
        """Run student and teacher on the batch, and keep what the terms read; all activations if asked."""
        _check_images("images", x, bool(self.pairs))
        check_labels_are_a_tensor(y, "Distiller")
        keep_features |= any(term.needs_features for term in self._terms())
        energies = list(dict.fromkeys(term.energy for term in self._terms() if term.energy))
        if teacher is None and any(term.needs_teacher for term in self._terms()):
            # first, while none of the student's activations are in memory
            teacher = self._ask_teacher(x, y, energies, keep_features)
        elif teacher is not None:
            self._check_reading(teacher)
            teacher = self._in_order(teacher)
        student = self._ask_student(x, y, energies, keep_features)
        return Observation(self.pairs, student, teacher, class_targets(y, student.logits, "Distiller"))

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
                raise InputError(
                    f'Distiller: expected a teacher reading with what the term "{term.name}" reads, got one '
                    f"without {', '.join(lacks)}. Add it, or let the Distiller run the teacher."
                )

    def _ask_student(self, x: Images, y: Tensor, energies: list[Energy], keep_features: bool) -> Reading:
        names = [pair.student for pair in self.pairs]
        if not any(term.needs_input_gradient for term in self._terms()):
            return self._read("student", names, x, energies, keep_features, dense=y.dim() > 2)
        check_double_backward(self.student, "Distiller")
        twice = torch.is_grad_enabled()
        flipped = any(term.needs_flip for term in self._terms())
        images, labels = (torch.cat([x, x.flip(-1)]), torch.cat([y, y])) if flipped else (x, y)
        with torch.enable_grad():
            images = leaf(images, "Distiller")
            seen = self._read("student", names, images, energies, keep_features)
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
            raise InputError(
                f"Distiller: expected a teacher for {asking}, got None. Pass one to the Distiller, "
                "or its reading of these images to each call: distiller(x, y, teacher=reading)."
            )
        names = [pair.teacher for pair in self.pairs]
        wanted = any(term.needs_teacher and term.needs_input_gradient for term in self._terms())
        with torch.set_grad_enabled(wanted), _precision(self.teacher_dtype, x.device):
            x = leaf(x, "Distiller") if wanted else x
            x_t, dense = self._as_teacher_sees(x), True if y.dim() > 2 else None
            seen = self._read("teacher", names, x_t, energies, keep_features, dense=dense)
            seen = self._in_order(seen)
            if not wanted:
                return seen
            gradient = input_gradient_of(seen.logits, y, x, create_graph=False, user="Distiller (teacher)")
            return replace(seen.detached(), input_gradient=gradient)

    def _in_order(self, teacher: Reading) -> Reading:
        """The teacher's reading with its logits in the order of the student's classes."""
        order = self._teacher_classes
        return teacher if order is None else replace(teacher, logits=teacher.logits[:, order])

    def addends(self, seen: Observation) -> dict[str, Float[Tensor, ""]]:
        """The loss as its named terms: "ce" and what each term contributes."""
        terms = self._terms()
        weight = math.prod(term.cross_entropy_weight for term in terms)
        addends = {"ce": weight * cross_entropy(seen.student.logits, seen.labels)}
        for term in terms:
            contributions = term.contributions(seen)
            if twice := addends.keys() & contributions.keys():
                raise InputError(f"Distiller: two terms contribute {sorted(twice)}. Give one another name=.")
            addends |= contributions
        return addends

    def plan(self) -> Plan:
        """The layer pairs with shapes, resizing and weights; after `preflight`, with gradient shares too."""
        return self._plan

    def preflight(
        self, x: Images, y: Labels, *, teacher: Reading | None = None, classes: int | None = None
    ) -> Preflight:
        """Check one real batch for every way in which distillation fails without a word.

        Nothing is changed by it: no gradient, statistic or random state. Run it before the first step.

        Args:
            x, y, teacher: as in a call.
            classes: how many there are, where that is known: the student must have as many outputs.

        Returns:
            The plan, with each term's share of the gradient at each pair, and the warnings it gave.

        Raises:
            ValueError: naming the layer or term, for a fault that makes the training wrong or a term dead.
        """
        check_models(self.student, self.teacher)
        self._check_teacher_is_asked(teacher)
        with torch.enable_grad(), untouched(self.student), statistics_kept(self.teacher):
            seen = self.observe(x, y, teacher=teacher, keep_features=True)
            open_weights = [term.name for term in self._terms() if not term.settled]
            noticed = check_observation(seen, x, open_weights, classes)
            report = check_terms(self.addends(seen), seen, self._plan_of(seen), self.student)
            unordered = self._check_order(x, teacher)  # last, as its runs write into what the graph has kept
            report = replace(report, warnings=[*unordered, *noticed, *report.warnings])
        self._plan = report.plan
        return report

    def _check_teacher_is_asked(self, reading: Reading | None) -> None:
        if self.teacher is None and reading is None:
            return
        if not any(term.needs_teacher for term in self._terms()):
            names = ", ".join(term.name for term in self._terms()) or "no terms"
            raise InputError(
                f"preflight: expected a term that learns from the teacher, got {names}: the teacher would "
                "teach nothing. Add one, such as AttentionTransfer(beta=1.0), or pass None as the teacher."
            )

    def _check_order(self, x: Images, teacher: Reading | None) -> list[str]:
        names, others = [pair.student for pair in self.pairs], [pair.teacher for pair in self.pairs]
        found = check_order("student", find_order(self.student, names, x, layout=self._layouts[0]))
        if self.teacher is None or teacher is not None:
            return found
        see = self._as_teacher_sees
        with _precision(self.teacher_dtype, x.device):
            theirs = find_order(self.teacher, others, x, layout=self._layouts[1], transform=see)
        return [*found, *check_order("teacher", theirs)]

    def balance(
        self,
        x: Images,
        y: Labels,
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
            labels = share * cross_entropy(seen.student.logits, seen.labels)
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
            raise InputError(f"settle: expected names among {known}, got {unknown[0]!r}.")
        for term in self._terms():
            term.full_weight = weights.get(term.name, term.full_weight)
            term.settled |= term.name in weights

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
            raise InputError(
                "Distiller: expected a teacher apart from the student, got shared parameters, which freezing "
                "the teacher would freeze. Pass copy.deepcopy(student) to distil a model into itself."
            )

    def _resolve(
        self, pairs: Literal["auto"] | Pair | Iterable[Pair | tuple[str, str]], example_input: Images | None
    ) -> list[Pair]:
        if not (isinstance(pairs, str) and pairs == "auto"):
            return _pairs(pairs)
        if self.teacher is None:
            raise InputError(
                f'Distiller: expected a teacher for {list(self.terms)} with pairs="auto", got None. Pass the '
                "teacher; or, where its readings come from elsewhere, name the layers."
            )
        if example_input is None:
            raise InputError(
                'Distiller: expected example_input with pairs="auto", got None. Pass a batch of images, '
                "or name the layers: pairs=[(student layer, teacher layer), ...]."
            )
        _check_images("example_input", example_input, True)
        return suggest_pairs(self.student, self.teacher, example_input, self._as_teacher_sees(example_input))

    def _measure(self, example_input: Images | None) -> Plan:
        if example_input is None or not self.pairs or self.teacher is None:
            return self._plan_of(None)
        _check_images("example_input", example_input, True)
        names, others = [pair.student for pair in self.pairs], [pair.teacher for pair in self.pairs]
        with torch.no_grad(), untouched(self.student, training=False), untouched(self.teacher):
            student = self._read("student", names, example_input, [], False)
            teacher = self._read("teacher", others, self._as_teacher_sees(example_input), [], False)
            labels = torch.zeros(len(example_input), dtype=torch.long)
            return self._plan_of(Observation(self.pairs, student, teacher, labels))

    def _read(
        self,
        role: Literal["student", "teacher"],
        names: list[str],
        x: Images,
        energies: list[Energy],
        keep_features: bool,
        *,
        dense: bool | None = None,
    ) -> Reading:
        """A model's logits, `dense` as in `find_logits`, and what is read at each of `names`."""
        model, layout = (
            (self.student, self._layouts[0]) if role == "student" else (self.teacher, self._layouts[1])
        )
        assert model is not None

        def read(features: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], _Layer]:
            passed, maps = features, []
            for kind in energies:
                passed, energy, _ = kernels.pass_energy(passed, kind.p, kind.mapping)
                maps.append(energy)
            _, c, h, w = features.shape
            return passed, _Layer(maps, features if keep_features else None, (c, h, w))

        found: dict[str, _Layer] = {}
        taps = Taps(model, list(dict.fromkeys(names)), layout=layout, read=read) if names else None
        with taps or nullcontext():
            output = _answer(model, x, role)
            if taps is not None:
                found = taps.pop()
        place = self._places[role]
        name = "logits" if role == "student" else "teacher_logits"
        remedy = (
            f'Say where they are, such as by {name}=1 or {name}="pred", or return them alone; logits of each '
            "pixel go with labels (b, h, w)."
        )
        logits = logits_of(output, user=f"Distiller ({role})", dense=dense, place=place, remedy=remedy)
        layers = [found[name] for name in names]
        return Reading(
            logits,
            {kind: [layer.energies[index] for layer in layers] for index, kind in enumerate(energies)},
            [layer.features for layer in layers if layer.features is not None],
            [layer.shape for layer in layers],
            rivals=rivals(output, logits) if place is None else (),
        )

    def _as_teacher_sees(self, x: Images) -> Float[Tensor, "b channels _ _"]:
        x = self.teacher_transform(x) if self.teacher_transform else x
        own = None if self.teacher is None else _first_floating(self.teacher)
        return x if own is None or not x.is_floating_point() else x.to(own.dtype)

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
        lines = [f"{type(term).__name__}({term.extra_repr()})" for term in self.terms]
        if self._teacher_classes is not None:
            order = self._teacher_classes.tolist()
            is_order = sorted(order) == list(range(len(order))) != order
            what = "'s classes are in another order" if is_order else " has more classes"
            lines.append(f"the teacher{what}: matched by name")
        return Plan(rows, lines)


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


def _check_model(role: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else repr(model)
        remedy = (
            "Call it" if isinstance(model, type) else "Build it, such as by build_model(name), or wrap it"
        )
        raise InputTypeError(f"Distiller: expected the {role} as a torch.nn.Module, got {what}. {remedy}.")
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise InputError(
            f"Distiller: expected a {role} whose parameters have their shapes, got lazy ones. "
            "Run it on a batch first."
        )


def _check_teacher_options(transform: object, dtype: object) -> None:
    if transform is not None and not callable(transform):
        raise InputTypeError(
            f"Distiller: expected teacher_transform as a function of images, got {transform!r}. "
            "Pass one, such as InputTransform."
        )
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise InputError(
            "Distiller: expected teacher_dtype as torch.float32, torch.bfloat16, torch.float16 or None, got "
            f"{dtype!r}. For another type, convert the teacher: teacher.to(dtype)."
        )


def _check_images(what: str, x: object, at_pairs: bool) -> None:
    if not isinstance(x, Tensor):
        raise InputTypeError(
            f"Distiller: expected {what} as a tensor (b, c, h, w), got {type(x).__name__}. "
            "Stack images by torch.stack, and pass a tensor alone."
        )
    if at_pairs and x.dim() != 4:
        raise InputError(
            f"Distiller: expected {what} (b, c, h, w) for terms at layer pairs, got {tuple(x.shape)}. Add "
            "the axis of the batch by x[None], or take video frame by frame; for other signals use terms "
            "that compare logits."
        )
    if not x.dim() or not len(x):
        raise InputError(
            f"Distiller: expected {what} with one image or more, got {tuple(x.shape)}. Leave out empty "
            "batches."
        )


def _terms(terms: Term | Iterable[Term]) -> list[Term]:
    """The terms as a list, each of which is one."""
    if isinstance(terms, Term | str) or not isinstance(terms, Iterable):
        terms = [terms]
    terms = list(terms)
    for term in terms:
        if not isinstance(term, Term):
            got, remedy = repr(term), "Pass one such as AttentionTransfer(beta=1.0)"
            if isinstance(term, type):
                got, remedy = f"the class {term.__name__}", f"Call it: {term.__name__}(...)"
            raise InputTypeError(f"Distiller: expected terms as instances of Term, got {got}. {remedy}.")
    return terms


def _pairs(pairs: Pair | Iterable[Pair | tuple[str, str]]) -> list[Pair]:
    """The pairs as a list, each of which is one."""
    if isinstance(pairs, Pair | str) or not isinstance(pairs, Iterable):
        pairs = [pairs]
    found = []
    for pair in pairs:
        if isinstance(pair, tuple | list) and len(pair) in (2, 3):
            pair = Pair(*pair)
        if not isinstance(pair, Pair):
            halves = re.split(r"\s*(?:<-|:)\s*", pair if isinstance(pair, str) else "")
            names = tuple(halves) if len(halves) == 2 else ("student.layer", "teacher.layer")
            raise InputError(
                "Distiller: expected pairs as a list of Pair or (student layer, teacher layer), got "
                f'{pair!r}. Pass pairs=[{names}], or "auto".'
            )
        found.append(pair)
    return found


def _first_floating(model: nn.Module) -> Tensor | None:
    """The model's first parameter or buffer of a type that images could have."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor for tensor in tensors if tensor.dtype in _IMAGE_TYPES), None)


_IMAGE_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _answer(model: nn.Module, x: Tensor, role: str) -> Any:
    """What the model returns; where it fails on images unlike its own parameters, that is said."""
    try:
        return model(x)
    except (RuntimeError, ValueError) as error:
        if x.dim() == 4 and (message := wrong_channels(model, x.shape[1:], user="Distiller", role=role)):
            alone = " Or let teacher_transform= convert them." if role == "teacher" else ""
            raise InputError(message + alone) from error
        own = _first_floating(model)
        if isinstance(error, ValueError) or own is None or isinstance(error, torch.OutOfMemoryError):
            raise
        check_both_distributed("Distiller", f"both images and the {role}", x, own)
        if x.device != own.device:
            expected, got, remedy = f"on {own.device}", f"{x.device}", f'Pass x.to("{own.device}")'
        elif not x.is_floating_point():
            expected, got, remedy = (
                f"of {own.dtype}",
                f"{x.dtype}",
                "Normalise them: (x.float() - mean) / std",
            )
        elif x.dtype != own.dtype and not torch.is_autocast_enabled(x.device.type):
            expected, got, remedy = f"of {own.dtype}", f"{x.dtype}", f"Pass x.to({own.dtype})"
        else:
            raise
        raise InputError(
            f"Distiller: expected images {expected}, as the {role} is, got {got}, with which it fails: "
            f"{str(error).splitlines()[0].rstrip('.')}. {remedy}."
        ) from error


def _pull(term: Term, seen: Observation, share: float) -> float:
    """The norm of the gradient of a term of weight 1 at the layer pairs; 0 where there is none."""
    addend = share * torch.stack(list(term.contributions(seen).values())).sum()
    return gradient_norms_at_pairs(addend, seen) / term.weight if term.weight else 0.0


def _check_pulls(terms: Sequence[Term], pulls: Sequence[float]) -> None:
    for term, pull in zip(terms, pulls, strict=True):
        if not pull:
            raise InputError(
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
            raise InputError(
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
