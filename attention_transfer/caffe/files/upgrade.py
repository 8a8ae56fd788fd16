"""Old forms of nets and solvers made into today's, as Caffe does on reading (its upgrade_proto)."""

from __future__ import annotations

from typing import Any

from attention_transfer._errors import InputError
from attention_transfer.caffe import schema

# The names of V1 layer types that are not their enum name in camel case.
V1_NAMES = {
    "ABSVAL": "AbsVal", "ARGMAX": "ArgMax", "BNLL": "BNLL", "HDF5_DATA": "HDF5Data",
    "HDF5_OUTPUT": "HDF5Output", "IM2COL": "Im2col", "LRN": "LRN", "MVN": "MVN", "RELU": "ReLU",
    "SOFTMAX_LOSS": "SoftmaxWithLoss", "TANH": "TanH",
}  # fmt: skip
TRANSFORMED = {"Data": "data_param", "ImageData": "image_data_param", "WindowData": "window_data_param"}


def upgrade_net(net: Any, user: str) -> Any:
    """Bring `net`, a NetParameter, to the current form, in place; returns it.

    V1 `layers` become `layer`, `input` fields with shapes an Input layer, transformations inside a data
    layer's own parameters a `transform_param`; a BatchNorm loses a spec of exactly three `param` entries.

    Raises:
        ValueError: if it mixes `layer` and `layers`, or declares inputs in a way that does not fit.
    """
    if net.layers:
        if net.layer:
            raise InputError(
                f"{user}: expected either `layer` or the older `layers`, got a net with both. "
                "Rewrite the `layers` entries."
            )
        for old in net.layers:
            _upgrade_v1(old, net.layer.add(), user)
        del net.layers[:]
    for layer in net.layer:
        if layer.type in TRANSFORMED:
            _upgrade_transformation(layer)
        if layer.type == "BatchNorm" and len(layer.param) == 3:
            del layer.param[:]
    if net.input:
        _upgrade_inputs(net, user)
    return net


def upgrade_solver(solver: Any) -> Any:
    """Bring `solver`, a SolverParameter, to the current form, in place; returns it."""
    if solver.HasField("solver_type"):
        names = {"SGD": "SGD", "NESTEROV": "Nesterov", "ADAGRAD": "AdaGrad", "RMSPROP": "RMSProp"}
        names |= {"ADADELTA": "AdaDelta", "ADAM": "Adam"}
        enum = solver.DESCRIPTOR.fields_by_name["solver_type"].enum_type
        solver.type = names[enum.values_by_number[solver.solver_type].name]
        solver.ClearField("solver_type")
    return solver


def _upgrade_v1(old: Any, new: Any, user: str) -> None:
    name = old.DESCRIPTOR.enum_types_by_name["LayerType"].values_by_number[old.type].name
    if name == "NONE":
        raise InputError(
            f"{user}: expected a type for the layer {old.name!r}, got none. "
            "A net of the V0 format must go through Caffe's upgrade_net_proto_text first."
        )
    new.type = V1_NAMES.get(name) or "".join(word.capitalize() for word in name.split("_"))
    specs = max(len(old.param), len(old.blobs_lr), len(old.weight_decay), len(old.blob_share_mode))
    for index in range(specs):
        spec = new.param.add()
        if index < len(old.param) and old.param[index]:
            spec.name = old.param[index]
        if index < len(old.blob_share_mode):
            spec.share_mode = old.blob_share_mode[index]
        if index < len(old.blobs_lr):
            spec.lr_mult = old.blobs_lr[index]
        if index < len(old.weight_decay):
            spec.decay_mult = old.weight_decay[index]
    renamed = {"type", "param", "blobs_lr", "weight_decay", "blob_share_mode"}
    for field, value in old.ListFields():
        if field.name in renamed:
            continue
        if field.is_repeated:
            getattr(new, field.name).MergeFrom(value)
        elif field.message_type:
            getattr(new, field.name).CopyFrom(value)
        else:
            setattr(new, field.name, value)


def _upgrade_transformation(layer: Any) -> None:
    own = getattr(layer, TRANSFORMED[layer.type])
    for name in ("scale", "mean_file", "crop_size", "mirror"):
        if own.HasField(name):
            setattr(layer.transform_param, name, getattr(own, name))
            own.ClearField(name)


def _upgrade_inputs(net: Any, user: str) -> None:
    """Make an Input layer of `input` fields with shapes. Those without say nothing: a layer declares them.

    Shapes come before dimensions, and more of either than inputs count for nothing, as in Caffe.
    """
    shapes = [list(shape.dim) for shape in net.input_shape]
    if not shapes:
        shapes = [list(net.input_dim[start : start + 4]) for start in range(0, len(net.input_dim), 4)]
    if shapes:
        own = shapes[: len(net.input)]
        if len(own) < len(net.input) or (not net.input_shape and len(own[-1]) < 4):
            raise InputError(
                f"{user}: expected one input_shape, or four input_dim, for each of {len(net.input)} `input`, "
                f"got {len(net.input_shape)} input_shape and {len(net.input_dim)} input_dim."
            )
        layer = schema.LayerParameter(name="input", type="Input", top=net.input)
        for dims in own:
            layer.input_param.shape.add(dim=dims)
        layers = [layer, *net.layer]
        del net.layer[:]
        net.layer.extend(layers)
    for field in ("input", "input_dim", "input_shape"):
        net.ClearField(field)
