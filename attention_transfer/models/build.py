"""Models by name: this package's, timm's, torchvision's, or a factory of the user's own."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import inspect
import os
import re
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import InputError, InputTypeError
from .._extras import require
from .._reading import first_line
from .._trust import FACTORY, load_factory
from .nin import THIN, WIDE, NetworkInNetwork
from .sizes import options_for
from .weights import load_weights
from .wide_resnet import WideResNet

NINS = ("nin-thin", "nin-wide", "nin-thin-plain", "nin-wide-plain")
OWN_NAMES = ("wrn-16-1", "wrn-16-2", "wrn-28-10", "wrn-40-1", "wrn-40-2", *NINS)
"""Names of this package for the list of near matches; any wrn-DEPTH-WIDTH with DEPTH = 6n + 4 is built."""

NAME_FORMS = "wrn-DEPTH-WIDTH, nin-thin, nin-wide, timm:NAME, torchvision:NAME or package.module:factory"

FACTORY_ARGUMENTS = ("num_classes", "in_channels", "pretrained", "image_size")
"""What a factory of the user's own is called with, as far as its signature names it."""

Size = tuple[int, int] | None

Builder = Callable[[str, int, int, bool, Size], nn.Module]
"""(name without its source, num_classes, in_channels, pretrained, size of the images) -> the model."""

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_SIZED = {"vit_": ("image_size", False), "maxvit": ("input_size", True)}
"""Models of torchvision that are built for one size, by the beginning of the name: the argument, and whether
it is a pair."""

_WRN = re.compile(r"wrn-(\d+)-(\d+)")


