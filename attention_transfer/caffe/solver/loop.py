"""Caffe's solvers: the training loop that a solver prototxt describes."""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attention_transfer._errors import InputError
from attention_transfer.caffe import schema
from attention_transfer.caffe.assembly import Learnable
from attention_transfer.caffe.files.caffemodel import array_blob, blob_array, read_solverstate, write_binary
from attention_transfer.caffe.files.prototxt import read_solver
from attention_transfer.caffe.layers.data import DataLayer
from attention_transfer.caffe.net import Net, Weights
from attention_transfer.caffe.solver.nets import check_solver, make_nets, starting_weights
from attention_transfer.caffe.solver.rates import Progress, advance, learning_rate
from attention_transfer.caffe.solver.updates import LINEAR, SLOTS, UPDATES, clip, decay

Feed = Iterable[Mapping[str, Any]]
Value = float | list[float]  # of a blob: a list where it has several entries


class Solver:
    """Trains a net as a solver prototxt says, with Caffe's arithmetic.

    Relative paths in the prototxt are looked for in the working directory, as in Caffe, then beside the
    prototxt. `solver_mode: GPU`, which is Caffe's default, means the GPU where there is one. `debug_info` and
    `snapshot_diff` do nothing. The net may be moved or cast afterwards: the history follows it.

    Args:
        solver: path of a solver prototxt, or a SolverParameter.
        weights: what to start from, as for `Net`, in place of the prototxt's own `weights`.
        feed: batches for a net with Input layers, {input: tensor}. A list or loader starts again at its end.
        test_feed: the same for the test nets, one for each.
        snapshot: a .solverstate to go on from.

    Attributes:
        param: the SolverParameter.
        net, test_nets: the nets, which share their parameters.
        iteration: how many iterations are done.
        tested: the iteration before which the last test was, and its scores.
        seed: of all random draws; `random_seed`, or drawn from torch's generator.
        say: takes each line of `display` and of the tests; prints it at first.
        watch: called with the solver after each iteration, before its snapshot.

    Raises:
        ValueError: if a field is missing or unusable, in one line; and as `Net`.
        OSError: if a file cannot be read.
    """

    def __init__(
        self,
        solver: str | PathLike[str] | Any,
        weights: Weights = None,
        feed: Feed | None = None,
        *,
        test_feed: Sequence[Feed] = (),
        snapshot: str | PathLike[str] | None = None,
    ) -> None:
        self._file = None if isinstance(solver, schema.SolverParameter) else Path(solver)
        message: Any = solver
        self.param: Any = read_solver(self._file) if self._file else message
        check_solver(self.param)
        folder = self._file.parent if self._file else Path()
        self.seed: int = self.param.random_seed
        if self.seed < 0:
            self.seed = int(torch.randint(2**31, ()))
        with _drawing_from(self.seed):
            self.net, self.test_nets = make_nets(self.param, folder)
        sources = starting_weights(self.param, folder) if weights is None else weights
        for net in (self.net, *self._nets_with_more_to_load()):
            net.load(sources)
        self.net.to(_device(self.param))
        self._share()
        if feed is not None and not self.net.inputs:
            raise InputError(
                "Solver: expected no feed for a net without Input layers, got one. "
                "The net reads its data itself: leave feed out, or declare an Input layer."
            )
        self._feeds = {id(self.net): _Cycle(feed)} if feed is not None else {}
        self._feeds |= {id(net): _Cycle(one) for net, one in zip(self.test_nets, test_feed, strict=False)}
        self.iteration = self._tests = 0
        self._progress = Progress()
        self.tested: tuple[int, list[dict[str, Value]]] = (-1, [])
        self._history: dict[int, list[Tensor]] = {}
        self._losses: dict[str, Tensor] = {}
        self._recent: deque[Tensor] = deque(maxlen=int(self.param.average_loss))
        self.say: Callable[[str], None] = print
        self.watch: Callable[[Solver], None] = lambda solver: None
        self._seed_layers()
        if snapshot is not None:
            self.restore(snapshot)

    # ------------------------------------------------------------------------------------- what it knows

    @property
    def learning_rate(self) -> float:
        """Of the iteration last done; before any, of the first."""
        iteration = max(self.iteration - 1, 0)
        progress = self._progress if self.iteration else advance(self.param, 0, Progress(), lambda: 0.0)
        number = np.float64 if self.net.dtype == torch.float64 else np.float32
        return learning_rate(self.param, iteration, progress.step, number)

    @property
    def device(self) -> torch.device:
        """Where the net is."""
        return self.net.device

    @property
    def loss(self) -> float:
        """Of the iteration last done: the mean over its `iter_size` batches, before the update.

        Raises:
            ValueError: before any iteration.
        """
        if not self._recent:
            raise InputError("Solver.loss: expected an iteration before, got none. Call step(1).")
        return self._recent[-1].item()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """`losses`, and `loss` under the name "", where they were computed: nothing waits for the device."""
        return {"": self._recent[-1], **self._losses}

    @property
    def smoothed_loss(self) -> float:
        """The mean loss of the last `average_loss` iterations."""
        return torch.stack(list(self._recent)).mean().item()

    @property
    def losses(self) -> dict[str, Value]:
        """Each output and each loss blob, without its loss weight, averaged like `loss`."""
        return {name: _value(tensor) for name, tensor in self._losses.items()}

    @property
    def history(self) -> dict[str, list[list[Tensor]]]:
        """The buffers of each blob, by layer; a shared blob has them under its first layer only."""
        found: dict[str, list[list[Tensor]]] = {}
        for index, entry in enumerate(self.net.learnable):
            of_layer = found.setdefault(entry.layer, [])
            of_layer += [[] for _ in range(entry.index + 1 - len(of_layer))]
            of_layer[entry.index] = of_layer[entry.index] or self._buffers(index, entry.tensor)
        return found

    @property
    def snapshot_prefix(self) -> Path:
        """What the names of snapshots begin with: as the prototxt says, or like the prototxt itself."""
        prefix, file = self.param.snapshot_prefix, self._file or Path("solver.prototxt")
        if not prefix:
            return file.with_suffix("")
        return Path(prefix) / file.stem if Path(prefix).is_dir() else Path(prefix)

    def snapshot_path(self, suffix: str) -> Path:
        """Where a snapshot after the iterations done goes: PREFIX_iter_NUMBER and the suffix."""
        prefix = self.snapshot_prefix
        return prefix.with_name(f"{prefix.name}_iter_{self.iteration}{suffix}")

    @property
    def snapshot_due(self) -> bool:
        """Whether the iteration last done is one after which a snapshot is written."""
        return self.param.snapshot > 0 and self.iteration > 0 and self.iteration % self.param.snapshot == 0

    # ------------------------------------------------------------------------------------------ training

    def solve(self) -> None:
        """Train up to `max_iter`, with tests, `display` and snapshots.

        Raises:
            ValueError: if there is no `max_iter`; and as `step`.
        """
        if self.param.max_iter < 1:
            raise InputError(
                f"Solver: expected a max_iter of 1 or more, got {self.param.max_iter or 'none'}."
            )
        self.step(max(self.param.max_iter - self.iteration, 0))
        if self.param.snapshot_after_train and not self.snapshot_due:
            self.snapshot()
        if self._test_due():
            self.test()

    def step(self, count: int = 1) -> None:
        """Do `count` iterations, each with the test before it and the snapshot after it that are due.

        Raises:
            ValueError: if the net does not accept its inputs, or nothing feeds it.
            OSError: if data cannot be read, or a snapshot cannot be written.
        """
        for _ in range(count):
            if self._test_due():
                self.test()
            self._iterate()
            if self.param.display > 0 and (self.iteration - 1) % self.param.display == 0:
                self.say(self._describe())
            self.watch(self)
            if self.snapshot_due:
                self.snapshot()

    def test(self) -> list[dict[str, Value]]:
        """Run each test net for its `test_iter` batches; the mean of each output, net by net.

        With `test_compute_loss`, `total_loss` is the mean of the net's whole loss.
        """
        self._share()
        scores = []
        for index, (net, batches) in enumerate(zip(self.test_nets, self.param.test_iter, strict=False)):
            _seek(net, self._tests * batches)
            with torch.no_grad(), self._drawing(index + 1):
                scores.append(self._test_one(net, batches))
            shown = "  ".join(f"{name} {_shown(value)}" for name, value in scores[-1].items())
            self.say(f"iteration {self.iteration}  test net {index}: {shown}")
        self._tests += 1
        self.tested = (self.iteration, scores)
        return scores

    def _test_one(self, net: Net, batches: int) -> dict[str, Value]:
        totals: dict[str, Tensor] = {}
        for _ in range(batches):
            blobs = net(self._inputs(net))
            found = {name: blobs[name] for name in net.outputs}
            if self.param.test_compute_loss:
                found["total_loss"] = net.loss
            _add(totals, found)
        return {name: _value(total / batches) for name, total in totals.items()}

    def _test_due(self) -> bool:
        interval = self.param.test_interval
        due = bool(self.test_nets) and interval > 0 and self.iteration % interval == 0
        return due and (self.iteration > 0 or self.param.test_initialization)

    def _iterate(self) -> None:
        self._clear_gradients()
        self._losses = {}
        total = torch.zeros((), dtype=self.net.dtype, device=self.device)
        with self._drawing(0):
            for _ in range(self.param.iter_size):
                total = total + self._accumulate()
        for tensor in self._losses.values():
            tensor /= self.param.iter_size
        self._recent.append(total / self.param.iter_size)
        self._progress = advance(self.param, self.iteration, self._progress, lambda: self.smoothed_loss)
        self.iteration += 1
        with torch.no_grad():
            self._update()
        self._clear_gradients()

    def _clear_gradients(self) -> None:
        for entry in self.net.learnable:
            entry.tensor.grad = None

    def _accumulate(self) -> Tensor:
        """Add the gradients of one batch; its loss."""
        blobs = self.net(self._inputs(self.net))
        loss = self.net.loss
        if loss.requires_grad:
            loss.backward()
        names = dict.fromkeys([*self.net.outputs, *self.net.loss_weights])
        _add(self._losses, {name: blobs[name].detach() for name in names if name in blobs})
        return loss.detach()

    def _describe(self) -> str:
        shown = "  ".join(f"{name} {_shown(value)}" for name, value in self.losses.items())
        return (
            f"iteration {self.iteration - 1}  loss {self.smoothed_loss:.6g}  "
            f"learning rate {self.learning_rate:.6g}  |  {shown}"
        )

    # ----------------------------------------------------------------------------------------- the update

    def _update(self) -> None:
        """Caffe's ApplyUpdate: clip the sum, divide it, add the decay, then the solver's own rule."""
        param, rate = self.param, self.learning_rate
        gradients = [entry.tensor.grad for entry in self.net.learnable if entry.tensor.grad is not None]
        if param.clip_gradients >= 0 and gradients:
            clip(gradients, param.clip_gradients)
        if param.iter_size > 1 and gradients:
            torch._foreach_mul_(gradients, 1 / param.iter_size)
        groups: dict[tuple[float, float], list[int]] = defaultdict(list)
        for index, entry in enumerate(self.net.learnable):
            if self._takes_part(entry):
                groups[entry.lr_mult, entry.decay_mult].append(index)
        for (lr_mult, decay_mult), members in groups.items():
            self._update_group(members, rate * lr_mult, param.weight_decay * decay_mult)

    def _takes_part(self, entry: Learnable) -> bool:
        """Whether a blob or its history can change at all: a frozen teacher costs nothing."""
        if entry.lr_mult:
            return True
        decays = bool(self.param.weight_decay * entry.decay_mult)
        return self.param.type not in LINEAR and (decays or entry.tensor.grad is not None)

    def _update_group(self, members: list[int], rate: float, factor: float) -> None:
        parameters = [self.net.learnable[index].tensor for index in members]
        gradients = [blob.grad if blob.grad is not None else torch.zeros_like(blob) for blob in parameters]
        if factor:
            decay(self.param, factor, gradients, parameters)
        history = [self._own_buffers(index, blob) for index, blob in zip(members, parameters, strict=True)]
        slots = [list(slot) for slot in zip(*history, strict=True)]
        lost = UPDATES[self.param.type](self.param, rate, self.iteration - 1, gradients, slots)
        torch._foreach_sub_(parameters, lost)

    def _own_buffers(self, index: int, blob: Tensor) -> list[Tensor]:
        """The buffers of a blob, in its type and place, made when they are first written to."""
        buffers = self._history.get(index)
        if buffers is None:
            slots = SLOTS.get(self.param.type, 1)
            buffers = [torch.zeros_like(blob, requires_grad=False) for _ in range(slots)]
        elif buffers[0].dtype != blob.dtype or buffers[0].device != blob.device:
            buffers = [buffer.to(blob) for buffer in buffers]
        self._history[index] = buffers
        return buffers

    def _buffers(self, index: int, blob: Tensor) -> list[Tensor]:
        """The buffers of a blob to look at: zeros that take no memory where nothing was written yet."""
        empty = [blob.new_zeros(()).expand(blob.shape)] * SLOTS.get(self.param.type, 1)
        return self._history.get(index, empty)

    # ------------------------------------------------------------------------------------------ snapshots

    def snapshot(self) -> Path:
        """Write PREFIX_iter_N.caffemodel and PREFIX_iter_N.solverstate, as Caffe does; returns the latter.

        Raises:
            OSError: if they cannot be written.
        """
        model, state_file = self.snapshot_path(".caffemodel"), self.snapshot_path(".solverstate")
        model.parent.mkdir(parents=True, exist_ok=True)
        write_binary(self.net.to_caffemodel(), model)
        state = schema.SolverState(
            iter=self.iteration, learned_net=str(model), current_step=self._progress.step
        )
        state.random_seed = self.seed
        if self.param.lr_policy == "plateau":
            state.minimum_loss, state.iter_last_event = self._progress.minimum_loss, self._progress.last_event
        blobs = [entry.tensor for entry in self.net.learnable]
        for slot in range(SLOTS.get(self.param.type, 1)):
            slots = [self._buffers(index, blob)[slot] for index, blob in enumerate(blobs)]
            state.history.extend(array_blob(buffer.cpu().numpy()) for buffer in slots)
        write_binary(state, state_file)
        return state_file

    def restore(self, path: str | PathLike[str]) -> None:
        """Go on from a .solverstate and the .caffemodel that it names, or one of that name beside it.

        What follows is what would have followed without the interruption, bit for bit on the CPU, except that
        a feed which is no list starts anew. A snapshot of Caffe's own holds no seed: this solver's is used.

        Raises:
            ValueError: if it belongs to another net or another type of solver.
            OSError: if a file cannot be read.
        """
        state = read_solverstate(path)
        if min(state.iter, state.current_step, state.iter_last_event, state.random_seed) < 0:
            raise InputError(f"Solver.restore: expected counts of 0 or more, got negative ones in {path}.")
        arrays = [torch.from_numpy(blob_array(blob)) for blob in state.history]
        self._check_history(arrays, path)
        self.net.load(_learned_net(state, Path(path)))
        self.iteration = state.iter
        self._progress = Progress(state.current_step, state.minimum_loss, state.iter_last_event)
        if state.HasField("random_seed"):
            self.seed = state.random_seed
        count = len(self.net.learnable)
        self._history = {
            index: [values.reshape(entry.tensor.shape) for values in arrays[index::count]]
            for index, entry in enumerate(self.net.learnable)
            if any(values.any() for values in arrays[index::count])
        }
        self._recent.clear()
        self._tests = self._tests_before(self.iteration)
        self._seed_layers()

    def _check_history(self, arrays: Sequence[Tensor], path: str | PathLike[str]) -> None:
        blobs = [entry.tensor for entry in self.net.learnable] * SLOTS.get(self.param.type, 1)
        sizes, expected = [len(a.reshape(-1)) for a in arrays], [blob.numel() for blob in blobs]
        if len(sizes) != len(expected):
            raise InputError(
                f"Solver.restore: expected {len(expected)} buffers for this net and type {self.param.type}, "
                f"got {len(sizes)} in {path}. It belongs to another solver or net."
            )
        for index, (size, wanted) in enumerate(zip(sizes, expected, strict=True)):
            if size != wanted:
                layer = self.net.learnable[index % len(self.net.learnable)].layer
                raise InputError(
                    f"Solver.restore: expected {wanted} numbers in buffer {index}, of layer {layer!r}, got "
                    f"{size} in {path}. It belongs to another net."
                )

    def _tests_before(self, iteration: int) -> int:
        """How many tests an uninterrupted run has done before it comes to `iteration`."""
        if not self.test_nets or iteration == 0:
            return 0
        return (iteration - 1) // self.param.test_interval + bool(self.param.test_initialization)

    # -------------------------------------------------------------------------- places, inputs, randomness

    def _nets_with_more_to_load(self) -> list[Net]:
        """The test nets with blobs in layers that the train net lacks; those of the others are shared."""
        trained = self.net.params.keys()
        return [net for net in self.test_nets if net.params.keys() - trained]

    def _share(self) -> None:
        """Let the test nets have the train net's parameters, wherever and whatever these are by now."""
        for net in self.test_nets:
            net.to(self.device, self.net.dtype)
            net.share(self.net)

    def _seed_layers(self) -> None:
        for net in (self.net, *self.test_nets):
            for layer in net.layers:
                if isinstance(layer, DataLayer):
                    layer.seed = self.seed
        batches = self.iteration * self.param.iter_size
        _seek(self.net, batches)
        if id(self.net) in self._feeds:
            self._feeds[id(self.net)].seek(batches)

    def _inputs(self, net: Net) -> dict[str, Tensor]:
        names = list(net.inputs)
        if not names:
            return {}
        if id(net) not in self._feeds:
            argument = "feed" if net is self.net else "test_feed"
            raise InputError(
                f"Solver: expected batches for the Input layers ({', '.join(names)}), got no {argument}. "
                f"Pass {argument}, or read the data in the net, by a Data or HDF5Data layer."
            )
        batch = next(self._feeds[id(net)])
        return {name: torch.as_tensor(values, device=self.device) for name, values in batch.items()}

    @contextlib.contextmanager
    def _drawing(self, purpose: int) -> Iterator[None]:
        """Draw from a stream of (seed, iteration, purpose) alone."""
        mixed = np.random.SeedSequence((self.seed, self.iteration, purpose)).generate_state(1)
        with _drawing_from(int(mixed[0]), self.device):
            yield


