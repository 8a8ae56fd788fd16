"""The recipe: every setting of a training run, in one flat dataclass that reads and writes YAML.

Beside the type of each field stand the facts about it: what it concerns, the range of its values, and others.
`facts_of` reads them. The fields of the terms are declared by the terms.
"""

from __future__ import annotations

import functools
import os
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

from attention_transfer._errors import InputError
from attention_transfer._extras import require
from attention_transfer._hints import did_you_mean
from attention_transfer._patterns import at_home, is_pattern
from attention_transfer._reading import LARGEST_YAML, one_line, parse_yaml, read_text, shown
from attention_transfer._trust import check_trusted, is_factory
from attention_transfer._weights_path import split_prefix
from attention_transfer.schedules import parse_schedules
from attention_transfer.terms.declaration import (
    NOT_NEGATIVE,
    POSITIVE,
    Declaration,
    Range,
    Setting,
    at_least,
    built_in,
    declare,
)

VALIDATION = 0.1  # share of the training images that are held out where nothing is said

LOGGERS = ("tensorboard", "wandb", "mlflow")

LARGEST_FLOAT = sys.float_info.max
LONGEST_TEXT = 10_000  # characters of a field

Strategy = Literal["auto", "ddp", "ddp_find_unused_parameters_true"]
Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed", "64-true"]

