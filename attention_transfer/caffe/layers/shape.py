"""Layers that move entries and compute nothing."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from attention_transfer.caffe.layers.base import Layer, register


@register("Input")
class Input(Layer):
    """Declares blobs that come from outside: the net puts what it is given in their place."""

    bottoms_expected = (0, 0)
    tops_expected = (1, None)

    def shapes(self) -> list[tuple[int, ...]]:
        """The declared shape of each top."""
        given = [tuple(shape.dim) for shape in self.spec.input_param.shape]
        if len(given) not in (1, len(self.tops)):
            expected = "1 shape" if len(self.tops) == 1 else f"1 or {len(self.tops)} shapes"
            raise self.error(expected, len(given), "Declare them by `input_param { shape { dim: ... } }`.")
        if any(dim < 1 for shape in given for dim in shape):
            raise self.error("dimensions of 1 or more", given)
        return given * len(self.tops) if len(given) == 1 else given


@register("Split")
class Split(Layer):
    """One blob under several names."""

    tops_expected = (1, None)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return (x,) * len(self.tops) if len(self.tops) > 1 else x


@register("Silence")
class Silence(Layer):
    """Takes blobs that nothing else uses."""

    bottoms_expected = (1, None)
    tops_expected = (0, 0)

    def forward(self, *bottoms: Tensor) -> tuple[()]:
        return ()


@register("HDF5Output")
class HDF5Output(Layer):
    """Takes data and labels. Caffe writes them into a file; here nothing is written."""

    bottoms_expected = (2, 2)
    tops_expected = (0, 0)

    def forward(self, *bottoms: Tensor) -> tuple[()]:
        return ()


@register("Parameter")
class Parameter(Layer):
    """A blob as a top: learned values that no bottom goes into, zeros at first."""

    bottoms_expected = (0, 0)
    blobs_expected = 1
    value: Tensor

    def setup(self, *bottoms: Tensor) -> None:
        self.add_blob("value", tuple(self.spec.parameter_param.shape.dim))

    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(self.value.shape)]

    def forward(self, *bottoms: Tensor) -> Tensor:
        return self.value


@register("Reshape")
class Reshape(Layer):
    """New dimensions for the axes from `axis` on: 0 keeps the bottom's, -1 is what remains."""

    allows_in_place = False

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(self._shape(x))

    def _shape(self, x: Tensor) -> tuple[int, ...]:
        param = self.spec.reshape_param
        first = self.axis(param.axis, x, beyond=True)
        if param.num_axes < -1 or first + max(param.num_axes, 0) > x.dim():
            raise self.error(f"num_axes of -1, or up to the last of {x.dim()} axes", param.num_axes)
        last = x.dim() if param.num_axes == -1 else first + param.num_axes
        dims = list(param.shape.dim)
        for index, dim in enumerate(dims):
            if dim == 0:
                if first + index >= x.dim():
                    raise self.error("a 0 only where the bottom has an axis", f"one for axis {first + index}")
                dims[index] = x.shape[first + index]
        if dims.count(-1) > 1 or min(dims, default=0) < -1:
            raise self.error("dimensions of 0 or more and at most one -1", dims)
        known = math.prod(dim for dim in dims if dim != -1)
        replaced = math.prod(x.shape[first:last])
        if (replaced % known if known else replaced) if -1 in dims else replaced != known:
            raise self.error(f"a shape for the {replaced} entries of {tuple(x.shape)}", tuple(dims))
        dims = [dim if dim != -1 else replaced // max(known, 1) for dim in dims]
        return (*x.shape[:first], *dims, *x.shape[last:])


@register("Flatten")
class Flatten(Layer):
    """Makes one axis of those from `axis` to `end_axis`."""

    allows_in_place = False

    def forward(self, x: Tensor) -> Tensor:
        param = self.spec.flatten_param
        first, last = self.axis(param.axis, x), self.axis(param.end_axis, x)
        if first > last + 1:
            raise self.error("an axis not behind end_axis", f"{first} and {last}")
        return x.flatten(first, last) if first <= last else x.unsqueeze(first)


@register("Concat")
class Concat(Layer):
    """The bottoms one behind the other along an axis."""

    bottoms_expected = (1, None)
    allows_in_place = False

    def forward(self, *bottoms: Tensor) -> Tensor:
        param = self.spec.concat_param
        axis = param.concat_dim if param.HasField("concat_dim") else param.axis
        axis = self.axis(axis, bottoms[0])
        others = {(*x.shape[:axis], *x.shape[axis + 1 :]) for x in bottoms}
        if len(others) > 1:
            raise self.error(f"equal shapes but for axis {axis}", [tuple(x.shape) for x in bottoms])
        return torch.cat(bottoms, axis)


@register("Slice")
class Slice(Layer):
    """Parts of the bottom along an axis, equal ones, or cut at the slice_points."""

    tops_expected = (1, None)
    allows_in_place = False

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        param = self.spec.slice_param
        axis = self.axis(param.slice_dim if param.HasField("slice_dim") else param.axis, x)
        size, points = x.shape[axis], list(param.slice_point)
        if points:
            edges = [0, *points, size]
            if len(points) != len(self.tops) - 1 or any(a >= b for a, b in pairwise(edges)):
                raise self.error(f"{len(self.tops) - 1} rising slice_points below {size}", points)
            parts = [b - a for a, b in pairwise(edges)]
        elif size % len(self.tops):
            raise self.error(f"a size that is a multiple of {len(self.tops)} tops", size)
        else:
            parts = [size // len(self.tops)] * len(self.tops)
        tops = x.split(parts, axis)
        return tops if len(tops) > 1 else tops[0]


@register("Tile")
class Tile(Layer):
    """The bottom several times along an axis."""

    allows_in_place = False

    def forward(self, x: Tensor) -> Tensor:
        param = self.spec.tile_param
        if param.tiles < 1:
            raise self.error("tiles of 1 or more", param.tiles)
        times = [1] * x.dim()
        times[self.axis(param.axis, x)] = param.tiles
        return x.repeat(times)


@register("Permute")
class Permute(Layer):
    """The axes in another order: those named by `order`, then the others."""

    allows_in_place = False

    def forward(self, x: Tensor) -> Tensor:
        order = list(self.spec.permute_param.order)
        if len(set(order)) != len(order) or any(axis >= x.dim() for axis in order):
            raise self.error(f"different axes below {x.dim()} for order", order)
        rest = [axis for axis in range(x.dim()) if axis not in order]
        return x.permute(order + rest).contiguous()


@register("Crop")
class Crop(Layer):
    """A part of the first bottom, of the second one's size from `axis` on."""

    bottoms_expected = (2, 2)
    allows_in_place = False

    def forward(self, x: Tensor, reference: Tensor) -> Tensor:
        param = self.spec.crop_param
        first = self.axis(param.axis, x)
        cropped, offsets = x.dim() - first, list(param.offset)
        if reference.dim() != x.dim() or len(offsets) not in (0, 1, cropped):
            raise self.error(
                f"bottoms of as many axes, and 0, 1 or {cropped} offsets", f"{len(offsets)} offsets"
            )
        offsets = offsets * cropped if len(offsets) == 1 else offsets or [0] * cropped
        for axis, offset in enumerate(offsets, start=first):
            if offset + reference.shape[axis] > x.shape[axis]:
                raise self.error(
                    f"a crop within axis {axis} of {x.shape[axis]}", offset + reference.shape[axis]
                )
            x = x.narrow(axis, offset, reference.shape[axis])
        return x.contiguous()
