"""Model families: a file each, and their names stand nowhere else."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from family_models import OPTIONS, make_family_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import graphs.activations
import split_model.pretrained_model
from export.decoder_graph import ACTIVATIONS as EXPORTED_ACTIVATIONS
from split_model import LoraConfig, PretrainedModel, adapter_shapes
from split_model.decoder import ACTIVATIONS
from split_model.families import FAMILIES, read_config
from storage import AdapterError, ModelError, load_tokenizer

PACKAGES = ("edge_client", "export", "gpu_server", "graphs", "protocol", "split_model", "storage", "terminal")
NAMES = re.compile(
    r"\b(wte|wpe|c_attn|c_proj|c_fc|ln_1|ln_2|ln_f|lm_head|n_embd|n_layer|n_head|n_inner|n_positions|n_ctx)\b"
    r"|\b(embed_tokens|self_attn|input_layernorm|post_attention_layernorm|[qkvo]_proj|(gate|up|down|qkv|gate_up)_proj|[qk]_norm)\b"
    r"|\b(hidden_size|intermediate_size|num_attention_heads|rms_norm_eps|sliding_window|layer_types)\b"
    r"|GPT2\w*|gpt2\w*|[Ll]lama\w*|[Mm]istral\w*|[Qq]wen\w*|[Pp]hi3\w*|[Ss]tar[Cc]oder\w*|transformer\.(h|wte|wpe|ln_f)\b"
)
EXCEPTIONS = {
    # The words of the flag --lora-targets; "gpt2" as the example of a name on the hub.
    "gpu_server/config.py": {"q_proj", "v_proj", "gpt2"},
    "gpu_server/sdk.py": {"gpt2"},
    "edge_client/cli.py": {"gpt2"},
    "edge_client/leak/flags.py": {"gpt2"},
    "export/cli.py": {"gpt2"},
    # onnxruntime-genai's words, for models of any family.
    "export/model_files.py": {"hidden_size", "num_attention_heads"},
    # A scaling of frequencies, which models of any family may have.
    "split_model/rotary.py": {"Llama", "llama3"},
    # Under which keys config.json says it, for whoever reads nothing else of a model.
    "storage/model_folder.py": {"n_positions", "n_ctx"},
    # A class of tokenizers, likewise.
    "storage/tokenizer.py": {
        "GPT2",
        "gpt2",
        "GPT2Tokenizer",
        "Qwen2Tokenizer",
        "qwen2",
        "qwen3",
        "LlamaTokenizer",
        "mistral",
        "phi3",
    },
}


def names_in(file: Path) -> set[str]:
    return {found[0] for found in NAMES.finditer(file.read_text(encoding="utf-8"))}


def test_names_of_a_family_stand_in_files_of_families() -> None:
    files = [file for package in PACKAGES for file in sorted((REPOSITORY / package).rglob("*.py"))]
    found = {file.relative_to(REPOSITORY).as_posix(): names_in(file) for file in files if file.parent.name != "families"}
    assert {file: names for file, names in found.items() if names} == EXCEPTIONS


def test_each_family_has_a_file_named_after_it() -> None:
    folder = REPOSITORY / "split_model/families"
    assert {file.stem for file in folder.glob("*.py")} - {"__init__"} == set(FAMILIES)


def test_every_family_has_options_that_are_tested() -> None:
    assert {model_type for model_type, _ in OPTIONS.values()} == set(FAMILIES)


def test_every_activation_can_be_trained_and_exported_and_handed_to_devices() -> None:
    assert set(ACTIVATIONS) == set(graphs.activations.ACTIVATIONS) == {*EXPORTED_ACTIVATIONS, "silu"}


@pytest.mark.parametrize("option", OPTIONS)
def test_configuration_comes_back_from_what_it_tells_transformers(tmp_path: Path, option: str) -> None:
    config = PretrainedModel(make_family_model(tmp_path, option)).config
    told = {"model_type": config.family.model_type, **config.family.settings(config)}
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert read_config(tmp_path / "config.json").identity() == config.identity()


@pytest.mark.parametrize("option", OPTIONS)
def test_option_that_is_not_known_is_refused_by_its_name(tmp_path: Path, option: str) -> None:
    make_family_model(tmp_path, option)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"residual_scale": 0.5, "idle": False}))
    with pytest.raises(ModelError, match=r"config\.json: residual_scale is 0\.5, an option that is not known here"):
        read_config(path)


@pytest.mark.parametrize(
    ("targets", "found"), [((), "none"), (("c_attn", "q_proj"), "q_proj"), (("attn.c_attn",), "attn.c_attn")]
)
def test_target_of_another_family_is_refused_where_settings_meet_the_model(
    tiny_model: Path, targets: tuple[str, ...], found: str
) -> None:
    lora = LoraConfig(rank=2, targets=targets)
    with pytest.raises(AdapterError, match=f"^LoRA targets must be among c_attn, c_proj, c_fc; got {re.escape(found)}$"):
        adapter_shapes(PretrainedModel(tiny_model).config, lora, range(1))


def test_target_adapts_all_layers_whose_names_end_with_it(tiny_model: Path) -> None:
    """As PEFT's target_modules do."""
    shapes = adapter_shapes(PretrainedModel(tiny_model).config, LoraConfig(rank=2, targets=("c_proj",)), range(1))
    block = "base_model.model.transformer.h.0"
    assert shapes == {
        f"{block}.attn.c_proj.lora_A.weight": (2, 32),
        f"{block}.attn.c_proj.lora_B.weight": (32, 2),
        f"{block}.mlp.c_proj.lora_A.weight": (2, 128),
        f"{block}.mlp.c_proj.lora_B.weight": (32, 2),
    }


