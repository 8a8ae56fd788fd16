"""The recipe: every setting of a training run, in one flat dataclass that reads and writes YAML."""

from __future__ import annotations

import difflib
import functools
import os
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from attention_transfer import _choices as choices
from attention_transfer._hints import did_you_mean
from attention_transfer._patterns import at_home, is_pattern
from attention_transfer._reading import LARGEST_YAML, parse_yaml, read_text, shown
from attention_transfer._trust import check_trusted
from attention_transfer._weights_path import split_prefix
from attention_transfer.schedules import parse_schedules

VALIDATION = 0.1  # share of the training images that are held out where nothing is said

TERMS = ("at", "kd", "f-actt", "gradient", "symmetry", "min-l2")
"""What a method is made of, in the order of its name."""

LOGGERS = ("tensorboard", "wandb", "mlflow")

WITHOUT_TEACHER = ("symmetry", "min-l2")
"""Terms that only look at the student."""

TWICE = ("gradient", "symmetry", "min-l2")
"""Terms over input gradients, which differentiate the student twice."""

AUTO = "auto"

LARGEST_FLOAT = sys.float_info.max
LONGEST_TEXT = 10_000  # characters of a field

Weight = float | Literal["auto"]
Strategy = Literal["auto", "ddp", "ddp_find_unused_parameters_true"]
Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed", "64-true"]


