"""What a device makes of a part that means harm, or is damaged: one sentence, and never a wrong result."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import REPOSITORY, make_model
from device_parts import make_part
from onnx import TensorProto, helper, numpy_helper
from usual_settings import settings

from edge_client.data import Sample, pack
from edge_client.onnx_engine import OnnxEngine
from edge_client.part.device_part import DevicePart
from edge_client.part.graph_inspection import inspect_graph
from protocol import RunSettings, TrainingDiverged
from storage import ModelError

Spoil = Callable[[Path], object]
WITH_HEAD = settings(cut_layer=2, lora_targets=("c_attn", "c_proj"), labels="device")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"), n_layer=3, n_embd=16, n_head=2)


@pytest.fixture
def run() -> RunSettings:
    return settings(cut_layer=2, lora_targets=("c_attn", "c_proj"))


@pytest.fixture
def part(base: Path, tmp_path: Path, run: RunSettings) -> Path:
    return make_part(tmp_path / "part", base, run, "int8")


@pytest.fixture
def part_with_head(base: Path, tmp_path: Path) -> Path:
    return make_part(tmp_path / "part", base, WITH_HEAD, "int8")


def use(part: Path, run: RunSettings) -> None:
    """All that a run does with a part."""
    device_part = DevicePart(part)
    device_part.tokenizer().encode("abc")
    engine = OnnxEngine(device_part, run)
    source = np.random.default_rng(0)
    batch = pack([Sample(source.integers(0, 600, length + 1).astype(np.int32), 1) for length in (3, 1, 4)])
    engine.infer(batch)
    engine.begin_step()
    activations = engine.forward(batch, 1)
    assert activations.shape == (8, 16)
    engine.backward(np.ones_like(activations))
    engine.end_step(3)
    if run.labels == "device":
        labels = np.array([1, 2, 599], np.int32)
        engine.losses(activations[:3], labels)
        engine.losses_and_gradient(activations[:3], labels)


def graph(name: str, change: Callable[[onnx.GraphProto], object]) -> Spoil:
    def spoil(part: Path) -> None:
        model = onnx.load(part / name)
        change(model.graph)
        onnx.save(model, part / name)

    return spoil


def renamed(old: str, new: str) -> Callable[[onnx.GraphProto], None]:
    """A value."""

    def change(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [new if name == old else name for name in names]
        for value in (*graph.input, *graph.output):
            value.name = new if value.name == old else value.name

    return change


def computing(
    output: str, operator: str, constant: Any, element_type: int = TensorProto.FLOAT
) -> Callable[[onnx.GraphProto], None]:
    """Another node behind what was the output."""

    def change(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            node.output[:] = ["real" if name == output else name for name in node.output]
            node.input[:] = ["real" if name == output else name for name in node.input]
        graph.initializer.append(numpy_helper.from_array(np.array(constant), "odd"))
        graph.node.append(helper.make_node(operator, ["real", "odd"], [output], "odd"))
        declared = next(value for value in graph.output if value.name == output)
        declared.CopyFrom(helper.make_tensor_value_info(output, element_type, ["x", "y"]))

    return change


def halved(graph: onnx.GraphProto) -> None:
    """The output in float16."""
    computing("output", "Add", np.float32(0), TensorProto.FLOAT16)(graph)
    graph.node[-1].CopyFrom(helper.make_node("Cast", ["real"], ["output"], "odd", to=TensorProto.FLOAT16))


def bomb(graph: onnx.GraphProto, size: int = 2**20, output: str = "output") -> None:
    """4 TB of a constant, or what else the square of ``size`` comes to, and their sum."""
    sizes = {"one": np.float32(1), "sizes": np.array([size, size]), "axes": np.array([0, 1])}
    graph.initializer.extend(numpy_helper.from_array(np.array(value), name) for name, value in sizes.items())
    graph.node.extend(
        [
            helper.make_node("Expand", ["one", "sizes"], ["huge"]),
            helper.make_node("ReduceSum", ["huge", "axes"], ["sum of ones"]),
        ]
    )
    computing(output, "Add", np.float32(0))(graph)
    graph.node[-1].input[1] = "sum of ones"


def header(name: str, change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Of a file of weights."""

    def spoil(part: Path) -> None:
        data = (part / name).read_bytes()
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)  # the data stays where a number of any type can be
        (part / name).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return spoil


def entry(tensor: str, **values: Any) -> Spoil:
    return header("block-0.safetensors", lambda entries: entries[tensor].update(values))


