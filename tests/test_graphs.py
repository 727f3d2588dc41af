"""
A device's part as graphs computes what the torch part computes, and what transformers and PEFT compute: activations and the
gradients by the LoRA matrices.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import make_model, shared_path
from family_models import make_family_model
from part_runner import Array, Batch, Masks, PartRunner
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from reference import load_base
from safetensors.numpy import load_file, save_file
from torch import nn

from edge_client.part.graph_inspection import OPERATORS
from graphs import Adaptation, StoredWeights, build_part
from graphs.matrix_formats import MATRIX_FORMATS
from graphs.part import write_graphs
from graphs.tensor_file import TensorFile
from split_model import EdgePart, LoraConfig, PretrainedModel, adapted_layers, adapter_shapes
from storage import (
    EDGE_WEIGHTS,
    GRAPH_FILES,
    HEAD_GRAPH_FILES,
    HEAD_WEIGHTS,
    ModelError,
    PartDescription,
    load_tokenizer,
    required_files,
)

TOLERANCE = 1e-5
RANK, ALPHA = 4, 8.0
CHOICES = [
    targets for count in (1, 2, 3) for targets in itertools.combinations(("c_attn", "c_proj", "c_fc"), count)
]  # every choice of --lora-targets
RAGGED = (3, 1, 7, 7, 2, 12)


def lora_of(targets: Sequence[str], dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(rank=RANK, alpha=ALPHA, dropout=dropout, targets=tuple(targets))


def build(
    folder: Path, base: Path, lora: LoraConfig, cut_layer: int, precision: str = "float32", *, with_head: bool = False
) -> PartDescription:
    model = PretrainedModel(base)
    folder.mkdir()
    layers = adapted_layers(model.config, lora)
    adaptation = Adaptation(layers=layers, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout)
    return build_part(
        folder,
        model.config,
        StoredWeights(model),
        cut_layer=cut_layer,
        adaptation=adaptation,
        precision=precision,
        fingerprint=model.fingerprint(),
        tokenizer_folder=base,
        with_head=with_head,
    )


def drawn_adapter(base: Path, lora: LoraConfig, cut_layer: int, deviation: float = 0.2) -> dict[str, Array]:
    """Both matrices different from zero: every gradient is, too."""
    generator = np.random.default_rng(3)
    shapes = adapter_shapes(PretrainedModel(base).config, lora, range(cut_layer))
    return {name: generator.normal(0, deviation, shape).astype(np.float32) for name, shape in shapes.items()}


def drawn_masks(base: Path, lora: LoraConfig, cut_layer: int, num_rows: int) -> Masks:
    generator = np.random.default_rng(4)
    layers = adapted_layers(PretrainedModel(base).config, lora)
    keep = 1 - lora.dropout
    return {
        (block, layer): (generator.random((num_rows, inputs)) < keep).astype(np.uint8)
        for block in range(cut_layer)
        for layer, (inputs, _) in layers.items()
    }


class FixedDropout(nn.Module):
    """Dropout of one mask."""

    def __init__(self, mask: torch.Tensor, dropout: float) -> None:
        super().__init__()
        self.factor = mask / (1 - dropout)

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return x * self.factor.to(x.dtype)


Computed = tuple[Array, dict[str, Array]]
"""Activations (N, d), and the gradients by the LoRA matrices."""


def by_graphs(folder: Path, adapter: Mapping[str, Array], masks: Masks, batch: Batch, gradient: Array) -> Computed:
    runner = PartRunner(folder, adapter, masks)
    activations, kept = runner.forward(batch)
    return activations, runner.backward(gradient, kept)


def by_edge_part(
    base: Path, cut_layer: int, lora: LoraConfig, adapter: Mapping[str, Array], masks: Masks, batch: Batch, gradient: Array
) -> Computed:
    model = PretrainedModel(base)
    part = EdgePart(model, cut_layer, lora, weight_dtype=torch.float32, device=torch.device("cpu"))
    part.load_adapter({name: torch.from_numpy(matrix) for name, matrix in adapter.items()})
    for (block, layer), mask in masks.items():
        part.blocks[block].layers[layer].dropout = FixedDropout(torch.from_numpy(mask), lora.dropout)
    activations = part(torch.from_numpy(batch.ids), torch.tensor(batch.lengths))
    activations.backward(torch.from_numpy(gradient))
    return activations.detach().numpy(), {name: matrix.numpy() for name, matrix in part.gradients().items()}


def by_peft(
    base: Path, cut_layer: int, lora: LoraConfig, adapter: Mapping[str, Array], masks: Masks, batch: Batch, gradient: Array
) -> Computed:
    """In float64, on a padded batch."""
    config = PeftConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets), fan_in_fan_out=True
    )
    model = get_peft_model(load_base(base), config).double()
    is_token = torch.from_numpy(batch.feeds()["is_token"][:, :, 0].astype(bool))
    ids = torch.zeros(is_token.shape, dtype=torch.long)
    ids[is_token] = torch.from_numpy(batch.ids)
    matrices = {name.replace(".default", ""): matrix for name, matrix in model.named_parameters()}
    with torch.no_grad():
        for name, value in adapter.items():
            matrices[name].copy_(torch.from_numpy(value))
    for (block, layer), mask in masks.items():
        padded = torch.zeros(*is_token.shape, mask.shape[1])
        padded[is_token] = torch.from_numpy(mask).float()
        linear = model.base_model.model.transformer.h[block].get_submodule(layer)
        linear.lora_dropout["default"] = FixedDropout(padded.double(), lora.dropout)
    activations = model(input_ids=ids, output_hidden_states=True).hidden_states[cut_layer][is_token]
    activations.backward(torch.from_numpy(gradient).double())
    return activations.detach().numpy(), {name: matrices[name].grad.numpy() for name in adapter}


def relative(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


def assert_equal(found: Computed, expected: Computed) -> None:
    assert relative(found[0], expected[0]) < TOLERANCE
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert relative(found[1][name], gradient) < TOLERANCE, name


class Case:
    """One part and one batch, computed in three ways."""

    def __init__(
        self,
        tmp_path: Path,
        base: Path,
        *,
        targets: Sequence[str],
        cut_layer: int,
        dropout: float = 0.0,
        deviation: float = 0.2,
    ) -> None:
        self.folder, self.base, self.cut_layer, self.lora = tmp_path / "part", base, cut_layer, lora_of(targets, dropout)
        self.description = build(self.folder, base, self.lora, cut_layer)
        self.adapter = drawn_adapter(base, self.lora, cut_layer, deviation)

    def check(self, batch: Batch) -> None:
        num_rows, width = len(batch.ids), self.description.width
        gradient = np.random.default_rng(6).normal(0, 1, (num_rows, width)).astype(np.float32)
        masks = drawn_masks(self.base, self.lora, self.cut_layer, num_rows) if self.lora.dropout else {}
        found = by_graphs(self.folder, self.adapter, masks, batch, gradient)
        for reference in (by_edge_part, by_peft):
            assert_equal(found, reference(self.base, self.cut_layer, self.lora, self.adapter, masks, batch, gradient))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("cut_layer", [1, 2, 3])
@pytest.mark.parametrize("targets", CHOICES, ids="+".join)
def test_graphs_compute_what_torch_and_peft_compute(
    tmp_path: Path, tiny_model: Path, targets: Sequence[str], cut_layer: int, dropout: float
) -> None:
    Case(tmp_path, tiny_model, targets=targets, cut_layer=cut_layer, dropout=dropout).check(Batch(RAGGED))


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "gelu", "relu"])
def test_every_activation_is_computed(tmp_path: Path, activation: str) -> None:
    base = tmp_path / "model"
    base.mkdir()
    make_model(base, activation_function=activation)
    Case(tmp_path, base, targets=("c_attn", "c_proj", "c_fc"), cut_layer=2).check(Batch(RAGGED))


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (9,), (5, 5), (1, 256)])
def test_every_batch_is_computed_that_has_a_token(tmp_path: Path, tiny_model: Path, lengths: Sequence[int]) -> None:
    Case(tmp_path, tiny_model, targets=("c_attn", "c_proj", "c_fc"), cut_layer=2, dropout=0.1).check(Batch(lengths))


def test_inner_width_may_be_any(tmp_path: Path) -> None:
    base = tmp_path / "model"
    base.mkdir()
    make_model(base, n_inner=40)
    Case(tmp_path, base, targets=("c_proj", "c_fc"), cut_layer=2).check(Batch(RAGGED))


@pytest.mark.parametrize("cut_layer", [3, 11])
def test_a_trained_model_of_twelve_blocks_is_computed(tmp_path: Path, cut_layer: int) -> None:
    base = shared_path("models/gpt2-mini")
    # With an adapter as training makes it. A larger one makes rounding grow from block to block, in torch's float32 as here.
    case = Case(tmp_path, base, targets=("c_attn", "c_proj", "c_fc"), cut_layer=cut_layer, dropout=0.1, deviation=0.02)
    case.check(Batch((31, 54, 17)))


@pytest.fixture(scope="module")
def part(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two blocks with every layer adapted, and dropout."""
    folder = tmp_path_factory.mktemp("part") / "part"
    build(folder, tiny_model, lora_of(("c_attn", "c_proj", "c_fc"), 0.1), 2)
    return folder


