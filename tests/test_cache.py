"""The cache on disk: what goes in comes out, nothing half-written counts, and nothing foreign is served."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attention_transfer.cache import Cache, Filler, Manifest
from attention_transfer.cache.records import Layout
from attention_transfer.cache.shards import Shard
from attention_transfer.data import Batches, Images, Views
from attention_transfer.functional import attention_map
from attention_transfer.pairs import Stage

MANIFEST = Manifest(
    teacher="wrn-10-2",
    teacher_fingerprint="0123456789abcdef",
    teacher_input=None,
    classes=5,
    layers=(Stage("a", (8, 6, 4), 2.0), Stage("b", (16, 3, 3), 4.0)),
    p=2.0,
    mapping="sum",
    dtype="float16",
    precision="32-true",
    data="fedcba9876543210",
    images=23,
    shape=(3, 12, 8),
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    pad=2,
    flip=True,
    view_seed=3,
    views=2,
    shard_images=10,
)


def look(images: torch.Tensor, rows: torch.Tensor, view: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Numbers that tell image, view and layer apart, in place of a teacher."""
    base = (100 * view + rows).float()
    maps = [base.view(-1, 1, 1) + torch.rand(len(rows), *size) * 50 for size in ((6, 4), (3, 3))]
    return base[:, None] / 10 + torch.arange(5), maps


