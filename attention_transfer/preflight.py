"""The check of a first real batch, for the ways in which distillation fails without a word."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ._errors import InputError
from ._reading import first_line
from ._untouched import untouched
from .functional import cross_entropy, is_distributed, map_spread
from .kernels import distance
from .kernels.reference import accumulation_dtype
from .locality import Finding
from .pairs import Pair
from .plan import Plan
from .taps import Layout, source
from .terms.term import Observation, Reading

DOMINANT_SHARE = 0.95  # of the gradient at a pair: beyond it the terms leave the labels no say there
IDLE_SHARE = 0.005  # of the parameters' gradient: below it a term costs its time and does nothing
IGNORED = -100  # the label that does not count, as PyTorch's cross-entropy has it
SUM_TOLERANCE = 0.01  # of probabilities, which may come from float16
UNLIKELY, VERY_UNLIKELY = 1e-3, 1e-6  # that labels drawn among all outputs leave so many of them out
FLAT = 1e-3  # spread of a map that shows nothing
ROUNDING = 1e-5  # of unit maps: what sums in float32 and the epsilon of a LayerNorm leave of no difference
WORSE_THAN_CHANCE = 1.2  # times log(k), the cross-entropy of a guess


class PreflightWarning(UserWarning):
    """Training can go on, but probably not as meant."""


@dataclass(frozen=True)
class Preflight:
    """What a preflight found: the plan, with each term's share of the gradient, and the warnings."""

    plan: Plan
    warnings: Sequence[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([str(self.plan), *(f"warning: {warning}" for warning in self.warnings)])


def check_models(student: nn.Module, teacher: nn.Module | None) -> None:
    """Raise ValueError unless the student can learn and the teacher is frozen."""
    _check_student(student)
    _check_teacher(teacher)


def check_observation(
    seen: Observation, x: Tensor, open_weights: Sequence[str] = (), classes: int | None = None
) -> list[str]:
    """Raise ValueError for what is wrong with a batch and what the models made of it, and warn, as returned.

    `open_weights` names the terms whose weight is "auto" and was not found yet; `classes` is their number.
    """
    _check_outputs(seen, classes)
    _check_labels(seen)
    _check_finite(seen, x)
    _check_features(seen)
    return _warn([*_warn_of_outputs(seen), *_warn_of_weights(open_weights)])


def check_order(side: str, found: Mapping[str, Finding]) -> list[str]:
    """Raise ValueError for maps not in the order of the image; warn of those whose reading the user named."""
    wrong = {name: finding for name, finding in found.items() if not finding.in_order}
    for name, finding in wrong.items():
        if not finding.told:
            raise InputError(_out_of_order(side, name, finding))
    return _warn(
        [
            f"the {side}'s map at {name} does not follow the image: {_share_of(each)}. Is it read as meant?"
            for name, each in wrong.items()
        ]
    )


def check_terms(
    addends: dict[str, Float[Tensor, ""]], seen: Observation, plan: Plan, student: nn.Module
) -> Preflight:
    """Raise ValueError for a term that is dead or not finite, and warn of what looks unwise."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    gradients = {name: _gradients(addend, seen) for name, addend in addends.items()}
    overall = {name: _differentiate(name, addend, parameters) for name, addend in addends.items()}
    at_pairs = {name for row in plan.rows for name in row.weights}
    for name, addend in addends.items():
        _check_gradient(name, addend, overall[name], gradients[name] if name in at_pairs else None)
    _check_differences(seen)
    plan = replace(_with_shares(plan, gradients), shares=_shares(overall))
    of_maps = [*_warn_of_maps(seen), *_warn_of_flat_maps(seen)]
    found = [*_warn_of_teacher(seen), *of_maps, *_warn_of_shares(plan), *_warn_of_idleness(plan)]
    return Preflight(plan, _warn(found))


def _warn(messages: list[str]) -> list[str]:
    for message in messages:
        warnings.warn(f"preflight: {message}", PreflightWarning, stacklevel=4)
    return messages


@contextmanager
def statistics_kept(teacher: nn.Module | None) -> Iterator[None]:
    """Raise ValueError if what is done inside changes the teacher's buffers, such as BatchNorm statistics.

    They are put back as they were.
    """
    if teacher is None:
        yield
        return
    before = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    with untouched(teacher):
        yield
        after = dict(teacher.named_buffers())
        common = before.keys() & after.keys()
        changed = sorted(before.keys() ^ after.keys())
        changed += [name for name in before if name in common and not torch.equal(before[name], after[name])]
    if changed:
        raise InputError(
            f"preflight: expected a teacher that a forward pass leaves as it is, got changed buffers "
            f"{_list(changed)}. Give it layers that heed eval(), or it drifts while the student learns."
        )


def _sides(seen: Observation) -> dict[str, Reading]:
    return {"student": seen.student} | ({} if seen.teacher is None else {"teacher": seen.teacher})


def _names(seen: Observation, side: str) -> list[str]:
    return [getattr(pair, side) for pair in seen.pairs]


def _layers(reading: Reading) -> Sequence[Tensor]:
    """Something of each layer that is zero where the activation is: a cached teacher has no activations."""
    return reading.features or next(iter(reading.energies.values()), ())


@dataclass(frozen=True)
class _Maps:
    """Two maps that a term compares, and how far they are from flat."""

    pair: Pair
    student: Float[Tensor, "b _ _"]
    teacher: Float[Tensor, "b _ _"]
    rounding: tuple[float, float]  # of student and teacher, relative

    @property
    def spreads(self) -> tuple[float, float]:
        """Of student and teacher, the mean of the images whose map is not zero; NaN without any."""
        return _mean_spread(self.student), _mean_spread(self.teacher)

    @property
    def differ(self) -> bool:
        rounding, spreads = max(self.rounding), self.spreads
        if max(spreads) <= rounding:
            return False
        same_size = self.student.shape == self.teacher.shape
        return not same_size or distance(self.student, self.teacher, squared=False).mean().item() > rounding


def _gathered(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, which no mask can choose from; any other tensor as it is."""
    return cast("Any", tensor).full_tensor() if is_distributed(tensor) else tensor


def _counted(labels: Int[Tensor, " b ..."]) -> Int[Tensor, " n"]:
    """The class numbers that count."""
    labels = _gathered(labels)
    return labels[labels != IGNORED]


def _mean_spread(energy: Float[Tensor, "b h w"]) -> float:
    energy = _gathered(energy.detach())
    return map_spread(energy)[energy.flatten(1).any(1)].mean().item()


def _maps(seen: Observation) -> Iterator[_Maps]:
    """The maps at each pair, for each kind of energy that a term reads."""
    if seen.teacher is None:
        return
    layers = zip(_layers(seen.student), _layers(seen.teacher), strict=False)
    rounding = [(_rounding(student), _rounding(teacher)) for student, teacher in layers]
    for kind, students in seen.student.energies.items():
        yield from map(_Maps, seen.pairs, students, seen.teacher.energies.get(kind, ()), rounding)


def _rounding(layer: Float[Tensor, "b c ..."]) -> float:
    """What rounding to the layer's type leaves of a flat map: it is independent in each of c channels."""
    return max(ROUNDING, 2 * torch.finfo(layer.dtype).eps / math.sqrt(layer.shape[1]))


# --- faults -------------------------------------------------------------------------------------------------


def _check_student(student: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise InputError(
            "preflight: expected a student with trainable parameters, got none that requires a gradient. "
            "Call student.requires_grad_(True), or freeze only part of it."
        )


def _check_teacher(teacher: nn.Module | None) -> None:
    if teacher is None:
        return
    trainable = [name for name, parameter in teacher.named_parameters() if parameter.requires_grad]
    if trainable:
        raise InputError(
            f"preflight: expected a frozen teacher, got {_list(trainable)} with requires_grad=True. "
            "Call teacher.requires_grad_(False); only the student learns."
        )
    training = [name or "the teacher itself" for name, module in teacher.named_modules() if module.training]
    if training:
        raise InputError(
            f"preflight: expected a teacher in evaluation mode, got {_list(training)} in training mode, "
            "where dropout is on and BatchNorm statistics move even under no_grad. Call teacher.eval()."
        )


def _check_outputs(seen: Observation, classes: int | None) -> None:
    width = seen.student.logits.shape[1]
    if classes is not None and width != classes:
        raise InputError(
            f"preflight: expected a student with an output for each of {classes} classes, got {width}. Let "
            "it return its logits, rather than features, first or alone."
        )
    if width == 1:
        raise InputError(
            "preflight: expected a student of two outputs or more, got 1, whose cross-entropy is always 0. "
            "Build the student with num_classes=2."
        )


def _check_labels(seen: Observation) -> None:
    classes, labels = seen.student.logits.shape[1], seen.labels
    if labels.is_floating_point():
        _check_probabilities(labels)
        return
    labels = _counted(labels)
    if not labels.numel():
        raise InputError("preflight: expected labels that count, got none. Pass another batch.")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= classes:
        raise InputError(
            f"preflight: expected labels from 0 to {classes - 1}, as the student has {classes} outputs, got "
            f"{lowest} to {highest}. Build the student with num_classes={highest + 1} or mend the labels."
        )


def _check_probabilities(labels: Float[Tensor, "b k ..."]) -> None:
    sums = labels.sum(1)
    if not (labels.isfinite().all() and (labels >= 0).all() and ((sums - 1).abs() < SUM_TOLERANCE).all()):
        raise InputError(
            "preflight: expected floating labels as probabilities of classes, which sum to 1, got numbers "
            f"from {labels.min().item():.3g} on with sums from {sums.min().item():.3g} to "
            f"{sums.max().item():.3g}. Divide by their sum, or give class numbers; several classes an image "
            "need another loss."
        )


def _check_finite(seen: Observation, x: Tensor) -> None:
    tensors = {"the images": x}
    for side, reading in _sides(seen).items():
        layers = zip(_names(seen, side), _layers(reading), strict=False)
        tensors |= {f"the {side}'s activation at {name}": layer for name, layer in layers}
        tensors[f"the {side}'s logits"] = reading.logits
        if reading.input_gradient is not None:
            tensors[f"the {side}'s input gradient"] = reading.input_gradient
    for what, tensor in tensors.items():
        if bad := int((~tensor.isfinite()).sum()):
            raise InputError(
                f"preflight: expected finite numbers, got {bad} NaN or infinite entries in {what}. "
                "Look at the input's normalisation, the weights, and the range of the precision in use."
            )


def _out_of_order(side: str, name: str, finding: Finding) -> str:
    called, layout = name.partition("@")[0], finding.layout
    if finding.better is not None:
        return (
            f"preflight: expected patches from token {layout.prefix} on at the {side}'s {name}, got patches "
            f'that begin at token {finding.better.prefix}. Say so in its name: "{called}@{finding.better}".'
        )
    return (
        f"preflight: expected a map in the order of the image at the {side}'s {name}, got one that does not "
        f"follow it, read as {layout}: {_share_of(finding)}. Does the model drop, mask, shuffle or regroup "
        "its tokens, or are these other axes? Switch that off, tap another layer, or say how to read it in "
        f'its name, such as "{called}@{_other(layout)}".'
    )


def _other(layout: Layout) -> str:
    return {"nchw": "nhwc", "nhwc": "nchw"}.get(layout.kind, str(layout))


def _share_of(finding: Finding) -> str:
    return (
        "of a place inside of a changed region and one outside, the first changes more in "
        f"{finding.share:.0%} of cases (by chance: 50%)"
    )


def _check_features(seen: Observation) -> None:
    for pair, student in zip(seen.pairs, seen.student.features, strict=False):
        if not student.requires_grad:
            raise InputError(
                f"preflight: expected an activation with a gradient at the student's {pair.student}, got one "
                f"without: the term would be dead. {_why_no_gradient(pair)}"
            )
        if student.shape[2:].numel() == 1:
            raise InputError(
                f"preflight: expected a map at the student's {pair.student}, got a single position, whose "
                "map is 1 whatever the activation: the term is dead. Tap a layer before the pooling."
            )
    for pair, teacher in zip(seen.pairs, _layers(seen.teacher) if seen.teacher else (), strict=False):
        if not teacher.any():
            raise InputError(
                f"preflight: expected an activation to learn from at the teacher's {pair.teacher}, got zero "
                "everywhere on all images: the term is dead. Look at the teacher's weights and its input."
            )


def _why_no_gradient(pair: Pair) -> str:
    return (
        f"Either everything up to {pair.student} is frozen or runs under no_grad, or it is checkpointed with "
        "use_reentrant=True: pass use_reentrant=False, or tap a layer that learns."
    )


Gradients = Sequence[Tensor | None]


def gradient_norms_at_pairs(addend: Float[Tensor, ""], seen: Observation) -> float:
    """The L2 norm of d(addend)/d(activation) of the student, over all pairs; 0 where there is none."""
    return math.hypot(*map(_norm, _gradients(addend, seen)))


def _gradients(addend: Float[Tensor, ""], seen: Observation) -> Gradients:
    """d(addend)/d(activation) at each pair of the student."""
    sources = [source(features) for features in seen.student.features]
    if not sources or not addend.requires_grad:
        return [None] * len(sources)
    return torch.autograd.grad(addend, sources, retain_graph=True, allow_unused=True)


def _differentiate(name: str, addend: Float[Tensor, ""], parameters: Sequence[Tensor]) -> Gradients:
    """d(addend)/d(parameter) of the student; for a term over input gradients, the second derivative."""
    if not addend.requires_grad:
        return [None] * len(parameters)
    try:
        return torch.autograd.grad(addend, parameters, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise InputError(
            f"preflight: expected a term {name} that can be differentiated by the student's parameters, got: "
            f"{first_line(error)}. A term over input gradients differentiates twice: use an eager "
            "model of plain PyTorch operations."
        ) from error


def _check_gradient(name: str, addend: Tensor, overall: Gradients, at_pairs: Gradients | None) -> None:
    """A term is finite and reaches the student; one that works on layer pairs, through its layer."""
    reached = [gradient for gradient in (*overall, *(at_pairs or ())) if gradient is not None]
    if not (addend.isfinite() and all(gradient.isfinite().all() for gradient in reached)):
        raise InputError(
            f"preflight: expected finite terms and gradients, got NaN or infinity from {name} (value "
            f"{addend.item():.3g}). Use a wider precision (bfloat16 or float32) or scale the loss."
        )
    left_out = name == "ce" and addend == 0  # on purpose: alpha 1 leaves labels no weight
    if not left_out and (not _alive(overall) or (at_pairs is not None and not _alive(at_pairs))):
        raise InputError(
            f"preflight: expected every term to move the student, got no gradient from {name} (value "
            f"{addend.item():.3g}): the term is dead. {_why_dead(addend)}"
        )


def _check_differences(seen: Observation) -> None:
    """A share of the gradient does not show it: ||D|| has a gradient of norm 1 however small D is."""
    for maps in _maps(seen):
        if maps.differ:
            continue
        student, teacher = maps.spreads
        why = (
            BEFORE_NORM
            if max(student, teacher) <= max(FLAT, *maps.rounding)
            else "Is the student a copy of the teacher?"
        )
        raise InputError(
            f"preflight: expected maps that differ at the pair {maps.pair}, got maps that are equal to "
            f"rounding, with spreads of {student:.1e} and {teacher:.1e} (standard deviation over mean of the "
            f"energy): the term is dead. {why}"
        )


BEFORE_NORM = (
    "After a norm over the channels a map is flat: tap the layer before the norm, or what the norm is given "
    '("layers.3.norm2.input").'
)


def _alive(gradients: Gradients) -> bool:
    return any(gradient is not None and bool(gradient.count_nonzero()) for gradient in gradients)


def _why_dead(addend: Tensor) -> str:
    if addend == 0:
        return (
            "Its weight is zero, or student and teacher already agree: is the student a copy of the teacher?"
        )
    return "The student's activation there is zero everywhere, or is cut off from its parameters."


# --- warnings -----------------------------------------------------------------------------------------------


def _warn_of_outputs(seen: Observation) -> Iterator[str]:
    """Of features that were taken for logits."""
    if seen.labels.is_floating_point():
        return
    drawn = _counted(seen.labels).unique()
    needed = int(drawn.max()) + 1
    for side, reading in _sides(seen).items():
        width = reading.logits.shape[1]
        argument = "logits" if side == "student" else "teacher_logits"
        for index, other in reading.rivals:
            if needed <= other < width:
                yield (
                    f"the {side} returns several tensors that could be its logits, and the first, of {width} "
                    f"classes, was taken; the one at {index} has {other}, enough for the labels of this "
                    f"batch. Say which: Distiller({argument}={index}) or another, or return it alone."
                )
    width = seen.student.logits.shape[1]
    theirs = width if seen.teacher is None else seen.teacher.logits.shape[1]
    fewer, limit = (theirs, UNLIKELY) if needed <= theirs < width else (needed, VERY_UNLIKELY)
    if not seen.student.rivals and (fewer / width) ** len(drawn) < limit:
        yield (
            f"the student has {width} outputs, but no label of this batch is beyond {needed - 1}"
            f"{f', and the teacher has {theirs}' if fewer == theirs else ''}. Are they features rather than "
            "logits? Say where these are, Distiller(logits=...), return them alone, or build the student "
            "with as many classes as there are."
        )


def _warn_of_weights(open_weights: Sequence[str]) -> Iterator[str]:
    for name in open_weights:
        yield (
            f'the weight "auto" of {name} was not found yet, and acts as 1. Pass what `balance` finds on a '
            "batch to `settle`: distiller.settle(distiller.balance(x, y))."
        )


def _warn_of_teacher(seen: Observation) -> Iterator[str]:
    if seen.teacher is None:
        return
    logits = seen.teacher.logits
    if logits.shape != seen.student.logits.shape or logits.shape[1] < 2:
        return
    loss, chance = cross_entropy(logits, seen.labels).item(), math.log(logits.shape[1])
    if loss > WORSE_THAN_CHANCE * chance:
        yield (
            f"the teacher does worse than chance on this batch (cross-entropy {loss:.2f}, a guess has "
            f"{chance:.2f}). Is it trained, and does it expect another input normalisation, size or order of "
            "classes? See Distiller(teacher_transform=...)."
        )


def _warn_of_maps(seen: Observation) -> Iterator[str]:
    for side, reading in _sides(seen).items():
        for name, layer in zip(_names(seen, side), _layers(reading), strict=False):
            blank = (layer.detach().flatten(1).count_nonzero(1) == 0).float().mean().item()
            if blank:
                yield f"the {side}'s activation at {name} is zero everywhere on {blank:.0%} of the images."


def _warn_of_flat_maps(seen: Observation) -> Iterator[str]:
    found = {}  # one warning a layer, though it may be in several pairs
    for maps in _maps(seen):
        student, teacher = maps.spreads
        if teacher <= max(FLAT, maps.rounding[1]):
            what = "the term pulls the student to a flat map, which shows it nothing"
            found["teacher", maps.pair.teacher] = teacher, what
        if student <= max(FLAT, maps.rounding[0]):
            what = "if a norm makes it so, it stays so, whatever the student learns"
            found["student", maps.pair.student] = student, what
    for (side, name), (spread, what) in found.items():
        yield (
            f"the {side}'s map at {name} is flat, with a spread of {spread:.1e} (standard deviation over "
            f"mean of the energy): {what}. {BEFORE_NORM}"
        )


def _warn_of_shares(plan: Plan) -> Iterator[str]:
    at_pairs = {name for row in plan.rows for name in row.weights}
    for row in plan.rows:
        share = sum(share for name, share in row.shares.items() if name in at_pairs)
        if share > DOMINANT_SHARE:
            yield (
                f"{', '.join(sorted(at_pairs & row.shares.keys()))} make up {share:.0%} of the gradient at "
                f"{row.pair.student}: labels have little say there. A smaller beta is likely to teach more."
            )


def _warn_of_idleness(plan: Plan) -> Iterator[str]:
    """Of each term as a whole: one pair of several may well be quiet."""
    by_term: dict[str, float] = {}
    for name, share in plan.shares.items():
        term = name.partition("/")[0]
        by_term[term] = by_term.get(term, 0.0) + share
    for term, share in by_term.items():
        if share < IDLE_SHARE and term != "ce":
            yield (
                f"{term} makes up {share:.2%} of the gradient of the student's parameters: it does next to "
                'nothing. Raise its weight; for terms at layer pairs, "auto" finds one.'
            )


def _shares(gradients: dict[str, Gradients]) -> dict[str, float]:
    """Each term's norm of a gradient, over the sum of these norms."""
    norms = {name: math.hypot(*map(_norm, each)) for name, each in gradients.items()}
    total = sum(norms.values())
    return {name: norm / total for name, norm in norms.items()} if total else {}


def _with_shares(plan: Plan, gradients: dict[str, Gradients]) -> Plan:
    """Each term's norm of the gradient at a pair's student activation, over the sum of these norms."""
    rows = []
    for index, row in enumerate(plan.rows):
        shares = _shares({name: [at_pairs[index]] for name, at_pairs in gradients.items()})
        rows.append(replace(row, shares={name: share for name, share in shares.items() if share}))
    return replace(plan, rows=rows)


def _norm(gradient: Tensor | None) -> float:
    if gradient is None:
        return 0.0
    return torch.linalg.vector_norm(gradient, dtype=accumulation_dtype(gradient.dtype)).item()


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
