"""The messages of Caffe's files, as protobuf classes made from `caffe.proto`.

They live in a descriptor pool of their own, so that pycaffe, which registers the same names, can be loaded in
the same process. protobuf itself is reached through here alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attention_transfer._extras import require

require("google.protobuf", extra="caffe", user="caffe", name="protobuf")

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format  # noqa: E402
from google.protobuf.message import DecodeError  # noqa: E402
from google.protobuf.unknown_fields import UnknownFieldSet  # noqa: E402

__all__ = ["DecodeError", "UnknownFieldSet", "text_format"]

COMPILED = Path(__file__).with_name("caffe.binpb")


def _messages() -> dict[str, Any]:
    files = descriptor_pb2.FileDescriptorSet.FromString(COMPILED.read_bytes())
    classes = message_factory.GetMessages(files.file, pool=descriptor_pool.DescriptorPool())
    return {name.removeprefix("caffe."): cls for name, cls in classes.items()}


_classes = _messages()
AnnotatedDatum: Any = _classes["AnnotatedDatum"]
BlobProto: Any = _classes["BlobProto"]
Datum: Any = _classes["Datum"]
FillerParameter: Any = _classes["FillerParameter"]
LayerParameter: Any = _classes["LayerParameter"]
NetParameter: Any = _classes["NetParameter"]
NetState: Any = _classes["NetState"]
ParamSpec: Any = _classes["ParamSpec"]
SolverParameter: Any = _classes["SolverParameter"]
SolverState: Any = _classes["SolverState"]

TRAIN, TEST = 0, 1  # the enum Phase


def fields(message: str) -> list[str]:
    """The names of a message's fields."""
    return [field.name for field in _classes[message].DESCRIPTOR.fields]
