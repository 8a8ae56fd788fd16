"""`attention-transfer maps`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from attention_transfer._extras import require
from attention_transfer._pictures import open_picture
from attention_transfer.cli.parsing import PROGRAM, UsageError, one_line, parse, verb_parser
from attention_transfer.training.recipe import parse_pairs

if TYPE_CHECKING:
    from torch import Tensor

    from attention_transfer.cli.loading import Loaded


def run(arguments: list[str]) -> None:
    parser = verb_parser("maps", f"{PROGRAM} maps cat.png --weights runs/cifar10-wrn-16-1-at-0 -o maps")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="Image files.")
    parser.add_argument("--weights", required=True, help='A run folder, a weights file, or "pretrained".')
    parser.add_argument("--model", help="The model's name, for weights that do not say it.")
    parser.add_argument("--teacher-weights", help="The same for a teacher to show beside it.")
    parser.add_argument("--teacher", help="The teacher's name, for weights that do not say it.")
    parser.add_argument("--layers", help="Layers, as in --pairs of train: a,b or a:teacher_a,b:teacher_b.")
    parser.add_argument(
        "--num-classes", type=int, default=1000, help="Classes of weights that do not say it."
    )
    parser.add_argument(
        "--image-size", type=int, help="Size of the images; that of training if known, or 224."
    )
    parser.add_argument("-o", "--output", default="maps", help="Folder for the PNGs.")
    flags = parse(parser, arguments)
    if flags.teacher and not flags.teacher_weights:
        raise UsageError(
            'maps: expected --teacher-weights beside --teacher, got none. "pretrained" is a choice.'
        )
    from attention_transfer.cli.loading import load
    from attention_transfer.visualize import attention_maps, save_maps

    models = {"student": load(flags.weights, flags.model, flags.num_classes, 3)}
    if flags.teacher_weights:
        models = {"teacher": load(flags.teacher_weights, flags.teacher, flags.num_classes, 3), **models}
    card = models["student"].card
    channels = card.in_channels if card else 3
    size = flags.image_size or (card.image_size[0] if card else 224)
    pixels = [_read_image(path, channels, size) for path in flags.images]
    layers = _map_layers(models, flags.layers, (2, channels, size, size))
    for path, image in zip(flags.images, pixels, strict=True):
        maps = {
            role: attention_maps(loaded.model, layers[role], _normalise(loaded)(image[None]))
            for role, loaded in models.items()
        }
        print(save_maps(Path(flags.output) / f"{Path(path).stem}-maps.png", [image], maps, captions=[path]))


def _map_layers(models: dict[str, Loaded], text: str | None, shape: tuple[int, ...]) -> dict[str, list[str]]:
    """The layers to show of each model: those named, or the stage ends."""
    import torch

    from attention_transfer.pairs import suggest_pairs

    student = models["student"].model
    named = parse_pairs(text) if text else None
    if named is None:
        teacher = models.get("teacher", models["student"]).model
        named = [
            (p.student, p.teacher, p.weight) for p in suggest_pairs(student, teacher, torch.zeros(shape))
        ]
    own, others = [pair[0] for pair in named], [pair[1] for pair in named]
    return {"teacher": others, "student": own}


def _normalise(loaded: Loaded) -> Callable[[Tensor], Tensor]:
    """From uint8 images to what a model expects, as far as its weights say it."""
    from attention_transfer.data import Augment
    from attention_transfer.models import pretrained_statistics

    if loaded.card:
        return loaded.card.augment().normalise
    return Augment(*pretrained_statistics(loaded.model)).normalise


def _read_image(path: str, channels: int, size: int) -> Tensor:
    """A file as uint8 (c, h, w), its central square resized to `size`."""
    import torch

    operations = require("PIL.ImageOps", extra="plots", user="maps")
    if not Path(path).is_file():
        raise FileNotFoundError(f"maps: expected an image file, got {path}, which is not there.")
    try:
        image = open_picture(Path(path).read_bytes(), extra="plots", user="maps")
        image = operations.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    except OSError:
        raise
    except Exception as error:  # damaged notes on how it was held make Pillow raise almost anything
        raise ValueError(f"maps: {path} is not a readable image ({one_line(str(error))}).") from None
    image = operations.fit(image, (size, size))
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, -1).permute(2, 0, 1)
    )
