"""`attention-transfer caffe lmdb`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attention_transfer._colours import print_safely
from attention_transfer._extras import require
from attention_transfer._files import new_folder, remove_written
from attention_transfer.cli.caffe import VERBS
from attention_transfer.cli.output import StatusLine
from attention_transfer.cli.parsing import PROGRAM, UsageError, parse, verb_parser

if TYPE_CHECKING:
    import numpy as np

    from attention_transfer.data import Images, Splits, StreamedImages

FIRST_SIZE = 64 << 20  # bytes of the map; it is doubled whenever it is full
CHUNK = 1000  # records of one transaction


def run(arguments: list[str]) -> None:
    flags = parse(_parser(), arguments)
    if flags.pad < 0 or (flags.limit is not None and flags.limit < 1):
        raise UsageError("caffe lmdb: expected --pad of 0 or more and --limit of 1 or more.")
    for path in filter(None, (flags.output, flags.mean)):
        if path.exists():
            raise UsageError(f"caffe lmdb: {path} exists, so it stays. Remove it, or pass another path.")
    from attention_transfer.data import load_data

    require("lmdb", extra="caffe", user="caffe lmdb")
    splits = load_data(flags.data, root=flags.root, validation=0, image_size=flags.image_size)
    images = splits.train if flags.split == "train" else splits.test
    records = _Records(images, _order(len(images), flags), _background(splits), flags.pad)
    total = _write(flags.output, records)
    if flags.mean:
        _write_mean(total / len(records), flags.mean)
    for note in splits.notes:
        print_safely(f"note: {note}", stream=sys.stderr)
    shape = " x ".join(map(str, records.shape))
    print_safely(
        f"{flags.output}: {len(records):,} images of {shape} (c, h, w), {splits.num_classes} classes"
    )
    print_safely(f"transform_param {{ {' '.join(f'mean_value: {v:.2f}' for v in _channel_means(splits))} }}")


def _parser() -> Any:
    usage = f"{PROGRAM} caffe lmdb --data cifar10 --split train --pad 4 -o cifar10_train.lmdb"
    parser = verb_parser("caffe lmdb", usage, VERBS["lmdb"])
    parser.add_argument("--data", required=True, help="A known name, a folder of class folders, or parquet.")
    parser.add_argument("--split", choices=("train", "test"), required=True, help="Which images.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="The LMDB, a folder to be made.")
    parser.add_argument("--root", help="The only folder to look for a named data set in.")
    parser.add_argument("--image-size", type=int, help="Resize the shorter side, and keep the middle square.")
    parser.add_argument(
        "--pad",
        type=int,
        default=0,
        help="Pixels of the mean colour around each image, for random crops of the old size.",
    )
    parser.add_argument("--limit", type=int, help="Write only so many images.")
    parser.add_argument(
        "--seed", type=int, default=0, help="Of the order: a Data layer reads one after another."
    )
    parser.add_argument("--keep-order", action="store_true", help="Leave the images in their order.")
    parser.add_argument("--mean", type=Path, help="Write the mean of the images here, as .binaryproto.")
    return parser


def _order(count: int, flags: Any) -> Sequence[int]:
    import numpy as np

    order = np.arange(count) if flags.keep_order else np.random.default_rng(flags.seed).permutation(count)
    return order[: flags.limit].tolist()


def _channel_means(splits: Splits) -> list[float]:
    """Of the training images, 0 to 255, in the order blue, green, red."""
    return [255 * mean for mean in reversed(splits.mean)]


def _background(splits: Splits) -> list[int]:
    return [round(mean) for mean in _channel_means(splits)]


@dataclass(frozen=True)
class _Records:
    """Images as Caffe stores them: uint8 (c, h, w), blue before green before red, with a border."""

    images: Images | StreamedImages
    order: Sequence[int]
    background: list[int]
    pad: int

    def __len__(self) -> int:
        return len(self.order)

    @property
    def shape(self) -> tuple[int, int, int]:
        c, h, w = self.images.shape
        return c, h + 2 * self.pad, w + 2 * self.pad

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        import numpy as np
        import torch

        from attention_transfer.data import Images

        chosen = self.images.select(torch.tensor(self.order))  # of streamed ones: without random crops
        inside = slice(self.pad, -self.pad or None)
        for place, label in enumerate(chosen.labels.tolist()):
            pixels = chosen.images[place] if isinstance(chosen, Images) else chosen.decode(place)
            framed = np.empty(self.shape, dtype=np.uint8)
            framed[:] = np.array(self.background)[:, None, None]
            framed[:, inside, inside] = pixels.numpy()[::-1]
            yield framed, label


def _write(path: Path, records: _Records) -> np.ndarray:
    """Write all records into a folder that appears when it is whole; the sum of the images.

    Raises:
        OSError: if it cannot be written.
    """
    import lmdb

    with new_folder(path) as folder:
        try:
            total = _fill(folder, records)
        # guard: lmdb-write-fails
        except lmdb.Error as error:
            raise OSError(f"caffe lmdb: could not write {path}: {error}. Nothing is left of it.") from None
        remove_written(folder, ["lock.mdb"])
    return total


def _fill(folder: Path, records: _Records) -> np.ndarray:
    import lmdb
    import numpy as np

    from attention_transfer.caffe import schema

    line, total, done = StatusLine(), np.zeros(records.shape, dtype=np.float64), 0
    c, h, w = records.shape
    content = iter(records)
    with lmdb.open(str(folder), map_size=FIRST_SIZE, mode=0o666) as environment:
        while chunk := list(islice(content, CHUNK)):
            items = []
            for number, (pixels, label) in enumerate(chunk, done):
                datum = schema.Datum(channels=c, height=h, width=w, data=pixels.tobytes(), label=label)
                items.append((f"{number:08d}".encode(), datum.SerializeToString()))
                total += pixels
            _put(environment, items)
            done += len(chunk)
            line.show(f"{done:,} of {len(records):,} images")
    line.clear()
    return total


def _put(environment: Any, items: Sequence[tuple[bytes, bytes]]) -> None:
    """Add records in one transaction, in a map that grows until they fit."""
    import lmdb

    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in items:
                    transaction.put(key, value, append=True)
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])


def _write_mean(mean: np.ndarray, path: Path) -> None:
    import numpy as np

    from attention_transfer.caffe.files.caffemodel import array_blob, write_binary

    write_binary(array_blob(mean[None].astype(np.float32)), path)
