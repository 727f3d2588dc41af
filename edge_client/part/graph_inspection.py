"""
What a device makes sure of before it computes with a graph that a server handed over. Such a graph is data, and not code: it
has no way out of onnxruntime's standard operators, to no file and to no library.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from storage import ModelError, shown

from .model_proto import Message, read_model_proto

__all__ = ["MOST_GRAPH_BYTES", "OPERATORS", "inspect_graph"]

MOST_GRAPH_BYTES = 1 << 20
MOST_CONSTANT_BYTES = 1 << 16
"""Of all initializers of a graph together: weights are inputs."""
OPSETS, IR_VERSIONS, RUNTIME = range(18, 21), range(8, 10), "onnxruntime 1.23"
"""Versions of ONNX's operators and of its file format; the first onnxruntime that these graphs are tested with."""
LARGEST = 1 << 20
"""Whole number in a graph: they are sizes and axes, and no layer is a million wide."""
ELEMENT_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2}
"""Of TensorProto.DataType: float32, uint8, int8, int32, int64, bool, float16. All have a fixed size; texts have none."""
INT64 = 7
FLOAT, INTEGER, TEXT, INTEGERS = 1, 2, 3, 7
"""Of AttributeProto.AttributeType."""
ATTRIBUTE_FIELDS = {FLOAT: "f", INTEGER: "i", TEXT: "s", INTEGERS: "ints"}


@dataclass(frozen=True)
class Operator:
    """How a part may use one of ONNX's own operators: how many inputs, how many outputs at most, attributes and their types."""

    inputs: tuple[int, ...]
    outputs: int = 1
    attributes: Mapping[str, int] = field(default_factory=dict)


# No more than the graphs of parts need: onnxruntime has been seen to read beyond its own arrays where a node has fewer or
# other things than its operator defines.
OPERATORS = {
    **dict.fromkeys(("Cos", "Erf", "Exp", "Identity", "Relu", "Sigmoid", "Sin", "Sqrt"), Operator((1,))),
    **dict.fromkeys(("Add", "Div", "Expand", "Greater", "MatMul", "Mul", "Reshape", "Sub"), Operator((2,))),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceSum"), Operator((2,))),
    "Cast": Operator((1,), attributes={"to": INTEGER}),
    "Concat": Operator((2, 3), attributes={"axis": INTEGER}),
    "Gather": Operator((2,)),
    "Gelu": Operator((1,), attributes={"approximate": TEXT}),
    "Gemm": Operator((2, 3), attributes={"alpha": FLOAT, "transA": INTEGER, "transB": INTEGER}),
    "LayerNormalization": Operator((2, 3), 3, {"axis": INTEGER, "epsilon": FLOAT}),
    "Shape": Operator((1,), attributes={"start": INTEGER, "end": INTEGER}),
    "Softmax": Operator((1,), attributes={"axis": INTEGER}),
    "Split": Operator((1, 2), 3, {"axis": INTEGER, "num_outputs": INTEGER}),
    "Transpose": Operator((1,), attributes={"perm": INTEGERS}),
    "Trilu": Operator((2,), attributes={"upper": INTEGER}),
}


def inspect_graph(data: bytes, name: str) -> None:
    """
    Let only such a graph pass as a part may have: standard operators one after the other, small constants, known dimensions.
    Nothing is allocated that is larger than the file, and time is linear in its size.

    How large the computed values become depends on the sizes of the inputs, which are not known yet. Whoever runs the graph
    bounds them: see `Runtime`.

    Args:
        data: an .onnx file's.
        name: the file's, for messages.

    Raises:
        ModelError: one sentence that names what is refused.
    """
    try:
        if len(data) > MOST_GRAPH_BYTES:
            raise ModelError(f"it has more than the {MOST_GRAPH_BYTES} bytes that a graph without weights may have")
        _Inspection(read_model_proto(data))
    except ModelError as error:
        raise ModelError(f"the graph {name} of the server's part of the model is refused: {error}") from None


