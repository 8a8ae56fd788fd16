"""The report of some runs: one HTML page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attention_transfer._errors import InputError
from attention_transfer._extras import require
from attention_transfer._files import write_atomically
from attention_transfer.runs.run import Run
from attention_transfer.terms.declaration import built_in
from attention_transfer.visualize import charts, looking, movement, overlays, summary
from attention_transfer.visualize.examples import Examples
from attention_transfer.visualize.groups import TEACHER, Group, find_teachers, group_runs

_CHARTS = {
    "val/error": ("Validation error", "%"),
    "train/error": ("Training error", "%"),
    "train/loss": ("Training loss, all terms", "nats"),
    "train/ce": ("Cross-entropy term", "nats"),
}
_PLAN_NAMES = {
    "student_shape": "student’s shape",
    "teacher_shape": "teacher’s shape",
    "shares": "share of the gradient at the first batch",
}


def write_report(
    runs: Sequence[Path | str],
    output: Path | str,
    *,
    examples: Examples | None = None,
    teacher: Path | str | None = None,
) -> Path:
    """Write one self-contained HTML page about some runs.

    Runs that differ only by their seed are shown as one method with its mean and spread. Runs still in
    progress are shown as such.

    Args:
        runs: run folders. A teacher's own run may be among them; one in RUN/teacher is found.
        output: the HTML file to write.
        examples: attention maps on test images, from `collect_examples`.
        teacher: the teacher's run folder, where neither the runs nor their recipes tell.

    Raises:
        FileNotFoundError: if a folder is not a run folder.
        ValueError: if there are no runs, or a file of a run is damaged.
    """
    if not runs:
        raise InputError(
            "write_report: expected at least one run folder, got none. Give folders `train` wrote."
        )
    unique = {Path(folder).resolve(): Path(folder) for folder in runs}
    read = [Run(folder).check() for folder in unique.values()]
    html = _render(_page(group_runs(read, find_teachers(read, teacher)), examples))
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, html.encode("utf-8", "replace"))
    return output


def _render(page: dict[str, Any]) -> str:
    jinja2 = require("jinja2", extra="train", user="write_report")
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        # guard: report-escapes
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    parts = {name: (here / f"report.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    return environment.get_template("report.html").render(**page, **parts)


def _page(groups: Sequence[Group], examples: Examples | None) -> dict[str, Any]:
    metric = summary.choose_metric(groups)
    name = summary.METRICS[metric]
    return {
        **_heading(groups),
        "summary": summary.summarise(groups),
        "metric": name,
        "groups": groups,
        "rows": [_row(group, groups, metric) for group in groups],
        "dots": charts.dot_plot(f"Final {name}", "%", metric, groups),
        "charts": _charts(groups),
        "plans": _plans(groups),
        "runs": _runs(groups, metric),
        "examples": looking.section(examples) if examples else None,
        "moving": movement.section(groups),
        "scale": [f"rgb({r} {g} {b})" for r, g, b in overlays.colour_table()[::51].tolist()],
        "colours": overlays.colour_table().tobytes().hex(),
        "width": charts.WIDTH,
        "height": charts.HEIGHT,
        "frame": {
            "left": charts.LEFT,
            "right": charts.WIDTH - charts.RIGHT,
            "top": charts.TOP,
            "bottom": charts.HEIGHT - charts.BOTTOM,
        },
    }


def _heading(groups: Sequence[Group]) -> dict[str, str]:
    students = [group for group in groups if group.role != TEACHER] or list(groups)
    models = _distinct(group.model for group in students)
    teachers = _distinct(group.model for group in groups if group.role == TEACHER)
    title = " and ".join(models)
    if teachers and any(group.role not in (TEACHER, "none") for group in groups):
        title += f", taught by {' and '.join(teachers)}"
    recipes = [run.settings for group in students for run in group.runs]
    data = _distinct(Path(str(recipe["data"])).name for recipe in recipes if recipe.get("data"))
    epochs = _distinct(str(recipe["epochs"]) for recipe in recipes if recipe.get("epochs"))
    limits = _distinct(
        f"{recipe['max_train']:,}" for recipe in recipes if isinstance(recipe.get("max_train"), int)
    )
    facts = [
        " and ".join(data),
        f"{' or '.join(limits)} training images" if limits else "",
        f"{' or '.join(epochs)} epochs" if epochs else "",
        f"{len(recipes)} run{'s' * (len(recipes) > 1)}",
    ]
    return {"title": title, "facts": " · ".join(fact for fact in facts if fact)}


def _distinct(values: Any) -> list[str]:
    return list(dict.fromkeys(values))


def _row(group: Group, groups: Sequence[Group], metric: str) -> dict[str, Any]:
    """A line of the final table."""
    error, rate, seconds = (group.spread(name) for name in (metric, "images_per_second", "wall_seconds"))
    parameters = _distinct(f"{p:,.0f}" for run in group.runs if (p := run.number("parameters")) is not None)
    change, is_clear = _change(group, groups, metric)
    return {
        "group": group,
        "error": str(error) if error else "–",
        "change": change,
        "is_clear": is_clear,
        "parameters": " / ".join(parameters) or "–",
        "rate": f"{rate.mean:,.0f}" if rate else "–",
        "time": _duration(seconds.mean) if seconds else "–",
        "state": _state(group.runs),
    }


def _runs(groups: Sequence[Group], metric: str) -> dict[str, Any] | None:
    """Every student's run with its numbers and what sets it apart in the recipe; None for a single run."""
    runs = [(group, run) for group in groups if group.role != TEACHER for run in group.runs]
    if len(runs) < 2:
        return None
    names = _distinct(name for _, run in runs for name in run.settings if name not in ("output", "seed"))
    differing = [
        name
        for name in names
        if len({str(run.settings.get(name)) for _, run in runs}) > 1 and name != "method"
    ]
    return {
        "settings": differing,
        "rows": [
            {
                "group": group,
                "name": run.folder.name,
                "seed": _cell(run.settings.get("seed")),
                "numbers": [_error(run, metric), _error(run, "validation_error")],
                "settings": [_setting(run, name) for name in differing],
            }
            for group, run in runs
        ],
    }


