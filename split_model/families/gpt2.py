"""GPT-2."""

from typing import Any

from storage import ModelError

from ..config_file import ConfigFile
from ..decoder import ACTIVATIONS
from ..model_config import MOST_LAYERS, Family, ModelConfig, Names

__all__ = ["FAMILY"]

ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""Other names that transformers takes for a GPT-2's settings."""


def _read(file: ConfigFile) -> ModelConfig:
    file.rename(ALIASES)
    file.refuse("scale_attn_by_inverse_layer_idx")
    if not file.boolean("scale_attn_weights", True):
        raise file.wrong("scale_attn_weights", "true, the only attention that is supported,")
    width, num_heads = file.integer("n_embd"), file.integer("n_head")
    if width % num_heads:
        raise ModelError(f"{file.path}: n_embd {width} is not a multiple of n_head {num_heads}")
    return ModelConfig(
        family=FAMILY,
        num_layers=file.integer("n_layer", most=MOST_LAYERS),
        width=width,
        num_heads=num_heads,
        num_key_value_heads=num_heads,
        head_width=width // num_heads,
        inner_width=file.integer("n_inner") if file.has("n_inner") else 4 * width,
        num_positions=file.integer("n_positions" if file.has("n_positions") else "n_ctx"),
        vocabulary_size=file.integer("vocab_size"),
        norm_epsilon=file.number("layer_norm_epsilon", 1e-5),
        activation=file.one_of("activation_function", "gelu_new", ACTIVATIONS),
        tied_head=file.boolean("tie_word_embeddings", True),
        end_token=file.integer("eos_token_id", 50256, least=0),
    )


def _settings(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": config.num_layers,
        "n_embd": config.width,
        "n_head": config.num_heads,
        "n_inner": config.inner_width,
        "n_positions": config.num_positions,
        "vocab_size": config.vocabulary_size,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": config.activation,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": config.end_token,
        "eos_token_id": config.end_token,
    }


FAMILY = Family(
    model_type="gpt2",
    title="GPT-2",
    architecture="GPT2LMHeadModel",
    names=Names(
        prefix="transformer.",
        blocks="h",
        table="wte",
        positions="wpe",
        attention_norm="ln_1",
        qkv=("attn.c_attn",),
        projection="attn.c_proj",
        mlp_norm="ln_2",
        up=("mlp.c_fc",),
        down="mlp.c_proj",
        final_norm="ln_f",
        head="lm_head",
        other_modules=("drop",),
        other_modules_of_a_block=("attn.attn_dropout", "attn.resid_dropout", "mlp.act", "mlp.dropout"),
        constants_of_a_block=("attn.bias", "attn.masked_bias"),
    ),
    stores_in_out=True,
    usual_targets=("c_attn",),
    read=_read,
    settings=_settings,
    without_effect=frozenset(
        {
            *("n_ctx", "reorder_and_upcast_attn", "summary_activation", "summary_first_dropout", "summary_proj_to_labels"),
            *("summary_type", "summary_use_proj"),
        }
    ),
    position_keys=("n_positions", "n_ctx"),
)
