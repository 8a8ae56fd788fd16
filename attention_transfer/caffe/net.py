"""Caffe's nets as PyTorch modules, with Caffe's values and gradients."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attention_transfer._errors import InputError
from attention_transfer.caffe import schema
from attention_transfer.caffe.assembly import freeze, make_layer, set_up, share_blobs
from attention_transfer.caffe.files.caffemodel import (
    array_blob,
    blob_array,
    blob_shape,
    read_caffemodel,
    same_shape,
)
from attention_transfer.caffe.files.prototxt import read_net
from attention_transfer.caffe.fusion import Chain, fusable
from attention_transfer.caffe.graph import Blob, Graph, select
from attention_transfer.caffe.layers import Layer
from attention_transfer.caffe.layers.forks import settle_meaning

Phase = Literal["TRAIN", "TEST"]
Weights = Any  # a path, a NetParameter, or several of them

# what a Net sets of itself, so that no layer's module may have the name
OWN = ("training", "autocast", "learnable", "_chains", "_asking", "_anchor", "_loss")

SCORING = ("SoftmaxWithLoss", "Softmax", "SigmoidCrossEntropyLoss", "HingeLoss", "Accuracy")


class Blobs(Mapping[str, Tensor]):
    """Every named blob after a forward pass; what a faster path left out is computed when it is asked for."""

    def __init__(self, tensors: dict[str, Tensor], deferred: dict[str, Callable[[], Tensor]]) -> None:
        self._tensors, self._deferred = tensors, deferred

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors and name in self._deferred:
            self._tensors[name] = self._deferred[name]()
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._tensors, **self._deferred})

    def __len__(self) -> int:
        return len({**self._tensors, **self._deferred})


class Net(nn.Module):
    """A net as its prototxt says, for one phase.

    Each layer is a submodule under its own name (a dot in it becomes an underscore), so that
    `Taps(net, ["conv1"])` reads what that layer gives. An in-place layer gives a new tensor that takes the
    blob's name over.

    Parameters that `lr_mult: 0` freezes require no gradient, unless `force_backward` is on. In `eval()` a net
    of the phase TRAIN uses stored statistics and drops nothing.

    The whole net computes in one precision, its `dtype`, as Caffe does: `torch.autocast` around it changes
    nothing unless the attribute `autocast` is set to True.

    Args:
        prototxt: path of a net, or a NetParameter as `read_net` gives it.
        weights: path of a .caffemodel, a NetParameter, or several; see `load`.
        phase: which layers are in, and how BatchNorm and Dropout behave.
        level, stages: the rest of the state that `include` and `exclude` rules look at.

    Raises:
        ValueError: if the net cannot be built, in one line that names the layer.
        OSError: if a file cannot be read.
    """

    _anchor: Tensor
    autocast = False

    def __init__(
        self,
        prototxt: str | PathLike[str] | Any,
        weights: Weights = None,
        *,
        phase: Phase = "TEST",
        level: int = 0,
        stages: Sequence[str] = (),
    ) -> None:
        super().__init__()
        net = prototxt if isinstance(prototxt, schema.NetParameter) else read_net(prototxt)
        self.phase = phase
        self.proto = select(net, phase, level, stages)
        stored = [] if weights is None else _read_weights(weights)
        settle_meaning(self.proto.layer, (net for net, _ in stored))
        if not self.proto.layer:
            raise InputError(f"Net: expected layers in the phase {phase}, got none.")
        self.layers = [make_layer(spec, phase) for spec in self.proto.layer]
        self._graph = Graph(self.proto)
        for error in self._graph.faults(dict(enumerate(self.layers))):
            raise error
        self._shapes = set_up(self.layers)
        self._weights = [node.loss_weights for node in self._graph.nodes]
        self._check_memory()
        for name, layer in zip(_module_names(self.layers), self.layers, strict=True):
            layer.fill_blobs()
            self._modules[name] = layer
        self.learnable, self._ties = share_blobs(self.layers)
        freeze(self.layers, self.proto.force_backward)
        self._chains = fusable(self.layers, self._graph, self.shapes)
        self._asking = self._find_asking()
        self.register_buffer("_anchor", torch.zeros(()), persistent=False)  # has the net's type and place
        self._loss: Tensor | None = None
        self.train(phase == "TRAIN")
        self._load_all(stored)

    # --------------------------------------------------------------------------------------- what it holds

    @property
    def params(self) -> dict[str, list[Tensor]]:
        """The blobs of each layer that has some, by the layer's name: parameters, or buffers of BatchNorm."""
        return {name: layer.blobs for name, layer in self._by_name().items() if layer.blobs}

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the blobs that come from outside."""
        return {
            name: shape
            for layer, shapes in zip(self.layers, self._shapes, strict=True)
            if layer.type == "Input"
            for name, shape in zip(layer.tops, shapes, strict=True)
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every blob, for the batch that the prototxt declares."""
        pairs = zip(self.layers, self._shapes, strict=True)
        return {
            name: shape for layer, shapes in pairs for name, shape in zip(layer.tops, shapes, strict=True)
        }

    @property
    def outputs(self) -> list[str]:
        """The blobs that no layer reads."""
        return self._graph.outputs()

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each blob that counts in the loss."""
        pairs = zip(self.layers, self._weights, strict=True)
        return {
            name: weight
            for layer, weights in pairs
            for name, weight in zip(layer.tops, weights, strict=True)
            if weight
        }

    @property
    def loss(self) -> Tensor:
        """Sum over the loss blobs of weight * sum of entries, of the last forward pass, in the graph.

        Raises:
            ValueError: before any forward pass.
        """
        if self._loss is None:
            raise InputError(
                "Net.loss: expected a forward pass before, got none. Call the net with its inputs."
            )
        return self._loss

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the whole net, as in Caffe."""
        return self._anchor.dtype

    @property
    def device(self) -> torch.device:
        """Where the net is."""
        return self._anchor.device

    # ------------------------------------------------------------------------------------------- forward

    def forward(self, inputs: Mapping[str, Tensor] | Tensor) -> Blobs | Tensor:
        """Run the net.

        Args:
            inputs: a tensor for each blob of an Input layer; its batch may differ from the declared one. Or
                one tensor of images, for use as a classifier.

        Returns:
            Every named blob; for one tensor, the scores that the last softmax (or its loss) is taken of, or
            the single output of a net without. Scores (b, k, 1, 1) come as (b, k).

        Raises:
            ValueError: if an input is missing or unknown, or does not fit a layer.
        """
        with self._own_precision():
            if isinstance(inputs, Tensor):
                return self._scores(inputs)
            self._check_inputs(inputs)
            return self._run(dict(inputs), range(len(self.layers)))

    def _own_precision(self) -> AbstractContextManager[Any]:
        """A context in which the layers compute in the net's own precision, unless `autocast` lets them."""
        kind = self.device.type
        if self.autocast or not torch.is_autocast_enabled(kind):
            return nullcontext()
        return torch.autocast(kind, enabled=False)

    def _scores(self, images: Tensor) -> Tensor:
        scored = self._scored()
        needed = sorted(node.index for node in self._graph.below([scored]))
        source = next((i for i in needed if self.layers[i].is_source and len(self._shapes[i][0]) >= 2), None)
        if source is None:
            raise InputError(
                f"Net: expected {scored.name!r} to depend on a blob of images, got none. Pass a dictionary."
            )
        given = dict(zip(self.layers[source].tops, (images,), strict=False))
        scores = self._run(given, [index for index in needed if index != source])[scored.name]
        return scores.flatten(1) if scores.shape[2:].numel() == 1 and scores.dim() > 1 else scores

    def _scored(self) -> Blob:
        """The scores."""
        for node in reversed(self._graph.nodes):
            if node.type in SCORING:
                return node.inputs[0]
        outputs = self.outputs
        if len(outputs) != 1:
            raise InputError(
                f"Net: expected one output to stand for the scores, got {outputs}. Pass a dictionary."
            )
        return self._graph.last[outputs[0]]

    def _run(self, given: dict[str, Tensor], indices: Sequence[int]) -> Blobs:
        tensors = {name: self._cast(tensor) for name, tensor in given.items()}
        deferred: dict[str, Callable[[], Tensor]] = {}
        total: Tensor | None = None
        done: set[int] = set()
        for index in indices:
            if index in done:
                continue
            chain = self._chains.get(index)
            if chain is not None and chain.end in indices and chain.applies():
                index = self._run_chain(chain, tensors, deferred)
                done.update(chain.indices)
            elif self.layers[index].type != "Input":
                self._run_layer(index, tensors)
            if index in self._asking and torch.is_grad_enabled():
                self._ask_for_gradient(self.layers[index].tops[0], tensors)
            for name, weight in zip(self.layers[index].tops, self._weights[index], strict=True):
                if weight:
                    term = tensors[name].sum() * weight
                    total = term if total is None else total + term
        self._loss = self._connected(self._anchor.clone() if total is None else total, given)
        automatic = self._automatic()
        return Blobs({name: tensor for name, tensor in tensors.items() if name not in automatic}, deferred)

    def _connected(self, loss: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """The loss in a graph also where nothing counts: then its gradients are zeros, as Caffe's are."""
        if loss.requires_grad or not torch.is_grad_enabled():
            return loss
        learned = [entry.tensor for entry in self.learnable if entry.tensor.requires_grad]
        asked = [tensor for tensor in given.values() if tensor.requires_grad]
        return _Zeros.apply(loss, *learned, *asked) if learned or asked else loss

    def _run_layer(self, index: int, tensors: dict[str, Tensor]) -> None:
        layer = self.layers[index]
        bottoms = [
            tensors[name].detach() if bottom in layer.cut else tensors[name]
            for bottom, name in enumerate(layer.bottoms)
        ]
        tops = _call(layer, bottoms)
        tensors.update(zip(layer.tops, tops if isinstance(tops, tuple) else (tops,), strict=True))

    def _run_chain(
        self, chain: Chain, tensors: dict[str, Tensor], deferred: dict[str, Callable[[], Tensor]]
    ) -> int:
        bottom = tensors[chain.bottom]
        tensors[chain.top] = chain(bottom)
        for place, name in enumerate(chain.hidden):
            deferred[name] = partial(chain.layer_by_layer, bottom, place)
        return chain.end

    def _ask_for_gradient(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Let the backward pass run down to a blob that nothing learns from, as Caffe's does."""
        if not tensors[name].requires_grad:
            tensors[name] = tensors[name].detach().requires_grad_()

    def _cast(self, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() or tensor.dtype == torch.uint8:
            return tensor.to(self.dtype)
        return tensor

    def _check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        expected = self.inputs
        if missing := [name for name in expected if name not in inputs]:
            raise InputError(
                f"Net: expected a tensor for each of the inputs {', '.join(expected)}, got none for "
                f"{', '.join(missing)}."
            )
        if unknown := [name for name in inputs if name not in expected]:
            raise InputError(
                f"Net: expected inputs out of {', '.join(expected) or 'none'}, got {', '.join(unknown)}. "
                "Inputs are the tops of Input layers."
            )

    def _by_name(self) -> dict[str, Layer]:
        """The layers by name; of several with one name the first, as Caffe takes it."""
        found: dict[str, Layer] = {}
        for layer in self.layers:
            found.setdefault(layer.name, layer)
        return found

    def _automatic(self) -> set[str]:
        return {layer.tops[0] for layer in self.layers if len(layer.spec.top) < len(layer.tops)}

    # ------------------------------------------------------------------------------------------- weights

    def load(self, weights: Weights) -> None:
        """Take the blobs of layers with the same names, the first of a name, as Caffe does.

        Layers that only one side has are left alone; if no name is common, a warning says so.

        Args:
            weights: path of a .caffemodel, a NetParameter, or several, later ones over earlier ones.

        Raises:
            ValueError: if a layer has another number of blobs, or one of another shape.
            OSError: if a file cannot be read.
        """
        self._load_all(_read_weights(weights))

    def _load_all(self, stored: Sequence[tuple[Any, Any]]) -> None:
        for net, source in stored:
            self._load_one(net, source)

    def _load_one(self, stored: Any, source: Any) -> None:
        layers, found = self._by_name(), 0
        for record in stored.layer:
            if record.name not in layers:
                continue
            layer = layers[record.name]
            if len(record.blobs) != len(layer.blobs):
                got = f"{len(layer.blobs)} blobs, got {len(record.blobs)}"
                raise InputError(f"Net.load: layer {layer.name!r}: expected {got}.")
            for index, blob in enumerate(record.blobs):
                self._copy_blob(layer, index, blob)
                found += 1
        if not found and self.learnable:
            warnings.warn(
                f"Net.load: no layer of the net has a namesake with blobs in {source}.", stacklevel=3
            )

    def _copy_blob(self, layer: Layer, index: int, blob: Any) -> None:
        target = layer.blobs[index]
        if not same_shape(blob, target.shape):
            raise InputError(
                f"Net.load: layer {layer.name!r}: expected {tuple(target.shape)} for blob {index}, got "
                f"{blob_shape(blob)}. Rename the layer to let it start anew."
            )
        layer.put_blob(index, torch.from_numpy(blob_array(blob)).reshape(target.shape))

    def share(self, other: Net) -> None:
        """Take over the very blobs of another net's layers of the same name, as a test net does.

        Raises:
            ValueError: if a layer of the same name has blobs of other shapes.
        """
        theirs = other._by_name()
        for layer in self.layers:
            if layer.blobs and layer.name in theirs:
                for index in range(len(layer.blobs)):
                    layer.share_blob(index, theirs[layer.name], index)

    def to_caffemodel(self) -> Any:
        """The net with its blobs, as a NetParameter that Caffe reads; doubles if the net is in float64."""
        net = schema.NetParameter(name=self.proto.name)
        for layer in self.layers:
            record = net.layer.add()
            record.CopyFrom(layer.spec)
            del record.blobs[:]
            record.blobs.extend(array_blob(blob.detach().cpu().numpy()) for blob in layer.blobs)
        return net

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Net:
        super()._apply(fn, recurse)
        for layer, index, owner, place in self._ties:  # a buffer has become two
            layer.share_blob(index, owner, place)
        if self.dtype == torch.float64:
            for layer in self.layers:
                layer.restore_wide()
        return self

    # -------------------------------------------------------------------------------------------- making

    def _check_memory(self) -> None:
        needed = 4 * sum(blob.numel() for layer in self.layers for blob in layer.blobs)
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > there:
            raise InputError(
                f"Net: expected parameters that fit into {there >> 30} GB of memory, got {needed >> 30} GB. "
                "Look for a num_output or a dim that is too large."
            )

    def _find_asking(self) -> set[int]:
        """The layers whose top gets a gradient though nothing learns from it."""
        reaching: set[int] = set()  # from which a gradient can come
        for node in reversed(self._graph.nodes):
            uses = [(user.index, bottom) for blob in node.outputs for user, bottom in blob.users]
            sent = any(user in reaching and bottom not in self.layers[user].cut for user, bottom in uses)
            if sent or any(node.loss_weights):
                reaching.add(node.index)
        asking = {index for index in reaching if self.layers[index].asks_for_gradient}
        return asking | {chain.end for index, chain in self._chains.items() if index in asking}


def _module_names(layers: Sequence[Layer]) -> list[str]:
    """A submodule's name for each layer: its own where that is free, else with a number."""
    taken, numbers, names = set(OWN), Counter[str](), []
    for layer in layers:
        plain = name = layer.name.replace(".", "_") or "unnamed"
        while name in taken:
            numbers[plain] += 1
            name = f"{plain}_{numbers[plain] + 1}"
        taken.add(name)
        names.append(name)
    return names


def _read_weights(weights: Weights) -> list[tuple[Any, Any]]:
    """Each NetParameter, and what to call it."""
    several = weights if isinstance(weights, (list, tuple)) else [weights]
    return [
        (source, "the given weights")
        if isinstance(source, schema.NetParameter)
        else (read_caffemodel(source), source)
        for source in several
    ]


class _Zeros(torch.autograd.Function):
    """A value, with gradients of exactly 0 for tensors that it does not depend on."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(torch.zeros_like(other) for other in ctx.saved_tensors)


def _call(layer: Layer, bottoms: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    if not layer.detached:
        return layer(*bottoms)
    names = [layer.blob_names[index] for index in layer.detached]
    values = {name: getattr(layer, name).detach() for name in names}
    return torch.func.functional_call(layer, values, tuple(bottoms))