def build_model(
    name: str,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    pretrained: bool = False,
    weights: str | os.PathLike[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> nn.Module:
    """Build the model of that name: images (b, in_channels, h, w) -> logits (b, num_classes).

    Names:
        - ``wrn-16-1``: wide residual network, depth-width, depth = 6n + 4; ``nin-thin`` and ``nin-wide``,
          and these without BatchNorm: ``nin-thin-plain``, ``nin-wide-plain``.
        - ``timm:NAME``, ``torchvision:NAME``: that library's model.
        - ``NAME``: the first that knows it of this package, timm, torchvision.
        - ``package.module:factory``: called with ``num_classes``, ``in_channels``, ``pretrained`` and
          ``image_size`` as far
          as its signature names them. It must return a module.

    Where ``in_channels`` is not 3, the first convolution of 3 input channels of a torchvision model is
    adapted: its weights are summed over the channels for 1 channel, else repeated in turn and scaled by
    3 / in_channels. timm does the same to its pretrained weights.

    Args:
        pretrained: take the library's own weights, downloaded at need and never unpickled. The head starts
            afresh if ``num_classes`` differs from theirs.
        weights: a file or run folder for `load_weights`; every tensor must fit.
        image_size: of the images, in pixels: one number, or height and width. A vision transformer of timm
            or torchvision that takes only the size it is built for is built for that one; a factory gets it
            if its signature names it. Other models are the same for every size.

    Raises:
        ValueError: unknown name (near matches are listed), impossible size, no pretrained weights, or
            weights that do not fit.
        OSError: pretrained weights that could not be fetched; FileNotFoundError: no weights file.
        TypeError: a factory that returns no module.
        ImportError: timm or torchvision is asked for and not installed.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    _check_arguments(name, num_classes, in_channels, pretrained, weights)
    _check_size(size)
    builder, plain_name = _find(name)
    model = builder(plain_name, num_classes, in_channels, pretrained, size)
    if weights is not None:
        load_weights(model, weights)
    return model


def is_of_timm(name: str) -> bool:
    """Whether `build_model` takes the model of that name from timm.

    Raises:
        ValueError, ImportError: as `build_model`, if nobody knows it or its library is missing.
    """
    return _find(name)[0] is _build_timm


def pretrained_statistics(model: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    """(mean, std) by channel, of pixels in [0, 1], that a library's own weights expect of their images.

    timm's models say it. torchvision's expect ImageNet's, and so, most likely, do those of unknown origin.
    """
    own = getattr(model, "pretrained_cfg", None) or {}
    return own.get("mean", _IMAGENET_MEAN), own.get("std", _IMAGENET_STD)


def _check_arguments(
    name: object, num_classes: object, in_channels: object, pretrained: object, weights: object
) -> None:
    if not isinstance(name, str):
        raise InputTypeError(f'build_model: expected a name such as "wrn-16-1", got {type(name).__name__}.')
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(
                f"build_model: expected {argument} of 1 or more, got {value!r}. Pass {argument}=10."
            )
    if pretrained and weights is not None:
        raise InputError(
            f"build_model: expected one source of weights, got pretrained=True and weights={str(weights)!r}. "
            "Drop one of them."
        )


def _check_size(size: object) -> None:
    numbers = size if isinstance(size, tuple) else ()
    if size is not None and (len(numbers) != 2 or not all(type(n) is int and n >= 1 for n in numbers)):
        raise InputError(
            f"build_model: expected image_size as a number of pixels or (height, width), got {size!r}. "
            "Pass image_size=224."
        )


def _find(name: str) -> tuple[Builder, str]:
    source, _, plain_name = name.rpartition(":")
    if source == "":
        return _search(name), name
    if source == "timm":
        if not _timm_knows(plain_name):
            raise InputError(_unknown(name))
        return _build_timm, plain_name
    if source == "torchvision":
        if plain_name not in _torchvision_names():
            raise InputError(_unknown(name))
        return _build_torchvision, plain_name
    if not FACTORY.fullmatch(name):
        raise InputError(_unknown(name))
    return _build_by_factory, name


def _search(name: str) -> Builder:
    """The builder of a bare name: this package, then timm, then torchvision."""
    if _WRN.fullmatch(name) or name in OWN_NAMES:
        return _build_own
    with contextlib.suppress(ImportError):
        if _timm_knows(name):
            return _build_timm
    with contextlib.suppress(ImportError):
        if name in _torchvision_names():
            return _build_torchvision
    raise InputError(_unknown(name))


def _unknown(name: str) -> str:
    """The message for a name nobody knows, with the near matches over all installed sources."""
    known, not_installed = _known_names()
    without_source_and_tag = name.rpartition(":")[2].partition(".")[0].lower()
    near = difflib.get_close_matches(without_source_and_tag, list(known), n=5)
    if near:
        remedy = f"Near matches: {', '.join(full_name for match in near for full_name in known[match])}."
    else:
        remedy = f"Use {NAME_FORMS}."
    if not_installed:
        remedy += f' Not installed: {", ".join(not_installed)}. Run: pip install "attention-transfer[train]"'
    return f'build_model: expected the name of a model, got "{name}". {remedy}'


def _known_names() -> tuple[dict[str, list[str]], list[str]]:
    """Each name with its forms (resnet18: timm:resnet18, torchvision:resnet18), and the missing libraries."""
    known = {name: [name] for name in OWN_NAMES}
    not_installed = []
    for library, list_names in (("timm", _timm_names), ("torchvision", _torchvision_names)):
        try:
            for name in list_names():
                known.setdefault(name, []).append(f"{library}:{name}")
        except ImportError:
            not_installed.append(library)
    return known, not_installed


# This package


def _build_own(name: str, num_classes: int, in_channels: int, pretrained: bool, size: Size) -> nn.Module:
    if pretrained:
        raise InputError(_no_pretrained(name))
    numbers = _WRN.fullmatch(name)
    if numbers:
        depth, width = int(numbers[1]), int(numbers[2])
        return WideResNet(depth, width, num_classes=num_classes, in_channels=in_channels)
    widths = THIN if "thin" in name else WIDE
    plain = name.endswith("-plain")
    return NetworkInNetwork(widths, batchnorm=not plain, num_classes=num_classes, in_channels=in_channels)


def _no_pretrained(name: str) -> str:
    return (
        f"build_model: expected a name with pretrained weights, got {name}: it has none. Pass weights=FILE."
    )


# timm


def _timm() -> ModuleType:
    return require("timm", extra="train", user="build_model")


def _timm_names(*, tags: bool = False) -> list[str]:
    return _timm().list_models(include_tags=tags)


def _timm_knows(name: str) -> bool:
    """`name` may carry the tag of a set of weights: resnet18.a1_in1k."""
    return name in _timm_names(tags="." in name)


def size_options(name: str, size: tuple[int, int]) -> dict[str, Any]:
    """What timm is given beside the name for images of a size, besides their number of classes and channels.

    Raises:
        ValueError, ImportError: as `build_model`, if nobody knows it or its library is missing.
    """
    return _timm_size(_find(name)[1], size) if is_of_timm(name) else {}


def _timm_size(name: str, size: Size) -> dict[str, Any]:
    timm = _timm()
    own = timm.get_pretrained_cfg(name)
    if size is None or own is None or not own.fixed_input_size or size == tuple(own.input_size[1:]):
        return {}
    return options_for(functools.partial(timm.create_model, name), "img_size", size)


def _build_timm(name: str, num_classes: int, in_channels: int, pretrained: bool, size: Size) -> nn.Module:
    timm = _timm()
    options = {"num_classes": num_classes, "in_chans": in_channels, **_timm_size(name, size)}
    if not pretrained:
        return timm.create_model(name, **options)
    if not timm.get_pretrained_cfg(name).has_weights:
        raise InputError(_no_pretrained(f"timm:{name}"))
    with _safe_download(f"timm:{name}"):
        return timm.create_model(name, pretrained=True, **options)


@contextlib.contextmanager
def _safe_download(name: str) -> Iterator[None]:
    """Nothing is unpickled inside, whatever the library asks for, and every failure is one line."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    # each library for HTTP, hubs and archives has exceptions of its own, few of them OSErrors
    except Exception as error:
        raise OSError(
            f"build_model: could not fetch the pretrained weights of {name} "
            f"({type(error).__name__}: {first_line(error)[:200]}). Check the network, or pass weights=FILE."
        ) from error
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


# torchvision


def _torchvision() -> ModuleType:
    require("torchvision", extra="train", user="build_model")
    return importlib.import_module("torchvision.models")


def _torchvision_names() -> list[str]:
    """The image classifiers; not the detectors and segmenters, which live in submodules."""
    models = _torchvision()
    return models.list_models(module=models)


def _build_torchvision(
    name: str, num_classes: int, in_channels: int, pretrained: bool, size: Size
) -> nn.Module:
    models = _torchvision()
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # one output instead of three; pretrained RGB weights expect inputs in the scale of another library
        options = {
            "aux_logits": False,
            "init_weights": True,
            "transform_input": pretrained and in_channels == 3,
        }
    for start, (argument, as_pair) in _SIZED.items():
        if size and not pretrained and name.startswith(start):  # their weights are of their own size
            build = functools.partial(models.get_model, name, weights=None)
            options |= options_for(build, argument, size, as_pair=as_pair)
    model = models.get_model(name, weights=None, num_classes=num_classes, **options)
    if pretrained:
        _load_torchvision_weights(model, name, models.get_model_weights(name))
    if in_channels != 3:
        _adapt_first_convolution(model, name, in_channels)
    return model


def _load_torchvision_weights(model: nn.Module, name: str, available: Any) -> None:
    if not len(available):
        raise InputError(_no_pretrained(f"torchvision:{name}"))
    with _safe_download(f"torchvision:{name}"):
        state = available.DEFAULT.get_state_dict(progress=False, check_hash=True)
    own = model.state_dict()
    classes = len(available.DEFAULT.meta["categories"])
    # a head for another number of classes keeps its fresh weights; all else must fit
    fitting = {
        key: value
        for key, value in state.items()
        if key in own and not _is_other_head(own[key], value, classes)
    }
    model.load_state_dict(own | fitting)


def _is_other_head(own: Tensor, pretrained: Tensor, classes: int) -> bool:
    return pretrained.shape[:1] == (classes,) and own.shape != pretrained.shape


def _adapt_first_convolution(model: nn.Module, name: str, in_channels: int) -> None:
    """Turn the first Conv2d of 3 input channels into one of `in_channels`."""
    found = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3]
    if not found:
        raise InputError(
            f"build_model: expected a Conv2d with 3 input channels in torchvision:{name} to adapt to "
            f"in_channels={in_channels}, found none. Pass in_channels=3, or a package.module:factory."
        )
    first = found[0]
    first.weight = nn.Parameter(_adapt_channels(first.weight.detach(), in_channels))
    first.in_channels = in_channels


def _adapt_channels(weight: Tensor, in_channels: int) -> Tensor:
    """(c_out, 3, k, k) -> (c_out, in_channels, k, k), the sum over a grey image's channels kept."""
    if in_channels == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, torch.arange(in_channels) % 3] * (3 / in_channels)


