"""Tar shards and parquet row groups: real files, their order, interrupted trainings, what can be wrong."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save

from attention_transfer.cli import main
from attention_transfer.data import (
    Batches,
    StreamedImages,
    data_fingerprint,
    load_data,
    parquet,
    tar_index,
    tars,
)
from attention_transfer.data.decode import EncodedFiles, Stretches
from attention_transfer.data.order import Layout
from attention_transfer.data.tar_index import INDEX
from attention_transfer.runs import Recipe, Run
from attention_transfer.training.callbacks import StopOnSignal

pytestmark = [
    pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    return home


# --- making shards ---


def png(number: int) -> bytes:
    """An image that carries its number."""
    pixels = np.full((6, 6, 3), 100, dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = number % 256, number // 256
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def numbered(first: int, count: int) -> list[tuple[str, bytes]]:
    """Images whose labels alternate."""
    members = []
    for i in range(first, first + count):
        members += [(f"{i:04}.png", png(i)), (f"{i:04}.cls", str(i % 2).encode())]
    return members


def make_shards(root: Path, shards: int = 6, count: int = 20) -> Path:
    for i in range(shards):
        write_tar(root / f"train-{i:03}.tar", numbered(i * count, count))
    return root


def shards_of_folder(folder: Path, root: Path, size: int = 25) -> Path:
    """The images of class folders in their order, so that both are one data set."""
    classes = sorted(entry.name for entry in folder.iterdir())
    files = [
        (label, file) for label, name in enumerate(classes) for file in sorted((folder / name).iterdir())
    ]
    for start in range(0, len(files), size):
        members = []
        for label, file in files[start : start + size]:
            key = f"{file.parent.name}/{file.stem}"
            members += [
                (f"{key}.png", file.read_bytes()),
                (f"{key}.json", json.dumps({"label": label}).encode()),
            ]
        write_tar(root / f"{start:03}.tar", members)
    (root / "classes.txt").write_text("\n".join(classes))
    return root


@pytest.fixture
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "STRETCH_BYTES", 8 << 10)  # four or five images
    monkeypatch.setattr(tars, "WINDOW", 4)


def numbers(images: torch.Tensor) -> list[int]:
    """Of whole images; a crop of them shows the same."""
    return (images[:, 0, 0, 0].long() + 256 * images[:, 1, 0, 0].long()).tolist()


# --- the same data set ---


@pytest.mark.parametrize("stream", [False, True])
def test_shards_are_the_data_set_of_the_class_folders(
    image_folder: Path, tmp_path: Path, stream: bool
) -> None:
    options = {"stream": stream, "image_size": 16 if stream else None}
    folder = load_data(image_folder, **options)
    shards = load_data(shards_of_folder(image_folder, tmp_path / "shards"), **options)
    assert (shards.classes, shards.mean, shards.std, shards.notes) == (
        folder.classes, folder.mean, folder.std, folder.notes,
    )  # fmt: skip
    for name in ("train", "validation", "test"):
        ours, theirs = getattr(shards, name), getattr(folder, name)
        assert torch.equal(ours.labels, theirs.labels)
        for row in (0, len(ours) - 1) if stream else ():
            assert torch.equal(ours.decode(row, epoch=3), theirs.decode(row, epoch=3))
        assert stream or torch.equal(ours.images, theirs.images)


def test_splits_by_folder_and_by_name(tmp_path: Path) -> None:
    for name, count in (("imagenet1k-train-00", 12), ("val/00", 4), ("imagenet1k-test-0", 6)):
        write_tar(tmp_path / f"{name}.tar", numbered(0, count))
    splits = load_data(tmp_path)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (12, 4, 6)
    assert splits.classes == ["0", "1"]
    assert (
        len(load_data(tmp_path / "val" / "00.tar", validation=0).train) == 3
    )  # of the file alone, a training set


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("train-{000..002}", 30), ("train-*", 40), ("train-00[01]", 20), ("{train-003,train-001}", 20)],
)
def test_patterns(tmp_path: Path, pattern: str, count: int) -> None:
    splits = load_data(f"{make_shards(tmp_path, 4, 10)}/{pattern}.tar", validation=0)
    assert len(splits.train) + len(splits.test) == count


def test_a_pattern_of_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"files by the pattern .*, got none called .*train-004\.tar"):
        load_data(f"{make_shards(tmp_path, 4, 10)}/train-{{002..005}}.tar")


def test_a_pattern_is_part_of_a_recipe_that_works_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(data="flowers/train-{0..3}.tar")
    assert recipe.resolved().data == f"{tmp_path}/flowers/train-{{0..3}}.tar"
    assert recipe.folder == Path("runs/flowers-wrn-16-1-at-0")


def test_labels_in_json_and_other_members(tmp_path: Path) -> None:
    members = []
    for i in range(8):
        facts = {"label": 1, "mine": i % 2, "caption": "x" * 100}
        members += [
            (f"a/{i}.txt", b"text"),
            (f"a/{i}.JPEG", png(i)),
            (f"a/{i}.json", json.dumps(facts).encode()),
        ]
    write_tar(tmp_path / "train.tar", [*members, ("._a.jpg", b"a Mac's"), ("README", b"")])
    with pytest.raises(ValueError, match=r"at least two classes"):
        load_data(tmp_path)
    splits = load_data(tmp_path, label_column="mine")  # not the index that was made for "label"
    assert [i % 2 for i in numbers(splits.train.images)] == splits.train.labels.tolist()


def test_members_with_other_endings_are_known_by_their_content(tmp_path: Path) -> None:
    members = numbered(0, 10)
    for key, ending in (("b", ".jfif"), ("a", ""), ("c", ".apng")):
        members += [(f"{key}.cls", b"1"), (f"{key}.txt", b"P6 of it"), (f"{key}{ending}", png(len(members)))]
    members += [
        ("facts.json", b'{"made": 2020}'),
        ("facts.md", b"for all of them"),
        ("0000.txt", b"a caption"),
    ]
    images = load_data(write_tar(tmp_path / "train.tar", members), validation=0, seed=3)
    found = numbers(torch.cat([images.train.images, images.test.images]))
    assert sorted(found) == [*range(10), 20, 23, 26]
    write_tar(tmp_path / "heic.tar", [*numbered(0, 10), ("x.heic", b"\0\0\0\x18ftypheic"), ("x.cls", b"1")])
    with pytest.raises(
        ValueError, match=r"expected an image for every label, of JPEG, .*member x\.heic\. Conv"
    ):
        load_data(tmp_path / "heic.tar")


def test_two_shards_may_have_the_same_keys(tmp_path: Path) -> None:
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", numbered(0, 10))
    assert (
        sum(len(part) for part in (load_data(tmp_path, validation=0).train, load_data(tmp_path).test)) == 20
    )


def test_where_shards_lie_makes_no_difference(tmp_path: Path) -> None:
    options = {"stream": True, "image_size": 6}
    one = data_fingerprint(load_data(make_shards(tmp_path / "one", 2), **options).train)
    assert one == data_fingerprint(load_data(make_shards(tmp_path / "two", 2), **options).train)
    assert one != data_fingerprint(load_data(make_shards(tmp_path / "three", 3), **options).train)


# --- the index ---


def overwrite(path: Path, data: bytes, at: int = 0, *, later: int = 0) -> None:
    """Change a file's content, and say when."""
    found = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + later))


