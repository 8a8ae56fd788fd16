"""The code of each layer: how its module is made, and how its tops come from its bottoms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from attention_transfer._errors import InputError
from attention_transfer.caffe.layers import Layer
from attention_transfer.caffe.layers.arithmetic import MAX, PROD
from attention_transfer.caffe.layers.forks import SEGNETS_EPS
from attention_transfer.caffe.layers.pooling import AVE

WIDTH = 88  # columns; what does not fit gets a line for each argument, and its last comma keeps it so


@dataclass
class Call:
    """A call in the source, like `torch.flatten(x, 1)`."""

    function: str
    arguments: list[str]

    def __str__(self) -> str:
        return f"{self.function}({', '.join(self.arguments)})"

    def lines(self, target: str, indent: int) -> list[str]:
        """`target = call`, over several lines where it is long."""
        blank = " " * indent
        if indent + len(target) + 3 + len(str(self)) <= WIDTH:
            return [f"{blank}{target} = {self}"]
        arguments = [f"{blank}    {argument}," for argument in self.arguments]
        return [f"{blank}{target} = {self.function}(", *arguments, f"{blank})"]


@dataclass
class Tensors:
    """Where an entry of the state dict comes from.

    Attributes:
        layer, index: the blob.
        summed: whether it is a sum of BatchNorm's, to be divided by the layer's third blob.
    """

    layer: Layer
    index: int
    summed: bool = False


@dataclass
class Code:
    """The code of one layer, or of a BatchNorm with its Scale.

    Attributes:
        module: the constructor, where the layer has a module; its attribute is `attribute`.
        tensors: what its state dict entries come from, by their name in the module.
        steps: (targets, expression) of the forward pass.
        differs: why Caffe's gradient is another than that of this code.
    """

    attribute: str = ""
    module: Call | None = None
    tensors: dict[str, Tensors] = field(default_factory=dict)
    steps: list[tuple[list[str], Call | str]] = field(default_factory=list)
    differs: str = ""


@dataclass
class Site:
    """What an emitter knows: the layer, its identifiers, and the shapes of its bottoms."""

    layer: Layer
    attribute: str
    bottoms: list[str]
    tops: list[str]
    shapes: list[tuple[int, ...]]

    @property
    def dim(self) -> int:
        return len(self.shapes[0])

    def axis(self, axis: int) -> int:
        return axis % self.dim if self.dim else 0

    def apply(self, call: Call | str, differs: str = "") -> Code:
        """Code that is one expression."""
        return Code(steps=[([self.tops[0]], call)], differs=differs)

    def function(self, function: str, *arguments: str, differs: str = "") -> Code:
        """Code that calls a function on the first bottom."""
        return self.apply(Call(function, [self.bottoms[0], *arguments]), differs)

    def module(self, constructor: str, *arguments: str, x: str | None = None, differs: str = "") -> Code:
        """Code that calls a module on each bottom; the module has the layer's blobs under their names."""
        layer = self.layer
        tensors = {name: Tensors(layer, i) for i, name in enumerate(layer.blob_names)}
        steps: list[tuple[list[str], Call | str]] = [
            ([top], Call(f"self.{self.attribute}", [x if x is not None else bottom]))
            for bottom, top in zip(self.bottoms, self.tops, strict=True)
        ]
        return Code(self.attribute, Call(constructor, list(arguments)), tensors, steps, differs)


Emitter = Callable[[Site], Code]
EMITTERS: dict[str, Emitter] = {}


def emits(*types: str) -> Callable[[Emitter], Emitter]:
    """Make a function the emitter of these Caffe types."""

    def enter(emitter: Emitter) -> Emitter:
        EMITTERS.update(dict.fromkeys(types, emitter))
        return emitter

    return enter


def emit(site: Site) -> Code:
    """The code of a layer.

    Raises:
        ValueError: if this package cannot write its type as PyTorch code.
    """
    layer = site.layer
    if layer.type not in EMITTERS:
        raise InputError(
            f"convert: layer {layer.name!r}: expected a type that converts, got {layer.type!r}. "
            "Name an output before it, or remove the layer."
        )
    code = EMITTERS[layer.type](site)
    if layer.cut and not code.differs:
        code.differs = "it stops here"
    return code


def number(value: float) -> str:
    """A number as source; exactly the float32 that a prototxt holds."""
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def numbers(values: Any) -> str:
    """Integers as source: one where all are equal, else a tuple."""
    values = [int(value) for value in values]
    return str(values[0]) if len(set(values)) == 1 else f"({', '.join(map(str, values))})"


