"""The parts of a run, made from its recipe: images, student, teacher, distiller."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from attention_transfer._channels import channels_instead
from attention_transfer._colours import print_safely
from attention_transfer._errors import InputError
from attention_transfer._outputs import logits_of
from attention_transfer._ranks import is_first_process
from attention_transfer._untouched import untouched
from attention_transfer.data import Augment, Splits, Views, class_order, load_data, unknown_classes
from attention_transfer.distiller import Distiller, InputTransform
from attention_transfer.models import (
    build_model,
    load_weights,
    native_size,
    pretrained_statistics,
    why_not,
)
from attention_transfer.pairs import Pair
from attention_transfer.runs.recipe import VALIDATION, Recipe, parse_pairs
from attention_transfer.runs.run import Run
from attention_transfer.schedules import parse_schedules
from attention_transfer.terms.term import Term
from attention_transfer.training.card import ModelCard

TEACHER_DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def load_splits(recipe: Recipe) -> Splits:
    """The recipe's images: training, validation, test."""
    return load_data(
        recipe.images,
        root=recipe.data_root,
        validation=VALIDATION if recipe.validation is None else recipe.validation,
        seed=recipe.seed if recipe.split_seed is None else recipe.split_seed,
        max_train=recipe.max_train,
        image_size=recipe.image_size,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
    )


def build_student(recipe: Recipe, splits: Splits, *, role: str = "student") -> nn.Module:
    """The student with its initial weights, which depend on the seed alone; `role` is what errors call it.

    Raises:
        ValueError: if it does not run on the images; and as `build_model` and `load_weights`.
    """
    torch.manual_seed(recipe.seed)
    height, width = splits.shape[1:]
    student = _build(
        recipe.student, recipe.student_weights, splits, splits.num_classes, "body", size=(height, width)
    )
    if reason := why_not(student, splits.shape):
        raise InputError(_does_not_run(role, recipe.student, student, splits, reason))
    if recipe.batchnorm_init == "uniform" and recipe.student_weights is None:
        draw_batchnorm_scales(student)
    return student


def draw_batchnorm_scales(model: nn.Module) -> None:
    """BatchNorm scales drawn from [0, 1), in place: PyTorch's own start when the paper was written."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight)


def _does_not_run(role: str, name: str, model: nn.Module, splits: Splits, reason: str) -> str:
    if channels := channels_instead(model, splits.shape):
        return (
            f"train: expected a {role} of images with {splits.in_channels} channels, as the data, got "
            f"{name}, which takes {channels}. Pass another model, or such images as --data."
        )
    return (
        f"train: expected a {role} that runs on images of shape {splits.shape}, got {name}, which fails on "
        f"one ({reason}). Pass another --image-size, or another model."
    )


def _build(
    name: str,
    weights: str | None,
    splits: Splits,
    classes: int,
    strict: bool | Literal["body"] = True,
    *,
    size: tuple[int, int] | None,
) -> nn.Module:
    """The model; a student's head may start afresh, a teacher without its head has learnt nothing."""
    model = build_model(
        name,
        num_classes=classes,
        in_channels=splits.in_channels,
        pretrained=weights == "pretrained",
        image_size=size,
    )
    if weights is not None and weights != "pretrained":
        loaded = (
            _load_by_name(model, name, weights, splits) if strict == "body" else load_weights(model, weights)
        )
        if is_first_process():
            print_safely(loaded)
    return model


def _load_by_name(model: nn.Module, name: str, weights: str, splits: Splits) -> str:
    """Load a student's weights, whose head may be for other classes, or the same in another order."""
    card = ModelCard.read(weights)
    known = card.classes if card and len(card.classes) == splits.num_classes else None
    order, strangers = class_order(splits.classes, known), unknown_classes(splits.classes, known)
    if not (order or strangers):
        return str(load_weights(model, weights, strict="body"))
    head = _find_head(model, name, splits)
    fresh = {key: model.state_dict()[key].clone() for key in head}
    loaded = load_weights(model, weights, strict="body")
    for key, axis in head.items():
        tensor = model.state_dict()[key]
        tensor.copy_(tensor.index_select(axis, torch.tensor(order)) if order else fresh[key])
    if order:
        return f"{loaded}; the classes of its head are in another order: matched by name"
    return f"{loaded}; the head starts afresh: it did not know {strangers}"


