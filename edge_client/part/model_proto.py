"""
Reads the protobuf messages of an ONNX file, as far as the graphs of a part use them. An onnx package would be half of what a
device installs, and reads much that nobody should hand to a device: other files, functions, graphs within graphs.
"""

import struct
from dataclasses import dataclass
from typing import Any

from storage import ModelError, shown

__all__ = ["LONGEST_NAME", "Message", "read_model_proto"]

LONGEST_NAME = 200
"""Characters of a name."""

Message = dict[str, list[Any]]
"""The values of each field, in order; a field that the file leaves out has none."""

# The encoding is described at https://protobuf.dev/programming-guides/encoding
VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5
WIRE_TYPES = {"integer": VARINT, "float": FIXED32}
LONGEST_VARINT = 10  # bytes


@dataclass(frozen=True)
class Field:
    """
    Attributes:
        kind: "integer" (int64), "float", "text", "bytes", or the name of a message.
        most: how often it may occur.
    """

    name: str
    kind: str
    most: int = 1


# Of every message that our graphs consist of, the fields that they use. No other field is skipped, as readers of protobuf do:
# onnxruntime might make something of it.
FIELDS: dict[str, dict[int, Field]] = {
    "ModelProto": {
        1: Field("ir_version", "integer"),
        2: Field("producer_name", "text"),
        7: Field("graph", "GraphProto"),
        8: Field("opset_import", "OperatorSetIdProto"),
    },
    "OperatorSetIdProto": {1: Field("domain", "text"), 2: Field("version", "integer")},
    "GraphProto": {
        1: Field("node", "NodeProto", 500),
        2: Field("name", "text"),
        5: Field("initializer", "TensorProto", 100),
        11: Field("input", "ValueInfoProto", 200),
        12: Field("output", "ValueInfoProto", 200),
    },
    "NodeProto": {
        1: Field("input", "text", 16),
        2: Field("output", "text", 16),
        3: Field("name", "text"),
        4: Field("op_type", "text"),
        5: Field("attribute", "AttributeProto", 8),
        7: Field("domain", "text"),
    },
    "AttributeProto": {
        1: Field("name", "text"),
        2: Field("f", "float"),
        3: Field("i", "integer"),
        4: Field("s", "text"),
        8: Field("ints", "integer", 8),
        20: Field("type", "integer"),
    },
    "TensorProto": {
        1: Field("dims", "integer", 8),
        2: Field("data_type", "integer"),
        8: Field("name", "text"),
        9: Field("raw_data", "bytes"),
    },
    "ValueInfoProto": {1: Field("name", "text"), 2: Field("type", "TypeProto")},
    "TypeProto": {1: Field("tensor_type", "TypeProto.Tensor")},
    "TypeProto.Tensor": {1: Field("elem_type", "integer"), 2: Field("shape", "TensorShapeProto")},
    "TensorShapeProto": {1: Field("dim", "TensorShapeProto.Dimension", 8)},
    "TensorShapeProto.Dimension": {1: Field("dim_value", "integer"), 2: Field("dim_param", "text")},
}
REFUSED = {
    "ModelProto": {14: "metadata_props", 20: "training_info", 25: "functions"},
    "GraphProto": {13: "value_info", 15: "sparse_initializer"},
    "NodeProto": {9: "metadata_props", 10: "device_configurations"},
    "AttributeProto": {5: "t", 6: "g", 10: "tensors", 11: "graphs", 21: "ref_attr_name", 22: "sparse_tensor"},
    "TensorProto": {6: "string_data", 13: "external_data", 14: "data_location"},
    "TypeProto": {4: "sequence_type", 5: "map_type", 8: "sparse_tensor_type", 9: "optional_type"},
}
"""What ONNX calls some of the other fields, for messages."""


def read_model_proto(data: bytes) -> Message:
    """
    A ModelProto, whose messages are `Message`s in their turn.

    Raises:
        ModelError: it is none, or has a field that is not in FIELDS, or one more often than it may. The message goes on after
            "... is refused: ".
    """
    return _read(memoryview(data), "ModelProto")


def _read(data: memoryview, kind: str) -> Message:
    fields = FIELDS[kind]
    message: Message = {field.name: [] for field in fields.values()}
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        field = fields.get(number)
        if field is None:
            name = REFUSED.get(kind, {}).get(number)
            raise ModelError(f"{kind} has the field {name or number}, which no graph of a part needs")
        values = message[field.name]
        if len(values) == field.most:
            raise ModelError(f"{kind} has {field.name} more than {field.most} times")
        if wire_type != WIRE_TYPES.get(field.kind, LENGTH_DELIMITED):
            raise ModelError(f"{kind}.{field.name} is encoded as wire type {wire_type}, which is none of its own")
        if field.kind == "integer":
            value, position = _varint(data, position)
            values.append(value - (1 << 64) if value >> 63 else value)
            continue
        size, position = (4, position) if field.kind == "float" else _varint(data, position)
        if size > len(data) - position:
            raise ModelError(f"{kind}.{field.name} ends after the {len(data)} bytes of what it is in")
        values.append(_value(data[position : position + size], field, kind))
        position += size
    return message


def _value(data: memoryview, field: Field, kind: str) -> Any:
    if field.kind == "float":
        return struct.unpack("<f", data)[0]
    if field.kind == "bytes":
        return bytes(data)
    if field.kind != "text":
        return _read(data, field.kind)
    # Names end up in messages, and in what onnxruntime says.
    text = bytes(data[: LONGEST_NAME + 1]).decode("latin-1")
    if len(data) > LONGEST_NAME or not (text.isascii() and text.isprintable()):
        raise ModelError(
            f"{kind}.{field.name} is {shown(text)}; at most {LONGEST_NAME} printable ASCII characters are expected"
        )
    return text


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """A number of up to 64 bits, and the place after it."""
    number = 0
    for shift, byte in enumerate(data[position : position + LONGEST_VARINT]):
        number |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            if number >> 64:
                break
            return number, position + shift + 1
    raise ModelError(f"byte {position} of a message begins no number of up to 64 bits")
