"""Fixed views are a pure function of seed, position and number, whoever asks; the images' fingerprint."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from attention_transfer.data import Augment, Batches, Images, StreamedImages, Views, data_fingerprint
from attention_transfer.data.augment import crop_and_flip
from attention_transfer.data.decode import EncodedFiles
from attention_transfer.data.parquet import read_parquet
from attention_transfer.data.randomness import keyed_words

AUGMENT = Augment((0.5, 0.4, 0.3), (0.25, 0.2, 0.1), pad=4)
VIEWS = Views(4, seed=3)


def photos(n, c=3, h=12, w=10):
    return torch.randint(0, 256, (n, c, h, w), dtype=torch.uint8)


def test_words_are_those_of_splitmix64():
    """One after the other, as the published generator makes them."""
    start = np.random.SeedSequence((5,)).generate_state(1, dtype=np.uint64)[0]
    words, state = [], int(start)
    for _ in range(6):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        words.append(z ^ (z >> 31))
    assert keyed_words(torch.arange(3), 2, 5).flatten().tolist() == words


def test_a_view_does_not_depend_on_what_is_drawn_beside_it():
    """Not on how many images there are, their order, or the batch: row by row it is the same draw."""
    offsets, flips = VIEWS.draw(torch.arange(100), 2, 4, flip=True)
    for rows in (torch.arange(7), torch.tensor([99, 3, 50]), torch.randperm(100)):
        some_offsets, some_flips = VIEWS.draw(rows, 2, 4, flip=True)
        assert torch.equal(some_offsets, offsets[:, rows])
        assert torch.equal(some_flips, flips[rows])


def test_views_and_seeds_are_unrelated():
    rows = torch.arange(3000)
    draws = [Views(4, seed).draw(rows, view, 4, flip=True) for seed in (0, 1) for view in (0, 1)]
    for i, (offsets, flips) in enumerate(draws):
        for other_offsets, other_flips in draws[:i]:
            assert 0.4 < (flips == other_flips).float().mean() < 0.6
            assert 0.07 < (offsets == other_offsets).float().mean() < 0.16  # one in nine


def test_draws_are_uniform():
    offsets, flips = VIEWS.draw(torch.arange(90_000), 0, 4, flip=True)
    counts = torch.stack([(offsets + 4)[axis].bincount(minlength=9) for axis in (0, 1)])
    assert counts.shape == (2, 9)
    assert (counts - 10_000).abs().max() < 500  # five standard deviations
    assert abs(flips.sum() - 45_000) < 800
    assert torch.corrcoef(torch.stack([*offsets, flips.long()])).sub(torch.eye(3)).abs().max() < 0.02
    assert not VIEWS.draw(torch.arange(50), 0, 4, flip=False)[1].any()


def test_a_view_of_a_batch_is_its_draw():
    images, rows = photos(5), torch.tensor([8, 1, 400, 0, 30])
    shown = AUGMENT.view(images, rows, VIEWS, 1)
    assert torch.equal(shown, AUGMENT.normalise(crop_and_flip(images, *VIEWS.draw(rows, 1, 4, flip=True))))
    assert not torch.equal(shown, AUGMENT.view(images, rows, VIEWS, 2))


def test_bad_views():
    for count, seed in ((0, 0), (1, -1)):
        with pytest.raises(ValueError, match=r"Views: expected count >= 1 and seed >= 0, got"):
            Views(count, seed)
    with pytest.raises(ValueError, match=r"Augment: expected images \(b, 3, h, w\)"):
        AUGMENT.view(photos(2, c=1), torch.arange(2), VIEWS, 0)
    with pytest.raises(ValueError, match="Augment: expected images larger than pad=4"):
        AUGMENT.view(photos(2, h=4), torch.arange(2), VIEWS, 0)


def test_epochs_take_the_views_in_turn():
    assert [Views(3).of_epoch(epoch) for epoch in range(7)] == [0, 1, 2, 0, 1, 2, 0]


# Batches


def numbered(n):
    """Images that carry their own position."""
    positions = torch.arange(n)
    return Images(positions.to(torch.uint8).view(n, 1, 1, 1).expand(n, 3, 4, 4).contiguous(), positions)


@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_deliver_the_rows_of_their_images(world_size):
    for rank in range(world_size):
        batches = Batches(numbered(11), 4, shuffle=True, views=Views(2), rank=rank, world_size=world_size)
        for images, labels, rows in batches:
            assert torch.equal(rows, labels)
            assert torch.equal(images[:, 0, 0, 0].long(), rows)


@pytest.fixture
def streamed(tmp_path):
    paths = []
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 30, 3), dtype=np.uint8)
        paths.append(tmp_path / "class" / f"{i}.png")
        paths[-1].parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(paths[-1])
    return StreamedImages(EncodedFiles(paths), torch.arange(6), torch.arange(6) % 2, 16, train=True)


def shown(images, epoch, *, views=None, seed=0, workers=0):
    """{row: pixels} of an epoch."""
    batches = Batches(images, 4, shuffle=True, seed=seed, workers=workers, views=views)
    batches.set_epoch(epoch)
    return {
        row: image for pixels, _, rows in batches for row, image in zip(rows.tolist(), pixels, strict=True)
    }


def same(one, other):
    return all(torch.equal(one[row], other[row]) for row in one)


def test_streamed_crops_follow_the_view(streamed):
    first = shown(streamed, 0, views=Views(2, seed=1))
    assert same(first, shown(streamed, 2, views=Views(2, seed=1), seed=9, workers=1))
    assert same(first, shown(streamed, 4, views=Views(4, seed=1)))
    assert not same(first, shown(streamed, 1, views=Views(2, seed=1)))
    assert not same(first, shown(streamed, 0, views=Views(2, seed=2)))


# The fingerprint of the images


def test_fingerprint_of_images_in_memory():
    images = Images(photos(20), torch.arange(20))
    found = data_fingerprint(images)
    assert len(found) == 16
    assert found == data_fingerprint(Images(images.images.clone(), images.labels.clone()))
    assert found != data_fingerprint(images.select(torch.arange(20).flip(0)))
    assert found != data_fingerprint(replace(images, labels=images.labels + 1))
    pixels = images.images.clone()
    pixels[13, 2, 5, 5] ^= 1
    assert found != data_fingerprint(replace(images, images=pixels))
    assert found != data_fingerprint(replace(images, images=images.images.transpose(2, 3)))


def test_fingerprint_of_streamed_files(streamed, tmp_path):
    found = data_fingerprint(streamed)
    moved = shutil.copytree(tmp_path / "class", tmp_path / "moved" / "class")
    assert found == data_fingerprint(
        replace(streamed, encoded=EncodedFiles([moved / path.name for path in streamed.encoded.paths]))
    )
    assert found != data_fingerprint(replace(streamed, image_size=17))
    assert found != data_fingerprint(streamed.select(torch.arange(5)))
    streamed.encoded.paths[3].write_bytes(streamed.encoded.paths[3].read_bytes() + b"\0")
    assert found != data_fingerprint(streamed)


def test_fingerprint_of_streamed_rows(tmp_path):
    def fingerprint(name, images):
        rows = [{"bytes": data, "path": None} for data in images]
        pq.write_table(pa.table({"img": rows, "label": [0, 1] * 100}), tmp_path / name)
        content = read_parquet([tmp_path / name], tmp_path).splits["train"].content
        return data_fingerprint(StreamedImages(content, torch.arange(200), torch.arange(200) % 2, 8))

    images = [bytes([i]) * 9 for i in range(200)]
    found = fingerprint("a.parquet", images)
    assert found == fingerprint("b.parquet", images)
    assert found != fingerprint("c.parquet", [*images[:150], images[150] + b"x", *images[151:]])
    assert found != fingerprint("d.parquet", [images[0][:-1] + b"x", *images[1:]])  # one of the sample
