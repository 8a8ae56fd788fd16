"""The formulas of attention transfer, as pure functions of tensors.

Axis letters: b batch, c channels, h w space, n = h*w, k classes. Equations are those of Zagoruyko &
Komodakis, "Paying More Attention to Attention" (ICLR 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch.autograd.forward_ad import make_dual, unpack_dual

from . import kernels
from ._choices import Form, Mapping, Side
from ._errors import InputError, InputTypeError
from ._outputs import logits_of
from .kernels import reference
from .kernels.reference import accumulation_dtype, l2_norm, power_of_two_near, unit

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
            scale of A does not matter; None gives the energy Q itself, computed in float64 and rounded.

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
        raise InputError(f"attention_map: expected norm=2 or norm=None, got {norm!r}.")
    if norm is None:
        # float64 loses nothing that the result can hold, neither of the powers nor of their derivatives
        wide = features if features.device.type == "mps" else features.double()
        return raw_energy(wide, p, mapping).to(accumulation_dtype(features.dtype))
    return unit(kernels.differentiable_energy(features, float(p), mapping)[0])


def raw_energy(features: Float[Tensor, "b c h w"], p: float, mapping: Mapping) -> Float[Tensor, "b h w"]:
    """Q = sum (or max) over c of |A_c|^p in the type that energies are summed in, as far as it reaches."""
    return kernels.differentiable_energy(features, float(p), mapping, relative=False)[0]


def map_spread(energy: Float[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """How far each map is from flat: the standard deviation of its energy over the positions, over the mean.

    0 for a flat map, which tells a student nothing, and for an energy of zero; about 1 for one with a clear
    peak.
    """
    positions = energy.detach().to(kernels.reference.accumulation_dtype(energy.dtype)).flatten(1)
    mean = positions.mean(1)
    return positions.std(1, correction=0) / torch.where(mean == 0, 1, mean)


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
    function = "attention_transfer_loss"
    check_loss_options(function, beta, p, mapping, form, resize)
    terms = []
    for factor, a_s, a_t in _weighted_pairs(function, student, teacher, weights):
        _check_pair(function, a_s, a_t, resize)
        energies = [kernels.differentiable_energy(side, float(p), mapping)[0] for side in (a_s, a_t)]
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
        TypeError: if one side alone is a DTensor.
        ValueError: on unequal batch sizes or, without resize, (h, w).
    """
    check_both_distributed("attention_transfer_loss", "both sides", student, teacher)
    _check_sizes("attention_transfer_loss", student.shape, teacher.shape, resize)
    if resize == "student":
        student = resize_maps(student, teacher.shape[1:])
    elif resize == "teacher":
        teacher = resize_maps(teacher, student.shape[1:])
    return _in_form(form, beta, student, teacher, kernels.distance)


def _in_form(
    form: Form, beta: float, student: Tensor, teacher: Tensor, distance: Callable[..., Tensor]
) -> Float[Tensor, ""]:
    squared, factor = _FORMS[form]
    return beta * factor(student[0].numel()) * distance(student, teacher, squared=squared).mean()