SEEDS = Range("from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)
BELOW_ONE = Range("from 0 to below 1", lambda value: 0 <= value < 1)
UP_TO_ONE = Range("above 0 and up to 1", lambda value: 0 < value <= 1)
UP_TO_A_YEAR = Range("above 0 and up to a year", lambda value: 0 < value <= 525_600)
RISING_SHARES = Range(
    "as rising shares between 0 and 1",
    lambda value: all(0 < share < 1 for share in value) and list(value) == sorted(value),
)
MORE_THAN_ONE_IMAGE = Range(
    ">= 2 (batch normalisation learns nothing from one image)", lambda value: value >= 2
)


class Concern(Enum):
    """What a field of the recipe concerns. Every field concerns one thing."""

    MODEL = "the student"
    TEACHER = "the teacher, and where it is"
    DATA = "the images"
    METHOD = "what the student learns from besides labels"
    OPTIMISATION = "how its weights are found"
    SEED = "what is drawn at random"
    PRECISION = "the arithmetic"
    MACHINE = "what the training makes use of"
    PLACE = "on which machines it runs, which may change while it goes on"
    OUTPUT = "what is written, and where"


class Fact(Enum):
    """What else there is to know of a field."""

    FACTORY = "names a model, which may be code of the user's own"
    PATH = "may be a path"
    WEIGHTS = "is a weights file, perhaps with the prefix of one network in it"
    SOURCE = "says where the images are, which is the cache's to say if the data is left open"
    IMAGES = "says which images there are, which is the cache's to say"
    BUILDS_CACHE = "is what a cache is built by, as are SOURCE and IMAGES"
    LEFT_OPEN = "is settled by the data, the seed or the cache if it is not given"


MODEL, TEACHER, DATA, METHOD, OPTIMISATION, SEED, PRECISION, MACHINE, PLACE, OUTPUT = Concern
FACTORY, PATH, WEIGHTS, SOURCE, IMAGES, BUILDS_CACHE, LEFT_OPEN = Fact

EXPERIMENT = (MODEL, DATA, METHOD, OPTIMISATION)
"""What makes two runs different experiments: seeds of one experiment agree in the fields of these."""

TRAINING = (*EXPERIMENT, TEACHER, SEED, PRECISION)
"""What makes two runs different trainings, wherever they run and whatever they write."""


def _as_field(setting: Setting) -> tuple[str, Any, Any]:
    """A term's setting as a field of the recipe."""
    facts = (METHOD, setting.range, BUILDS_CACHE if setting.shapes_energy else None)
    kept = tuple(fact for fact in facts if fact is not None)
    return setting.name, Annotated[(setting.type, *kept)], field(default=setting.default)


def _settings(terms: Iterable[Declaration]) -> dict[str, Setting]:
    """The settings of some terms by name; several terms may share one."""
    return {setting.name: setting for term in terms for setting in term.settings}


@dataclass(frozen=True)
class _Subject:
    """The first fields of the recipe: student, teacher, images and method."""

    student: Annotated[str, MODEL, FACTORY] = "wrn-16-1"
    """The model to train: wrn-16-1, nin-thin, resnet18, timm:NAME, torchvision:NAME, package.module:name."""
    student_weights: Annotated[str | None, MODEL, WEIGHTS] = None
    """Weights to start the student from: a file, a run folder, or "pretrained". Random if not given. A head
    of another number of classes starts afresh; all else must fit. FILE:PREFIX names one of several networks
    in a file, such as last.ckpt:teacher."""
    teacher: Annotated[str | None, TEACHER, FACTORY, PATH, BUILDS_CACHE] = "wrn-16-2"
    """The model to learn from: a run folder, its weights, or a name; without weights it is trained first."""
    teacher_weights: Annotated[str | None, TEACHER, WEIGHTS, BUILDS_CACHE] = None
    """The teacher's weights: a safetensors file, a checkpoint, FILE:PREFIX for one of several networks in it,
    a run folder, or "pretrained"."""
    teacher_classes: Annotated[int | None, TEACHER, BUILDS_CACHE, at_least(2)] = None
    """Number of classes of the teacher's weights file, where it differs from the data's."""
    cache: Annotated[str | None, TEACHER, PATH] = None
    """Learn from this folder of `cache build` instead: no teacher is run. It settles images and views."""
    teacher_epochs: Annotated[int | None, TEACHER, at_least(1)] = None
    """Epochs for a teacher that is trained first. As many as the student's if not given."""

    data: Annotated[str | None, DATA, SOURCE, PATH] = None
    """The images: cifar10, cifar100, fashion-mnist, mnist, mnist-5k, or a folder of class folders, of parquet
    files or of tar files, or a pattern such as DIR/train-{000..146}.tar. cifar10 if
    not given, or what the cache was built from."""
    data_root: Annotated[str | None, MACHINE, SOURCE, PATH] = None
    """Where the named data sets are looked for and downloaded to."""
    validation: Annotated[float | None, DATA, IMAGES, LEFT_OPEN, BELOW_ONE] = None
    """Share of the training images held out to choose the best epoch, 0.1 if not given; 0 for none."""
    max_train: Annotated[int | None, DATA, IMAGES, at_least(2)] = None
    """Train on this many images only; validation and test images stay as they are."""
    image_size: Annotated[int | None, DATA, IMAGES, at_least(1)] = None
    """Height and width of every image, in pixels: its shorter side is resized to this, and the central square
    kept. Where images are streamed, training crops them at random instead."""
    image_column: Annotated[str | None, DATA, SOURCE] = None
    """The parquet column of the images, where it cannot be told from the file."""
    label_column: Annotated[str | None, DATA, SOURCE] = None
    """The parquet column of the labels, or the JSON field in tar files, where it cannot be told."""
    pad: Annotated[int | None, DATA, BUILDS_CACHE, LEFT_OPEN, NOT_NEGATIVE] = None
    """Augmentation: reflect-pad by so many pixels and crop back at random. As suits the data if not given."""
    flip: Annotated[bool | None, DATA, BUILDS_CACHE, LEFT_OPEN] = None
    """Augmentation: mirror every second image at random. As suits the data if not given: not for digits."""
    views: Annotated[int | None, DATA, at_least(1)] = None
    """Show so many fixed crops and flips of each image, one an epoch in turn. Fresh ones if not given."""
    num_workers: Annotated[int | None, MACHINE, BUILDS_CACHE, NOT_NEGATIVE] = None
    """Processes that decode images which do not fit in memory. One a core, at most 8, if not given."""

    method: Annotated[str, METHOD] = "at"
    """What the student learns from besides labels: none, or some of the terms below, joined by +, such as
    at+kd."""
    terms: Annotated[str | None, METHOD, FACTORY] = None
    """Terms of your own to name in the method: my_module:MyTerm, a class derived from Term, or several with
    commas between them."""


if typing.TYPE_CHECKING:

    class _WithTerms(_Subject):
        def __init__(self, **settings: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...
else:
    _WithTerms = make_dataclass(
        "_WithTerms", map(_as_field, _settings(built_in().values()).values()), bases=(_Subject,), frozen=True
    )


@dataclass(frozen=True)
class Recipe(_WithTerms):
    """Every setting of one training run.

    The defaults are the paper's CIFAR recipe: SGD 0.1 with momentum 0.9 and weight decay 5e-4, the rate
    times 0.2 at 30, 60 and 80 percent of 200 epochs, batches of 128, reflect-padded random crops and flips.
    beta is the exception: 1 with the form "paper" did best in this project's first trial. `reproductions/`
    has the authors' recipes to the letter.

    Raises:
        ValueError: if a value is out of its range or contradicts another; the message names the field.
    """

    term_schedule: Annotated[str, METHOD] = "constant"
    """Course of the terms' weights over the run: constant, linear (down to 0), cosine (down to 0) or step
    (times 0.2 at 30, 60 and 80 percent) for every term, or for some, such as at:linear,kd:cosine."""

    epochs: Annotated[int, OPTIMISATION, at_least(1)] = 200
    """Passes over the training images."""
    batch_size: Annotated[int, OPTIMISATION, BUILDS_CACHE, MORE_THAN_ONE_IMAGE] = 128
    """Images in a step, over all devices together, which share them equally."""
    lr: Annotated[float, OPTIMISATION, POSITIVE] = 0.1
    """Learning rate: the first one under "steps", the highest one under "one-cycle"."""
    momentum: Annotated[float, OPTIMISATION, BELOW_ONE] = 0.9
    """Momentum of SGD."""
    nesterov: Annotated[bool, OPTIMISATION] = False
    """Nesterov's form of the momentum."""
    weight_decay: Annotated[float, OPTIMISATION, NOT_NEGATIVE] = 5e-4
    """Weight decay of SGD, on every parameter."""
    schedule: Annotated[Literal["steps", "one-cycle"], OPTIMISATION] = "steps"
    """Course of the learning rate: drops at the milestones, or up and down once, which suits short runs."""
    milestones: Annotated[tuple[float, ...], OPTIMISATION, RISING_SHARES] = (0.3, 0.6, 0.8)
    """Where the rate drops, as shares of all epochs."""
    factor: Annotated[float, OPTIMISATION, UP_TO_ONE] = 0.2
    """What the rate is multiplied by at each milestone."""
    reset_momentum: Annotated[bool, OPTIMISATION] = False
    """Forget the momentum at each milestone, as the authors' code does, which makes a new optimizer there."""
    batchnorm_init: Annotated[Literal["ones", "uniform"], OPTIMISATION] = "ones"
    """Initial BatchNorm scales: ones, or drawn from [0, 1) as in the authors' code."""
    gradient_clip: Annotated[float | None, OPTIMISATION, POSITIVE] = None
    """Clip the gradient to this norm."""
    not_finite: Annotated[Literal["stop", "skip"], OPTIMISATION] = "stop"
    """A loss that is infinite or not a number stops the run, or skips the batch without a trace, which looks
    at every loss. Either way the batch is written to not-finite/ in the run folder. Test images whose logits
    are not finite leave the run without a result, or count as wrong answers."""
    checkpoint_minutes: Annotated[float, OUTPUT, NOT_NEGATIVE] = 15.0
    """Minutes after which an epoch that goes on is saved too; every epoch's end is."""
    keep: Annotated[Literal["last", "best"], OPTIMISATION] = "last"
    """Which weights become student.safetensors: the last epoch's, or those of least validation error."""

    seed: Annotated[int, SEED, SEEDS] = 0
    """Seed of the initial weights, the order of the images and fresh augmentation."""
    split_seed: Annotated[int | None, SEED, IMAGES, LEFT_OPEN, SEEDS] = None
    """Seed of the validation split and of the images that --max-train picks; the run's seed if not given."""
    view_seed: Annotated[int | None, SEED, BUILDS_CACHE, LEFT_OPEN, SEEDS] = None
    """Seed of the fixed views, which students of any seed share; 0 if not given."""
    precision: Annotated[Precision, PRECISION, BUILDS_CACHE] = "auto"
    """Arithmetic: "auto" is bf16-mixed on a GPU or CPU that computes in bfloat16, and 32-true elsewhere."""
    teacher_precision: Annotated[Literal["auto", "32-true", "bf16-mixed", "16-mixed"], TEACHER] = "auto"
    """Arithmetic of the teacher's forward pass; "auto" is the student's."""
    compile: Annotated[bool, MACHINE] = False
    """Compile student and teacher, which takes a minute or more at the start. Needs a C++ compiler."""
    accelerator: Annotated[Literal["auto", "cpu", "cuda", "mps"], MACHINE, BUILDS_CACHE] = "auto"
    """The kind of device to train on."""
    devices: Annotated[int | None, PLACE, at_least(1)] = None
    """Devices on each machine, working as one. All its GPUs, or one CPU process, if not given."""
    nodes: Annotated[int, PLACE, at_least(1)] = 1
    """Machines that train together. torchrun and SLURM say both by themselves: docs/several-machines.md."""
    wait_minutes: Annotated[float, PLACE, UP_TO_A_YEAR] = 10.0
    """Minutes for which several processes wait for one that says nothing, before they stop."""
    strategy: Annotated[Strategy, PLACE] = "auto"
    """How devices work together, by Lightning's names; "auto" is ddp where there are several, and finds out
    whether the student has parameters that go unused."""
    sync_batchnorm: Annotated[bool, OPTIMISATION] = False
    """BatchNorm over the whole batch; if not, each device normalises its own share of it."""

    loggers: Annotated[str, OUTPUT] = "tensorboard"
    """Where numbers and maps go besides the run folder: none, or any of tensorboard, wandb and mlflow, joined
    by +; the last two are told where by their own environment variables, such as WANDB_MODE."""
    output: Annotated[str | None, OUTPUT] = None
    """The run folder. runs/DATA-STUDENT-METHOD-SEED if not given."""

    def __post_init__(self) -> None:
        for name in field_types():
            _check_type(name, getattr(self, name))
            value = getattr(self, name)
            for fact in facts_of(name):
                if isinstance(fact, Range) and value is not None and not fact.holds(value):
                    raise InputError(
                        f"Recipe: expected {name} {fact.text}, got {value}. Change {flag_of(name)}."
                    )
        object.__setattr__(self, "method", "+".join(self.method_terms) or "none")
        loggers_of(self.loggers)
        self._check_teacher()
        self._check_eager()
        self._check_momentum()
        self._check_views()
        self._check_teacher_precision()
        parse_pairs(self.pairs)
        parse_schedules(self.term_schedule, self.known_terms)

    def _check_teacher_precision(self) -> None:
        if self.precision == "64-true" and self.teacher_precision != "auto":
            raise InputError(
                f'Recipe: precision "64-true" puts the teacher in float64 too, got teacher_precision '
                f'"{self.teacher_precision}". Leave --teacher-precision out.'
            )

    def _check_views(self) -> None:
        if self.view_seed is not None and self.views is None and self.cache is None:
            raise InputError(
                f"Recipe: view_seed={self.view_seed} is of fixed views, got none. Pass --views, such as 4."
            )

    def _check_teacher(self) -> None:
        if self.cache and not self.needs_teacher:
            raise InputError(
                f'Recipe: method "{self.method}" learns from no teacher, got a cache. '
                "Leave --cache out; --views shows the same images."
            )
        if self.needs_teacher and not (self.teacher or self.cache):
            raise InputError(
                f'Recipe: method "{self.method}" needs a teacher, got none. Pass --teacher, or --method none.'
            )

    def _check_eager(self) -> None:
        twice = [name for name, term in self.method_terms.items() if term.needs_input_gradient]
        if self.compile and twice:
            raise InputError(
                f"Recipe: a term over input gradients ({', '.join(twice)}) differentiates the student twice, "
                "which compiled code cannot, got compile. Leave --compile out."
            )

    def _check_momentum(self) -> None:
        if self.reset_momentum and self.schedule != "steps":
            raise InputError(
                'Recipe: reset_momentum needs the schedule "steps", whose rate drops, got '
                f'"{self.schedule}". Leave --reset-momentum out, or pass --schedule steps.'
            )
        if self.nesterov and self.momentum == 0:
            raise InputError("Recipe: expected momentum > 0 with nesterov, got 0. Pass --momentum 0.9.")

    @property
    def known_terms(self) -> dict[str, Declaration]:
        """The terms that a method may name: this package's, and those of the user's own.

        Raises:
            ValueError: if one of the latter cannot be imported, is none, or is called like another.
        """
        known = dict(built_in())
        for path in _listed(self.terms):
            term = declare(path)
            if term.name in known:
                raise InputError(
                    f"Recipe: expected a term with a name of its own, got {path}, which is called "
                    f'"{term.name}" as another is. Change its name.'
                )
            known[term.name] = term
        return known

    @property
    def method_terms(self) -> dict[str, Declaration]:
        """The method's terms by name, none for "none"."""
        known = self.known_terms
        return {name: known[name] for name in _some_of(tuple(known), "method", self.method)}

    @property
    def needs_teacher(self) -> bool:
        """Whether one of the terms asks a teacher."""
        return any(term.needs_teacher for term in self.method_terms.values())

    @property
    def reads_maps(self) -> bool:
        """Whether one of the terms reads attention maps."""
        return any(term.energy for term in self.method_terms.values())

    @property
    def unused_teacher(self) -> str | None:
        """What is named as a teacher though no term asks one; the default does not count as named."""
        if self.needs_teacher:
            return None
        return self.teacher_weights or (None if self.teacher == Recipe.teacher else self.teacher)

    def check_teacher_is_used(self) -> None:
        """Raise ValueError if a teacher is named and no term asks one."""
        if unused := self.unused_teacher:
            raise InputError(
                f'train: method "{self.method}" learns from no teacher, got {unused}. Leave it out '
                "(teacher: null), or name a method that learns from one, such as at."
            )

    @property
    def factories(self) -> list[str]:
        """The code of the user's own that it names."""
        named = [name for field in fields_of(FACTORY) for name in _listed(getattr(self, field))]
        return [name for name in named if is_factory(name)]

    @property
    def images(self) -> str:
        """The data, cifar10 if `data` is not given."""
        return self.data or "cifar10"

    @property
    def folder(self) -> Path:
        """The run folder, named after the run if `output` is not given."""
        if self.output is not None:
            return Path(self.output)
        student = Path(self.student.replace(":", "-")).name
        data = Path(self.images).resolve()
        name = data.parent.name if is_pattern(self.images) else data.name
        return Path("runs") / f"{name}-{student}-{self.method}-{self.seed}"

    def located(self) -> Recipe:
        """The same recipe with absolute paths to what it reads."""
        paths: dict[str, Any] = {
            name: _absolute(name, getattr(self, name)) for name in fields_of(PATH, WEIGHTS)
        }
        return replace(self, **paths)

    def resolved(self) -> Recipe:
        """The same recipe, settled, with absolute paths, so that it works anywhere."""
        teacher = self.teacher if self.needs_teacher else None
        settled = replace(self, teacher=teacher, data=self.images, output=str(self.folder.absolute()))
        return settled.located()

    def alone(self) -> Recipe:
        """The recipe without a teacher and all that concerns one; the output folder is left open."""
        kept = {name: getattr(self, name) for name in fields_of(*set(Concern) - {TEACHER, METHOD})}
        kept["split_seed"] = self.seed if self.split_seed is None else self.split_seed
        kept["view_seed"] = None if self.views is None else self.view_seed or 0
        kept["validation"] = VALIDATION if self.validation is None else self.validation
        return Recipe(**kept | {"method": "none", "teacher": None, "output": None})

    def for_teacher(self) -> Recipe:
        """The recipe that trains this recipe's teacher first, without a teacher of its own."""
        assert self.teacher is not None
        return replace(
            self.alone(),
            student=self.teacher,
            student_weights=None,
            views=None,
            view_seed=None,
            epochs=self.teacher_epochs or self.epochs,
            output=str(self.folder / "teacher"),
        )

    def differences(self, other: Recipe) -> list[str]:
        """The fields in which two recipes are not one training, wherever that takes place."""
        return [name for name in fields_of(*TRAINING) if getattr(self, name) != getattr(other, name)]

    def to_yaml(self) -> str:
        """The recipe as flat YAML, a line a field."""
        import yaml

        values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return yaml.safe_dump(values, sort_keys=False)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from YAML; fields that the file leaves out keep their defaults.

        Of several documents in a file the last is the recipe: those of `reproductions/` begin with facts.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not flat YAML, holds an unknown field or a bad value, or names a factory that
                the user has not named himself.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"Recipe.load: expected a YAML recipe, got {path}, which is not a file.")
        try:
            documents = parse_yaml(read_text(Path(path), LARGEST_YAML))
        except ValueError as error:
            raise InputError(f"Recipe.load: {path} is not readable as YAML ({error}).") from None
        values = documents[-1] if documents else None
        if not isinstance(values, dict):
            raise InputError(f"Recipe.load: expected `field: value` lines in {path}, got {shown(values)}.")
        # guard: factory-of-a-recipe
        check_models(values, path)
        return cls.from_mapping(values)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from a mapping of field names to values, with YAML's types mended (lists, 1e-3 as text).

        Raises:
            ValueError: if a name is unknown (near matches are listed) or a value is bad.
        """
        for name in values:
            if name not in field_types():
                near = did_you_mean(str(name)[:80], field_types())
                raise InputError(
                    f"Recipe: unknown field {shown(name)}. {near or '`train --help` lists the fields.'}"
                )
        return cls(**{name: _mend(name, value) for name, value in values.items()})


def check_models(values: Mapping[str, Any], path: str | Path) -> None:
    """Raise ValueError if settings that were read from a file name a factory that the user has not named."""
    for name in fields_of(FACTORY):
        for part in _listed(values.get(name)):
            check_trusted(part, path)


def _listed(value: Any) -> list[str]:
    """The names in a setting that may have several, with commas between them."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else []


def loggers_of(loggers: str) -> tuple[str, ...]:
    """The loggers that are named, in the order of `LOGGERS`.

    Raises:
        ValueError: if there is an unknown one, or one twice.
    """
    return _some_of(LOGGERS, "loggers", loggers)


def _some_of(known: tuple[str, ...], field: str, text: str) -> tuple[str, ...]:
    """The names in a sum such as "at+kd", in the order they are known in; none for "none"."""
    named = [] if text == "none" else [part.strip() for part in text.split("+")]
    for part in named:
        if part not in known:
            near = did_you_mean(part[:80], (*known, "none"))
            raise InputError(
                f'Recipe: expected {field} "none" or some of {", ".join(known)}, got {shown(part)} in '
                f"{shown(text)}. {near or f'Join them by +, such as {known[0]}+{known[1]}.'}"
            )
        if named.count(part) > 1:
            raise InputError(f"Recipe: expected each name once, got {part} twice in {field} {shown(text)}.")
    return tuple(name for name in known if name in named)


def parse_pairs(text: str) -> list[tuple[str, str, float]] | None:
    """Layers from "a:b,c:d" or "a:b:0.5" as (student, teacher, weight); a lone "a" is "a:a"; None for "auto".

    Raises:
        ValueError: if the text is of another form.
    """
    if text == "auto":
        return None
    return [_parse_pair(part.strip(), text) for part in text.split(",")]


def _parse_pair(part: str, text: str) -> tuple[str, str, float]:
    names = part.split(":")
    try:
        weight = float(names[2]) if len(names) == 3 else 1.0
    except ValueError:
        weight = -1.0
    if not all(names) or len(names) > 3 or not 0 < weight <= LARGEST_FLOAT:
        raise InputError(
            f'Recipe: expected pairs "auto" or STUDENT_LAYER:TEACHER_LAYER[:WEIGHT],..., got {shown(text)}. '
            "`attention-transfer pairs` prints the layers."
        )
    return names[0], names[1] if len(names) > 1 else names[0], weight


@functools.cache
def field_types() -> dict[str, Any]:
    """The declared type of every recipe field, in their order."""
    types = typing.get_type_hints(Recipe)
    return {field.name: types[field.name] for field in fields(Recipe)}


@functools.cache
def facts_of(name: str) -> tuple[Concern | Fact | Range, ...]:
    """What stands beside the type of a field."""
    return typing.get_type_hints(Recipe, include_extras=True)[name].__metadata__


def fields_of(*facts: Concern | Fact) -> tuple[str, ...]:
    """The fields of which any of the facts is true."""
    return tuple(name for name in field_types() if not set(facts).isdisjoint(facts_of(name)))


def cache_fields() -> tuple[str, ...]:
    """The fields that a cache is built by, besides the number of views, which may grow."""
    return fields_of(SOURCE, IMAGES, BUILDS_CACHE)


def fields_read_by(terms: Iterable[str]) -> set[str]:
    """The fields about the method that its terms read, as far as they are terms of this package."""
    known = [built_in()[name] for name in terms if name in built_in()]
    return {*_settings(known), *(["term_schedule"] if terms else [])}


def field_texts(user: str) -> dict[str, str]:
    """The help of every field, on behalf of a command."""
    docstring_parser = require("docstring_parser", extra="train", user=user)
    parsed = [docstring_parser.parse_from_object(part).params for part in (_Subject, Recipe)]
    texts = {each.arg_name: one_line(each.description or "") for params in parsed for each in params}
    terms = ", ".join(f"{term.name} ({term.title})" for term in built_in().values())
    texts["method"] = texts["method"].replace("some of the terms below", f"some of {terms}")
    return texts | {name: setting.help for name, setting in _settings(built_in().values()).items()}


def flag_of(name: str) -> str:
    """What the command calls a field."""
    return "--" + name.replace("_", "-")


def _absolute(name: str, value: str | None) -> str | None:
    """An existing path or a pattern made absolute; names of models and data sets stay as they are."""
    if value is None:
        return value
    path, prefix = at_home(value), None
    if WEIGHTS in facts_of(name):
        path, prefix = split_prefix(path)
    if not (is_pattern(value) or path.exists()):
        return value
    return str(path.absolute()) + ("" if prefix is None else f":{prefix}")


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type itself."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _accepts(option: Any, value: Any) -> bool:
    if typing.get_origin(option) is Literal:
        return value in typing.get_args(option)
    if typing.get_origin(option) is tuple:
        return isinstance(value, tuple) and all(_accepts(float, entry) for entry in value)
    if option is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_FLOAT
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if option is str:
        return isinstance(value, str) and len(value) <= LONGEST_TEXT and _may_be_a_path(value)
    return isinstance(value, option)


def _may_be_a_path(text: str) -> bool:
    """Whether the system can be asked for a file of that name: not with a NUL, nor with half a character."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _check_type(name: str, value: Any) -> None:
    options = _options(field_types()[name])
    if any(_accepts(option, value) for option in options):
        return
    expected = " or ".join(_describe(option) for option in options)
    raise InputError(f"Recipe: expected {name} to be {expected}, got {shown(value)}. Change {flag_of(name)}.")


def _describe(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return " or ".join(f'"{choice}"' for choice in typing.get_args(option))
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return names.get(option, "a list of numbers")


def _mend(name: str, value: Any) -> Any:
    """YAML reads 1e-3 as text and has no tuples: the value as its field wants it."""
    options = _options(field_types()[name])
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and float in options:
        try:
            return float(value)
        except ValueError:
            return value
    return value
