"""Qwen3: a Qwen2 that normalises its queries and keys, head by head."""

from dataclasses import replace
from typing import Any

from ..config_file import ConfigFile
from ..model_config import Family, ModelConfig
from .llama import ATTENTION, MLP, NAMES, read_shape, settings_of_shape
from .qwen2 import read_windows, settings_of_windows

__all__ = ["FAMILY"]


def _read(file: ConfigFile) -> ModelConfig:
    shape = read_shape(file, key_value_heads=32, head_width=128, positions=32_768)
    without = () if file.boolean("attention_bias", False) else ATTENTION
    windows = read_windows(file, shape["num_layers"])
    return ModelConfig(family=FAMILY, without_bias=(*without, *MLP), windows=windows, normalises_heads=True, **shape)


def _settings(config: ModelConfig) -> dict[str, Any]:
    bias = {"attention_bias": ATTENTION[0] not in config.without_bias}
    return settings_of_shape(config) | settings_of_windows(config) | bias


FAMILY = Family(
    model_type="qwen3",
    title="Qwen3",
    architecture="Qwen3ForCausalLM",
    names=replace(NAMES, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
    usual_targets=("q_proj", "v_proj"),
    read=_read,
    settings=_settings,
)