@dataclass(frozen=True)
class Recipe:
    """Every setting of one training run.

    The defaults are the paper's CIFAR recipe: SGD 0.1 with momentum 0.9 and weight decay 5e-4, the rate
    times 0.2 at 30, 60 and 80 percent of 200 epochs, batches of 128, reflect-padded random crops and flips.
    beta is the exception: 1 with the form "paper" did best in this project's first trial. `reproductions/`
    has the authors' recipes to the letter.

    Raises:
        ValueError: if a value is out of its range or contradicts another; the message names the field.
    """

    student: str = "wrn-16-1"
    """The model to train: wrn-16-1, nin-thin, resnet18, timm:NAME, torchvision:NAME, package.module:name."""
    student_weights: str | None = None
    """Weights to start the student from: a file, a run folder, or "pretrained". Random if not given. A head
    of another number of classes starts afresh; all else must fit. FILE:PREFIX names one of several networks
    in a file, such as last.ckpt:teacher."""
    teacher: str | None = "wrn-16-2"
    """The model to learn from: a run folder, its weights, or a name; without weights it is trained first."""
    teacher_weights: str | None = None
    """The teacher's weights: a safetensors file, a checkpoint, FILE:PREFIX for one of several networks in it,
    a run folder, or "pretrained"."""
    teacher_classes: int | None = None
    """Number of classes of the teacher's weights file, where it differs from the data's."""
    cache: str | None = None
    """Learn from this folder of `cache build` instead: no teacher is run. It settles images and views."""
    teacher_epochs: int | None = None
    """Epochs for a teacher that is trained first. As many as the student's if not given."""

    data: str | None = None
    """The images: cifar10, cifar100, fashion-mnist, mnist, mnist-5k, or a folder of class folders, of parquet
    files or of tar files, or a pattern such as DIR/train-{000..146}.tar. cifar10 if
    not given, or what the cache was built from."""
    data_root: str | None = None
    """Where the named data sets are looked for and downloaded to."""
    validation: float | None = None
    """Share of the training images held out to choose the best epoch, 0.1 if not given; 0 for none."""
    max_train: int | None = None
    """Train on this many images only; validation and test images stay as they are."""
    image_size: int | None = None
    """Height and width of every image, in pixels: its shorter side is resized to this, and the central square
    kept. Where images are streamed, training crops them at random instead."""
    image_column: str | None = None
    """The parquet column of the images, where it cannot be told from the file."""
    label_column: str | None = None
    """The parquet column of the labels, or the JSON field in tar files, where it cannot be told."""
    pad: int | None = None
    """Augmentation: reflect-pad by so many pixels and crop back at random. As suits the data if not given."""
    flip: bool | None = None
    """Augmentation: mirror every second image at random. As suits the data if not given: not for digits."""
    views: int | None = None
    """Show so many fixed crops and flips of each image, one an epoch in turn. Fresh ones if not given."""
    num_workers: int | None = None
    """Processes that decode images which do not fit in memory. One a core, at most 8, if not given."""

    method: str = "at"
    """What the student learns from besides labels: none, or any of at (attention maps), kd (distillation),
    f-actt (full activations), gradient (input gradients), symmetry (of the input gradient under a flip) and
    min-l2 (a small input gradient), joined by +, such as at+kd."""
    pairs: str = "auto"
    """Student and teacher layers to compare, "layer1:layer1,layer2:block2"; "auto" finds the stage ends."""
    beta: Weight = 1.0
    """Weight of the attention transfer term, which does not carry over between the forms; "auto" sets it from
    the first batches: see docs/methods.md."""
    form: choices.Form = "paper"
    """Form of the terms at layer pairs: the paper's, the authors' code's (beta about 1000), or Caffe's."""
    p: float = 2.0
    """Exponent of the attention map, the sum over channels of |A|^p; at least 1."""
    mapping: choices.Mapping = "sum"
    """How the channels are reduced to a map."""
    resize: choices.Side | None = None
    """Whose maps are resized to the other's where sizes differ. An error there if not given."""
    alpha: float = 0.9
    """Distillation: share of the teacher's answer in the loss, from 0 to 1."""
    temperature: float = 4.0
    """Distillation: temperature that softens both answers."""
    beta_f_actt: Weight = 1.0
    """Weight of full-activation transfer, or "auto" as for beta."""
    beta_gradient: float = 1.0
    """Weight of gradient-based attention transfer; docs/speed.md has what the second derivative costs."""
    beta_symmetry: float = 1.0
    """Weight of the symmetry term, which shows the student every image and its mirror image."""
    beta_min_l2: float = 1.0
    """Weight of the norm of the student's input gradient."""
    term_schedule: str = "constant"
    """Course of the terms' weights over the run: constant, linear (down to 0), cosine (down to 0) or step
    (times 0.2 at 30, 60 and 80 percent) for every term, or for some, such as at:linear,kd:cosine."""

    epochs: int = 200
    """Passes over the training images."""
    batch_size: int = 128
    """Images in a step, over all devices together, which share them equally."""
    lr: float = 0.1
    """Learning rate: the first one under "steps", the highest one under "one-cycle"."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov's form of the momentum."""
    weight_decay: float = 5e-4
    """Weight decay of SGD, on every parameter."""
    schedule: Literal["steps", "one-cycle"] = "steps"
    """Course of the learning rate: drops at the milestones, or up and down once, which suits short runs."""
    milestones: tuple[float, ...] = (0.3, 0.6, 0.8)
    """Where the rate drops, as shares of all epochs."""
    factor: float = 0.2
    """What the rate is multiplied by at each milestone."""
    reset_momentum: bool = False
    """Forget the momentum at each milestone, as the authors' code does, which makes a new optimizer there."""
    batchnorm_init: Literal["ones", "uniform"] = "ones"
    """Initial BatchNorm scales: ones, or drawn from [0, 1) as in the authors' code."""
    gradient_clip: float | None = None
    """Clip the gradient to this norm."""
    not_finite: Literal["stop", "skip"] = "stop"
    """A loss that is infinite or not a number stops the run, or skips the batch without a trace, which looks
    at every loss. Either way the batch is written to not-finite/ in the run folder. Test images whose logits
    are not finite leave the run without a result, or count as wrong answers."""
    checkpoint_minutes: float = 15.0
    """Minutes after which an epoch that goes on is saved too; every epoch's end is."""
    keep: Literal["last", "best"] = "last"
    """Which weights become student.safetensors: the last epoch's, or those of least validation error."""

    seed: int = 0
    """Seed of the initial weights, the order of the images and fresh augmentation."""
    split_seed: int | None = None
    """Seed of the validation split and of the images that --max-train picks; the run's seed if not given."""
    view_seed: int | None = None
    """Seed of the fixed views, which students of any seed share; 0 if not given."""
    precision: Precision = "auto"
    """Arithmetic: "auto" is bf16-mixed on a GPU or CPU that computes in bfloat16, and 32-true elsewhere."""
    teacher_precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """Arithmetic of the teacher's forward pass; "auto" is the student's."""
    compile: bool = False
    """Compile student and teacher, which takes a minute or more at the start. Needs a C++ compiler."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """The kind of device to train on."""
    devices: int | None = None
    """Devices on each machine, working as one. All its GPUs, or one CPU process, if not given."""
    nodes: int = 1
    """Machines that train together. torchrun and SLURM say both by themselves: docs/several-machines.md."""
    wait_minutes: float = 10.0
    """Minutes for which several processes wait for one that says nothing, before they stop."""
    strategy: Strategy = "auto"
    """How devices work together, by Lightning's names; "auto" is ddp where there are several, and finds out
    whether the student has parameters that go unused."""
    sync_batchnorm: bool = False
    """BatchNorm over the whole batch; if not, each device normalises its own share of it."""

    loggers: str = "tensorboard"
    """Where numbers and maps go besides the run folder: none, or any of tensorboard, wandb and mlflow, joined
    by +; the last two are told where by their own environment variables, such as WANDB_MODE."""
    output: str | None = None
    """The run folder. runs/DATA-STUDENT-METHOD-SEED if not given."""

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name))
        for name, (holds, expected) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"Recipe: expected {name} {expected}, got {value}. Change {flag_of(name)}.")
        object.__setattr__(self, "method", _canonical(self.method))
        loggers_of(self.loggers)
        self._check_teacher()
        self._check_eager()
        self._check_momentum()
        self._check_views()
        self._check_teacher_precision()
        parse_pairs(self.pairs)
        parse_schedules(self.term_schedule, TERMS)

    def _check_teacher_precision(self) -> None:
        if self.precision == "64-true" and self.teacher_precision != "auto":
            raise ValueError(
                f'Recipe: precision "64-true" puts the teacher in float64 too, got teacher_precision '
                f'"{self.teacher_precision}". Leave --teacher-precision out.'
            )

    def _check_views(self) -> None:
        if self.view_seed is not None and self.views is None and self.cache is None:
            raise ValueError(
                f"Recipe: view_seed={self.view_seed} is of fixed views, got none. Pass --views, such as 4."
            )

    def _check_teacher(self) -> None:
        if self.cache and not self.needs_teacher:
            raise ValueError(
                f'Recipe: method "{self.method}" learns from no teacher, got a cache. '
                "Leave --cache out; --views shows the same images."
            )
        if self.needs_teacher and not (self.teacher or self.cache):
            raise ValueError(
                f'Recipe: method "{self.method}" needs a teacher, got none. Pass --teacher, or --method none.'
            )

    def _check_eager(self) -> None:
        twice = [term for term in self.terms if term in TWICE]
        if self.compile and twice:
            raise ValueError(
                f"Recipe: a term over input gradients ({', '.join(twice)}) differentiates the student twice, "
                "which compiled code cannot, got compile. Leave --compile out."
            )

    def _check_momentum(self) -> None:
        if self.reset_momentum and self.schedule != "steps":
            raise ValueError(
                'Recipe: reset_momentum needs the schedule "steps", whose rate drops, got '
                f'"{self.schedule}". Leave --reset-momentum out, or pass --schedule steps.'
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError("Recipe: expected momentum > 0 with nesterov, got 0. Pass --momentum 0.9.")

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the method's terms, none for "none"."""
        return terms_of(self.method)

    @property
    def needs_teacher(self) -> bool:
        """Whether one of the terms asks a teacher."""
        return any(term not in WITHOUT_TEACHER for term in self.terms)

    @property
    def unused_teacher(self) -> str | None:
        """What is named as a teacher though no term asks one; the default does not count as named."""
        if self.needs_teacher:
            return None
        return self.teacher_weights or (None if self.teacher == Recipe.teacher else self.teacher)

    def check_teacher_is_used(self) -> None:
        """Raise ValueError if a teacher is named and no term asks one."""
        if unused := self.unused_teacher:
            raise ValueError(
                f'train: method "{self.method}" learns from no teacher, got {unused}. Leave it out '
                "(teacher: null), or name a method that learns from one, such as at."
            )

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
        paths: dict[str, Any] = {name: _absolute(name, getattr(self, name)) for name in _MAYBE_PATHS}
        return replace(self, **paths)

    def resolved(self) -> Recipe:
        """The same recipe, settled, with absolute paths, so that it works anywhere."""
        teacher = self.teacher if self.needs_teacher else None
        settled = replace(self, teacher=teacher, data=self.images, output=str(self.folder.absolute()))
        return settled.located()

    def alone(self) -> Recipe:
        """The recipe without a teacher and all that concerns one; the output folder is left open."""
        kept = {field.name: getattr(self, field.name) for field in fields(self)}
        kept["split_seed"] = self.seed if self.split_seed is None else self.split_seed
        kept["view_seed"] = None if self.views is None else self.view_seed or 0
        kept["validation"] = VALIDATION if self.validation is None else self.validation
        return Recipe(**{name: value for name, value in kept.items() if name not in _TEACHING}, **_ALONE)

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
        beside = {*PLACES, "output"}
        names = [field.name for field in fields(self) if field.name not in beside]
        return [name for name in names if getattr(self, name) != getattr(other, name)]

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
            raise ValueError(f"Recipe.load: {path} is not readable as YAML ({error}).") from None
        values = documents[-1] if documents else None
        if not isinstance(values, dict):
            raise ValueError(f"Recipe.load: expected `field: value` lines in {path}, got {shown(values)}.")
        check_models(values, path)
        return cls.from_mapping(values)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from a mapping of field names to values, with YAML's types mended (lists, 1e-3 as text).

        Raises:
            ValueError: if a name is unknown (near matches are listed) or a value is bad.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name)[:80], known, n=3)
                hint = f"Did you mean {', '.join(near)}?" if near else "`train --help` lists the fields."
                raise ValueError(f"Recipe: unknown field {shown(name)}. {hint}")
        return cls(**{name: _mend(name, value) for name, value in values.items()})


