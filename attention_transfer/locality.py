"""Whether maps are in the order of the image: a change of a part of it changes a map most there.

Noise is added to one small region of an image after the other. In a map in order, a place inside of the
region changes more than one outside. A map that answers all over the image alike, as some of untrained
networks do, says nothing; so this counts only if a change shows in some places more than in others.
`docs/models.md` has what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ._untouched import untouched
from .taps import Layout, Taps, possible_layouts

CPU = torch.device("cpu")  # of what is drawn and counted here, whatever the default device
REGIONS = 16
IMAGES = 8  # at a time
FEWEST_PLACES = 9  # of a map, below which its regions are too few to tell
LOCAL = 0.75
"""The least share of pairs, of a place inside and one outside, whose first changed more. By chance it is
half; of maps that are shuffled, mirrored or transposed it was up to 0.66."""
SPECIFIC = 1.5
"""The least logarithm of the factor by which the most changed places exceed what is usual for them and for
the region. Of maps in order and below `LOCAL`, the most was 1.1; of maps in order and above this, the least
share was 0.87."""
FAINT = 1e-12  # a change, over the largest, that counts as none
CLEARLY = math.log(2)  # by which the change at one token, squared, exceeds that at another

Images = Float[Tensor, "b channels height width"]
Region = tuple[float, float, float, float]  # top, bottom, left, right, as shares of the image


@dataclass(frozen=True)
class Finding:
    """How the map of a layer answers to changes of the image.

    Attributes:
        layout: how it is read.
        told: whether the user said so.
        share: of the pairs of a place inside of a changed region and one outside, whose first changed more.
        peak: how far, as a logarithm, the places that answer most to a region stand out.
        better: the layout that fits the answers of its tokens, where they begin at another one.
    """

    layout: Layout
    told: bool
    share: float
    peak: float
    better: Layout | None = None

    @property
    def in_order(self) -> bool:
        """Whether nothing speaks against it."""
        return self.better is None and (self.share >= LOCAL or self.peak < SPECIFIC)


def find_order(
    model: nn.Module,
    names: Sequence[str],
    x: Images,
    *,
    layout: str | Mapping[str, str] = "auto",
    transform: Callable[[Images], Images] | None = None,
) -> dict[str, Finding]:
    """How the maps of these layers answer; the model is left as it is, after up to five runs on a few images.

    Left out are layers with few places, and those with the axes of an image, unless the user said so, or the
    shape leaves a doubt which axes they are; and all of them where the images are none, or a DTensor.

    Args:
        layout: as for `Taps`.
        transform: from these images to what the model is given.
    """
    if not names or x.dim() != 4 or not len(x) or hasattr(x, "full_tensor"):  # nor a DTensor
        return {}
    see = transform or (lambda images: images)
    x = x.detach().repeat(-(-REGIONS // len(x)), 1, 1, 1)[:REGIONS]
    with torch.no_grad(), untouched(model), Taps(model, list(dict.fromkeys(names)), layout=layout) as taps:
        model(images := see(x[:IMAGES]))
        maps = taps.pop()
    layouts = {
        name: each
        for name, each in taps.layouts.items()
        if math.prod(each.hw) >= FEWEST_PLACES
        and (each.kind == "tokens" or name in taps.told or _is_doubtful(each, maps[name], images))
    }
    if not layouts:
        return {}
    regions = _regions(min((each.hw for each in layouts.values()), key=math.prod))
    whole = {name: _whole(name, each) for name, each in layouts.items()}
    changes = [
        _changes(model, whole, images, regions[i * IMAGES : (i + 1) * IMAGES], see)
        for i, images in enumerate(x.split(IMAGES))
    ]
    return {
        name: _finding(each, name in taps.told, torch.cat([change[name] for change in changes]), regions)
        for name, each in layouts.items()
    }


def _is_doubtful(layout: Layout, features: Float[Tensor, "b c h w"], images: Images) -> bool:
    axes = features if layout.kind == "nchw" else features.permute(0, 2, 3, 1)
    hw = images.shape[2], images.shape[3]
    return len(possible_layouts(axes.shape, hw, has_layer_norm=True)) > 1


def _regions(hw: tuple[int, int]) -> list[Region]:
    """Cells of the grid, evenly drawn."""
    (h, w), count = hw, min(REGIONS, math.prod(hw))
    order = torch.randperm(h * w, generator=torch.Generator(CPU).manual_seed(0), device=CPU)
    chosen = order[:count].tolist()
    return [(i // w / h, (i // w + 1) / h, i % w / w, (i % w + 1) / w) for i in chosen]


def _whole(name: str, layout: Layout) -> str:
    """The name of a layer with all of its tokens, in their own order, as one row."""
    if layout.kind != "tokens":
        return f"{name.partition('@')[0]}@{layout.kind}"
    return f"{name.partition('@')[0]}@1x{layout.prefix + math.prod(layout.hw) + layout.suffix}"


def _changes(
    model: nn.Module,
    names: Mapping[str, str],
    x: Images,
    regions: Sequence[Region],
    see: Callable[[Images], Images],
) -> dict[str, Float[Tensor, "b n"]]:
    """By how much each place of each layer changes with one region of each image, squared."""
    before, after = (_features(model, names, see(images)) for images in (x, _changed(x, regions)))
    return {
        name: (after[name].double() - before[name].double())[: len(regions)].square().sum(1).flatten(1).cpu()
        for name in names
    }


def _features(model: nn.Module, names: Mapping[str, str], x: Images) -> dict[str, Float[Tensor, "b c h w"]]:
    # each run begins with the same random state: what is random in the model is the same in all
    with torch.no_grad(), untouched(model), Taps(model, list(dict.fromkeys(names.values()))) as taps:
        model(x)
        found = taps.pop()
    return {name: found[own] for name, own in names.items()}


def _changed(x: Images, regions: Sequence[Region]) -> Images:
    """Images with noise in a region each, a tint of its own among it."""
    generator = torch.Generator(CPU).manual_seed(0)
    changed, (height, width) = x.detach().clone(), x.shape[2:]
    scale = x.float().std().item() or 1.0
    for image, (top, bottom, left, right) in zip(changed, regions, strict=False):
        rows = slice(int(top * height), max(int(bottom * height), int(top * height) + 1))
        columns = slice(int(left * width), max(int(right * width), int(left * width) + 1))
        part = image[:, rows, columns]
        grain, tint = (
            torch.randn(shape, generator=generator, device=CPU) for shape in (part.shape, (len(part), 1, 1))
        )
        part += (scale * (grain + tint)).to(part)
    return changed


def _finding(layout: Layout, told: bool, change: Float[Tensor, "b n"], regions: Sequence[Region]) -> Finding:
    answering = change.any(1) & change.isfinite().all(1)
    change, inside = (
        change[answering],
        torch.stack([_inside(region, layout.hw) for region in regions])[answering],
    )
    if not len(change):
        return Finding(layout, told, 1.0, 0.0)
    share, peak = _share(_grid(change, layout), inside), _peak(_grid(change, layout), inside)
    if layout.kind != "tokens" or not (around := layout.prefix + layout.suffix):
        return Finding(layout, told, share, peak)
    others = [layout._replace(prefix=prefix, suffix=around - prefix) for prefix in range(around + 1)]
    answers = [_logarithm(_grid(change, other))[inside].mean().item() for other in others]
    clearest = max(range(around + 1), key=answers.__getitem__)
    clearer = answers[clearest] - answers[layout.prefix] > CLEARLY
    fits = clearer and _share(_grid(change, others[clearest]), inside) >= LOCAL
    return Finding(layout, told, share, peak, others[clearest] if fits else None)


def _grid(change: Float[Tensor, "b n"], layout: Layout) -> Float[Tensor, "b _"]:
    ordered = change if layout.order is None else change[:, layout.order]
    return ordered[:, layout.prefix : layout.prefix + math.prod(layout.hw)]


def _inside(region: Region, hw: tuple[int, int]) -> Bool[Tensor, " n"]:
    """The places of a map whose centres are in the region; the nearest if none is."""
    top, bottom, left, right = region
    rows, columns = ((torch.arange(size, device=CPU) + 0.5) / size for size in hw)
    inside = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))
    if not inside.any():
        far = (rows - (top + bottom) / 2).square()[:, None] + (columns - (left + right) / 2).square()
        inside = far == far.min()
    return inside.flatten()


def _share(change: Float[Tensor, "b n"], inside: Bool[Tensor, "b n"]) -> float:
    """The share of pairs, of a place inside and one outside, whose first changed more; ties count half."""
    shares = []
    for each, here in zip(change, inside, strict=True):
        outside = each[~here].sort().values
        below, up_to = (torch.searchsorted(outside, each[here], side=side) for side in ("left", "right"))
        shares.append(((below + up_to) / (2 * len(outside))).mean())
    return torch.stack(shares).mean().item()


def _peak(change: Float[Tensor, "b n"], inside: Bool[Tensor, "b n"]) -> float:
    """The mean of the largest changes, as many as there are places inside, over what is usual there."""
    logarithm = _logarithm(change)
    usual = logarithm.mean(0) + logarithm.mean(1, keepdim=True) - logarithm.mean()
    count = round(inside.sum(1).double().mean().item())
    return (logarithm - usual).topk(count, dim=1).values.mean().item()


def _logarithm(change: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """Of each change over the largest of its region; what does not change at all is not endlessly far."""
    return (change / change.amax(1, keepdim=True)).clamp_min(FAINT).log()
