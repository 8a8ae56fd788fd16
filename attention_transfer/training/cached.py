"""Learning from a cache in place of a teacher: which cache will do, and what it gives at a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from attention_transfer._errors import InputError
from attention_transfer._patterns import is_pattern
from attention_transfer._weights_path import split_prefix
from attention_transfer.cache import Cache, Manifest
from attention_transfer.data import DECODING, Splits, class_order, data_fingerprint
from attention_transfer.distiller import Distiller
from attention_transfer.models import fingerprint
from attention_transfer.pairs import Pair, suggest_pairs
from attention_transfer.runs.recipe import (
    IMAGES,
    SOURCE,
    Recipe,
    check_models,
    fields_of,
    flag_of,
    parse_pairs,
)
from attention_transfer.runs.run import Run
from attention_transfer.terms.declaration import Energy
from attention_transfer.terms.term import Reading, Term
from attention_transfer.training.build import build_teacher, build_terms, check_classes


def take_over(recipe: Recipe) -> Recipe:
    """The recipe with what it leaves open filled in as its cache has it; as it is, if it has no cache.

    Raises:
        FileNotFoundError: if there is no cache.
        ValueError: if the recipe contradicts the cache.
    """
    if recipe.cache is None:
        return recipe
    recipe = recipe.located()
    facts = Manifest.read(Path(recipe.cache or ""))
    for name, theirs in {**_offers(facts), **_name_of_data(recipe, facts)}.items():
        ours = getattr(recipe, name)
        if ours not in (None, theirs):
            raise InputError(
                f"train: the cache {recipe.cache} was built with {name}={theirs}, got {ours}. "
                f"Leave {flag_of(name)} out, or build another cache."
            )
    if recipe.teacher_precision not in ("auto", facts.precision):
        raise InputError(
            f"train: the teacher of {recipe.cache} ran in {facts.precision}, got --teacher-precision "
            f"{recipe.teacher_precision}. Leave it out, or build another cache with --precision."
        )
    named = _names_weights(recipe)
    if not named and recipe.teacher not in (None, Recipe.teacher, facts.teacher):
        raise InputError(
            f"train: the cache {recipe.cache} holds maps of {facts.teacher}, got --teacher {recipe.teacher}. "
            "Leave --teacher out, or build a cache of that one."
        )
    teacher = recipe.teacher if named else None
    offers = {**_offers(facts), **_source(recipe, facts)}
    return replace(recipe, **offers, views=recipe.views or facts.views, teacher=teacher)


def _name_of_data(recipe: Recipe, facts: Manifest) -> dict[str, Any]:
    """The cache's data beside other data by name; files that lie elsewhere are known by their content."""
    given, own = recipe.data, facts.settings.get("data")
    is_elsewhere = given is not None and (is_pattern(given) or Path(given).exists())
    return {} if own is None or is_elsewhere else {"data": own}


def _source(recipe: Recipe, facts: Manifest) -> dict[str, Any]:
    """Where the cache's images are, if the recipe leaves it open; data that is named has its own columns.

    Raises:
        ValueError: if the cache does not say it.
    """
    if recipe.data is not None:
        return {}
    if not isinstance(facts.settings.get("data"), str):
        raise InputError(
            f"train: expected {recipe.cache} to say which images it was built from, got nothing of it in "
            "cache.json. Pass --data."
        )
    return {name: getattr(recipe, name) or facts.settings.get(name) for name in fields_of(SOURCE)}


def _offers(facts: Manifest) -> dict[str, Any]:
    """What a student takes over, by recipe field: the very images and the very augmentation."""
    images = {name: facts.source.get(name) for name in fields_of(IMAGES)}
    return {**images, "pad": facts.pad, "flip": facts.flip, "view_seed": facts.view_seed}


def _names_weights(recipe: Recipe) -> bool:
    """Whether the recipe says where its teacher's weights are, so that these can be compared."""
    named = Path(recipe.teacher or "")
    return recipe.teacher_weights is not None or Run(named).exists or named.is_file()


def name_teacher(recipe: Recipe) -> Recipe:
    """The recipe of a run from a cache, with the teacher that made the cache if that is still there."""
    if _names_weights(recipe):
        return recipe
    try:
        settings = Manifest.read(Path(recipe.cache or "")).settings
    except (FileNotFoundError, ValueError):
        return recipe
    named: dict[str, Any] = {
        name: settings.get(name) for name in ("teacher", "teacher_weights", "teacher_classes")
    }
    # guard: factory-of-a-cache
    check_models(named, recipe.cache or "")
    found = replace(recipe, **named)
    weights = found.teacher_weights
    there = weights in (None, "pretrained") or split_prefix(weights or "")[0].exists()
    return found if there and _names_weights(found) else recipe