def _find_head(model: nn.Module, name: str, splits: Splits) -> dict[str, int]:
    """The tensors of a model whose shapes follow the number of classes, each with the axis that does."""
    with torch.random.fork_rng(devices=[]):
        height, width = splits.shape[1:]
        other = build_model(
            name,
            num_classes=splits.num_classes + 1,
            in_channels=splits.in_channels,
            image_size=(height, width),
        )
    larger = other.state_dict()
    head = {}
    for key, tensor in model.state_dict().items():
        axes = [i for i, size in enumerate(tensor.shape) if larger[key].shape[i] != size]
        if axes:
            head[key] = axes[0]
    if not head:
        raise InputError(
            f"train: expected weights of {name} for the classes of the data in their order, got others, and "
            "no head that follows the number of classes. Name the classes alike, or pass other weights."
        )
    return head


def build_augment(recipe: Recipe, splits: Splits) -> Augment:
    """The recipe's augmentation; what it leaves open is as suits the data."""
    pad = splits.pad if recipe.pad is None else recipe.pad
    flip = splits.flip if recipe.flip is None else recipe.flip
    return Augment(splits.mean, splits.std, pad=pad, flip=flip)


def build_views(recipe: Recipe) -> Views | None:
    """The recipe's fixed views; None for fresh augmentation."""
    return None if recipe.views is None else Views(recipe.views, recipe.view_seed or 0)


@dataclass(frozen=True)
class Teacher:
    """A teacher with its weights, and how the student's input becomes its own.

    `names` are its classes, where they are known; `order` is where the data's are among them, if elsewhere.
    """

    name: str
    model: nn.Module
    classes: int
    transform: InputTransform | None
    names: Sequence[str] | None = None
    order: Sequence[int] | None = None


def trains_teacher(recipe: Recipe) -> bool:
    """Whether the teacher that the recipe names has no weights yet: it is trained first."""
    if recipe.teacher is None or not recipe.needs_teacher or recipe.cache or recipe.teacher_weights:
        return False
    return not (Run(Path(recipe.teacher)).exists or Path(recipe.teacher).is_file())


def build_teacher(recipe: Recipe, splits: Splits, train_first: Callable[[], Run]) -> Teacher | None:
    """The teacher that the recipe names: from a run folder, from weights, or trained now; None for none.

    Raises:
        ValueError: if the method compares answers and the teacher has other classes than the data.
    """
    if recipe.teacher is None or not recipe.needs_teacher:
        return None
    named = Run(Path(recipe.teacher))
    if recipe.teacher_weights and (named.exists or named.folder.is_file()):
        raise InputError(
            f"train: expected the teacher's weights once, got {recipe.teacher} as --teacher and "
            f"{recipe.teacher_weights} as --teacher-weights. Leave the latter out, or pass a model's name as "
            "--teacher."
        )
    if named.exists:
        teacher = _teacher_of_run(named, splits)
    elif named.folder.is_file():
        teacher = _teacher_of_file(named.folder, splits)
    elif recipe.teacher_weights is None:
        teacher = _teacher_of_run(train_first(), splits)
    else:
        teacher = _teacher_of_weights(recipe, splits)
    check_classes(recipe, teacher.classes, teacher.names, splits)
    return teacher


def check_classes(recipe: Recipe, classes: int, names: Sequence[str] | None, splits: Splits) -> None:
    """Raise ValueError if the method compares answers and the teacher has other classes than the data."""
    if not any(term.compares_classes for term in recipe.method_terms.values()):
        return
    if classes != splits.num_classes and not class_order(splits.classes, names):
        raise InputError(
            f'train: method "{recipe.method}" compares answers: expected a teacher of {splits.num_classes} '
            f"classes, as the data, got {classes}. It may have more where its file names them and the data's "
            "are among them; attention maps need no equal classes: --method at."
        )
    if strangers := unknown_classes(splits.classes, names):
        raise InputError(
            f'train: method "{recipe.method}" compares answers: expected a teacher that knows the classes of '
            f"the data, got one that does not know {strangers}. Name them alike, or pass --method at."
        )


def _teacher_of_run(run: Run, splits: Splits) -> Teacher:
    """The student of a finished run, which becomes a teacher."""
    _ = run.result
    card = ModelCard.read(run.folder)
    if card is None:
        raise InputError(
            f"train: {run.student_weights} does not say what it holds. Pass --teacher-weights with it."
        )
    return _teacher_of_card(card, run.folder, splits)


def _teacher_of_file(weights: Path, splits: Splits) -> Teacher:
    card = ModelCard.read(weights)
    if card is None:
        raise InputError(
            f"train: {weights} does not say which model it belongs to. "
            f"Pass --teacher NAME --teacher-weights {weights}"
        )
    return _teacher_of_card(card, weights, splits)