# Each form is a factor times the mean over b of ||D||_2, or of its square: (squared, factor at n entries).
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
            is taken as 0.4; it was 0.29 to 0.38 over the first epoch of the CIFAR-10 run in docs/measured.md.
            The size of a batch may be given, but makes no difference: every form averages over the batch.

    Raises:
        ValueError: on an unknown form, a negative beta, an empty hw, or a batch whose maps are all equal.
    """
    for form in (source, target):
        _check_choice("convert_beta", "form", form, Form)
    if beta < 0 or min(hw) < 1:
        raise InputError(f"convert_beta: expected beta >= 0 and h, w >= 1, got beta {beta} and hw {hw}.")
    distance = _mean_distance(*batch) if isinstance(batch, tuple) else TYPICAL_DISTANCE
    # d(term)/dD of each form with beta = 1, over that of "caffe", which is D/b
    pull = {"caffe": 1.0, "code": 2 / math.prod(hw), "paper": 1 / (2 * distance)}
    return beta * pull[source] / pull[target]


def distillation_loss(
    student_logits: Float[Tensor, "b k *pixels"],
    teacher_logits: Float[Tensor, "b k *pixels"],
    *,
    temperature: float = 4.0,
) -> Float[Tensor, ""]:
    """Knowledge distillation (Hinton et al. 2015): T^2 * mean over b of KL(softmax(t/T) || softmax(s/T)).

    Args:
        student_logits, teacher_logits: logits of the same classes, in the same order; of each pixel, if they
            are (b, k, h, w): then the mean is over the pixels too.
        temperature: T > 0; softens both distributions.

    Raises:
        ValueError: if the logits' shapes differ or are neither (b, k) nor (b, k, h, w), or temperature is
            not positive.
    """
    if student_logits.ndim not in (2, 4) or student_logits.shape != teacher_logits.shape:
        raise InputError(
            f"distillation_loss: expected logits of equal shape, (b, k) or (b, k, h, w), got student "
            f"{tuple(student_logits.shape)} and teacher {tuple(teacher_logits.shape)}. Distillation needs "
            f"the same classes on both sides; attention transfer does not."
        )
    if not (is_number(temperature) and temperature > 0):
        raise InputError(f"distillation_loss: expected temperature > 0, got {temperature!r}.")
    dtype = accumulation_dtype(student_logits.dtype)
    log_student, log_teacher = (
        F.log_softmax(logits.to(dtype).movedim(1, -1).flatten(0, -2) / temperature, dim=1)
        for logits in (student_logits, teacher_logits)
    )
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


# --- labels -------------------------------------------------------------------------------------------------


def cross_entropy(
    logits: Float[Tensor, "b k *pixels"], labels: Tensor, *, reduction: str = "mean"
) -> Float[Tensor, ""]:
    """The cross-entropy with labels as `class_targets` gives them, in float32 or better."""
    return F.cross_entropy(_wide(logits), labels, reduction=reduction)


def class_targets(
    labels: Num[Tensor, "..."], logits: Float[Tensor, "b k *pixels"], user: str
) -> Int[Tensor, " b *pixels"] | Float[Tensor, "b k *pixels"]:
    """The labels as the cross-entropy takes them: class numbers as int64, or probabilities of every class.

    Args:
        labels: class numbers (b, *pixels) of any type of whole numbers, also as (b, 1, *pixels); or
            floating probabilities of the logits' shape, as mixup and label smoothing make them.

    Raises:
        TypeError: in the name of `user`, if the labels are no tensor, or a DTensor and the logits none.
        ValueError: in the name of `user`, if they are neither of both, or on another device.
    """
    check_labels_are_a_tensor(labels, user)
    batch, _, *pixels = logits.shape
    if labels.device != logits.device:
        raise InputError(
            f"{user}: expected labels on {logits.device}, where the logits are, got {labels.device}. "
            f'Pass labels.to("{logits.device}").'
        )
    check_both_distributed(user, "both labels and logits", labels, logits)
    if labels.is_floating_point() and labels.shape == logits.shape:
        return labels.to(accumulation_dtype(logits.dtype))
    whole = not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool
    shape = tuple(labels.shape)
    if whole and shape in ((batch, *pixels), (batch, 1, *pixels)):
        return labels.reshape(batch, *pixels).long()
    if pixels:
        raise InputError(
            f"{user}: expected labels of shape {(batch, *pixels)}, as the student's logits have, got {shape} "
            f"of {labels.dtype}. Bring labels or logits to one size; classes are whole numbers."
        )
    raise InputError(
        f"{user}: expected an integer label for each of {batch} rows of logits, got {labels.dtype} of shape "
        f"{shape}. Give the class numbers of the batch, or probabilities of shape {tuple(logits.shape)}."
    )


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor, which nobody needs to import for this question."""
    return hasattr(tensor, "full_tensor")


def check_both_distributed(user: str, what: str, first: Tensor, second: Tensor) -> None:
    """Raise TypeError, in the name of `user`, if one of two tensors alone is a DTensor."""
    if is_distributed(first) != is_distributed(second):
        kinds = " and ".join(type(each).__name__ for each in (first, second))
        raise InputTypeError(
            f"{user}: expected {what} as DTensor or neither, got {kinds}. "
            "Call full_tensor() of the one, or distribute the other over the same mesh."
        )


