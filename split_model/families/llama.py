"""Llama 2 and 3, TinyLlama, SmolLM2, and all others that are stored as Llamas are; the names that its descendants have kept."""

from typing import Any

from storage import ModelError

from ..config_file import ConfigFile
from ..decoder import ACTIVATIONS
from ..model_config import LAYER_NORM, MOST_LAYERS, RMS_NORM, Family, ModelConfig, Names
from ..rotary import read_rotary

__all__ = ["ATTENTION", "FAMILY", "MLP", "NAMES", "QKV", "read_shape", "settings_of_shape"]

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION, MLP = (*QKV, "self_attn.o_proj"), ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = Names(
    prefix="model.",
    blocks="layers",
    table="embed_tokens",
    attention_norm="input_layernorm",
    qkv=QKV,
    projection="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    final_norm="norm",
    head="lm_head",
    other_modules=("rotary_emb",),
    other_modules_of_a_block=("mlp.act_fn",),
    constants_of_a_block=("self_attn.rotary_emb.inv_freq",),
)
EPSILON = {RMS_NORM: "rms_norm_eps", LAYER_NORM: "norm_epsilon"}
"""Where config.json says it, by the norm."""


def read_shape(
    file: ConfigFile,
    *,
    key_value_heads: int | None = None,
    norm: str = RMS_NORM,
    epsilon: float = 1e-6,
    activation: str = "silu",
    tied_head: bool = False,
    head_width: int | None = None,
    positions: int = 2048,
    **of_rotary: Any,
) -> dict[str, Any]:
    """
    What Llama and its descendants say alike, as arguments of `ModelConfig`.

    Args:
        norm: of the family.
        key_value_heads, epsilon, activation, tied_head, head_width, positions: the family's defaults in transformers; None: as
            many heads of keys as of queries, and as wide as the heads of queries make the width.
        of_rotary: see `read_rotary`.
    """
    width, num_heads = file.integer("hidden_size"), file.integer("num_attention_heads")
    # null stands for as many heads as there are of queries, whatever the family's default is.
    if file.is_null("num_key_value_heads"):
        key_value_heads = num_heads
    else:
        key_value_heads = file.integer("num_key_value_heads", key_value_heads or num_heads)
    if file.has("head_dim"):
        head_width = file.integer("head_dim")
    elif head_width is None:
        if width % num_heads:
            raise ModelError(f"{file.path}: hidden_size {width} is not a multiple of num_attention_heads {num_heads}")
        head_width = width // num_heads
    num_positions = file.integer("max_position_embeddings", positions)
    ends = file.integers("eos_token_id")
    if not ends:
        raise ModelError(
            f"{file.path}: eos_token_id is missing; a text has to end with a token: add the id of the tokenizer's eos_token"
        )
    return {
        "num_layers": file.integer("num_hidden_layers", most=MOST_LAYERS),
        "width": width,
        "num_heads": num_heads,
        "num_key_value_heads": key_value_heads,
        "head_width": head_width,
        "inner_width": file.integer("intermediate_size"),
        "num_positions": num_positions,
        "vocabulary_size": file.integer("vocab_size"),
        "norm": norm,
        "norm_epsilon": file.number(EPSILON[norm], epsilon),
        "activation": file.one_of("hidden_act", activation, ACTIVATIONS),
        "is_gated": True,
        "tied_head": file.boolean("tie_word_embeddings", tied_head),
        "end_token": ends[0],
        "stop_tokens": ends[1:],
        "rotary": read_rotary(file, head_width, num_positions, **of_rotary),
    }


def settings_of_shape(config: ModelConfig) -> dict[str, Any]:
    """The way back from `read_shape`."""
    assert config.rotary is not None
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.inner_width,
        "max_position_embeddings": config.num_positions,
        "vocab_size": config.vocabulary_size,
        EPSILON[config.norm]: config.norm_epsilon,
        "hidden_act": config.activation,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": None,
        "eos_token_id": [config.end_token, *config.stop_tokens] if config.stop_tokens else config.end_token,
        "pad_token_id": None,
        "rope_parameters": config.rotary.settings(config.head_width),
    }


def _read(file: ConfigFile) -> ModelConfig:
    without: tuple[str, ...] = () if file.boolean("attention_bias", False) else ATTENTION
    without += () if file.boolean("mlp_bias", False) else MLP
    return ModelConfig(family=FAMILY, without_bias=without, **read_shape(file))


def _settings(config: ModelConfig) -> dict[str, Any]:
    biases = {"attention_bias": ATTENTION[0] not in config.without_bias, "mlp_bias": MLP[0] not in config.without_bias}
    return settings_of_shape(config) | biases


FAMILY = Family(
    model_type="llama",
    title="Llama",
    architecture="LlamaForCausalLM",
    names=NAMES,
    usual_targets=("q_proj", "v_proj"),
    read=_read,
    settings=_settings,
    # The first splits products and changes no result; the second stands in files of SmolLM2, and no program reads it.
    without_effect=frozenset({"pretraining_tp", "is_llama_config"}),
)
