"""Solvers against what a real Caffe computed, their files, and the command."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from conftest import SHARED
from torch import Tensor

from attention_transfer.caffe import Net, Solver, schema
from attention_transfer.caffe.files.caffemodel import (
    blob_array,
    read_caffemodel,
    read_solverstate,
    write_binary,
)
from attention_transfer.caffe.files.prototxt import parse_net, read_solver
from attention_transfer.cli import main
from attention_transfer.cli.caffe import train as caffe_train

REFERENCE = SHARED / "reference" / "caffe"
CASES = [folder.name for folder in sorted((REFERENCE / "solvers").glob("*"))]
ABSENT = [pytest.param("", marks=pytest.mark.skip("no shared/reference"))]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def load(folder: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(folder / name) as arrays:
        return dict(arrays)


def batches(folder: Path, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    arrays = load(folder, "data.npz")
    count = len(next(iter(arrays.values())))
    return [{k: torch.from_numpy(v[i]).to(dtype) for k, v in arrays.items()} for i in range(count)]


def assert_close(got: Any, want: np.ndarray, tolerance: dict[str, float], key: str) -> None:
    values = np.asarray(got.detach().double() if isinstance(got, Tensor) else got)
    assert values.shape == want.shape, key
    absolute = tolerance["atol_scalar" if key.startswith("loss") or "/loss" in key else "atol"]
    worst = np.abs(values - want).max(initial=0)
    assert worst <= tolerance["rtol"] * np.abs(want).max(initial=0) + absolute, f"{key}: off by {worst:.3g}"


def run(solver: Solver, iterations: int) -> dict[str, Any]:
    """What a reference solver's expected.npz holds."""
    found: dict[str, Any] = {"loss": [], "learning_rate": []}
    for iteration in range(iterations):
        solver.step(1)
        found["loss"].append(solver.loss)
        found["learning_rate"].append(solver.learning_rate)
        for name, value in solver.losses.items():
            found.setdefault(f"loss/{name}", []).append(value)
        if iteration == 0:
            found |= parameters(solver, "param_iter1")
    found |= parameters(solver, "param")
    for layer, blobs in solver.history.items():
        for index, buffers in enumerate(blobs):
            found |= {f"history/{layer}/{index}/{j}": buffer for j, buffer in enumerate(buffers)}
    return found


def parameters(solver: Solver, kind: str) -> dict[str, Tensor]:
    return {
        f"{kind}/{layer}/{index}": blob.detach().clone()
        for layer, blobs in solver.net.params.items()
        for index, blob in enumerate(blobs)
    }


@DTYPES
@pytest.mark.parametrize("case", CASES or ABSENT)
def test_reference(case: str, dtype: torch.dtype) -> None:
    folder = REFERENCE / "solvers" / case
    meta = json.loads((folder / "meta.json").read_text())
    tolerance = meta["tolerance"][str(dtype).removeprefix("torch.")]
    feed = batches(folder, dtype)
    solver = Solver(folder / "solver.prototxt", folder / "init.caffemodel", feed)
    solver.net.to(dtype)
    found = run(solver, meta["iterations"])
    for key, want in load(folder, "expected.npz").items():
        assert_close(found[key], want, tolerance, key)


PITFALLS = [folder.parent.name for folder in sorted((REFERENCE / "pitfalls").glob("*/solver.prototxt"))]
PITFALL_TOLERANCE = {torch.float64: (1e-10, 1e-12), torch.float32: (2e-5, 1e-6)}


@DTYPES
@pytest.mark.parametrize("which", ["net", "fixed"])
@pytest.mark.parametrize("case", PITFALLS or ABSENT)
def test_pitfalls_train_as_in_caffe(case: str, which: str, dtype: torch.dtype) -> None:
    folder = REFERENCE / "pitfalls" / case
    param = read_solver(folder / "solver.prototxt")
    param.net = str(folder / f"{which}.prototxt")
    own = folder / f"init_{which}.caffemodel"
    weights = own if own.exists() else folder / "init.caffemodel"
    solver = Solver(param, weights, batches(folder, dtype))
    solver.net.to(dtype)
    found = run(solver, len(batches(folder, dtype)))
    rtol, atol = PITFALL_TOLERANCE[dtype]
    tolerance = {"rtol": rtol, "atol": atol, "atol_scalar": atol}
    expected = {
        key: want for key, want in load(folder, "expected.npz").items() if key.startswith(f"{which}/")
    }
    assert expected
    for key, want in expected.items():
        assert_close(found[key.removeprefix(f"{which}/")], want, tolerance, key)