# A factory of the user's own


def _build_by_factory(
    name: str, num_classes: int, in_channels: int, pretrained: bool, size: Size
) -> nn.Module:
    factory = load_factory(name, "build_model")
    parameters = _parameters(factory, name)
    if pretrained and "pretrained" not in parameters:
        raise InputError(_no_pretrained(name))
    offered: dict[str, Any] = {
        "num_classes": num_classes,
        "in_channels": in_channels,
        "pretrained": pretrained,
        **({} if size is None else {"image_size": size[0] if size[0] == size[1] else size}),
    }
    model = factory(**{key: value for key, value in offered.items() if key in parameters})
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            f"build_model: expected a torch.nn.Module from {name}, got {type(model).__name__}. "
            "Return the model."
        )
    return model


def _parameters(factory: Callable[..., Any], name: str) -> dict[str, inspect.Parameter]:
    """What the factory may be called with, checked to require nothing that build_model cannot offer."""
    try:
        parameters = dict(inspect.signature(factory).parameters)
    except ValueError:  # some builtins have no signature to read
        return {}
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p.name for p in parameters.values() if p.default is p.empty and p.kind not in optional]
    unknown = [argument for argument in required if argument not in FACTORY_ARGUMENTS]
    if unknown:
        raise InputError(
            f"build_model: expected a factory that requires at most {', '.join(FACTORY_ARGUMENTS)}, "
            f"got {name}, which requires {', '.join(unknown)}. Give them defaults."
        )
    return parameters