def check_labels_are_a_tensor(labels: object, user: str) -> None:
    """Raise TypeError, in the name of `user`, unless they are."""
    if not isinstance(labels, Tensor):
        raise InputTypeError(
            f"{user}: expected labels as a tensor, got {type(labels).__name__}. Pass torch.tensor(labels)."
        )


# --- full activations ---------------------------------------------------------------------------------------


def activation_transfer_loss(
    student: Activations,
    teacher: Activations,
    *,
    beta: float,
    form: Form = "paper",
    resize: Side | None = None,
    weights: Sequence[float] | None = None,
) -> Float[Tensor, ""]:
    """Full-activation transfer, F-ActT: how far the student's activations are from the teacher's.

    The paper's baseline (section 4.1.2, table 1): the hints of FitNets (Romero et al. 2015) with activations
    brought to unit L2 norm first. With D = A_S/||A_S||_2 - A_T/||A_T||_2 of each sample, taken as one vector
    of c*h*w entries, summed over the pairs:

    - form "paper": beta/2 * mean over b of ||D||_2
    - form "code": beta * mean over b and c*h*w of D^2
    - form "caffe": beta/(2b) * sum over b and c*h*w of D^2

    Args:
        student, teacher: activations of equal batch size and channels, a tensor each or a sequence each with
            one entry a pair. `ActivationTransfer` learns the 1x1 convolution that unequal channels need.
        beta: weight of the term, >= 0.
        form: which of the three.
        resize: whose activations are resized to the other's (h, w) before they are normalised, as in
            `resize_maps`. None: unequal (h, w) are an error.
        weights: a factor for each pair; 1 unless given.

    Returns:
        A scalar, float32 (float64 for float64 activations). A sample of zeros stays zero, with no gradient.

    Raises:
        TypeError: if an activation is not a floating tensor.
        ValueError: on unequal numbers of pairs, batch sizes, channels or, without resize, (h, w), and on an
            option that is not as above.
    """
    function = "activation_transfer_loss"
    check_term_options(function, beta, form, resize)
    terms = []
    for factor, a_s, a_t in _weighted_pairs(function, student, teacher, weights):
        _check_pair(function, a_s, a_t, resize)
        _check_channels(function, a_s, a_t)
        a_s, a_t = _at_one_size(a_s, a_t, resize)
        terms.append(_in_form(form, beta * factor, a_s, a_t, reference.distance))
    return torch.stack(terms).sum()


def _at_one_size(
    student: Float[Tensor, "b c _ _"], teacher: Float[Tensor, "b c _ _"], resize: Side | None
) -> tuple[Float[Tensor, "b c n"], Float[Tensor, "b c n"]]:
    """Both activations at the (h, w) that they are compared at, in the type that they are summed in."""
    size = (teacher if resize == "student" else student).shape[2:]
    return _resized(student, size).flatten(2), _resized(teacher, size).flatten(2)


def _resized(features: Float[Tensor, "b c _ _"], size: Sequence[int]) -> Float[Tensor, "b c height width"]:
    """`resize_maps` of each channel; then up to a positive factor a sample, so that no sum overflows."""
    wide = _wide(features)
    if features.shape[2:] == tuple(size):
        return wide
    scale = power_of_two_near(wide.detach().abs().amax((1, 2, 3)))
    channels = (wide / scale.view(-1, 1, 1, 1)).flatten(0, 1)
    return resize_maps(channels, size).unflatten(0, features.shape[:2])


# --- input gradients ----------------------------------------------------------------------------------------