def test_headers_are_read_once(tmp_path: Path) -> None:
    load_data(make_shards(tmp_path))
    overwrite(tmp_path / "train-001.tar", b"x" * 200)  # a header that nobody looks at again
    assert len(load_data(tmp_path, validation=0).train) == 96
    overwrite(tmp_path / "train-001.tar", b"x", later=1)
    with pytest.raises(ValueError, match=r"whole, uncompressed tar file, got .*train-001\.tar \("):
        load_data(tmp_path)


def test_the_index_is_elsewhere_where_the_folder_cannot_be_written(tmp_path: Path, _own_home: Path) -> None:
    (make_shards(tmp_path) / INDEX).mkdir()
    load_data(tmp_path)
    overwrite(tmp_path / "train-001.tar", b"x" * 200)
    assert len(load_data(tmp_path, validation=0).train) == 96
    assert len(list((_own_home / ".cache" / "attention-transfer").iterdir())) == 1


@pytest.mark.parametrize("damage", [b"", b"nothing of the kind", None])
def test_a_damaged_index_is_made_anew(tmp_path: Path, damage: bytes | None) -> None:
    load_data(make_shards(tmp_path))
    index = tmp_path / INDEX
    index.write_bytes(index.read_bytes()[:500] if damage is None else damage)
    assert len(load_data(tmp_path, validation=0).train) == 96
    assert index.stat().st_size > 1000