def axes(values: Any) -> str:
    """A tuple of integers as source."""
    values = [str(int(value)) for value in values]
    return f"({values[0]},)" if len(values) == 1 else f"({', '.join(values)})"


# -------------------------------------------------------------------------------------------- with weights


@emits("Convolution", "Deconvolution", "ConvolutionDepthwise", "DepthwiseConvolution")
def _convolution(site: Site) -> Code:
    layer: Any = site.layer
    spatial = len(layer.kernel)
    inputs, outputs = layer.weight.shape[1] * layer.groups, layer.weight.shape[0]
    if layer.type == "Deconvolution":
        inputs, outputs = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
    arguments = [str(inputs), str(outputs), numbers(layer.kernel)]
    for name, values, default in (
        ("stride", layer.stride, 1),
        ("padding", layer.pad, 0),
        ("dilation", layer.dilation, 1),
        ("groups", (layer.groups,), 1),
    ):
        if {*values} != {default}:
            arguments.append(f"{name}={numbers(values)}")
    if len(layer.blobs) == 1:
        arguments.append("bias=False")
    kind = "ConvTranspose" if layer.type == "Deconvolution" else "Conv"
    code = site.module(f"nn.{kind}{spatial}d", *arguments)
    if layer.channels_axis != 1:
        code.steps = [
            step
            for bottom, top in zip(site.bottoms, site.tops, strict=True)
            for step in _over_leading_axes(site.attribute, bottom, top, layer.channels_axis)
        ]
    return code


def _over_leading_axes(attribute: str, x: str, y: str, axis: int) -> list[tuple[list[str], Call | str]]:
    flat = Call("torch.flatten", [x, "0", str(axis - 1)])
    return [
        ([y], Call(f"self.{attribute}", [str(flat)])),
        ([y], Call("torch.unflatten", [y, "0", f"{x}.shape[:{axis}]"])),
    ]


@emits("InnerProduct")
def _inner_product(site: Site) -> Code:
    layer: Any = site.layer
    outputs, inputs = layer.weight.shape
    kind = "nn.Linear"
    if layer.spec.inner_product_param.transpose:
        kind, (inputs, outputs) = "TransposedLinear", layer.weight.shape
    bias = [] if len(layer.blobs) > 1 else ["bias=False"]
    flat = site.dim > layer.first_axis + 1
    x = f"torch.flatten({site.bottoms[0]}, {layer.first_axis})" if flat else None
    return site.module(kind, str(inputs), str(outputs), *bias, x=x)


def batch_norm(site: Site, scale: Layer | None) -> Code:
    """The code of a BatchNorm, with the Scale behind it if there is one."""
    layer, param = site.layer, site.layer.spec.batch_norm_param
    channels = layer.blobs[0].shape[0]
    arguments = [
        str(channels),
        f"eps={number(param.eps)}",
        f"momentum={number(round(1 - param.moving_average_fraction, 7))}",
    ]
    if scale is None:
        arguments.append("affine=False")
    by_batch = param.HasField("use_global_stats") and not param.use_global_stats
    if by_batch:
        arguments.append("track_running_stats=False")
    x = site.bottoms[0]
    kind = "2" if site.dim == 4 else "3" if site.dim == 5 else "1"
    inner = f"torch.flatten({x}, 2)" if site.dim > 5 else f"torch.unsqueeze({x}, 1)" if site.dim == 1 else x
    code = site.module(f"nn.BatchNorm{kind}d", *arguments, x=inner)
    if site.dim > 5:
        shape = axes(site.shapes[0][2:])
        code.steps.append(([site.tops[0]], Call("torch.unflatten", [site.tops[0], "2", shape])))
    if site.dim == 1:
        code.steps.append(([site.tops[0]], Call("torch.flatten", [site.tops[0]])))
    code.tensors = (
        {} if scale is None else {name: Tensors(scale, i) for i, name in enumerate(scale.blob_names)}
    )
    if not by_batch:
        code.tensors |= {
            "running_mean": Tensors(layer, 0, summed=True),
            "running_var": Tensors(layer, 1, summed=True),
        }
    return code


@emits("BatchNorm")
def _batch_norm(site: Site) -> Code:
    return batch_norm(site, None)


