"""The paper's augmentation for small images, on whole batches: reflect-pad, random crop, random flip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from .._errors import InputError, InputTypeError
from .views import Views


class Augment(nn.Module):
    """Turn a batch of uint8 images into normalised floats, cropped and flipped at random.

    Each image is padded by `pad` pixels of its own reflection, cropped back to its size at a random place,
    and flipped left to right with probability 1/2 (Zagoruyko & Komodakis, ICLR 2017, section 4.1). The
    padding is never built: the crop and the flip are one choice of rows and one of columns, read straight
    from the batch.

    The random numbers are drawn on the CPU, so the same generator gives the same images on every device.

    Args:
        mean: per channel, for pixels in [0, 1].
        std: per channel, for pixels in [0, 1].
        pad: largest shift in pixels; 0 turns the crop off.
        flip: whether to flip (not for digits or letters).

    Raises:
        ValueError: if mean and std differ in length, a std is not positive, or pad is negative.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], *, pad: int = 4, flip: bool = True
    ) -> None:
        super().__init__()
        _check_settings(mean, std, pad)
        self.pad = pad
        self.flip = flip
        # (x/255 - mean) / std as one multiplication and one addition
        spread = torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)
        centre = torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1)
        self.register_buffer("scale", (1 / (255 * spread)).float(), persistent=False)
        self.register_buffer("shift", (-centre / spread).float(), persistent=False)

    def forward(
        self,
        images: UInt8[Tensor, "b c h w"],
        generator: torch.Generator | None = None,
        *,
        whole: int | None = None,
        share: slice | Int64[Tensor, " b"] = slice(None),
    ) -> Float[Tensor, "b c h w"]:
        """Augment and normalise; `generator` (on the CPU) defaults to torch's global one.

        Where the images are the `share` of a batch of `whole` images that several processes hold, the numbers
        are drawn for all of it, so that each image looks as it would in one process.

        Raises:
            TypeError: if the images are not uint8.
            ValueError: if the channels do not fit mean and std, or the images are too small for the padding.
        """
        self._check(images)
        count = len(images) if whole is None else whole
        offsets, flips = draw(count, self.pad, flip=self.flip, generator=generator)
        return self.normalise(crop_and_flip(images, offsets[:, share], flips[share]))

    def view(
        self, images: UInt8[Tensor, "b c h w"], rows: Int64[Tensor, " b"], views: Views, view: int
    ) -> Float[Tensor, "b c h w"]:
        """A fixed view of images, which stand at `rows` of their data set; crops and flips as `views` has it.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        self._check(images)
        return self.normalise(crop_and_flip(images, *views.draw(rows, view, self.pad, flip=self.flip)))

    def normalise(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """(x/255 - mean) / std: all that evaluation needs; in float32, or in float64 after `.double()`.

        Raises:
            TypeError: if the images are not uint8.
            ValueError: if the channels do not fit mean and std.
        """
        self._check(images, pad=0)
        return images.to(self.scale.dtype).mul_(self.scale).add_(self.shift)

    def extra_repr(self) -> str:
        return f"pad={self.pad}, flip={self.flip}"

    def _check(self, images: Tensor, pad: int | None = None) -> None:
        if images.dtype != torch.uint8:
            raise InputTypeError(
                f"Augment: expected uint8 images, got {images.dtype}. Pass pixels of 0 to 255."
            )
        if images.ndim != 4 or images.shape[1] != len(self.scale):
            raise InputError(
                f"Augment: expected images (b, {len(self.scale)}, h, w), got {tuple(images.shape)}. "
                "Give mean and std one number a channel."
            )
        pad = self.pad if pad is None else pad
        if min(images.shape[2:]) <= pad:
            raise InputError(
                f"Augment: expected images larger than pad={pad}, got {tuple(images.shape[2:])}. "
                "A reflection needs more pixels than it adds: pass a smaller pad."
            )


def draw(
    count: int, pad: int, *, flip: bool, generator: torch.Generator | None = None
) -> tuple[Int64[Tensor, "2 b"], Bool[Tensor, " b"]]:
    """Random shifts in [-pad, pad], rows then columns, and random flips, one for each of `count` images."""
    offsets = torch.randint(-pad, pad + 1, (2, count), generator=generator)
    flips = torch.rand(count, generator=generator) < 0.5
    return offsets, flips & flip


def crop_and_flip(
    images: UInt8[Tensor, "b c h w"], offsets: Int64[Tensor, "2 b"], flips: Bool[Tensor, " b"]
) -> UInt8[Tensor, "b c h w"]:
    """Shift each image by its (row, column) offset over its own reflection, then flip where asked."""
    if not (offsets.any() or flips.any()):
        return images
    b, c, h, w = images.shape
    rows = _reflect(torch.arange(h) + offsets[0, :, None], h)
    columns = torch.arange(w).expand(b, w)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    columns = _reflect(columns + offsets[1, :, None], w)
    # Whole rows are copied first, then pixels are picked within rows: three times faster than one 4-d index.
    starts = torch.arange(b * c).mul_(h)[:, None]
    rows = (starts + rows.repeat_interleave(c, dim=0)).reshape(-1).to(images.device)
    shifted = images.reshape(b * c * h, w).index_select(0, rows).view(b, c, h, w)
    return shifted.gather(3, columns.to(images.device)[:, None, None, :].expand(b, c, h, w))


def _reflect(index: Int64[Tensor, "b n"], size: int) -> Int64[Tensor, "b n"]:
    """Fold positions outside 0..size-1 back inside, the border pixel not repeated."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


def _check_settings(mean: Sequence[float], std: Sequence[float], pad: int) -> None:
    if len(mean) != len(std) or not mean:
        raise InputError(
            f"Augment: expected mean and std of equal length, got {len(mean)} and {len(std)}. "
            "Give each one number a channel."
        )
    if min(std) <= 0:
        raise InputError(
            f"Augment: expected positive std, got {tuple(std)}. A constant channel has none: use 1."
        )
    if pad < 0:
        raise InputError(f"Augment: expected pad >= 0, got {pad}. Pass pad=0 for no crop.")