# ---------------------------------------------------------------------------------------- learning rates

TINY = """
layer { name: "data" type: "Input" top: "data" top: "label"
  input_param { shape { dim: 4 dim: 3 } shape { dim: 4 } } }
layer { name: "fc" type: "InnerProduct" bottom: "data" top: "fc" param { %s } param { %s }
  inner_product_param { num_output: 2 weight_filler { type: "gaussian" std: 0.1 } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }
"""


def tiny_feed(count: int = 5) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    return [
        {"data": torch.randn(4, 3, generator=draw), "label": torch.tensor([0.0, 1, 1, 0])}
        for _ in range(count)
    ]


def tiny(
    folder: Path, text: str, feed: Any = None, *, weight: str = "", bias: str = "", **rest: Any
) -> Solver:
    (folder / "net.prototxt").write_text(TINY % (weight, bias))
    head = "" if "net" in text else 'net: "net.prototxt" random_seed: 5 solver_mode: CPU '
    (folder / "solver.prototxt").write_text(head + text)
    return Solver(folder / "solver.prototxt", feed=tiny_feed() if feed is None else feed, **rest)


def f32(number: float) -> float:
    return float(np.float32(number))


@pytest.mark.parametrize(
    ("policy", "rate"),
    [
        ('lr_policy: "fixed"', lambda t: f32(0.3)),
        ('lr_policy: "step" gamma: 0.7 stepsize: 3', lambda t: f32(0.3) * f32(0.7) ** (t // 3)),
        ('lr_policy: "exp" gamma: 0.7', lambda t: f32(0.3) * f32(0.7) ** t),
        # a float times an int is a float in Caffe, whatever the precision of the net
        (
            'lr_policy: "inv" gamma: 0.7 power: 0.6',
            lambda t: f32(0.3) * (1 + f32(f32(0.7) * t)) ** -f32(0.6),
        ),
        (
            'lr_policy: "multistep" gamma: 0.7 stepvalue: 0 stepvalue: 4 stepvalue: 4',
            lambda t: f32(0.3) * f32(0.7) ** (1 + (t >= 4) + (t >= 5)),
        ),
        ('lr_policy: "poly" power: 1.7 max_iter: 11', lambda t: f32(0.3) * (1 - t / 11) ** f32(1.7)),
        (
            'lr_policy: "sigmoid" gamma: -0.7 stepsize: 4',
            lambda t: f32(0.3) / (1 + np.exp(f32(0.7) * (t - 4))),
        ),
    ],
)
def test_learning_rates(policy: str, rate: Any, tmp_path: Path) -> None:
    solver = tiny(tmp_path, f"base_lr: 0.3 {policy}")
    assert solver.learning_rate == pytest.approx(rate(0), rel=1e-6)
    solver.net.double()
    assert solver.learning_rate == pytest.approx(rate(0), rel=1e-14)
    for iteration in range(8):
        solver.step(1)
        assert solver.iteration == iteration + 1
        assert solver.learning_rate == pytest.approx(rate(iteration), rel=1e-14)


# --------------------------------------------------------------------------------------- what takes part

ADAM = 'type: "Adam" base_lr: 0.1 lr_policy: "fixed" momentum: 0.9 weight_decay: 0.1 '
SGD = 'base_lr: 0.1 lr_policy: "fixed" momentum: 0.9 weight_decay: 0.1 '


def test_frozen_blob_that_decays_moves_its_history_in_adam(tmp_path: Path) -> None:
    solver = tiny(tmp_path, ADAM, weight="lr_mult: 0")
    weight = solver.net.params["fc"][0].detach().clone()
    solver.step(2)
    assert torch.equal(solver.net.params["fc"][0], weight)
    expected = weight * f32(0.1) * (1 - f32(0.9)) * (1 + f32(0.9))
    torch.testing.assert_close(solver.history["fc"][0][0], expected)


@pytest.mark.parametrize(("text", "weight"), [(SGD, "lr_mult: 0"), (ADAM, "lr_mult: 0 decay_mult: 0")])
def test_what_cannot_change_costs_nothing(text: str, weight: str, tmp_path: Path) -> None:
    solver = tiny(tmp_path, text, weight=weight)
    solver.step(2)
    for buffer in solver.history["fc"][0]:
        assert buffer.shape == (2, 3) and not buffer.any()
        assert buffer.untyped_storage().nbytes() == 4
    assert all(buffer.any() for buffer in solver.history["fc"][1])


def test_weights_decay_without_a_gradient(tmp_path: Path) -> None:
    text = (
        TINY % ("", "")
        + """
    layer { name: "alone" type: "InnerProduct" bottom: "data" top: "alone"
      inner_product_param { num_output: 1 weight_filler { type: "constant" value: 2 } } }"""
    )
    (tmp_path / "other.prototxt").write_text(text)
    solver = tiny(tmp_path, f'net: "other.prototxt" {SGD}')
    solver.step(1)
    torch.testing.assert_close(solver.net.params["alone"][0], torch.full((1, 3), 2 - 0.1 * 0.1 * 2))
    assert solver.losses["alone"] == pytest.approx(tiny_feed()[0]["data"].sum(1).mul(2).tolist(), rel=1e-5)


def test_no_graph_and_no_gradient_is_kept(tmp_path: Path) -> None:
    solver = tiny(tmp_path, SGD)
    solver.step(1)
    assert all(tensor.grad is None for tensor in solver.net.parameters())
    assert not any(tensor.requires_grad for tensor in solver.tensors.values())
    assert not any(buffer.requires_grad for buffer in solver.history["fc"][0])


# -------------------------------------------------------------------------------------------------- feeding


def test_a_list_begins_again_and_an_iterator_ends(tmp_path: Path) -> None:
    listed, doubled = (tiny(tmp_path, SGD, tiny_feed(2) * times) for times in (1, 2))
    for solver in (listed, doubled):
        solver.step(4)
    assert torch.equal(listed.net.params["fc"][0], doubled.net.params["fc"][0])
    passing = tiny(tmp_path, SGD, iter(tiny_feed(2)))
    passing.step(2)
    with pytest.raises(
        ValueError, match=r"^Solver: expected another batch, got the end of feed\. Pass a list"
    ):
        passing.step(1)
    with pytest.raises(ValueError, match="got the end of feed"):
        tiny(tmp_path, SGD, []).step(1)


def test_arrays_may_be_fed(tmp_path: Path) -> None:
    arrays = [{name: tensor.numpy() for name, tensor in batch.items()} for batch in tiny_feed()]
    tensors = tiny(tmp_path, SGD)
    fed = tiny(tmp_path, SGD, arrays)
    for solver in (tensors, fed):
        solver.step(2)
    assert torch.equal(tensors.net.params["fc"][0], fed.net.params["fc"][0])


def test_a_net_that_reads_its_own_data_takes_no_feed(whole: Path) -> None:
    with pytest.raises(ValueError, match=r"expected no feed for a net without Input layers, got one\."):
        Solver(whole / "solver.prototxt", feed=tiny_feed())


def test_input_layers_need_a_feed(tmp_path: Path) -> None:
    tiny(tmp_path, SGD)
    with pytest.raises(ValueError, match=r"Input layers \(data, label\), got no feed\. Pass feed, or read"):
        Solver(tmp_path / "solver.prototxt").step(1)
    tested = tiny(tmp_path, SGD + "test_iter: 1 test_interval: 1")
    with pytest.raises(ValueError, match="got no test_feed"):
        tested.step(1)
    Solver(tmp_path / "solver.prototxt", feed=tiny_feed(), test_feed=[tiny_feed()]).step(1)


# ------------------------------------------------------------------------------------------------ test nets


def test_scores_are_means_over_test_iter_of_shared_parameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    feed = tiny_feed(3)
    solver = tiny(
        tmp_path, SGD + "test_iter: 3 test_interval: 2 test_compute_loss: true test_initialization: false",
        test_feed=[feed],
    )  # fmt: skip
    solver.step(2)
    assert solver.tested == (-1, [])
    solver.net.double()
    (scores,) = solver.test()
    net = Net(tmp_path / "net.prototxt", solver.net.to_caffemodel()).double()
    want = np.mean([net(batch)["loss"].item() for batch in feed])
    assert scores == {"loss": pytest.approx(want), "total_loss": pytest.approx(want)}
    assert solver.tested == (2, [scores])
    assert capsys.readouterr().out.startswith("iteration 2  test net 0: loss ")


STATES = """
layer { name: "fed" type: "Input" top: "x" input_param { shape { dim: 1 dim: 1 } } }
layer { name: "a" type: "Power" bottom: "x" top: "a" include { stage: "one" } power_param { shift: 1 } }
layer { name: "b" type: "Power" bottom: "x" top: "b" include { stage: "two" } power_param { shift: 2 } }
layer { name: "c" type: "Power" bottom: "x" top: "c" include { phase: TRAIN min_level: 3 } }
"""


def test_states_choose_layers(tmp_path: Path) -> None:
    (tmp_path / "states.prototxt").write_text(STATES)
    solver = tiny(
        tmp_path, """net: "states.prototxt" base_lr: 1 lr_policy: "fixed" train_state { level: 3 }
        test_iter: 1 test_iter: 1 test_interval: 1 test_state { stage: "one" } test_state { stage: "two" }"""
    )  # fmt: skip
    assert solver.net.outputs == ["c"]
    assert [net.outputs for net in solver.test_nets] == [["a"], ["b"]]


def test_test_nets_of_their_own_come_first(tmp_path: Path) -> None:
    (tmp_path / "own.prototxt").write_text(TINY.replace("loss", "own") % ("", ""))
    own = 'test_net: "own.prototxt" test_iter: 1 test_iter: 1 test_interval: 1'
    solver = tiny(tmp_path, SGD + own + ' net: "net.prototxt" solver_mode: CPU')
    assert [net.outputs for net in solver.test_nets] == [["own"], ["loss"]]


# ----------------------------------------------------------------------------------- snapshots and resuming

WHOLE = """
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TRAIN }
  transform_param { crop_size: 4 mirror: true scale: 0.01 mean_value: 120 }
  data_param { source: "%(source)s" batch_size: 4 backend: LMDB } }
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TEST }
  transform_param { crop_size: 4 mirror: true scale: 0.01 mean_value: 120 }
  data_param { source: "%(source)s" batch_size: 3 backend: LMDB } }
layer { name: "noise" type: "DummyData" top: "noise"
  dummy_data_param { data_filler { type: "gaussian" std: 0.1 } shape { dim: 4 dim: 3 dim: 4 dim: 4 } }
  include { phase: TRAIN } }
layer { name: "sum" type: "Eltwise" bottom: "data" bottom: "noise" top: "sum" include { phase: TRAIN } }
layer { name: "sum" type: "Split" bottom: "data" top: "sum" include { phase: TEST } }
layer { name: "conv" type: "Convolution" bottom: "sum" top: "conv"
  convolution_param { num_output: 4 kernel_size: 3 weight_filler { type: "msra" } } }
layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "drop" type: "Dropout" bottom: "conv" top: "conv" }
layer { name: "fc" type: "InnerProduct" bottom: "conv" top: "fc"
  inner_product_param { num_output: 10 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }
layer { name: "accuracy" type: "Accuracy" bottom: "fc" bottom: "label" top: "accuracy"
  include { phase: TEST } }
"""
WHOLE_SOLVER = """net: "net.prototxt" base_lr: 0.05 lr_policy: "multistep" gamma: 0.5 stepvalue: 3
stepvalue: 4 weight_decay: 0.001 momentum: 0.9 max_iter: 12 iter_size: 2
test_iter: 2 test_interval: 3 snapshot: 5
snapshot_prefix: "%s/run" solver_mode: CPU """


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A folder with an LMDB of 10 images, a net full of randomness, and its solver."""
    draw = np.random.default_rng(0)
    with lmdb.open(str(tmp_path / "lmdb")) as environment, environment.begin(write=True) as transaction:
        for number in range(10):
            pixels = draw.integers(0, 256, (3, 6, 8), dtype=np.uint8)
            record = schema.Datum(channels=3, height=6, width=8, data=pixels.tobytes(), label=number)
            transaction.put(f"{number:08d}".encode(), record.SerializeToString())
    (tmp_path / "net.prototxt").write_text(WHOLE % {"source": tmp_path / "lmdb"})
    (tmp_path / "solver.prototxt").write_text(WHOLE_SOLVER % tmp_path)
    return tmp_path


def state_of(solver: Solver) -> list[Tensor]:
    blobs = [blob for layer in solver.net.params.values() for blob in layer]
    buffers = [b for layer in solver.history.values() for blob in layer for b in blob]
    return [tensor.detach().clone() for tensor in (*blobs, *buffers)]


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdaDelta"])
@DTYPES
def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(
    whole: Path, kind: str, dtype: torch.dtype
) -> None:
    path = whole / "solver.prototxt"
    path.write_text(path.read_text() + f'type: "{kind}"')
    straight = Solver(path)
    straight.net.to(dtype)
    straight.solve()
    torch.manual_seed(12345)  # nothing may depend on the generator's state
    resumed = Solver(path, snapshot=whole / "run_iter_5.solverstate")
    assert (resumed.iteration, resumed.seed) == (5, straight.seed)
    resumed.net.to(dtype)
    resumed.solve()
    assert resumed.iteration == straight.iteration == 12
    assert (resumed.loss, resumed.learning_rate) == (straight.loss, straight.learning_rate)
    assert resumed.tested == straight.tested
    for got, want in zip(state_of(resumed), state_of(straight), strict=True):
        assert torch.equal(got, want)


def test_seed_decides_everything(whole: Path) -> None:
    path, text = whole / "solver.prototxt", (whole / "solver.prototxt").read_text()
    runs = []
    for seed in (1, 1, 2):
        path.write_text(f"{text} random_seed: {seed} snapshot_after_train: false")
        solver = Solver(path)
        solver.step(3)
        runs.append(state_of(solver)[0])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_dropout_is_drawn_anew_in_each_iteration(tmp_path: Path) -> None:
    dropout = 'layer { name: "drop" type: "Dropout" bottom: "data" top: "data" }\nlayer { name: "fc"'
    (tmp_path / "drop.prototxt").write_text((TINY % ("", "")).replace('layer { name: "fc"', dropout))
    text = 'net: "drop.prototxt" base_lr: 0 lr_policy: "fixed" random_seed: '
    first, again = (tiny(tmp_path, f"{text}1", tiny_feed(1)) for _ in range(2))
    losses = []
    for solver in (first, again):
        for _ in range(6):
            solver.step(1)
            losses.append(solver.loss)
    assert losses[:6] == losses[6:]
    assert len(set(losses)) == 6


def test_snapshots_are_as_caffe_writes_them(whole: Path) -> None:
    solver = Solver(whole / "solver.prototxt")
    solver.solve()
    names = sorted(file.name for file in whole.glob("run_iter_*"))
    assert names == [f"run_iter_{n}.{kind}" for n in (10, 12, 5) for kind in ("caffemodel", "solverstate")]
    state = read_solverstate(whole / "run_iter_12.solverstate")
    assert (state.iter, state.current_step) == (12, 2)
    assert state.learned_net == str(whole / "run_iter_12.caffemodel")
    learnable = solver.net.learnable
    assert [blob_array(blob).shape for blob in state.history] == [
        tuple(one.tensor.shape) for one in learnable
    ]
    np.testing.assert_array_equal(blob_array(state.history[0]), solver.history["conv"][0][0].numpy())
    stored = {layer.name: layer for layer in read_caffemodel(whole / "run_iter_12.caffemodel").layer}
    np.testing.assert_array_equal(blob_array(stored["bn"].blobs[1]), solver.net.params["bn"][1].numpy())


def test_snapshot_moved_to_another_folder(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    solver = Solver(whole / "solver.prototxt")
    solver.step(5)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for file in whole.glob("run_iter_5.*"):
        file.rename(elsewhere / file.name)
    restored = Solver(whole / "solver.prototxt", snapshot=elsewhere / "run_iter_5.solverstate")
    assert torch.equal(state_of(restored)[0], state_of(solver)[0])
    (elsewhere / "run_iter_5.caffemodel").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected .*run_iter_5\.caffemodel, .* got neither"):
        restored.restore(elsewhere / "run_iter_5.solverstate")


def test_snapshot_of_another_solver_is_refused(whole: Path, tmp_path: Path) -> None:
    path = Solver(whole / "solver.prototxt").snapshot()
    other = whole / "adam.prototxt"
    other.write_text((whole / "solver.prototxt").read_text() + 'type: "Adam"')
    with pytest.raises(
        ValueError, match=r"expected 14 buffers for this net and type Adam, got 7 in .*solverstate"
    ):
        Solver(other, snapshot=path)
    state = read_solverstate(path)
    state.history[0].CopyFrom(state.history[1])
    write_binary(state, path)
    with pytest.raises(ValueError, match="expected 108 numbers in buffer 0, of layer 'conv', got 4"):
        Solver(whole / "solver.prototxt", snapshot=path)


def test_snapshot_prefix_is_the_name_of_the_solver_by_default(tmp_path: Path) -> None:
    solver = tiny(tmp_path, SGD)
    assert solver.snapshot() == tmp_path / "solver_iter_0.solverstate"
    solver.param.snapshot_prefix = str(tmp_path)
    assert solver.snapshot_prefix == tmp_path / "solver"


def test_weights_of_the_prototxt_and_of_the_argument(tmp_path: Path) -> None:
    values = {}
    for name in ("a", "b", "c"):
        other = tiny(tmp_path, SGD, weights=None)
        other.net.params["fc"][0].data.fill_(ord(name))
        write_binary(other.net.to_caffemodel(), tmp_path / f"{name}.caffemodel")
        values[name] = other.net.params["fc"][0].detach()
    named = tiny(tmp_path, SGD + 'weights: "a.caffemodel, b.caffemodel"')
    assert torch.equal(named.net.params["fc"][0], values["b"])
    given = tiny(tmp_path, SGD + 'weights: "a.caffemodel"', weights=tmp_path / "c.caffemodel")
    assert torch.equal(given.net.params["fc"][0], values["c"])


def test_weights_for_layers_of_the_train_net_alone_are_no_surprise(tmp_path: Path) -> None:
    teacher = """layer { name: "teacher" type: "InnerProduct" bottom: "data" top: "teacher"
      inner_product_param { num_output: 1 } include { phase: TRAIN } }"""
    (tmp_path / "both.prototxt").write_text(TINY % ("", "") + teacher)
    solver = f'net: "both.prototxt" test_iter: 1 test_interval: 1 {SGD}'
    weights = tiny(tmp_path, solver).net.to_caffemodel()
    del weights.layer[:-1]
    weights.layer[0].blobs[0].data[:] = [1, 2, 3]
    trained = tiny(tmp_path, solver, weights=weights)  # a warning would be an error here
    assert trained.net.params["teacher"][0].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("average", [1, 2])
def test_plateau_steps_when_the_loss_has_not_fallen_for_long_enough(average: int, tmp_path: Path) -> None:
    """The SSD fork's policy, against its rule written out; the same from a snapshot in the middle."""
    values = [5.0, 4.0, 4.5, 4.5, 4.5, 3.0, 3.5, 3.5, 3.5, 3.5, 3.5, 3.5, 2.0, 9.0, 9.0, 9.0]
    batches = [{"x": np.full((1, 1), value, np.float32)} for value in values]
    rates, step, lowest, last = [], 0, float("inf"), 0
    windows = [2, 3, 2]
    for iteration in range(len(values)):
        smoothed = np.mean(values[max(0, iteration + 1 - average) : iteration + 1])
        if smoothed < lowest:
            lowest, last = smoothed, iteration
        if step < len(windows) and iteration >= last + windows[step]:
            step, last = step + 1, iteration
        rates.append(0.5 * 0.5**step)
    net = parse_net(
        'layer { name: "x" type: "Input" top: "x" input_param { shape { dim: 1 dim: 1 } } }'
        'layer { name: "s" type: "Scale" bottom: "x" top: "s" scale_param { bias_term: true } }'
        'layer { name: "l" type: "Reduction" bottom: "x" top: "l" loss_weight: 1 }'
        'layer { name: "m" type: "Reduction" bottom: "s" top: "m" loss_weight: 1e-30 }'
    )
    param = schema.SolverParameter(net_param=net, base_lr=0.5, gamma=0.5, lr_policy="plateau")
    param.plateau_winsize.extend(windows)
    param.average_loss, param.random_seed, param.solver_mode = average, 0, param.CPU
    param.snapshot_prefix = str(tmp_path / "p")
    solver, got = Solver(param, feed=batches), []
    for iteration in range(len(values)):
        if iteration == 10 and average == 1:
            state = solver.snapshot()
        solver.step()
        got.append(solver.learning_rate)
    assert got == rates and len(set(rates)) == 4
    if average == 1:
        assert read_solverstate(state).iter_last_event == 8
        later = Solver(param, feed=batches, snapshot=state)
        for rate in rates[10:]:
            later.step()
            assert later.learning_rate == rate


def test_a_solverstate_of_the_ssd_fork_is_known(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    state = schema.SolverState(iter=3, minimum_loss=0.5, iter_last_event=2)
    (tmp_path / "s").write_bytes(state.SerializeToString())
    assert read_solverstate(tmp_path / "s").minimum_loss == 0.5
    inner = b"\xea\x07\x02\x1a\x00"  # softmax_param { an empty field 3 }
    model = b"\xa2\x06" + bytes([len(inner)]) + inner
    (tmp_path / "m").write_bytes(model)
    assert read_caffemodel(tmp_path / "m").SerializeToString() == model
    assert not recwarn.list


# ------------------------------------------------------------------------------------------------ bad input

FIXED = 'base_lr: 0.1 lr_policy: "fixed" '


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('base_lr: 0.1 lr_policy: "stpe"', "expected an lr_policy out of fixed, step, exp, .*, got 'stpe'"),
        ("base_lr: 0.1", "expected an lr_policy out of .*, got none"),
        ('base_lr: 0.1 lr_policy: "plateau"', "expected a gamma for the lr_policy 'plateau', got none"),
        (
            'base_lr: 0.1 lr_policy: "plateau" gamma: 1',
            "a plateau_winsize for the lr_policy 'plateau', got none",
        ),
        ('lr_policy: "fixed"', "expected a base_lr, got none"),
        ('base_lr: nan lr_policy: "fixed"', "expected a base_lr, got nan"),
        (
            'base_lr: 1 lr_policy: "step" gamma: 1',
            "a stepsize of 1 or more for the lr_policy 'step', got none",
        ),
        ('base_lr: 1 lr_policy: "step" stepsize: 1', "expected a gamma for the lr_policy 'step', got none"),
        ('base_lr: 1 lr_policy: "multistep" gamma: 1', "a stepvalue for the lr_policy 'multistep', got none"),
        ('base_lr: 1 lr_policy: "poly" power: 1', "a max_iter of 1 or more for the lr_policy 'poly'"),
        ('base_lr: 1 lr_policy: "inv" gamma: 1', "expected a power for the lr_policy 'inv'"),
        (FIXED + "iter_size: 0", "expected iter_size of 1 or more, got 0"),
        (FIXED + "average_loss: 0", "expected average_loss of 1 or more, got 0"),
        (FIXED + "snapshot: -1", "expected snapshot of 0 or more, got -1"),
        (FIXED + 'type: "Adm"', "expected a type out of SGD, Nesterov, .*, got 'Adm'"),
        (FIXED + 'type: "AdaGrad" momentum: 0.9', "expected no momentum for the type 'AdaGrad', .* got 0.9"),
        (FIXED + 'type: "RMSProp" rms_decay: 1', "expected 0 <= rms_decay < 1 for the type 'RMSProp', got 1"),
        (FIXED + 'type: "Adam" momentum2: 1', "expected 0 <= momentum2 < 1 for the type 'Adam', got 1"),
        (FIXED + 'regularization_type: "L3"', "expected a regularization_type out of L1, L2, got 'L3'"),
        (FIXED + "snapshot_format: HDF5", "expected the snapshot_format BINARYPROTO, got HDF5. Remove"),
        (
            FIXED + 'train_net: "x" net: "net.prototxt"',
            "exactly one train net out of .*, got net and train_net",
        ),
        (FIXED + 'test_net: "net.prototxt"', "expected a test_iter for each of 1 test nets, got 0"),
        (
            FIXED + "test_iter: 5",
            "expected test_interval and each test_iter of 1 or more, got test_interval 0",
        ),
        (
            FIXED + "test_iter: 5 test_interval: 1 test_state { } test_state { }",
            "test_state for each of 1 test",
        ),
    ],
)
def test_bad_solvers(text: str, words: str, tmp_path: Path) -> None:
    head = "" if " net: " in text else 'net: "net.prototxt" '
    with pytest.raises(ValueError, match=rf"^Solver: .*{words}") as caught:
        tiny(tmp_path, head + text)
    assert "\n" not in str(caught.value)


def test_no_net_and_no_max_iter(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected exactly one train net out of net, net_param, .*, got none"
    ):
        Solver(schema.SolverParameter(base_lr=1, lr_policy="fixed"))
    with pytest.raises(ValueError, match="expected a max_iter of 1 or more, got none"):
        tiny(tmp_path, SGD).solve()
    with pytest.raises(FileNotFoundError):
        tiny(tmp_path, FIXED + 'net: "nowhere.prototxt"')


# ---------------------------------------------------------------------------------------------- the command


def command(*arguments: object) -> int:
    return main(["caffe", "train", *map(str, arguments)])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_command_trains_and_logs(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = whole / "solver.prototxt"
    path.write_text(path.read_text() + "display: 6 average_loss: 3 random_seed: 4")
    assert command("--solver", path) == 0
    printed = capsys.readouterr().out
    log = rows(whole / "run_log.csv")
    assert (
        f"log: {whole / 'run_log.csv'}" in printed
        and f"weights: {whole / 'run_iter_12.caffemodel'}" in printed
    )
    assert list(log[0]) == [
        "iteration", "learning_rate", "loss", "train/loss", "test/loss", "test/accuracy"
    ]  # fmt: skip
    assert [int(row["iteration"]) for row in log] == list(range(13))
    assert [i for i, row in enumerate(log) if row["test/accuracy"]] == [0, 3, 6, 9, 12]
    assert log[12]["loss"] == "" and float(log[4]["learning_rate"]) == pytest.approx(0.0125)
    smoothed = np.mean([float(row["loss"]) for row in log[4:7]])
    assert f"iteration 6  loss {smoothed:.4f}"[:-1] in printed
    twin = Solver(path)
    twin.step(1)
    assert float(log[0]["loss"]) == pytest.approx(twin.loss, rel=1e-6)


def test_command_resumes_the_log(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, log = whole / "solver.prototxt", whole / "run_log.csv"
    path.write_text(path.read_text() + "random_seed: 4")
    command("--solver", path)
    straight = log.read_text()
    command("--solver", path, "--max-iter", 7)
    assert len(rows(log)) == 7
    assert command("--solver", path, "--snapshot", whole / "run_iter_5.solverstate") == 0
    assert log.read_text() == straight
    assert command("--solver", path, "--snapshot", whole / "run_iter_12.solverstate") == 0
    assert "of iteration 12; nothing is left to do" in capsys.readouterr().out
    assert log.read_text() == straight


def test_two_trainings_of_one_prefix_or_log(
    whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of the first one others are begun; they touch nothing of it."""
    path, other, log = whole / "solver.prototxt", whole / "other.prototxt", whole / "run_log.csv"
    other.write_text(path.read_text().replace("run", "another"))
    refused: list[str] = []
    flush = caffe_train._Log.flush

    def look(self: caffe_train._Log) -> None:
        if not refused:
            before = log.read_text()
            for words in (path,), (path, "--log", whole / "else.csv"), (other, "--log", log):
                assert command("--solver", *words) == 2
                refused.append(capsys.readouterr().err)
            assert log.read_text() == before
        flush(self)

    monkeypatch.setattr(caffe_train._Log, "flush", look)
    assert command("--solver", path) == 0
    process = f"attention-transfer: caffe train: process {os.getpid()} is writing"
    end = "Wait until it has ended, or give another"
    prefix = f"{process} the snapshots {whole / 'run'}. {end} snapshot_prefix.\n"
    assert refused == [prefix, prefix, f"{process} the log {log}. {end} --log.\n"]
    assert [int(row["iteration"]) for row in rows(log)] == list(range(13))
    assert not [each for each in whole.iterdir() if each.name.endswith(".lock") or each.name == "else.csv"]
    assert command("--solver", other) == 0


def test_command_stops_where_the_loss_is_no_number(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = whole / "solver.prototxt"
    path.write_text(path.read_text().replace("base_lr: 0.05", "base_lr: 1e30"))
    assert command("--solver", path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "expected a finite loss, got " in error and "at iteration " in error
    assert not list(whole.glob("run_iter_*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "solver"),
        (["--solver", "none.prototxt"], "No such file or directory: none.prototxt"),
        (["--solver", "s", "--weights", "w", "--snapshot", "x"], "got both. A snapshot brings its weights."),
        (["--solvr", "s"], "--solver"),
        (["--solver", "s", "--max-iter", "0"], "expected --max-iter of 1 or more, got 0"),
    ],
)
def test_command_refuses(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_finishes_the_iteration_and_says_how_to_go_on(whole: Path) -> None:
    path = whole / "solver.prototxt"
    path.write_text(path.read_text().replace("max_iter: 12", "max_iter: 1000000") + "random_seed: 4")
    call = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "attention_transfer",
        "caffe",
        "train",
        "--solver",
        str(path),
    ]
    process = subprocess.Popen(call, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    until = time.monotonic() + 60
    while not (whole / "run_iter_5.solverstate").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    *_, last = error.strip().splitlines()
    start, _, snapshot = last.rpartition(" ")
    expected = f"Go on with: attention-transfer caffe train --solver {path} --snapshot"
    assert start == f"Stopped; nothing is lost. {expected}"
    stopped = read_solverstate(snapshot).iter
    assert len(rows(whole / "run_log.csv")) == stopped
    resumed = Solver(path, snapshot=snapshot)
    straight = Solver(path)
    straight.param.snapshot = 0
    if stopped < 2000:
        straight.step(stopped)
        assert torch.equal(state_of(resumed)[0], state_of(straight)[0])
