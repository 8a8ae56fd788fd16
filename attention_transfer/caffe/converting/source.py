"""The file of a converted net: its class, and a function that loads its weights."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attention_transfer.caffe.converting.emit import WIDTH, Call, Code, Site, Tensors, batch_norm, emit
from attention_transfer.caffe.converting.names import Names, class_name, quoted
from attention_transfer.caffe.converting.selection import Selection
from attention_transfer.caffe.layers import Layer, pieces

IMPORTED = ("F", "Path", "Tensor", "load", "load_file", "math", "nn", "parts", "self", "torch")

HEAD = '''"""{name}: a net of Caffe as a PyTorch module.

Written by `attention-transfer caffe convert`. `load()` gives it with its weights. Layers
and blobs have their names in Caffe, as far as Python allows. Every number is the float32
that Caffe reads: 1e-5 in a prototxt is 9.999999747378752e-06.
"""
'''

LOAD = '''def load(folder: str | Path = Path(__file__).parent) -> {name}:
    """The net with the weights of `folder`, ready to predict."""
    model = {name}(){cast}
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model.eval()
'''


@dataclass
class Source:
    """What becomes of a selection of layers.

    Attributes:
        text: the file.
        name: of the class.
        inputs, outputs: identifiers of the blobs.
        tensors: what each entry of the state dict comes from.
        differing: for each reason why Caffe's gradient is another one, the layers.
    """

    name: str
    inputs: list[str]
    outputs: list[str]
    text: str = ""
    tensors: dict[str, Tensors] = field(default_factory=dict)
    differing: dict[str, list[str]] = field(default_factory=dict)


def write_source(selection: Selection, dtype: torch.dtype) -> Source:
    """The source of a net, and what its state dict is made of.

    Raises:
        ValueError: if a layer cannot be written as PyTorch code.
    """
    writer = _Writer(selection)
    source = writer.source
    body = writer.body()
    cast = ".double()" if dtype == torch.float64 else ""
    load = LOAD.format(name=source.name, cast=cast)
    helpers = _helpers(body)
    head = HEAD.format(name=source.name) + "\n" + _imports("".join([*helpers, body]))
    source.text = "\n\n\n".join([head, *helpers, body, load])
    return source


class _Writer:
    """Goes through the selected layers once, and keeps what each part of the file needs."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        fixed = {*IMPORTED, *_PIECES}
        name = class_name(selection.net.proto.name, fixed)
        attributes = Names("layer", [*dir(nn.Module()), *nn.Module().__dict__])
        self._attributes = [
            attributes.new(layer.name) for layer in selection.net.layers
        ]  # whatever is left out
        self._locals = Names("blob", {*fixed, name, *dir(builtins)})
        self._blobs: dict[str, str] = {}
        inputs = [self._blob(blob.name) for blob in selection.inputs]
        self._made: list[str] = []
        self._ties: list[str] = []
        self._frozen: list[str] = []
        self._steps: list[str] = []
        self._first: dict[int, str] = {}
        self._renamed: list[str] = []
        self.source = Source(name, inputs, [])
        for index, code in self._codes():
            self._add(index, code)
        self.source.outputs = [self._blob(blob.name) for blob in selection.outputs]

    def _blob(self, name: str) -> str:
        if name not in self._blobs:
            self._blobs[name] = self._locals.new(name)
        return self._blobs[name]

    def _codes(self) -> Iterator[tuple[int, Code]]:
        """The code of each layer; a BatchNorm takes a Scale that belongs to it along."""
        merged: set[int] = set()
        for index in self.selection.layers:
            layer = self.selection.net.layers[index]
            if index in merged:
                continue
            scale = self._scale_of(index) if layer.type == "BatchNorm" else None
            if scale is not None:
                merged.add(scale)
            yield index, self._code(index, None if scale is None else self.selection.net.layers[scale])

    def _code(self, index: int, scale: Layer | None) -> Code:
        layer, shapes = self.selection.net.layers[index], self.selection.net.shapes
        bottoms = [self._blob(name) for name in layer.bottoms]
        tops = [self._blob(name) for name in (scale or layer).tops]
        site = Site(layer, self._attributes[index], bottoms, tops, [shapes[name] for name in layer.bottoms])
        return batch_norm(site, scale) if layer.type == "BatchNorm" else emit(site)

    def _scale_of(self, index: int) -> int | None:
        """The Scale whose factor and bias a BatchNorm can take over."""
        selection, (norm,) = self.selection, self.selection.graph.nodes[index].outputs
        users = [user.index for user, _ in norm.users if user.index in selection.layers]
        if len(users) != 1 or norm in selection.outputs:
            return None
        layer: Any = selection.net.layers[users[0]]
        fits = (
            layer.type == "Scale"
            and len(layer.bottoms) == 1
            and layer.first_axis == 1
            and [blob.dim() for blob in layer.blobs] == [1, 1]
        )
        return users[0] if fits else None

    def _add(self, index: int, code: Code) -> None:
        layer = self.selection.net.layers[index]
        if code.module is not None:
            self._made += code.module.lines(f"self.{code.attribute}", 8)
            self._note_tensors(code)
            if not _alike(layer.name, code.attribute):
                self._renamed.append(f"# The layer {quoted(layer.name)} is {code.attribute}.")
        if code.differs:
            self._steps.append(f"        # Caffe's own gradient differs here: {code.differs}.")
            self.source.differing.setdefault(code.differs, []).append(layer.name)
        for place, (targets, expression) in enumerate(code.steps):
            last = place == len(code.steps) - 1
            self._steps += _with_shape(_statement(targets, expression), self._comment(index) if last else "")

    def _comment(self, index: int) -> str:
        """The shape of what a layer gives, where it is another than the bottom's."""
        layer, shapes = self.selection.net.layers[index], self.selection.net.shapes
        shape = shapes[layer.tops[0]]
        changed = len(layer.tops) == 1 and (not layer.bottoms or shape != shapes[layer.bottoms[0]])
        return f"  # {self._shape(shape)}" if changed else ""

    def _shape(self, shape: tuple[int, ...]) -> str:
        batches = {self.selection.shape(blob)[:1] for blob in self.selection.inputs}
        sizes = [str(size) for size in shape]
        if len(batches) == 1 and shape[:1] in batches:
            sizes[:1] = ["b"]
        return f"({', '.join(sizes)})"

    def _note_tensors(self, code: Code) -> None:
        parameters = []
        for name, tensors in code.tensors.items():
            self.source.tensors[f"{code.attribute}.{name}"] = tensors
            blob = tensors.layer.blobs[tensors.index]
            if not isinstance(blob, nn.Parameter):
                continue
            parameters.append(blob)
            first = self._first.setdefault(id(blob), f"self.{code.attribute}.{name}")
            if first != f"self.{code.attribute}.{name}":
                self._ties += [f"        shared = {first}", f"        self.{code.attribute}.{name} = shared"]
        if parameters and not any(blob.requires_grad for blob in parameters):
            self._frozen.append(f"        self.{code.attribute}.requires_grad_(False)")

    # ------------------------------------------------------------------------------------------- text

    def body(self) -> str:
        """The class."""
        remarks = [f"    {line}" for line in (*self._dropped(), *self._renamed, *self._fed())]
        lines = [f"class {self.source.name}(nn.Module):", *self._docstring(), ""]
        lines += [*remarks, ""] if remarks else []
        lines += ["    def __init__(self) -> None:", "        super().__init__()", *self._made]
        if self._ties:
            lines += self._ties
        if self._frozen:
            lines += ["        # lr_mult: 0", *self._frozen]
        return "\n".join([*lines, "", *self._signature(), *self._steps, *self._returned()])

    def _dropped(self) -> list[str]:
        layers = [self.selection.net.layers[index] for index in self.selection.dropped]
        named = [f"{quoted(layer.name)} ({quoted(layer.type)[1:-1]})" for layer in layers]
        return [f"# Left out, as no output needs it: {name}" for name in named]

    def _fed(self) -> list[str]:
        """How the data layers treated the images, which is now up to the caller."""
        lines = []
        for node in dict.fromkeys(blob.producer for blob in self.selection.inputs):
            if node is not None and node.spec.HasField("transform_param"):
                text = " ".join(str(node.spec.transform_param).split())
                lines.append(f"# Caffe transformed what {quoted(node.name)} reads: {quoted(text)}")
        return lines

    def _docstring(self) -> list[str]:
        selection = self.selection
        lines = ['    """A net of Caffe.', "", "    In, and out:"]
        for names, blobs in (
            (self.source.inputs, selection.inputs),
            (self.source.outputs, selection.outputs),
        ):
            lines += [
                f"        {name}: {self._shape(selection.shape(blob))}"
                for name, blob in zip(names, blobs, strict=True)
            ]
            lines.append("")
        return [*lines[:-1], '    """']

    def _signature(self) -> list[str]:
        result = "Tensor" if len(self.source.outputs) == 1 else "dict[str, Tensor]"
        arguments = ["self", *(f"{name}: Tensor" for name in self.source.inputs)]
        line = f"    def forward({', '.join(arguments)}) -> {result}:"
        if len(line) <= WIDTH:
            return [line]
        return ["    def forward(", *(f"        {name}," for name in arguments), f"    ) -> {result}:"]

    def _returned(self) -> list[str]:
        names = self.source.outputs
        if len(names) == 1:
            return [f"        return {names[0]}"]
        pairs = [f'"{name}": {name}' for name in names]
        line = f"        return {{{', '.join(pairs)}}}"
        if len(line) <= WIDTH:
            return [line]
        return ["        return {", *(f"            {pair}," for pair in pairs), "        }"]


