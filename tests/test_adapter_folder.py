"""Adapter folders of other people: what is merged is what PEFT merges, and what cannot be is one sentence within seconds."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import make_model
from family_models import make_family_model
from onnx_reference import largest_difference, logits_of, random_ids
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from export import ExportError, export_onnx, merge
from export.adapter_folder import Targets
from export.peft_merge import load_with_peft
from export.run_directory import RunDirectory
from split_model import LoraConfig as OurLora
from split_model import PretrainedModel, load_adapter
from storage import AdapterError, AdapterSettings

GPT2 = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 blocks, d = 16: small, for PEFT makes a decomposition of every matrix."""
    return make_model(tmp_path_factory.mktemp("model"), n_layer=2, n_embd=16, n_head=2)


def save_peft(model: Path, folder: Path, *, seed: int = 1, save_embedding_layers: bool = False, **options: Any) -> Path:
    """What PEFT writes of an adapter after some training: its matrices are as they were initialised, and noise."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(
            reference.load_base(model), LoraConfig(**{**GPT2, "target_modules": ["c_attn"], "r": 4} | options)
        )
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        adapted.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return folder


def change(folder: Path, **settings: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def logits_of_merged(model: Path, adapter: Path, out: Path) -> np.ndarray[Any, Any]:
    merge(str(model), out, adapter=adapter)
    return logits_of(reference.load_base(out), random_ids(600, 2, 20))


def logits_of_peft(model: Path, adapter: Path) -> np.ndarray[Any, Any]:
    """Not merged: PEFT merges what is done to one of two tied matrices into both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits_of(reference.load_peft(model, adapter).eval(), random_ids(600, 2, 20))