def input_gradient(
    model: nn.Module,
    x: Float[Tensor, "b c h w"],
    y: Num[Tensor, "b ..."],
    *,
    create_graph: bool = False,
) -> Float[Tensor, "b c h w"]:
    """Input gradient of a classifier: J = d(cross-entropy summed over the batch)/dx, equation 3.

    Summed, so that each sample has the gradient of its own loss whatever the batch size (where BatchNorm in
    train mode couples the samples, that of the whole sum). No `.grad` is changed, x's included, and the
    caller may be in no_grad mode.

    With create_graph the result can be differentiated by the model's parameters (double backward). That
    keeps what the forward and the backward pass made in memory until then: about twice what an ordinary
    step keeps (1.95 to 1.98 times in wide residual networks, in float32).

    Args:
        model: gives logits (b, k): a tensor, an object with `.logits`, or a tuple that begins with them.
        x: the images, of any floating type.
        y: the labels, of any type that `Distiller` takes.
        create_graph: whether J is to be differentiated again.

    Returns:
        J, of the type of x.

    Raises:
        ValueError: if x is not floating, if y is not a label for each of the logits' rows, if the logits do
            not depend on x, inside a transform of torch.func; and with create_graph, if the model is compiled
            or holds an operation that cannot be differentiated twice.
    """
    if not x.is_floating_point():
        raise InputError(
            f"input_gradient: expected floating images, got {x.dtype}. Normalise them first, as for training."
        )
    if create_graph:
        check_double_backward(model, "input_gradient")
    with torch.enable_grad():
        x = leaf(x, "input_gradient")
        logits = logits_of(model(x), user="input_gradient")
        return input_gradient_of(logits, y, x, create_graph=create_graph)


def leaf(x: Float[Tensor, "b c h w"], user: str) -> Float[Tensor, "b c h w"]:
    """The images as something to differentiate by.

    Raises:
        ValueError: in the name of `user`, inside a transform of torch.func, which forbids it.
    """
    if torch._C._are_functorch_transforms_active():
        raise InputError(
            f"{user}: expected to be outside of torch.func's transforms, as torch.autograd takes the input "
            "gradient, got a call inside of one. Use backward(), torch.autograd.grad or make_dual."
        )
    return detached(x).requires_grad_()


def detached(tensor: Tensor) -> Tensor:
    """The tensor outside of any graph; unlike `Tensor.detach` with its tangent, if it has one."""
    tangent = unpack_dual(tensor).tangent
    return tensor.detach() if tangent is None else make_dual(tensor.detach(), tangent.detach())


def input_gradient_of(
    logits: Float[Tensor, "b k *pixels"],
    labels: Num[Tensor, "b ..."],
    x: Float[Tensor, "b c h w"],
    *,
    create_graph: bool,
    user: str = "input_gradient",
) -> Float[Tensor, "b c h w"]:
    """`input_gradient` where the model has run: from the logits that it made of an x that requires grad.

    Without create_graph the graph of the logits is gone afterwards.

    Raises:
        ValueError: in the name of `user`, as `input_gradient`.
    """
    labels = class_targets(labels, logits, user)
    _check_graph(user, logits, x)
    with torch.enable_grad():
        loss = cross_entropy(logits, labels, reduction="sum")
        gradient = _by_input(user, loss, x, create_graph)
    if gradient is None:
        raise InputError(
            f"{user}: expected logits that depend on x, got none that do. Run the model on this very x, "
            "without detach() or no_grad() inside."
        )
    if create_graph:
        _check_twice_differentiable(user, gradient)
    return gradient


def _by_input(user: str, loss: Tensor, x: Tensor, create_graph: bool) -> Tensor | None:
    try:
        return torch.autograd.grad(loss, x, create_graph=create_graph, allow_unused=True)[0]
    except RuntimeError as error:
        if "checkpoint" not in str(error):
            raise
        raise InputError(
            f"{user}: expected a model that can be differentiated by its input, got reentrant checkpointing. "
            "Pass use_reentrant=False to torch.utils.checkpoint."
        ) from error


def check_double_backward(model: nn.Module, user: str) -> None:
    """Raise ValueError, in the name of `user`, if the model or a part of it is compiled."""
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise InputError(
                f"{user}: expected an eager model, for compiled code cannot be differentiated twice, got "
                f"{f'the compiled module {name!r}' if name else 'a compiled model'}. "
                "Pass the model as it was before torch.compile."
            )


# What stands in the graph of a gradient that cannot be differentiated again, and what put it there.
_DEAD_ENDS = {
    "torch::autograd::Error": "a custom autograd function that is once_differentiable",
    "torch::autograd::NotImplemented": "an operation without a second derivative, such as fused attention",
    "CompiledFunctionBackwardBackward": "a compiled function",
}