def _setting(run: Run, name: str) -> str:
    """A field of the recipe; a student alone has no teacher, whatever its recipe names."""
    return "–" if run.method == "none" and name.startswith("teacher") else _cell(run.settings.get(name))


def _error(run: Run, name: str) -> str:
    error = run.number(name)
    return "–" if error is None else f"{error:.2f}"


def _change(group: Group, groups: Sequence[Group], metric: str) -> tuple[str, bool]:
    """The points gained or lost against the student alone, and whether they are more than chance."""
    alone = summary.baseline(group, groups) if group.role not in (TEACHER, "none") else None
    if alone is None or not (group.spread(metric) and alone.spread(metric)):
        return "", False
    change = summary.compare(group, alone, metric)
    return f"{change.mean:+.1f}".replace("-", "−"), change.is_clear


def _state(runs: Sequence[Run]) -> str:
    running = [run for run in runs if not run.finished]
    if not running:
        return str(len(runs))
    epochs = ", ".join(
        f"{len(run.metrics.get('epoch', []))} of {run.settings.get('epochs', '?')}" for run in running
    )
    progress = f"{len(running)} in progress (epoch {epochs})"
    return f"{len(runs) - len(running)} finished, {progress}" if len(running) < len(runs) else progress


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _charts(groups: Sequence[Group]) -> list[charts.Chart]:
    columns = _distinct(name for group in groups for run in group.runs for name in run.metrics)
    known = _CHARTS | {name: _term_chart(name) for name in columns if name.startswith("train/")} | _CHARTS
    drawn = [charts.line_chart(title, unit, name, groups) for name, (title, unit) in known.items()]
    return [chart for chart in drawn if chart]


def _term_chart(column: str) -> tuple[str, str]:
    """The title and unit of what a term contributed, such as "train/at/layer1"."""
    _, term, *layer = column.split("/", 2)
    title = built_in()[term].title if term in built_in() else term
    return f"{title[:1].upper()}{title[1:]}, the term{''.join(f' at {each}' for each in layer)}", "weighted"


def _plans(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The pairs of layers that each method compared; runs of one group share them."""
    plans = []
    for group in groups:
        plan = next((run.plan for run in group.runs if run.plan), None)
        if plan:
            columns = _distinct(name for pair in plan for name in pair)
            cells = [[_cell(pair.get(name, "")) for name in columns] for pair in plan]
            plans.append(
                {"group": group, "columns": [_PLAN_NAMES.get(name, name) for name in columns], "rows": cells}
            )
    return plans


def _percent(share: object) -> str:
    return f"{share:.1%}".replace("%", " %") if isinstance(share, float) else str(share)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_percent(part)}" for name, part in value.items()) or "–"
    if isinstance(value, list):
        return " × ".join(map(str, value))
    return "–" if value is None else str(value)
