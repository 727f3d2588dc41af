"""Mistral 7B: a Llama of which a token sees only the last tokens."""

from typing import Any

from ..config_file import ConfigFile
from ..model_config import Family, ModelConfig
from .llama import ATTENTION, MLP, NAMES, read_shape, settings_of_shape

__all__ = ["FAMILY"]


def _read(file: ConfigFile) -> ModelConfig:
    file.refuse("layer_types")
    shape = read_shape(file, key_value_heads=8, positions=131_072)
    # null is a model without windows; a key that is not there is one with those of transformers' default.
    window = None if file.is_null("sliding_window") else file.integer("sliding_window", 4096)
    windows = () if window is None else (window,) * shape["num_layers"]
    return ModelConfig(family=FAMILY, without_bias=(*ATTENTION, *MLP), windows=windows, **shape)


def _settings(config: ModelConfig) -> dict[str, Any]:
    return settings_of_shape(config) | {"sliding_window": config.window(0)}


FAMILY = Family(
    model_type="mistral",
    title="Mistral",
    architecture="MistralForCausalLM",
    names=NAMES,
    usual_targets=("q_proj", "v_proj"),
    read=_read,
    settings=_settings,
)
