"""Attention maps of models on images, and how alike those of a student and its teacher are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from attention_transfer._errors import InputError
from attention_transfer._outputs import check_finite, find_logits
from attention_transfer._untouched import untouched
from attention_transfer.functional import attention_map, resize_maps
from attention_transfer.taps import Taps
from attention_transfer.visualize.groups import TEACHER

Normalise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Seen:
    """Test images with what each model sees in them, by the model's role."""

    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    maps: dict[str, dict[str, Tensor]]
    """{role: {layer: (n, h, w)}}"""
    predictions: dict[str, Int[Tensor, " n"]]
    cosines: dict[str, Float[Tensor, "n j"]]
    """{student's role: cosine of its map to the teacher's, a column a layer}"""

    def pick(self, rows: Sequence[int]) -> Seen:
        """Some of the images, in this order."""
        at = torch.tensor(rows, dtype=torch.long)
        return Seen(
            self.images[at],
            self.labels[at],
            {role: {name: maps[at] for name, maps in layers.items()} for role, layers in self.maps.items()},
            {role: classes[at] for role, classes in self.predictions.items()},
            {role: cosines[at] for role, cosines in self.cosines.items()},
        )


@dataclass(frozen=True)
class Examples:
    """What the models see in all the images they are compared on, and which of these are to be shown.

    `layers` of all roles correspond by position.
    """

    seen: Seen
    classes: list[str]
    layers: dict[str, list[str]]
    chosen: list[int]

    @property
    def shown(self) -> Seen:
        """The images to show, of different classes first."""
        return self.seen.pick(self.chosen)

    @property
    def compared(self) -> int:
        """The number of images."""
        return len(self.seen.labels)

    @property
    def similarity(self) -> dict[str, list[float]]:
        """{student's role: mean cosine similarity to the teacher, one number a layer}"""
        return {role: cosines.mean(0).tolist() for role, cosines in self.seen.cosines.items()}

    def similarity_by_class(self, role: str) -> Float[Tensor, "k j"]:
        """A student's mean cosine over the images of each class; NaN for a class without images."""
        classes = torch.arange(len(self.classes))
        member = (self.seen.labels[None] == classes[:, None]).double()  # k n
        sums = member @ self.seen.cosines[role].double()
        return (sums / member.sum(1, keepdim=True)).float()

    def apart(self, role: str, count: int) -> Seen:
        """The images in which a student's maps are the least like its teacher's, the least first."""
        order = self.seen.cosines[role].mean(1).argsort(stable=True)
        return self.seen.pick(order[:count].tolist())


def attention_maps(
    model: nn.Module, layers: Sequence[str], images: Float[Tensor, "b c h w"], *, batch_size: int = 128
) -> dict[str, Float[Tensor, "b _h _w"]]:
    """The attention maps of some layers on normalised images, in eval mode, on the CPU, in float32.

    The model is left in the mode it was in.

    Raises:
        ValueError: if a layer's name is unknown.
    """
    return _watch(model, layers, images, batch_size)[0]


def cosine_similarity(
    student: Float[Tensor, "b h_s w_s"], teacher: Float[Tensor, "_b h_t w_t"]
) -> Float[Tensor, " b"]:
    """The cosine between two maps of each image; a zero map has 0 with anything.

    A student's map of another size is resized to the teacher's: bilinearly to grow, by area to shrink.

    Raises:
        ValueError: if the maps belong to different numbers of images.
    """
    if len(student) != len(teacher):
        raise InputError(
            f"cosine_similarity: expected maps of the same images, got {len(student)} of the student and "
            f"{len(teacher)} of the teacher. Compute both on one batch."
        )
    if student.shape != teacher.shape:
        student = resize_maps(student, teacher.shape[1:])
    return F.cosine_similarity(student.flatten(1), teacher.flatten(1))


