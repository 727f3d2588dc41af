"""Qwen2 and Qwen2.5: a Llama with biases where queries, keys and values are made, and windows in the upper blocks if at all."""

from typing import Any

from storage import ModelError

from ..config_file import ConfigFile
from ..model_config import Family, ModelConfig
from .llama import ATTENTION, MLP, NAMES, read_shape, settings_of_shape

__all__ = ["FAMILY", "read_windows", "settings_of_windows"]

FULL, WINDOW = "full_attention", "sliding_attention"


def read_windows(file: ConfigFile, num_layers: int) -> tuple[int | None, ...]:
    """Of each block; none where no block has one."""
    uses_window = file.boolean("use_sliding_window", False)
    given = None if file.is_null("sliding_window") else file.integer("sliding_window", 4096)
    window = given if uses_window else None
    first = file.integer("max_window_layers", 28, least=0)
    has_window = [window is not None and block >= first for block in range(num_layers)]
    kinds = file.texts("layer_types") or [WINDOW if has_one else FULL for has_one in has_window]
    if len(kinds) != num_layers or not set(kinds) <= {FULL, WINDOW}:
        raise ModelError(f'{file.path}: layer_types should say "{FULL}" or "{WINDOW}" of each of the {num_layers} layers')
    if WINDOW not in kinds:
        return ()
    if window is None:
        raise ModelError(f"{file.path}: layer_types asks for windows, and use_sliding_window or sliding_window for none")
    return tuple(window if kind == WINDOW else None for kind in kinds)


def settings_of_windows(config: ModelConfig) -> dict[str, Any]:
    """The way back from `read_windows`."""
    windows = [config.window(block) for block in range(config.num_layers)]
    width = next((window for window in windows if window is not None), None)
    return {
        "use_sliding_window": width is not None,
        "sliding_window": width,
        "layer_types": [FULL if window is None else WINDOW for window in windows],
    }


def _read(file: ConfigFile) -> ModelConfig:
    shape = read_shape(file, key_value_heads=32, positions=32_768)
    windows = read_windows(file, shape["num_layers"])
    return ModelConfig(family=FAMILY, without_bias=(ATTENTION[-1], *MLP), windows=windows, **shape)


def _settings(config: ModelConfig) -> dict[str, Any]:
    return settings_of_shape(config) | settings_of_windows(config)


FAMILY = Family(
    model_type="qwen2",
    title="Qwen2",
    architecture="Qwen2ForCausalLM",
    names=NAMES,
    usual_targets=("q_proj", "v_proj"),
    read=_read,
    settings=_settings,
    without_effect=frozenset({"use_mrope"}),
)
