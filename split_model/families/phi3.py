"""
Phi-3 and 3.5, and Phi-4-mini: a Llama whose linear layers of one input are one, and which may turn a part of each head. Models
of 128k positions have the 4k here that they were pretrained with.
"""

from dataclasses import replace
from typing import Any

from ..config_file import ConfigFile
from ..model_config import Family, ModelConfig
from ..rotary import LONGROPE, LongRotary
from .llama import NAMES, read_shape, settings_of_shape

__all__ = ["FAMILY"]


def _read(file: ConfigFile) -> ModelConfig:
    shape = read_shape(
        file,
        epsilon=1e-5,
        positions=4096,
        may_be_partial=True,
        scalings=("default", LONGROPE),
        pretrained_positions=file.integer("original_max_position_embeddings", 4096),
    )
    if isinstance(shape["rotary"], LongRotary):
        shape["num_positions"] = min(shape["num_positions"], shape["rotary"].pretrained_positions)
    window = file.integer("sliding_window") if file.has("sliding_window") else None
    windows = () if window is None else (window,) * shape["num_layers"]
    return ModelConfig(family=FAMILY, without_bias=tuple(LAYERS), windows=windows, **shape)


def _settings(config: ModelConfig) -> dict[str, Any]:
    settings = settings_of_shape(config) | {"sliding_window": config.window(0)}
    if isinstance(config.rotary, LongRotary):
        settings["max_position_embeddings"] = config.rotary.positions_beyond
        settings["original_max_position_embeddings"] = config.rotary.pretrained_positions
    return settings


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
