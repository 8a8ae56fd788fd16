"""Order, sharding, resuming and streaming of batches."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attention_transfer.data import Batches, Images, StreamedImages
from attention_transfer.data.decode import EncodedFiles


def numbered(n):
    """Images that carry their own position, as pixel and as label."""
    positions = torch.arange(n)
    return Images(positions.to(torch.uint8).view(n, 1, 1, 1).expand(n, 3, 4, 4).contiguous(), positions)


def seen(batches):
    return [labels.tolist() for _, labels in batches]


def test_every_image_once_and_labels_fit():
    batches = Batches(numbered(10), 4, shuffle=True)
    labels = []
    for images, part in batches:
        assert images.dtype == torch.uint8
        assert images.shape == (len(part), 3, 4, 4)
        assert torch.equal(images[:, 0, 0, 0].long(), part)
        labels += part.tolist()
    assert len(batches) == 3
    assert labels != list(range(10))
    assert sorted(labels) == list(range(10))


def test_unshuffled_keeps_the_order():
    assert seen(Batches(numbered(5), 2, shuffle=False)) == [[0, 1], [2, 3], [4]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gathers_on_the_gpu():
    for (images, labels), (expected, _) in zip(
        Batches(numbered(10), 4, shuffle=True, device="cuda"),
        Batches(numbered(10), 4, shuffle=True),
        strict=True,
    ):
        assert images.is_cuda
        assert labels.is_cuda
        assert torch.equal(images.cpu(), expected)


def test_drop_last():
    batches = Batches(numbered(10), 4, shuffle=True, drop_last=True)
    assert len(batches) == len(seen(batches)) == len(batches.rows(0)) == 2


def test_order_depends_on_seed_and_epoch_alone():
    one, other = (
        Batches(numbered(20), 4, shuffle=True, seed=1),
        Batches(numbered(20), 4, shuffle=True, seed=1),
    )
    epochs = [seen(one) for _ in range(3)]  # each pass is the next epoch
    assert epochs[0] != epochs[1] != epochs[2]
    other.set_epoch(2)
    assert seen(other) == epochs[2]
    other.set_epoch(0)
    assert seen(other) == epochs[0]
    assert seen(Batches(numbered(20), 4, shuffle=True, seed=2)) != epochs[0]


@pytest.mark.parametrize("count", [1, 5, 10, 16, 17])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_one_global_batch(count, world_size):
    ranks = [
        seen(Batches(numbered(count), 4, shuffle=True, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    whole = seen(Batches(numbered(count), 4 * world_size, shuffle=True))
    assert len({len(batches) for batches in ranks}) == 1
    for step, expected in enumerate(whole):
        shares = [batches[step] for batches in ranks]
        assert shares == [expected[rank::world_size] for rank in range(world_size)]
        assert Batches(numbered(count), 4, shuffle=True, world_size=world_size).whole(step) == len(expected)


def test_drop_last_over_ranks():
    ranks = [Batches(numbered(20), 4, shuffle=True, drop_last=True, rank=r, world_size=2) for r in range(2)]
    first, second = ([label for part in seen(batches) for label in part] for batches in ranks)
    assert len(first) == len(second) == 8
    assert not set(first) & set(second)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resumes_where_it_stopped(stop):
    whole = Batches(numbered(20), 4, shuffle=True, seed=5)
    expected = seen(whole) + seen(whole)
    batches = Batches(numbered(20), 4, shuffle=True, seed=5)
    iterator = iter(batches)
    for _ in range(stop):
        next(iterator)
    resumed = Batches(numbered(20), 4, shuffle=True, seed=5)
    resumed.load_state_dict(batches.state_dict())
    assert len(resumed) == 5  # the length of the epoch, not of what is left of it
    rest = seen(resumed) if stop < 5 else []
    assert rest + seen(resumed) == expected[stop:]


def test_breaking_off_starts_the_epoch_again():
    batches = Batches(numbered(20), 4, shuffle=True)
    first = next(iter(batches))[1]
    assert torch.equal(next(iter(batches))[1], first)


def test_refuses_the_state_of_another_run():
    state = {"epoch": 1, "position": 2, "seed": 0, "length": 7}
    with pytest.raises(
        ValueError, match=r"position among 5 batches of seed 0, got one among 7 of seed 0\. Resume"
    ):
        Batches(numbered(20), 4, shuffle=True).load_state_dict(state)
    batches = Batches(numbered(20), 4, shuffle=True)
    batches.load_state_dict(state | {"position": 0})  # between epochs nothing is lost
    assert batches.epoch == 1


def test_measures_the_wait():
    batches = Batches(numbered(20), 4, shuffle=True)
    seen(batches)
    assert 0 < batches.seconds < 1


def test_bad_settings():
    with pytest.raises(ValueError, match=r"^Batches: expected batch_size >= 1, got 0"):
        Batches(numbered(4), 0, shuffle=True)
    with pytest.raises(ValueError, match=r"rank < world_size, got rank 2 of 2\. Ranks count from 0"):
        Batches(numbered(4), 1, shuffle=True, rank=2, world_size=2)
    with pytest.raises(
        ValueError, match=r"at least one batch, got 4 images for batches of 8 x 1\. .*drop_last=False"
    ):
        Batches(numbered(4), 8, shuffle=True, drop_last=True)


# --- Lightning ---


def fit(tmp_path, batches, *, epochs, stop_after=None, resume=None, **settings):
    """Train on `batches` with the real Lightning; give back the labels of each step."""
    lightning = pytest.importorskip("lightning")

    class Recorder(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.steps = []

        def training_step(self, batch, step):
            self.steps.append(batch[1].tolist())
            return self.layer(batch[1].float()[:, None]).mean()

        def on_train_batch_end(self, *_):
            if len(self.steps) == stop_after:
                self.trainer.save_checkpoint(tmp_path / "stopped.ckpt")
                self.trainer.should_stop = True
                raise KeyboardInterrupt

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-6)

    model = Recorder()
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, **settings,
    )  # fmt: skip
    try:
        trainer.fit(model, batches, ckpt_path=resume, weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        assert stop_after
    return model.steps


@pytest.mark.filterwarnings("ignore")
def test_lightning_sets_the_epoch_and_resumes_within_it(tmp_path):
    whole = fit(tmp_path, Batches(numbered(20), 4, shuffle=True), epochs=3)
    own = Batches(numbered(20), 4, shuffle=True)
    assert whole == seen(own) + seen(own) + seen(own)
    begun = fit(tmp_path, Batches(numbered(20), 4, shuffle=True), epochs=3, stop_after=7)
    assert begun == whole[:7]
    rest = fit(tmp_path, Batches(numbered(20), 4, shuffle=True), epochs=3, resume=tmp_path / "stopped.ckpt")
    assert rest == whole[7:]


@pytest.mark.filterwarnings("ignore")
def test_lightning_may_cut_epochs_short(tmp_path):
    steps = fit(tmp_path, Batches(numbered(20), 4, shuffle=True), epochs=2, limit_train_batches=2)
    own = Batches(numbered(20), 4, shuffle=True)
    assert steps == [*seen(own)[:2], *seen(own)[:2]]


# --- streamed images ---


@pytest.fixture
def streamed(tmp_path):
    paths = []
    for i in range(6):
        pixels = np.full((40, 60, 3), i * 40, dtype=np.uint8)
        pixels[:, 30:] += 20
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels).save(paths[-1])
    return StreamedImages(EncodedFiles(paths), torch.arange(6), torch.arange(6), image_size=16)


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_in_the_order_of_in_memory_batches(streamed, workers):
    batches = Batches(streamed, 4, shuffle=True, seed=1, workers=workers)
    for images, labels in batches:
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 16, 16)
        assert torch.equal(images[:, 0, 8, 0].long(), labels * 40)
    in_memory = _at_epoch(Batches(numbered(6), 4, shuffle=True, seed=1), 1)
    assert seen(batches) == seen(in_memory)


def _at_epoch(batches, epoch):
    batches.set_epoch(epoch)
    return batches


def test_random_crops_depend_on_seed_and_epoch_not_on_workers(streamed):
    train = replace(streamed, train=True)

    def pixels(workers, epoch, seed=0):
        batches = _at_epoch(Batches(train, 4, shuffle=False, seed=seed, workers=workers), epoch)
        return torch.cat([images for images, _ in batches])

    assert torch.equal(pixels(0, 1), pixels(2, 1))
    assert not torch.equal(pixels(0, 1), pixels(0, 2))
    assert not torch.equal(pixels(0, 1), pixels(0, 1, seed=1))


def test_evaluation_crops_the_centre(streamed):
    image = streamed.decode(0)
    assert torch.equal(image, streamed.decode(0, epoch=5))
    left, right = image[0, 8, 0], image[0, 8, -1]
    assert (left, right) == (0, 20)


def test_evaluation_leaves_the_border_out(streamed):
    """The centre is 7/8 of the shorter side: of 40 pixels, 2.5 fall away on each side."""
    path = streamed.encoded.paths[0]
    framed = np.full((40, 40, 3), 255, dtype=np.uint8)
    framed[1:-1, 1:-1] = 7
    Image.fromarray(framed).save(path)
    assert streamed.decode(0).unique().tolist() == [7]


def test_streaming_resumes(streamed):
    expected = seen(Batches(streamed, 2, shuffle=True, workers=0))
    batches = Batches(streamed, 2, shuffle=True, workers=0)
    batches.load_state_dict({"epoch": 0, "position": 1, "seed": 0, "length": 3})
    assert seen(batches) == expected[1:]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_one_line_even_from_a_worker(streamed, workers):
    broken = streamed.encoded.paths[2]
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(ValueError) as caught:
        seen(Batches(streamed, 2, shuffle=False, workers=workers))
    assert str(caught.value).startswith(f"load_data: cannot decode {broken} (")
    assert "\n" not in str(caught.value)


def test_a_vanished_image_is_one_line_even_from_a_worker(streamed):
    streamed.encoded.paths[3].unlink()
    with pytest.raises(ValueError, match=r"cannot read .*3\.png \(No such file"):
        seen(Batches(streamed, 2, shuffle=False, workers=1))


WITH_LITTLE_SHARED_MEMORY = """
import torch
from attention_transfer.data import Batches, StreamedImages
from attention_transfer.data.decode import EncodedFiles