def computed(folder: Path, base: Path, batch: Batch) -> Computed:
    lora = lora_of(("c_attn", "c_proj", "c_fc"), 0.1)
    gradient = np.random.default_rng(6).normal(0, 1, (len(batch.ids), 32)).astype(np.float32)
    masks = drawn_masks(base, lora, 2, len(batch.ids))
    return by_graphs(folder, drawn_adapter(base, lora, 2), masks, batch, gradient)


def test_it_makes_no_difference_what_padding_shows(part: Path, tiny_model: Path) -> None:
    activations, gradients = computed(part, tiny_model, Batch(RAGGED, shown=0))
    for shown in (1, 17):
        others = computed(part, tiny_model, Batch(RAGGED, shown=shown))
        assert np.array_equal(activations, others[0])
        assert all(np.array_equal(gradients[name], others[1][name]) for name in gradients)


def test_the_inference_graph_computes_what_training_does_without_dropout(tmp_path: Path, part: Path, tiny_model: Path) -> None:
    batch, targets = Batch(RAGGED), ("c_attn", "c_proj", "c_fc")
    build(tmp_path / "part", tiny_model, lora_of(targets), 2)
    adapter = drawn_adapter(tiny_model, lora_of(targets), 2)
    expected, _ = PartRunner(tmp_path / "part", adapter).forward(batch)
    for folder in (tmp_path / "part", part):
        found, _ = PartRunner(folder, adapter).forward(batch, graph="inference")
        assert relative(found, expected) < TOLERANCE
    graph = onnx.load(part / "inference.onnx").graph
    assert [output.name for output in graph.output] == ["output"]
    assert not any(each.name.startswith("mask:") for each in graph.input)


