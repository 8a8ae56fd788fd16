"""What every layer shares: its place in the net, its blobs, and how they come to be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from attention_transfer._errors import InputError
from attention_transfer.caffe import schema
from attention_transfer.caffe.files.caffemodel import MOST_ENTRIES
from attention_transfer.caffe.layers.fillers import check_filler, fill

REGISTRY: dict[str, type[Layer]] = {}
Kind = TypeVar("Kind", bound="type[Layer]")


def register(*types: str) -> Callable[[Kind], Kind]:
    """Make a class the layer of these Caffe types."""

    def enter(cls: Kind) -> Kind:
        REGISTRY.update(dict.fromkeys(types, cls))
        return cls

    return enter


class LayerError(InputError):
    """What is wrong with a layer: in its message and, part by part, in its attributes.

    Attributes:
        layer: the layer.
        expected, got, remedy: what its message is made of.
    """

    def __init__(self, layer: Layer, expected: str, got: object, remedy: str) -> None:
        text = f"Net: layer {layer.name!r} ({layer.type}): expected {expected}, got {got}. {remedy}"
        super().__init__(text.strip())
        self.layer, self.expected, self.got, self.remedy = layer, expected, got, remedy


class UnsupportedError(LayerError):
    """What Caffe runs and this package does not."""


class Layer(nn.Module):
    """One layer of a net: a module over its bottoms' tensors, with Caffe's names for what it holds.

    A subclass makes its blobs in `setup`, which runs once with tensors of the bottoms' shapes on the meta
    device, and computes in `forward`. It must not write into its bottoms: an in-place layer returns a new
    tensor that takes the name over.

    Attributes:
        spec: the LayerParameter.
        bottoms, tops: names of blobs; `tops` holds those that Caffe adds by itself too.
        in_place: whether a top has the name of a bottom.
        train_phase: whether the layer is in the phase TRAIN.
        frozen: places of the blobs that get no gradient through this layer; `detached`: those of them that
            get one through another layer.
        cut: places of the bottoms that get no gradient.
    """

    bottoms_expected: ClassVar[tuple[int, int | None]] = (1, 1)  # at least, at most
    tops_expected: ClassVar[tuple[int, int | None]] = (1, 1)
    blobs_expected: ClassVar[int] = 0
    allows_in_place: ClassVar[bool] = True
    asks_for_gradient: ClassVar[bool] = False  # runs backward even with nothing to learn at or below it

    def __init__(self, spec: Any, *, train_phase: bool) -> None:
        super().__init__()
        self.spec = spec
        self.bottoms, self.tops = list(spec.bottom), top_names(spec)
        self.in_place = bool(set(self.bottoms) & set(self.tops))
        self.train_phase = train_phase
        self.blob_names: list[str] = []
        self.frozen: set[int] = set()
        self.detached: list[int] = []
        self.cut: set[int] = set()
        self._fillers: dict[str, Any] = {}
        self._wide: dict[str, Tensor] = {}

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def type(self) -> str:  # type: ignore[override]  # Caffe's word; nn.Module's casts, which a Net does
        return self.spec.type

    @property
    def blobs(self) -> list[Tensor]:
        """The layer's parameters and statistics, in Caffe's order."""
        return [getattr(self, name) for name in self.blob_names]

    @property
    def is_source(self) -> bool:
        """Whether its tops come from outside of the net, as those of Parameter do not."""
        return not self.bottoms and not self.blob_names

    @property
    def learning(self) -> bool:
        """Whether this forward pass is one of training: the phase is TRAIN, and `eval()` is not on."""
        return self.train_phase and self.training

    # ------------------------------------------------------------------------------ what a subclass says

    def setup(self, *bottoms: Any, **_: Any) -> None:
        """Check the parameters against the bottoms, given as meta tensors, and make the blobs."""

    def forward(self, *bottoms: Any, **_: Any) -> Any:
        """The tops; a tuple where there are several."""
        raise NotImplementedError

    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the tops of a layer without bottoms."""
        raise NotImplementedError

    @classmethod
    def count_blobs(cls, spec: Any) -> int:
        """The number of blobs that `setup` makes."""
        return cls.blobs_expected

    def accepts_gradient(self, bottom: int) -> bool:
        """Whether this bottom can get a gradient at all (Caffe's AllowForceBackward)."""
        return True

    def blob_specs(self) -> list[Any]:
        """A ParamSpec for each blob: the net's, or the default."""
        given = [*self.spec.param, *[schema.ParamSpec()] * len(self.blob_names)]
        return [_copy(spec) for spec in given[: len(self.blob_names)]]

    # --------------------------------------------------------------------------------------------- blobs

    def add_blob(self, name: str, shape: Sequence[int], filler: Any = None, *, learned: bool = True) -> None:
        """Add a blob, to be filled as the filler says, with zeros without one.

        Raises:
            ValueError: if it has more entries than Caffe can count, or the filler does not fit.
        """
        filler = filler or schema.FillerParameter()
        check_filler(tuple(shape), filler, self.error)
        if math.prod(shape) > MOST_ENTRIES:
            raise self.error(f"a blob of at most {MOST_ENTRIES} entries", f"the shape {tuple(shape)}")
        values = torch.empty(tuple(shape), device="meta")
        if learned:
            self.register_parameter(name, nn.Parameter(values))
        else:
            self.register_buffer(name, values)
        self.blob_names.append(name)
        self._fillers[name] = filler

    def fill_blobs(self) -> None:
        """Give every blob its memory and its first values.

        Raises:
            ValueError: if a filler is unknown or does not fit.
        """
        for index, name in enumerate(self.blob_names):
            blob = getattr(self, name)
            self._set_blob(name, torch.empty(blob.shape))
            self.put_blob(index, fill(tuple(blob.shape), self._fillers[name], self.error))

    def put_blob(self, index: int, values: Tensor) -> None:
        """Write `values` into a blob.

        Doubles that a float32 blob cannot hold are kept aside, for a net that then becomes one of doubles.
        """
        name, blob = self.blob_names[index], self.blobs[index]
        with torch.no_grad():
            blob.copy_(values)
        self._wide.pop(name, None)
        if (
            values.dtype == torch.float64
            and blob.dtype == torch.float32
            and not torch.equal(blob.double(), values)
        ):
            self._wide[name] = values

    def restore_wide(self) -> None:
        """After the change to doubles: put back what float32 had rounded and nothing has written to since."""
        for name, values in self._wide.items():
            blob = getattr(self, name)
            with torch.no_grad():
                if torch.equal(blob, values.to(blob.device).float().double()):
                    blob.copy_(values)
        self._wide = {}

    def share_blob(self, index: int, owner: Layer, place: int) -> None:
        """Make a blob the very one of another layer."""
        blob = owner.blobs[place]
        if blob.shape != self.blobs[index].shape:
            raise self.error(
                f"{tuple(self.blobs[index].shape)} for blob {index}", f"{tuple(blob.shape)} in {owner.name!r}"
            )
        self._set_blob(self.blob_names[index], blob)

    def _set_blob(self, name: str, values: Tensor) -> None:
        if name in self._buffers:
            self._buffers[name] = values
        else:
            self._parameters[name] = values if isinstance(values, nn.Parameter) else nn.Parameter(values)

    # ----------------------------------------------------------------------------------------- gradients

    def check_specs(self) -> None:
        """Compare `param`, `loss_weight` and `propagate_down` with the blobs, tops and bottoms.

        Raises:
            ValueError: if there are too many of the first, or some of the others but not one for each.
        """
        if len(self.spec.loss_weight) not in (0, len(self.tops)):
            expected = f"no loss_weight, or one for each of {len(self.tops)} tops"
            raise self.error(expected, f"{len(self.spec.loss_weight)}")
        if len(self.spec.param) > len(self.blob_names):
            raise self.error(f"at most {len(self.blob_names)} param entries", f"{len(self.spec.param)}")
        if len(self.spec.propagate_down) not in (0, len(self.bottoms)):
            expected = f"no propagate_down, or one for each of {len(self.bottoms)} bottoms"
            raise self.error(expected, f"{len(self.spec.propagate_down)}")

    def freeze(self, force_backward: bool) -> None:
        """Find which blobs and bottoms get no gradient through this layer."""
        specs = self.blob_specs()
        self.frozen = {i for i, spec in enumerate(specs) if spec.lr_mult == 0 and not force_backward}
        asked = list(self.spec.propagate_down) or [True] * len(self.bottoms)
        self.cut = {
            i
            for i, wanted in enumerate(asked)
            if not self.accepts_gradient(i) or not (wanted or force_backward)
        }

    # -------------------------------------------------------------------------------------------- errors

    def error(self, expected: str, got: object, remedy: str = "") -> LayerError:
        """The error of this layer: what was expected, what came, and what to do."""
        return LayerError(self, expected, got, remedy)

    def unsupported(self, expected: str, got: object, remedy: str = "") -> UnsupportedError:
        """Like `error`, where Caffe itself would go on."""
        return UnsupportedError(self, expected, got, remedy)

    def axis(self, axis: int, bottom: Tensor, *, beyond: bool = False) -> int:
        """An axis counted from either end, checked; `beyond` allows the one behind the last.

        Raises:
            ValueError: if the bottom has no such axis.
        """
        axes = bottom.dim() + beyond
        if not -axes <= axis < axes:
            raise self.error("an axis of its bottom", f"{axis} for the shape {tuple(bottom.shape)}")
        return axis % axes

    def extra_repr(self) -> str:
        return f"{', '.join(self.bottoms)} -> {', '.join(self.tops)}"


def top_names(spec: Any) -> list[str]:
    """The tops of a layer; Caffe adds one to a loss that states none, which counts even so."""
    return list(spec.top) or [f"({spec.name})"] * spec.type.endswith("Loss")


def loss_weights(spec: Any) -> list[float]:
    """The loss weight of each top: what is stated, or else 1 for the first top of a loss."""
    is_loss = spec.type.endswith("Loss")
    return list(spec.loss_weight) or [float(is_loss and place == 0) for place in range(len(top_names(spec)))]


def _copy(spec: Any) -> Any:
    copy = schema.ParamSpec()
    copy.CopyFrom(spec)
    return copy
