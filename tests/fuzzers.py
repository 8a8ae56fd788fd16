# ruff: noqa: E501 (odd text, each on its line)
"""A reader for each kind of file, with valid files to begin from; `test_fuzz.py` gives them damaged ones.

As a program it lets atheris look for input that reaches new code of this package:

    python tests/fuzzers.py READER RUNS FOLDER
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import socket
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile_pickles import in_archive
from torch import nn

ROOT = Path(__file__).resolve().parents[1]


class Unclear(AssertionError):  # noqa: N818 (it is what a fuzzer looks for)
    """A reader answered damaged input with something else than a clear error."""


@dataclass(frozen=True)
class Reader:
    """Reads a file called `name`; `seeds` makes valid ones, in an empty folder."""

    name: str
    read: Callable[[Path], object]
    seeds: Callable[[Path], list[bytes]]


READERS: dict[str, Reader] = {}


def reader(kind: str, name: str, seeds: Callable[[Path], list[bytes]]) -> Callable[[Any], Any]:
    """Make a function the reader of a kind of file."""

    def enter(read: Callable[[Path], object]) -> Callable[[Path], object]:
        READERS[kind] = Reader(name, read, seeds)
        return read

    return enter


def try_read(kind: str, folder: Path, data: bytes) -> bool:
    """Whether the reader accepts the data; if not, it has said so clearly.

    Raises:
        Unclear: if it has not.
    """
    path = folder / READERS[kind].name
    path.write_bytes(data)
    return try_path(kind, path)


def try_path(kind: str, path: Path) -> bool:
    """The same for what is already there."""
    from attention_transfer.cli import _is_bad_input

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            READERS[kind].read(path)
    except Exception as error:
        if not _is_bad_input(error):
            raise Unclear(f"{kind}: {type(error).__name__}: {error!s:.300}") from error
        if "\n" in str(error) or not (isinstance(error, OSError) or re.match(r"[\w. ]+: ", str(error))):
            raise Unclear(f"{kind}: no clear line: {str(error)!r:.300}") from error
        return False
    return True


def _socket(path: Path) -> None:
    place = os.open(path.parent, os.O_RDONLY)  # the path itself may be too long for a socket
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(f"/proc/self/fd/{place}/{path.name}")
    finally:
        os.close(place)


NO_FILES: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "socket": _socket,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to a pipe": lambda path: (os.mkfifo(path.parent / "pipe"), path.symlink_to(path.with_name("pipe"))),
}
"""What may lie in the place of a file, has no end, and is not to be waited for."""


# Weights, runs, recipes


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def _weights(folder: Path) -> list[bytes]:
    from attention_transfer.models import save_weights

    save_weights(_net(), folder / "a.safetensors", {"attention_transfer": _card()})
    torch.save({"state_dict": _net().state_dict(), "epoch": 3}, folder / "zip.pt")
    torch.save(_net().state_dict(), folder / "old.pt", _use_new_zipfile_serialization=False)
    return [(folder / name).read_bytes() for name in ("a.safetensors", "zip.pt", "old.pt")]


def _card() -> str:
    from attention_transfer.training.card import ModelCard

    return json.dumps(asdict(ModelCard("wrn-10-1", ["a", "b"], 3, [8, 8], [0.5] * 3, [0.5] * 3)))


@reader("weights", "weights", _weights)
def read_weights(path: Path) -> None:
    from attention_transfer.models import load_weights
    from attention_transfer.models.weights import file_fingerprint

    file_fingerprint(path)
    load_weights(_net(), path)


@reader("card", "weights", _weights)
def read_card(path: Path) -> None:
    from attention_transfer.training.card import ModelCard

    ModelCard.read(path)


def _checkpoint(folder: Path) -> list[bytes]:
    from attention_transfer.training.checkpoints import NEEDED

    content: dict[str, Any] = dict.fromkeys(NEEDED, 0) | {"state_dict": _net().state_dict()}
    torch.save(content, folder / "last.ckpt")
    return [(folder / "last.ckpt").read_bytes()]


@reader("checkpoint", "last.ckpt", _checkpoint)
def read_checkpoint(path: Path) -> None:
    from attention_transfer.runs.run import Run
    from attention_transfer.training.checkpoints import checkpoint_to_resume

    (path.parent / "checkpoints").mkdir(exist_ok=True)
    path.replace(path.parent / "checkpoints" / path.name)
    checkpoint_to_resume(Run(path.parent), lambda line: None)


def _checkpoint_pickles(folder: Path) -> list[bytes]:
    torch.save({"state_dict": _net().state_dict(), "keys": {(1, 2.5): {1}, 3: b"text"}}, folder / "zip.pt")
    with zipfile.ZipFile(folder / "zip.pt") as archive:
        return [archive.read("zip/data.pkl")]


@reader("pickle of a checkpoint", "data.pkl", _checkpoint_pickles)
def read_checkpoint_pickle(path: Path) -> None:
    from attention_transfer._reading import check_regular
    from attention_transfer.models import load_weights

    check_regular(path)
    state = _net().state_dict()
    numbers = {str(i): bytes(tensor.nbytes) for i, tensor in enumerate(state.values())}
    weights = path.with_name("weights.pt")
    weights.write_bytes(in_archive(path.read_bytes(), numbers))
    load_weights(_net(), weights)


def _recipes(folder: Path) -> list[bytes]:
    from attention_transfer.runs.recipe import Recipe

    files = sorted((ROOT / "reproductions").glob("*/*.yaml"))[:3]
    return [Recipe().to_yaml().encode(), *(file.read_bytes() for file in files)]


@reader("recipe", "recipe.yaml", _recipes)
def read_recipe(path: Path) -> None:
    from attention_transfer.runs.recipe import Recipe

    Recipe.load(path).to_yaml()


def _tables(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((ROOT / "reproductions").glob("*.yaml"))]


@reader("table", "table1.yaml", _tables)
def read_table(path: Path) -> None:
    from attention_transfer.reproduction.tables import read_library

    read_library(path.parent)


@reader("reproduction", "wrn.yaml", _recipes)
def read_reproduction(path: Path) -> None:
    from attention_transfer.reproduction.tables import _read_reproduction

    _read_reproduction(path)


def _results(folder: Path) -> list[bytes]:
    from attention_transfer.runs.run import NUMBERS

    row = {
        "student": "layer1",
        "teacher": "layer2",
        "weights": {"at": 1.0},
        "student_shape": [1, 2, 3],
        "shares": None,
    }
    return [json.dumps(dict.fromkeys(NUMBERS, 1.5) | {"plan": [row], "seed": 1}).encode()]


@reader("result", "result.json", _results)
def read_result(path: Path) -> None:
    from attention_transfer.runs.run import Run

    _ = Run(path.parent).result


@reader("loggers", "loggers.json", lambda folder: [b'{"wandb": "0123456789abcdef"}'])
def read_loggers(path: Path) -> None:
    from attention_transfer.runs.run import Run
    from attention_transfer.training.loggers import _identities

    _identities(Run(path.parent))


METRICS = b"epoch,step,val/error,train/at/layer1\n1,10,50.5,0.1\n2,20,40.5,\n"


@reader("metrics", "metrics.csv", lambda folder: [METRICS])
def read_metrics(path: Path) -> None:
    from attention_transfer.runs.run import Run

    Run(path.parent).read_metrics()


@reader("report of metrics", "metrics.csv", lambda folder: [METRICS])
def read_report_metrics(path: Path) -> None:
    from attention_transfer.visualize import write_report

    (path.parent / "recipe.yaml").write_text("student: wrn-10-1\nmethod: at\nseed: 0\n")
    write_report([path.parent], path.parent / "report.html")


@reader("report of a result", "result.json", _results)
def read_report_result(path: Path) -> None:
    from attention_transfer.visualize import write_report

    (path.parent / "recipe.yaml").write_text("student: wrn-10-1\nmethod: at\nseed: 0\n")
    (path.parent / "metrics.csv").write_bytes(METRICS)
    write_report([path.parent], path.parent / "report.html")


@reader("report of a recipe", "recipe.yaml", lambda folder: _recipes(folder)[:1])
def read_report_recipe(path: Path) -> None:
    from attention_transfer.visualize import write_report

    write_report([path.parent], path.parent / "report.html")


# Caches


def manifest() -> Any:
    from attention_transfer.cache import Manifest
    from attention_transfer.pairs import Stage

    return Manifest(
        teacher="wrn-10-2", teacher_fingerprint="0" * 16, teacher_input=None, classes=2,
        layers=(Stage("block1", (4, 4, 4), 1.0),), p=2.0, mapping="sum", dtype="float16", precision="32-true",
        data="1" * 16, images=3, shape=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, pad=1, flip=True,
        view_seed=0, views=1, shard_images=3,
    )  # fmt: skip


def _manifests(folder: Path) -> list[bytes]:
    manifest().write(folder)
    return [(folder / "cache.json").read_bytes()]


@reader("manifest", "cache.json", _manifests)
def read_manifest(path: Path) -> None:
    from attention_transfer.cache import Cache

    cache = Cache.read(path.parent)
    assert cache.manifest.identity and cache.layout.bytes and cache.shards(0)


def _shards(folder: Path) -> list[bytes]:
    from attention_transfer.cache import Cache

    cache = Cache.create(folder, manifest())
    (shard,) = cache.shards(0)
    cache.write(shard, torch.zeros(3, cache.layout.bytes, dtype=torch.uint8))
    return [(folder / shard.name).read_bytes()]


@reader("shard", "000000000.safetensors", _shards)
def read_shard(path: Path) -> None:
    from attention_transfer.cache import Cache

    cache = Cache(path.parent, manifest())
    (path.parent / "view-0").mkdir(exist_ok=True)
    path.replace(path.parent / "view-0" / path.name)
    cache.require(1)
    cache.read_maps(torch.arange(3), 0, ["block1"])


def _kept_maps(folder: Path) -> list[bytes]:
    from attention_transfer.visualize.snapshots import Snapshots

    maps = torch.rand(2, 3, 4)
    images = torch.zeros(2, 1, 6, 8, dtype=torch.uint8)
    kept = Snapshots.start(images, torch.tensor([0, 1]), ["a", "b"], ["group0"]).with_teacher([maps])
    kept.add(0, [maps]).add(1, [maps]).save(folder / "kept")
    return [(folder / "kept").read_bytes()]


@reader("kept maps", "maps.safetensors", _kept_maps)
def read_kept_maps(path: Path) -> None:
    from attention_transfer.visualize import write_report

    run = path.parent
    (run / "recipe.yaml").write_text("student: wrn-10-1\nmethod: at\nteacher: wrn-10-1\n")
    write_report([run], run / "report.html")


# Data


def _pictures(folder: Path) -> list[bytes]:
    from PIL import Image

    from attention_transfer._pictures import FORMATS

    pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    found = []
    for kind in FORMATS:
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, kind)
        found.append(data.getvalue())
    return found


@reader("image", "image.png", _pictures)
def read_picture(path: Path) -> None:
    from attention_transfer.data.decode import EncodedFiles, read_image, resize_and_crop

    resize_and_crop(read_image(EncodedFiles([path]), 0, 3), 4)


@reader("image for maps", "image.png", _pictures)
def read_map_picture(path: Path) -> None:
    from attention_transfer.cli.maps import _read_image

    _read_image(str(path), 3, 8)


@reader("file of another ending", "image.odd", _pictures)
def read_odd_file(path: Path) -> None:
    from attention_transfer.data.folder import scan_folder

    scan_folder(path.parent)


def _parquets(folder: Path) -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (image, *_) = _pictures(folder)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    table = pa.table({"image": [{"bytes": image, "path": "x"}] * 4, "label": [0, 1, 0, 1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    found = []
    for compression in ("none", "snappy"):
        data = io.BytesIO()
        pq.write_table(table, data, compression=compression)
        found.append(data.getvalue())
    return found


@reader("parquet", "train.parquet", _parquets)
def read_parquet(path: Path) -> None:
    from attention_transfer.data import load_data

    load_data(path, validation=0)


def _tar(folder: Path) -> bytes:
    (image, *_) = _pictures(folder)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in {
            "a.png": image,
            "a.cls": b"0",
            "ü/b.png": image,
            "ü/b.json": b'{"label": 1}',
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@reader("tar", "train.tar", lambda folder: [_tar(folder)])
def read_tar(path: Path) -> None:
    from attention_transfer.data.loading import find_source

    images = find_source(str(path), None, False).splits["train"].content
    for row in range(len(images)):
        images.name(row)
        images.read(row)


def _indexes(folder: Path) -> list[bytes]:
    from attention_transfer.data.tar_index import INDEX

    read_index(folder / INDEX)
    return [(folder / INDEX).read_bytes()]


@reader("index of tars", "attention-transfer-index.safetensors", _indexes)
def read_index(path: Path) -> None:
    tar = path.with_name("train.tar")
    tar.write_bytes(_tar(path.parent))
    os.utime(tar, ns=(0, 0))  # as the index says
    read_tar(tar)


def _idx(folder: Path) -> list[bytes]:
    return [b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (2, 3, 4)) + bytes(24)]


@reader("idx", "images", _idx)
def read_idx(path: Path) -> None:
    from attention_transfer.data.named import read_idx

    read_idx(path)


@reader("gzipped idx", "images.gz", lambda folder: [gzip.compress(data) for data in _idx(folder)])
def read_gzipped_idx(path: Path) -> None:
    read_idx(path)


# Caffe

NET = """name: "net" layer { name: "in" type: "Input" top: "x" input_param { shape { dim: 2 dim: 3 dim: 4 dim: 4 } } }
layer { name: "conv" type: "Convolution" bottom: "x" top: "c" convolution_param { num_output: 2 kernel_size: 3 pad: 1
  weight_filler { type: "xavier" } } param { lr_mult: 1 } }