# Weights


def rounded(matrix: Any, precision: str, axis: int) -> Any:
    if precision == "float16":
        return matrix.half().float()
    scale = matrix.abs().amax(axis, keepdim=True) / 127
    return (matrix / scale).round() * scale


def rounded_base(folder: Path, base: Path, precision: str) -> Path:
    """The model whose matrices and tokens are what a precision can tell apart."""
    model = load_base(base)
    with torch.no_grad():
        model.transformer.wte.weight.copy_(rounded(model.transformer.wte.weight, precision, 1))
        for name, matrix in model.named_parameters():
            if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                matrix.copy_(rounded(matrix, precision, 0))
    model.save_pretrained(folder)
    for file in base.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("precision", ["float16", "int8"])
@pytest.mark.parametrize("targets", [("c_attn",), ("c_attn", "c_proj", "c_fc")], ids="+".join)
def test_rounded_weights_compute_what_the_model_of_rounded_weights_does(
    tmp_path: Path, tiny_model: Path, targets: Sequence[str], precision: str
) -> None:
    lora, batch = lora_of(targets, 0.1), Batch(RAGGED)
    build(tmp_path / "part", tiny_model, lora, 3, precision)
    adapter, masks = drawn_adapter(tiny_model, lora, 3), drawn_masks(tiny_model, lora, 3, len(batch.ids))
    gradient = np.random.default_rng(6).normal(0, 1, (len(batch.ids), 32)).astype(np.float32)
    found = by_graphs(tmp_path / "part", adapter, masks, batch, gradient)
    base = rounded_base(tmp_path / "rounded", tiny_model, precision)
    assert_equal(found, by_edge_part(base, 3, lora, adapter, masks, batch, gradient))


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_only_matrices_and_tokens_are_rounded(tmp_path: Path, tiny_model: Path, precision: str) -> None:
    build(tmp_path / "part", tiny_model, lora_of(("c_attn",)), 1, precision)
    runner, model = PartRunner(tmp_path / "part", drawn_adapter(tiny_model, lora_of(("c_attn",)), 1)), load_base(tiny_model)
    stored = {**runner.blocks[0], **{f"weight:{name}": array for name, array in runner.embedding.items()}}
    for name, parameter in {
        **dict(model.transformer.h[0].named_parameters()),
        "wpe.weight": model.transformer.wpe.weight,
    }.items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            assert stored[f"weight:{name}"].dtype == precision
        else:
            assert np.array_equal(stored[f"weight:{name}"], parameter.detach().numpy())
    assert runner.embedding["tokens"].dtype == precision