def check_models(values: Mapping[str, Any], path: str | Path) -> None:
    """Raise ValueError if settings that were read from a file name a factory that the user has not named."""
    for name in MODELS:
        check_trusted(values.get(name), path)


def terms_of(method: str) -> tuple[str, ...]:
    """The terms in the name of a method, in the order of `TERMS`.

    Raises:
        ValueError: if there is an unknown one, or one twice.
    """
    return _some_of(TERMS, "method", method)


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
            raise ValueError(
                f'Recipe: expected {field} "none" or some of {", ".join(known)}, got {shown(part)} in '
                f"{shown(text)}. {near or f'Join them by +, such as {known[0]}+{known[1]}.'}"
            )
        if named.count(part) > 1:
            raise ValueError(f"Recipe: expected each name once, got {part} twice in {field} {shown(text)}.")
    return tuple(name for name in known if name in named)


def _canonical(method: str) -> str:
    return "+".join(terms_of(method)) or "none"


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
        raise ValueError(
            f'Recipe: expected pairs "auto" or STUDENT_LAYER:TEACHER_LAYER[:WEIGHT],..., got {shown(text)}. '
            "`attention-transfer pairs` prints the layers."
        )
    return names[0], names[1] if len(names) > 1 else names[0], weight


@functools.cache
def field_types() -> dict[str, Any]:
    """The declared type of every recipe field."""
    return typing.get_type_hints(Recipe)


