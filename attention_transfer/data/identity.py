"""Telling whether two sets of images are the same, in the same order."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from .decode import DECODING
from .images import Images, StreamedImages

SAMPLE = 64  # streamed images whose bytes are read; of the others, name and size tell enough


def data_fingerprint(images: Images | StreamedImages) -> str:
    """16 hexadecimal digits of the SHA-256 over images and labels in their order.

    Images in memory count pixel by pixel. Of streamed ones, which would take hours to read, count the rule
    and the size by which they are decoded, every file's name and size (every row's size of a table), and the
    content of 64 that are evenly spread. Where the data set lies makes no difference.

    Raises:
        OSError: if a streamed image is no longer there.
    """
    digest = hashlib.sha256(np.ascontiguousarray(images.labels.numpy(), dtype="<i8").data)
    digest.update(repr(images.shape).encode())
    if isinstance(images, Images):
        digest.update(np.ascontiguousarray(images.images.numpy()).data)
        return digest.hexdigest()[:16]
    digest.update(DECODING.encode())
    for identity in images.encoded.identify(images.rows.tolist()):
        digest.update(f"{identity}\n".encode())
    for position in torch.linspace(0, len(images) - 1, min(SAMPLE, len(images))).long().tolist():
        digest.update(images.encoded.read(int(images.rows[position])) or b"")
    return digest.hexdigest()[:16]