@pytest.mark.parametrize("matrix", [np.zeros((3, 2)), np.full((3, 2), 1e-44), np.full((3, 2), 3e38), np.eye(3, 2) * 1e-18])
def test_integers_stand_for_any_finite_matrix(matrix: Array) -> None:
    stored = MATRIX_FORMATS["int8"].store("w", matrix.astype(np.float32))
    assert (stored["w"].dtype, stored["w.scale"].shape) == (np.int8, (2,))
    found = stored["w"].astype(np.float64) * stored["w.scale"]
    step = np.abs(matrix).max() / 127
    assert np.abs(found - matrix).max() <= max(step, 1e-20) * 0.501


@pytest.mark.parametrize(
    ("precision", "value", "message"),
    [
        ("float16", 1e5, "h.1.mlp.c_fc.weight has values that float16 cannot hold; leave --edge-weights at float32"),
        ("int8", np.inf, "h.1.mlp.c_fc.weight has values that int8 cannot hold; leave --edge-weights at float32"),
        ("float32", np.nan, "h.1.mlp.c_fc.weight has values that float32 cannot hold; choose another model"),
    ],
)
def test_weight_that_the_precision_cannot_hold_is_named(
    tmp_path: Path, model: Path, precision: str, value: float, message: str
) -> None:
    spoilt = load_base(model)
    with torch.no_grad():
        spoilt.transformer.h[1].mlp.c_fc.weight[2, 3] = value
    spoilt.save_pretrained(model)
    with pytest.raises(ModelError) as caught:
        build(tmp_path / "part", model, lora_of(("c_attn",)), 2, precision)
    assert str(caught.value) == message


# What stands in the files