MODELS = ("student", "teacher")
"""The fields that name a model."""

IMAGES = ("validation", "max_train", "split_seed", "image_size")
"""The fields that say which images there are; with a cache they are the cache's."""

SOURCE = ("data", "data_root", "image_column", "label_column")
"""The fields that say where the images are; with a cache they are the cache's if the data is left open."""

CACHED = (
    *(*SOURCE, *IMAGES, "pad", "flip", "view_seed"),
    *("teacher", "teacher_weights", "teacher_classes", "p", "mapping"),
    *("batch_size", "num_workers", "precision", "accelerator"),
)
"""The fields that a cache is built by, besides the number of views, which may grow."""

PLACES = ("devices", "nodes", "strategy", "wait_minutes")
"""The fields that say where a run takes place; it is the same run elsewhere."""

_ALONE: dict[str, Any] = {"method": "none", "teacher": None}
_TEACHING = {
    *("method", "cache", "teacher", "teacher_weights", "teacher_classes", "teacher_epochs"),
    *("teacher_precision", "pairs", "beta", "form", "p", "mapping", "resize", "alpha", "temperature"),
    *("beta_f_actt", "beta_gradient", "beta_symmetry", "beta_min_l2", "term_schedule"),
    "output",
}

_WEIGHTS = ("teacher_weights", "student_weights")
_MAYBE_PATHS = ("cache", "data", "data_root", "teacher", *_WEIGHTS)