def _check_twice_differentiable(user: str, gradient: Tensor) -> None:
    found = "a gradient cut off from its graph" if gradient.grad_fn is None else _dead_end(gradient.grad_fn)
    if found:
        raise InputError(
            f"{user}: expected a model that can be differentiated twice, got {found}. "
            "Use plain PyTorch operations in its place; for fused attention, "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
        )


def _dead_end(node: torch.autograd.graph.Node) -> str | None:
    """What in the graph of a gradient forbids to differentiate it, or None."""
    seen, waiting = {node}, [node]
    while waiting:
        node = waiting.pop()
        if reason := _DEAD_ENDS.get(node.name()):
            return reason
        following = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= following
        waiting += following
    return None


def gradient_transfer_loss(
    student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c h w"], *, beta: float
) -> Float[Tensor, ""]:
    """Gradient-based attention transfer (section 3.2): beta/2 * mean over b of ||J_S - J_T||_2.

    Args:
        student, teacher: input gradients of both, by the same images; see `input_gradient`. The norm is over
            all entries of a sample.
        beta: weight of the term, >= 0.

    Returns:
        A scalar, float32 (float64 for float64 gradients); it has no gradient where J_S = J_T.

    Raises:
        TypeError: if a gradient is not a floating tensor.
        ValueError: on unequal shapes or a negative beta.
    """
    _check_gradients("gradient_transfer_loss", beta, student=student, teacher=teacher)
    return _half_mean_norm(beta, _wide(student) - _wide(teacher))


def flip_symmetry_loss(
    gradient: Float[Tensor, "b c h w"], gradient_of_flipped: Float[Tensor, "b c h w"], *, beta: float
) -> Float[Tensor, ""]:
    """Symmetry under horizontal flips (section 3.2): beta/2 * mean over b of ||J(x) - flip(J(flip x))||_2.

    Args:
        gradient: J(x).
        gradient_of_flipped: J(flip x), as it is; its flip back, along w, is taken here.
        beta: weight of the term, >= 0.

    Returns:
        A scalar, float32 (float64 for float64 gradients).

    Raises:
        TypeError: if a gradient is not a floating tensor.
        ValueError: on unequal shapes or a negative beta.
    """
    _check_gradients("flip_symmetry_loss", beta, gradient=gradient, gradient_of_flipped=gradient_of_flipped)
    return _half_mean_norm(beta, _wide(gradient) - _wide(gradient_of_flipped).flip(-1))


def input_gradient_norm(gradient: Float[Tensor, "b c h w"], *, beta: float) -> Float[Tensor, ""]:
    """Size of the input gradient, the min-l2 row of the paper's tables: beta/2 * mean over b of ||J||_2.

    Double backpropagation (Drucker & LeCun 1992), which has ||J||_2^2. The paper speaks of the l2 norm, and
    the norm it is here, so that beta means what it means in `gradient_transfer_loss` with J_T = 0.

    Raises:
        TypeError: if the gradient is not a floating tensor.
        ValueError: on a negative beta.
    """
    _check_gradients("input_gradient_norm", beta, gradient=gradient)
    return _half_mean_norm(beta, _wide(gradient))


def _half_mean_norm(beta: float, difference: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    return beta / 2 * l2_norm(difference.flatten(1)).mean()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor.dtype))


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
        raise InputError(
            f"convert_beta: expected a batch whose maps differ, got a mean distance of {distance}."
        )
    return distance


# --- checks -------------------------------------------------------------------------------------------------


def _weighted_pairs(
    function: str, student: Activations, teacher: Activations, weights: Sequence[float] | None
) -> Iterator[tuple[float, Tensor, Tensor]]:
    students = [student] if isinstance(student, Tensor) else list(student)
    teachers = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    if len(students) != len(teachers) or not students:
        raise InputError(
            f"{function}: expected as many student as teacher activations, at least one, got "
            f"{len(students)} and {len(teachers)}."
        )
    factors = [1.0] * len(students) if weights is None else list(weights)
    if len(factors) != len(students):
        raise InputError(
            f"{function}: expected a weight for each of {len(students)} pairs, got {len(factors)}."
        )
    return zip(factors, students, teachers, strict=True)


