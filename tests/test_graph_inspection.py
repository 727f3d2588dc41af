"""What a device takes for a graph of its part: what onnx itself makes of the same bytes, or one sentence that refuses them."""

import random
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from family_models import make_family_model
from mutation import ByteMutator
from onnx import TensorProto, helper, numpy_helper

from edge_client.part.graph_inspection import MOST_GRAPH_BYTES, OPERATORS, OPSETS, inspect_graph
from edge_client.part.model_proto import read_model_proto
from storage import EDGE_WEIGHTS, GRAPH_FILES, HEAD_GRAPH_FILES, ModelError

SEED = 20_260_101
Change = Callable[[onnx.ModelProto], object]


def a_block() -> onnx.ModelProto:
    """A model with everything that a part's graphs are made of."""
    nodes = [
        helper.make_node(
            "LayerNormalization", ["input", "weight:ln", "weight:ln.bias"], ["normed"], "norm", axis=-1, epsilon=1e-5
        ),
        helper.make_node("Gemm", ["normed", "lora:attn.A"], ["inner"], "attn/A", transB=1),
        helper.make_node("Gemm", ["inner", "lora:attn.B", "normed"], ["outer"], "attn/B", transB=1, alpha=4.0),
        helper.make_node("Gelu", ["outer"], ["active"], "gelu", approximate="tanh"),
        helper.make_node("Reshape", ["active", "constant/shape"], ["heads"], "heads"),
        helper.make_node("Transpose", ["heads"], ["turned"], "turn", perm=[0, 2, 1]),
        helper.make_node("Split", ["turned"], ["left", "right"], "halves", axis=2, num_outputs=2),
        helper.make_node("Concat", ["left", "right"], ["joined"], "join", axis=2),
        helper.make_node("Split", ["normed", "constant/sizes"], ["first", "rest"], "parts", axis=1),
        helper.make_node("Cos", ["first"], ["cosine"], "cosine"),
        helper.make_node("Sqrt", ["rest"], ["root"], "root"),
        helper.make_node("Cast", ["mask:attn"], ["kept"], "kept", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["kept", "constant/scale"], ["output"], "drop"),
    ]
    inputs = [
        helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 8]),
        helper.make_tensor_value_info("weight:ln", TensorProto.FLOAT, [8]),
        helper.make_tensor_value_info("weight:ln.bias", TensorProto.FLOAT16, [8]),
        helper.make_tensor_value_info("lora:attn.A", TensorProto.FLOAT, [2, 8]),
        helper.make_tensor_value_info("lora:attn.B", TensorProto.FLOAT, [8, 2]),
        helper.make_tensor_value_info("mask:attn", TensorProto.UINT8, ["N", 8]),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 8]) for name in ("output", "joined")]
    constants = [
        numpy_helper.from_array(np.array([0, 4, 2]), "constant/shape"),
        numpy_helper.from_array(np.array([2, 6]), "constant/sizes"),
        numpy_helper.from_array(np.float32(1 / 0.9), "constant/scale"),
    ]
    graph = helper.make_graph(nodes, "block", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9, producer_name="splitlora")


def plain(model: onnx.ModelProto) -> dict[str, Any]:
    """What onnx has read, in the form of `read_model_proto`: of every message, the values of the fields that are there."""

    def value(message: Any, field: Any) -> Any:
        found = getattr(message, field.name)
        found = list(found) if field.is_repeated else [found]
        if field.message_type is not None:
            return [of_message(inner) for inner in found]
        return [text.decode() if field.name == "s" else text for text in found]

    def of_message(message: Any) -> dict[str, Any]:
        return {field.name: value(message, field) for field, _ in message.ListFields()}

    return of_message(model)


def without_absent(message: Any) -> Any:
    if isinstance(message, dict):
        return {name: [without_absent(value) for value in values] for name, values in message.items() if values}
    return message


def refused(model: onnx.ModelProto | bytes) -> str:
    data = model if isinstance(model, bytes) else model.SerializeToString()
    with pytest.raises(ModelError) as caught:
        inspect_graph(data, "forward.onnx")
    message = str(caught.value)
    assert message.startswith("the graph forward.onnx of the server's part of the model is refused: ")
    assert message.isprintable()
    assert len(message) < 800
    return message


def test_graph_of_all_that_a_part_uses_passes_and_is_read_as_onnx_reads_it() -> None:
    model = a_block()
    onnx.checker.check_model(model)
    inspect_graph(model.SerializeToString(), "forward.onnx")
    assert without_absent(read_model_proto(model.SerializeToString())) == plain(model)


