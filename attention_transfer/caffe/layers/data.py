"""Layers that read data from files, or make them up."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from attention_transfer._errors import InputError
from attention_transfer._extras import require
from attention_transfer._reading import check_regular, read_bytes, read_text
from attention_transfer.caffe import schema
from attention_transfer.caffe.layers.base import Layer, register
from attention_transfer.caffe.layers.fillers import fill
from attention_transfer.caffe.layers.records import datum_pixels, decode_image, open_database
from attention_transfer.caffe.layers.transform import DRAWS, Transform

Arrays = list[np.ndarray]

HDF5_UNFOLDED, HDF5_SMALL = 64, 64 << 20  # a data set takes up to so many times the file, or so many bytes

SKIP, FILES, ROWS, BATCH = range(4)  # tell the random streams of a layer apart


class DataLayer(Layer):
    """Gives one batch after another; each is a function of (seed, number of the batch) alone.

    Attributes:
        seed: of its own random choices: crops, mirrors, order.
    """

    bottoms_expected = (0, 0)
    tops_expected: ClassVar[tuple[int, int | None]] = (1, 2)

    def __init__(self, spec: Any, *, train_phase: bool) -> None:
        super().__init__(spec, train_phase=train_phase)
        self.seed = 0
        self._next = 0
        self._ahead = _Ahead()
        self.register_buffer("_place", torch.zeros(()), persistent=False)  # has the net's type and place

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ahead": _Ahead()}  # a thread cannot be copied

    def seek(self, batch: int) -> None:
        """Let the next forward pass give this batch, counted from 0."""
        self._next = batch

    def forward(self, *bottoms: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The tops of the next batch."""
        place = self.get_buffer("_place")
        dtype = np.float64 if place.dtype == torch.float64 else np.float32
        arrays = self._ahead.take(self.batch, self._next, self.seed, dtype)
        self._next += 1
        tops = tuple(torch.from_numpy(array).to(place) for array in arrays)
        return tops if len(tops) > 1 else tops[0]

    def batch(self, number: int, seed: int, dtype: Any) -> Arrays:
        """The tops of a batch, as arrays of `dtype`.

        Raises:
            ValueError: if a record is damaged or does not fit.
            OSError: if one cannot be read.
        """
        raise NotImplementedError

    def draw(self, seed: int, *purpose: int) -> np.random.Generator:
        """Random numbers that depend on the layer's name and these numbers alone."""
        return np.random.default_rng((seed, zlib.crc32(self.name.encode()), *purpose))

    def count(self, param: Any) -> int:
        """The checked `batch_size`."""
        if param.batch_size < 1:
            raise self.error("a batch_size of 1 or more", param.batch_size or "none")
        return param.batch_size

    def skip(self, param: Any, records: int, seed: int) -> int:
        """How many records `rand_skip` leaves out at the start."""
        if not param.rand_skip:
            return 0
        return int(self.draw(seed, SKIP).integers(param.rand_skip)) % records

    def existing(self, source: str, what: str) -> Path:
        """The path of a source that is there.

        Raises:
            ValueError: if none is named.
            FileNotFoundError: if there is nothing.
        """
        if not source:
            raise self.error(f"a source, {what}", "none")
        if not Path(source).exists():
            remedy = "Paths are relative to the working directory."
            raise FileNotFoundError(str(self.error(f"{what} in {source}", "nothing there", remedy)))
        return Path(source)

    def _listed(self, source: str, what: str) -> str:
        path = self.existing(source, what)
        try:
            return read_text(path)
        except ValueError as error:
            raise self.error(f"{what} in {path}", str(error)) from None