def _teacher_of_card(card: ModelCard, weights: str | Path, splits: Splits) -> Teacher:
    if card.in_channels != splits.in_channels:
        raise InputError(
            f"train: expected a teacher of images with {splits.in_channels} channels, as the data, got one "
            f"of {card.in_channels} in {weights}. Pass a teacher that was trained on such images."
        )
    model = card.build(weights)
    height, width = card.image_size
    size = _own_size(card.model, model, splits, (height, width))
    transform = _input_transform(splits, card.mean, card.std, size)
    order = class_order(splits.classes, card.classes)
    return Teacher(card.model, model, len(card.classes), transform, card.classes, order)


def _own_size(name: str, model: nn.Module, splits: Splits, size: tuple[int, int]) -> tuple[int, int] | None:
    """The size that a teacher's images are resized to: its own, if it does not take those of the data."""
    reason = why_not(model, splits.shape)
    if reason is None:
        return None
    if why_not(model, (splits.in_channels, *size)):
        raise InputError(_does_not_run("teacher", name, model, splits, reason))
    return size


def _teacher_of_weights(recipe: Recipe, splits: Splits) -> Teacher:
    """A teacher from a file, normalised as the data unless it says otherwise."""
    name, weights = recipe.teacher or "", recipe.teacher_weights
    if weights and weights != "pretrained":
        card = ModelCard.read(weights)
        if card is not None and card.model == name:
            return _teacher_of_card(card, weights, splits)
    classes = recipe.teacher_classes or splits.num_classes
    model = _teacher_on(name, weights, splits, classes)
    size = _own_size(name, model, splits, native_size(model))
    if weights != "pretrained":
        return Teacher(name, model, classes, _input_transform(splits, splits.mean, splits.std, size))
    return Teacher(name, model, classes, _pretrained_transform(model, splits, size))


def _teacher_on(name: str, weights: str | None, splits: Splits, classes: int) -> nn.Module:
    """A teacher on weights that say nothing of its images."""
    height, width = splits.shape[1:]
    return either_size(lambda size: _build(name, weights, splits, classes, size=size), (height, width))


def either_size(
    build: Callable[[tuple[int, int] | None], nn.Module], size: tuple[int, int] | None
) -> nn.Module:
    """A model built for images of its usual size, or, where its weights do not fit that, of `size`."""
    try:
        return build(None)
    except ValueError as unfit:
        with contextlib.suppress(ValueError):
            return build(size)
        raise unfit from None


def _pretrained_transform(
    model: nn.Module, splits: Splits, size: tuple[int, int] | None = None
) -> InputTransform | None:
    """To the images that a library's own weights expect, where these have as many channels."""
    mean, std = pretrained_statistics(model)
    if len(mean) != splits.in_channels:
        mean, std = splits.mean, splits.std
    own = getattr(model, "pretrained_cfg", None) or {}
    return _input_transform(splits, mean, std, native_size(model) if own.get("fixed_input_size") else size)


def _input_transform(
    splits: Splits, mean: Sequence[float], std: Sequence[float], size: tuple[int, int] | None = None
) -> InputTransform | None:
    """From the data's normalisation and size to the teacher's; None where nothing is to be done."""
    alike = np.allclose([splits.mean, splits.std], [mean, std], atol=1e-6)
    if alike and size in (None, splits.shape[1:]):
        return None
    return InputTransform((splits.mean, splits.std), (mean, std), size=size)


def build_distiller(
    recipe: Recipe, student: nn.Module, teacher: Teacher | None, example: Tensor
) -> Distiller:
    """Student, teacher and the terms of the recipe's method."""
    torch.manual_seed(recipe.seed)  # what terms learn starts the same, however the teacher came about
    if teacher is None:
        return Distiller(student, None, terms=build_terms(recipe))
    pairs = parse_pairs(recipe.pairs)
    return Distiller(
        student,
        teacher.model,
        pairs="auto" if pairs is None else [Pair(*pair) for pair in pairs],
        terms=build_terms(recipe),
        example_input=example,
        teacher_transform=teacher.transform,
        teacher_classes=teacher.order,
        teacher_dtype=TEACHER_DTYPES.get(recipe.teacher_precision),
    )


def has_unused_parameters(student: nn.Module, example: Float[Tensor, "b c h w"]) -> bool:
    """Whether a parameter that is to be trained is out of reach of the student's logits."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    with untouched(student, training=True):
        answer = logits_of(student(example), user="train").sum()
        gradients = torch.autograd.grad(answer, parameters, allow_unused=True)
    return any(gradient is None for gradient in gradients)


def build_terms(recipe: Recipe) -> list[Term]:
    """The loss terms of the recipe's method, besides the cross-entropy."""
    schedules = parse_schedules(recipe.term_schedule, recipe.known_terms)
    terms = []
    for name, declaration in recipe.method_terms.items():
        term = declaration.build(lambda setting: getattr(recipe, setting))
        term.schedule = schedules[name]
        terms.append(term)
    return terms
