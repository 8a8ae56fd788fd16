"""The formulas of attention transfer, as pure functions of tensors.

Axis letters: b batch, c channels, h w space, n = h*w, k classes. Equations are those of Zagoruyko &
Komodakis, "Paying More Attention to Attention" (ICLR 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from . import kernels
from ._choices import Form, Mapping, Side
from .kernels.reference import accumulation_dtype, unit

Activations = Float[Tensor, "b _ _ _"] | Sequence[Float[Tensor, "b _ _ _"]]  # channels and sizes may differ

LARGEST_P = 64.0  # beyond it, |A|^p of two channels a few percent apart leaves float32
TYPICAL_DISTANCE = 0.4  # of two unit maps early in training; what convert_beta assumes when not told


def attention_map(
    features: Float[Tensor, "b c h w"], *, p: float = 2.0, mapping: Mapping = "sum", norm: int | None = 2
) -> Float[Tensor, "b h w"]:
    """Spatial attention map of an activation: Q = sum (or max) over c of |A_c|^p, divided by ||Q||_2.

    Args:
        features: activation A of any floating type.
        p: exponent, 1 <= p <= 64.
        mapping: "sum" or "max" over the channels (section 3.1 of the paper).
        norm: 2 divides each sample's map, taken as one vector of n = h*w entries, by its L2 norm, so the
            scale of A does not matter; None gives the energy Q itself.

    Returns:
        The maps, float32 (float64 for float64 features). An all-zero activation gives an all-zero map;
        a sample with a non-finite activation gives NaN.

    Raises:
        TypeError: if features is not a floating tensor.
        ValueError: if features is not (b, c, h, w) with no empty axis, or p, mapping or norm is not as above.
    """
    _check_features("attention_map", "features", features)
    _check_energy_options("attention_map", p, mapping)
    if norm not in (None, 2):
        raise ValueError(f"attention_map: expected norm=2 or norm=None, got {norm!r}.")
    energy, scale = kernels.energy(features, float(p), mapping)
    if norm is None:
        return energy * scale.view(-1, 1, 1) ** p
    return unit(energy)


def attention_transfer_loss(
    student: Activations,
    teacher: Activations,
    *,
    beta: float,
    p: float = 2.0,
    mapping: Mapping = "sum",
    form: Form = "paper",
    resize: Side | None = None,
    weights: Sequence[float] | None = None,
) -> Float[Tensor, ""]:
    """Attention-transfer term: how far the student's attention maps Y_S are from the teacher's Y_T.

    With D = Y_S - Y_T for each layer pair, summed over the pairs:

    - form "paper": beta/2 * mean over b of ||D||_2 (equation 2); beta about 1
    - form "code": beta * mean over b and n of D^2 (the authors' released code); beta 1000
    - form "caffe": beta/(2b) * sum over b and n of D^2 (Caffe's EuclideanLoss)

    `convert_beta` carries beta from one form to another.

    Args:
        student, teacher: activations of equal batch size, a tensor each or a sequence each with one entry a
            pair. Channels may differ.
        beta: weight of the term, >= 0.
        p, mapping: as in `attention_map`.
        form: which of the three.
        resize: whose energies are resized to the other's (h, w) before they are normalised: bilinear along
            an axis that grows, area average along one that shrinks. None: unequal (h, w) are an error.
        weights: a factor for each pair; 1 unless given.

    Returns:
        A scalar, float32 (float64 for float64 activations).

    Raises:
        TypeError: if an activation is not a floating tensor.
        ValueError: on unequal numbers of pairs, batch sizes or, without resize, (h, w), and on an option
            that is not as above.
    """
    students, teachers = _as_pairs(student, teacher)
    factors = [1.0] * len(students) if weights is None else list(weights)
    check_loss_options("attention_transfer_loss", beta, p, mapping, form, resize)
    if len(factors) != len(students):
        raise ValueError(
            f"attention_transfer_loss: expected a weight for each of {len(students)} pairs, "
            f"got {len(factors)}."
        )
    terms = []
    for factor, a_s, a_t in zip(factors, students, teachers, strict=True):
        _check_pair(a_s, a_t, resize)
        energies = [kernels.energy(features, float(p), mapping)[0] for features in (a_s, a_t)]
        terms.append(loss_of_energies(*energies, beta=beta * factor, form=form, resize=resize))
    return torch.stack(terms).sum()


def loss_of_energies(
    student: Float[Tensor, "b _ _"],
    teacher: Float[Tensor, "b _ _"],
    *,
    beta: float,
    form: Form = "paper",
    resize: Side | None = None,
) -> Float[Tensor, ""]:
    """The attention-transfer term of one pair, from energies: `attention_transfer_loss` after its first step.

    Args:
        student, teacher: energies, each sample's up to a positive factor, which normalisation takes out.
        beta, form, resize: as in `attention_transfer_loss`.

    Raises:
        ValueError: on unequal batch sizes or, without resize, (h, w).
    """
    _check_sizes(student.shape, teacher.shape, resize)
    if resize == "student":
        student = resize_maps(student, teacher.shape[1:])
    elif resize == "teacher":
        teacher = resize_maps(teacher, student.shape[1:])
    squared, factor = _FORMS[form]
    n = student.shape[1] * student.shape[2]
    return beta * factor(n) * kernels.distance(student, teacher, squared=squared).mean()


# Each form is a factor times the mean over b of ||D||_2, or of its square: (squared, factor at n positions).
_FORMS: dict[Form, tuple[bool, Callable[[int], float]]] = {
    "paper": (False, lambda n: 1 / 2),
    "code": (True, lambda n: 1 / n),
    "caffe": (True, lambda n: 1 / 2),
}


def convert_beta(
    beta: float,
    *,
    source: Form,
    target: Form,
    hw: tuple[int, int],
    batch: int | tuple[Float[Tensor, "b c_s h w"], Float[Tensor, "b c_t h w"]] | None = None,
) -> float:
    """The beta with which form `target` pulls as hard as form `source` does with `beta`, at one layer pair.

    Between "code" and "caffe" the two terms are equal: beta_caffe = 2 beta_code / n. Between "paper" and a
    squared form no factor is exact, because one grows with the distance ||D|| and the other with its square;
    their gradients are parallel, and equal at one distance:

        beta_paper = 2 ||D|| beta_caffe = 4 ||D|| beta_code / n.

    Args:
        beta: the weight to convert.
        source, target: names of the forms.
        hw: (h, w) of the maps.
        batch: (student, teacher) activations of the pair: ||D|| is their mean distance. Without them ||D||
            is taken as 0.4; it was 0.29 to 0.38 over the first epoch of the CIFAR-10 run in the README. The
            size of a batch may be given, but makes no difference: every form averages over the batch.

    Raises:
        ValueError: on an unknown form, a negative beta, an empty hw, or a batch whose maps are all equal.
    """
    for form in (source, target):
        _check_choice("convert_beta", "form", form, Form)
    if beta < 0 or min(hw) < 1:
        raise ValueError(f"convert_beta: expected beta >= 0 and h, w >= 1, got beta {beta} and hw {hw}.")
    distance = _mean_distance(*batch) if isinstance(batch, tuple) else TYPICAL_DISTANCE
    # d(term)/dD of each form with beta = 1, over that of "caffe", which is D/b
    pull = {"caffe": 1.0, "code": 2 / math.prod(hw), "paper": 1 / (2 * distance)}
    return beta * pull[source] / pull[target]


def distillation_loss(
    student_logits: Float[Tensor, "b k"], teacher_logits: Float[Tensor, "b k"], *, temperature: float = 4.0
) -> Float[Tensor, ""]:
    """Knowledge distillation (Hinton et al. 2015): T^2 * mean over b of KL(softmax(t/T) || softmax(s/T)).

    Args:
        student_logits, teacher_logits: logits of the same classes, in the same order.
        temperature: T > 0; softens both distributions.

    Raises:
        ValueError: if the logits' shapes differ or are not (b, k), or temperature is not positive.
    """
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"distillation_loss: expected logits of equal shape (b, k), got student "
            f"{tuple(student_logits.shape)} and teacher {tuple(teacher_logits.shape)}. Distillation needs "
            f"the same classes on both sides; attention transfer does not."
        )
    if not temperature > 0:
        raise ValueError(f"distillation_loss: expected temperature > 0, got {temperature}.")
    dtype = accumulation_dtype(student_logits.dtype)
    log_student = F.log_softmax(student_logits.to(dtype) / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.to(dtype) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


# --- maps of unequal size -----------------------------------------------------------------------------------


def resize_maps(maps: Float[Tensor, "b h w"], size: Sequence[int]) -> Float[Tensor, "b height width"]:
    """Maps of another size: area average along an axis that shrinks, bilinear along one that grows."""
    if maps.shape[1:] == tuple(size):
        return maps
    smaller = (min(maps.shape[1], size[0]), min(maps.shape[2], size[1]))
    shrunk = F.adaptive_avg_pool2d(maps.unsqueeze(1), smaller)
    return F.interpolate(shrunk, tuple(size), mode="bilinear", align_corners=False).squeeze(1)


@torch.no_grad()
def _mean_distance(student: Tensor, teacher: Tensor) -> float:
    distance = 2 * float(attention_transfer_loss(student, teacher, beta=1.0, form="paper"))
    if not 0 < distance < math.inf:
        raise ValueError(
            f"convert_beta: expected a batch whose maps differ, got a mean distance of {distance}."
        )
    return distance


# --- checks -------------------------------------------------------------------------------------------------


def _as_pairs(student: Activations, teacher: Activations) -> tuple[list[Tensor], list[Tensor]]:
    students = [student] if isinstance(student, Tensor) else list(student)
    teachers = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    if len(students) != len(teachers) or not students:
        raise ValueError(
            f"attention_transfer_loss: expected as many student as teacher activations, at least one, got "
            f"{len(students)} and {len(teachers)}."
        )
    return students, teachers


def _check_features(function: str, what: str, features: Tensor) -> None:
    if not isinstance(features, Tensor) or not features.is_floating_point():
        got = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"{function}: expected {what} as a floating tensor, got {got}.")
    if features.ndim != 4 or 0 in features.shape:
        raise ValueError(
            f"{function}: expected {what} of shape (b, c, h, w) with no empty axis, got "
            f"{tuple(features.shape)}. Taps brings tokens (b, n, c) and (b, h, w, c) to that order."
        )


def _check_pair(student: Tensor, teacher: Tensor, resize: Side | None) -> None:
    function = "attention_transfer_loss"
    _check_features(function, "student activations", student)
    _check_features(function, "teacher activations", teacher)
    _check_sizes((len(student), *student.shape[2:]), (len(teacher), *teacher.shape[2:]), resize)


def _check_sizes(student: Sequence[int], teacher: Sequence[int], resize: Side | None) -> None:
    """(b, h, w) of both sides."""
    function = "attention_transfer_loss"
    if student[0] != teacher[0]:
        raise ValueError(
            f"{function}: expected equal batch sizes, got student {student[0]} and teacher {teacher[0]}. "
            "Feed both the same images."
        )
    if resize is None and student[1:] != teacher[1:]:
        raise ValueError(
            f"{function}: expected equal (h, w), got student {tuple(student[1:])} and teacher "
            f'{tuple(teacher[1:])}. Tap layers of equal stride, or pass resize="student".'
        )


def _check_energy_options(function: str, p: float, mapping: str) -> None:
    if not 1 <= p <= LARGEST_P:
        raise ValueError(f"{function}: expected 1 <= p <= {LARGEST_P:g}, got {p}.")
    _check_choice(function, "mapping", mapping, Mapping)


def check_loss_options(
    function: str, beta: float, p: float, mapping: str, form: str, resize: str | None
) -> None:
    """Raise ValueError, in the name of `function`, unless the options are those of the loss."""
    if not 0 <= beta < math.inf:
        raise ValueError(f"{function}: expected a finite beta >= 0, got {beta}.")
    _check_energy_options(function, p, mapping)
    _check_choice(function, "form", form, Form)
    if resize is not None:
        _check_choice(function, "resize", resize, Side)


def _check_choice(function: str, option: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{function}: expected {option} as one of {list(get_args(choices))}, got {value!r}.")