class _Ahead:
    """Makes the next batch in a thread while this one is used.

    A thread lasts for one batch, so that none has to be ended at exit, and a forked process that lost it only
    makes the batch itself.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._key: tuple[Any, ...] = ()
        self._made: Arrays | None = None

    def take(self, make: Callable[..., Arrays], number: int, *rest: Any) -> Arrays:
        if self._thread is not None:
            self._thread.join()
        made = self._made if self._key == (number, *rest) else None
        arrays = make(number, *rest) if made is None else made
        self._key, self._made = (number + 1, *rest), None
        self._thread = threading.Thread(target=self._run, args=(make,), name="next batch")
        self._thread.start()
        return arrays

    def _run(self, make: Callable[..., Arrays]) -> None:
        try:
            self._made = make(*self._key)
        except Exception:  # it comes again, in the foreground, when the batch is asked for
            self._made = None


@register("Data")
class Data(DataLayer):
    """Images, and their labels as (n,), from an LMDB of Datum records, in order of their keys, on and on."""

    def setup(self, *bottoms: Tensor) -> None:
        param, transform = self.spec.data_param, self.spec.transform_param
        self._size = self.count(param)
        if param.backend != param.LMDB:
            remedy = (
                "Put the data into an LMDB with `attention-transfer caffe lmdb`, and set `backend: LMDB`."
            )
            raise self.unsupported("an LMDB", "a LevelDB, which is Caffe's default backend", remedy)
        if transform.force_color and transform.force_gray:
            raise self.error("either force_color or force_gray", "both")
        self.existing(param.source, "an LMDB")
        self._database = open_database(param.source)
        self._color = transform.force_color if transform.force_color or transform.force_gray else None
        first = datum_pixels(*self._named([0])[0])
        self._transform = Transform(transform, first.shape, train=self.train_phase, error=self.error)

    def shapes(self) -> list[tuple[int, ...]]:
        return [(self._size, *self._transform.shape), (self._size,)][: len(self.tops)]

    def batch(self, number: int, seed: int, dtype: Any) -> Arrays:
        start = number * self._size + self.skip(self.spec.data_param, len(self._database), seed)
        places = [(start + i) % len(self._database) for i in range(self._size)]
        named = self._named(places)
        images = [datum_pixels(*record) for record in named]
        draws = self.draw(seed, BATCH, number).random((self._size, DRAWS))
        labels = np.array([datum.label for datum, _, _ in named], dtype)
        return [self._transform(images, draws, dtype), labels][: len(self.tops)]

    def _named(self, places: Sequence[int]) -> list[tuple[Any, bool | None, str]]:
        records = self._database.read(places)
        return [
            (datum, self._color, self._database.name(place))
            for datum, place in zip(records, places, strict=True)
        ]


class _Orders:
    """The order of the records in each pass over them, remembered for the pass at hand."""

    def __init__(self, make: Callable[[int, int], np.ndarray]) -> None:
        self._make = make
        self._known: dict[tuple[int, int], np.ndarray] = {}

    def of(self, seed: int, epoch: int) -> np.ndarray:
        if (seed, epoch) not in self._known:
            made = self._make(seed, epoch)
            kept = {key: order for key, order in self._known.items() if key == (seed, epoch - 1)}
            self._known = kept | {(seed, epoch): made}
        return self._known[seed, epoch]

    def walk(self, seed: int, start: int, count: int, records: int) -> Iterator[tuple[int, int]]:
        """(epoch, record) of `count` records from `start` on, counted over all epochs."""
        for index in range(start, start + count):
            epoch, place = divmod(index, records)
            yield epoch, int(self.of(seed, epoch)[place])


@register("ImageData")
class ImageData(DataLayer):
    """Images, and their labels as (n,), from a list of files: a path and a number on each line."""

    tops_expected = (2, 2)

    def setup(self, *bottoms: Tensor) -> None:
        param = self.spec.image_data_param
        self._size = self.count(param)
        if bool(param.new_height) != bool(param.new_width):
            got = f"{param.new_height} and {param.new_width}"
            raise self.error("new_height and new_width both, or neither", got)
        lines = self._listed(param.source, "a list of images").splitlines()
        self._lines = [self._parse(line) for line in lines if line.strip()]
        if not self._lines:
            raise self.error(f"images in {param.source}", "none")
        self._orders = _Orders(self._order)
        first = self._image(self._lines[0][0])
        self._transform = Transform(
            self.spec.transform_param, first.shape, train=self.train_phase, error=self.error
        )

    def shapes(self) -> list[tuple[int, ...]]:
        return [(self._size, *self._transform.shape), (self._size,)]

    def batch(self, number: int, seed: int, dtype: Any) -> Arrays:
        records = len(self._lines)
        start = number * self._size + self.skip(self.spec.image_data_param, records, seed)
        walk = self._orders.walk(seed, start, self._size, records)
        lines = [self._lines[place] for _, place in walk]
        draws = self.draw(seed, BATCH, number).random((self._size, DRAWS))
        images = [self._image(path) for path, _ in lines]
        return [self._transform(images, draws, dtype), np.array([label for _, label in lines], dtype)]

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        count = len(self._lines)
        shuffled = self.spec.image_data_param.shuffle
        return self.draw(seed, ROWS, epoch).permutation(count) if shuffled else np.arange(count)

    def _parse(self, line: str) -> tuple[str, int]:
        path, _, label = line.strip().rpartition(" ")
        try:
            if "\0" in path:
                raise InputError("no path")
            return path, int(label)
        except ValueError:
            raise self.error("`PATH LABEL` on each line of the source", repr(line)) from None

    def _image(self, path: str) -> np.ndarray:
        param = self.spec.image_data_param
        full = param.root_folder + path
        pixels = decode_image(read_bytes(full), param.is_color, full)
        if not param.new_height or pixels.shape[1:] == (param.new_height, param.new_width):
            return pixels
        return resize(pixels, param.new_height, param.new_width)


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (c, h, w) to another size, bilinear without a low-pass filter, as OpenCV does."""
    image = torch.tensor(pixels, dtype=torch.float32)[None]
    scaled = torch.nn.functional.interpolate(image, (height, width), mode="bilinear", align_corners=False)
    return scaled[0].round().to(torch.uint8).numpy()