class Watched:
    """`look`, which remembers what it was asked and answered."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], tuple[torch.Tensor, list[torch.Tensor]]] = {}

    def __call__(self, images: torch.Tensor, rows: torch.Tensor, view: int):
        assert torch.equal(images[:, 0, 0, 0].long(), rows)
        logits, maps = look(images, rows, view)
        for place, row in enumerate(rows.tolist()):
            self.seen[view, row] = logits[place], [each[place] for each in maps]
        return logits, maps


def batches(manifest: Manifest = MANIFEST) -> Batches:
    rows = torch.arange(manifest.images)
    images = Images(rows.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 12, 8).contiguous(), rows % 5)
    return Batches(images, 4, shuffle=False, views=Views(manifest.views, manifest.view_seed))


def fill(cache: Cache) -> Watched:
    watched = Watched()
    Filler(cache, batches(cache.manifest), watched).run(lambda count: None)
    return watched


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """A finished cache of 2 views in 3 files each."""
    cache = Cache.create(tmp_path / "cache", MANIFEST)
    fill(cache)
    return cache


def unit(energy: torch.Tensor) -> torch.Tensor:
    return energy / energy.flatten(1).norm(dim=1).view(-1, 1, 1)


# Records


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-4), ("uint8", 5e-3)])
def test_records_keep_maps_up_to_a_factor(dtype: str, tolerance: float) -> None:
    layout = Layout(5, ((6, 4), (3, 3)), dtype)
    features = [torch.randn(7, 8, 6, 4), 1e-3 * torch.randn(7, 16, 3, 3)]
    energies = [attention_map(each, norm=None) for each in features]
    logits = torch.randn(7, 5) * 10
    records = layout.pack(logits, energies)
    assert records.shape == (7, layout.bytes)
    assert layout.bytes == {"float16": 10 + 2 * 33, "uint8": 10 + 34}[dtype]
    stored, maps = layout.unpack(records, [1, 0])
    torch.testing.assert_close(stored, logits, rtol=5e-4, atol=0)
    for found, energy in zip(maps, reversed(energies), strict=True):
        assert found.dtype == torch.float32
        relative = energy / energy.amax((1, 2), keepdim=True) * (255 if dtype == "uint8" else 1)
        torch.testing.assert_close(found, relative, rtol=5e-4, atol=0.5 if dtype == "uint8" else 1e-7)
        assert (unit(found) - unit(energy)).flatten(1).norm(dim=1).max() < tolerance


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_a_map_of_zeros_stays_one_and_scales_do_not_matter(dtype: str) -> None:
    layout = Layout(2, ((4, 4),), dtype)
    energy = torch.rand(3, 4, 4)
    energy[1] = 0
    energy[2] = energy[0] * 2**40
    maps = layout.unpack(layout.pack(torch.zeros(3, 2), [energy]), [0])[1][0]
    assert not maps[1].any()
    assert torch.equal(maps[0], maps[2])


def test_a_batch_of_other_rows_is_read_from_several_files(cache: Cache) -> None:
    watched = fill(Cache.create(cache.folder.parent / "again", MANIFEST))
    cache = Cache.read(cache.folder.parent / "again")
    rows = torch.tensor([22, 0, 9, 10, 5, 19, 10])
    for view in (1, 0, 1):
        logits, maps = cache.read_maps(rows, view, ["b", "a"])
        for place, row in enumerate(rows.tolist()):
            expected, energies = watched.seen[view, row]
            torch.testing.assert_close(logits[place], expected, rtol=5e-4, atol=1e-3)
            for found, energy in zip([maps[1], maps[0]], energies, strict=True):
                torch.testing.assert_close(found[place], energy / energy.max(), rtol=5e-4, atol=1e-6)
        assert list(cache._opened) == [view]  # the files of one view are held, not of all


def test_every_image_is_looked_at_once_in_every_view(tmp_path: Path) -> None:
    watched = fill(Cache.create(tmp_path / "cache", MANIFEST))
    assert watched.seen.keys() == {(view, row) for view in range(2) for row in range(23)}


def test_what_a_shard_holds_is_what_its_name_says(cache: Cache) -> None:
    names = sorted(str(path.relative_to(cache.folder)) for path in cache.folder.glob("view-*/*"))
    assert names == [f"view-{view}/{first:09}.safetensors" for view in range(2) for first in (0, 10, 20)]
    from safetensors import safe_open

    with safe_open(cache.folder / names[2], framework="pt") as file:
        assert torch.equal(file.get_tensor("records"), cache.read_records(torch.arange(20, 23), 0))


# Going on


def test_only_what_is_missing_is_done(cache: Cache) -> None:
    before = stamps(cache)
    gone, cut = cache.shards(0)[1], cache.shards(1)[0]
    (cache.folder / gone.name).unlink()
    os.truncate(cache.folder / cut.name, 300)
    (cache.folder / "view-0" / ".attention-transfer-0123456789abcdef.tmp").write_bytes(b"half")
    again = Cache.create(cache.folder, MANIFEST)
    filler = Filler(again, batches(), Watched())
    assert (filler.images, filler.bytes) == (20, 20 * again.layout.bytes)
    watched = fill(again)
    assert watched.seen.keys() == {(0, row) for row in range(10, 20)} | {(1, row) for row in range(10)}
    again.require(2)
    assert not list(cache.folder.rglob("*.tmp"))
    after = stamps(cache)
    assert {name for name in before if before[name] != after[name]} == {gone.name, cut.name}


def stamps(cache: Cache) -> dict[str, int]:
    paths = cache.folder.glob("view-*/*")
    return {str(path.relative_to(cache.folder)): path.stat().st_mtime_ns for path in paths}


def test_more_views_keep_the_first_ones(cache: Cache) -> None:
    before = stamps(cache)
    more = Cache.create(cache.folder, replace(MANIFEST, views=4, settings={"data": "moved"}))
    assert more.manifest.views == 4
    assert more.manifest.settings == {"data": "moved"}
    more.require(2)
    with pytest.raises(ValueError, match=r"cache: .* is unfinished: 6 of 12 files are missing\. Finish it: "):
        more.require(4)
    assert {view for view, _ in fill(more).seen} == {2, 3}
    assert before.items() <= stamps(cache).items()
    assert Cache.create(cache.folder, MANIFEST).manifest.views == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher_fingerprint": "f" * 16}, "teacher_fingerprint: 0123456789abcdef, not ffffffffffffffff"),
        ({"layers": MANIFEST.layers[:1]}, "layers: a, b, not a"),
        ({"p": 4.0, "mapping": "max"}, "p: 2.0, not 4.0; mapping: sum, not max"),
        ({"pad": 4}, "pad: 2, not 4"),
        ({"data": "0" * 16}, "data: fedcba9876543210, not 0000000000000000"),
        ({"dtype": "uint8"}, "dtype: float16, not uint8"),
        ({"view_seed": 4}, "view_seed: 3, not 4"),
        ({"precision": "bf16-mixed"}, "precision: 32-true, not bf16-mixed"),
    ],
)
def test_another_cache_is_not_written_into(cache: Cache, changes: dict, words: str) -> None:
    before = stamps(cache)
    with pytest.raises(ValueError, match=f"cache: .* holds another cache \\({words}\\)\\. Go on with the"):
        Cache.create(cache.folder, replace(MANIFEST, **changes))
    assert stamps(cache) == before


def test_a_cache_without_a_file_may_be_begun_anew(tmp_path: Path) -> None:
    Cache.create(tmp_path / "cache", MANIFEST)
    other = replace(MANIFEST, p=4.0)
    assert Cache.create(tmp_path / "cache", other).manifest == other
    assert Cache.read(tmp_path / "cache").manifest == other


def test_every_stored_fact_counts(cache: Cache) -> None:
    """Whatever a map depends on is in the identity; what says where images lie is not."""
    others = {"views": 3, "source": {"split_seed": 1}, "settings": {"data": "x"}, "version": "9"}
    assert replace(MANIFEST, **others).identity == MANIFEST.identity
    changed = [replace(MANIFEST, mean=(0.1,) * 3), replace(MANIFEST, teacher_input=[[1], [0], None])]
    assert len({MANIFEST.identity, *(each.identity for each in changed)}) == 3


def test_a_folder_of_something_else_stays(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is no cache folder, so it stays"):
        Cache.create(tmp_path, MANIFEST)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# Bad folders


def test_damage_is_named(cache: Cache) -> None:
    path = cache.folder / cache.shards(1)[2].name
    whole = path.read_bytes()
    for content, words in (
        (whole[:-1], r"it has [\d,]+ bytes, not"),
        (whole + b"\0", r"it has [\d,]+ bytes, not"),
        (whole[:40], "its header cannot be read"),
        (b"", "its header cannot be read"),
        (b"\xff" * len(whole), "its header cannot be read"),
        (whole.replace(b'"U8"', b'"I8"'), r"its header speaks of \(\[3, 76\], 'I8'\)"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"cache: .*view-1/000000020\.safetensors is damaged: {words}"):
            cache.require(2)
        cache.require(1)


def test_a_file_of_another_place_or_cache_is_not_served(cache: Cache, tmp_path: Path) -> None:
    first, second = (cache.folder / cache.shards(0)[i].name for i in (0, 1))
    kept = first.read_bytes()
    shutil.copy(second, first)
    with pytest.raises(ValueError, match="belongs to another cache, or to another place in this one"):
        cache.require(1)
    first.write_bytes(kept)
    cache.require(2)
    other = Cache.create(tmp_path / "other", replace(MANIFEST, p=4.0))
    fill(other)
    shutil.copy(other.folder / other.shards(0)[0].name, first)
    with pytest.raises(ValueError, match=r"belongs to another cache.*cache build --resume"):
        cache.require(1)


def test_a_flipped_bit_is_found_by_the_checksum_alone(cache: Cache) -> None:
    path = cache.folder / cache.shards(0)[1].name
    content = bytearray(path.read_bytes())
    content[-5] ^= 16
    path.write_bytes(content)
    cache.require(2)
    found = [(shard.name, fault) for shard, fault in cache.faults(deep=True) if fault]
    assert found == [("view-0/000000010.safetensors", "is damaged: its checksum does not fit its content")]
    cache = Cache.read(cache.folder)
    cache.read_records(torch.arange(20), 1)
    with pytest.raises(
        ValueError,
        match=r"^cache: .*view-0/000000010\.safetensors is damaged: its checksum .* Delete it, and .* --res",
    ):
        cache.read_records(torch.arange(3), 0)


def test_checksums_are_compared_once_for_each_file_as_it_is(cache: Cache) -> None:
    cache.read_records(torch.arange(20), 0)
    cache.read_records(torch.arange(20), 1)
    path = cache.folder / cache.shards(0)[1].name
    former, content = path.stat(), bytearray(path.read_bytes())
    content[-5] ^= 16
    path.write_bytes(content)
    os.utime(path, ns=(former.st_atime_ns, former.st_mtime_ns))
    cache.read_records(torch.arange(20), 0)  # as far as anyone can tell it is the file that was looked at
    cache.read_records(torch.arange(20), 1)
    os.utime(path)
    with pytest.raises(ValueError, match="its checksum does not fit"):
        cache.read_records(torch.arange(20), 0)


def test_views_beyond_those_stored(cache: Cache) -> None:
    with pytest.raises(ValueError, match=r"cache: expected 3 views in .*, got 2\. Pass --views 2, or add"):
        cache.require(3)


def manifest_with(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "cache.json").read_text())
    (folder / "cache.json").write_text(json.dumps(values | changes))


def test_foreign_and_newer_manifests(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cache: expected a cache folder with a cache\.json, got "):
        Cache.read(tmp_path)
    manifest_with(cache.folder, format=2, version="3.1")
    with pytest.raises(ValueError, match=r"cache: expected format 1 in .*, got 2, written by version 3\.1"):
        Cache.read(cache.folder)
    for changes, words in (
        ({"format": 1, "kind": "other"}, "which is something else"),
        ({"format": 1, "images": 0}, r"which is damaged \(images, views, .*: \[0, 2, 10, 5\]\)"),
        ({"images": 23, "layers": [{"name": "a"}]}, "which is damaged"),
        ({"layers": []}, "which is damaged"),
        ({"dtype": "int3"}, "which is damaged"),
        ({"what": 1}, r"which is damaged \(.*'what'\)"),
    ):
        Cache.create(tmp_path / words[:9], MANIFEST)
        manifest_with(tmp_path / words[:9], **changes)
        with pytest.raises(ValueError, match=rf"expected the manifest of a teacher cache, .*{words}"):
            Cache.read(tmp_path / words[:9])
        shutil.rmtree(tmp_path / words[:9])
    for text in ("{", "[1]", ""):
        (cache.folder / "cache.json").write_text(text)
        with pytest.raises(ValueError, match="expected the manifest of a teacher cache"):
            Cache.read(cache.folder)


def test_manifest_round_trip(cache: Cache) -> None:
    assert Cache.read(cache.folder).manifest == MANIFEST
    assert MANIFEST.differences(Cache.read(cache.folder).manifest) == []


# Full disks and bad numbers


def test_a_disk_that_is_too_small_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    needed = 46 * Layout.of(MANIFEST).bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(OSError, match=r"cache: expected 0\.0 MB of room in .*cache, got 0\.0 MB\. Choose"):
        Cache.create(tmp_path / "new" / "cache", MANIFEST)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    Cache.create(tmp_path / "new" / "cache", MANIFEST)


def test_a_disk_that_is_full_midway_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache.create(tmp_path / "cache", MANIFEST)
    original = Shard.write

    def write(self: Shard, *rest: object) -> None:
        if self.view == 1:
            raise OSError(28, "No space left on device")
        original(self, *rest)

    monkeypatch.setattr(Shard, "write", write)
    with pytest.raises(
        OSError, match=r"cache: could not write .*view-1/0+\.safetensors: No space left on device\. All files"
    ) as caught:
        fill(cache)
    assert "\n" not in str(caught.value)
    cache.require(1)


@pytest.mark.parametrize(("where", "what"), [(0, "the logits"), (2, "the map of b")])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, where: int, what: str) -> None:
    def broken(images: torch.Tensor, rows: torch.Tensor, view: int):
        logits, maps = look(images, rows, view)
        if 17 in rows:
            [logits, *maps][where][rows == 17] = torch.inf
        return logits, maps

    cache = Cache.create(tmp_path / "cache", MANIFEST)
    with pytest.raises(
        ValueError, match=rf"cache: expected finite .* in {what} for training image 17\. Build with"
    ):
        Filler(cache, batches(), broken).run(lambda count: None)
    assert [shard.first for shard, fault in cache.faults() if not fault] == [0]
    with pytest.raises(ValueError, match="infinity in the logits"):
        Filler(cache, batches(), lambda *seen: (look(*seen)[0] * 1e4, look(*seen)[1])).run(lambda count: None)


def test_measures_before_it_starts(tmp_path: Path) -> None:
    cache = Cache.create(tmp_path / "cache", MANIFEST)
    watched = Watched()
    assert Filler(cache, batches(), watched).images_per_second() > 0
    assert watched.seen.keys() == {(0, row) for row in range(10)}
    assert len(cache.missing()) == 6
    whole = batches()
    whole.batch_size = 23  # a single batch is looked at again
    assert Filler(cache, whole, watched).images_per_second() > 0