@pytest.mark.parametrize("option", ["gpt2", "llama", "phi3-partial", "qwen2-windows", "qwen3-biases"])
@pytest.mark.parametrize("precision", EDGE_WEIGHTS)
def test_every_graph_that_a_server_writes_passes_and_is_read_as_onnx_reads_it(
    precision: str, option: str, tmp_path: Path
) -> None:
    from graphs import Adaptation
    from graphs.part import write_graphs
    from split_model import LoraConfig, PretrainedModel, adapted_layers

    config = PretrainedModel(make_family_model(tmp_path, option)).config
    lora = LoraConfig(rank=2, alpha=4.0, dropout=0.1, targets=config.lora_targets)
    adaptation = Adaptation(layers=adapted_layers(config, lora), rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout)
    write_graphs(tmp_path, config, adaptation, precision, with_head=True)
    for name in (*GRAPH_FILES, *HEAD_GRAPH_FILES):
        data = (tmp_path / name).read_bytes()
        inspect_graph(data, name)
        assert without_absent(read_model_proto(data)) == plain(onnx.load_from_string(data))


def node(operator: str, domain: str = "") -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node(operator, ["input"], ["x"], "odd", domain=domain))

    return change


def attribute(**values: Any) -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[0].attribute.extend(helper.make_attribute(name, value) for name, value in values.items())

    return change


def constant(array: Any, more_dims: Sequence[int] = ()) -> Change:
    def change(model: onnx.ModelProto) -> None:
        tensor = numpy_helper.from_array(array, "odd")
        tensor.dims.extend(more_dims)
        model.graph.initializer.append(tensor)

    return change


def elsewhere(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer.add(name="odd", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../.ssh/id_rsa")


def described(name: str, element_type: int = TensorProto.FLOAT, shape: Any = ("N",)) -> Change:
    return lambda model: model.graph.input.append(helper.make_tensor_value_info(name, element_type, shape))


def subgraph(model: onnx.ModelProto) -> None:
    inner = helper.make_graph([], "inner", [], [])
    model.graph.node.append(helper.make_node("If", ["input"], ["x"], "odd", then_branch=inner, else_branch=inner))


def function(model: onnx.ModelProto) -> None:
    opsets = [helper.make_opsetid("", 20)]
    model.functions.append(helper.make_function("mine", "Relu", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], opsets))


def sparse(model: onnx.ModelProto) -> None:
    values, indices = numpy_helper.from_array(np.ones(1, np.float32), "odd"), numpy_helper.from_array(np.zeros(1, np.int64))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [10**9]))


def sizes(numbers: Any) -> Change:
    return lambda model: model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.array(numbers), "constant/sizes"))


def of(path: str, value: object) -> Change:
    def change(model: onnx.ModelProto) -> None:
        *way, last = path.split(".")
        target: Any = model
        for step in way:
            target = target[int(step)] if step.isdecimal() else getattr(target, step)
        if isinstance(value, list):
            getattr(target, last)[:] = value
        else:
            setattr(target, last, value)

    return change


