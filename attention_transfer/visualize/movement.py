"""What the report says of how the attention of students moved over the epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attention_transfer.runs.run import Run
from attention_transfer.visualize import charts, overlays, pictures
from attention_transfer.visualize.groups import TEACHER, Group
from attention_transfer.visualize.looking import class_name
from attention_transfer.visualize.snapshots import FILE, Snapshots

STUDENTS = 3  # shown side by side


@dataclass(frozen=True)
class _Moving:
    """A student of a group, and where it looked."""

    group: Group
    run: Run
    snapshots: Snapshots

    def maps(self, layer: str) -> Tensor:
        """(e, n, h, w)"""
        return self.snapshots.maps[self.snapshots.layers.index(layer)]


def section(groups: Sequence[Group]) -> dict[str, Any] | None:
    """The parts of the section, for the template; None if no student's maps were kept."""
    students = [found for group in groups if group.role != TEACHER and (found := _find(group))]
    if not students:
        return None
    main = next((each for each in reversed(students) if each.snapshots.teacher), students[-1])
    shown = [each for each in (_beside(each.group, main) for each in students) if each][:STUDENTS]
    shown = shown if any(each.run is main.run for each in shown) else [*shown[: STUDENTS - 1], main]
    snapshots = main.snapshots
    epochs = sorted({epoch for each in shown for epoch in each.snapshots.epochs})
    return {
        "epochs": epochs,
        "total": max(epochs),
        "layers": snapshots.layers,
        "students": shown,
        "cards": [_card(main, shown, i) for i in range(len(snapshots.labels))],
        "charts": _charts(main, shown),
    }


def _find(group: Group) -> _Moving | None:
    """The first run of a group that kept maps of an epoch."""
    return next(filter(None, (_read(group, run) for run in group.runs)), None)


def _beside(group: Group, main: _Moving) -> _Moving | None:
    """The run of a group that shows the same images and layers, of the same seed if there is one."""
    found = [each for run in group.runs if (each := _read(group, run))]
    alike = [
        each
        for each in found
        if each.snapshots.shows_images_of(main.snapshots)
        and set(main.snapshots.layers) <= set(each.snapshots.layers)
    ]
    seed = main.run.settings.get("seed")
    return min(alike, key=lambda each: each.run.settings.get("seed") != seed, default=None)


def _read(group: Group, run: Run) -> _Moving | None:
    if not (run.folder / FILE).exists():
        return None
    snapshots = Snapshots.read(run.folder / FILE)
    return _Moving(group, run, snapshots) if snapshots.epochs else None


def _card(main: _Moving, shown: Sequence[_Moving], i: int) -> dict[str, Any]:
    pixels = overlays.as_rgb(main.snapshots.images[i])
    size = (pixels.shape[0], pixels.shape[1])
    layers = main.snapshots.layers
    return {
        "label": class_name(main.snapshots.classes, int(main.snapshots.labels[i])),
        "picture": {"name": f"moving{i}", **pictures.picture(pixels)},
        "teacher": [pictures.map_source(maps[i].float(), size) for maps in main.snapshots.teacher],
        "rows": [
            {"student": each, "strips": [pictures.strip(each.maps(layer)[:, i].float()) for layer in layers]}
            for each in shown
        ],
    }


def _charts(main: _Moving, shown: Sequence[_Moving]) -> list[charts.Chart]:
    """How alike the maps are to the teacher's, a chart a layer."""
    drawn = []
    for layer, teacher in zip(main.snapshots.layers, main.snapshots.teacher, strict=False):
        series = [
            charts.Series(
                each.group.label,
                each.group.style,
                [each.snapshots.agreement(each.snapshots.layers.index(layer), teacher)],
            )
            for each in shown
        ]
        drawn.append(charts.draw(f"Likeness to the teacher at {layer}", "cosine", series))
    return [chart for chart in drawn if chart]
