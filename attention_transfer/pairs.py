"""Which layer of the student learns from which layer of the teacher: stage ends, paired by resolution.

A network is traced once, as a tree of module calls. From the tree come *units*: the coarsest modules that
stay within one resolution, or enter the next one as a residual block does. A stage is the units of equal
resolution, and its end is the last unit that does the stage's work, as `stage_ends` documents.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from . import taps
from ._channels import wrong_channels
from ._errors import InputError, InputTypeError
from ._outputs import find_logits
from ._reading import first_line
from ._untouched import untouched
from .functional import attention_map

MAX_DEPTH_PAIRS = 4  # for two networks of one resolution each, such as two ViTs


@dataclass(frozen=True)
class Pair:
    """A student layer and the teacher layer whose attention map it learns.

    Attributes:
        student: dotted name of a module of the student, as `Taps` takes it.
        teacher: dotted name of a module of the teacher.
        weight: factor of this pair within the attention-transfer term.

    Raises:
        ValueError: if the weight is negative or not finite.
        TypeError: if a name is not a string.
    """

    student: str
    teacher: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name in (self.student, self.teacher):
            if not isinstance(name, str):
                raise InputTypeError(
                    f"Pair: expected the names of two modules, got {name!r}. Pass dotted names."
                )
        number = isinstance(self.weight, Real)
        if not (number and math.isfinite(self.weight) and self.weight >= 0):
            raise InputError(f"Pair: expected a weight >= 0, got {self.weight!r}. Leave it out for 1.")

    def __str__(self) -> str:
        weight = "" if self.weight == 1 else f" (weight {self.weight:g})"
        return f"{self.student} <- {self.teacher}{weight}"


@dataclass(frozen=True)
class Stage:
    """The end of one stage of a network.

    Attributes:
        name: dotted name of the module to tap, as `Taps` takes it.
        shape: (c, h, w) of its map for the example input.
        stride: input pixels per map pixel, along each side (geometric mean of the two).
    """

    name: str
    shape: tuple[int, int, int]
    stride: float

    @property
    def level(self) -> int:
        """Number of halvings since the input; stages of equal level are paired."""
        return _level(self.stride)

    def __str__(self) -> str:
        return f"{self.name}: {'x'.join(map(str, self.shape))}, stride {self.stride:.3g}"


def suggest_pairs(
    student: nn.Module,
    teacher: nn.Module | Sequence[Stage],
    example_input: Float[Tensor, "b c h w"],
    teacher_input: Float[Tensor, "b_t c_t h_t w_t"] | None = None,
) -> list[Pair]:
    """Pair the stage ends of two networks by relative resolution, in order of execution.

    Resolutions are compared as halvings of the network's own input, rounded: a ViT with patches of 14 pairs
    with a stage of stride 16. Two networks of one resolution each (two ViTs) are paired by relative depth, at
    up to four evenly spaced blocks that include the last. The models and the random state are left as found.

    Args:
        student: any module.
        teacher: any module, or what `stages_to_store` found of one that is no longer at hand.
        example_input: images that both networks accept; only shape, dtype and the first two images matter.
        teacher_input: images for the teacher where it expects another size.

    Raises:
        ValueError: if a network cannot run on the input, has no stages, or no resolution is common to both.
    """
    ours = _survey(student, example_input, user="suggest_pairs", role="student")
    if isinstance(teacher, nn.Module):
        images = example_input if teacher_input is None else teacher_input
        theirs = _survey(teacher, images, user="suggest_pairs", role="teacher")
    else:
        theirs = _stored_survey(teacher)
    if ours.blocks and theirs.blocks:
        return _pairs_by_depth(ours.blocks, theirs.blocks)
    at_level = {stage.level: stage for stage in theirs.stages}
    pairs = [Pair(stage.name, at_level[stage.level].name) for stage in ours.stages if stage.level in at_level]
    if not pairs:
        raise InputError(
            "suggest_pairs: expected stages of equal relative resolution, got strides "
            f"{_strides(ours.stages)} in the student and {_strides(theirs.stages)} in the teacher. Name the "
            'layers, pairs=[Pair("student.layer", "teacher.layer")], with resize="student" or "teacher" for '
            f"the term{_or_larger(ours.stages, theirs.stages)}."
        )
    return pairs


def stage_ends(model: nn.Module, example_input: Float[Tensor, "b c h w"]) -> list[Stage]:
    """The last module at each spatial resolution, in order of execution.

    What counts as the last, when several modules end at a resolution:
    1. A block (a module with two or more weight layers) comes before single layers: the residual stage, not
       the norm and ReLU after it; the dense block, not the transition; the last inverted residual block, not
       the 1x1 head. A block that begins in one resolution and ends in the next belongs to the next, with
       what it holds, unless nothing else does more work at the first. What works on windows or blocks of a
       map counts as work on the map.
    2. Without blocks (VGG, AlexNet) it is the last weight layer with the norm and activation behind it.
    3. Pooling makes no stage of its own, nor does a map of 1x1 pixel. The stem, which is a single strided
       layer a resolution or goes straight into pooling, makes none when blocks follow.
    4. A network of a single resolution (ViT, Mixer) ends with the last of its repeated blocks.
    5. The name is the outermost module with that output ("layer1", not "layer1.1.relu"), short of one that
       spans other stages ("features"). An output that is overwritten in place later is never chosen: the
       in-place module itself is, or else the end before it.
    6. The head of a model that answers with a dict of logits for each pixel makes none: what has a channel a
       class, and goes into no further module.
    7. Before a norm over the channels, which leaves the map flat: the end is what that is given.
    8. What is only added to one of several maps, inside of a module that takes and gives maps of several
       resolutions, makes none where another block ends at the resolution.

    Raises:
        ValueError: if the model cannot run on the input, or returns no maps at all; if most of its layers
            work on what cannot be read as maps, such as windows, and no block returns one.
    """
    return _survey(model, example_input, user="stage_ends", role="model").stages


def stages_to_store(model: nn.Module, example_input: Float[Tensor, "b c h w"]) -> list[Stage]:
    """All that `suggest_pairs` may pair a student with: stand-ins for a teacher that will not be at hand.

    The stage ends; for a network of a single resolution, up to four of its repeated blocks.

    Raises:
        ValueError: as `stage_ends`.
    """
    survey = _survey(model, example_input, user="stages_to_store", role="model")
    return _spread(survey.blocks, min(MAX_DEPTH_PAIRS, len(survey.blocks))) or survey.stages


@dataclass(frozen=True)
class _Survey:
    stages: list[Stage]
    blocks: list[Stage]  # the repeated blocks, for a network of a single resolution only


def _stored_survey(stages: Sequence[Stage]) -> _Survey:
    """The survey that `stages_to_store` was taken from: only blocks come several to a level."""
    of_one_level = len(stages) > 1 and len({stage.level for stage in stages}) == 1
    return _Survey(list(stages), list(stages) if of_one_level else [])


def _survey(model: nn.Module, images: Tensor, *, user: str, role: str) -> _Survey:
    if not isinstance(images, Tensor) or images.dim() != 4 or not len(images):
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(
            f"{user}: expected images (b, c, h, w), got {got}. Pass a batch, e.g. x[:2], or x[None] of one "
            "image; take video frame by frame."
        )
    trace = _trace(model, images, user=user, role=role)
    ends = [trace.before_norm(end) for end in _ends(trace)]
    blocks = [trace.before_norm(block) for block in _repeated_blocks(trace)] if len(ends) == 1 else []
    stages = trace.stages(blocks[-1:] or _outermost(ends, trace.root))
    if not stages:
        raise InputError(
            f"{user}: expected the {role} to have maps larger than 1x1, got none for a "
            f"{images.shape[-2]}x{images.shape[-1]} input. Pass a larger example input, or name the layers."
        )
    unread = [call for call in trace.root.walk() if call.is_unread]
    if len(unread) > len(trace.root.weighted()) and not any(end.is_block for end in ends):
        raise InputError(
            f"{user}: expected the {role} to have blocks that return maps, got {len(unread)} layers whose "
            f"output cannot be read as one for a {images.shape[-2]}x{images.shape[-1]} input, such as "
            f"{_way_to_read(unread[-1])}"
        )
    return _Survey(stages, trace.stages(blocks))


def _way_to_read(layer: _Call) -> str:
    """A layer that is no map, and how the user gets one."""
    assert layer.tensor is not None
    which = f"{layer.name} with {tuple(layer.tensor.shape)} for two images"
    if layer.in_windows:
        return (
            f"{which}, in windows. Name layers that return all windows of an image put together, or what "
            'such a layer is given, as "neck.input".'
        )
    return (
        f"{which}. Name layers, with the grid of their tokens and how many stand in front of it: "
        f'"{layer.name}@14x14+1".'
    )


def _pairs_by_depth(ours: Sequence[Stage], theirs: Sequence[Stage]) -> list[Pair]:
    count = min(MAX_DEPTH_PAIRS, len(ours), len(theirs))
    both = zip(_spread(ours, count), _spread(theirs, count), strict=True)
    return [Pair(mine.name, other.name) for mine, other in both]


def _spread(blocks: Sequence[Stage], count: int) -> list[Stage]:
    """`count` evenly spaced blocks that include the last."""
    return [blocks[round((i + 1) * len(blocks) / count) - 1] for i in range(count)]


def _strides(stages: Sequence[Stage]) -> str:
    return ", ".join(f"{stage.stride:.3g}" for stage in stages)


def _or_larger(*sides: Sequence[Stage]) -> str:
    """More advice where the side that goes less deep may have stages that are one pixel at this size."""
    deepest = min((stages[-1] for stages in sides), key=lambda stage: stage.level)
    return ", or pass a larger example input" if min(deepest.shape[1:]) <= 2 else ""


def _level(stride: float) -> int:
    return round(math.log2(stride))


# ---------------------------------------------------------------------------------------------- trace


@dataclass(eq=False)
class _Call:
    """One call of a module, with the calls made inside it."""

    name: str
    number: int  # of this module's calls, from 0
    module: nn.Module
    parent: _Call | None
    given: list[Tensor]
    input: Tensor | None  # the one of them that is read as a map
    input_version: int
    input_level: int | None
    children: list[_Call] = field(default_factory=list)
    tensor: Tensor | None = None
    version: int = 0
    layout: taps.Layout | None = None  # None for anything but a map larger than 1x1
    stride: float = math.nan
    level: int | None = None
    works_at: int | None = None  # the level at which a weight in it works: its own, or that of the map around
    spans: bool = False  # whether it is given maps of several levels, and returns such
    in_windows: bool = False  # whether it is, or is in, what is given and returns several entries an image
    is_unread: bool = False  # whether it is a layer that works on many positions, which are no map

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(c, h, w) of a map."""
        return None if self.layout is None or self.tensor is None else self.layout.shape(self.tensor.shape)

    def walk(self) -> Iterator[_Call]:
        """This call and all inside it, in the order in which they ended."""
        for child in self.children:
            yield from child.walk()
        yield self

    def weighted(self) -> list[_Call]:
        """The layers with a weight matrix or kernel that work on maps, as such or cut into windows.

        A layer is the innermost call that has such a weight, of its own or in a module that is not called:
        its parametrisation, a convolution whose weight alone is used. A layer with an adapter is one.
        """
        inner = [layer for child in self.children for layer in child.weighted()]
        if inner or self.works_at is None:
            return [self] if self._is_adapted(inner) else inner
        explained = {id(weight) for call in self.walk() if call is not self for weight in _weights(call)}
        return [] if all(id(weight) in explained for weight in _weights(self)) else [self]

    def _is_adapted(self, layers: list[_Call]) -> bool:
        """Whether this is one of `layers` with a detour of fewer weights beside it, and nothing else."""
        half = sum(weight.numel() for weight in _weights(self)) / 2
        leaves = [call for call in self.walk() if not call.children]
        return all(leaf in layers or leaf.tensor is leaf.input for leaf in leaves) and any(
            layer.input is self.input
            and layer.shape == self.shape
            and sum(weight.numel() for weight in _weights(layer)) > half
            for layer in layers
        )

    @property
    def is_block(self) -> bool:
        return len(self.weighted()) >= 2

    @property
    def adds_work(self) -> bool:
        """Whether the output is more than that of the last module inside, as a residual sum is."""
        return not isinstance(self.module, nn.Sequential) and not any(map(self.same_output, self.children))

    @property
    def intact(self) -> bool:
        """Whether nobody has written into the output since."""
        return self.tensor is not None and taps.version(self.tensor) == self.version

    def same_map(self, other: _Call) -> bool:
        """Whether the energies are equal: the output is the other's, perhaps in another shape."""
        mine, others = self._energy(), other._energy()
        if mine is None or others is None or mine.shape != others.shape:
            return False
        return torch.allclose(mine, others, rtol=1e-3, atol=0)

    def _energy(self) -> Float[Tensor, "b h w"] | None:
        if self.layout is None or self.tensor is None or not self.intact:
            return None
        return attention_map(self.layout.view(self.tensor), norm=None)

    @property
    def normalises(self) -> bool:
        """Whether this is a norm over the channels: it gives the same, however large a position is.

        After it, the energy is (nearly) the same everywhere.
        """
        given, layout = self.input, self.layout
        if given is None or layout is None or self.tensor is None or self.children:
            return False
        if any(True for _ in _weights(self)) or given.shape != self.tensor.shape:
            return False
        if taps.version(given) != self.input_version:
            return False
        scaled = given.clone()
        h, w = layout.hw
        factors = 1 + torch.arange(h * w, device=given.device).view(h, w) % 2
        layout._replace(order=None).view(scaled).mul_(factors)
        with untouched(self.module, training=False), torch.no_grad():
            again = taps.first_tensor(self.module(scaled))
        return again is not None and (again - self.tensor).norm().item() < 0.01 * self.tensor.norm().item()

    def takes(self, other: _Call) -> bool:
        """Whether this is given the output of the other, alone or among others."""
        return any(tensor is other.tensor for tensor in self.given)

    def same_output(self, other: _Call) -> bool:
        return self.tensor is not None and self.tensor is other.tensor and self.version == other.version


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Those among the arguments of a call, in a list or tuple of them too, as a sum of branches takes."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _weights(call: _Call) -> Iterator[nn.Parameter]:
    return (parameter for parameter in call.module.parameters() if parameter.dim() >= 2)