@contextlib.contextmanager
def _drawing_from(seed: int, device: torch.device | None = None) -> Iterator[None]:
    devices = [device] if device is not None and device.type == "cuda" else []
    generators = [torch.default_generator, *(torch.cuda.default_generators[d.index] for d in devices)]
    with torch.random.fork_rng(devices=devices):
        for generator in generators:  # torch.manual_seed would look at every kind of device, which takes long
            generator.manual_seed(seed)
        yield


class _Cycle:
    """Batches one after another; from the beginning at the end of what can be read again."""

    def __init__(self, batches: Feed) -> None:
        self._batches = batches
        self._iterator: Iterator[Mapping[str, Any]] = iter(())
        self._ends = isinstance(batches, Iterator)
        if isinstance(batches, Iterator):
            self._iterator = batches

    def seek(self, batch: int) -> None:
        """Let the next one be this batch, if the batches can be counted."""
        if isinstance(self._batches, Sequence) and self._batches:
            self._iterator = iter(self._batches[batch % len(self._batches) :])

    def __next__(self) -> Mapping[str, Any]:
        batch = next(self._iterator, None)
        if batch is None and not self._ends:
            self._iterator = iter(self._batches)
            batch = next(self._iterator, None)
        if batch is None:
            raise InputError(
                "Solver: expected another batch, got the end of feed. Pass a list or a loader, which can be "
                "read again, or more batches."
            )
        return batch


# ------------------------------------------------------------------------------------------------- helpers


def _device(param: Any) -> torch.device:
    if param.solver_mode == param.GPU and torch.cuda.is_available():
        return torch.device("cuda", min(max(param.device_id, 0), torch.cuda.device_count() - 1))
    return torch.device("cpu")


def _add(totals: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        totals[name] = totals[name] + tensor if name in totals else tensor.clone()


def _value(tensor: Tensor) -> Value:
    return tensor.item() if tensor.numel() == 1 else tensor.reshape(-1).tolist()


def _shown(value: Value) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "[" + " ".join(f"{entry:.4g}" for entry in value[:10]) + (" ...]" if len(value) > 10 else "]")


def _seek(net: Net, batch: int) -> None:
    for layer in net.layers:
        if isinstance(layer, DataLayer):
            layer.seek(batch)


def _learned_net(state: Any, path: Path) -> Path:
    named = Path(state.learned_net)
    found = named if named.is_file() else path.parent / named.name
    if not state.learned_net or not found.is_file():
        raise FileNotFoundError(
            f"Solver.restore: expected {state.learned_net or 'a .caffemodel'}, which {path} goes with, there "
            "or beside it, got neither. Put the .caffemodel beside the .solverstate."
        )
    return found
