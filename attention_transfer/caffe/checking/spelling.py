"""Fields that Caffe does not know: found all at once, and read past, so that the rest can be looked at."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from attention_transfer._errors import InputError
from attention_transfer.caffe import schema
from attention_transfer.caffe.files import prototxt
from attention_transfer.caffe.files.upgrade import upgrade_net
from attention_transfer.caffe.schema import text_format

# Fields of other Caffes whose layers this package has no messages for: their users have spelled them right.
FOREIGN = {
    "clip_param", "swish_param", "roi_pooling_param", "upsample_param", "shuffle_channel_param",
    "focal_loss_param", "l1_loss_param", "smooth_l1_loss_param", "dense_image_data_param",
}  # fmt: skip


@dataclass(frozen=True)
class Misspelt:
    """A field that its message lacks; `layer` is the index of the layer block that holds it, None outside."""

    message: str
    name: str
    line: int
    offset: int
    layer: int | None

    @property
    def near(self) -> str | None:
        """The field that may be meant."""
        found = difflib.get_close_matches(self.name, schema.fields(self.message), n=1)
        return found[0] if found else None


def parse_leniently(text: str, source: str) -> tuple[Any, list[Misspelt]]:
    """The net of a prototxt in the current form, and its unknown fields.

    An unknown field is read as the one that its name is nearly, where there is such and the value fits, and
    otherwise left out.

    Raises:
        ValueError: if it does not parse for another reason.
    """
    unknown = [field for field in _unknown_fields(text) if field.name not in FOREIGN]
    if unknown:
        try:
            net = text_format.Parse(_respelt(text, unknown), schema.NetParameter(), allow_unknown_field=True)
            return upgrade_net(net, "check"), unknown
        except (text_format.ParseError, ValueError):
            pass  # a value that does not fit the near name: do without it
    try:
        net = text_format.Parse(text, schema.NetParameter(), allow_unknown_field=True)
    except text_format.ParseError as error:
        raise InputError(f"check: {source}:{prototxt.describe_parse_error(error)}") from None
    return upgrade_net(net, "check"), unknown


def _respelt(text: str, unknown: list[Misspelt]) -> str:
    for field in sorted(unknown, key=lambda field: -field.offset):
        if field.near:
            text = text[: field.offset] + field.near + text[field.offset + len(field.name) :]
    return text


def _unknown_fields(text: str) -> Iterator[Misspelt]:
    """Walk over the text along the messages' descriptors."""
    stack: list[Any] = [schema.NetParameter.DESCRIPTOR]  # None inside of a field that is unknown itself
    field: Any = None  # the one whose value comes next
    layers, value_follows = 0, False
    for token, line, offset in prototxt.tokens(text):
        if token in "{<":
            stack.append(field.message_type if field is not None else None)
            value_follows = False
        elif token in "}>":
            if len(stack) > 1:
                stack.pop()
            value_follows = False
        elif token == ":":
            value_follows = True
        elif token in "[],;-":
            continue
        elif value_follows or not (token[0].isalpha() or token[0] == "_"):
            value_follows = False
        else:
            message = stack[-1]
            field = message.fields_by_name.get(token) if message is not None else None
            layers += len(stack) == 1 and token in ("layer", "layers")
            if message is not None and field is None:
                inside = layers - 1 if len(stack) > 1 else None
                yield Misspelt(message.name, token, line, offset, inside)