_POSITIVE = (lambda v: v > 0, "> 0")
_AT_LEAST_ONE = (lambda v: v >= 1, ">= 1")
_NOT_NEGATIVE = (lambda v: v >= 0, ">= 0")
_WEIGHT = (lambda v: v == AUTO or v >= 0, '>= 0 or "auto"')
_SHARE = (lambda v: 0 <= v <= 1, "from 0 to 1")
_SEED = (lambda v: 0 <= v < 2**32, "from 0 to 2^32 - 1")
_RANGES = {
    "teacher_classes": (lambda v: v >= 2, ">= 2"),
    "teacher_epochs": _AT_LEAST_ONE,
    "validation": (lambda v: 0 <= v < 1, "from 0 to below 1"),
    "max_train": (lambda v: v >= 2, ">= 2"),
    "views": _AT_LEAST_ONE,
    "image_size": _AT_LEAST_ONE,
    "pad": _NOT_NEGATIVE,
    "num_workers": _NOT_NEGATIVE,
    "beta": _WEIGHT,
    "beta_f_actt": _WEIGHT,
    "beta_gradient": _NOT_NEGATIVE,
    "beta_symmetry": _NOT_NEGATIVE,
    "beta_min_l2": _NOT_NEGATIVE,
    "p": _AT_LEAST_ONE,
    "alpha": _SHARE,
    "temperature": _POSITIVE,
    "epochs": _AT_LEAST_ONE,
    "batch_size": (lambda v: v >= 2, ">= 2 (batch normalisation learns nothing from one image)"),
    "lr": _POSITIVE,
    "momentum": (lambda v: 0 <= v < 1, "from 0 to below 1"),
    "weight_decay": _NOT_NEGATIVE,
    "milestones": (
        lambda v: all(0 < m < 1 for m in v) and list(v) == sorted(v),
        "as rising shares between 0 and 1",
    ),
    "factor": (lambda v: 0 < v <= 1, "above 0 and up to 1"),
    "gradient_clip": _POSITIVE,
    "checkpoint_minutes": _NOT_NEGATIVE,
    "seed": _SEED,
    "split_seed": _SEED,
    "view_seed": _SEED,
    "devices": _AT_LEAST_ONE,
    "nodes": _AT_LEAST_ONE,
    "wait_minutes": (lambda v: 0 < v <= 525_600, "above 0 and up to a year"),
}


def flag_of(name: str) -> str:
    """What the command calls a field."""
    return "--" + name.replace("_", "-")


def _absolute(name: str, value: str | None) -> str | None:
    """An existing path or a pattern made absolute; names of models and data sets stay as they are."""
    if value is None:
        return value
    path, prefix = at_home(value), None
    if name in _WEIGHTS:
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
    raise ValueError(f"Recipe: expected {name} to be {expected}, got {shown(value)}. Change {flag_of(name)}.")


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
