"""Reading the outputs of named modules during a forward pass.

Forward hooks are the right tool, with three traps that this module closes:

* A compiled model does not look at hooks again: dynamo skips guards on them by default
  (`torch._dynamo.config.skip_nnmodule_hook_guards`), so hooks added after the first compiled call never
  fire. It does guard on the class of a module, so a module with open taps is of a *subclass* of its class.
  Opening and closing taps then selects another compiled graph.
* Checkpointing runs a forward again inside the backward pass. Autograd numbers its running backward passes,
  and the number is -1 outside of any, so a firing under another number is a recomputation and is ignored.
* An in-place operation after the tap rewrites what was tapped. A tensor counts its in-place writes
  (`Tensor._version`); the count is read when the tap fires and again when the model returns. Both readings
  are traced into a compiled graph, where alone the count is still true.
* A copy (`copy.deepcopy`, an average of the weights, `torch.save` of a model) would take hooks along that
  belong to the original. The subclass hands out copies of the module as it is without taps.

What is tapped may be read on the spot (`read=`), which frees it at once, and lets a module's output be
replaced by one that has passed through an autograd function.
"""

from __future__ import annotations

import copy
import difflib
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ._errors import InputError, InputTypeError
from .tokens import Tokens, rolled, tokens_around

LAYOUTS = ("auto", "nchw", "nhwc", "tokens", "tokens+PREFIX+SUFFIX", "HxW", "HxW+PREFIX+SUFFIX")
TOKEN_LAYOUT = re.compile(r"(?:tokens|(\d+)x(\d+))(?:\+(\d+))?(?:\+(\d+))?")
MAX_PREFIX = 9  # class and register tokens: Sapiens 2 has the most in common use


# ---------------------------------------------------------------------------------------------- names


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside wrappers of DDP, DataParallel, FSDP, EMA and `torch.compile`."""
    inner = _wrapped(model)
    return model if inner is None else unwrap(inner)


def resolve(model: nn.Module, name: str) -> nn.Module:
    """The module of a dotted name, whatever wrappers stand at the root or in the middle of the path.

    Raises:
        ValueError: if there is no such module; the message lists near matches.
    """
    return path_to(model, name)[-1]


def path_to(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules from the root to the one of a dotted name; as `resolve`."""
    module = unwrap(model)
    path = [module]
    for part in name.split(".") if name else ():
        if part in ("module", "_orig_mod") and part not in module._modules:
            continue  # a name as the wrapped model's own `named_modules()` spells it
        child = module._modules.get(part)
        if child is None:
            raise InputError(_unknown_name(model, name))
        module = unwrap(child)
        path.append(module)
    return path


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Like `nn.Module.named_modules`, without the wrappers and their prefixes; a shared module comes once."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        module = unwrap(module)
        if module in seen:
            return
        seen.add(module)
        yield name, module
        for part, child in module.named_children():
            yield from walk(child, f"{name}.{part}" if name else part)

    return walk(model, "")


def _wrapped(model: nn.Module) -> nn.Module | None:
    for attribute in ("_orig_mod", "_fsdp_wrapped_module"):  # torch.compile, FSDP
        if attribute in model._modules:
            return model._modules[attribute]
    wrappers = (
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
        torch.optim.swa_utils.AveragedModel,
    )
    return model.module if isinstance(model, wrappers) else None


def _unknown_name(model: nn.Module, name: str) -> str:
    known = [known for known, _ in named_modules(model) if known]
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5) or known[:4]
    return (
        f"resolve: expected the name of a module of {type(unwrap(model)).__name__}, got {name!r}. "
        f"Near: {', '.join(near) or 'none, the model has no submodules'}. `model.named_modules()` lists all."
    )


# -------------------------------------------------------------------------------------------- layouts


