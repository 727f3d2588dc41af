"""An adapter is what PEFT makes of such a model: which layers it has, how it is scaled, and who else can load it."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import reference
import torch
from conftest import run_split
from family_models import make_family_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as OF_PEFT
from safetensors.torch import load_file
from test_parity import assert_equals_centralised

from export import merge
from split_model import Adapter, EdgePart, LoraConfig, PretrainedModel, ServerPart, adapter_shapes, save_adapter
from split_model.dropout import SeededDropout
from split_model.families import FAMILIES
from split_model.lora import LoraLinear, side_by_side
from split_model.packing import Packing

LOGITS_TOLERANCE = 1e-5
LENGTHS = (9, 4)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PretrainedModel:
    return PretrainedModel(make_family_model(tmp_path_factory.mktemp("base"), request.param))


def random_adapter(model: PretrainedModel, lora: LoraConfig) -> Adapter:
    source = torch.Generator().manual_seed(5)
    shapes = adapter_shapes(model.config, lora, range(model.config.num_layers))
    return {name: torch.randn(shape, generator=source) * 0.2 for name, shape in shapes.items()}


def difference_of_logits(model: PretrainedModel, lora: LoraConfig, folder: Path) -> float:
    """Between both parts with a random adapter, and PEFT with the folder of it; relative to the largest logit."""
    adapter = random_adapter(model, lora)
    save_adapter(folder, adapter, model.config, lora, str(model.folder))
    where: dict[str, Any] = {"weight_dtype": torch.float32, "device": CPU}
    edge, server = EdgePart(model, 2, lora, **where), ServerPart(model, 2, lora, **where)
    for part in (edge, server):
        part.load_adapter({name: adapter[name] for name in part.adapter()})
    whole = reference.load_peft(model.folder, folder)
    source = np.random.default_rng(0)
    texts = [source.integers(0, model.config.vocabulary_size, length) for length in LENGTHS]
    with torch.no_grad():
        found = server.logits(edge(np.concatenate(texts), LENGTHS), LENGTHS)
        expected = torch.cat([whole(input_ids=torch.from_numpy(text)[None]).logits[0] for text in texts])
    return float((found - expected).abs().max() / expected.abs().max())


# Layers side by side


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("adapted", [(), (1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("stores_in_out", [True, False])
def test_gradients_of_layers_side_by_side_are_those_of_finite_differences(
    dropout: float, adapted: tuple[int, ...], stores_in_out: bool
) -> None:
    torch.manual_seed(3)
    config = LoraConfig(rank=2, dropout=dropout, targets=())
    rows, of_dropout = torch.randn(5, 6, dtype=torch.float64, requires_grad=True), SeededDropout(dropout, CPU)
    layers = [
        LoraLinear(torch.randn((6, width) if stores_in_out else (width, 6)).double(), None, stores_in_out=stores_in_out)
        for width in (4, 7, 3)
    ]
    matrices = [m for number in adapted for m in layers[number].adapt(config, of_dropout, torch.float64).values()]
    for matrix in matrices:
        torch.nn.init.normal_(matrix)
    of_dropout.seeds = [1, 2]
    of_dropout.begin(Packing([3, 2], CPU))

    def outputs(x: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return side_by_side(layers, x)

    assert torch.autograd.gradcheck(outputs, (rows, *matrices))
    for found, layer in zip(outputs(rows), layers, strict=True):
        expected = rows @ layer.matrix
        if layer.lora_A is not None and layer.lora_B is not None:
            expected = expected + config.scale * of_dropout(rows, layer.columns) @ layer.lora_A.T @ layer.lora_B.T
        torch.testing.assert_close(found, expected)


# Which layers


def test_layers_that_are_adapted_unless_others_are_named_are_those_of_peft() -> None:
    of_peft = {name: OF_PEFT[name] for name in FAMILIES if name in OF_PEFT}
    assert {name: list(FAMILIES[name].usual_targets) for name in of_peft} == of_peft
    # For others PEFT wants them named: as of the rest, those of queries and values.
    for family in (FAMILIES[name] for name in FAMILIES if name not in OF_PEFT):
        queries, *_, values = [layer.rpartition(".")[2] for layer in (*family.names.qkv, family.names.qkv[-1])]
        assert set(family.usual_targets) == {queries, values}, family.title


def test_all_linear_layers_are_those_of_peft(model: PretrainedModel) -> None:
    lora = LoraConfig(rank=3, targets=model.config.lora_targets)
    turned = model.config.family.stores_in_out
    config = peft.LoraConfig(r=3, target_modules="all-linear", fan_in_fan_out=turned, task_type="CAUSAL_LM")
    whole = peft.get_peft_model(reference.load_base(model.folder), config)
    of_peft = {name: tuple(matrix.shape) for name, matrix in peft.get_peft_model_state_dict(whole).items()}
    assert adapter_shapes(model.config, lora, range(model.config.num_layers)) == of_peft


# Who can load them


def test_adapter_of_each_layer_computes_in_peft_what_it_computes_here(model: PretrainedModel, tmp_path: Path) -> None:
    for target in model.config.lora_targets:
        lora = LoraConfig(rank=3, alpha=6.0, targets=(target,))
        assert difference_of_logits(model, lora, tmp_path / target) <= LOGITS_TOLERANCE, target


def test_rank_stabilised_adapter_computes_in_peft_what_it_computes_here(model: PretrainedModel, tmp_path: Path) -> None:
    lora = LoraConfig(rank=3, alpha=2.0, targets=model.config.lora_targets, rslora=True)
    assert lora.scale == 2 / math.sqrt(3)
    assert difference_of_logits(model, lora, tmp_path) <= LOGITS_TOLERANCE
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_rslora"] is True


def test_servers_of_many_adapters_find_each_matrix_by_its_name(model: PretrainedModel, tmp_path: Path) -> None:
    """vLLM and those that read as it does: a module's name between a fixed beginning and end, and plain LoRA's settings."""
    lora = LoraConfig(rank=3, targets=model.config.lora_targets)
    save_adapter(tmp_path, random_adapter(model, lora), model.config, lora, str(model.folder))
    modules = dict(reference.load_base(model.folder).named_modules())
    for name, matrix in reference.read_adapter(tmp_path).items():
        found = re.fullmatch(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight", name)
        assert found is not None
        module = modules[found["module"]]
        inputs, outputs = module.weight.shape if model.config.family.stores_in_out else reversed(module.weight.shape)
        assert tuple(matrix.shape) == ((3, inputs) if found["matrix"] == "A" else (outputs, 3))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    told = {name: settings[name] for name in ("peft_type", "r", "lora_alpha", "bias", "use_rslora", "target_modules")}
    targets = list(model.config.lora_targets)
    assert told == {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 32,
        "bias": "none",
        "use_rslora": False,
        "target_modules": targets,
    }
    assert not settings.get("modules_to_save")
    assert not settings.get("use_dora")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt2"])
def test_adapter_is_one_of_llama_cpp_under_its_names(tmp_path: Path, family: str) -> None:
    """
    Written as `convert_lora_to_gguf` writes it, by the names of the package gguf, and read back: each layer has both matrices,
    in the shapes that llama.cpp asks for before it loads them. It takes lora_alpha / rank for the scale.
    """
    gguf = pytest.importorskip("gguf")
    model = PretrainedModel(make_family_model(tmp_path, family))
    lora = LoraConfig(rank=3, alpha=6.0, targets=model.config.lora_targets)
    save_adapter(tmp_path / "adapter", random_adapter(model, lora), model.config, lora, str(model.folder))
    # A Mistral is a Llama there.
    kind = {"mistral": "LLAMA"}.get(family, family.upper())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind], model.config.num_layers)
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[kind]])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(settings["lora_alpha"]))
    for name, matrix in reference.read_adapter(tmp_path / "adapter").items():
        layer, _, which = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        of_llama_cpp = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
        assert of_llama_cpp is not None, name
        writer.add_tensor(f"{of_llama_cpp}.lora_{which.lower()}", matrix.numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()

    read = gguf.GGUFReader(tmp_path / "adapter.gguf")
    assert read.fields["adapter.lora.alpha"].contents() == 6.0
    found = {tensor.name: tuple(map(int, tensor.shape)) for tensor in read.tensors}
    whole = {}
    for name, matrix in reference.load_base(model.folder).state_dict().items():
        if name.rpartition(".")[0].rpartition(".")[2] in lora.targets and name.endswith(".weight"):
            outputs, inputs = matrix.shape
            of_llama_cpp = names.get_name(name, try_suffixes=(".weight",))
            whole |= {f"{of_llama_cpp}.lora_a": (inputs, 3), f"{of_llama_cpp}.lora_b": (3, outputs)}
    assert found == whole
    assert len(found) == 2 * len(model.config.layer_shapes) * model.config.num_layers


# Adapters of others


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"rank_pattern": {"up_proj": 7, "layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"up_proj": 5}}),
        ("llama", {"target_modules": ["down_proj"], "layers_to_transform": [1, 3]}),
        ("llama", {"target_modules": r"model\.layers\.[02]\.(self_attn\.[qv]|mlp\.gate)_proj"}),
        ("llama", {"exclude_modules": ["k_proj", "layers.2.mlp.up_proj"]}),
        ("llama", {"use_rslora": True}),
        ("llama", {"use_dora": True}),
        ("llama-biases", {"bias": "all"}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama", {"modules_to_save": ["norm"]}),
        ("qwen3", {"modules_to_save": ["q_norm"]}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("qwen2", {"init_lora_weights": "pissa"}),
        ("phi3", {"rank_pattern": {"gate_up_proj": 5}}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(f"{name}={value[name]}" for name in value)[:40],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's advice
def test_adapter_of_any_kind_is_merged_as_peft_merges_it(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    base = make_family_model(tmp_path, family)
    if "target_modules" not in options:
        options = {"target_modules": list(PretrainedModel(base).config.lora_targets), **options}
    torch.manual_seed(1)
    adapted = peft.get_peft_model(reference.load_base(base), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    merge(str(base), tmp_path / "merged", adapter=tmp_path / "adapter")
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 600, (2, 20)))
    with torch.no_grad():
        found = reference.load_base(tmp_path / "merged")(input_ids=ids).logits
        expected = reference.load_peft(base, tmp_path / "adapter").eval()(input_ids=ids).logits
        plain = reference.load_base(base)(input_ids=ids).logits
    assert float((expected - plain).abs().max()) > 0.01
    assert float((found - expected).abs().max()) <= LOGITS_TOLERANCE * float(expected.abs().max())


# How they are scaled


@pytest.mark.parametrize(
    ("dtype", "engines"), [("float64", ("torch",)), ("float32", ("onnxruntime", "torch"))], ids=["float64", "float32"]
)
def test_rank_stabilised_run_equals_that_of_peft(tmp_path: Path, dtype: str, engines: tuple[str, ...]) -> None:
    assert_equals_centralised(
        make_family_model(tmp_path, "llama"),
        tmp_path,
        batch_sizes=[2, 3],
        steps=20,
        dtype=dtype,
        engines=engines,
        cut_layer=2,
        lora_targets=("q_proj", "v_proj"),
        lora_rslora=True,
    )


def test_checkpoint_of_a_rank_stabilised_run_is_exported_with_its_scale(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    options = {"model": str(tiny_model), "run_dir": str(tmp_path / "run"), "cut_layer": 2, "lora_rank": 4, "lr": 2e-2}
    more = {"steps": 4, "checkpoint_every": 4, "lora_rslora": True}
    run_split({**options, **more}, {"a": {"data": pairs_file("a", 20), "batch_size": 3}})
    merge(str(tiny_model), tmp_path / "finished", run_dir=tmp_path / "run")
    description = json.loads((tmp_path / "run/run.json").read_text())
    del description["adapter"]  # as of a run that goes on
    (tmp_path / "run/run.json").write_text(json.dumps(description))
    merge(str(tiny_model), tmp_path / "unfinished", run_dir=tmp_path / "run")
    finished, unfinished = (load_file(tmp_path / name / "model.safetensors") for name in ("finished", "unfinished"))
    expected = reference.load_peft(tiny_model, tmp_path / "run/adapter").merge_and_unload().state_dict()
    for name in finished:
        assert torch.equal(unfinished[name], finished[name]), name
        assert torch.allclose(finished[name], expected[name], rtol=0, atol=2e-6), name
