"""What every layer shares: its place in the net, its blobs, and how they come to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from attention_transfer.caffe import schema
from attention_transfer.caffe.layers.fillers import fill

REGISTRY: dict[str, type[Layer]] = {}
Kind = TypeVar("Kind", bound="type[Layer]")


def register(*types: str) -> Callable[[Kind], Kind]:
    """Make a class the layer of these Caffe types."""

    def enter(cls: Kind) -> Kind:
        REGISTRY.update(dict.fromkeys(types, cls))
        return cls

    return enter


class Layer(nn.Module):
    """One layer of a net: a module over its bottoms' tensors, with Caffe's names for what it holds.

    A subclass makes its blobs in `setup`, which runs once with tensors of the bottoms' shapes on the meta
    device, and computes in `forward`. It must not write into its bottoms: an in-place layer returns a new
    tensor that takes the name over.

    Attributes:
        spec: the LayerParameter.
        bottoms, tops: names of blobs; `tops` holds those that Caffe adds by itself too.
        in_place: whether a top has the name of a bottom.
        train_phase: whether the net was built in the phase TRAIN.
    """

    bottoms_expected: ClassVar[tuple[int, int | None]] = (1, 1)  # at least, at most
    tops_expected: ClassVar[tuple[int, int | None]] = (1, 1)
    default_loss_weight: ClassVar[float] = 0.0  # of the first top
    allows_in_place: ClassVar[bool] = True
    always_backward: ClassVar[bool] = False  # asks for a backward pass with nothing to learn, as BatchNorm does

    def __init__(self, spec: Any, *, train_phase: bool) -> None:
        super().__init__()
        self.spec = spec
        self.bottoms, self.tops = list(spec.bottom), list(spec.top)
        self.in_place = bool(set(self.bottoms) & set(self.tops))
        self.train_phase = train_phase
        self._blobs: list[str] = []

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def type(self) -> str:
        return self.spec.type

    @property
    def blobs(self) -> list[Tensor]:
        """The layer's parameters and statistics, in Caffe's order."""
        return [getattr(self, name) for name in self._blobs]

    @property
    def learning(self) -> bool:
        """Whether this forward pass is one of training: the net's phase is TRAIN, and `eval()` is not on."""
        return self.train_phase and self.training

    def setup(self, *bottoms: Tensor) -> None:
        """Check the parameters against the bottoms, given as meta tensors, and make the blobs."""

    def forward(self, *bottoms: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The tops; a tuple where there are several."""
        raise NotImplementedError

    def accepts_gradient(self, bottom: int) -> bool:
        """Whether `force_backward` sends a gradient into this bottom (Caffe's AllowForceBackward)."""
        return True

    def add_blob(self, name: str, shape: Sequence[int], filler: Any = None, *, learned: bool = True) -> None:
        """Add a blob, filled as the filler says, with zeros without one."""
        values = fill(tuple(shape), filler or schema.FillerParameter(), self.error)
        if learned:
            self.register_parameter(name, nn.Parameter(values))
        else:
            self.register_buffer(name, values)
        self._blobs.append(name)

    def error(self, expected: str, got: object, remedy: str = "") -> ValueError:
        """The error of this layer: what was expected, what came, and what to do."""
        return ValueError(f"Net: layer {self.name!r} ({self.type}): expected {expected}, got {got}. {remedy}".strip())

    def axis(self, axis: int, bottom: Tensor, *, beyond: bool = False) -> int:
        """An axis counted from either end, checked; `beyond` allows the one behind the last.

        Raises:
            ValueError: if the bottom has no such axis.
        """
        axes = bottom.dim() + beyond
        if not -axes <= axis < axes:
            raise self.error(f"an axis of a bottom of {bottom.dim()} axes", axis)
        return axis % axes if axes else 0

    def extra_repr(self) -> str:
        return f"{', '.join(self.bottoms)} -> {', '.join(self.tops)}"


def tensor_of(number: float, like: Tensor) -> Tensor:
    """A number as a scalar tensor of the same type and place."""
    return torch.tensor(number, dtype=like.dtype, device=like.device)
