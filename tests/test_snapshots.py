"""Maps over the epochs: the file, which epochs it keeps, and what training writes into it."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attention_transfer.runs import Recipe, Run
from attention_transfer.training import resume, train
from attention_transfer.training.recorder import MapRecorder
from attention_transfer.visualize.examples import cosine_similarity
from attention_transfer.visualize.overlays import map_levels
from attention_transfer.visualize.pictures import strip
from attention_transfer.visualize.snapshots import Snapshots, epochs_to_keep


def begin(layers: int = 2) -> Snapshots:
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    return Snapshots.start(images, torch.arange(3), list("abc"), [f"layer{i}" for i in range(layers)])


@pytest.mark.parametrize("total", [0, 1, 2, 6, 20, 21, 90, 200, 10_000])
def test_few_epochs_are_kept_and_the_ends_among_them(total: int) -> None:
    kept = epochs_to_keep(total)
    assert {0, min(1, total), total} <= kept
    assert max(kept) == total and len(kept) <= 23
    assert len(kept) >= min(total + 1, 9)


def test_a_file_holds_what_was_added(tmp_path: Path) -> None:
    maps = [[torch.rand(3, 4, 6), torch.rand(3, 2, 2)] for _ in range(3)]
    teacher = [torch.rand(3, 8, 12), torch.rand(3, 2, 2)]
    snapshots = begin().with_teacher(teacher)
    for epoch, each in zip((0, 1, 5), maps, strict=True):
        snapshots = snapshots.add(epoch, each)
    snapshots.save(tmp_path / "maps.safetensors")
    found = Snapshots.read(tmp_path / "maps.safetensors")
    assert found.epochs == [0, 1, 5] and found.layers == ["layer0", "layer1"] and found.classes == list("abc")
    assert found.continues(snapshots) and torch.equal(found.labels, torch.arange(3))
    assert [each.shape for each in found.maps] == [(3, 3, 4, 6), (3, 3, 2, 2)]
    kept = found.maps[0][2].float()
    torch.testing.assert_close(kept, maps[2][0] / maps[2][0].amax((1, 2), keepdim=True), atol=1e-3, rtol=1e-3)
    agreement = found.agreement(0, found.teacher[0])
    assert agreement[5] == pytest.approx(cosine_similarity(maps[2][0], teacher[0]).mean().item(), abs=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["maps.safetensors"]


def test_an_epoch_done_again_takes_the_place_of_what_came_after_it() -> None:
    snapshots = begin(1)
    for epoch in (0, 1, 2, 3):
        snapshots = snapshots.add(epoch, [torch.full((3, 2, 2), epoch + 1.0)])
    again = snapshots.add(2, [torch.eye(2).expand(3, 2, 2)])
    assert again.epochs == [0, 1, 2]
    assert again.maps[0].shape == (3, 3, 2, 2)
    assert torch.equal(again.maps[0][2, 0].float(), torch.eye(2))
    with pytest.raises(ValueError, match=r"Snapshots\.add: expected maps of 1 layers, got 2"):
        snapshots.add(4, [torch.ones(3, 2, 2)] * 2)


def test_large_images_and_maps_are_shrunk_and_tiny_values_survive() -> None:
    images = torch.randint(0, 256, (1, 3, 224, 112), dtype=torch.uint8)
    snapshots = Snapshots.start(images, torch.zeros(1).long(), ["a"], ["x"])
    snapshots = snapshots.add(0, [torch.rand(1, 56, 28) * 1e-12])
    assert snapshots.images.shape == (1, 3, 96, 48)
    assert snapshots.maps[0].shape == (1, 1, 32, 16)
    assert snapshots.maps[0].max() == 1 and snapshots.maps[0].float().std() > 0.05


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    begin(1).add(0, [torch.rand(3, 2, 2)]).save(path)
    for data in (b"", path.read_bytes()[:40], path.read_bytes().replace(b"epochs", b"epochz")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"Snapshots.read: .*damaged .*maps\.safetensors"):
            Snapshots.read(path)


def test_a_strip_has_its_frames_side_by_side_and_each_goes_on_beyond_its_edges() -> None:
    maps = torch.rand(3, 4, 6)
    found = strip(maps)
    data = base64.b64decode(found["source"].removeprefix("data:image/png;base64,"))
    levels = np.asarray(Image.open(io.BytesIO(data)))
    assert levels.shape == (8, 30) and found["frames"] == 3 and found["size"] == (4, 6)
    for frame, energy in zip(np.split(levels, 3, axis=1), maps, strict=True):
        assert np.array_equal(frame[2:-2, 2:-2], map_levels(energy, (4, 6)))
        assert np.array_equal(frame, np.pad(frame[2:-2, 2:-2], 2, mode="edge"))


# Training (a teacher of one epoch knows less than chance, and the preflight rightly says so)


def silent(line: str) -> None:
    pass


def quick(data: Path, output: Path, **settings: object) -> Recipe:
    common = {"data": str(data), "validation": 0.0, "epochs": 2, "batch_size": 20, "pad": 2}
    common |= {"student": "wrn-10-1", "accelerator": "cpu", "precision": "32-true", "output": str(output)}
    return Recipe(**{**common, **settings})  # type: ignore[arg-type]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning")
def test_training_keeps_maps_and_the_run_is_as_without_them(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"teacher": "wrn-10-1", "teacher_epochs": 1, "method": "at"}
    run = train(quick(image_folder, tmp_path / "at", **settings), say=silent)
    found = Snapshots.read(run.maps)
    assert found.epochs == [0, 1, 2] and found.layers == ["group0", "group1", "group2"]
    assert len(found.images) == 4 and found.labels[:3].tolist() == [0, 1, 2]
    assert len(found.teacher) == 3
    assert not torch.equal(found.maps[0][0], found.maps[0][2])
    of_teacher = Snapshots.read(run.teacher.maps)  # trained from labels: the same layers, nobody beside it
    assert of_teacher.epochs == [0, 1] and of_teacher.layers == found.layers and not of_teacher.teacher
    ends = [maps[-1].float() for maps in of_teacher.maps]
    assert all(torch.equal(end, kept.float()) for end, kept in zip(ends, found.teacher, strict=True))

    monkeypatch.setattr(MapRecorder, "_record", lambda *_: None)
    again = quick(image_folder, tmp_path / "without", **settings | {"teacher": str(run.teacher.folder)})
    without = train(again, say=silent)
    assert not without.maps.exists()
    assert without.student_weights.read_bytes() == run.student_weights.read_bytes()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_that_was_killed_goes_on_with_its_maps(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    recipe = quick(image_folder, tmp_path / "run", teacher=None, method="none")

    class Killed(Exception):  # noqa: N818
        pass

    record = MapRecorder._record

    def killed(self: MapRecorder, epoch: int, *rest: object) -> None:
        record(self, epoch, *rest)  # type: ignore[arg-type]
        if epoch == 2:
            raise Killed  # the maps are written, the checkpoint is not

    with monkeypatch.context() as patch:
        patch.setattr(MapRecorder, "_record", killed)
        with pytest.raises(Killed):
            train(recipe, say=silent)
    run = Run(tmp_path / "run")
    before = Snapshots.read(run.maps)
    if damaged:
        run.maps.write_bytes(b"no maps")
    found = Snapshots.read(resume(run.folder, say=silent).maps)
    assert found.epochs == ([2] if damaged else [0, 1, 2])
    assert torch.equal(found.maps[0][-1], before.maps[0][-1])
