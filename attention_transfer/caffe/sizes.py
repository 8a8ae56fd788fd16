"""How large a net's images are, and how many channels they have: from its prototxt, data, or weights.

So a net can be looked at, built on, or converted without its data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from attention_transfer.caffe import schema
from attention_transfer.caffe.files.caffemodel import blob_shape, read_mean
from attention_transfer.caffe.graph import Graph, Node, in_phase
from attention_transfer.caffe.layers.records import datum_pixels, first_record

OWN_PARAMS = {"Data": "data_param", "ImageData": "image_data_param", "AnnotatedData": "data_param"}
PASSED = {"BatchNorm", "BN", "Bias", "Power", "Scale", "Split", "MVN", "LRN", "Dropout", "ReLU"}
USUAL = 3  # channels, where nothing tells


def with_known_sizes(net: Any, channels: int | None = None) -> Any:
    """A copy of a net whose data layers are Input layers where the prototxt tells their images' size.

    Args:
        channels: of the images; without, what the data or the prototxt tell, or else 3.
    """
    copy = type(net)()
    copy.CopyFrom(net)
    for layer in copy.layer:
        if layer.type in OWN_PARAMS and (size := _image_size(layer)):
            batch = getattr(layer, OWN_PARAMS[layer.type]).batch_size or 1
            told = told_channels(layer)
            layer.type = "Input"
            layer.input_param.shape.add(dim=[batch, channels or (told or (USUAL,))[0], *size])
            for _ in layer.top[1:]:
                layer.input_param.shape.add(dim=[batch])
    return copy


def _image_size(layer: Any) -> tuple[int, int] | None:
    transform = layer.transform_param
    if transform.crop_size:
        return transform.crop_size, transform.crop_size
    if transform.crop_h and transform.crop_w:  # of the SSD fork, as is the next
        return transform.crop_h, transform.crop_w
    resized = transform.resize_param
    if resized.resize_mode == resized.WARP and resized.height and resized.width:
        return resized.height, resized.width
    own = layer.image_data_param
    return (own.new_height, own.new_width) if own.new_height and own.new_width else None


def untold(net: Any) -> bool:
    """Whether `with_known_sizes` would have to assume the channels of some images."""
    layers = (layer for layer in net.layer if layer.type in OWN_PARAMS and _image_size(layer))
    return any(told_channels(layer) is None for layer in layers)


def told_channels(layer: Any) -> tuple[int, str] | None:
    """The channels of a data layer's images and what tells them: its data, or else its prototxt."""
    transform = layer.transform_param
    if layer.type == "ImageData":
        return (3, "is_color") if layer.image_data_param.is_color else (1, "is_color: false")
    if count := _stored_channels(layer):
        return count, layer.data_param.source
    if transform.force_gray or transform.force_color:
        return (1, "force_gray") if transform.force_gray else (3, "force_color")
    if len(transform.mean_value) > 1:
        return len(transform.mean_value), "its mean_value"
    try:
        return read_mean(transform.mean_file).shape[0], transform.mean_file
    except (OSError, ValueError):
        return None


def _stored_channels(layer: Any) -> int | None:
    """The channels of the first record of a data layer's LMDB, None where it cannot be read."""
    transform = layer.transform_param
    color = transform.force_color if transform.force_color or transform.force_gray else None
    annotated = layer.type == "AnnotatedData"
    try:
        datum = first_record(layer.data_param.source, schema.AnnotatedDatum if annotated else schema.Datum)
        return datum_pixels(datum.datum if annotated else datum, color, "the first record").shape[0]
    except (OSError, ValueError, ImportError):
        return None


def taken_channels(net: Any, phase: str, stored: Iterable[Any]) -> int | None:
    """The channels that the first weights on the way from a net's images take, None where none are there.

    Args:
        phase: in which its layers are looked at.
        stored: weights, NetParameters.
    """
    blobs = {record.name: record.blobs for one in stored for record in one.layer if record.blobs}
    graph = Graph(in_phase(net, phase))
    waiting = [blob for node in graph.nodes if node.type in OWN_PARAMS for blob in node.outputs[:1]]
    while waiting:
        for node, _ in waiting.pop(0).users:
            if node.name in blobs and (count := _taken_by(node, blob_shape(blobs[node.name][0]))):
                return count
            if node.type in PASSED:
                waiting += node.outputs
    return None


def _taken_by(node: Node, shape: Sequence[int]) -> int | None:
    if node.type == "Convolution" and len(shape) > 1:
        return shape[1] * node.spec.convolution_param.group
    if node.type in ("BatchNorm", "DepthwiseConvolution", "ConvolutionDepthwise") and shape:
        return shape[0]
    return None
