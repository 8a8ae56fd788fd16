"""The setting under which numbers are made again (how short, on how many images), and a recipe under it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from attention_transfer.reproduction.tables import Library, Reproduction
from attention_transfer.runs.recipe import (
    EXPERIMENT,
    LEFT_OPEN,
    METHOD,
    PRECISION,
    SEED,
    Precision,
    Recipe,
    facts_of,
    fields_of,
    fields_read_by,
)
from attention_transfer.runs.run import Run

CACHED_EPOCHS = 16  # up to here a cache with a view for every epoch costs less than a live teacher


@dataclass(frozen=True)
class Setting:
    """What all runs of a table have in common, and where they are kept.

    Attributes:
        output: folder of all settings; this one's is `folder`.
        scale: share of the published number of epochs.
        max_train: training images, all if None.
        data: what takes the place of the recipes' data and data_root; nothing if empty.
        views: fixed views of each image; 0 for fresh augmentation, "auto" for a view an epoch in short runs.
    """

    output: Path
    scale: float = 1.0
    max_train: int | None = None
    data: tuple[tuple[str, str], ...] = ()
    views: int | Literal["auto"] = "auto"
    precision: Precision = "auto"
    compile: bool = False

    @property
    def tag(self) -> str:
        """The setting's short name."""
        scale = "full" if self.scale == 1 else f"scale-{self.scale:g}"
        return scale if self.max_train is None else f"{scale}-train-{self.max_train}"

    @property
    def folder(self) -> Path:
        return self.output / self.tag

    def epochs(self, each: Reproduction) -> int:
        """Epochs of the shortened schedule."""
        return max(1, round(each.recipe.epochs * self.scale))

    def run(self, name: str, seed: int) -> Run:
        """The run folder of a reproduction."""
        return Run(self.folder / name / f"seed-{seed}")

    def views_of(self, library: Library, each: Reproduction) -> int | None:
        """How many fixed views its images have; None for fresh augmentation, which every teacher sees."""
        if library.is_teacher(each.name):
            return None
        if self.views == "auto":
            return self.epochs(each) if self.epochs(each) <= CACHED_EPOCHS else None
        return self.views or None

    def cache(self, each: Reproduction) -> Path:
        """Where the cache of its teacher is, for the maps that it reads; any will do where it reads none."""
        assert each.teacher is not None
        recipe, root = each.recipe, self.folder / "caches"
        own = root / f"{each.teacher}-p{recipe.p:g}-{recipe.mapping}"
        there = sorted(file.parent for file in root.glob(f"{each.teacher}-p*/cache.json"))
        return there[0] if not recipe.reads_maps and own not in there and there else own

    def can_cache(self, library: Library, each: Reproduction) -> bool:
        """Whether a cache can stand in for its teacher."""
        readable = all(term.reads_cache for term in each.recipe.method_terms.values())
        return bool(each.teacher and readable and self.views_of(library, each))

    def recipe(self, library: Library, each: Reproduction, seed: int, *, cache: Path | None = None) -> Recipe:
        """The recipe of one run: the published one, shortened, on this data, with the teacher's run."""
        views = self.views_of(library, each)
        changes: dict[str, Any] = {
            "seed": seed,
            "epochs": self.epochs(each),
            "max_train": self.max_train,
            "views": views,
            "view_seed": 0 if views else None,
            "precision": self.precision,
            "compile": self.compile,
            "cache": str(cache) if cache else None,
            "output": str(self.run(each.name, seed).folder),
            **dict(self.data),
        }
        if each.teacher is not None:
            changes["teacher"] = str(self.run(each.teacher, 0).folder)
        return replace(each.recipe, **changes).resolved()


def differences(wanted: Recipe, there: Recipe) -> list[str]:
    """In what a run's recipe is another experiment than the wanted one, each as "name: its own, not ours".

    Left out are the machine, where files lie (of the data, the name is compared), and fields that the method
    does not read. A live teacher and its cache count as one.
    """
    found = []
    read = fields_read_by(wanted.method_terms)
    for name in fields_of(*EXPERIMENT, SEED, PRECISION):
        if METHOD in facts_of(name) and name not in {"method", *read}:
            continue
        ours, theirs = _comparable(name, wanted), _comparable(name, there)
        is_open = (name == "precision" and ours == "auto") or (LEFT_OPEN in facts_of(name) and ours is None)
        if ours != theirs and not is_open:
            found.append(f"{name}: {theirs}, not {ours}")
    return found


def _comparable(name: str, recipe: Recipe) -> Any:
    return Path(recipe.images).name if name == "data" else getattr(recipe, name)