@dataclass(frozen=True)
class _Trace:
    root: _Call
    calls: Counter[str]
    classes: int | None  # of a model that gives a dict with logits for each pixel
    has_layer_norm: bool

    def is_head(self, call: _Call) -> bool:
        """Rule 6 of `stage_ends`."""
        if call.shape is None or call.shape[0] != self.classes:
            return False
        inside = set(call.walk())  # an in-place layer there was given the output too
        return not any(other.takes(call) for other in self.root.walk() if other not in inside)

    def before_norm(self, end: _Call) -> _Call:
        """Rule 7 of `stage_ends`: what the norm over channels at the end was given, or the end itself."""
        leaves = (call for call in reversed(list(end.walk())) if not call.children)
        same = itertools.takewhile(lambda leaf: leaf.same_map(end), leaves)
        norm = next((leaf for leaf in same if leaf.normalises), None)
        if norm is None:
            return end
        for call in self.root.walk():
            if call.tensor is norm.input and call.intact and call.level == end.level:
                return call
        name = f"{norm.name}.input"
        self.calls[name] = self.calls[norm.name]
        return replace(norm, name=name, tensor=norm.input, version=norm.input_version, children=[])

    def stages(self, ends: Sequence[_Call]) -> list[Stage]:
        """Under the names with which `Taps` can read them all."""
        sure = {end.layout.kind for end in ends if end.layout is not None and not _is_cube(end)}
        named = []
        for end in ends:
            assert end.shape is not None
            name = end.name if self.calls[end.name] == 1 else f"{end.name}#{end.number}"
            kinds = _kinds(end) if self.has_layer_norm and _is_cube(end) else set()
            axes = "".join(f"@{kind}" for kind in kinds) if len(kinds) == 1 and kinds != sure else ""
            named.append(Stage(name + axes, end.shape, end.stride))
        return named


