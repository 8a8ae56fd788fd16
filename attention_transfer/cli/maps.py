"""`attention-transfer maps`."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attention_transfer._colours import print_safely
from attention_transfer._errors import InputError
from attention_transfer._pictures import LARGEST, DeepError, convert, open_picture
from attention_transfer._reading import read_bytes
from attention_transfer.cli.parsing import PROGRAM, UsageError, parse, verb_parser
from attention_transfer.runs.recipe import parse_pairs

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from torch import Tensor

    from attention_transfer.cli.loading import Loaded


def run(arguments: list[str]) -> None:
    parser = verb_parser("maps", f"{PROGRAM} maps cat.png --weights runs/cifar10-wrn-16-1-at-0 -o maps")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="Image files.")
    parser.add_argument("--weights", help='A run folder, a weights file, FILE:PREFIX, or "pretrained".')
    parser.add_argument("--model", help="The model's name, for weights that do not say it.")
    parser.add_argument("--teacher-weights", help="The same for a teacher, to show beside it or alone.")
    parser.add_argument("--teacher", help="The teacher's name, for weights that do not say it.")
    parser.add_argument("--layers", help="Layers, as in --pairs of train: a,b or a:teacher_a,b:teacher_b.")
    parser.add_argument(
        "--num-classes", type=int, default=1000, help="Classes of weights that do not say it."
    )
    parser.add_argument(
        "--image-size", type=int, help="Size of the images; that of training if known, or 224."
    )
    parser.add_argument(
        "--tile", type=int, help="Pixels of each image's longer side in the picture; 160 to 320, as it comes."
    )
    parser.add_argument(
        "-o", "--output", default="maps", help="Folder for a PNG an image; or NAME.png for one of all images."
    )
    flags = parse(parser, arguments)
    _check_sides(flags)
    _check_pictures(flags)
    import torch

    from attention_transfer.visualize import attention_maps

    models = _load_sides(flags)
    main = models.get("student") or models["teacher"]
    channels, size = _expected_images(main, flags.image_size)
    images = torch.stack([_read_image(path, channels, size) for path in flags.images])
    inputs = {role: _input(loaded, images) for role, loaded in models.items()}
    layers = _map_layers(models, flags.layers, inputs)
    maps = {role: attention_maps(models[role].model, layers[role], seen) for role, seen in inputs.items()}
    for path in _save(flags, images, maps):
        print_safely(path)


def _check_sides(flags: Any) -> None:
    if not (flags.weights or flags.teacher_weights):
        raise UsageError("maps: expected --weights or --teacher-weights, got neither. Pass a run folder.")
    for name, weights in (("model", "weights"), ("teacher", "teacher_weights")):
        if getattr(flags, name) and not getattr(flags, weights):
            flag = f"--{weights.replace('_', '-')}"
            raise UsageError(f'maps: expected {flag} beside --{name}, got none. "pretrained" is a choice.')


def _load_sides(flags: Any) -> dict[str, Loaded]:
    """The models to show, by role, the teacher first."""
    from attention_transfer.cli.loading import load

    size = (flags.image_size, flags.image_size) if flags.image_size else None
    sides = {"teacher": (flags.teacher_weights, flags.teacher), "student": (flags.weights, flags.model)}
    return {
        role: load(weights, name, flags.num_classes, 3, size)
        for role, (weights, name) in sides.items()
        if weights
    }


def _expected_images(loaded: Loaded, size: int | None) -> tuple[int, int]:
    """Channels and size of the images: those of the training, as far as the weights say it, or RGB at 224."""
    if loaded.card:
        return loaded.card.in_channels, size or loaded.card.image_size[0]
    own = getattr(loaded.model, "pretrained_cfg", None) or {}
    return 3, size or own.get("input_size", (3, 224, 224))[-1]


def _save(flags: Any, images: UInt8[Tensor, "b c h w"], maps: dict[str, dict[str, Tensor]]) -> list[Path]:
    """One picture of all images if the output is a PNG, else a folder with one for each."""
    from attention_transfer.visualize import save_maps

    output = Path(flags.output)
    if output.suffix.lower() == ".png":
        names = [Path(path).name for path in flags.images]
        names = names if len(set(names)) == len(names) else flags.images
        return [save_maps(output, images, maps, captions=names, tile=flags.tile)]
    return [
        save_maps(
            picture,
            images[i : i + 1],
            {role: {name: m[i : i + 1] for name, m in layers.items()} for role, layers in maps.items()},
            captions=[path],
            tile=flags.tile,
        )
        for i, (path, picture) in enumerate(zip(flags.images, _pictures(flags), strict=True))
    ]


def _pictures(flags: Any) -> list[Path]:
    """Where the picture of each image goes: named as the image, numbered where several are called alike."""
    output, images = Path(flags.output), [Path(path) for path in flags.images]
    if output.suffix.lower() == ".png":
        return [output]
    times = Counter(image.stem.casefold() for image in images)  # disks may not tell letters' case apart
    taken = {stem for stem, count in times.items() if count == 1}
    pictures = []
    for image in images:
        name = image.stem
        if times[name.casefold()] > 1:
            numbered = (f"{name}-{number}" for number in itertools.count(1))
            name = next(each for each in numbered if each.casefold() not in taken)
            taken.add(name.casefold())
        pictures.append(output / f"{name}-maps.png")
    return pictures


def _check_pictures(flags: Any) -> None:
    """No picture takes an image's place, and what shows which of several images of a name is said."""
    images = [Path(path) for path in flags.images]
    for picture in (pictures := _pictures(flags)):
        if picture.exists() and any(image.exists() and picture.samefile(image) for image in images):
            raise UsageError(
                f"maps: expected an --output beside the images, got {picture}, which is one. Pass another."
            )
    for image, picture in zip(images, pictures, strict=False):
        if len(pictures) > 1 and picture.name.casefold() != f"{image.stem}-maps.png".casefold():
            print_safely(f"note: {picture} is of {image}, as several are called alike", stream=sys.stderr)


