"""What `transform_param` does to images: crop, mirror, mean, scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from attention_transfer.caffe.files.caffemodel import read_mean

DRAWS = 3  # random numbers that an image takes


class Transform:
    """(x - mean) * scale of a crop, which may be mirrored.

    A crop is anywhere in TRAIN and in the centre in TEST; with `mirror`, chance mirrors an image or not, in
    TEST too. A mean image is cropped like the image.

    Args:
        spec: the TransformationParameter.
        shape: (c, h, w) of the first image.
        train: whether the phase is TRAIN.
        error: makes an error out of what was expected, what came, and a remedy.

    Raises:
        ValueError: if the parameters contradict each other or the shape.
        OSError: if the mean file cannot be read.
    """

    def __init__(
        self, spec: Any, shape: tuple[int, ...], *, train: bool, error: Callable[..., ValueError]
    ) -> None:
        self._spec, self._train, self._error = spec, train, error
        self._channels, height, width = shape
        self._size = (spec.crop_size, spec.crop_size) if spec.crop_size else (height, width)
        self._mean_image = self._read_mean_image(shape) if spec.HasField("mean_file") else None
        self._means = self._mean_values()
        self._check(shape, "the first image")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of every image that comes out."""
        return (self._channels, *self._size)

    def __call__(self, images: Sequence[np.ndarray], draws: np.ndarray, dtype: Any) -> np.ndarray:
        """Images (c, h, w) as one array (n, c, h, w) of floats.

        Args:
            draws: random numbers of [0, 1), (n, DRAWS).
            dtype: numpy's float32 or float64, in which it is computed.

        Raises:
            ValueError: if an image does not fit.
        """
        batch = np.empty((len(images), *self.shape), dtype)
        for row, (image, draw) in enumerate(zip(images, draws, strict=True)):
            self._check(image.shape, f"image {row} of the batch")
            window = self._window(image, draw, dtype)
            batch[row] = window[:, :, ::-1] if self._spec.mirror and draw[2] < 0.5 else window
        if self._means is not None:
            batch -= self._means.astype(dtype)
        if self._spec.scale != 1:
            batch *= dtype(self._spec.scale)
        return batch

    def _window(self, image: np.ndarray, draw: np.ndarray, dtype: Any) -> np.ndarray:
        height, width = self._size
        spare = (image.shape[1] - height, image.shape[2] - width)
        if self._train:
            top, left = (int(share * (room + 1)) for share, room in zip(draw, spare, strict=False))
        else:
            top, left = spare[0] // 2, spare[1] // 2
        place = (slice(None), slice(top, top + height), slice(left, left + width))
        if self._mean_image is None:
            return image[place]
        return np.subtract(image[place], self._mean_image[place], dtype=dtype)

    def _check(self, shape: tuple[int, ...], what: str) -> None:
        if shape[0] != self._channels:
            raise self._error(f"{self._channels} channels in {what}", shape[0])
        if self._spec.crop_size and min(shape[1:]) < self._spec.crop_size:
            raise self._error(f"a crop_size that fits into {what} of (c, h, w) {shape}", self._spec.crop_size)
        if not self._spec.crop_size and shape[1:] != self._size:
            remedy = "Pass crop_size, or make the images alike."
            raise self._error(f"images of one size, (h, w) {self._size}", f"{shape[1:]} for {what}", remedy)
        if self._mean_image is not None and self._mean_image.shape != shape:
            raise self._error(f"a mean image of (c, h, w) {shape}", self._mean_image.shape)

    def _read_mean_image(self, shape: tuple[int, ...]) -> np.ndarray:
        if len(self._spec.mean_value):
            raise self._error("either mean_file or mean_value", "both")
        return read_mean(self._spec.mean_file)

    def _mean_values(self) -> np.ndarray | None:
        means = self._spec.mean_value
        if len(means) not in (0, 1, self._channels):
            raise self._error(f"1 mean_value, or one for each of {self._channels} channels", len(means))
        return np.array(means, dtype=np.float64)[:, None, None] if means else None