def _is_cube(call: _Call) -> bool:
    """Whether c = h = w, which leaves its axes in doubt."""
    return call.tensor is not None and call.tensor.dim() == 4 and len(set(call.tensor.shape[1:])) == 1


def _kinds(cube: _Call) -> set[str]:
    """How the layers in it that return a cube too hold theirs."""
    weights = [next(_weights(layer)) for layer in cube.weighted() if _is_cube(layer)]
    return {"nhwc" if weight.dim() == 2 else "nchw" for weight in weights}


def _trace(model: nn.Module, images: Tensor, *, user: str, role: str) -> _Trace:
    """Run the model once, without a trace of the run in it."""
    model = taps.unwrap(model)
    scripted = [
        name for name, module in taps.named_modules(model) if isinstance(module, torch.jit.ScriptModule)
    ]
    if scripted:
        raise InputError(
            f"{user}: expected a {role} of Python modules, got TorchScript at {scripted[0] or 'its root'}, "
            "which shows nobody its layers' outputs. Pass the model as it was before torch.jit."
        )
    images = _two_images(images, model)
    recorder = _Recorder(tuple(images.shape), taps.has_layer_norm(model))
    with untouched(model, training=False), torch.no_grad(), contextlib.ExitStack() as stack:
        computing = _parts_of_weights(model)
        for name, module in taps.named_modules(model):
            if module in computing:
                continue
            before = module.register_forward_pre_hook(recorder.enter(name), with_kwargs=True)
            after = module.register_forward_hook(recorder.leave)
            stack.callback(before.remove)
            stack.callback(after.remove)
        try:
            model(images)
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
            if images.dim() == 4 and (said := wrong_channels(model, images.shape[1:], user=user, role=role)):
                raise InputError(said) from error
            raise InputError(
                f"{user}: expected a {role} that runs on images of shape {tuple(images.shape)}, got "
                f"{type(error).__name__}: {first_line(error)}. "
                "Pass example_input= (teacher_input=) of the size and channels it was built for."
            ) from error
    assert recorder.root is not None
    if not any(True for call in recorder.root.children for _ in call.module.parameters()):
        raise InputError(
            f"{user}: expected a {role} that calls its layers as modules, got {type(model).__name__}, which "
            "calls none with weights, as an exported program does. Pass the model as it was before that."
        )
    recorder.look_again(recorder.root)
    return _Trace(recorder.root, recorder.calls, recorder.classes, taps.has_layer_norm(model))