@pytest.fixture(scope="module")
def every_graph(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[onnx.ModelProto]:
    """Of every precision, activation and choice of targets, with and without dropout."""
    folder, config, graphs = tmp_path_factory.mktemp("graphs"), PretrainedModel(tiny_model).config, []
    choices = [
        *((precision, "gelu_new", targets, 0.1) for precision in EDGE_WEIGHTS for targets in CHOICES),
        *(("float32", activation, CHOICES[-1], 0.0) for activation in ("gelu", "relu")),
    ]
    for precision, activation, targets, dropout in choices:
        layers = adapted_layers(config, lora_of(targets))
        adaptation = Adaptation(layers=layers, rank=RANK, alpha=ALPHA, dropout=dropout)
        write_graphs(folder, replace(config, activation=activation), adaptation, precision, with_head=True)
        graphs += [onnx.load(folder / name) for name in (*GRAPH_FILES, *HEAD_GRAPH_FILES)]
    for option in ("qwen2-windows", "qwen3-biases", "phi3-partial"):
        config = PretrainedModel(make_family_model(tmp_path_factory.mktemp(option), option)).config
        adaptation = Adaptation(layers=config.layer_shapes, rank=RANK, alpha=ALPHA, dropout=0.1)
        write_graphs(folder, config, adaptation, "int8", with_head=True)
        graphs += [onnx.load(folder / name) for name in (*GRAPH_FILES, *HEAD_GRAPH_FILES)]
    return graphs


def test_graphs_consist_of_the_operators_that_a_device_lets_pass_and_of_no_others(every_graph: list[onnx.ModelProto]) -> None:
    nodes = [node for model in every_graph for node in model.graph.node]
    assert {node.op_type for node in nodes} == OPERATORS.keys()
    assert {node.domain for node in nodes} == {""}
    assert not any(attribute.HasField("g") or attribute.graphs for node in nodes for attribute in node.attribute)


def test_graphs_hold_no_weights_and_name_no_files(every_graph: list[onnx.ModelProto]) -> None:
    for model in every_graph:
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
        assert (model.ir_version, list(model.functions), list(model.graph.sparse_initializer)) == (9, [], [])
        for tensor in model.graph.initializer:
            assert tensor.data_location == onnx.TensorProto.DEFAULT
            assert tensor.ByteSize() < 1024
        assert model.ByteSize() < 100_000


def test_graphs_compute_nothing_that_is_not_needed(every_graph: list[onnx.ModelProto]) -> None:
    for model in every_graph:
        used = {name for node in model.graph.node for name in node.input}
        outputs = {output.name for output in model.graph.output}
        assert {each.name for each in (*model.graph.input, *model.graph.initializer)} <= used
        assert all(used.intersection(node.output) or outputs.intersection(node.output) for node in model.graph.node)


@pytest.mark.parametrize(
    ("targets", "needed", "not_needed"),
    [
        (("c_attn",), "saved:qkv", ["weight:attn.c_attn.weight"]),
        (("c_proj",), "saved:qkv", ["input", "is_token", "weight:attn.c_proj.weight", "weight:ln_1.weight"]),
        (
            ("c_fc",),
            "saved:middle",
            ["input", "saved:qkv", "row_of_cell", "weight:mlp.c_fc.weight", "weight:attn.c_proj.weight"],
        ),
    ],
)
def test_nothing_is_computed_below_the_first_adapted_layer(
    tmp_path: Path, tiny_model: Path, targets: Sequence[str], needed: str, not_needed: list[str]
) -> None:
    config = PretrainedModel(tiny_model).config
    layers = adapted_layers(config, lora_of(targets))
    write_graphs(tmp_path, config, Adaptation(layers=layers, rank=RANK, alpha=ALPHA, dropout=0.0), "float32")
    first = onnx.load(tmp_path / "first_backward.onnx").graph
    inputs = {each.name for each in first.input}
    assert needed in inputs
    assert inputs.isdisjoint(not_needed)
    assert "input_gradient" not in {output.name for output in first.output}


def test_part_is_described_and_its_files_are_those_it_names(part: Path, tiny_model: Path) -> None:
    description = PartDescription.read(part)
    model = PretrainedModel(tiny_model)
    assert description == PartDescription(
        fingerprint=model.fingerprint(),
        cut_layer=2,
        weights="float32",
        width=32,
        num_positions=256,
        vocabulary_size=600,
        end_token=model.config.end_token,
        lora_rank=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.1,
        adapter_prefix="base_model.model.transformer.h.{block}.",
        adapted=dict(model.config.layer_shapes),
        onnxruntime="1.23",
    )
    names = {path.name for path in part.iterdir()}
    assert names == {*required_files(description.cut_layer), "tokenizer.json", "tokenizer_config.json"}
    assert load_tokenizer(part).to_str() == load_tokenizer(tiny_model).to_str()


@pytest.mark.parametrize("precision", EDGE_WEIGHTS)
@pytest.mark.parametrize("is_tied", [True, False])
def test_head_is_added_to_a_part_and_changes_nothing_else_of_it(tmp_path: Path, is_tied: bool, precision: str) -> None:
    base = tmp_path / "model"
    base.mkdir()
    make_model(base, tie_word_embeddings=is_tied)
    folders = tmp_path / "without", tmp_path / "with"
    for folder, with_head in zip(folders, (False, True), strict=True):
        build(folder, base, lora_of(("c_attn",)), 2, precision, with_head=with_head)
    without, whole = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert whole.keys() - without.keys() == {*HEAD_GRAPH_FILES, *(() if is_tied else (HEAD_WEIGHTS,))}
    described = {name: json.loads(files.pop("part.json")) for name, files in (("without", without), ("whole", whole))}
    assert described["whole"] == described["without"] | {"head": "embedding.safetensors" if is_tied else HEAD_WEIGHTS}
    assert "head" not in described["without"]
    assert without.items() <= whole.items()
    if not is_tied:
        head, form = load_file(folders[1] / HEAD_WEIGHTS), {"float32": np.float32, "float16": np.float16, "int8": np.int8}
        stored = head["tokens"].astype(np.float32) * head.get("tokens.scale", np.float32(1))[..., None]
        assert head["tokens"].dtype == form[precision]
        expected = load_base(base).lm_head.weight.detach()
        assert np.allclose(stored, expected if precision == "float32" else rounded(expected, precision, 1), atol=1e-6)


# How onnxruntime goes through them


def order_of(graph: Path, folder: Path, known: Mapping[str, Array]) -> list[str]:
    """The operators in the order in which they are computed, and the outputs' names where outputs are computed."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # nodes keep their names
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    session.run(None, {each.name: known[each.name] for each in session.get_inputs()})
    events = json.loads(Path(session.end_profiling()).read_text())
    ended = [event["name"].removesuffix("_kernel_time") for event in events if event["name"].endswith("_kernel_time")]
    model = onnx.load(graph).graph
    outputs = {output.name for output in model.output}
    names = {node.name: outputs.intersection(node.output) for node in model.node}
    operators = {node.name: node.op_type for node in model.node}
    return [next(iter(names[node]), operators[node]) for node in ended]


def test_a_gradient_is_computed_as_soon_as_it_can_be_and_a_matrix_cast_when_all_else_is_there(
    tmp_path: Path, tiny_model: Path
) -> None:
    targets, batch = ("c_attn", "c_proj", "c_fc"), Batch(RAGGED)
    build(tmp_path / "part", tiny_model, lora_of(targets), 2, "int8")
    runner = PartRunner(tmp_path / "part", drawn_adapter(tiny_model, lora_of(targets), 2))
    _, kept = runner.forward(batch)
    known = kept[1] | {"gradient": np.ones((len(batch.ids), 32), np.float32)}
    order = order_of(tmp_path / "part/backward.onnx", tmp_path, known)
    layers = ("mlp.c_proj", "mlp.c_fc", "attn.c_proj", "attn.c_attn")
    gradients = [name for name in order if name.startswith("gradient:")]
    assert gradients == [f"gradient:{layer}.{matrix}" for layer in layers for matrix in "BA"]
    assert order[-1] == "input_gradient"
    casts = [index for index, name in enumerate(order) if name == "Cast"]
    assert len(casts) == 4
    assert all("Gemm" in order[index + 1 : index + 3] for index in casts)
    assert order.index("gradient:mlp.c_fc.A") < order.index("Softmax")


# Files of weights


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_file_that_is_written_in_pieces_is_that_of_the_library(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    source = np.random.default_rng(0)
    tensors: dict[str, Any] = {
        "tokens": source.integers(-127, 127, (7, 5)).astype(np.int8),
        "tokens.scale": source.normal(size=7).astype(np.float32),
        "positions": source.normal(size=(2, 3)).astype(np.float32),
        "half": source.normal(size=(2, 3)).astype(np.float16),
    }
    save_file(tensors, tmp_path / "expected", metadata)
    with TensorFile(
        tmp_path / "found", {name: (array.dtype, array.shape) for name, array in tensors.items()}, metadata
    ) as file:
        for rows in (slice(0, 2), slice(2, None)):
            for name, array in tensors.items():
                file.append(name, array[rows])
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize("precision", EDGE_WEIGHTS)
def test_table_of_a_large_vocabulary_is_stored_some_rows_at_a_time(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model(tmp_path, n_embd=256, n_head=4, n_layer=2, tie_word_embeddings=False)
    whole = build(tmp_path / "whole", base, lora_of(["c_attn"]), 1, precision, with_head=True)
    monkeypatch.setattr("graphs.weights.ROWS_AT_ONCE", 25)
    model, lora = PretrainedModel(base), lora_of(["c_attn"])
    tables = (model.config.table_name, model.config.head_name)

    class Watched(StoredWeights):
        def read(self, name: str) -> Any:
            assert name not in tables
            return super().read(name)

    adaptation = Adaptation(layers=adapted_layers(model.config, lora), rank=RANK, alpha=ALPHA, dropout=0.0)
    (tmp_path / "pieces").mkdir()
    given: dict[str, Any] = {"fingerprint": whole.fingerprint, "tokenizer_folder": base, "with_head": True}
    build_part(
        tmp_path / "pieces", model.config, Watched(model), cut_layer=1, adaptation=adaptation, precision=precision, **given
    )
    for name in (*whole.weight_files, HEAD_WEIGHTS):
        assert (tmp_path / "pieces" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