def _alike(name: str, attribute: str) -> bool:
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") == attribute


def _statement(targets: list[str], expression: Call | str) -> list[str]:
    if isinstance(expression, str):
        return [f"        {targets[0]} = {expression}"]
    joined = ", ".join(targets)
    if len(targets) == 1 or len(f"        {joined} = {expression.function}(") <= WIDTH:
        return expression.lines(joined, 8)
    parts = [f"        {target} = parts[{place}]" for place, target in enumerate(targets)]
    return [*expression.lines("parts", 8), *parts]


def _with_shape(lines: list[str], comment: str) -> list[str]:
    """The comment behind a statement of one line, where it fits."""
    if len(lines) == 1 and len(lines[0] + comment) <= WIDTH:
        return [lines[0] + comment]
    return lines


# ------------------------------------------------------------------------------------------------ helpers


def _pieces() -> dict[str, str]:
    """The source of each class and function of `pieces`, in order."""
    text = inspect.getsource(pieces)
    parts = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            parts[node.name] = ast.get_source_segment(text, node) or ""
    return parts


_PIECES = _pieces()


def _helpers(body: str) -> list[str]:
    """The pieces that the class uses, and those that they use."""
    used: set[str] = set()
    waiting = [body]
    while waiting:
        text = waiting.pop()
        found = {name for name in _PIECES if re.search(rf"(?<![\w.]){name}\(", text)} - used
        used |= found
        waiting += [_PIECES[name] for name in found]
    return [text for name, text in _PIECES.items() if name in used]


def _imports(text: str) -> str:
    def uses(name: str) -> bool:
        return re.search(rf"(?<![\w.]){name}\.", text) is not None

    lines = ["import math"] if uses("math") else []
    lines += ["from pathlib import Path", ""]
    lines += ["import torch"] if uses("torch") else []
    lines += ["import torch.nn.functional as F"] if uses("F") else []
    return "\n".join([*lines, "from safetensors.torch import load_file", "from torch import Tensor, nn"])


# -------------------------------------------------------------------------------------------------- weights


def state_of(source: Source) -> dict[str, Tensor]:
    """The entries of the module's state dict, from the net's blobs."""
    return {key: _value(tensors) for key, tensors in source.tensors.items()}


def _value(tensors: Tensors) -> Tensor:
    layer = tensors.layer
    blob = layer.blobs[tensors.index].detach()
    if not tensors.summed:
        return blob
    factor = layer.blobs[2].detach().double()
    return (blob.double() / factor if factor else torch.zeros_like(blob)).to(blob.dtype)