def write_ends(model: Path, *, config: object, generation: object) -> PretrainedModel:
    for name, ends in (("config.json", config), ("generation_config.json", generation)):
        raw = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(raw | {"eos_token_id": ends}))
    return PretrainedModel(model)


@pytest.mark.parametrize(
    ("config", "generation", "others"),
    [
        *((0, 0, ()), ([7, 0, 9], None, (7, 9)), (0, [11, 0], (11,)), ([0, 7], [9, 11], (9, 11)), (7, [7, 0], (7,))),
        *((7, 0, ()), ([7, 0], 0, ()), (0, 7, (7,))),
    ],
)
def test_tokenizer_says_which_token_ends_a_text_and_all_others_only_stop_a_model(
    tmp_path: Path, config: object, generation: object, others: tuple[int, ...]
) -> None:
    folder = make_family_model(tmp_path, "llama")
    fingerprint = PretrainedModel(folder).fingerprint()
    model = write_ends(folder, config=config, generation=generation)
    assert (model.config.end_token, model.config.stop_tokens) == (0, others)
    assert model.fingerprint() == fingerprint
    if generation is not None:
        reference = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
        assert set(model.config.ends) == {0, *(reference if isinstance(reference, list) else [reference])}


def test_tokenizer_is_read_once_where_several_tokens_end_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, num_read = make_family_model(tmp_path, "llama"), 0

    def counting(folder: Path) -> Tokenizer:
        nonlocal num_read
        num_read += 1
        return load_tokenizer(folder)

    monkeypatch.setattr(split_model.pretrained_model, "load_tokenizer", counting)
    assert write_ends(folder, config=[7, 0], generation=[0, 9]).config.stop_tokens == (9,)
    assert num_read == 1


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([0, 600], "generation_config.json: eos_token_id 600 is not below the vocabulary's 600 tokens; correct the file"),
        ("</s>", 'generation_config.json: eos_token_id is "</s>"; a whole number from 0'),
    ],
)
def test_ends_that_are_no_tokens_are_refused(tmp_path: Path, ends: object, message: str) -> None:
    folder = make_family_model(tmp_path, "llama")
    with pytest.raises(ModelError, match=re.escape(message)):
        write_ends(folder, config=0, generation=ends)


@pytest.mark.parametrize("option", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("said", [{"num_key_value_heads": None}, {"num_key_value_heads": 4}])
def test_heads_of_keys_that_are_null_are_as_many_as_those_of_queries(tmp_path: Path, option: str, said: dict[str, Any]) -> None:
    """A key that is not there stands for the family's default instead."""
    path = make_family_model(tmp_path, option) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    assert read_config(path).num_key_value_heads == 4


@pytest.mark.parametrize(
    ("option", "said", "windows"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": None, "layer_types": None}, ()),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 7, "layer_types": None, "max_window_layers": 3},
            (None, None, None, 7),
        ),
        ("qwen3", {"use_sliding_window": False, "sliding_window": 7, "layer_types": None, "max_window_layers": 0}, ()),
        ("mistral", {"sliding_window": None}, ()),
    ],
)
def test_windows_are_those_of_transformers(
    tmp_path: Path, option: str, said: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    from transformers import AutoConfig

    path = make_family_model(tmp_path, option) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    config, reference = read_config(path), AutoConfig.from_pretrained(tmp_path)
    kinds = getattr(reference, "layer_types", None) or ["sliding_attention"] * 4
    assert config.windows == windows
    assert [config.window(block) for block in range(4)] == [
        reference.sliding_window if kind == "sliding_attention" else None for kind in kinds
    ]


@pytest.mark.parametrize("said", [{"use_sliding_window": False}, {"use_sliding_window": True, "sliding_window": None}])
def test_blocks_with_windows_of_no_width_are_refused(tmp_path: Path, said: dict[str, Any]) -> None:
    path = make_family_model(tmp_path, "qwen2-windows") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    with pytest.raises(ModelError, match="layer_types asks for windows, and use_sliding_window or sliding_window for none"):
        read_config(path)