class _Inspection:
    """
    The values of a graph that are known so far, while it is walked through.

    Raises:
        ModelError: everywhere.
    """

    def __init__(self, model: Message) -> None:
        _check_versions(model)
        graph = _one(model, "graph", "ModelProto")
        self._values: set[str] = set()
        self._sizes: dict[str, Sequence[int]] = {}
        """What is in those constants that are lists of whole numbers."""
        for value in graph["input"]:
            self._add(_described(value))
        constants = 0
        for tensor in graph["initializer"]:
            self._add(_one(tensor, "name", "TensorProto"))
            constants += _constant_bytes(tensor)
            if tensor["data_type"] == [INT64] and len(tensor["dims"]) == 1:
                self._sizes[tensor["name"][0]] = _whole_numbers(_optional(tensor, "raw_data", b""))
        if constants > MOST_CONSTANT_BYTES:
            raise ModelError(f"its constants have {constants} bytes; at most {MOST_CONSTANT_BYTES} are expected")
        computed: set[str] = set()
        for node in graph["node"]:
            computed |= self._compute(node)
        outputs = [_described(value) for value in graph["output"]]
        for output in outputs:
            if output not in computed or outputs.count(output) > 1:
                raise ModelError(f"its output {shown(output)} is computed by no node, or named twice")
        if not outputs:
            raise ModelError("it has no outputs")

    def _add(self, value: str) -> None:
        if not value or value in self._values:
            raise ModelError(f"two values have the name {shown(value)}" if value else "a value has no name")
        self._values.add(value)

    def _compute(self, node: Message) -> set[str]:
        """The names of what a node computes."""
        name, domain = _one(node, "op_type", "NodeProto"), _optional(node, "domain", "")
        where = f"node {shown(_optional(node, 'name', ''))}"
        operator = OPERATORS.get(name)
        if operator is None or domain:
            raise ModelError(
                f"{where} is the operator {shown(name)}{f' of the domain {shown(domain)}' if domain else ''}; "
                f"a part may use {', '.join(sorted(OPERATORS))}"
            )
        inputs, outputs = node["input"], node["output"]
        if len(inputs) not in operator.inputs or not 1 <= len(outputs) <= operator.outputs:
            raise ModelError(f"{where} is no {name} as a part may have it: {len(inputs)} inputs, {len(outputs)} outputs")
        for value in inputs:
            if value not in self._values:
                raise ModelError(f"{where} reads {shown(value)}, which is not known there")
        computed = [value for value in outputs if value]
        for value in computed:
            self._add(value)
        attributes = dict(_attribute(attribute, operator, where) for attribute in node["attribute"])
        if len(attributes) < len(node["attribute"]):
            raise ModelError(f"{where} has an attribute twice")
        if name == "Split":
            self._check_pieces(inputs, len(outputs), attributes, where)
        return set(computed)

    def _check_pieces(self, inputs: Sequence[str], number: int, attributes: Mapping[str, Any], where: str) -> None:
        """Of a Split: it has as many outputs as it says, by their number or by a constant of their sizes."""
        if len(inputs) == 1:
            if attributes.get("num_outputs") != number:
                raise ModelError(f"{where} has {number} outputs, and says {attributes.get('num_outputs')}")
            return
        sizes = self._sizes.get(inputs[1], ())
        if "num_outputs" in attributes or len(sizes) != number or min(sizes) < 1:
            raise ModelError(
                f"{where} has {number} outputs; a constant of {number} sizes, each at least 1, is expected with them"
            )


def _check_versions(model: Message) -> None:
    imported = _one(model, "opset_import", "ModelProto")
    domain = _optional(imported, "domain", "")
    if domain:
        raise ModelError(f"it uses operators of the domain {shown(domain)}; a part may use those of ONNX itself")
    for what, version, known in (
        ("of ONNX's operators", _one(imported, "version", "OperatorSetIdProto"), OPSETS),
        ("of ONNX's file format", _one(model, "ir_version", "ModelProto"), IR_VERSIONS),
    ):
        if version not in known:
            raise ModelError(
                f"it uses version {version} {what}; this splitlora knows {known[0]} to {known[-1]}, which {RUNTIME} computes: "
                "install the same version of splitlora on the server and on this device"
            )


def _described(value: Message) -> str:
    """The name of an input or output, all dimensions of which are known: as a number or by a name."""
    name = _one(value, "name", "ValueInfoProto")
    tensor = _one(_one(value, "type", f"ValueInfoProto {shown(name)}"), "tensor_type", f"TypeProto of {shown(name)}")
    _check_element_type(_one(tensor, "elem_type", f"the type of {shown(name)}"), shown(name))
    for dimension in _one(tensor, "shape", f"the type of {shown(name)}")["dim"]:
        sizes, words = dimension["dim_value"], dimension["dim_param"]
        if len(sizes) + len(words) != 1 or words == [""] or not all(1 <= size <= LARGEST for size in sizes):
            raise ModelError(f"a dimension of {shown(name)} is neither a size from 1 to {LARGEST} nor a name")
    return str(name)


def _constant_bytes(tensor: Message) -> int:
    name, element_type = shown(tensor["name"][0]), _one(tensor, "data_type", "TensorProto")
    _check_element_type(element_type, name)
    raw: bytes = _optional(tensor, "raw_data", b"")
    sizes = tensor["dims"]
    if not all(1 <= size <= LARGEST for size in sizes) or math.prod(sizes) * ELEMENT_BYTES[element_type] != len(raw):
        raise ModelError(f"the constant {name} of shape {sizes} has {len(raw)} bytes")
    if element_type == INT64 and not _are_small(_whole_numbers(raw)):
        raise ModelError(f"the constant {name} has whole numbers beyond {LARGEST}")
    return len(raw)


def _attribute(attribute: Message, operator: Operator, where: str) -> tuple[str, Any]:
    """Its name and its value."""
    name, kind = _one(attribute, "name", "AttributeProto"), _one(attribute, "type", "AttributeProto")
    given = [field for field in ATTRIBUTE_FIELDS.values() if attribute[field]]
    if operator.attributes.get(name) != kind or given != [ATTRIBUTE_FIELDS[kind]]:
        raise ModelError(f"{where} has the attribute {shown(name)}, which its operator does not have in a part, or not so")
    values = attribute[given[0]]
    if kind in (INTEGER, INTEGERS) and not _are_small(values):
        raise ModelError(f"the attribute {shown(name)} of {where} has whole numbers beyond {LARGEST}")
    if name == "to":
        _check_element_type(values[0], where)
    return name, values[0]


def _check_element_type(element_type: int, where: str) -> None:
    if element_type not in ELEMENT_BYTES:
        raise ModelError(f"{where} has elements of ONNX's type {element_type}, which no part has")


def _whole_numbers(raw: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(raw) // 8}q", raw)


def _are_small(numbers: Sequence[int]) -> bool:
    return all(-LARGEST <= number <= LARGEST for number in numbers)


def _one(message: Message, field: str, where: str) -> Any:
    if not message[field]:
        raise ModelError(f"{where} has no {field}")
    return message[field][0]


def _optional(message: Message, field: str, default: Any) -> Any:
    return message[field][0] if message[field] else default