@pytest.mark.parametrize(
    "options",
    [
        *({"init_lora_weights": way} for way in ("pissa", "gaussian", "orthogonal", "eva")),
        {
            "init_lora_weights": "olora",
            "target_modules": ["attn.c_proj"],
        },  # of GPT-2's matrices, PEFT's OLoRA takes square ones
        {"target_modules": ["c_attn", "wte"]},
        {"target_modules": ["c_attn", "lm_head"]},
        {"target_modules": ["c_attn", "wte", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 5]},
        {"save_embedding_layers": True},
        {"modules_to_save": ["wte", "ln_f"]},
        {"use_dora": True},
        {"exclude_modules": ["h.0.attn.c_attn"]},
        {"target_modules": "all-linear"},
        {"layers_to_transform": 0},
        {"layers_to_transform": [1], "layers_pattern": "h"},
    ],
    ids=repr,
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's advice
def test_merging_gives_what_peft_gives(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    adapter = save_peft(model, tmp_path / "adapter", **options)
    expected = logits_of_peft(model, adapter)
    assert largest_difference(expected, logits_of(reference.load_base(model), random_ids(600, 2, 20))) > 1e-3
    assert largest_difference(logits_of_merged(model, adapter, tmp_path / "out"), expected) < 2e-5


def test_what_peft_merges_keeps_the_settings_of_its_base(tmp_path: Path) -> None:
    """Of which this package needs no more than a part: a dynamic scaling only counts beyond the longest text that it takes."""
    (tmp_path / "model").mkdir()
    model = make_family_model(tmp_path / "model", "llama-dynamic", bos_token_id=7, attention_dropout=0.25)
    adapter = save_peft(model, tmp_path / "adapter", target_modules=["q_proj"], fan_in_fan_out=False, use_dora=True)
    merge(str(model), tmp_path / "out", adapter=adapter)
    plain = save_peft(model, tmp_path / "plain", target_modules=["q_proj"], fan_in_fan_out=False)
    merge(str(model), tmp_path / "as plain", adapter=plain)
    for name in ("config.json", "generation_config.json"):
        merged, of_plain = (json.loads((tmp_path / folder / name).read_text()) for folder in ("out", "as plain"))
        assert merged == of_plain
    assert json.loads((tmp_path / "out/config.json").read_text())["rope_parameters"]["rope_type"] == "dynamic"
    ids = random_ids(600, 1, 2 * PretrainedModel(model).config.num_positions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = logits_of(reference.load_peft(model, adapter).eval(), ids)
    assert largest_difference(logits_of(reference.load_base(tmp_path / "out"), ids), expected) < 1e-4


@pytest.mark.parametrize("way", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_adapter_whose_initialisation_changed_the_base_is_neither_continued_nor_kept_apart(
    model: Path, tmp_path: Path, way: str
) -> None:
    adapter = change(save_peft(model, tmp_path / "adapter"), init_lora_weights=way)
    with pytest.raises(AdapterError, match=f'only plain LoRA can be continued; this adapter uses init_lora_weights="{way}"'):
        load_adapter(adapter, PretrainedModel(model).config, OurLora(rank=4, alpha=8, targets=("c_attn",)))
    with pytest.raises(ExportError, match=f'init_lora_weights="{way}"; only merging can export it'):
        export_onnx(str(model), tmp_path / "out", adapter=adapter, keep_adapter=True)


def test_adapter_whose_initialisation_changed_the_base_at_random_is_refused(model: Path, tmp_path: Path) -> None:
    adapter = save_peft(model, tmp_path / "adapter", init_lora_weights="pissa_niter_4")
    with pytest.raises(ExportError, match=r"\(pissa_niter_4\) changed the base model .* at random, .*path_initial_model_for"):
        merge(str(model), tmp_path / "out", adapter=adapter)


@pytest.mark.parametrize("ranges", [[[0, 2]], [[0, 4], [2, 4]], [[0, 2], [0, 2]]])
def test_adapter_that_repeats_blocks_or_leaves_some_out_is_refused(tmp_path: Path, ranges: list[list[int]]) -> None:
    model = make_family_model(tmp_path, "llama")
    num_layers = PretrainedModel(model).config.num_layers
    options = {"target_modules": ["q_proj"], "fan_in_fan_out": False}
    adapter = save_peft(model, tmp_path / "adapter", layer_replication=ranges, **options)
    for export in (merge, export_onnx):
        with pytest.raises(
            ExportError, match=rf"layer_replication \[\[0, .* than the model's {num_layers}, or for one of them twice"
        ):
            export(str(model), tmp_path / "out", adapter=adapter)


def test_adapter_that_changes_the_order_of_blocks_is_merged(tmp_path: Path) -> None:
    model = make_family_model(tmp_path, "llama")
    last = PretrainedModel(model).config.num_layers
    options = {"target_modules": ["q_proj"], "fan_in_fan_out": False}
    adapter = save_peft(model, tmp_path / "adapter", layer_replication=[[last - 1, last], [0, last - 1]], **options)
    merge(str(model), tmp_path / "out", adapter=adapter)
    ids = random_ids(600, 1, 20)
    expected = logits_of(reference.load_peft(model, adapter).eval(), ids)
    assert largest_difference(logits_of(reference.load_base(tmp_path / "out"), ids), expected) < 1e-4


@pytest.mark.parametrize("way", [True, False, "gaussian", "eva", "orthogonal"])
def test_other_initialisations_are_plain_lora(model: Path, tmp_path: Path, way: Any) -> None:
    adapter = change(save_peft(model, tmp_path / "adapter"), init_lora_weights=way)
    assert load_adapter(adapter, PretrainedModel(model).config, OurLora(rank=4, alpha=8, targets=("c_attn",)))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_adapter_is_continued_in_float32_at_least(model: Path, tmp_path: Path, stored: torch.dtype) -> None:
    weights = save_peft(model, tmp_path / "adapter") / "adapter_model.safetensors"
    save_file({name: matrix.to(stored) for name, matrix in load_file(weights).items()}, weights)
    loaded = load_adapter(weights.parent, PretrainedModel(model).config, OurLora(rank=4, alpha=8, targets=("c_attn",)))
    kept = load_file(weights)
    for name, matrix in loaded.items():
        assert matrix.dtype == torch.promote_types(stored, torch.float32)
        assert torch.equal(matrix, kept[name].to(matrix.dtype))


PATTERNS = [
    *("c_attn", "attn.c_attn", "h.0.attn.c_attn", "transformer.h.0.attn.c_attn", "^h.0.attn.c_attn", "attn", "tn", "mlp", ""),
    *("^transformer.h.0", "^transformer.h.0.attn.c_attn", "^transformer.h.0.attn.c_attn$", "c_attn|c_fc", "(c_attn|c_fc)"),
    *(r"h\.\d+\.mlp\.c_.*", r".*\.c_proj", r"h.[13].*c_proj", r"\d.attn.c_proj", "^c_attn", "c_attn$", ".c_fc", "C_ATTN", "h"),
    *("(?i:C_ATTN)", "h.0.*|h.1.*", "^transformer.h.(1|2)", "c_fc()", r"\w+", "a^", "é", "-"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_choose_the_ranks_and_alphas_that_peft_chooses(tiny_model: Path, pattern: str) -> None:
    patterns = {pattern: 7, "c_proj": 3, "h.1.mlp.c_fc": 2}
    values = {"r": 4, "lora_alpha": 9, "bias": "none", "rank_pattern": patterns, "alpha_pattern": patterns}
    config = PretrainedModel(tiny_model).config
    values["target_modules"] = ["c_attn", "c_proj", "c_fc"]
    targets = Targets(AdapterSettings(path=Path("adapter_config.json"), values=values), config)
    assert len(targets.layers) == 16
    for layer in targets.layers:
        assert targets.rank(layer) == patterns.get(get_pattern_key(patterns.keys(), layer), 4)
        assert targets.scale(layer) == patterns.get(get_pattern_key(patterns.keys(), layer), 9) / targets.rank(layer)


@pytest.mark.parametrize("names", [["c_attn"], ["attn.c_proj", "h.1.mlp.c_fc"], ["proj"], ["h.2"], *PATTERNS])
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_targets_are_the_layers_that_peft_chooses(tiny_model: Path, key: str, names: Any) -> None:
    values = {"target_modules": ["c_attn", "c_proj", "c_fc"], key: names}
    config = PretrainedModel(tiny_model).config
    targets = Targets(AdapterSettings(path=Path("adapter_config.json"), values=values), config)
    theirs = LoraConfig(**values)
    layers = [f"transformer.h.{block}.{layer}" for block in range(config.num_layers) for layer in config.layer_shapes]
    excluded = [layer for layer in layers if type(check_target_module_exists(theirs, layer)).__name__ == "_ExcludedModule"]
    chosen = [layer for layer in layers if layer not in excluded and check_target_module_exists(theirs, layer)]
    assert targets.layers == (chosen if names else [layer for layer in layers if key == "exclude_modules"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": float("inf")}, "lora_alpha is Infinity; it must be a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000.*; it must be a finite number"),
        ({"lora_alpha": None}, "lora_alpha is null; it must be a finite number"),
        ({"r": True}, "r is true; it must be a positive integer"),
        ({"r": 0}, "r is 0; it must be a positive integer"),
        ({"r": 10**9}, "h.0.attn.c_attn has rank 1000000000, and no matrix is that large"),
        ({"r": 10**9, "use_dora": True}, "h.0.attn.c_attn has rank 1000000000, and no matrix is that large"),
        ({"bias": []}, r'bias is \[\]; it must be "none"'),
        ({"rank_pattern": {"c_attn": "x"}}, 'rank_pattern is {"c_attn": "x"}; it must be a map from patterns'),
        ({"target_modules": [1]}, r"target_modules is \[1\]; it must be a list of names"),
        ({"alpha_pattern": {"(": 3}}, "'\\(' is not a regular expression: missing \\)"),
        ({"rank_pattern": {"(" * 5000 + ")" * 5000: 3}}, "is not a regular expression: maximum recursion depth"),
        ({"alpha_pattern": {"(([a-z.0-9_]+)*)*[A-Z]": 3}}, "matching takes longer than 1 s; simplify the pattern"),
        ({"target_modules": ".*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*X"}, "matching takes longer than 1 s"),
        ({"modules_to_save": ["(.|.)*X"]}, "matching takes longer than 1 s"),
        ({"megatron_core": "antigravity", "megatron_config": {"a": 1}}, "name Python code to be imported; remove them"),
        ({"use_dora": True}, "h.0.attn.c_attn.lora_magnitude_vector is missing, which its settings ask for"),
        ({"target_modules": ["c_fc"]}, "h.0.mlp.c_fc.lora_A.weight is missing, which its settings ask for"),
        ({"layers_to_transform": [1]}, "PEFT has no use for .*h.0.attn.c_attn.lora_A.weight with these settings"),
        ({"later": {"a": 1}}, "PEFT .* knows no later; a newer one may"),
        ({"init_lora_weights": "corda"}, "PEFT cannot merge this adapter: `eigens` attribute not found"),
        ({"init_lora_weights": "corba"}, "PEFT cannot merge this adapter: Unknown initialization"),
    ],
)
def test_settings_that_mean_nothing_are_one_sentence(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("export.patterns.LIMIT_SECONDS", 1)
    adapter = change(save_peft(model, tmp_path / "adapter"), **settings)
    with pytest.raises((ExportError, AdapterError), match=message):
        merge(str(model), tmp_path / "out", adapter=adapter)
    assert not (tmp_path / "out").exists()


def test_peft_is_given_no_pickled_weights(model: Path, tmp_path: Path) -> None:
    adapter = save_peft(model, tmp_path / "adapter")
    safe = adapter / "adapter_model.safetensors"
    torch.save(load_file(safe), adapter / "adapter_model.bin")
    safe.unlink()
    with pytest.raises(ExportError, match=r"adapter_model\.safetensors is missing"):
        load_with_peft(PretrainedModel(model), adapter)


def test_peft_is_given_no_pattern_without_end(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.patterns.LIMIT_SECONDS", 1)
    adapter = change(save_peft(model, tmp_path / "adapter"), target_modules=".*" * 18 + "X")
    with pytest.raises(ExportError, match="matching takes longer than 1 s"):
        load_with_peft(PretrainedModel(model), adapter)


def test_nested_settings_are_one_sentence(model: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type":' + "[" * 200_000)
    with pytest.raises(AdapterError, match=r"adapter_config.json cannot be read: its JSON is nested too deeply"):
        merge(str(model), tmp_path / "out", adapter=tmp_path)


def test_settings_with_a_byte_order_mark_are_read(model: Path, tmp_path: Path) -> None:
    adapter = save_peft(model, tmp_path / "adapter")
    expected = logits_of_peft(model, adapter)
    path = adapter / "adapter_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert largest_difference(logits_of_merged(model, adapter, tmp_path / "out"), expected) < 2e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_matrices_that_are_no_numbers_are_refused(model: Path, tmp_path: Path, value: float) -> None:
    adapter = save_peft(model, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    matrices = load_file(path)
    name = next(iter(matrices))
    matrices[name][0, 0] = value
    save_file(matrices, path)
    message = f"{name} has values that are not finite numbers; the adapter cannot be used"
    with pytest.raises(ExportError, match=message):
        merge(str(model), tmp_path / "out", adapter=adapter)
    with pytest.raises(AdapterError, match=message):
        load_adapter(adapter, PretrainedModel(model).config, OurLora(rank=4, alpha=8, targets=("c_attn",)))


def test_product_beyond_float32_is_refused(model: Path, tmp_path: Path) -> None:
    adapter = change(save_peft(model, tmp_path / "adapter"), lora_alpha=2e38)
    path = adapter / "adapter_model.safetensors"
    save_file({name: 1e3 * matrix for name, matrix in load_file(path).items()}, path)
    with pytest.raises(ExportError, match=r"with the adapter, the tensor h.0.attn.c_attn.weight is beyond the largest float32"):
        merge(str(model), tmp_path / "out", adapter=adapter)


@pytest.mark.parametrize("keep_adapter", [False, True])
def test_base_model_that_is_no_number_is_named(model: Path, tmp_path: Path, keep_adapter: bool) -> None:
    adapter = save_peft(model, tmp_path / "adapter")
    base = reference.load_base(model)
    base.transformer.ln_f.weight.data[3] = float("nan")
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base/tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    with pytest.raises(ExportError, match=r"the base model's tensor ln_f.weight has values that are not finite numbers"):
        export_onnx(str(tmp_path / "base"), tmp_path / "out", adapter=adapter, keep_adapter=keep_adapter)


@pytest.mark.parametrize(
    ("setting", "value", "why"),
    [
        ("lora_targets", [], "LoRA targets must be among c_attn, c_proj, c_fc; got none"),
        ("lora_targets", ["foo"], "LoRA targets must be among c_attn, c_proj, c_fc; got foo"),
        ("lora_targets", "c_attn", 'lora_targets is "c_attn"; a list is expected'),
        ("lora_targets", [1], r"lora_targets is \[1\]; a list of texts is expected"),
        ("lora_rank", None, "lora_rank is null; a whole number is expected"),
        ("lora_rank", 0, "LoRA rank must be at least 1, got 0"),
        ("lora_alpha", "8", 'lora_alpha is "8"; a number is expected'),
        ("lora_alpha", 10**400, "int too large to convert to float"),
        ("model", 3, "model is 3; a text is expected"),
    ],
)
@pytest.mark.parametrize("reached", [None, {"step": 1, "of": 1}])
def test_setting_of_a_run_that_cannot_be_is_told_with_its_file(
    tiny_model: Path, tmp_path: Path, setting: str, value: Any, why: str, reached: Any
) -> None:
    model = PretrainedModel(tiny_model)
    config = {"model": "m", "lora_rank": 2, "lora_alpha": 8, "lora_targets": ["c_attn"], setting: value}
    described = {"run": "r", "fingerprint": model.fingerprint(), "config": config, "dtype": "float32", "adapter": reached}
    (tmp_path / "run.json").write_text(json.dumps(described), encoding="utf-8")
    remedy = "; restore the file, or choose another run directory"
    with pytest.raises(ExportError, match=f"^{re.escape(str(tmp_path))}/run.json: {why}{remedy}$"):
        RunDirectory(tmp_path).adapter(model, tmp_path)