@emits("Scale")
def _scale(site: Site) -> Code:
    layer: Any = site.layer
    bias = layer.spec.scale_param.bias_term
    trailing = site.dim - layer.first_axis
    if len(site.bottoms) == 1:
        trailing -= layer.weight.dim()
        shape = [str(size) for size in layer.weight.shape]
        return site.module("Scale", *shape, f"trailing={trailing}", *([] if bias else ["bias=False"]))
    trailing -= len(site.shapes[1])
    (x, factor), top = site.bottoms, site.tops[0]
    code = site.apply(Call("torch.mul", [x, _spread(factor, trailing)]))
    if bias:
        shape = [str(size) for size in layer.bias.shape]
        code.attribute = site.attribute
        code.module = Call("Bias", [*shape, f"trailing={trailing}"])
        code.tensors = {"bias": Tensors(layer, 0)}
        code.steps.append(([top], Call(f"self.{site.attribute}", [top])))
    return code


@emits("Bias")
def _bias(site: Site) -> Code:
    layer: Any = site.layer
    trailing = site.dim - layer.first_axis
    if len(site.bottoms) == 1:
        shape = [str(size) for size in layer.bias.shape]
        return site.module("Bias", *shape, f"trailing={trailing - layer.bias.dim()}")
    x, term = site.bottoms
    return site.apply(Call("torch.add", [x, _spread(term, trailing - len(site.shapes[1]))]))


def _spread(name: str, trailing: int) -> str:
    return f"{name}[..., {', '.join(['None'] * trailing)}]" if trailing else name


@emits("Parameter")
def _parameter(site: Site) -> Code:
    made = Call("Learned", [str(size) for size in site.layer.blobs[0].shape])
    steps: list[tuple[list[str], Call | str]] = [(site.tops, Call(f"self.{site.attribute}", []))]
    return Code(site.attribute, made, {"value": Tensors(site.layer, 0)}, steps)


@emits("PReLU")
def _prelu(site: Site) -> Code:
    code = site.module("nn.PReLU", str(site.layer.blobs[0].numel()))
    code.tensors = {"weight": Tensors(site.layer, 0)}
    return code


@emits("BN")
def _bn(site: Site) -> Code:
    layer: Any = site.layer
    param, channels = layer.spec.bn_param, layer.factor.numel()
    if layer.has_averages:
        arguments = [f"eps={number(param.eps)}", f"momentum={number(round(1 - param.momentum, 7))}"]
    elif param.bn_mode == param.INFERENCE:
        code = site.module("Scale", str(channels), f"trailing={site.dim - 2}")
        code.tensors = {"weight": Tensors(layer, 0), "bias": Tensors(layer, 1)}
        return code
    else:
        arguments = [f"eps={number(SEGNETS_EPS)}", "track_running_stats=False"]
    kind = "2" if site.dim == 4 else "3" if site.dim == 5 else "1"
    code = site.module(f"nn.BatchNorm{kind}d", str(channels), *arguments)
    names = ("weight", "bias", "running_mean", "running_var")[: len(layer.blobs)]
    code.tensors = {name: Tensors(layer, index) for index, name in enumerate(names)}
    return code


@emits("Normalize")
def _normalize(site: Site) -> Code:
    layer: Any = site.layer
    param = layer.spec.norm_param
    over = range(1, site.dim) if param.across_spatial else (1,)
    shape = [str(size) for size in layer.scale.shape]
    differs = ""
    if layer.in_place:
        differs = "in place, Normalize sends back 0"
    elif layer.scale.unique().numel() > 1:
        differs = "with unequal scales it is s (g - x <x, g> / norm^2) / norm"
    return site.module("Normalize", *shape, f"axes={axes(over)}", f"eps={number(param.eps)}", differs=differs)


# ------------------------------------------------------------------------------------ entry by entry


@emits("ReLU")
def _relu(site: Site) -> Code:
    slope = site.layer.spec.relu_param.negative_slope
    return site.module("nn.LeakyReLU", number(slope)) if slope else site.module("nn.ReLU")


@emits("ReLU6")
def _relu6(site: Site) -> Code:
    slope = site.layer.spec.relu6_param.negative_slope
    if not slope:
        return site.module("nn.ReLU6")
    inner = Call("F.leaky_relu", [site.bottoms[0], number(slope)])
    return site.apply(Call("torch.clamp", [str(inner), "max=6.0"]))


@emits("Axpy")
def _axpy(site: Site) -> Code:
    a, x, y = site.bottoms
    trailing = len(site.shapes[1]) - site.dim
    return site.apply(f"{_spread(a, trailing)} * {x} + {y}")


