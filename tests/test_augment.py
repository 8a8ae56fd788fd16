"""The vectorised augmentation against a plain loop over images that pads, crops and flips."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attention_transfer.data import Augment
from attention_transfer.data.augment import crop_and_flip, draw
from attention_transfer.data.randomness import keyed_generator

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)


def photos(b=16, c=3, h=32, w=32):
    return torch.randint(0, 256, (b, c, h, w), dtype=torch.uint8)


def one_by_one(images, offsets, flips, pad):
    """The oracle: pad each image, cut the window out, flip it."""
    h, w = images.shape[2:]
    result = []
    for i, image in enumerate(images):
        padded = F.pad(image[None].float(), (pad,) * 4, mode="reflect")[0]
        top, left = (offsets[:, i] + pad).tolist()
        window = padded[:, top : top + h, left : left + w]
        result.append(window.flip(2) if flips[i] else window)
    return torch.stack(result).to(torch.uint8)


@pytest.mark.parametrize("shape", [(16, 3, 32, 32), (7, 1, 28, 28), (5, 3, 9, 17), (1, 2, 6, 5)])
@pytest.mark.parametrize("flip", [False, True])
def test_equals_the_loop_over_images(shape, flip):
    images = photos(*shape)
    offsets, flips = draw(len(images), 4, flip=flip, generator=keyed_generator(3))
    assert torch.equal(crop_and_flip(images, offsets, flips), one_by_one(images, offsets, flips, 4))


def test_forward_is_crop_then_normalise():
    images, augment = photos(), Augment(MEAN, STD)
    expected = one_by_one(images, *draw(16, 4, flip=True, generator=keyed_generator(1)), 4)
    result = augment(images, keyed_generator(1))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, augment.normalise(expected))


def test_normalise():
    images = photos()
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(Augment(MEAN, STD).normalise(images), (images / 255 - mean) / std)


def test_draws_cover_every_shift_and_both_sides():
    offsets, flips = draw(2000, 4, flip=True, generator=keyed_generator(0))
    assert offsets.unique().tolist() == list(range(-4, 5))
    assert 900 < flips.sum() < 1100
    assert not draw(100, 4, flip=False)[1].any()


def test_the_generator_decides():
    images, augment = photos(), Augment(MEAN, STD)
    first, again = augment(images, keyed_generator(7)), augment(images, keyed_generator(7))
    assert torch.equal(first, again)
    assert not torch.equal(first, augment(images, keyed_generator(8)))


def test_without_pad_and_flip_only_normalises():
    images, augment = photos(), Augment(MEAN, STD, pad=0, flip=False)
    assert torch.equal(augment(images), augment.normalise(images))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_same_images_on_every_device():
    images, augment = photos(), Augment(MEAN, STD)
    expected = augment(images, keyed_generator(2))
    result = augment.cuda()(images.cuda(), keyed_generator(2))
    torch.testing.assert_close(result.cpu(), expected)


def test_leaves_its_input_alone_and_holds_no_state():
    images, augment = photos(), Augment(MEAN, STD)
    before = images.clone()
    augment(images)
    assert torch.equal(images, before)
    assert not augment.state_dict()


def test_channels_last_batches():
    images = photos()
    augment = Augment(MEAN, STD)
    strided = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(strided, keyed_generator(0)), augment(images, keyed_generator(0)))


def test_bad_input():
    augment = Augment(MEAN, STD)
    with pytest.raises(ValueError, match=r"expected images larger than pad=4, got \(4, 8\)\. .* smaller pad"):
        augment(photos(2, 3, 4, 8))
    with pytest.raises(ValueError, match=r"equal length, got 3 and 1"):
        Augment(MEAN, (0.2,))
    with pytest.raises(ValueError, match=r"expected positive std"):
        Augment((0.5,), (0.0,))
    with pytest.raises(ValueError, match=r"expected pad >= 0, got -1"):
        Augment(MEAN, STD, pad=-1)
    with pytest.raises(ValueError, match=r"non-negative integers, got \(-1,\)"):
        keyed_generator(-1)


@pytest.mark.unchecked
def test_wrong_dtype():
    with pytest.raises(TypeError, match=r"^Augment: expected uint8 images, got torch\.float32\. Pass pixels"):
        Augment(MEAN, STD)(torch.zeros(2, 3, 32, 32))


def test_keys_are_mixed_not_added():
    assert keyed_generator(0, 1).initial_seed() != keyed_generator(1, 0).initial_seed()