def _parts_of_weights(model: nn.Module) -> set[nn.Module]:
    """Modules that are called to give a weight, which is no map."""
    lists = (module for module in model.modules() if isinstance(module, ParametrizationList))
    return {part for parametrizations in lists for part in parametrizations.modules()}


class _Recorder:
    """Hooks that build the tree of calls."""

    def __init__(self, input_shape: tuple[int, ...], has_layer_norm: bool) -> None:
        self.root: _Call | None = None
        self.calls: Counter[str] = Counter()
        self.classes: int | None = None
        self._open: list[_Call] = []
        self._batch = input_shape[0]
        self._hw = (input_shape[2], input_shape[3])
        self._has_layer_norm = has_layer_norm

    def enter(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            parent = self._open[-1] if self._open else None
            values = (*args, *kwargs.values())
            first = taps.first_tensor(values, self._batch)
            version = 0 if first is None else taps.version(first)
            level = self._measure(first, module)[2]
            call = _Call(name, self.calls[name], module, parent, _tensors(values), first, version, level)
            self.calls[name] += 1
            if parent is None:
                self.root = call
            else:
                parent.children.append(call)
            self._open.append(call)

        return hook

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        call = self._open.pop()
        call.tensor = taps.first_tensor(output, self._batch)
        call.version = 0 if call.tensor is None else taps.version(call.tensor)
        call.layout, call.stride, call.level = self._measure(call.tensor, module)
        call.spans = all(
            self._are_of_several_levels(maps, module) for maps in (call.given, _tensors([output]))
        )
        if call is self.root and isinstance(output, Mapping):
            logits = find_logits(output, dense=True)
            self.classes = None if logits is None or logits.dim() == 2 else logits.shape[1]

    def look_again(
        self, call: _Call, finest: float = -math.inf, around: int | None = None, inside: bool = False
    ) -> None:
        """Take back what is no map after all, and find the level of the work that is done in another shape.

        A map inside a module is no finer than both what that is given and what it returns: what looks so is
        windows of tokens, or states. What is put together of windows inside a module that is given and
        returns windows is in their order. `around` is the level of the map that the call works for.
        """
        call.in_windows = self._is_in_windows(call)
        if inside and call.level is not None and (call.in_windows or call.level < finest):
            call.layout, call.stride, call.level = None, math.nan, None
        call.works_at = call.level
        if call.level is None and (level := self._level_of_work(call)) is not None:
            call.works_at = around if level == around else None
            call.is_unread = call.works_at is None and not call.children
        if call.level is not None:
            around = call.level
            if call.input_level is not None:
                finest = max(finest, min(call.level, call.input_level))
        for child in call.children:
            self.look_again(child, finest, around, inside=True)

    def _is_in_windows(self, call: _Call) -> bool:
        """Whether a call, or one around it, is given and returns several entries for each image."""
        if call.parent is not None and call.parent.in_windows:
            return True
        tensors = [tensor for tensor in (call.input, call.tensor) if tensor is not None and tensor.dim() >= 3]
        windows = [len(tensor) > self._batch and len(tensor) % self._batch == 0 for tensor in tensors]
        return len(windows) == 2 and all(windows)

    def _level_of_work(self, call: _Call) -> int | None:
        """By the number of positions of a layer's output, of whatever shape: (b * windows, tokens, c)."""
        weight = next(_weights(call), None)
        if weight is None or call.tensor is None or call.tensor.dim() < 3:
            return None
        channels = call.tensor.shape[-1 if weight.dim() == 2 else 1]
        positions = call.tensor.numel() / channels / self._batch
        return _level(math.sqrt(math.prod(self._hw) / positions)) if positions > 1 else None

    def _measure(
        self, tensor: Tensor | None, module: nn.Module
    ) -> tuple[taps.Layout | None, float, int | None]:
        """Layout, stride and level of a map; a batch of windows or heads, or tokens by tokens, is none."""
        if tensor is None or tensor.dim() not in (3, 4) or len(tensor) != self._batch:
            return None, math.nan, None
        shape = tuple(tensor.shape)
        path = [*(call.module for call in self._open), module]
        layouts = taps.possible_layouts(shape, self._hw, has_layer_norm=self._has_layer_norm, path=path)
        if (
            tensor.dim() == 4
            and len(layouts) > 1
            and not any(taps.fits(layout.hw, self._hw) for layout in layouts)
        ):
            return None, math.nan, None
        if not layouts or math.prod(layouts[0].hw) <= 1 or not self._tokens().isdisjoint(layouts[0].hw):
            return None, math.nan, None
        stride = math.sqrt(math.prod(self._hw) / math.prod(layouts[0].hw))
        return layouts[0], stride, _level(stride)

    def _are_of_several_levels(self, tensors: Sequence[Tensor], module: nn.Module) -> bool:
        return len({self._measure(each, module)[2] for each in tensors} - {None}) > 1

    def _tokens(self) -> set[int]:
        """How many tokens the open calls were given: a side of the attention matrices in them."""
        given = [call.input for call in self._open if call.input is not None]
        return {tensor.shape[1] for tensor in given if tensor.dim() == 3}


def _two_images(images: Tensor, model: nn.Module) -> Tensor:
    """Two images, which tell a batch from one split into windows, on the device of the model's weights."""
    images = images[:2] if len(images) > 1 else torch.cat([images, images])
    weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    return images.to(weights[0].device, weights[0].dtype) if weights else images


# --------------------------------------------------------------------------------------------- choice


def _ends(trace: _Trace) -> list[_Call]:
    """The stage ends in order of execution, by the rules of `stage_ends`."""
    units = [unit for unit in _units(trace.root) if not trace.is_head(unit)]
    by_level = defaultdict(list)
    for unit in units:
        if unit.level is not None:
            by_level[unit.level].append(unit)
    ends = {}
    for level, here in by_level.items():
        safe = (_safe(call, trace.root) for call in _candidates(level, here, units))
        end = next((call for call in safe if call is not None), None)
        if end is not None:
            ends[level] = end
    order = {call: place for place, call in enumerate(trace.root.walk())}
    levels = sorted(ends, key=lambda level: order[ends[level]])
    while any(ends[level].is_block for level in levels[1:]) and _is_stem(
        levels[0], by_level[levels[0]], units, first=len(levels) == len(ends)
    ):
        del levels[0]
    return [ends[level] for level in levels]


def _units(call: _Call) -> list[_Call]:
    """The coarsest calls inside `call` that belong to one stage each."""
    if call.parent is not None and (not call.children or _within_one_stage(call)):
        return [call]
    inner = [unit for child in call.children for unit in _units(child)]
    return [*inner, call] if call.parent is not None and call.adds_work else inner


def _within_one_stage(call: _Call) -> bool:
    layers = Counter(layer.works_at for layer in call.weighted())
    levels = layers.keys()
    # a stage that ends by entering the next one is no block of that one, if it adds nothing itself
    leaves = not call.adds_work and layers[call.input_level] > layers[call.level]
    if isinstance(call.module, nn.Sequential) or leaves:
        return levels <= {call.level}
    if call.level is None:
        return False
    if not levels or call.level in levels <= {call.level, call.input_level}:
        return True
    # one of several blocks, with some of its work on a pooled map, such as the keys of an attention
    pools = call.level == call.input_level == min(level for level in levels if level is not None)
    alike = (
        sum(type(other.module) is type(call.module) for other in call.parent.children) if call.parent else 1
    )
    return pools and alike > 1 and layers[call.level] > sum(layers.values()) / 2


def _candidates(level: int, here: list[_Call], units: list[_Call]) -> list[_Call]:
    """Possible ends of the stage, the best first."""
    working = [unit for unit in here if any(layer.works_at == level for layer in unit.weighted())]
    blocks = [unit for unit in working if unit.is_block]
    if blocks or not working:
        later = {block for block in blocks if _is_way_down(block, level, blocks) or _is_addend(block)}
        return [*(block for block in blocks[::-1] if block not in later), *later]
    tail = [working[-1]]  # a single layer, then its norm and activation
    for unit in units[units.index(tail[0]) + 1 :]:
        if unit.level != level:
            break
        if not unit.takes(tail[-1]):  # it stands beside, such as a pool in another branch
            continue
        if not unit.same_output(tail[-1]):  # dropout is the identity here, but not in training
            tail.append(unit)
    return [*tail[::-1], *working[-2::-1]]


def _is_way_down(block: _Call, level: int, blocks: list[_Call]) -> bool:
    """Whether a block only leads on to the next stage: a part of one that does its work further down.

    Then another block has more layers at `level` than all of that stage.
    """
    stage = block.parent
    while stage is not None:
        if (
            stage.level is not None
            and stage.input_level is not None
            and stage.input_level <= level < stage.level
        ):
            inside = set(stage.walk())
            here = _layers_at(level, stage)
            return any(other not in inside and _layers_at(level, other) > here for other in blocks)
        stage = stage.parent
    return False


def _is_addend(block: _Call) -> bool:
    """Whether a module of several levels only adds the output to one of its maps, and works no more on it."""
    module, inside = block.parent, set(block.walk())
    while module is not None and not module.spans:
        module = module.parent
    return module is not None and not any(
        other.takes(block) and other.weighted() for other in module.walk() if other not in inside
    )


def _layers_at(level: int, call: _Call) -> int:
    return sum(layer.works_at == level for layer in call.weighted())


def _safe(call: _Call, root: _Call) -> _Call | None:
    """The call itself, or the one that later wrote into its output and left it so; None if there is none."""
    if call.intact:
        return call
    return next((other for other in root.walk() if other.tensor is call.tensor and other.intact), None)


def _is_stem(level: int, here: list[_Call], units: list[_Call], *, first: bool) -> bool:
    """A stage below full resolution of one weight layer; or the first, if it goes straight into pooling."""
    if level < 1:
        return False
    layers = [layer for unit in here for layer in unit.weighted() if layer.works_at == level]
    if not first:
        return len(layers) == 1
    last = max(units.index(unit) for unit in here if _layers_at(level, unit))
    behind = (unit for unit in units[last + 1 :] if unit.level not in (None, level) or unit.weighted())
    after = next(behind, None)
    pooled = after is not None and (not after.weighted() or after.input_level != level)
    return len(layers) == 1 or pooled


def _repeated_blocks(trace: _Trace) -> list[_Call]:
    """The blocks of one class called by one module that do the most of the work; empty for a single block."""
    runs = defaultdict(list)
    for call in trace.root.walk():
        if call.level is not None and call.intact and call.is_block:
            runs[call.parent, type(call.module)].append(call)
    several = [run for run in runs.values() if len(run) >= 2]
    return max(several, key=lambda run: (sum(len(call.weighted()) for call in run), len(run)), default=[])


def _outermost(ends: list[_Call], root: _Call) -> list[_Call]:
    """Each end under its outermost name that does not span another end."""

    def ancestors(call: _Call) -> list[_Call]:
        return [call.parent, *ancestors(call.parent)] if call.parent is not None else []

    spanning = Counter(ancestor for end in ends for ancestor in ancestors(end))
    named = []
    for end in ends:
        outer = [up for up in ancestors(end) if up is not root and spanning[up] == 1 and up.same_output(end)]
        named.append(outer[-1] if outer else end)
    return named