def _check_floating(function: str, what: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise InputTypeError(f"{function}: expected {what} as a floating tensor, got {got}.")


def _check_features(function: str, what: str, features: Tensor) -> None:
    _check_floating(function, what, features)
    if features.ndim != 4 or 0 in features.shape:
        raise InputError(
            f"{function}: expected {what} of shape (b, c, h, w) with no empty axis, got "
            f"{tuple(features.shape)}. Taps brings tokens (b, n, c) and (b, h, w, c) to that order."
        )


def _check_pair(function: str, student: Tensor, teacher: Tensor, resize: Side | None) -> None:
    _check_features(function, "student activations", student)
    _check_features(function, "teacher activations", teacher)
    _check_sizes(function, (len(student), *student.shape[2:]), (len(teacher), *teacher.shape[2:]), resize)


def _check_channels(function: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape[1] != teacher.shape[1]:
        raise InputError(
            f"{function}: expected equal channels, got student {student.shape[1]} and teacher "
            f"{teacher.shape[1]}. Bring the student's to the teacher's by a learnt 1x1 convolution, "
            "as ActivationTransfer does."
        )


def _check_sizes(function: str, student: Sequence[int], teacher: Sequence[int], resize: Side | None) -> None:
    """(b, h, w) of both sides."""
    if student[0] != teacher[0]:
        raise InputError(
            f"{function}: expected equal batch sizes, got student {student[0]} and teacher {teacher[0]}. "
            "Feed both the same images."
        )
    if resize is None and student[1:] != teacher[1:]:
        raise InputError(
            f"{function}: expected equal (h, w), got student {tuple(student[1:])} and teacher "
            f'{tuple(teacher[1:])}. Tap layers of equal stride, or pass resize="student".'
        )


def _check_graph(user: str, logits: Tensor, x: Tensor) -> None:
    if not x.requires_grad or not logits.requires_grad:
        what = "logits without a graph" if x.requires_grad else "an x that does not require grad"
        raise InputError(
            f"{user}: expected logits computed from an x that requires grad, got {what}. "
            "Run the model on x.detach().requires_grad_() outside no_grad() and inference_mode()."
        )


def _check_gradients(function: str, beta: float, **gradients: Tensor) -> None:
    _check_beta(function, beta)
    for name, gradient in gradients.items():
        _check_floating(function, name, gradient)
        if gradient.ndim != 4 or 0 in gradient.shape:
            raise InputError(
                f"{function}: expected {name} of shape (b, c, h, w) with no empty axis, got "
                f"{tuple(gradient.shape)}. `input_gradient` gives it."
            )
    shapes = {name: tuple(gradient.shape) for name, gradient in gradients.items()}
    if len(set(shapes.values())) > 1:
        got = " and ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise InputError(
            f"{function}: expected gradients of equal shape, got {got}. Take both by the same images, before "
            "any transform that one of the models needs."
        )


def _check_energy_options(function: str, p: float, mapping: str) -> None:
    if not (is_number(p) and 1 <= p <= LARGEST_P):
        raise InputError(f"{function}: expected 1 <= p <= {LARGEST_P:g}, got {p!r}.")
    _check_choice(function, "mapping", mapping, Mapping)


def check_loss_options(
    function: str, beta: float, p: float, mapping: str, form: str, resize: str | None
) -> None:
    """Raise ValueError, in the name of `function`, unless the options are those of the loss."""
    _check_energy_options(function, p, mapping)
    check_term_options(function, beta, form, resize)


def check_term_options(function: str, beta: float, form: str, resize: str | None) -> None:
    """Raise ValueError, in the name of `function`, unless the options are those of a loss at layer pairs."""
    _check_beta(function, beta)
    _check_choice(function, "form", form, Form)
    if resize is not None:
        _check_choice(function, "resize", resize, Side)


def _check_beta(function: str, beta: float) -> None:
    if not (is_number(beta) and 0 <= beta < math.inf):
        raise InputError(f"{function}: expected a finite beta >= 0, got {beta!r}.")


def is_number(value: object) -> bool:
    """Whether it can be compared with others: a number of Python's or numpy's, or a tensor of one entry."""
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)


def _check_choice(function: str, option: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise InputError(f"{function}: expected {option} as one of {list(get_args(choices))}, got {value!r}.")