def no_rows(facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    facts["shards"][0][3] = -1


def more_rows(facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    facts["shards"][0][3] = 1 << 40


def beyond(facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    arrays["sizes"][5] = 1 << 50


def before(facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    arrays["offsets"][5] = -512


def broken_number(facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    arrays["labels"] = arrays["labels"] / 2


def one_name_less(facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    arrays["names"][-1] = 65


def of_two_axes(facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    arrays["offsets"] = arrays["offsets"][None]


def without_labels(facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    del arrays["labels"]


@pytest.mark.parametrize(
    "change",
    [
        no_rows,
        more_rows,
        beyond,
        before,
        broken_number,
        one_name_less,
        of_two_axes,
        without_labels,
    ],
)
def test_an_index_that_contradicts_itself_or_its_files_is_no_index(tmp_path: Path, change: Any) -> None:
    """It comes with the data, from anyone; the stamps fit, so nothing else would be looked at."""
    expected = load_data(make_shards(tmp_path), validation=0).train
    index = tmp_path / INDEX
    right = index.read_bytes()
    with safe_open(index, framework="np") as file:
        facts = json.loads(file.metadata()[tar_index.KEY])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(facts, arrays)
    index.write_bytes(save(arrays, {tar_index.KEY: json.dumps(facts)}))
    found = load_data(tmp_path, validation=0).train
    assert torch.equal(found.labels, expected.labels) and torch.equal(found.images, expected.images)
    assert index.read_bytes() == right


def test_what_was_looked_through_before_an_error_is_kept(tmp_path: Path) -> None:
    make_shards(tmp_path)
    last = tmp_path / "train-005.tar"
    whole = last.read_bytes()
    last.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="train-005"):
        load_data(tmp_path)
    last.write_bytes(whole)
    overwrite(tmp_path / "train-000.tar", b"x" * 200)
    assert len(load_data(tmp_path, validation=0).train) == 96


def bytes_read() -> int:
    counts = Path("/proc/self/io")
    if not counts.is_file():
        pytest.skip("no /proc/self/io")
    return int(re.search(r"rchar: (\d+)", counts.read_text())[1])


def test_opening_reads_headers_and_labels_only(tmp_path: Path) -> None:
    big = png(0) + bytes(200_000)
    members = [
        (f"{i}.{end}", big if end == "png" else b"%d" % (i % 2)) for i in range(40) for end in ("png", "cls")
    ]
    path = write_tar(tmp_path / "train.tar", members)
    before = bytes_read()
    shard = tar_index.scan(path, None)
    assert len(shard.labels) == 40
    assert bytes_read() - before < 40 * 1200 + 40_000  # two headers and a label each; what is behind the end
    content = tars.TarMembers([path], [shard])
    before = bytes_read()
    assert content.read(7) == big
    assert bytes_read() - before < 210_000


# --- what can be wrong ---


def image_and_label(name: str = "a", label: bytes = b"0") -> list[tuple[str, bytes]]:
    return [(f"{name}.png", png(0)), (f"{name}.cls", label)]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], r"expected images \(KEY\.jpg, KEY\.png, \.\.\.\) in .*x\.tar, got none"),
        ([("n01.tar", b"")], r"expected images .* in .*x\.tar, got none"),
        ([("a.png", png(0))], r"a label for every image, got none: .*x\.tar, member a\.png\. Add a \.cls"),
        ([("a.png", png(0)), ("a.json", b'{"id": 3}')], r"a \.json file without one: .*label_column"),
        ([*image_and_label(), ("a.jpg", png(0))], r"one image a key, got a\.png too: .*member a\.jpg"),
        ([*image_and_label(), *image_and_label()], r"one image a key, got a\.png too: .*member a\.png"),
        ([*image_and_label(), ("a.cls", b"0")], r"one file of a name, got it twice: .*x\.tar, member a\.cls"),
        ([*image_and_label(), ("a.json", b'{"label": 1}')], r"got 0 in \.cls and 1 in \.json: .*a\.png"),
        (image_and_label(label=b"cat"), r"whole number as label, got 'cat': .*x\.tar, member a\.cls\. N"),
        ([("a.png", png(0)), ("a.json", b'{"label": "cat"}')], r"whole number .*got 'cat': .*a\.json"),
        ([("a.png", png(0)), ("a.json", b'{"label": true}')], r"whole number as label, got True: .*a\.json"),
        ([("a.png", png(0)), ("a.json", b'{"label": ')], r"whole number as label, got '{\"label\": '"),
        (image_and_label(label=b"9" * 30), r"whole number as label, got 9999"),
        (image_and_label(label=b"12345678"), r"labels that number the classes from 0, got 12345678"),
        (image_and_label(label=b"7" * (2 << 20)), r"a small file with a label, got another thing: .*a\.cls"),
        (image_and_label("../../etc/a"), r"a path that leads elsewhere: .*member \.\./\.\./etc/a\.png"),
        (image_and_label("/etc/a"), r"plain names, got a path that leads elsewhere: .*member /etc/a\.png"),
        ([("a.left.png", png(0))], r"up to its first dot, got several dots: .*x\.tar, member a\.left\.png"),
        ([("a\n\x1b[1m.png", png(0))], r"got none: .*member 'a\\n\\x1b\[1m\.png'"),
        ([*image_and_label(), ("b.png", b"no image"), ("b.cls", b"1")], r"decode .*x\.tar, member b\.png"),
        ([*image_and_label(), ("b.png", b""), ("b.cls", b"1")], r"got no bytes in .*x\.tar, member b\.png"),
        (image_and_label(label=b"-1"), r"labels 0 to 0 .*got -1 to -1"),
    ],
)  # fmt: skip
def test_each_fault_is_one_line_that_names_shard_and_member(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(ValueError, match=f"^load_data: .*{message}") as caught:
        load_data(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["symlink", "hard link"])
def test_links_are_refused(tmp_path: Path, kind: str) -> None:
    path = write_tar(tmp_path / "x.tar", image_and_label())
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("b.png")
        info.type, info.linkname = tarfile.SYMTYPE if kind == "symlink" else tarfile.LNKTYPE, "a.png"
        tar.addfile(info)
    with pytest.raises(ValueError, match=r"images stored as they are, got a link: .*x\.tar, member b\.png"):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("cut", "detail"),
    [
        (0, "empty file"),
        (100, "truncated header"),
        (512 + 10, "unexpected end of data"),
        (6 * 512, "without the mark of its end"),
        (6 * 512 + 100, "without the mark of its end"),
    ],
)
def test_truncated_tar_files(tmp_path: Path, cut: int, detail: str) -> None:
    path = write_tar(tmp_path / "x.tar", numbered(0, 20))
    assert (
        path.stat().st_size == 20 * 4 * 512 + 10240 - (20 * 4 * 512) % 10240
    )  # an image, a label: two blocks each
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=rf"whole, uncompressed tar file, got .*x\.tar \(.*{detail}"):
        load_data(tmp_path)


def test_damage_in_the_middle_does_not_end_a_tar_file(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", numbered(0, 20))
    overwrite(path, b"x" * 512, at=8 * 512)
    with pytest.raises(ValueError, match=r"x\.tar \(from byte 4,096 on there is something else than members"):
        load_data(tmp_path)


def test_tar_files_joined_by_cat_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", numbered(0, 20))
    path.write_bytes(2 * path.read_bytes())
    with pytest.raises(ValueError, match="something else than members"):
        load_data(tmp_path)


def test_compressed_tar_files_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", numbered(0, 20))
    (tmp_path / "zipped" / "x.tar.gz").parent.mkdir()
    (tmp_path / "zipped" / "x.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"tar files that are not compressed, got .*x\.tar\.gz\. Decompress"):
        load_data(tmp_path / "zipped")
    path.write_bytes((tmp_path / "zipped" / "x.tar.gz").read_bytes())
    with pytest.raises(ValueError, match=r"expected a whole, uncompressed tar file, got .*x\.tar \("):
        load_data(path)


def test_class_names(tmp_path: Path) -> None:
    (make_shards(tmp_path) / "classes.txt").write_text("cat\n")
    with pytest.raises(
        ValueError, match=r"names of classes 0 to 1 in .*classes\.txt, a line each, got 1\. Add"
    ):
        load_data(tmp_path)
    (tmp_path / "classes.txt").write_bytes(b"caf\xe9\ndog\n")
    with pytest.raises(ValueError, match=r"expected UTF-8 text in .*classes\.txt"):
        load_data(tmp_path)


def test_shards_beside_class_folders_are_refused(tmp_path: Path) -> None:
    (make_shards(tmp_path) / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(png(1))
    with pytest.raises(
        ValueError, match=r"tar files or class folders in .*, got both \(.*tar and .*1\.png\)\. Move"
    ):
        load_data(tmp_path)
    assert len(load_data(f"{tmp_path}/train-*.tar", validation=0).train) == 96


def test_mixed_names_are_refused(tmp_path: Path) -> None:
    make_shards(tmp_path)
    write_tar(tmp_path / "more.tar", numbered(0, 4))
    with pytest.raises(
        ValueError, match=r"every tar file in .* named after its split, got more\.tar\. Put train"
    ):
        load_data(tmp_path)


@pytest.mark.parametrize("url", ["https://x.org/train-{0..9}.tar", "s3://bucket/imagenet", "pipe:cat x.tar"])
def test_urls_are_refused(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", url, "--accelerator", "cpu"]) == 2
    error = capsys.readouterr().err
    assert f"files on a disk of this machine, got {url}. Download it first, or mount the store" in error
    assert error.count("\n") == 1


# --- order ---


@pytest.fixture
def streamed(tmp_path: Path, short_stretches: None) -> StreamedImages:
    """120 images in 6 shards, in stretches of a few."""
    return load_data(make_shards(tmp_path / "shards"), validation=0, image_size=6, stream=True).train


def flat(batches: list[torch.Tensor]) -> list[int]:
    return torch.cat(batches).tolist()


def test_the_order_is_a_permutation_of_its_own_in_every_epoch(streamed: StreamedImages) -> None:
    one, other = (Batches(streamed, 8, shuffle=True, seed=3) for _ in range(2))
    first, second = flat(one.rows(0)), flat(one.rows(1))
    assert sorted(first) == sorted(second) == list(range(96))
    assert first != second
    assert first == flat(other.rows(0))
    assert first != flat(Batches(streamed, 8, shuffle=True, seed=4).rows(0))


def test_a_window_of_the_order_reads_few_stretches_from_all_over(streamed: StreamedImages) -> None:
    layout = streamed.layout()
    count = int(layout.stretch.max()) + 1
    assert 20 < count < 40
    order, _ = layout.shuffle(torch.Generator().manual_seed(0))
    seen = layout.stretch[order]
    windows, start = [], 0
    while start < len(seen):
        end = start
        while end < len(seen) and len(set(seen[start : end + 1].tolist())) <= 4:
            end += 1
        windows.append(seen[start:end].tolist())
        start = end
    assert len(windows) == -(-count // 4)
    assert any(window != sorted(window) for window in windows)
    assert max(max(window) - min(window) for window in windows) > 10  # from all over the disk


def test_layout_shuffles_every_image_and_both_levels() -> None:
    layout = Layout(torch.arange(1000) // 10, window=5)
    order, placed = layout.shuffle(torch.Generator().manual_seed(1))
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert torch.equal(placed.stretch[order] // 5, torch.arange(1000) // 50)
    within = order[:50]
    assert within[:10].unique().numel() == 10 and len(layout.stretch[within[:10]].unique()) > 2


def test_few_images_of_many_are_in_any_order(streamed: StreamedImages) -> None:
    assert streamed.layout() is not None
    assert streamed.select(torch.arange(0, 96, 3)).layout() is None
    assert streamed.select(torch.arange(0, 20)).layout() is not None  # all of some stretches


def test_two_processes_of_two_workers_see_each_image_once(streamed: StreamedImages) -> None:
    ranks = [Batches(streamed, 8, shuffle=True, rank=r, world_size=2, workers=2) for r in range(2)]
    seen = [[numbers(images) for images, _ in batches] for batches in ranks]
    source = [int(i) for i in streamed.rows]
    assert sorted(n for rank in seen for batch in rank for n in batch) == source
    whole = Batches(streamed, 16, shuffle=True).rows(0)  # the same global batches as in one process
    for step, expected in enumerate(whole):
        assert {n for rank in seen for n in rank[step]} == {source[row] for row in expected.tolist()}


def test_each_process_knows_which_images_of_the_whole_batch_are_its_own(streamed: StreamedImages) -> None:
    """By which it draws their flips, so that each image looks as it would in one process."""
    whole = Batches(streamed, 16, shuffle=True)
    for rank in range(2):
        batches = Batches(streamed, 8, shuffle=True, rank=rank, world_size=2)
        for epoch in (1, 0):
            for index, (ours, all_of_them) in enumerate(
                zip(batches.rows(epoch), whole.rows(epoch), strict=True)
            ):
                assert torch.equal(all_of_them[batches.share(epoch, index)], ours)


def test_processes_read_other_stretches() -> None:
    """With windows of 4 stretches and 4 processes, each reads a quarter of them, and some more."""
    images = StreamedImages(_Placed(4000), torch.arange(4000), torch.zeros(4000, dtype=torch.int64), 6)
    stretch = images.layout().stretch
    touched = [
        {
            int(s)
            for rows in Batches(images, 50, shuffle=True, rank=r, world_size=4).rows(0)
            for s in stretch[rows]
        }
        for r in range(4)
    ]
    assert set().union(*touched) == set(range(100))
    assert sum(map(len, touched)) < 100 * 2.5  # 400 if dealt out like cards
    first = Batches(images, 50, shuffle=True, rank=0, world_size=4)
    lower = sum(int(s) < 50 for rows in first.rows(0) for s in stretch[rows]) / 1000
    assert 0.3 < lower < 0.7  # and not always the first part of the data


class _Placed(EncodedFiles):
    """Rows on a disk, in stretches of 40; there is nothing to read."""

    def __init__(self, count: int) -> None:
        super().__init__([])
        self.stretches = Stretches(torch.arange(40, count + 1, 40), window=4, whole=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_in_the_middle_of_an_epoch(streamed: StreamedImages, workers: int) -> None:
    whole = Batches(streamed, 8, shuffle=True, workers=workers)
    expected = [images for images, _ in whole]
    begun = Batches(streamed, 8, shuffle=True, workers=workers)
    iterator = iter(begun)
    for _ in range(5):
        next(iterator)
    resumed = Batches(streamed, 8, shuffle=True, workers=2 - workers)
    resumed.load_state_dict(begun.state_dict())
    rest = [images for images, _ in resumed]
    assert len(rest) == 7
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(rest, expected[5:], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_or_changes_during_training_is_one_line(tmp_path: Path, workers: int) -> None:
    images = load_data(make_shards(tmp_path, 2), validation=0, image_size=6, stream=True).train
    images = pickle.loads(pickle.dumps(images))  # as another process has it, with no file open
    path = tmp_path / "train-001.tar"
    overwrite(path, b"x", later=1)
    with pytest.raises(
        ValueError, match=r"^load_data: .*train-001\.tar was changed .*Leave the data"
    ) as caught:
        list(Batches(images, 4, shuffle=True, workers=workers))
    assert "\n" not in str(caught.value)
    path.unlink()
    images = pickle.loads(pickle.dumps(images))
    with pytest.raises(
        ValueError, match=r"^load_data: cannot read .*train-001\.tar, member \d+\.png \(No such file"
    ):
        list(Batches(images, 4, shuffle=True, workers=workers))


def test_stretches_are_read_ahead_where_most_of_them_is_wanted(streamed: StreamedImages) -> None:
    content = streamed.encoded
    list(Batches(streamed, 8, shuffle=True, workers=0))
    read = content._read_ahead.cache_info().misses
    assert read == len(set(streamed.layout().stretch.tolist()))  # each once
    list(Batches(streamed.select(torch.arange(0, 96, 3)), 8, shuffle=True, workers=0))
    assert content._read_ahead.cache_info().misses == read


# --- the verbs ---


def flags(data: Path, **more: object) -> list[str]:
    values = {
        "data": data, "student": "wrn-10-1", "image-size": 16, "epochs": 2, "batch-size": 10,
        "num-workers": 1, "accelerator": "cpu", "precision": "32-true", **more,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def weights(folder: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Run(Path(folder)).student_weights)


def test_train_is_interrupted_and_resumed_and_a_cache_is_built_and_learnt_from(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_stretches: None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("attention_transfer.data.loading.IN_MEMORY_BYTES", 0)
    data = shards_of_folder(image_folder, tmp_path / "shards")
    alone = flags(data, method="none")
    assert main(["train", *alone, "--output", "whole"]) == 0
    original = StopOnSignal.on_train_batch_end

    def hook(self: StopOnSignal, trainer, *rest) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step == 6:
            signal.raise_signal(signal.SIGINT)
        original(self, trainer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "on_train_batch_end", hook)
        assert main(["train", *alone, "--output", "begun"]) == 130
    assert not Run(Path("begun")).finished
    assert main(["train", "--resume", "begun"]) == 0
    ours, theirs = weights("begun"), weights("whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    common = ["--data", str(data), "--image-size", "16", "--accelerator", "cpu", "--precision", "32-true"]
    assert main(["cache", "build", *common, "--teacher", "whole", "-o", "cache", "--views", "2"]) == 0
    assert main(["train", *flags(data, cache="cache", epochs=1), "--output", "taught"]) == 0
    assert Run(Path("taught")).result["method"] == "at"


# --- parquet ---


def make_parquet(path: Path, groups: int = 12, rows: int = 10, pad: int = 20_000) -> Path:
    """Images that carry their number, and are made large by what follows them."""
    random = np.random.default_rng(0)
    images = [{"bytes": png(i) + random.bytes(pad), "path": None} for i in range(groups * rows)]
    table = pa.table({"image": images, "label": [i % 2 for i in range(groups * rows)]})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return path


def test_parquet_is_read_by_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "GROUPS_BYTES", 700_000)  # three of them
    path = make_parquet(tmp_path / "train-00000-of-00001.parquet")
    group = path.stat().st_size // 12
    before = bytes_read()
    content = parquet.read_parquet([path], tmp_path).splits["train"].content
    assert bytes_read() - before < group
    before = bytes_read()
    assert content.read(57).startswith(png(57))
    assert content.read(58).startswith(png(58))
    assert group * 0.9 < bytes_read() - before < group * 1.2
    for row in range(120):
        assert content.read(row).startswith(png(row))
    assert content._images.cache_info().currsize == content.stretches.window + 1 == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_parquet_in_the_order_of_its_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(parquet, "GROUPS_BYTES", 700_000)
    for i in range(2):
        make_parquet(tmp_path / f"train-0000{i}-of-00002.parquet", 6)
    splits = load_data(tmp_path, validation=0, image_size=6, stream=True)
    train = pickle.loads(pickle.dumps(splits.train))
    batches = Batches(train, 8, shuffle=True, workers=workers)
    seen = [label for _, labels in batches for label in labels.tolist()]
    assert len(seen) == len(train) == 96
    assert seen != train.labels.tolist()
    if workers == 0:  # each row group was read about once, by windows of three
        assert train.encoded._images.cache_info().misses <= 12 + 3


def test_parquet_that_changes_or_vanishes_is_one_line(tmp_path: Path) -> None:
    path = make_parquet(tmp_path / "train.parquet")
    images = load_data(tmp_path, validation=0, image_size=6, stream=True).train
    images = pickle.loads(pickle.dumps(images))
    overwrite(path, b"x", at=100, later=1)
    with pytest.raises(ValueError, match=r"^load_data: .*train\.parquet was changed"):
        images.decode(0)
    path.unlink()
    with pytest.raises(ValueError, match=r"^load_data: cannot read .*train\.parquet, row 0 \(No such file"):
        images.decode(0)


# --- documentation ---


def test_the_snippet_of_the_documentation_makes_shards(image_folder: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "large-data.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    command = [sys.executable, "-W", "error", "-c", code, str(image_folder), str(tmp_path / "shards")]
    subprocess.run(command, check=True)
    splits = load_data(tmp_path / "shards")
    assert splits.classes == ["blue", "green", "red"]
    assert torch.equal(splits.test.images.flatten(2).float().mean(2).argmax(1), splits.test.labels)