images = StreamedImages(EncodedFiles(["0.png", "1.png"] * 20), torch.arange(40), torch.arange(40), 128)
here, elsewhere = (list(Batches(images, 8, shuffle=True, workers=workers)) for workers in (0, 2))
assert all(torch.equal(a, b) for one, other in zip(here, elsewhere, strict=True) for a, b in zip(one, other))
print("all seen")
"""


@pytest.mark.parametrize(
    ("size", "words"),
    [("64k", "do not fit into /dev/shm (65,536 bytes)"), ("4k", "cannot start 2 processes")],
)
def test_little_shared_memory_is_said_and_waited_for_by_nobody(streamed, size, words):
    """Batches of 393,216 bytes; 4 kB are too little for the semaphores too."""
    mount = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        f'mount -t tmpfs -o size={size} none /dev/shm && exec "$@"',
        "sh",
    ]
    try:
        subprocess.run([*mount, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("to mount a /dev/shm of our own takes Linux and its administrator")
    done = subprocess.run(
        [*mount, sys.executable, "-c", WITH_LITTLE_SHARED_MEMORY],
        cwd=streamed.encoded.paths[0].parent,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert words in done.stderr and ("all seen" in done.stdout) == (size == "64k"), done.stderr[-1000:]


def test_grey_and_transparent_images_stream_as_rgb(tmp_path):
    for name, mode in (("grey", "L"), ("clear", "RGBA")):
        Image.new(mode, (20, 20)).save(tmp_path / f"{name}.png")
    Image.new("P", (20, 20)).save(tmp_path / "palette.png", transparency=b"\x80")
    files = EncodedFiles(sorted(tmp_path.glob("*.png")))
    images = StreamedImages(files, torch.arange(3), torch.zeros(3, dtype=torch.int64), image_size=8)
    assert images.decode(0).shape == images.decode(1).shape == images.decode(2).shape == (3, 8, 8)