layer { name: "relu" type: "ReLU" bottom: "c" top: "c" }
layer { name: "power" type: "Power" bottom: "c" top: "q" power_param { power: 2 } }
layer { name: "at" type: "Python" bottom: "q" top: "y" python_param { module: "m" layer: "Normalize" param_str: "{}" } }
"""
OLD = 'input: "x" input_dim: 1 input_dim: 3 input_dim: 4 input_dim: 4 layers { type: RELU bottom: "x" top: "y" }'
SOLVER = (
    'net: "net.prototxt" base_lr: 0.1 lr_policy: "multistep" stepvalue: 10 max_iter: 20 solver_type: ADAM'
)


@reader("prototxt", "net.prototxt", lambda folder: [NET.encode(), OLD.encode()])
def read_prototxt(path: Path) -> None:
    from attention_transfer.caffe.files.prototxt import layer_lines, read_net, read_text

    read_net(path)
    layer_lines(read_text(path, "read_net"))


@reader("caffe check", "net.prototxt", lambda folder: [NET.encode(), OLD.encode()])
def check_prototxt(path: Path) -> None:
    from attention_transfer import caffe

    caffe.check(path)


@reader("solver", "solver.prototxt", lambda folder: [SOLVER.encode()])
def read_solver(path: Path) -> None:
    from attention_transfer.caffe.files.prototxt import read_solver

    read_solver(path)


def _caffemodels(folder: Path) -> list[bytes]:
    from attention_transfer import caffe
    from attention_transfer.caffe.files.prototxt import parse_net

    return [caffe.Net(parse_net(NET)).to_caffemodel().SerializeToString()]


@reader("caffemodel", "net.caffemodel", _caffemodels)
def read_caffemodel(path: Path) -> None:
    from attention_transfer import caffe
    from attention_transfer.caffe.files.caffemodel import read_caffemodel
    from attention_transfer.caffe.files.prototxt import parse_net

    read_caffemodel(path)
    caffe.Net(parse_net(NET), weights=path)


def _states(folder: Path) -> list[bytes]:
    from attention_transfer.caffe import schema
    from attention_transfer.caffe.files.caffemodel import array_blob

    blobs = [array_blob(np.ones((2, 3), dtype)) for dtype in (np.float32, np.float64)]
    return [schema.SolverState(iter=3, learned_net="a", history=blobs).SerializeToString()]


@reader("solverstate", "a.solverstate", _states)
def read_solverstate(path: Path) -> None:
    from attention_transfer.caffe.files.caffemodel import read_solverstate

    read_solverstate(path)


def _means(folder: Path) -> list[bytes]:
    from attention_transfer.caffe.files.caffemodel import array_blob

    return [array_blob(np.ones((3, 2, 2), np.float32)).SerializeToString()]


@reader("binaryproto", "mean.binaryproto", _means)
def read_mean(path: Path) -> None:
    from attention_transfer.caffe.files.caffemodel import read_mean

    read_mean(path)


def _hdf5(folder: Path) -> list[bytes]:
    import h5py

    with h5py.File(folder / "a.h5", "w") as file:
        file["data"] = np.ones((4, 3), np.float32)
        file.create_dataset("packed", (64, 64), "f4", chunks=(8, 8), compression="gzip")[:] = 1
    return [(folder / "a.h5").read_bytes()]


@reader("hdf5", "a.h5", _hdf5)
def read_hdf5(path: Path) -> None:
    from attention_transfer import caffe
    from attention_transfer.caffe.files.prototxt import parse_net

    (path.parent / "list.txt").write_text(str(path))
    source = f'hdf5_data_param {{ source: "{path.parent / "list.txt"}" batch_size: 2 }}'
    for top in ("data", "packed"):
        net = caffe.Net(parse_net(f'layer {{ name: "d" type: "HDF5Data" top: "{top}" {source} }}'))
        net({})


def _lmdb(folder: Path) -> list[bytes]:
    import lmdb

    from attention_transfer.caffe import schema

    datum, large = (
        schema.Datum(channels=1, height=2, width=2, data=bytes(4)),
        schema.Datum(channels=3, height=50, width=50),
    )
    large.data = bytes(7500)
    with lmdb.open(str(folder / "db"), map_size=1 << 20) as environment:
        with environment.begin(write=True) as transaction:
            for i in range(120):
                transaction.put(f"{i:08}".encode(), (large if i % 20 == 1 else datum).SerializeToString())
    return [(folder / "db" / "data.mdb").read_bytes()]


@reader("lmdb", "data.mdb", _lmdb)
def read_lmdb(path: Path) -> None:
    from attention_transfer.caffe.layers.records import Database, datum_pixels

    (path.parent / "db").mkdir(exist_ok=True)
    path.replace(path.parent / "db" / path.name)
    database = Database(path.parent / "db")
    for datum in database.read(range(len(database))):
        datum_pixels(datum, None, "a record")


@reader("image list", "list.txt", lambda folder: [b"a.png 1\nb c.png 0\n"])
def read_image_list(path: Path) -> None:
    from attention_transfer import caffe
    from attention_transfer.caffe.files.prototxt import parse_net

    source = f'image_data_param {{ source: "{path}" batch_size: 1 root_folder: "{path.parent}/" }}'
    caffe.Net(parse_net(f'layer {{ name: "d" type: "ImageData" top: "x" top: "y" {source} }}'))


IN_C = ("hdf5",)
"""Readers whose library in C may end the process on damaged files."""


def fuzz(kind: str, runs: int, folder: Path) -> None:
    """Let atheris make `runs` inputs for a reader; the process ends with status 0 if all were answered."""
    import atheris

    corpus, work = folder / "corpus", folder / "work"
    corpus.mkdir()
    work.mkdir()
    for number, seed in enumerate(READERS[kind].seeds(work)):
        (corpus / str(number)).write_bytes(seed)
        try_read(kind, work, seed)
    counts = {True: 0, False: 0}

    def one(data: bytes) -> None:
        counts[try_read(kind, work, data)] += 1
        if sum(counts.values()) == runs:
            print(f"{kind}: {runs} inputs, {counts[True]} accepted", flush=True)
            os._exit(0)

    limits = ["-rss_limit_mb=4096", "-timeout=30", "-max_len=65536", "-seed=1", "-verbosity=0"]
    artifacts = f"-artifact_prefix={folder}/"
    atheris.Setup([sys.argv[0], *limits, artifacts, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["attention_transfer"], enable_loader_override=False):
        for module in (
            "cache",
            "caffe",
            "cli",
            "data",
            "models",
            "reproduction.tables",
            "training.fit",
            "visualize",
        ):
            __import__(f"attention_transfer.{module}")
    fuzz(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
