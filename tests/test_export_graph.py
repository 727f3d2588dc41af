"""Exported graphs against transformers, and against the graph that torch exports."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import reference
import torch
from conftest import make_model, shared_path
from family_models import gpt2_config, make_family_model
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx_reference import decode, dequantised, exported, largest_difference, left_padded, logits_of, random_ids, rounded
from safetensors.torch import load_file, save_file

from export import export_onnx
from export.attention import ATTENTIONS
from export.calibration import equalised
from export.decoder_graph import DecoderGraph
from export.equalisation import Equalised, factors_of_block
from export.exported_model import ExportedModel, read_manifest
from export.observation import Observer
from export.precision import PRECISIONS, Precision, block_forms
from export.quantisation import BlockFormat, quantise
from graphs import Graph, StoredWeights, Weights
from split_model import ModelConfig, PretrainedModel
from storage import load_tokenizer

pytestmark = pytest.mark.usefixtures("few_texts")

TARGETS = ("c_attn", "c_proj", "c_fc")
SHAPES: dict[str, dict[str, Any]] = {
    "half the layers of GPT-2, as distilgpt2": {"n_layer": 6, "n_embd": 96, "n_head": 12},
    "one wide head and a vocabulary of a prime": {"n_layer": 2, "n_embd": 64, "n_head": 1, "vocab_size": 601},
    "heads of 24, a narrow MLP, an untied head": {
        "n_layer": 2,
        "n_embd": 72,
        "n_head": 3,
        "n_inner": 40,
        "tie_word_embeddings": False,
        "activation_function": "gelu",
        "layer_norm_epsilon": 1e-3,
    },
    "a rectifier": {"n_layer": 1, "activation_function": "relu"},
}


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 blocks of 128 elements in 4 heads: whole blocks of every quantised format."""
    return make_model(tmp_path_factory.mktemp("wide"), n_embd=128)