@emits("Interp")
def _interp(site: Site) -> Code:
    layer: Any = site.layer
    param, x, top = layer.spec.interp_param, site.bottoms[0], site.tops[0]
    steps: list[tuple[list[str], Call | str]] = []
    if param.pad_beg or param.pad_end:
        part = f"{-param.pad_beg or ''}:{param.pad_end or ''}"
        steps.append(([top], f"{x}[:, :, {part}, {part}]"))
        x = top
    if len(site.bottoms) == 1 and layer.by_factors:
        call = Call("zoomed", [x, f"shrink={param.shrink_factor}", f"zoom={param.zoom_factor}"])
    else:
        size = f"({param.height}, {param.width})"
        size = size if len(site.bottoms) == 1 else f"{site.bottoms[1]}.shape[2:]"
        call = Call("F.interpolate", [x, f"size={size}", 'mode="bilinear"', "align_corners=True"])
    return Code(steps=[*steps, ([top], call)])


@emits("Sigmoid")
def _sigmoid(site: Site) -> Code:
    return site.module("nn.Sigmoid")


@emits("TanH")
def _tanh(site: Site) -> Code:
    return site.module("nn.Tanh")


@emits("ELU")
def _elu(site: Site) -> Code:
    return site.module("nn.ELU", f"alpha={number(site.layer.spec.elu_param.alpha)}")


@emits("BNLL")
def _bnll(site: Site) -> Code:
    differs = "in place, BNLL takes its slope at the value" if site.layer.in_place else ""
    return site.module("nn.Softplus", "threshold=40.0", differs=differs)


@emits("AbsVal")
def _absolute(site: Site) -> Code:
    return site.function("torch.abs")


@emits("Threshold")
def _threshold(site: Site) -> Code:
    return site.function("above", number(site.layer.spec.threshold_param.threshold))


@emits("Dropout")
def _dropout(site: Site) -> Code:
    ratio = site.layer.spec.dropout_param.dropout_ratio
    differs = "in training, with a ratio of 1, nothing is a number" if ratio == 1 else ""
    return site.module("nn.Dropout", number(ratio), differs=differs)


@emits("Exp")
def _exp(site: Site) -> Code:
    param = site.layer.spec.exp_param
    log_base = 1.0 if param.base == -1 else math.log(param.base)
    if (log_base, param.scale, param.shift) == (1, 1, 0):
        return site.function("torch.exp")
    factor = math.exp(log_base * param.shift)
    return site.function("exponential", f"scale={number(log_base * param.scale)}", f"factor={number(factor)}")


@emits("Log")
def _log(site: Site) -> Code:
    param = site.layer.spec.log_param
    differs = "in place, Log takes its slope at the value" if site.layer.in_place else ""
    if (param.base, param.scale, param.shift) == (-1, 1, 0):
        return site.function("torch.log", differs=differs)
    factor = 1.0 if param.base == -1 else 1 / math.log(param.base)
    arguments = [
        f"scale={number(param.scale)}",
        f"shift={number(param.shift)}",
        f"factor={number(factor)}",
    ]
    return site.function("logarithm", *arguments, differs=differs)


@emits("Power")
def _power(site: Site) -> Code:
    param = site.layer.spec.power_param
    if param.power * param.scale == 0:
        constant = param.shift**param.power if param.power else 1.0
        return site.function("torch.full_like", number(constant))
    differs = ""
    if site.layer.in_place:
        differs = "in place, Power sends back its squared slope, taken at the value"
    elif param.power not in (1, 2):
        differs = "where shift + scale * x is 0, it is not a number"
    if (param.scale, param.shift) == (1, 0):
        if param.power == 1:
            return site.apply(site.bottoms[0], differs)
        if param.power == 2:
            return site.function("torch.square", differs=differs)
        return site.function("torch.pow", number(param.power), differs=differs)
    arguments = [
        f"power={number(param.power)}",
        f"scale={number(param.scale)}",
        f"shift={number(param.shift)}",
    ]
    return site.function("raise_to", *arguments, differs=differs)


# ------------------------------------------------------------------------------- over windows and axes