REFUSALS: dict[str, tuple[Change, str]] = {
    "an operator that is not on the list": (node("Loop"), '"odd" is the operator "Loop"; a part may use Add, '),
    "one that makes large values": (node("ConstantOfShape"), '"odd" is the operator "ConstantOfShape"'),
    "one of another library": (node("Relu", "com.example"), 'the operator "Relu" of the domain "com.example"'),
    "one of onnxruntime's own": (node("QAttention", "com.microsoft"), 'of the domain "com.microsoft"'),
    "another name for ONNX's domain": (node("Relu", "ai.onnx"), 'of the domain "ai.onnx"'),
    "operators of another library": (
        lambda model: model.opset_import.append(helper.make_opsetid("com.example", 1)),
        "ModelProto has opset_import more than 1 times",
    ),
    "nothing but another library": (of("opset_import.0.domain", "com.example"), 'of the domain "com.example"'),
    "newer operators": (
        of("opset_import.0.version", 24),
        "version 24 of ONNX's operators; this splitlora knows 18 to 20, ",
    ),
    "older operators": (of("opset_import.0.version", 7), "version 7 of ONNX's operators"),
    "a newer format": (
        of("ir_version", 13),
        "8 to 9, which onnxruntime 1.23 computes: install the same",
    ),
    "a graph within a graph": (subgraph, "AttributeProto has the field g, "),
    "a function": (function, "ModelProto has the field functions, which no graph of a part needs"),
    "a training graph": (lambda model: model.training_info.add(), "ModelProto has the field training_info"),
    "a sparse tensor": (sparse, "GraphProto has the field sparse_initializer"),
    "weights in another file": (elsewhere, "TensorProto has the field external_data"),
    "texts": (
        lambda model: model.graph.initializer.append(helper.make_tensor("odd", TensorProto.STRING, [1], [b"x"])),
        "TensorProto has the field string_data",
    ),
    "a cast to texts": (of("graph.node.11.attribute.0.i", TensorProto.STRING), 'node "kept" has elements of ONNX\'s type 8'),
    "settings for onnxruntime": (
        lambda model: model.metadata_props.add(key="ort_config", value="{}"),
        "ModelProto has the field metadata_props",
    ),
    "a device for a node": (
        lambda model: model.graph.node[0].device_configurations.add(configuration_id="x"),
        "NodeProto has the field device_configurations",
    ),
    "an attribute that is a tensor": (attribute(value=numpy_helper.from_array(np.ones(1))), "AttributeProto has the field t, "),
    "an attribute twice": (attribute(axis=0), 'node "norm" has an attribute twice'),
    "an attribute that its operator does not have": (
        attribute(end=1),
        'node "norm" has the attribute "end", which its operator',
    ),
    "other outputs than a node says": (of("graph.node.6.attribute.1.i", 1), 'node "halves" has 2 outputs, and says 1'),
    "neither a number of outputs nor sizes": (
        lambda model: model.graph.node[6].attribute.__delitem__(1),
        'node "halves" has 2 outputs, and says None',
    ),
    "a number of outputs and sizes": (
        lambda model: model.graph.node[8].attribute.append(helper.make_attribute("num_outputs", 2)),
        'node "parts" has 2 outputs; a constant of 2 sizes, each at least 1, is expected with them',
    ),
    "fewer sizes than outputs": (sizes([8]), 'node "parts" has 2 outputs; a constant of 2 sizes'),
    "more sizes than outputs": (sizes([2, 2, 4]), 'node "parts" has 2 outputs; a constant of 2 sizes'),
    "a size that is negative": (sizes([-2, 10]), 'node "parts" has 2 outputs; a constant of 2 sizes'),
    "nothing as a size": (sizes([0, 8]), 'node "parts" has 2 outputs; a constant of 2 sizes'),
    "sizes that are a table": (sizes([[2, 6]]), 'node "parts" has 2 outputs; a constant of 2 sizes'),
    "sizes that are computed": (of("graph.node.8.input", ["normed", "heads"]), 'node "parts" has 2 outputs; a constant of 2'),
    "sizes that are no whole numbers": (
        of("graph.node.8.input", ["normed", "constant/scale"]),
        'node "parts" has 2 outputs; a constant of 2',
    ),
    "too few inputs": (
        lambda model: model.graph.node[2].input.__delitem__(slice(1, 3)),
        '"attn/B" is no Gemm as a part may have',
    ),
    "an input left out": (lambda model: model.graph.node[0].input.__setitem__(2, ""), 'node "norm" reads ""'),
    "too many outputs": (lambda model: model.graph.node[3].output.append("more"), '"gelu" is no Gelu as a part may have it: 1'),
    "no outputs": (
        lambda model: model.graph.node[3].ClearField("output"),
        '"gelu" is no Gelu as a part may have it: 1 inputs, 0',
    ),
    "an attribute without end": (attribute(axes=list(range(9))), "AttributeProto has ints more than 8 times"),
    "a huge attribute": (
        of("graph.node.0.attribute.0.i", 2**40),
        'the attribute "axis" of node "norm" has whole numbers beyond 1048576',
    ),
    "a long name": (of("graph.node.0.name", "x" * 201), "at most 200 printable ASCII characters"),
    "a name that writes on the terminal": (of("graph.node.0.op_type", "\x1b[2J"), 'op_type is "\\u001b[2J"; at most 200'),
    "large weights as constants": (
        constant(np.zeros(20_000, np.float32)),
        "its constants have 80044 bytes; at most 65536 ",
    ),
    "a shape that does not fit": (constant(np.zeros(4, np.float32), [3]), 'the constant "odd" of shape [4, 3] has 16 bytes'),
    "a shape beyond all numbers": (constant(np.zeros(4, np.int8), [2**20] * 7), "1048576] has 4 bytes"),
    "a negative size": (constant(np.zeros(4, np.float32), [-1, -1]), "of shape [4, -1, -1] has 16 bytes"),
    "huge numbers that may be a shape": (constant(np.array([2**40])), 'the constant "odd" has whole numbers beyond'),
    "float64": (constant(np.zeros(4)), '"odd" has elements of ONNX\'s type 11, which no part has'),
    "an input of texts": (described("odd", TensorProto.STRING), '"odd" has elements of ONNX\'s type 8'),
    "an input of no known shape": (described("odd", shape=None), 'the type of "odd" has no shape'),
    "an input of an unknown size": (described("odd", shape=[None]), 'a dimension of "odd" is neither a size'),
    "an input of a huge size": (described("odd", shape=[2**40]), 'a dimension of "odd" is neither a size'),
    "an input that is a list": (
        lambda model: model.graph.input.append(helper.make_tensor_sequence_value_info("odd", TensorProto.FLOAT, ["N"])),
        "TypeProto has the field sequence_type",
    ),
    "two inputs of one name": (described("input"), 'two values have the name "input"'),
    "a value that nobody computes": (of("graph.output.0.name", "odd"), 'its output "odd" is computed by no node'),
    "an output that is an input": (of("graph.output.0.name", "input"), 'its output "input" is computed by no node'),
    "an output twice": (of("graph.output.0.name", "joined"), 'its output "joined" is computed by no node, or named twice'),
    "a node that runs too early": (
        lambda model: model.graph.node.insert(0, helper.make_node("Relu", ["joined"], ["x"], "odd")),
        'node "odd" reads "joined", which is not known there',
    ),
    "more nodes than any part has": (
        lambda model: model.graph.node.extend(helper.make_node("Relu", ["input"], [f"x{number}"]) for number in range(500)),
        "GraphProto has node more than 500 times",
    ),
    "a graph without outputs": (lambda model: model.graph.ClearField("output"), "it has no outputs"),
    "no graph": (lambda model: model.ClearField("graph"), "ModelProto has no graph"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_no_part_has_is_refused_by_name(what: str) -> None:
    change, expected = REFUSALS[what]
    model = a_block()
    change(model)
    assert expected in refused(model)


def test_attribute_is_of_the_type_that_it_says() -> None:
    model = a_block()
    model.graph.node[0].attribute[0].s = b"tanh"
    assert 'node "norm" has the attribute "axis", which its operator does not have in a part, or not so' in refused(model)
    model.graph.node[0].attribute[0].ClearField("i")
    assert 'node "norm" has the attribute "axis", which its operator does not have in a part, or not so' in refused(model)


def test_what_another_reader_would_merge_or_skip_is_refused() -> None:
    """Else onnxruntime might compute another graph than the one that was inspected."""
    data, other = a_block().SerializeToString(), a_block()
    del other.graph.node[1:]
    for addition, expected in (
        (other.SerializeToString(), "ModelProto has ir_version more than 1 times"),
        (b"\x3a\x00", "ModelProto has graph more than 1 times"),
        (b"\x98\x06\x00", "ModelProto has the field 99, which no graph of a part needs"),
        (b"\x0b\x0c", "ModelProto has ir_version more than 1 times"),  # a group
        (b"\x00\x00", "ModelProto has the field 0, "),
    ):
        assert expected in refused(data + addition)
    assert "ModelProto.ir_version is encoded as wire type 2" in refused(b"\x0a\x00")


def test_bytes_that_are_no_protobuf_are_refused() -> None:
    for data, expected in (
        (b"", "ModelProto has no opset_import"),
        (b"\x80", "byte 0 of a message begins no number"),
        (b"\x08" + b"\xff" * 9 + b"\x7f", "byte 1 of a message begins no number of up to 64 bits"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "ModelProto.graph ends after the 11 bytes of what it is in"),
        (bytes(MOST_GRAPH_BYTES + 1), f"it has more than the {MOST_GRAPH_BYTES} bytes that a graph without"),
    ):
        assert expected in refused(data)


def test_operators_are_used_as_onnx_defines_them() -> None:
    for name, operator in OPERATORS.items():
        defined = onnx.defs.get_schema(name, OPSETS[-1])
        assert defined.min_input <= min(operator.inputs) <= max(operator.inputs) <= defined.max_input
        assert defined.min_output <= 1 <= operator.outputs <= defined.max_output
        assert {attribute: defined.attributes[attribute].type.value for attribute in operator.attributes} == operator.attributes


@pytest.mark.parametrize("field", [b"\x12\x00", b"\x0a\x02\x0a\x00", b"\x2a\x00"])
def test_file_of_a_million_tiny_fields_takes_neither_time_nor_memory(field: bytes) -> None:
    inner = field * (MOST_GRAPH_BYTES // len(field) // 2)
    data = onnx.ModelProto(ir_version=9).SerializeToString() + b"\x3a" + _varint(len(inner)) + inner
    tracemalloc.start()
    try:
        begin = time.process_time()
        refused(data)
        assert time.process_time() - begin < 1
        assert tracemalloc.get_traced_memory()[1] < 2 * MOST_GRAPH_BYTES
    finally:
        tracemalloc.stop()


def _varint(number: int) -> bytes:
    return bytes([number & 0x7F | 0x80, number >> 7 & 0x7F | 0x80, number >> 14 & 0x7F])


def test_mutated_graphs_are_refused_or_read_as_onnx_reads_them() -> None:
    mutator, original = ByteMutator(random.Random(SEED)), a_block().SerializeToString()
    accepted = 0
    for _ in range(6_000):
        data = mutator.mutated(original)
        try:
            inspect_graph(data, "forward.onnx")
        except ModelError:
            continue
        assert without_absent(read_model_proto(data)) == plain(onnx.load_from_string(data))
        accepted += data != original
    assert accepted > 50
