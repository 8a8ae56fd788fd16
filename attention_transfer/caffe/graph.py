"""Which layers of a net are in, and which blob each reads: Caffe's rules, checked as Caffe checks them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from attention_transfer._hints import did_you_mean
from attention_transfer.caffe import schema
from attention_transfer.caffe.layers import Layer
from attention_transfer.caffe.layers.base import LayerError

PHASES = {"TRAIN": schema.TRAIN, "TEST": schema.TEST}


def select(net: Any, phase: str, level: int = 0, stages: Collection[str] = ()) -> Any:
    """A copy of `net` with the layers that the state includes.

    A rule holds if all its parts hold; a list of rules if one of them does.

    Raises:
        ValueError: if a layer has both `include` and `exclude` rules, or the phase is unknown.
    """
    if phase not in PHASES:
        raise ValueError(f"Net: expected the phase TRAIN or TEST, got {phase!r}.")
    state = schema.NetState(phase=PHASES[phase], level=level or net.state.level)
    state.stage.extend([*net.state.stage, *stages])
    selected = schema.NetParameter()
    selected.CopyFrom(net)
    del selected.layer[:]
    selected.layer.extend(layer for layer in net.layer if is_in(layer, state))
    selected.state.CopyFrom(state)
    return selected


def is_in(layer: Any, state: Any) -> bool:
    """Whether a layer's rules include it in a net of this NetState.

    Raises:
        ValueError: if it has both `include` and `exclude` rules.
    """
    if layer.include and layer.exclude:
        raise ValueError(f"Net: layer {layer.name!r}: expected include or exclude rules, got both.")
    if layer.include:
        return any(_holds(rule, state) for rule in layer.include)
    return not any(_holds(rule, state) for rule in layer.exclude)


def _holds(rule: Any, state: Any) -> bool:
    return (
        (not rule.HasField("phase") or rule.phase == state.phase)
        and (not rule.HasField("min_level") or state.level >= rule.min_level)
        and (not rule.HasField("max_level") or state.level <= rule.max_level)
        and all(stage in state.stage for stage in rule.stage)
        and all(stage not in state.stage for stage in rule.not_stage)
    )


Version = tuple[int, int]  # the layer and the top that made it: a name's value between two in-place layers


@dataclass
class Wiring:
    """Where each bottom comes from, and where each top goes.

    Attributes:
        sources: for each layer, the version of each bottom.
        uses: for each version, the (layer, bottom) pairs that read it.
        last: for each name, the last version.
    """

    sources: list[list[Version]] = field(default_factory=list)
    uses: dict[Version, list[tuple[int, int]]] = field(default_factory=dict)
    last: dict[str, Version] = field(default_factory=dict)

    def outputs(self) -> list[str]:
        """Names of the blobs that no layer reads, in the order in which they are made."""
        return [
            name
            for name, version in sorted(self.last.items(), key=lambda item: item[1])
            if not self.uses[version]
        ]

    def reaching(self, layers: Sequence[Layer], weights: Sequence[Sequence[float]]) -> set[int]:
        """The layers from which a gradient can come: those above which stands a loss, and no cut bottom."""
        found: set[int] = set()
        for index in reversed(range(len(layers))):
            uses = [use for top in range(len(layers[index].tops)) for use in self.uses[index, top]]
            if any(weights[index]) or any(i in found and bottom not in layers[i].cut for i, bottom in uses):
                found.add(index)
        return found

    def ancestors(self, layer: int) -> set[int]:
        """The layers that `layer` needs, itself too."""
        found, waiting = set(), [layer]
        while waiting:
            index = waiting.pop()
            if index not in found:
                found.add(index)
                waiting += [source for source, _ in self.sources[index]]
        return found


def _refuse(error: LayerError) -> None:
    raise error


def connect(layers: Sequence[Layer], fault: Callable[[LayerError], None] = _refuse) -> Wiring:
    """Follow the names from layer to layer.

    Args:
        fault: what to do with an error; raises it, by default, and may go on to the next.

    Raises:
        ValueError: if a bottom is unknown, a layer has too few or too many bottoms or tops, or two layers
            make one blob; also where an in-place layer would write onto a blob that another layer reads.
    """
    wiring = Wiring()
    for index, layer in enumerate(layers):
        for error in count_errors(layer):
            fault(error)
        for name in layer.bottoms:
            if name not in wiring.last:
                hint = did_you_mean(name, wiring.last) or "Layers read only what layers before them make."
                fault(layer.error("bottoms that earlier layers make", f"{name!r}", hint))
                wiring.last[name] = (-1, len(wiring.last))
                wiring.uses[wiring.last[name]] = []
        wiring.sources.append([wiring.last[name] for name in layer.bottoms])
        for bottom, version in enumerate(wiring.sources[index]):
            wiring.uses[version].append((index, bottom))
        for top, name in enumerate(layer.tops):
            if wrong := _top_error(wiring, layer, top):
                fault(wrong)
            wiring.last[name] = (index, top)
            wiring.uses[index, top] = []
    for index, layer in enumerate(layers):
        if wrong := _in_place_error(wiring, index, layer):
            fault(wrong)
    return wiring


def count_errors(layer: Layer) -> Iterator[LayerError]:
    """What is wrong with the numbers of a layer's bottoms and tops."""
    for what, count, (least, most) in (
        ("bottom", len(layer.bottoms), layer.bottoms_expected),
        ("top", len(layer.tops), layer.tops_expected),
    ):
        if count < least or (most is not None and count > most):
            numbers = f"{least} to {most}" if most is not None else f"{least} or more"
            numbers = f"{least}" if least == most else numbers
            yield layer.error(f"{numbers} {what}s", f"{count}")


def _top_error(wiring: Wiring, layer: Layer, top: int) -> LayerError | None:
    name = layer.tops[top]
    at_same_place = top < len(layer.bottoms) and layer.bottoms[top] == name
    if at_same_place and not layer.allows_in_place:
        return layer.error("a top of its own", f"{name!r}, its bottom", "This type cannot work in place.")
    if not at_same_place and name in wiring.last:
        return layer.error(
            "a top that no other layer makes", f"{name!r}", "Caffe: produced by multiple sources."
        )
    return None


def _in_place_error(wiring: Wiring, index: int, layer: Layer) -> LayerError | None:
    for top, name in enumerate(layer.tops):
        if top < len(layer.bottoms) and layer.bottoms[top] == name:
            others = [use for use in wiring.uses[wiring.sources[index][top]] if use != (index, top)]
            if others:
                remedy = "Caffe: the name is produced by multiple sources. Read it after this layer."
                return layer.error(
                    f"to be the only reader of {name!r}, which it overwrites", "another one", remedy
                )
    return None


def loss_weights(layer: Layer) -> list[float]:
    """The loss weight of each top.

    Raises:
        ValueError: if there are some, but not one for each top.
    """
    given = list(layer.spec.loss_weight)
    if given and len(given) != len(layer.tops):
        raise layer.error(f"no loss_weight, or one for each of {len(layer.tops)} tops", f"{len(given)}")
    return given or [layer.default_loss_weight, *[0.0] * (len(layer.tops) - 1)][: len(layer.tops)]
