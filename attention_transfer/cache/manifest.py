"""What a cache holds, and what it was made of: by this it knows which students it can serve."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from .._choices import Mapping, Stored
from .._errors import InputError
from .._files import write_atomically
from .._reading import parse_json, read_text
from ..pairs import Stage

FILE = "cache.json"
KIND = "attention-transfer teacher cache"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """The facts about a cache, kept in its cache.json.

    Attributes:
        teacher: name of the teacher.
        teacher_fingerprint: of its weights, as `models.fingerprint` gives it.
        teacher_input: how its input follows from the data's: (factor, offset) a channel and the size; None
            where it sees the data as they are.
        classes: how many logits it gives; `class_names`, what they are called, if that is known.
        layers: its layers, with the shapes (c, h, w) and strides that their maps have.
        p, mapping: how a layer's activation became a map.
        dtype: in which the maps are stored; logits are float16.
        precision: in which the teacher ran.
        data: fingerprint of the training images.
        images: how many there are.
        shape: (c, h, w) of each.
        mean, std: with which they are normalised.
        pad, flip: largest shift, and whether images are flipped.
        view_seed: seed of the views.
        views: how many there are of each image; more can be added.
        shard_images: images in a file.
        source: how the images were chosen: recipe fields that say which they are.
        settings: the settings the cache is built with, to go on with it.
        version: of the package that began it.
        decoding: the rule by which image files became pixels, which `data` depends on.
    """

    teacher: str
    teacher_fingerprint: str
    teacher_input: list[Any] | None
    classes: int
    layers: tuple[Stage, ...]
    p: float
    mapping: Mapping
    dtype: Stored
    precision: str
    data: str
    images: int
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool
    view_seed: int
    views: int
    shard_images: int
    source: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    version: str = ""
    class_names: tuple[str, ...] | None = None
    decoding: str = "as they are stored, whatever EXIF says"  # before there was another rule

    @property
    def identity(self) -> str:
        """16 hexadecimal digits of the SHA-256 over all that a stored map depends on; shards bear them."""
        facts = {name: value for name, value in asdict(self).items() if name not in _BESIDE}
        text = json.dumps({"format": FORMAT, **facts}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self, other: Manifest) -> list[str]:
        """In which facts another cache differs from this one, each as "name: ours, not theirs"."""
        ours, theirs = asdict(self), asdict(other)
        names = [name for name in ours if name not in _BESIDE and ours[name] != theirs[name]]
        if "data" in names and self.decoding != other.decoding:
            names.append("decoding")
        values = [(name, _short(getattr(self, name)), _short(getattr(other, name))) for name in names]
        return [f"{name}: {mine}, not {other}" for name, mine, other in values]

    def write(self, folder: Path) -> None:
        """Put cache.json into the folder, in place of an older one.

        Raises:
            OSError: if it cannot be written; an older one is intact.
        """
        text = json.dumps({"kind": KIND, "format": FORMAT, **asdict(self)}, indent=1)
        write_atomically(folder / FILE, text + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a cache folder.

        Raises:
            FileNotFoundError: if the folder is not there, or holds no cache.json.
            ValueError: if the file is damaged or foreign, or of a newer format.
        """
        path = folder / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"cache: expected a cache folder with a {FILE}, got {folder}. "
                "Build one: attention-transfer cache build"
            )
        try:
            values = parse_json(read_text(path))
        except ValueError:
            raise InputError(_foreign(path, "which is not JSON")) from None
        if not isinstance(values, dict) or values.pop("kind", None) != KIND:
            raise InputError(_foreign(path, "which is something else"))
        version = values.pop("format", None)
        if isinstance(version, int) and version > FORMAT:
            raise InputError(
                f"cache: expected format {FORMAT} in {path}, got {version}, written by version "
                f"{values.get('version')}. Install that version of attention-transfer, or a later one."
            )
        try:
            return cls._from_json(values)
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(_foreign(path, f"which is damaged ({error})")) from None

    @classmethod
    def _from_json(cls, values: dict[str, Any]) -> Manifest:
        layers = [Stage(each["name"], tuple(each["shape"]), each["stride"]) for each in values["layers"]]
        tuples = {name: tuple(values[name]) for name in ("shape", "mean", "std")}
        names = values.get("class_names")
        names = names if names is None else tuple(names)
        manifest = cls(**{**values, **tuples, "layers": tuple(layers), "class_names": names})
        counts = [getattr(manifest, name) for name in _COUNTS]
        # guard: manifest-counts
        if not all(_is_count(count) for count in (*counts, len(layers))):
            raise InputError(f"{', '.join(_COUNTS)}: {counts}")
        if manifest.views * math.ceil(manifest.images / manifest.shard_images) > MOST_FILES:
            raise InputError(f"more than {MOST_FILES:,} files")
        if manifest.dtype not in get_args(Stored) or manifest.mapping not in get_args(Mapping):
            raise InputError(f"dtype {manifest.dtype}, mapping {manifest.mapping}")
        for stage in manifest.layers:
            if not isinstance(stage.name, str) or not _is_shape(stage.shape) or not _is_number(stage.stride):
                raise InputError(f"layer {stage.name}")
        if not _is_shape(manifest.shape):
            raise InputError(f"shape {manifest.shape}")
        numbers = (manifest.p, *manifest.mean, *manifest.std)
        if (
            not all(map(_is_number, numbers))
            or not len(manifest.mean) == len(manifest.std) == manifest.shape[0]
        ):
            raise InputError("p, mean and std")
        if not all(type(value) is int for value in (manifest.pad, manifest.view_seed)):
            raise InputError("pad and view_seed")
        texts = (manifest.teacher, manifest.teacher_fingerprint, manifest.precision, manifest.data)
        if not all(isinstance(text, str) for text in (*texts, manifest.decoding)):
            raise InputError("teacher, precision, data and decoding")
        if names is not None and (
            len(names) != manifest.classes or not all(isinstance(n, str) for n in names)
        ):
            raise InputError("class_names")
        if type(manifest.flip) is not bool:
            raise InputError("flip")
        if not isinstance(manifest.source, dict) or not isinstance(manifest.settings, dict):
            raise InputError("source and settings")
        return manifest


_BESIDE = ("views", "source", "settings", "version", "class_names", "decoding")
"""What no map depends on, but through `data`."""
_COUNTS = ("images", "views", "shard_images", "classes")
MOST_FILES = 1 << 20  # of a cache: with 64 MB each, 64 TB


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value < 1 << 40


def _is_shape(shape: tuple[Any, ...]) -> bool:
    """(c, h, w) of what fits into memory."""
    return len(shape) == 3 and all(map(_is_count, shape)) and math.prod(shape) < 1 << 31


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _foreign(path: Path, what: str) -> str:
    return (
        f"cache: expected the manifest of a teacher cache, got {path}, {what}. "
        "Pass another folder, or move this one away and build the cache anew."
    )


def _short(value: Any) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], Stage):
        return ", ".join(stage.name for stage in value)
    return str(value)