@emits("Pooling")
def _pooling(site: Site) -> Code:
    layer: Any = site.layer
    param, x = layer.spec.pooling_param, site.bottoms[0]
    mean = param.pool == AVE
    if param.global_pooling and len(site.tops) == 1:
        if mean:
            return site.function("torch.mean", "dim=(2, 3)", "keepdim=True")
        return site.module("nn.AdaptiveMaxPool2d", "1")
    hw = site.shapes[0][2:]
    kernel, stride = (hw, (1, 1)) if param.global_pooling else (layer.kernel, layer.stride)
    if len(site.tops) == 1 and _as_torch(hw, kernel, stride, layer.pad):
        arguments = [numbers(kernel), f"stride={numbers(stride)}"]
        if any(layer.pad):
            arguments.append(f"padding={numbers(layer.pad)}")
        kind = "nn.AvgPool2d" if mean else "nn.MaxPool2d"
        return site.module(kind, *arguments, "ceil_mode=True")
    window = [
        f"kernel={axes(kernel)}",
        f"stride={axes(stride)}",
        f"pad={axes(layer.pad)}",
    ]
    function = "mean_pool" if mean else "max_pool" if len(site.tops) == 1 else "max_pool_places"
    return Code(steps=[(site.tops, Call(function, [x, *window]))])


def _as_torch(hw: Any, kernel: Any, stride: Any, pad: Any) -> bool:
    """Whether torch's own ceil_mode makes Caffe's windows, for any image that is not smaller than one."""
    return all(
        2 * p <= k and size + 2 * p >= k and (s <= k or any(pad))
        for size, k, s, p in zip(hw, kernel, stride, pad, strict=True)
    )


@emits("LRN")
def _lrn(site: Site) -> Code:
    param = site.layer.spec.lrn_param
    settings = [f"alpha={number(param.alpha)}", f"beta={number(param.beta)}"]
    if param.norm_region == param.WITHIN_CHANNEL:
        return site.function("respond_within", f"size={param.local_size}", *settings)
    return site.module("nn.LocalResponseNorm", str(param.local_size), *settings, f"k={number(param.k)}")


@emits("MVN")
def _mvn(site: Site) -> Code:
    param = site.layer.spec.mvn_param
    first = site.dim - 1 if site.dim <= 2 else 1 if param.across_channels else 2
    over = f"axes={axes(range(first, site.dim))}"
    if not param.normalize_variance:
        return site.function("centred", over)
    differs = "MVN leaves eps out of one of its terms"
    return site.function("standardised", over, f"eps={number(param.eps)}", differs=differs)


@emits("Softmax")
def _softmax(site: Site) -> Code:
    return site.module("nn.Softmax", f"dim={site.axis(site.layer.spec.softmax_param.axis)}")


@emits("ArgMax")
def _arg_max(site: Site) -> Code:
    param = site.layer.spec.argmax_param
    k, values = f"k={param.top_k}", f"values={param.out_max_val}"
    if param.HasField("axis"):
        return site.function("arg_max", k, f"axis={site.axis(param.axis)}", values)
    return site.function("arg_max_of_sample", k, values)


@emits("Reduction")
def _reduction(site: Site) -> Code:
    param = site.layer.spec.reduction_param
    first = site.axis(param.axis)
    x = site.bottoms[0]
    inner = {
        param.SUM: x,
        param.MEAN: x,
        param.ASUM: f"torch.abs({x})",
        param.SUMSQ: f"torch.square({x})",
    }[param.operation]
    function = "torch.mean" if param.operation == param.MEAN else "torch.sum"
    over = [f"dim={axes(range(first, site.dim))}"] if first < site.dim and first else []
    code = site.apply(Call(function, [inner, *over]))
    if param.coeff != 1:
        code.steps.append(([site.tops[0]], Call("torch.mul", [site.tops[0], number(param.coeff)])))
    return code


@emits("Eltwise")
def _eltwise(site: Site) -> Code:
    param, top = site.layer.spec.eltwise_param, site.tops[0]
    terms = list(site.bottoms)
    if param.operation == MAX:
        steps = _folded("torch.maximum", terms, top)
        return Code(steps=steps, differs="of equal values, MAX sends it to one, here each gets a share")
    differs = ""
    if param.operation == PROD:
        text, function = " * ".join(terms), "torch.mul"
        if not param.stable_prod_grad:
            differs = "of a product it is g y / x, not a number where a factor is 0"
    else:
        coefficients = list(param.coeff) or [1.0] * len(terms)
        terms = [x if c == 1 else f"{number(c)} * {x}" for c, x in zip(coefficients, terms, strict=True)]
        text, function = " + ".join(terms), "torch.add"
    if 8 + len(top) + 3 + len(text) <= WIDTH:
        return site.apply(text, differs)
    return Code(steps=_folded(function, terms, top), differs=differs)