def numbers(name: str, tensor: str, number: float) -> Spoil:
    """In place of a float32 tensor's own."""

    def spoil(part: Path) -> None:
        data = bytearray((part / name).read_bytes())
        data_begin = 8 + int.from_bytes(data[:8], "little")
        begin, end = json.loads(data[8:data_begin])[tensor]["data_offsets"]
        data[data_begin + begin : data_begin + end] = np.full((end - begin) // 4, number, "<f4").tobytes()
        (part / name).write_bytes(data)

    return spoil


def content(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    return lambda part: (part / name).write_bytes(change((part / name).read_bytes()))


def description(**values: Any) -> Spoil:
    return content("part.json", lambda data: json.dumps({**json.loads(data), **values}).encode())


def peak_memory(*, begin_anew: bool = False) -> int:
    """The most bytes that this process had resident, where the system is Linux; from now on, if it is to begin anew."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    if begin_anew:
        (status.parent / "clear_refs").write_text("5")
    return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])


WEIGHT = "attn.c_attn.weight"
SPOILS: dict[str, tuple[Spoil, str]] = {
    "a graph without its output": (graph("forward.onnx", renamed("output", "other")), "does not compute 'output' as float32"),
    "no activations": (graph("embedding.onnx", renamed("output", "other")), "does not compute 'output' as float32"),
    "no gradient": (
        graph("backward.onnx", renamed("gradient:attn.c_attn.A", "other")),
        r"does not compute 'gradient:attn.c_attn.A' as float32 of shape \[2, 16\]",
    ),
    "no gradient of the input": (graph("backward.onnx", renamed("input_gradient", "x")), "does not compute 'input_gradient'"),
    "an unknown input": (graph("forward.onnx", renamed("input", "secret")), "forward.onnx .* it asks for 'secret', which"),
    # numpy would repeat one row for all
    "one row for all": (
        graph("inference.onnx", computing("output", "ReduceMean", [0])),
        r"'output' as float32 of shape \[8, 16\]",
    ),
    "one number for all": (graph("forward.onnx", computing("output", "ReduceMean", [0, 1])), r"as float32 of shape \[8, 16\]"),
    "half the precision": (graph("forward.onnx", halved), "forward.onnx .* cannot be computed: .*float16"),
    "more memory than any machine has": (graph("forward.onnx", bomb), "forward.onnx .* cannot be computed: .*llocat"),
    "an operator that is not allowed": (
        graph("inference.onnx", lambda graph: graph.node.append(helper.make_node("Loop", ["input"], ["x"], "odd"))),
        'the graph inference.onnx of the server.s part of the model is refused: node "odd" is the operator "Loop"',
    ),
    "a graph that does not fit together": (
        graph("forward.onnx", computing("output", "MatMul", np.zeros((3, 3), np.float32))),
        "does not load forward.onnx|forward.onnx .* cannot be computed",
    ),
    "a graph that is none": (content("backward.onnx", lambda data: b"\xff" * 20), "graph backward.onnx .* is refused: byte 0"),
    "a file cut short": (
        content("block-1.safetensors", lambda data: data[:-9]),
        "block-1.safetensors .*which is outside the file",
    ),
    "no header": (
        content("block-1.safetensors", lambda data: b"\xff" * 8),
        "a header of 18446744073709551615 bytes does not fit",
    ),
    "a header that is too deep": (
        content("block-1.safetensors", lambda data: (10**5).to_bytes(8, "little") + b"[" * 10**5),
        "its header is no JSON",
    ),
    "offsets behind the end": (entry(WEIGHT, data_offsets=[0, 10**30]), "lies at .* outside the file"),
    "offsets that run backwards": (entry(WEIGHT, data_offsets=[9, 1]), "outside the file"),
    "an offset that is none": (entry(WEIGHT, data_offsets=[True, float("nan")]), "outside the file"),
    "a huge shape": (entry(WEIGHT, shape=[2**40, 2**40]), "where no I8 of shape"),
    "a shape that is NaN": (entry(WEIGHT, shape=[float("nan"), 1]), "has the shape"),
    "another shape of as many": (entry(WEIGHT, shape=[48, 16]), "cannot be computed"),
    "another type": (entry(WEIGHT, dtype="F64"), 'is stored as "F64"'),
    "weights that lie in each other": (
        header("block-0.safetensors", lambda entries: entries.update({WEIGHT: entries["mlp.c_fc.weight"]})),
        "cannot be computed",
    ),
    "a weight left out": (header("block-0.safetensors", lambda entries: entries.pop(WEIGHT)), f"it asks for 'weight:{WEIGHT}'"),
    "no tokens": (header("embedding.safetensors", lambda entries: entries.pop("tokens")), 'has no tensor "tokens"'),
    "more tokens than there are": (description(vocabulary_size=700), "the part's table of tokens has shape"),
    "tokens with wrong scales": (
        header("embedding.safetensors", lambda entries: entries["tokens.scale"].update(shape=[300, 2])),
        "scales; one for each",
    ),
    "numbers that are none": (
        numbers("block-0.safetensors", "ln_1.bias", np.nan),
        "without an adapter, gives activations that are not finite",
    ),
    "a newer onnxruntime": (description(onnxruntime="99.1"), "needs onnxruntime 99.1, this device has"),
    "another width": (description(width=8), "the part's table of tokens has shape"),
    "more blocks than files": (description(cut_layer=9000), "has cut layer 9000, the run has 2"),
    "matrices larger than any memory": (
        description(adapted={name: [2**31 - 1, 2**31 - 1] for name in ("attn.c_attn", "attn.c_proj")}),
        "LoRA matrices of .* MB, for which this device has no memory",
    ),
    "a tokenizer that is none": (content("tokenizer.json", lambda data: b"{}"), "tokenizer.json"),
}


@pytest.mark.parametrize("what", SPOILS)
def test_spoilt_part_is_refused_in_one_sentence(part: Path, run: RunSettings, what: str) -> None:
    spoil, expected = SPOILS[what]
    spoil(part)
    before = peak_memory(begin_anew=True)
    with pytest.raises(ModelError, match=expected) as caught:
        use(part, run)
    assert str(caught.value).isprintable()
    assert peak_memory() - before < 100e6


HEAD_SPOILS: dict[str, tuple[Spoil, str]] = {
    "no sum": (graph("head.onnx", renamed("sum", "other")), r"does not compute 'sum' as float32 of shape \[3, 1\]"),
    "no gradient": (graph("head.onnx", renamed("product", "other")), r"'product' as float32 of shape \[3, 16\]"),
    "one number for all": (graph("head_loss.onnx", computing("sum", "ReduceSum", [0])), r"'sum' as float32 of shape \[3, 1\]"),
    "a graph that asks for the labels": (graph("head.onnx", renamed("hidden", "labels")), "head.onnx .* it asks for 'labels'"),
    "more memory than any machine has": (
        graph("head.onnx", partial(bomb, output="sum")),
        "head.onnx .* cannot be computed: .*llocat",
    ),
    "a maximum over no axis that there is": (
        graph("head_loss.onnx", computing("largest", "ReduceMax", [1 << 20])),
        "does not load head_loss.onnx|head_loss.onnx .* cannot be computed",
    ),
    "an operator that is not allowed": (
        graph("head.onnx", lambda graph: graph.node.append(helper.make_node("Loop", ["hidden"], ["x"], "odd"))),
        'the graph head.onnx of the server.s part of the model is refused: node "odd" is the operator "Loop"',
    ),
    "no graph": (lambda part: (part / "head.onnx").unlink(), "head.onnx"),
    "no weights": (description(head="head.safetensors"), "head.safetensors"),
    "weights elsewhere": (description(head="../head.safetensors"), "embedding.safetensors or head.safetensors is expected"),
    "no head": (description(head="embedding.safetensors\n"), "embedding.safetensors or head.safetensors is expected"),
    "a table without scales": (
        header("embedding.safetensors", lambda entries: entries.pop("tokens.scale")),
        "it asks for 'weight:tokens.scale'",
    ),
    "scales that are no numbers": (numbers("embedding.safetensors", "tokens.scale", np.nan), "without an adapter, gives"),
}


@pytest.mark.parametrize("what", HEAD_SPOILS)
def test_spoilt_head_is_refused_in_one_sentence(part_with_head: Path, what: str) -> None:
    use(part_with_head, WITH_HEAD)
    spoil, expected = HEAD_SPOILS[what]
    spoil(part_with_head)
    before = peak_memory(begin_anew=True)
    with pytest.raises(ModelError, match=expected) as caught:
        use(part_with_head, WITH_HEAD)
    assert str(caught.value).isprintable()
    assert peak_memory() - before < 100e6


@pytest.mark.parametrize(
    ("name", "number", "kind", "message"),
    [
        ("tokens.scale", np.inf, ModelError, "the head in the server's part of the model has numbers that are not finite"),
        ("tokens.scale", 3e38, TrainingDiverged, "the loss of this device's labels is .*; try a lower --lr"),
    ],
)
def test_head_of_its_own_that_is_no_number_is_named(
    tmp_path: Path, name: str, number: float, kind: type[Exception], message: str
) -> None:
    base = make_model(tmp_path, n_layer=3, n_embd=16, n_head=2, tie_word_embeddings=False)
    part = make_part(tmp_path / "part", base, WITH_HEAD, "int8")
    use(part, WITH_HEAD)
    numbers("head.safetensors", name, number)(part)
    with pytest.raises(kind, match=message):
        use(part, WITH_HEAD)


LOADS_MUCH = """
import resource, sys
from pathlib import Path
from edge_client.part import runtime

runtime.most_memory = lambda: 2**28
device = runtime.Runtime("cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
graph = device.open("forward.onnx", Path(sys.argv[1]).read_bytes())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_what_follows_from_constants_alone_takes_no_memory_beyond_the_bound(part: Path) -> None:
    """A runtime may compute it while it loads a graph: 1 GB of an exponential that is then summed up."""

    def change(graph: onnx.GraphProto) -> None:
        bomb(graph, size=2**14)
        (huge,) = (node for node in graph.node if node.output[0] == "huge")
        huge.output[0] = "ones"
        graph.node.insert(list(graph.node).index(huge) + 1, helper.make_node("Exp", ["ones"], ["huge"]))

    graph("forward.onnx", change)(part)
    inspect_graph((part / "forward.onnx").read_bytes(), "forward.onnx")
    program = [sys.executable, "-c", LOADS_MUCH, str(part / "forward.onnx")]
    done = subprocess.run(program, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert int(done.stdout) < 100_000  # kB


def test_part_as_the_server_wrote_it_is_not_refused(part: Path, run: RunSettings) -> None:
    use(part, run)
