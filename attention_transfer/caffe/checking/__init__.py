"""Finding what is wrong with an attention transfer net before Caffe does, or does not, tell.

The rules are in `layers.py` (nets of any kind), `branches.py` (the attention maps) and `teachers.py`; each
looks at structure, never at names, and stands in one table under the pitfall's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

from attention_transfer._errors import InputError
from attention_transfer.caffe import schema
from attention_transfer.caffe.assembly import Trial, try_out
from attention_transfer.caffe.checking import branches, layers, teachers  # noqa: F401 (they enter their rules)
from attention_transfer.caffe.checking.rules import RULES, Blame, Case
from attention_transfer.caffe.checking.spelling import Misspelt, parse_leniently
from attention_transfer.caffe.files import prototxt as files
from attention_transfer.caffe.graph import Graph
from attention_transfer.caffe.layers.base import LayerError, UnsupportedError
from attention_transfer.caffe.schema import text_format
from attention_transfer.caffe.sizes import untold, with_known_sizes


@dataclass(frozen=True)
class Finding:
    """Something wrong with a net.

    Attributes:
        pitfall: its short name.
        layers: the names of the layers to blame, in the order of the net.
        line: where in the file the first of them begins, or, for a misspelt field, where that stands.
        message: what real Caffe does about it.
        mend: how to repair it.
        note: whether it is only to be known: some Caffe, if not every one, runs the net.
    """

    pitfall: str
    layers: list[str]
    line: int
    message: str
    mend: str
    note: bool = False


def check(
    prototxt: str | PathLike[str] | Any,
    solver: str | PathLike[str] | Any = None,
    *,
    channels: int | None = None,
) -> list[Finding]:
    """What is wrong with a net for attention transfer; nothing for a clean one.

    The phases TRAIN and TEST are looked at, in the states that the solver names too, and the net is built in
    each, without memory: what Caffe refuses then is a finding of the name does_not_build. Shapes are inferred
    where the sizes of the data are known; what needs them is not found elsewhere. What only the data or the
    intention tell, such as activations too small for Normalize's eps, is not found. Nor is what
    Caffe runs and only this package does not.

    Args:
        prototxt: a path, or a NetParameter, whose lines are those of its own text form.
        solver: a path or a SolverParameter. Without one, weight decay is assumed.
        channels: of the images, where neither the data nor the prototxt tell.

    Raises:
        ValueError: if a file does not parse (an unknown field is a finding), or in each phase a layer reads a
            blob that nothing writes.
        OSError: if a file cannot be read.
    """
    text, source = _text(prototxt)
    net, unknown = parse_leniently(text, source)
    _check_is_net(net, unknown, source)
    lines = _lines(text, net)
    found = [_misspelt(net, lines, fields) for fields in _by_name(unknown)]
    solver = _read_solver(solver)
    tried = [_case(net, state, solver, channels) for state in _states(solver)]
    found += _unwritten(tried, solver, source, lines)
    trials = [_counts_alone(trial) if case.graph.unwritten else trial for case, trial in tried]
    tried = [(case, trial) for case, trial in tried if not case.graph.unwritten]
    for name, rule in RULES.items():
        blames = [blame for case, _ in tried if (blame := rule(case))]
        if blames:
            found.append(_finding(name, blames, lines))
    blamed = {name for finding in found if not finding.note for name in finding.layers}
    found += _refused(net, trials, blamed, lines)
    return sorted(found, key=lambda finding: finding.line)


def _check_is_net(net: Any, unknown: list[Misspelt], source: str) -> None:
    """Raises ValueError for a solver's file, or one without layers."""
    solvers = set(schema.fields("SolverParameter")) & {field.name for field in unknown if field.layer is None}
    if solvers and not net.layer:
        raise InputError(
            f"check: expected a net's prototxt, got a solver's in {source}. Pass the net that it names, and "
            "the solver beside it (solver=, --solver)."
        )
    if not net.layer:
        raise InputError(f"check: expected a net with layers, got none in {source}.")


def _text(net: str | PathLike[str] | Any) -> tuple[str, str]:
    """The text of a net, and where it comes from."""
    if isinstance(net, schema.NetParameter):
        return text_format.MessageToString(net), "the net"
    return files.read_text(net, "check"), str(net)


def _read_solver(solver: str | PathLike[str] | Any) -> Any:
    if solver is None or isinstance(solver, schema.SolverParameter):
        return solver
    return files.read_solver(solver)


def _lines(text: str, net: Any) -> list[int]:
    """The line of each layer; an Input layer that stands for old `input` fields begins on the first."""
    lines = files.layer_lines(text)
    return [1] * (len(net.layer) - len(lines)) + lines