def _map_layers(
    models: dict[str, Loaded], text: str | None, inputs: dict[str, Tensor]
) -> dict[str, list[str]]:
    """The layers to show of each model: those named, or the stage ends."""
    import torch

    from attention_transfer.pairs import suggest_pairs

    named = parse_pairs(text) if text else None
    if named is None:
        teacher, *_, student = models if len(models) > 1 else [*models, *models]
        example, seen = (torch.zeros(2, *inputs[role].shape[1:]) for role in (student, teacher))
        pairs = suggest_pairs(models[student].model, models[teacher].model, example, seen)
        named = [(pair.student, pair.teacher, pair.weight) for pair in pairs]
    return {"student": [pair[0] for pair in named], "teacher": [pair[1] for pair in named]}


def _input(loaded: Loaded, images: UInt8[Tensor, "b c h w"]) -> Tensor:
    """What a model expects of uint8 images, as far as its weights say it."""
    from attention_transfer.data import Augment
    from attention_transfer.models import pretrained_statistics

    own = (loaded.card.mean, loaded.card.std) if loaded.card else pretrained_statistics(loaded.model)
    return loaded.input(images.shape[1:], *own)(Augment(*own).normalise(images))


def _read_image(path: str, channels: int, size: int) -> Tensor:
    """A file as uint8 (c, h, w), its central square resized to `size`: pixels as in training."""
    from attention_transfer.data.decode import resize_and_crop, to_tensor

    if not Path(path).exists():
        raise FileNotFoundError(f"maps: expected an image file, got {path}, which is not there.")
    try:
        image = open_picture(read_bytes(path, LARGEST), extra="train", user="maps")
    except DeepError as error:
        raise InputError(
            f"maps: expected 8 bits a channel in {path}, got mode {error}. Convert it."
        ) from None
    except ValueError as error:
        raise InputError(f"maps: {path} is not a readable image ({error}).") from None
    return to_tensor(resize_and_crop(convert(image, channels), size))