def collect_examples(
    models: Mapping[str, tuple[nn.Module, Sequence[str]]],
    images: UInt8[Tensor, "b c h w"],
    labels: Int[Tensor, " b"],
    normalise: Normalise | Mapping[str, Normalise],
    classes: Sequence[str],
    *,
    answers: Mapping[str, Sequence[int]] | None = None,
    shown: int = 6,
    batch_size: int = 128,
) -> Examples:
    """Run models on test images: maps and predictions of a few, similarity to the teacher over all.

    Args:
        models: {role: (model, layers)} for "teacher", "student alone", "student with attention transfer";
            their layers correspond by position.
        images: what the models are compared on.
        labels: their classes.
        normalise: uint8 images to a model's input; or one such function for each role.
        classes: the names of the classes.
        answers: {role: for each class of its model that of the images}, where these are not the same.
        shown: how many images the report shows, of different classes first.
        batch_size: images at a time.

    Raises:
        ValueError: if there is no teacher, the numbers of layers differ, or logits are not finite.
    """
    _check_models(models, images)
    maps: dict[str, dict[str, Tensor]] = {}
    predictions: dict[str, Tensor] = {}
    for role, (model, layers) in models.items():
        prepare = normalise[role] if isinstance(normalise, Mapping) else normalise
        maps[role], logits = _watch(model, layers, images, batch_size, prepare)
        if logits is None:
            raise InputError(
                f"collect_examples: expected logits (b, k) from the {role}, got something else. "
                "Give a classifier."
            )
        check_finite(logits.isfinite().all(1), user="collect_examples", model=f"the {role}")
        predictions[role] = logits.argmax(1)
        if answers and role in answers:
            predictions[role] = torch.tensor(answers[role])[predictions[role]]
    layers_of = {role: list(layers) for role, (_, layers) in models.items()}
    cosines = {role: _cosines(maps, layers_of, role) for role in models if role != TEACHER}
    seen = Seen(images.cpu(), labels.cpu(), maps, predictions, cosines)
    return Examples(seen, list(classes), layers_of, spread_over_classes(labels, shown))


def _check_models(models: Mapping[str, tuple[nn.Module, Sequence[str]]], images: Tensor) -> None:
    if TEACHER not in models:
        raise InputError(
            f"collect_examples: expected the role {TEACHER!r}, got {', '.join(models)}."
            " Give the teacher that the students are compared with."
        )
    counts = {role: len(layers) for role, (_, layers) in models.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{role}: {count}" for role, count in counts.items())
        raise InputError(
            f"collect_examples: expected as many layers for each model, got {found}. "
            "List the layers in pairs."
        )
    if len(images) == 0:
        raise InputError("collect_examples: expected at least one image, got none. Give some test images.")


def _cosines(
    maps: Mapping[str, Mapping[str, Tensor]], layers: Mapping[str, list[str]], role: str
) -> Float[Tensor, "n j"]:
    pairs = zip(layers[role], layers[TEACHER], strict=True)
    return torch.stack(
        [cosine_similarity(maps[role][own], maps[TEACHER][other]) for own, other in pairs], dim=1
    )


def spread_over_classes(labels: Tensor, count: int) -> list[int]:
    """Indices of images of different classes, as far as there are; then whatever comes first."""
    first_of_class = {label: i for i, label in reversed(list(enumerate(labels.tolist())))}
    chosen = sorted(first_of_class.values())
    others = sorted(set(range(len(labels))) - set(chosen))
    return (chosen + others)[:count]


def _watch(
    model: nn.Module,
    layers: Sequence[str],
    images: Tensor,
    batch_size: int,
    prepare: Normalise | None = None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Maps of a model on all images, a batch at a time, and its logits if it is a classifier."""
    names = list(dict.fromkeys(layers))
    parameter = next(model.parameters(), None)
    maps: dict[str, list[Tensor]] = {name: [] for name in names}
    answers: list[Tensor | None] = []
    with torch.no_grad(), untouched(model, training=False), Taps(model, names) as taps:
        for batch in images.split(batch_size):
            inputs = prepare(batch) if prepare else batch
            logits = find_logits(model(inputs if parameter is None else inputs.to(parameter)))
            answers.append(None if logits is None else logits.cpu())
            for name, features in taps.pop().items():
                maps[name].append(attention_map(features).float().cpu())
    known = [logits for logits in answers if logits is not None]
    joined = {name: torch.cat(batches) for name, batches in maps.items()}
    return joined, torch.cat(known) if len(known) == len(answers) else None