def _folded(function: str, terms: list[str], top: str) -> list[tuple[list[str], Call | str]]:
    """One bottom after the other into the top, which is none of them."""
    steps: list[tuple[list[str], Call | str]] = [([top], Call(function, terms[:2]))]
    return steps + [([top], Call(function, [top, term])) for term in terms[2:]]


# --------------------------------------------------------------------------------------- moving entries


@emits("Split")
def _split(site: Site) -> Code:
    return Code(steps=[([top], site.bottoms[0]) for top in site.tops])


@emits("Reshape")
def _reshape(site: Site) -> Code:
    layer, shape = site.layer, site.shapes[0]
    param = layer.spec.reshape_param
    first = param.axis if param.axis >= 0 else len(shape) + param.axis + 1
    last = len(shape) if param.num_axes == -1 else first + param.num_axes
    copied = [f"{site.bottoms[0]}.shape[{axis}]" for axis in range(len(shape))]
    middle = [copied[first + i] if dim == 0 else str(dim) for i, dim in enumerate(param.shape.dim)]
    return site.apply(Call(f"{site.bottoms[0]}.reshape", [*copied[:first], *middle, *copied[last:]]))


@emits("Flatten")
def _flatten(site: Site) -> Code:
    param = site.layer.spec.flatten_param
    first, last = site.axis(param.axis), site.axis(param.end_axis)
    if first > last:
        return site.function("torch.unsqueeze", str(first))
    return site.function("torch.flatten", str(first), *([] if last == site.dim - 1 else [str(last)]))


@emits("Concat")
def _concat(site: Site) -> Code:
    param = site.layer.spec.concat_param
    axis = site.axis(param.concat_dim if param.HasField("concat_dim") else param.axis)
    if len(site.bottoms) == 1:
        return site.apply(site.bottoms[0])
    if len(f"{' ' * 12}({', '.join(site.bottoms)}),") <= WIDTH:
        return site.apply(Call("torch.cat", [f"({', '.join(site.bottoms)})", f"dim={axis}"]))
    return Code(steps=_collected(site.bottoms, site.tops[0], axis))


def _collected(bottoms: list[str], top: str, axis: int) -> list[tuple[list[str], Call | str]]:
    """As many bottoms at a time as fit into a line."""
    steps: list[tuple[list[str], Call | str]] = []
    parts = [bottoms[:2], *[[top, bottom] for bottom in bottoms[2:]]]
    for part in parts:
        steps.append(([top], Call("torch.cat", [f"({', '.join(part)})", f"dim={axis}"])))
    return steps


@emits("Slice")
def _slice(site: Site) -> Code:
    param = site.layer.spec.slice_param
    axis = site.axis(param.slice_dim if param.HasField("slice_dim") else param.axis)
    x = site.bottoms[0]
    if len(site.tops) == 1:
        return site.apply(x)
    if not param.slice_point:
        return Code(steps=[(site.tops, Call("torch.chunk", [x, str(len(site.tops)), f"dim={axis}"]))])
    return Code(steps=[(site.tops, Call("torch.tensor_split", [x, axes(param.slice_point), f"dim={axis}"]))])


@emits("Tile")
def _tile(site: Site) -> Code:
    param = site.layer.spec.tile_param
    times = ["1"] * site.dim
    times[site.axis(param.axis)] = str(param.tiles)
    return site.apply(Call(f"{site.bottoms[0]}.repeat", times))


@emits("Permute")
def _permute(site: Site) -> Code:
    order = list(site.layer.spec.permute_param.order)
    order += [axis for axis in range(site.dim) if axis not in order]
    return site.apply(Call(f"{site.bottoms[0]}.permute", [str(axis) for axis in order]))


@emits("Crop")
def _crop(site: Site) -> Code:
    param, (x, reference) = site.layer.spec.crop_param, site.bottoms
    first, offsets = site.axis(param.axis), list(param.offset)
    cropped = site.dim - first
    offsets = offsets * cropped if len(offsets) == 1 else offsets or [0] * cropped
    steps: list[tuple[list[str], Call | str]] = []
    for axis, offset in enumerate(offsets, start=first):
        call = Call("torch.narrow", [x, str(axis), str(offset), f"{reference}.shape[{axis}]"])
        steps.append(([site.tops[0]], call))
        x = site.tops[0]
    return Code(steps=steps)


@emits("Python")
def _python(site: Site) -> Code:
    layer: Any = site.layer
    return site.function("unit", f"eps={number(layer.eps)}")
