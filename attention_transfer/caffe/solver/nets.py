"""What a solver prototxt asks for, checked, and the nets that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attention_transfer._errors import InputError
from attention_transfer.caffe import schema
from attention_transfer.caffe.files.prototxt import read_net
from attention_transfer.caffe.net import Net
from attention_transfer.caffe.solver.rates import check_policy
from attention_transfer.caffe.solver.updates import check_type

TRAIN_NETS = ("net", "net_param", "train_net", "train_net_param")


def check_solver(param: Any) -> None:
    """Refuse a SolverParameter that cannot be followed.

    Raises:
        ValueError: in one line that names the field.
    """
    _train_source(param)
    _test_sources(param)
    check_policy(param)
    check_type(param)
    for name in ("iter_size", "average_loss"):
        if getattr(param, name) < 1:
            raise InputError(f"Solver: expected {name} of 1 or more, got {getattr(param, name)}.")
    for name in ("display", "snapshot", "test_interval", "max_iter"):
        if getattr(param, name) < 0:
            raise InputError(f"Solver: expected {name} of 0 or more, got {getattr(param, name)}.")
    if param.test_iter and (param.test_interval < 1 or min(param.test_iter) < 1):
        got = f"test_interval {param.test_interval} and test_iter {', '.join(map(str, param.test_iter))}"
        raise InputError(f"Solver: expected test_interval and each test_iter of 1 or more, got {got}.")
    if param.snapshot_format == param.HDF5:
        raise InputError(
            "Solver: expected the snapshot_format BINARYPROTO, got HDF5. Remove the line: Caffe and this "
            "package both read the binary form."
        )


def make_nets(param: Any, folder: Path) -> tuple[Net, list[Net]]:
    """The train net and the test nets, each with its own parameters.

    Args:
        param: a checked SolverParameter.
        folder: where else to look for files than in the working directory.

    Raises:
        ValueError, OSError: as `Net`.
    """
    net = _make_net(_read(_train_source(param), folder), schema.TRAIN, param.train_state)
    extras = list(param.test_state) or [schema.NetState()] * len(param.test_iter)
    sources = _test_sources(param)
    tests = [
        _make_net(_read(source, folder), schema.TEST, extra)
        for source, extra in zip(sources, extras, strict=True)
    ]
    return net, tests


def starting_weights(param: Any, folder: Path) -> list[Path]:
    """The files that `weights` names, by commas or several times."""
    named = (name.strip() for field in param.weights for name in field.split(","))
    return [_find(name, folder) for name in named if name]


def _find(name: str, folder: Path) -> Path:
    """A file that the prototxt names: in the working directory, as in Caffe, or else in `folder`."""
    beside = folder / name
    return beside if not Path(name).exists() and beside.exists() else Path(name)


def _read(source: Any, folder: Path) -> Any:
    return source if isinstance(source, schema.NetParameter) else read_net(_find(source, folder))


def _make_net(net: Any, phase: int, extra: Any) -> Net:
    """A net in a state that is the default, overridden by the net's own, overridden by the solver's."""
    state = schema.NetState(phase=phase)
    state.MergeFrom(net.state)
    state.MergeFrom(extra)
    stateless = schema.NetParameter()
    stateless.CopyFrom(net)
    stateless.ClearField("state")
    name: Any = "TRAIN" if state.phase == schema.TRAIN else "TEST"
    return Net(stateless, phase=name, level=state.level, stages=list(state.stage))


def _train_source(param: Any) -> Any:
    given = [name for name in TRAIN_NETS if param.HasField(name)]
    if len(given) != 1:
        raise InputError(
            f"Solver: expected exactly one train net out of {', '.join(TRAIN_NETS)}, got "
            f"{' and '.join(given) or 'none'}."
        )
    return getattr(param, given[0])


def _test_sources(param: Any) -> list[Any]:
    """The net of each test: those of its own, then the common net as often as test_iter has more entries."""
    own = [*param.test_net_param, *param.test_net]
    common = [getattr(param, name) for name in ("net_param", "net") if param.HasField(name)]
    count = len(param.test_iter)
    if count < len(own) or (count > len(own) and not common):
        raise InputError(
            f"Solver: expected a test_iter for each of {len(own)} test nets, got {count}. "
            "It says how many batches a test takes."
        )
    if param.test_state and len(param.test_state) != count:
        got = len(param.test_state)
        raise InputError(f"Solver: expected a test_state for each of {count} test nets, or none, got {got}.")
    return own + common * (count - len(own))