def _unwritten(
    tried: list[tuple[Case, Trial]], solver: Any, source: str, lines: list[int]
) -> Iterator[Finding]:
    """The phases that the solver asks for and that do not hold together.

    Raises:
        ValueError: if the net holds together in none.
    """
    broken = [case for case, _ in tried if case.graph.unwritten]
    if len(broken) == len(tried):
        layer, name = broken[0].graph.unwritten[0]
        raise InputError(
            f"check: {source}: expected bottoms that earlier layers write, got {name!r} in layer "
            f"{layer.name!r} ({layer.type}). Caffe stops there: unknown bottom blob."
        )
    for case in broken:
        if solver is not None and (case.train or solver.test_iter):
            layer, name = case.graph.unwritten[0]
            phase = "TRAIN" if case.train else "TEST"
            message = (
                f"Caffe stops while it builds the net in {phase}, as the solver asks it to: no layer before "
                f"{layer.name!r} writes its bottom {name!r}."
            )
            mend = f"Write {name!r} in the phase {phase} too, or keep the layer out of it."
            yield Finding("does_not_build", [layer.name], lines[layer.index], message, mend)


def _states(solver: Any) -> list[Any]:
    """The states in which a solver builds the net, and those of the two phases alone."""
    given = [] if solver is None else [(schema.TRAIN, solver.train_state)]
    given += [] if solver is None else [(schema.TEST, state) for state in solver.test_state]
    states: list[Any] = []
    for phase, stated in [*given, (schema.TRAIN, schema.NetState()), (schema.TEST, schema.NetState())]:
        state = schema.NetState()
        state.MergeFrom(stated)
        state.phase = phase
        if state not in states:
            states.append(state)
    return states


def _case(net: Any, state: Any, solver: Any, channels: int | None) -> tuple[Case, Trial]:
    phased = schema.NetParameter()
    phased.CopyFrom(net)
    phased.state.MergeFrom(state)
    train = state.phase == schema.TRAIN
    phase = "TRAIN" if train else "TEST"
    trial = try_out(with_known_sizes(phased, channels), phase)
    if trial.refused and channels is None and untold(phased):  # what an assumption refuses is no mistake
        other = try_out(with_known_sizes(phased, 1), phase).refused
        trial.refused = {place: error for place, error in trial.refused.items() if place in other}
    return Case(Graph(phased, trial.shapes, trial.lacking), train, solver), trial


def _counts_alone(trial: Trial) -> Trial:
    """A trial in a phase that does not hold together, for what is wrong in it whatever its bottoms are."""
    return replace(trial, refused={p: e for p, e in trial.refused.items() if p in trial.lacking})


def _refused(net: Any, trials: list[Trial], blamed: set[str], lines: list[int]) -> Iterator[Finding]:
    """What building the net in each phase refuses, but for layers that a rule blames already."""
    before = len(lines) - len(net.layer)
    for place, spec in enumerate(net.layer):
        errors = [(trial.phase, trial.refused[place]) for trial in trials if place in trial.refused]
        errors = [(phase, error) for phase, error in errors if not isinstance(error, UnsupportedError)]
        if not errors or spec.name in blamed:
            continue
        phases = " and ".join(dict.fromkeys(phase for phase, _ in errors))
        error, message, mend = errors[0][1], str(errors[0][1]), "Correct the layer."
        if isinstance(error, LayerError):
            message = f"layer {spec.name!r} ({spec.type}): expected {error.expected}, got {error.got}."
            mend = error.remedy or mend
        message = f"Caffe stops while it builds the net in {phases}: {message}"
        yield Finding("does_not_build", [spec.name], lines[before + place], message, mend)


def _finding(name: str, blames: list[Blame], lines: list[int]) -> Finding:
    nodes = {node.index: node.name for blame in reversed(blames) for node in blame.nodes}
    order = sorted(nodes)
    names = list(dict.fromkeys(nodes[index] for index in order))
    line = lines[order[0]] if order else 1
    return Finding(name, names, line, blames[0].message, blames[0].mend, blames[0].note)


def _by_name(unknown: list[Misspelt]) -> list[list[Misspelt]]:
    fields: dict[tuple[str, str], list[Misspelt]] = {}
    for field in unknown:
        fields.setdefault((field.message, field.name), []).append(field)
    return list(fields.values())


def _misspelt(net: Any, lines: list[int], fields: list[Misspelt]) -> Finding:
    first = fields[0]
    before = len(lines) - len(net.layer)
    indices = [field.layer for field in fields if field.layer is not None]
    names = list(dict.fromkeys(net.layer[index - before].name for index in indices))
    places = f"layer{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}" if names else "the net"
    message = (
        f"Caffe stops while it reads the file: in {places}, {first.message} has no field {first.name!r}."
    )
    mend = f"Did you mean {first.near}?" if first.near else "Take it out, or look its name up in caffe.proto."
    return Finding("unknown_field", names, first.line, message, mend)