@pytest.fixture(scope="module", params=ATTENTIONS)
def exported_tiny(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with each form of attention."""
    folder = tmp_path_factory.mktemp("exported") / request.param
    export_onnx(str(tiny_model), folder, precisions=["fp32"], attention=request.param)
    return folder


def test_prefill_gives_the_logits_of_transformers(exported_tiny: Path, tiny_model: Path) -> None:
    ids = random_ids(600, 3, 37)
    expected = logits_of(reference.load_base(tiny_model), ids)
    assert largest_difference(exported(exported_tiny).logits(ids), expected) < 2e-5


@pytest.mark.parametrize("prefill", [1, 20])
def test_decoding_token_by_token_gives_the_logits_of_one_call(exported_tiny: Path, tiny_model: Path, prefill: int) -> None:
    ids = random_ids(600, 2, 25)
    expected = logits_of(reference.load_base(tiny_model), ids)
    assert largest_difference(decode(exported(exported_tiny), ids, np.ones_like(ids), prefill), expected) < 2e-5


def test_batches_with_left_padding_give_what_their_sequences_give_alone(exported_tiny: Path, tiny_model: Path) -> None:
    lengths = [3, 24, 11]
    ids, mask = random_ids(600, 3, 24), left_padded(lengths)
    found = decode(exported(exported_tiny), ids, mask, 18)
    assert largest_difference(found, logits_of(reference.load_base(tiny_model), ids, mask), mask) < 2e-5
    for row, length in enumerate(lengths):
        alone = logits_of(reference.load_base(tiny_model), ids[row : row + 1, -length:])[0]
        assert largest_difference(found[row, -length:], alone) < 2e-5


def test_texts_may_be_as_long_as_the_context(exported_tiny: Path, tiny_model: Path) -> None:
    ids = random_ids(600, 1, 256)
    found = decode(exported(exported_tiny), ids, np.ones_like(ids), 250)
    assert largest_difference(found, logits_of(reference.load_base(tiny_model), ids)) < 2e-5


@pytest.mark.parametrize("attention", ["attn23", "ops"])
def test_a_conversation_of_several_texts_goes_on_where_the_form_allows_it(
    tiny_model: Path, tmp_path: Path, attention: str
) -> None:
    export_onnx(str(tiny_model), tmp_path / "out", precisions=["fp32"], attention=attention)
    model, ids = exported(tmp_path / "out"), random_ids(600, 2, 30)
    _, cache = model.step(ids[:, :10], np.ones((2, 10), np.int64), model.empty_cache(2))
    logits, _ = model.step(ids[:, 10:], np.ones((2, 30), np.int64), cache)
    assert largest_difference(logits, logits_of(reference.load_base(tiny_model), ids)[:, 10:]) < 2e-5


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_any_shape_gives_the_logits_of_transformers(tmp_path: Path, shape: dict[str, Any], attention: str) -> None:
    model = make_model(tmp_path, **shape)
    adapter = reference.make_adapter(model, tmp_path / "adapter", targets=TARGETS)
    export_onnx(str(model), tmp_path / "out", adapter=adapter, precisions=["fp32"], attention=attention)
    ids, mask = random_ids(600, 2, 20), left_padded([20, 13])
    expected = logits_of(reference.load_peft(model, adapter).eval(), ids, mask)
    assert largest_difference(decode(exported(tmp_path / "out"), ids, mask, 14), expected, mask) < 5e-5


def test_half_precision_stays_near_transformers(tiny_model: Path, tmp_path: Path) -> None:
    export_onnx(str(tiny_model), tmp_path / "out", precisions=["fp16"])
    ids = random_ids(600, 2, 20)
    expected = logits_of(reference.load_base(tiny_model), ids)
    found = decode(exported(tmp_path / "out", "fp16"), ids, np.ones_like(ids), 15)
    assert largest_difference(found, expected) < 2e-3 * np.abs(expected).max()


def test_row_of_padding_in_half_precision_stays_a_number_however_negative_its_scores(tmp_path: Path) -> None:
    """Computed in half precision itself, as on a graphics card: on a processor onnxruntime computes it in single precision."""
    model = make_model(tmp_path, n_layer=2)
    weights = load_file(model / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("attn.c_attn.weight"):
            query, _, _ = weight.chunk(3, 1)
            weight[:, 32:64] = -9.0 * query  # so that no token but itself is like one
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    export_onnx(str(model), tmp_path / "out", precisions=["fp16"], attention="ops")
    ids, mask = np.full((2, 6), 7), left_padded([6, 3])
    whole, inner = onnx.load(tmp_path / "out/onnx/model_fp16.onnx"), exported(tmp_path / "out", "fp16")
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}
    (logits, *_) = ReferenceEvaluator(whole).run(None, {**given, **inner.empty_cache(2)})
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("precision", ["q8", "q4"])
@pytest.mark.parametrize("width", [128, 72])
def test_quantised_graph_is_the_model_with_rounded_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, width: int
) -> None:
    """With activations in full precision: what rounding them costs is measured on a trained model."""
    monkeypatch.setattr("export.graph_weights.INTEGER_PRODUCTS", 1)
    folder = make_model(tmp_path, n_layer=2, n_embd=width, n_head=1)
    export_onnx(str(folder), tmp_path / "out", precisions=[precision])
    ids = random_ids(600, 2, 20)
    found = decode(exported(tmp_path / "out", precision), ids, np.ones_like(ids), 15)
    assert largest_difference(found, logits_of(rounded(folder, tmp_path / "out", precision), ids)) < 1e-4


@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")  # torch warns of its own code
def test_graph_agrees_with_the_one_that_torch_exports(tiny_model: Path, tmp_path: Path) -> None:
    """torch.onnx.export traces transformers' own code: it shares nothing with ours but the weights."""

    class Logits(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, use_cache=False).logits  # type: ignore[no-any-return]

    traced = Logits(reference.load_base(tiny_model)).eval()
    shapes = ({0: "batch_size", 1: "sequence_length"},)
    program = torch.onnx.export(
        traced, (torch.ones(2, 7, dtype=torch.long),), dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    assert program is not None
    program.save(tmp_path / "traced.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "traced.onnx", providers=["CPUExecutionProvider"])
    ids = random_ids(600, 3, 19)
    (expected,) = session.run(None, {session.get_inputs()[0].name: ids})
    export_onnx(str(tiny_model), tmp_path / "out", precisions=["fp32"])
    assert largest_difference(exported(tmp_path / "out").logits(ids), expected) < 2e-5
    assert len(onnx.load(tmp_path / "out/onnx/model.onnx").graph.node) < len(onnx.load(tmp_path / "traced.onnx").graph.node) / 2


def prompts_of(folder: Path) -> list[list[int]]:

    tokenizer = load_tokenizer(folder)
    lines = (Path(__file__).parent.parent / "examples/restaurants/valid.jsonl").read_text().splitlines()[:50]
    return [tokenizer.encode(line[12 : 40 + number % 30]).ids for number, line in enumerate(lines)]


def assert_greedy_texts_are_those_of_transformers(folder: Path, out: Path, tokens: int) -> None:
    export_onnx(str(folder), out, precisions=["fp32"])
    model, expected_from = exported(out), reference.load_base(folder)
    end = expected_from.config.eos_token_id
    prompts = prompts_of(folder)
    assert len(prompts) == 50
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": end}
        expected = expected_from.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        assert model.continue_greedily(prompt, tokens, [end]) == expected


def test_greedy_texts_of_fifty_prompts_are_those_of_transformers(tiny_model: Path, tmp_path: Path) -> None:
    assert_greedy_texts_are_those_of_transformers(tiny_model, tmp_path / "out", 12)


@pytest.mark.shared
def test_greedy_texts_of_a_trained_model_are_those_of_transformers(tmp_path: Path) -> None:
    assert_greedy_texts_are_those_of_transformers(shared_path("models/gpt2-mini"), tmp_path / "out", 16)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("cut_layer", [1, 3])
def test_chained_parts_are_the_whole(tiny_model: Path, tmp_path: Path, attention: str, cut_layer: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    export_onnx(str(tiny_model), whole, precisions=["fp32", "q8"], attention=attention)
    export_onnx(str(tiny_model), parts, precisions=["fp32", "q8"], attention=attention, split=cut_layer)
    ids, mask = random_ids(600, 2, 20), left_padded([20, 9])
    for precision in ("fp32", "q8"):
        expected = decode(exported(whole, precision), ids, mask, 16)
        assert largest_difference(decode(exported(parts, precision), ids, mask, 16), expected, mask) < 1e-5
    edge, server = (onnx.load(path, load_external_data=False).graph for path in read_manifest(parts).precisions["fp32"].graphs)
    assert edge.output[0].name == server.input[0].name == "hidden_states"
    assert len(edge.output) == 1 + 2 * cut_layer
    assert len(server.output) == 1 + 2 * (4 - cut_layer)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "q8"])
def test_kept_adapter_makes_the_merged_model_and_without_it_there_is_the_base(
    tiny_model: Path, tmp_path: Path, precision: str
) -> None:
    # Rounding a merged matrix is another thing than rounding the base's: the two differ as much as each from the exact model.
    tolerance = {"fp32": 1e-5, "fp16": 0.02, "q8": 0.5}[precision]
    adapter = reference.make_adapter(tiny_model, tmp_path / "adapter", targets=TARGETS)
    kept = tmp_path / "kept"
    export_onnx(str(tiny_model), kept, adapter=adapter, precisions=[precision], keep_adapter=True)
    ids, mask = random_ids(600, 2, 20), left_padded([20, 9])
    merged = logits_of(reference.load_peft(tiny_model, adapter).eval(), ids, mask)
    base = logits_of(reference.load_base(tiny_model), ids, mask)
    assert largest_difference(merged, base, mask) > 0.5
    assert largest_difference(decode(exported(kept, precision, with_adapter=True), ids, mask, 16), merged, mask) < tolerance
    assert largest_difference(decode(exported(kept, precision), ids, mask, 16), base, mask) < tolerance


def test_adapters_of_any_rank_are_exchanged_without_loading_the_base_again(tiny_model: Path, tmp_path: Path) -> None:
    folders = []
    for rank in (4, 9):
        adapter = reference.make_adapter(tiny_model, tmp_path / f"{rank}", targets=["c_attn"], rank=rank, seed=rank)
        export_onnx(str(tiny_model), tmp_path / f"out-{rank}", adapter=adapter, precisions=["fp32"], keep_adapter=True)
        folders.append(tmp_path / f"out-{rank}")
    graphs = [(folder / "onnx/model.onnx_data").read_bytes() for folder in folders]
    assert graphs[0] == graphs[1]
    swapped = ExportedModel(read_manifest(folders[0]).precisions["fp32"].graphs, read_manifest(folders[1]).adapter)
    ids = random_ids(600, 1, 12)
    expected = logits_of(reference.load_peft(tiny_model, tmp_path / "9").eval(), ids)
    assert largest_difference(swapped.logits(ids), expected) < 1e-5
    assert (folders[0] / "adapter.onnx_adapter").stat().st_size < 30_000


def test_tied_table_is_stored_once_in_every_precision(wide_model: Path, tmp_path: Path) -> None:
    export_onnx(str(wide_model), tmp_path / "out", precisions=list(PRECISIONS))
    for precision, bytes_each in {"fp32": 4, "fp16": 2, "q8": 1, "q4": 1}.items():
        (path,) = read_manifest(tmp_path / "out").precisions[precision].graphs
        graph = onnx.load(path).graph
        tables = [item for item in graph.initializer if 600 * 128 in (np.prod(item.dims), item.dims[0] * 128)]
        large = [item for item in tables if len(item.raw_data) >= 600 * 128 * bytes_each]
        assert len(large) == 1
        total = sum(len(item.raw_data) for item in graph.initializer)
        assert total < bytes_each * 600 * 128 * 1.2 + 12 * 128 * 128 * 4 * bytes_each * 1.2 + 256 * 128 * 4 + 100_000


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_graphs_pass_the_checker_and_say_what_they_need(tiny_model: Path, tmp_path: Path, attention: str) -> None:
    export_onnx(str(tiny_model), tmp_path / "out", attention=attention, precisions=list(PRECISIONS))
    form = ATTENTIONS[attention]
    for precision in PRECISIONS:
        (path,) = read_manifest(tmp_path / "out").precisions[precision].graphs
        model = onnx.load(path, load_external_data=False)
        contributed = {node.domain for node in model.graph.node} != {""}
        onnx.checker.check_model(path, full_check=not contributed)
        assert model.ir_version == form.ir_version
        assert {item.domain: item.version for item in model.opset_import}[""] == form.opset
        assert contributed == (attention == "gqa" or precision in ("q8", "q4"))


def test_weights_lie_where_a_runtime_can_map_them(wide_model: Path, tmp_path: Path) -> None:
    export_onnx(str(wide_model), tmp_path / "out", precisions=["fp32"])
    graph = onnx.load(tmp_path / "out/onnx/model.onnx", load_external_data=False).graph
    places = [{entry.key: entry.value for entry in item.external_data} for item in graph.initializer if item.external_data]
    assert {place["location"] for place in places} == {"model.onnx_data"}
    assert all(int(place["offset"]) % (4096 if int(place["length"]) >= 65536 else 64) == 0 for place in places)
    assert (tmp_path / "out/onnx/model.onnx").stat().st_size < 100_000


def test_weights_beyond_two_gigabytes_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file with a hole, so that no disk has to hold them."""
    monkeypatch.setattr("graphs.graph.PAGE_BYTES", 1 << 31)
    first, second = np.random.default_rng(0).standard_normal((2, 128, 128), np.float32)
    with Graph(tmp_path / "sum.onnx") as graph:
        summed = graph.node("Add", graph.weight("first", first), graph.weight("second", second))
        graph.node_with_outputs("Identity", [summed], ["sum"])
        graph.output("sum", np.float32, (128, 128))
        graph.save("sum", 20, 9)
    assert graph.data_path.stat().st_size == (1 << 31) + second.nbytes
    session = onnxruntime.InferenceSession(tmp_path / "sum.onnx", providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {})[0], first + second)


def test_table_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    model = make_model(tmp_path, n_layer=2, n_embd=64, vocab_size=100_000, tie_word_embeddings=False)
    tracemalloc.start()
    try:
        export_onnx(str(model), tmp_path / "out", precisions=list(PRECISIONS))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000 * 64 * 4 / 3  # with 8 bits it takes a quarter


def test_table_that_is_read_in_pieces_is_the_same(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("whole", "pieces"):
        export_onnx(str(tiny_model), tmp_path / name, precisions=list(PRECISIONS))
        monkeypatch.setattr("graphs.weights.ROWS_AT_ONCE", 7)
    for path in (tmp_path / "whole").rglob("*.*"):
        assert (tmp_path / "pieces" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes(), path


def test_names_are_those_that_optimum_genai_and_transformers_js_look_for(tiny_model: Path, tmp_path: Path) -> None:
    export_onnx(str(tiny_model), tmp_path / "out", precisions=["fp32"])
    session = onnxruntime.InferenceSession(tmp_path / "out/onnx/model.onnx", providers=["CPUExecutionProvider"])
    cache = [f"{block}.{part}" for block in range(4) for part in ("key", "value")]
    past = {f"past_key_values.{name}": ["batch_size", 4, "past_sequence_length", 8] for name in cache}
    present = {f"present.{name}": ["batch_size", 4, "total_sequence_length", 8] for name in cache}
    assert {item.name: item.shape for item in session.get_inputs()} == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **past,
    }
    outputs = {item.name: item.shape for item in session.get_outputs()}
    assert outputs == {"logits": ["batch_size", "sequence_length", 600], **present}


class Shaped(Weights):
    """Random weights of a shape, made when they are read."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def read(self, name: str) -> Any:
        shape = self.config.tensor_shapes[name]
        return np.random.default_rng(len(name)).standard_normal(shape, np.float32) * 0.02

    def pieces(self, name: str) -> Iterator[Any]:
        yield self.read(name)


def write(path: Path, config: ModelConfig, weights: Weights, precision: Precision, attention: str = "gqa") -> int:
    """Bytes of both files."""
    form = ATTENTIONS[attention]
    with Graph(path) as graph:
        DecoderGraph(graph, config, weights, precision, attention, range(config.num_layers)).build()
        graph.save("model", form.opset, form.ir_version)
    return path.stat().st_size + graph.data_path.stat().st_size


@pytest.mark.parametrize(("precision", "largest"), [("fp32", 500e6), ("q8", 140e6), ("q4", 100e6)])
def test_gpt2_small_is_as_small_as_it_should_be(tmp_path: Path, precision: str, largest: float) -> None:
    """Embeddings, head and two blocks are written; the others are as large as the second."""
    shape = {
        "vocabulary_size": 50257,
        "width": 768,
        "num_heads": 12,
        "inner_width": 3072,
        "num_positions": 1024,
        "end_token": 50256,
    }
    sizes = []
    for num_layers in (1, 2):
        config = gpt2_config(num_layers=num_layers, **shape)
        sizes.append(write(tmp_path / f"{num_layers}.onnx", config, Shaped(config), PRECISIONS[precision]))
    assert sizes[0] + 11 * (sizes[1] - sizes[0]) <= largest


class Outlying(Weights):
    """The same function with what real GPT-2s have: a few channels that are thirty times as large as the others."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def read(self, name: str) -> Any:
        tensor = self.weights.read(name).copy()
        if ".ln_1." in name or ".ln_2." in name:
            tensor[[3, 40, 77, 90]] *= 30
        elif name.endswith(("c_attn.weight", "c_fc.weight")):
            tensor[[3, 40, 77, 90]] /= 30
        return tensor

    def pieces(self, name: str) -> Iterator[Any]:
        yield self.read(name)


def balanced(weights: Weights, config: ModelConfig, scratch: Path) -> Equalised:
    texts = list(random_ids(600, 4, 40, seed=1))
    return equalised(config, weights, Observer(config, texts, "gqa", scratch), PRECISIONS["q4"])


@pytest.mark.parametrize("option", ["gpt2", "llama", "llama-one-key-head", "qwen2", "phi3"])
def test_equalisation_changes_no_digit_in_full_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    monkeypatch.setattr("export.equalisation.STRENGTHS", (0.5,))  # always, whether it pays or not
    model = PretrainedModel(make_family_model(tmp_path, option))
    config, weights = model.config, StoredWeights(model)
    factors, generator = dict[str, NDArray[np.float32]](), np.random.default_rng(0)
    for block in map(config.block_name, range(config.num_layers)):
        inputs = {
            f"{block}.{layer}": np.exp2(generator.uniform(-8, 8, (1, width))).astype(np.float32)
            for layer, (width, _) in config.layer_shapes.items()
        }
        factors |= factors_of_block(config, block, weights, inputs, block_forms(config, PRECISIONS["q4"]))
    same = Equalised(weights, config, factors)
    changed = {layer for layer in config.layer_shapes if np.unique(same.rows(f"{config.block_name(1)}.{layer}")).size > 1}
    assert changed == set(config.layer_shapes) - (set() if config.is_gated else {config.names.down})
    ids, found = random_ids(600, 2, 20), []
    for number, source in enumerate((weights, same)):
        path = tmp_path / f"{number}.onnx"
        write(path, config, source, PRECISIONS["fp32"], "attn23")
        found.append(ExportedModel([path]).logits(ids))
    assert np.array_equal(found[0], found[1])


@pytest.mark.parametrize("precision", ["q8", "q4"])
def test_equalisation_takes_most_of_what_outliers_cost(wide_model: Path, tmp_path: Path, precision: str) -> None:
    model = PretrainedModel(wide_model)
    weights = Outlying(StoredWeights(model))
    ids = random_ids(600, 2, 40)
    expected = logits_of(reference.load_base(wide_model), ids)
    errors = []
    for number, source in enumerate((weights, balanced(weights, model.config, tmp_path))):
        path = tmp_path / f"{number}.onnx"
        write(path, model.config, source, PRECISIONS[precision])
        errors.append(float(np.square(ExportedModel([path]).logits(ids) - expected).mean()))
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_rows_are_within_half_a_step(bits: int) -> None:
    rows = np.random.default_rng(0).standard_normal((5, 100), np.float32)
    rows[2] = 0
    (stored,) = quantise([rows], BlockFormat(bits=bits, size=32))
    found = dequantised(stored.integers, stored.scales, stored.zero_points, bits, 100)
    steps = np.repeat(stored.scales, 32, 1)[:, :100]
    assert np.array_equal(found, stored.values(100, BlockFormat(bits=bits, size=32)))
    assert (np.abs(found - rows) <= 0.501 * steps + 1e-7).all()
    assert not found[2].any()