@register("HDF5Data")
class HDF5Data(DataLayer):
    """Rows of data sets with the names of the tops, file after file of a list, round and round."""

    tops_expected = (1, None)

    def setup(self, *bottoms: Tensor) -> None:
        param = self.spec.hdf5_data_param
        self._size = self.count(param)
        if self.spec.HasField("transform_param"):
            raise self.error(
                "no transform_param", "one", "HDF5Data gives what is stored: transform it there."
            )
        listed = self._listed(param.source, "a list of HDF5 files").split()
        if not listed:
            raise self.error(f"HDF5 files in {param.source}", "none")
        self._files = [self.existing(file, "an HDF5 file") for file in listed]
        headers = [self._header(file) for file in self._files]
        self._rows = [rows for rows, _ in headers]
        self._tails = headers[0][1]
        for file, (_, tails) in zip(self._files, headers, strict=True):
            if tails != self._tails:
                raise self.error(f"rows of the shapes {self._tails} in {file}", tails)
        self._orders = _Orders(self._order)
        self._loaded: dict[int, Arrays] = {}

    def shapes(self) -> list[tuple[int, ...]]:
        return [(self._size, *tail) for tail in self._tails]

    def batch(self, number: int, seed: int, dtype: Any) -> Arrays:
        places = [
            place for _, place in self._orders.walk(seed, number * self._size, self._size, sum(self._rows))
        ]
        ends = np.cumsum(self._rows)
        files = np.searchsorted(ends, places, side="right")
        tops = [np.empty(shape, dtype) for shape in self.shapes()]
        for i, (file, place) in enumerate(zip(files.tolist(), places, strict=True)):
            row = place - int(ends[file]) + self._rows[file]
            for top, array in zip(tops, self._read(file), strict=True):
                top[i] = array[row]
        return tops

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        """With `shuffle`, the files in any order, and the rows in any order within each file."""
        starts = np.cumsum([0, *self._rows[:-1]])
        if not self.spec.hdf5_data_param.shuffle:
            return np.arange(sum(self._rows))
        files = self.draw(seed, FILES, epoch).permutation(len(self._rows))
        return np.concatenate(
            [
                starts[file] + self.draw(seed, ROWS, epoch, file).permutation(self._rows[file])
                for file in files
            ]
        )

    def _read(self, file: int) -> Arrays:
        """A file's data sets; two files are kept, for the batches that straddle them."""
        if file not in self._loaded:
            h5py = require("h5py", extra="caffe", user=self.type)
            with h5py.File(self._files[file], "r") as content:
                arrays = [self._values(content, name, self._files[file]) for name in self.tops]
            self._loaded = dict([*self._loaded.items()][-1:]) | {file: arrays}
        return self._loaded[file]

    def _values(self, content: Any, name: str, path: Path) -> np.ndarray:
        try:
            return np.asarray(self._checked(content, name, path))
        except (OSError, RuntimeError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise self.error(f"a whole HDF5 file in {path}", f"a damaged one ({reason})") from None

    def _checked(self, content: Any, name: str, path: Path) -> Any:
        """A data set of numbers which are in this very file, and no more of them than can be."""
        h5py = require("h5py", extra="caffe", user=self.type)
        link = content.get(name, getlink=True)
        found = None if isinstance(link, h5py.ExternalLink) else content[name]
        # guard: hdf5-elsewhere
        if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
            raise self.error(f"a data set {name!r} inside {path}", "a link to elsewhere, or a group")
        if found.dtype.kind not in "fiub" or found.shape is None:
            raise self.error(f"numbers in {name!r} of {path}", f"the type {found.dtype}")
        # guard: hdf5-bomb
        if found.nbytes > HDF5_UNFOLDED * path.stat().st_size + HDF5_SMALL:
            raise self.error(f"a data set {name!r} that {path} can hold", f"one of {found.nbytes:,} bytes")
        return found

    def _header(self, path: Path) -> tuple[int, list[tuple[int, ...]]]:
        """The number of rows of a file, and the shape of a row of each data set."""
        h5py = require("h5py", extra="caffe", user=self.type)
        try:
            check_regular(path)
            with h5py.File(path, "r") as content:
                if missing := [name for name in self.tops if name not in content]:
                    remedy = f"The file has {', '.join(content) or 'none'}."
                    raise self.error(
                        f"a data set for each top in {path}", f"none for {', '.join(missing)}", remedy
                    )
                shapes = [self._checked(content, name, path).shape for name in self.tops]
        except (OSError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            got = f"something else, or a damaged one ({' '.join(str(error).split())[:120]})"
            raise self.error(f"an HDF5 file in {path}", got) from None
        if len({shape[:1] for shape in shapes}) != 1 or not shapes[0] or not shapes[0][0]:
            raise self.error(f"data sets with as many rows, 1 or more, in {path}", shapes)
        return shapes[0][0], [shape[1:] for shape in shapes]


@register("DummyData")
class DummyData(DataLayer):
    """Made-up blobs: constants, filled once, and random numbers, drawn anew in each pass."""

    tops_expected = (1, None)

    def setup(self, *bottoms: Tensor) -> None:
        param = self.spec.dummy_data_param
        fillers = list(param.data_filler) or [schema.FillerParameter()]
        if len(fillers) not in (1, len(self.tops)):
            raise self.error(f"no data_filler, 1, or {len(self.tops)}", len(fillers))
        self._filler_of_top = fillers * len(self.tops) if len(fillers) == 1 else fillers
        for filler in fillers:
            fill((1, 1, 1, 1), filler, self.error)
        self._shapes = self._read_shapes()
        self._constants: dict[int, Tensor] = {}

    def shapes(self) -> list[tuple[int, ...]]:
        return self._shapes

    def forward(self, *bottoms: Tensor) -> Tensor | tuple[Tensor, ...]:
        tops = tuple(self._top(index) for index in range(len(self.tops)))
        self._next += 1
        return tops if len(tops) > 1 else tops[0]

    def _top(self, index: int) -> Tensor:
        place, filler, shape = self.get_buffer("_place"), self._filler_of_top[index], self._shapes[index]
        if filler.type == "constant":
            known = self._constants.get(index)
            if known is None or (known.dtype, known.device) != (place.dtype, place.device):
                known = self._constants[index] = place.new_full(shape, filler.value)
            return known
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(self.draw(self.seed, BATCH, self._next, index).integers(2**32)))
            return fill(shape, filler, self.error).to(place)

    def _read_shapes(self) -> list[tuple[int, ...]]:
        param = self.spec.dummy_data_param
        legacy = [list(getattr(param, name)) for name in ("num", "channels", "height", "width")]
        if param.shape and any(legacy):
            raise self.error("either shape or num, channels, height and width", "both")
        shapes = [tuple(shape.dim) for shape in param.shape]
        if any(legacy):
            if any(len(dims) not in (1, len(self.tops)) for dims in legacy):
                expected = f"1 or {len(self.tops)} each of num, channels, height and width"
                raise self.error(expected, ", ".join(str(len(dims)) for dims in legacy))
            full = [dims * len(self.tops) if len(dims) == 1 else dims for dims in legacy]
            shapes = list(zip(*full, strict=True))
        if len(shapes) not in (1, len(self.tops)) or any(min(shape, default=0) < 0 for shape in shapes):
            raise self.error(f"1 shape, or one for each of {len(self.tops)} tops", shapes or "none")
        return shapes * len(self.tops) if len(shapes) == 1 else shapes


@register("MemoryData", "WindowData")
class Unreadable(DataLayer):
    """Layers that only Caffe itself can feed: refused, with the way out."""

    tops_expected = (0, None)

    def setup(self, *bottoms: Tensor) -> None:
        remedy = "Make it an Input layer and feed it, or write an LMDB: `attention-transfer caffe lmdb`."
        raise self.unsupported("a layer that reads from files or is fed", self.type, remedy)
