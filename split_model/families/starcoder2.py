"""StarCoder2: turned positions, grouped keys and windows like a Mistral's; layer norms, biases and no gate like a GPT-2's."""

from dataclasses import replace
from typing import Any

from ..config_file import ConfigFile
from ..model_config import LAYER_NORM, Family, ModelConfig
from .llama import ATTENTION, NAMES, read_shape, settings_of_shape

__all__ = ["FAMILY"]

MLP = ("mlp.c_fc", "mlp.c_proj")


def _read(file: ConfigFile) -> ModelConfig:
    # transformers no longer reads these, and has what they say of every published model.
    file.one_of("mlp_type", "default", ("default",))
    file.one_of("norm_type", "layer_norm", ("layer_norm",))
    shape = read_shape(
        file,
        key_value_heads=2,
        norm=LAYER_NORM,
        epsilon=1e-5,
        activation="gelu_pytorch_tanh",
        tied_head=True,
        positions=4096,
    )
    window = file.integer("sliding_window") if file.has("sliding_window") else None
    windows = () if window is None else (window,) * shape["num_layers"]
    without = () if file.boolean("use_bias", True) else (*ATTENTION, *MLP)
    return ModelConfig(family=FAMILY, without_bias=without, windows=windows, **shape | {"is_gated": False})


def _settings(config: ModelConfig) -> dict[str, Any]:
    return settings_of_shape(config) | {"use_bias": not config.without_bias, "sliding_window": config.window(0)}


FAMILY = Family(
    model_type="starcoder2",
    title="StarCoder2",
    architecture="Starcoder2ForCausalLM",
    names=replace(NAMES, up=MLP[:1], down=MLP[1], other_modules_of_a_block=("mlp.act",)),
    usual_targets=("q_proj", "v_proj"),
    read=_read,
    settings=_settings,
    without_effect=frozenset({"embedding_dropout", "residual_dropout"}),
)