@dataclass(frozen=True)
class CachedTeacher:
    """What a teacher made of every image, read from its cache. It is never run: it need not be there.

    `order` is where the data's classes are among the teacher's, if elsewhere.
    """

    cache: Cache
    pairs: list[Pair]
    order: list[int] | None = None

    @classmethod
    def of(cls, recipe: Recipe, splits: Splits, student: nn.Module) -> CachedTeacher:
        """The recipe's cache, once it has been seen to be made for these images, this student and method.

        Raises:
            ValueError: if the cache is unfinished or damaged, or was made of another teacher, of other images
                or energies, or does not hold what the method or the pairs need.
        """
        cache = Cache.read(recipe.cache or "")
        cache.require(recipe.views or cache.manifest.views)
        check_terms(build_terms(recipe))
        facts = cache.manifest
        check_classes(recipe, facts.classes, facts.class_names, splits)
        order = class_order(splits.classes, facts.class_names)
        _check_images(splits, cache)
        _check_teacher(recipe, splits, cache)
        if not recipe.reads_maps:
            return cls(cache, [], order)
        _check_energy(recipe, cache)
        return cls(cache, _pairs(recipe, splits, student, cache), order)

    def __call__(self, rows: Int64[Tensor, " b"], view: int, device: torch.device) -> Reading:
        """What the teacher made of a view of the images at `rows`."""
        facts = self.cache.manifest
        layers = [pair.teacher for pair in self.pairs]
        logits, maps = self.cache.read_maps(rows, view, layers, device=device)
        shapes = {stage.name: stage.shape for stage in facts.layers}
        energy = Energy(facts.p, facts.mapping)
        return Reading(logits, {energy: maps}, shapes=[shapes[layer] for layer in layers])

    def distiller(self, recipe: Recipe, student: nn.Module) -> Distiller:
        """The student and the method's terms, with no teacher."""
        terms = build_terms(recipe)
        return Distiller(student, None, pairs=self.pairs, terms=terms, teacher_classes=self.order)

    @property
    def fingerprint(self) -> str:
        """Of the teacher's weights."""
        return self.cache.manifest.teacher_fingerprint

    def images_of(self, recipe: Recipe) -> str:
        """What a recipe has of the cache, in a line."""
        given = {name: getattr(recipe, name) for name in (*fields_of(SOURCE), *_offers(self.cache.manifest))}
        said = ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        return f"  as the cache has it: {said}"

    def __str__(self) -> str:
        facts, folder = self.cache.manifest, self.cache.folder
        return f"teacher: {facts.teacher} ({self.fingerprint}), from {folder}, stored as {facts.dtype}"


def check_terms(terms: Iterable[Term]) -> None:
    """Raise ValueError for a term that reads what no cache holds."""
    for term in terms:
        if term.needs_teacher and (term.needs_features or term.needs_input_gradient):
            read = "activations" if term.needs_features else "input gradients"
            raise InputError(
                f'train: the term "{term.name}" reads {read}, and a cache holds maps and logits only. '
                "Pass --teacher in place of --cache."
            )


def _check_images(splits: Splits, cache: Cache) -> None:
    facts, found = cache.manifest, data_fingerprint(splits.train)
    ours = (found, splits.mean, splits.std)
    if ours != (facts.data, facts.mean, facts.std):
        if facts.decoding != DECODING:
            raise InputError(
                f"train: the cache {cache.folder} was built from images {facts.decoding:.80}; images are now "
                f"{DECODING}, and the fingerprints differ ({facts.data}, not {found}). Build another cache."
            )
        raise InputError(
            f"train: the cache {cache.folder} was built from {facts.images:,} other images (fingerprint "
            f"{facts.data}, from {facts.settings.get('data')}), got {len(splits.train):,} of {splits.name} "
            f"({found}). Pass the --data it was built from, or build another cache."
        )


def _check_teacher(recipe: Recipe, splits: Splits, cache: Cache) -> None:
    """A teacher that is named beside the cache must be the one that it was built from."""
    if recipe.teacher is None:
        return
    given = build_teacher(recipe, splits, lambda: Run(Path(recipe.teacher or "")))
    assert given is not None
    facts, found = cache.manifest, fingerprint(given.model)
    if found != facts.teacher_fingerprint:
        raise InputError(
            f"train: the cache {cache.folder} holds maps of a {facts.teacher} with fingerprint "
            f"{facts.teacher_fingerprint}, got {found} in {recipe.teacher_weights or recipe.teacher}. "
            "Leave --teacher out, or build a cache of that one."
        )


def _check_energy(recipe: Recipe, cache: Cache) -> None:
    facts = cache.manifest
    if (recipe.p, recipe.mapping) != (facts.p, facts.mapping):
        raise InputError(
            f"train: the cache {cache.folder} holds maps of p={facts.p:g} and mapping={facts.mapping}, got "
            f"p={recipe.p:g} and mapping={recipe.mapping}. "
            f"Pass --p {facts.p:g} --mapping {facts.mapping}, or build another cache."
        )


def _pairs(recipe: Recipe, splits: Splits, student: nn.Module, cache: Cache) -> list[Pair]:
    """The pairs that the recipe names, or the student's stage ends with the teacher's that are stored."""
    named = parse_pairs(recipe.pairs)
    if named is None:
        return suggest_pairs(student, cache.manifest.layers, torch.zeros(2, *splits.shape))
    stored = [stage.name for stage in cache.manifest.layers]
    for pair in named:
        if pair[1] not in stored:
            raise InputError(
                f"train: the cache {cache.folder} holds the teacher's layers {', '.join(stored)}, got "
                f"{pair[1]} in --pairs. Pair with one of these, or build a cache with --layers."
            )
    return [Pair(*pair) for pair in named]