class Layout(NamedTuple):
    """How a tensor holds a map: `kind` is nchw, nhwc or tokens; the last with a grid and tokens beside it."""

    kind: str
    hw: tuple[int, int]
    prefix: int = 0  # tokens in front of the grid
    suffix: int = 0  # and behind it
    order: Tensor | None = None  # the number of each token in row-major order; None if they are in it

    def view(self, tensor: Tensor) -> Float[Tensor, "b c h w"]:
        """The map as a view of `tensor`, or as a copy where the tokens are in another order."""
        if self.kind == "nchw":
            return tensor
        if self.kind == "tokens":
            if self.order is not None:
                ordered = tensor.index_select(1, self.order.to(tensor.device))
                ordered.source = tensor  # type: ignore[attr-defined]
                tensor = ordered
            tensor = tensor[:, self.prefix : self.prefix + math.prod(self.hw)].unflatten(1, self.hw)
        return tensor.permute(0, 3, 1, 2)

    def restore(self, view: Float[Tensor, "b c h w"]) -> Tensor | None:
        """The tensor of which `view` is the view; None where the view left something out, or is none."""
        if self.kind == "nchw":
            return view
        if self.prefix or self.suffix or self.order is not None:
            return None
        channels_last = view.permute(0, 2, 3, 1)
        return channels_last if self.kind == "nhwc" else channels_last.flatten(1, 2)

    def shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(c, h, w) of the map in a tensor of this `shape`."""
        return (shape[1] if self.kind == "nchw" else shape[-1], *self.hw)

    @property
    def like(self) -> tuple[str, int, int]:
        """What the layouts of a model's maps have in common: all but the grid and the order."""
        return self.kind, self.prefix, self.suffix

    def __str__(self) -> str:
        if self.kind != "tokens":
            return self.kind
        return f"{self.hw[0]}x{self.hw[1]}+{self.prefix}" + (f"+{self.suffix}" if self.suffix else "")


def source(features: Float[Tensor, "b c h w"]) -> Tensor:
    """The tensor that the network goes on with, of which a tap gave this view or copy."""
    base = features if features._base is None else features._base
    return getattr(base, "source", base)


def possible_layouts(
    shape: Sequence[int],
    input_hw: tuple[int, int] | None,
    *,
    layout: str = "auto",
    has_layer_norm: bool = False,
    path: Sequence[nn.Module] = (),
) -> list[Layout]:
    """Every way to read a tensor of this shape as a map; `Taps` documents the rule.

    Args:
        path: the modules from the root to the one that gave the tensor, which may say how they keep tokens.

    Returns:
        No entry where it cannot be a map, several where the shape leaves a doubt; the likelier come first.
    """
    asked = TOKEN_LAYOUT.fullmatch("tokens" if layout == "auto" else layout)
    if len(shape) == 3 and asked is not None:
        h, w, prefix, suffix = (None if part is None else int(part) for part in asked.groups())
        if h is not None and w is not None:
            return _with_grid(shape[1], (h, w), prefix, suffix)
        found = [] if input_hw is None else _token_layouts(shape[1], input_hw, path, suffix)
        return [each for each in found if prefix in (None, each.prefix) and suffix in (None, each.suffix)]
    if len(shape) != 4 or TOKEN_LAYOUT.fullmatch(layout):
        return []
    nchw, nhwc = Layout("nchw", (shape[2], shape[3])), Layout("nhwc", (shape[1], shape[2]))
    if layout != "auto":
        return [nchw if layout == "nchw" else nhwc]
    misfits = {choice: _misfit(choice.hw, input_hw) for choice in (nchw, nhwc)}
    best = min(misfits.values())
    fits_one = any(fits(choice.hw, input_hw) for choice in misfits)
    fitting = [choice for choice, misfit in misfits.items() if misfit == best] if fits_one else [nchw, nhwc]
    return fitting if has_layer_norm else fitting[:1]


def fits(hw: tuple[int, int], input_hw: tuple[int, int] | None) -> bool:
    """Whether a map has the aspect ratio of the input, to within one pixel."""
    return _misfit(hw, input_hw) <= 1


def _misfit(hw: tuple[int, int], input_hw: tuple[int, int] | None) -> float:
    """By how many pixels a map is off the aspect ratio of the input."""
    if input_hw is None:
        return float("inf")
    (h, w), (height, width) = hw, input_hw
    return abs(h * width - w * height) / max(height, width)


