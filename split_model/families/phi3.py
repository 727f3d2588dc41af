"""
Phi-3 with positions as they were trained (4k, not 128k): a Llama whose linear layers of one input are one, and which may turn
a part of each head.
"""

from dataclasses import replace
from typing import Any

from ..config_file import ConfigFile
from ..model_config import Family, ModelConfig
from .llama import NAMES, read_shape, settings_of_shape

__all__ = ["FAMILY"]


def _read(file: ConfigFile) -> ModelConfig:
    shape = read_shape(file, epsilon=1e-5, positions=4096, may_be_partial=True, scalings=("default",))
    file.integer("original_max_position_embeddings", 4096)  # of a scaling that is refused
    window = file.integer("sliding_window") if file.has("sliding_window") else None
    windows = () if window is None else (window,) * shape["num_layers"]
    return ModelConfig(family=FAMILY, without_bias=tuple(LAYERS), windows=windows, **shape)


def _settings(config: ModelConfig) -> dict[str, Any]:
    return settings_of_shape(config) | {"sliding_window": config.window(0)}


LAYERS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")

FAMILY = Family(
    model_type="phi3",
    title="Phi-3",
    architecture="Phi3ForCausalLM",
    names=replace(
        NAMES,
        qkv=LAYERS[:1],
        up=LAYERS[2:3],
        other_modules_of_a_block=("mlp.activation_fn", "resid_attn_dropout", "resid_mlp_dropout"),
    ),
    usual_targets=("qkv_proj",),
    read=_read,
    settings=_settings,
)