def _with_grid(n: int, hw: tuple[int, int], prefix: int | None, suffix: int | None) -> list[Layout]:
    """The layout of `n` tokens with a known grid; the rest is in front of it, if neither is given."""
    around = n - math.prod(hw)
    if prefix is None:
        prefix = around - (suffix or 0)
    suffix = around - prefix if suffix is None else suffix
    fits = prefix >= 0 and suffix >= 0 and prefix + suffix == around
    return [Layout("tokens", hw, prefix, suffix)] if fits else []


def _token_layouts(
    n: int, input_hw: tuple[int, int], path: Sequence[nn.Module], suffix: int | None
) -> list[Layout]:
    if reordered := rolled(path, n):
        hw, order = reordered
        return [Layout("tokens", hw, order=order)]
    said = tokens_around(path)
    if said is None:
        return _guessed_layouts(n, input_hw, suffix or 0)
    prefixes = range(MAX_PREFIX + 1) if said.prefix is None else (0, said.prefix)
    suffixes = {said.suffix, 0} if suffix is None else {suffix}
    found = [Layout("tokens", hw, n - math.prod(hw) - k, k) for hw in said.grids(input_hw) for k in suffixes]
    return [layout for layout in found if layout.prefix in prefixes]


def _guessed_layouts(n: int, input_hw: tuple[int, int], suffix: int) -> list[Layout]:
    height, width = input_hw
    patches = range(1, min(height, width) // 2 + 1)
    exact = [p for p in patches if height % p == 0 and width % p == 0]
    for sizes, most in ((exact, MAX_PREFIX), (patches, 1)):  # some embeddings cut off the rest of the image
        grids = dict.fromkeys((height // p, width // p) for p in sizes)
        layouts = [Layout("tokens", (h, w), n - h * w - suffix, suffix) for h, w in grids]
        if found := [layout for layout in layouts if 0 <= layout.prefix <= most]:
            return found
    return []


def has_layer_norm(model: nn.Module) -> bool:
    """Whether the model has a LayerNorm, as all common models with NHWC maps have."""
    return any(isinstance(module, nn.LayerNorm) for module in model.modules())


def first_tensor(output: Any, batch: int | None = None) -> Tensor | None:
    """The tensor a tap takes from a module's output for `batch` images; `Taps` documents the rule."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        if isinstance(output.get("last_hidden_state"), Tensor):
            return output["last_hidden_state"]
        tensors = [value for value in output.values() if isinstance(value, Tensor)]
        maps = [tensor for tensor in tensors if tensor.dim() in (3, 4)]
        return next(iter(maps or tensors), None)
    if isinstance(output, tuple | list):
        of_images = (
            item for item in output if isinstance(item, Tensor) and item.dim() and len(item) == batch
        )
        if (found := next(of_images, None)) is not None:
            return found
        return next((tensor for item in output if (tensor := first_tensor(item, batch)) is not None), None)
    return None


def input_images(args: tuple, kwargs: dict) -> Float[Tensor, "b c h w"] | None:
    """The first image batch among a model's arguments."""
    given = (*args, *kwargs.values())
    return next((value for value in given if isinstance(value, Tensor) and value.dim() == 4), None)


def version(tensor: Tensor) -> int:
    """How often the tensor was written in place; 0 for inference tensors, which do not count."""
    if not torch.compiler.is_compiling() and tensor.is_inference():  # dynamo cannot trace the question
        return 0
    return tensor._version


# ----------------------------------------------------------------------------------------------- taps


class _Tapped:
    """Comes before a module's own class while taps are open on it; one such class a module.

    Compiled code is guarded by it. A copy is of the module's own class, and without taps.
    """

    bare: type[nn.Module]  # the module's own class
    hooks: list[RemovableHandle]  # of the taps that are open on it
    watching: list[Taps]  # those of which it is the root
    replaced: dict[str, Callable]  # the `forward` of the instance, if it has one, while that is watched
    code: CodeType  # of the watched forward: the limit on recompilations counts by code object

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing of what the module's own class does with its subclasses, such as to register them."""

    def __copy__(self) -> Any:
        with _bare(self):
            return copy.copy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with _bare(self):
            return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        with _bare(self):
            reduced = self.__reduce_ex__(protocol)
        if getattr(reduced[0], "__name__", "") == "__newobj__":  # pickle allows it no other class
            return reduced[1][0].__new__, *reduced[1:]
        return reduced


_TAPPED: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def _enter(module: nn.Module) -> type[_Tapped]:
    """Give the module its class with taps: the same one each time, which compiled code knows again."""
    bare: Any = type(module)
    tapped = _TAPPED.get(module)
    if tapped is None or bare not in (tapped, tapped.bare):
        own = {name: getattr(bare, name) for name in ("__module__", "__qualname__", "__doc__")}
        own |= {"bare": bare, "hooks": [], "watching": [], "replaced": {}}
        # past the metaclass, which may do more than to make a class
        tapped = _TAPPED[module] = type.__new__(type(bare), bare.__name__, (_Tapped, bare), own)
        tapped.code = _watched(bare, []).__code__.replace()
    object.__setattr__(module, "__class__", tapped)
    return tapped


def _leave(module: nn.Module, tapped: type[_Tapped]) -> None:
    """Give the module its own class back, if these were the last taps."""
    if not (tapped.hooks or tapped.watching) and type(module) is tapped:
        object.__setattr__(module, "__class__", tapped.bare)


@contextmanager
def _bare(module: Any) -> Iterator[None]:
    """The module is as it is without taps, while it is copied; what is taken of it then stays so."""
    tapped, attributes = type(module), vars(module)
    bare, hooks = dict(attributes), OrderedDict(attributes["_forward_hooks"])
    for handle in tapped.hooks:
        hooks.pop(handle.id, None)
    if tapped.watching:
        del bare["forward"]
    object.__setattr__(module, "__dict__", {**bare, "_forward_hooks": hooks, **tapped.replaced})
    object.__setattr__(module, "__class__", tapped.bare)
    try:
        yield
    finally:
        object.__setattr__(module, "__dict__", attributes)
        object.__setattr__(module, "__class__", tapped)


def _watched(forward: Callable, watching: list[Taps]) -> Callable:
    """A root's forward with a look before and after; hooks of the root itself are not compiled in."""

    def watched(*args: Any, **kwargs: Any) -> Any:
        if _recomputing():
            return forward(*args, **kwargs)
        for taps in watching:
            taps._begin(args, kwargs)
        output = forward(*args, **kwargs)
        for taps in watching:
            taps._end()
        return output

    return watched


Read = Callable[[Float[Tensor, "b c h w"]], tuple[Float[Tensor, "b c h w"], Any]]


class _Firing(NamedTuple):
    """One call of a tapped module."""

    key: str
    output: Tensor | None  # None when there is no tensor in it, or it was read and is not needed any more
    kind: str  # the type's name, for the message when there is no tensor in it
    version: int
    found: Any = None  # what was read of it on the spot
    layout: Layout | None = None  # in which it was


@dataclass(frozen=True)
class _Tap:
    """A name as the user gave it, taken apart: the module's dotted path and the number of the call."""

    name: str
    path: str
    call: int | None
    layout: str


class Taps:
    """Outputs of named modules, as maps (b, c, h, w) that are still part of the autograd graph.

    >>> with Taps(model, ["layer1", "layer2"]) as taps:
    ...     logits = model(images)
    ...     features = taps.pop()   # {"layer1": (b, c, h, w), "layer2": ...}

    Names are dotted, as in `model.named_modules()`; prefixes of DDP and `torch.compile` may be given or left
    out. `"relu#2"` is the third call of `relu` in one forward pass, needed where a module is called several
    times. `"norm2.input"` is what `norm2` is given, for a tensor that no module returns, such as the sum
    before a norm. `"blocks.3@tokens+1"` says how to read the layer, as `layout` does. Only the latest forward
    pass is remembered, so nothing piles up when nobody pops.

    **What is taken** from a module that does not return a tensor: from a tuple or list its first tensor with
    as many entries as there are images (else its first); from a dict (and a Hugging Face ModelOutput)
    `last_hidden_state`, else the first 3-D or 4-D tensor.

    **How the layout is told** (`layout="auto"`), given (H, W), the size of the first 4-D input of the model:
    1. Four axes: `nchw` if the last two axes have the aspect ratio of (H, W) to within one pixel, `nhwc` if
       the middle two have; the better fit wins. If both fit alike (c = h = w), or neither does: `nchw` for a
       model without LayerNorm; else as the other tapped maps of four axes that leave no doubt, if they agree
       (they are then read when they are popped); else an error that asks for `layout=`.
    2. Three axes: tokens (b, n, c), row by row, with some that are dropped in front (class, registers).
       A model of timm or Hugging Face says what grids it has, and timm's how many tokens are in front; any
       other number of tokens is refused, such as what dropping patches leaves. A Hiera's tokens are brought
       into the order of rows, as a copy. Of a model that says nothing: n = h * w + prefix with h = H / patch,
       w = W / patch for one whole patch size, and a prefix of 0 to 9. If no patch size that divides the image
       fits, one that cuts it off may, with a prefix of 0 or 1. Two possible grids: the one with the prefix of
       the tapped maps of tokens that leave no doubt, if they agree; else an error that asks for `layout=`.
       Whether the tokens of such a model are in this order cannot be seen by their number:
       `Distiller.preflight` finds out.

    **torch.compile**: taps may be open during the first call or be opened later, may stay open or be opened
    around each step; the model is compiled once with and once without its taps. Values, gradients and the
    in-place check hold in compiled code. Double backward through compiled code is not possible in PyTorch.

    **Checkpointing**: recomputations during backward are ignored. Inside a reentrant checkpoint the outputs
    have `requires_grad == False`, and no gradient can flow through them: use `use_reentrant=False`.

    **Reading on the spot**: `read(features) -> (features, found)` is called with each map as soon as its
    module has run, and `pop` gives what it found in place of the map, which is then not kept. What it returns
    as features takes their place in the model: the same tensor, or one passed through an autograd function.
    In compiled code and under checkpointing, maps are read when they are popped, and nothing is replaced; nor
    is it where the map is a part of the output (a tuple, tokens with a prefix) or a copy of it.

    Args:
        model: any module. A DataParallel over several devices is refused: it runs copies of the model.
        names: dotted names, each optionally with `#k`, then `@layout`.
        layout: "auto", "nchw", "nhwc", "tokens", or a dict of name to it. "tokens+1" has one token in front
            of the grid, "tokens+1+4" also four behind; "14x14" in place of "tokens" is the grid.
        read: what to read of each map, instead of keeping it.

    Raises:
        ValueError: unknown or repeated name, unknown layout; the message lists near matches.
        TypeError: `names` is one string.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        layout: str | Mapping[str, str] = "auto",
        read: Read | None = None,
    ) -> None:
        if isinstance(names, str):
            raise InputTypeError(
                f"Taps: expected a list of names, got the string {names!r}. Pass [{names!r}]."
            )
        if len(set(names)) != len(names):
            raise InputError(f"Taps: expected each name once, got {list(names)}. Remove the repeated one.")
        self._taps = [_parse(name, layout) for name in names]
        _check_layouts(self._taps, layout)
        _refuse_replicas(model)
        self._root = unwrap(model)
        self._inputs = {tap.path for tap in self._taps if _names_input(model, tap.path)}
        self._paths = {
            tap.path: path_to(
                model, tap.path.removesuffix(".input") if tap.path in self._inputs else tap.path
            )
            for tap in self._taps
        }
        self._found: dict[tuple, list[Layout]] = {}  # layouts, by what they depend on
        self._has_layer_norm = has_layer_norm(self._root)
        self._read = read
        self.layouts: dict[str, Layout] = {}
        """How the maps of the latest `pop` were read, by name; not those that were read on the spot."""
        self.told = {tap.name for tap in self._taps if tap.layout != "auto"}
        """The names of those whose layout was given."""
        self._open = False
        self._undo: list[Callable[[], None]] = []
        self._forget()

    def __enter__(self) -> Taps:
        """Add the hooks.

        Raises:
            RuntimeError: if these taps are open already.
        """
        if self._open:
            raise RuntimeError(
                "Taps: expected to be closed on entering, got taps that are open. Make a second Taps."
            )
        self._open = True
        for name, path in self._paths.items():
            self._listen(name, path[-1])
        self._watch()
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the hooks and drop the tensors, also after an exception."""
        while self._undo:
            self._undo.pop()()
        self._forget()
        self._open = False

    def pop(self) -> dict[str, Any]:
        """The maps (b, c, h, w) of the latest forward pass, by name in the order given, and forget them.

        With `read`, what was read of them.

        Raises:
            RuntimeError: outside of the `with` block.
            ValueError: a tap that did not fire, fired several times, holds no map, may be read in two ways,
                or was overwritten in place after it fired.
        """
        if not self._open:
            raise RuntimeError(
                "Taps.pop: expected to be called inside `with Taps(...) as taps:`, got closed taps. "
                "Call the model and pop() inside the block."
            )
        fired, ends, hw = self._fired, self._end_versions, self._input_hw
        self._forget()
        ends = ends if len(ends) == len(fired) else [0] * len(fired)
        final = {id(firing): end for firing, end in zip(fired, ends, strict=True)}
        chosen = [
            (tap, self._select(tap, [firing for firing in fired if firing.key == tap.path]))
            for tap in self._taps
        ]
        kinds = self._certain(chosen, hw)
        maps = {}
        for tap, firing in chosen:
            if firing.output is not None:
                _check_intact(tap.name, firing, final[id(firing)])
            maps[tap.name] = self._read_late(tap, firing, hw, kinds) if firing.found is None else firing.found
        return maps

    def _certain(self, chosen: list[tuple[_Tap, _Firing]], hw: tuple[int, int] | None) -> set[tuple]:
        """The kinds of those maps that can be read in one way only."""
        kinds = {firing.layout.like for _, firing in chosen if firing.layout is not None}
        for tap, firing in chosen:
            if firing.layout is None and firing.output is not None:
                layouts = self._layouts(tap, firing.output, hw)
                kinds |= {layouts[0].like} if len(layouts) == 1 else set()
        return kinds

    def _read_late(self, tap: _Tap, firing: _Firing, hw: tuple[int, int] | None, kinds: set[tuple]) -> Any:
        """The map of a firing, or what is read of it."""
        if firing.output is None:
            raise InputError(
                f"Taps.pop: expected {tap.name!r} to return a tensor, or a tuple or dict with one, got "
                f"{firing.kind}. Tap another module."
            )
        layout = self._layout(tap, firing.output, hw, kinds)
        self.layouts[tap.name] = layout
        view = layout.view(firing.output)
        return view if self._read is None else self._read(view)[1]

    def _listen(self, name: str, module: nn.Module) -> None:
        """Add the hook of a tapped module."""
        tapped, handle = _enter(module), module.register_forward_hook(self._record(name))
        tapped.hooks.append(handle)

        def undo() -> None:
            handle.remove()
            tapped.hooks.remove(handle)
            _leave(module, tapped)

        self._undo.append(undo)

    def _watch(self) -> None:
        """Look before and after each forward of the root."""
        root, tapped = self._root, _enter(self._root)
        attributes = vars(root)
        if not tapped.watching:
            tapped.replaced = {name: attributes[name] for name in ("forward",) if name in attributes}
            watched = _watched(root.forward, tapped.watching)
            watched.__code__ = tapped.code
            attributes["forward"] = watched
        tapped.watching.append(self)

        def undo() -> None:
            tapped.watching.remove(self)
            if not tapped.watching:
                attributes.pop("forward", None)
                attributes.update(tapped.replaced)
                tapped.replaced = {}
            _leave(root, tapped)

        self._undo.append(undo)

    # Hooks: also traced by torch.compile, so they are plain appends and assignments to fresh lists.

    def _forget(self) -> None:
        self._fired: list[_Firing] = []
        self._end_versions: list[int] = []
        self._input_hw: tuple[int, int] | None = None
        self._batch: int | None = None

    def _begin(self, args: tuple, kwargs: dict) -> None:
        self._forget()
        images = input_images(args, kwargs)
        if images is not None:
            self._batch, self._input_hw = images.shape[0], (images.shape[2], images.shape[3])

    def _end(self) -> None:
        self._end_versions = [0 if f.output is None else version(f.output) for f in self._fired]

    def _record(self, key: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            if _recomputing():
                return None
            tensor, kind = first_tensor(output, self._batch), type(output).__name__
            if key in self._inputs:
                given, output = first_tensor(args, self._batch), args
                # an in-place layer has written over it
                tensor, kind = (None, "its own output") if given is tensor else (given, "none")
            if tensor is not None and self._read is not None and not _deferred():
                return self._read_now(key, tensor, output)
            count = 0 if tensor is None else version(tensor)
            self._fired.append(_Firing(key, tensor, kind, count))
            return None

        return hook

    def _read_now(self, key: str, tensor: Tensor, output: Any) -> Any:
        """Read a map as its module has just run; what the module's output is replaced by, or None."""
        assert self._read is not None
        call = sum(firing.key == key for firing in self._fired)
        tap = next((tap for tap in self._taps if tap.path == key and tap.call in (None, call)), None)
        if tap is None:
            self._fired.append(_Firing(key, None, type(output).__name__, 0))
            return None
        if len(self._layouts(tap, tensor, self._input_hw)) > 1:  # `pop` knows the others
            self._fired.append(_Firing(key, tensor, type(output).__name__, version(tensor)))
            return None
        layout = self._layout(tap, tensor, self._input_hw)
        view = layout.view(tensor)
        passed, found = self._read(view)
        # with a gradient, the tensor is kept anyway, and must be intact in the backward pass
        kept = tensor if tensor.requires_grad else None
        self._fired.append(_Firing(key, kept, type(output).__name__, version(tensor), found, layout))
        return layout.restore(passed) if passed is not view and output is tensor else None

    # Reading

    def _select(self, tap: _Tap, calls: list[_Firing]) -> _Firing:
        if not calls:
            raise InputError(
                f"Taps.pop: expected {tap.name!r} to run once, got no call since the last pop(). Call "
                "the model inside the `with` block, once before each pop(); tap a module that is called "
                "(its branch may be off, or its weights used without calling it); a compiled model that was "
                "first called before the taps were open may need torch._dynamo.reset()."
            )
        if tap.call is None and len(calls) > 1:
            raise InputError(
                f"Taps.pop: expected {tap.name!r} to run once in a forward pass, got {len(calls)} calls. "
                f'Name one: "{tap.path}#0" to "{tap.path}#{len(calls) - 1}".'
            )
        index = tap.call or 0
        if index >= len(calls):
            raise InputError(
                f"Taps.pop: expected call {index} of {tap.path!r}, got {len(calls)} calls in the forward. "
                f'The last is "{tap.path}#{len(calls) - 1}".'
            )
        return calls[index]

    def _layouts(self, tap: _Tap, tensor: Tensor, hw: tuple[int, int] | None) -> list[Layout]:
        key = (tap, tuple(tensor.shape), hw)
        if key not in self._found:
            self._found[key] = possible_layouts(
                key[1],
                hw,
                layout=tap.layout,
                has_layer_norm=self._has_layer_norm,
                path=self._paths[tap.path],
            )
        return self._found[key]

    def _layout(
        self, tap: _Tap, tensor: Tensor, hw: tuple[int, int] | None, kinds: Collection[tuple] = ()
    ) -> Layout:
        """The one way to read a map, or of several the one that is of a kind in `kinds`."""
        shape = tuple(tensor.shape)
        found = self._layouts(tap, tensor, hw)
        if len(found) > 1:
            found = [layout for layout in found if layout.like in kinds] or found
        if len(found) == 1:
            return found[0]
        seen = f"got shape {shape} with {_describe_input(hw)}"
        if hw is None and len(shape) != 4:
            raise InputError(
                f"Taps.pop: expected a model of images (b, c, h, w), {seen}, at {tap.name!r}. Call the whole "
                "model, with the axis of the batch; take video frame by frame; other signals have no maps."
            )
        if not found and len(shape) == 3 and tap.layout == "auto" and hw is not None:
            _refuse_tokens(tap, shape[1], hw, tokens_around(self._paths[tap.path]))
        if not found:
            raise InputError(
                f"Taps.pop: expected {tap.name!r} to return a map (b, c, h, w), (b, h, w, c) or tokens "
                f"(b, n, c) as layout={tap.layout!r} says, {seen}. Tap a layer before pooling, "
                "call the whole model, or pass another layout=."
            )
        options = " or ".join(_option(layout) for layout in found)
        raise InputError(
            f"Taps.pop: expected one way to read {tap.name!r}, {seen}, which may be {options}. "
            f"Pass layout={{{tap.name!r}: {_option(found[0])!r}}} or the other, or call it "
            f'"{tap.name}@{_option(found[0])}".'
        )


def _recomputing() -> bool:
    """Whether a backward pass is running in this thread: then a forward is a checkpoint's recomputation."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _deferred() -> bool:
    """Whether reading must wait for `pop`: compiled code cannot, and checkpointed code must not do it twice.

    Checkpointing packs what is saved for the backward pass, and so do others, such as offloading.
    """
    if torch.compiler.is_compiling():
        return True
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _check_intact(name: str, firing: _Firing, end_version: int) -> None:
    assert firing.output is not None
    if max(end_version, version(firing.output)) > firing.version:
        raise InputError(
            f"Taps.pop: expected the output of {name!r} unchanged, got one that was overwritten in place "
            "after the tap, such as by ReLU(inplace=True). Tap that ReLU itself, or build the model with "
            "inplace=False."
        )


def _names_input(model: nn.Module, path: str) -> bool:
    """Whether a path is of what a module is given: "norm2.input", where `norm2` has no child of that name."""
    module, _, last = path.rpartition(".")
    return bool(module) and last == "input" and "input" not in resolve(model, module)._modules


def _parse(name: str, layout: str | Mapping[str, str]) -> _Tap:
    called, at, own = name.partition("@")
    path, hash_, call = called.partition("#")
    if hash_ and not call.isdecimal():
        raise InputError(f'Taps: expected "name#k" with a whole number k from 0, got {name!r}.')
    chosen = layout if isinstance(layout, str) else layout.get(name, "auto")
    return _Tap(name, path, int(call) if hash_ else None, own if at else chosen)


def _check_layouts(taps: Sequence[_Tap], layout: str | Mapping[str, str]) -> None:
    for tap in taps:
        if tap.layout not in LAYOUTS[:3] and not TOKEN_LAYOUT.fullmatch(tap.layout):
            raise InputError(
                f"Taps: expected layout to be one of {', '.join(LAYOUTS)}, got {tap.layout!r} for "
                f"{tap.name!r}."
            )
    names = [tap.name for tap in taps]
    for name in layout if isinstance(layout, Mapping) else ():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0) or ["nothing"]
            raise InputError(
                f"Taps: expected layout= for tapped names, got one for {name!r}. Near: {near[0]}."
            )


def _refuse_replicas(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise InputError(
                f"Taps: expected a model that runs once a step, got DataParallel over "
                f"{len(module.device_ids)} devices, which runs copies. Use DistributedDataParallel."
            )


def _refuse_tokens(tap: _Tap, n: int, hw: tuple[int, int], said: Tokens | None) -> None:
    """Raise if the model says what grids it has, and `n` tokens are of none of them."""
    if said is None:
        return
    grids = said.grids(hw)
    if n < min(map(math.prod, grids)):
        mend = (
            "Tokens are dropped or masked, and nothing says where the others belong: build the model without "
            "that (patch_drop_rate=0, mask_ratio=0), or tap a layer before it."
        )
    else:
        mend = (
            "Others stand around them: say how many in front and behind, "
            f'layout={{{tap.name!r}: "{grids[0][0]}x{grids[0][1]}+PREFIX+SUFFIX"}} or '
            f'"{tap.name}@{grids[0][0]}x{grids[0][1]}+PREFIX+SUFFIX" as its name; or tap another layer.'
        )
    expected = " or ".join(f"{h}x{w}" for h, w in grids)
    expected += "" if said.prefix is None else f" and {said.prefix} in front"
    raise InputError(
        f"Taps.pop: expected {tap.name!r} to return tokens of a grid that {said.by} has, {expected}, got {n} "
        f"with {_describe_input(hw)}. {mend}"
    )


def _describe_input(hw: tuple[int, int] | None) -> str:
    return f"a {hw[0]}x{hw[1]} input" if hw else "no image input seen by the model"


def _option(layout: Layout) -> str:
    return f"tokens+{layout.prefix}" if layout.kind == "tokens" else layout.kind
