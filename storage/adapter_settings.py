"""Reads adapter_config.json of a PEFT folder without PEFT. The folder may be a stranger's, so every value is checked."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import AdapterError
from .folder import Folder, shown

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "AdapterSettings"]

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
LARGEST = 3e38
"""About the largest float32: adapters are merged in it."""


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_integer(value) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _is_switch(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_name_or_names(value: Any) -> bool:
    return value is None or isinstance(value, str) or _is_names(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_layers(value: Any) -> bool:
    return value is None or _is_integer(value) or (isinstance(value, list) and all(map(_is_integer, value)))


def _is_map_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(is_right, value.values())))


Check = tuple[Callable[[Any], bool], str]
CHECKS: dict[str, Check] = {
    "r": (_is_rank, "a positive integer"),
    "lora_alpha": (_is_number, "a finite number"),
    "use_rslora": (_is_switch, "true or false"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), '"none", "all" or "lora_only"'),
    "init_lora_weights": (lambda value: value is None or isinstance(value, bool | str), "true, false or a name"),
    "target_modules": (_is_name_or_names, "a list of names or one regular expression"),
    "exclude_modules": (_is_name_or_names, "a list of names or one regular expression"),
    "modules_to_save": (lambda value: value is None or _is_names(value), "a list of names"),
    "layers_to_transform": (_is_layers, "a list of integers"),
    "layers_pattern": (_is_name_or_names, "a name or a list of names"),
    "rank_pattern": (_is_map_of(_is_rank), "a map from patterns to positive integers"),
    "alpha_pattern": (_is_map_of(_is_number), "a map from patterns to finite numbers"),
}
"""The settings that decide the value of a merged matrix: what each must be, as a test and in words."""
WITHOUT_EFFECT = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "fan_in_fan_out", "megatron_core"),
    # These act only together with another setting, which is refused itself since it is not plain LoRA.
    *("qalora_group_size", "ensure_weight_tying", "eva_config", "corda_config", "loftq_config", "lora_ga_config"),
}
"""Settings that change nothing when plain LoRA is merged."""
BASE_UNCHANGED = ("gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base model as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it, too."""


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """The settings of a LoRA adapter. Their types have been checked."""

    path: Path
    """Of the file, for messages."""
    values: dict[str, Any]
    """By PEFT's names; those that the file leaves out have PEFT's defaults."""

    @classmethod
    def read(cls, folder: Path) -> "AdapterSettings":
        """
        Read a PEFT folder's settings.

        Raises:
            AdapterError: there is no adapter, or one that is not LoRA; a value is of the wrong type, or names a Python module
                that PEFT would import.
        """
        path, values = folder / CONFIG_FILE, Folder(folder, AdapterError).read_json(CONFIG_FILE)
        kind = values.get("peft_type")
        if kind != "LORA":
            raise AdapterError(f"{path}: only LoRA adapters can be used; peft_type is {shown(kind)}")
        values = {"r": 8, "lora_alpha": 8, "bias": "none", "init_lora_weights": True} | values
        for name, (is_right, description) in CHECKS.items():
            if not is_right(values.get(name)):
                raise AdapterError(f"{path}: {name} is {shown(values.get(name))}; it must be {description}")
        if values.get("megatron_config") or values.get("megatron_core") not in (None, "megatron.core"):
            raise AdapterError(f"{path}: megatron_config and megatron_core name Python code to be imported; remove them")
        return cls(path=path, values=values)

    def has(self, name: str) -> bool:
        """Whether a setting is there and says something: not null, false or empty."""
        value = self.values.get(name)
        return value is not False and value not in (None, "", [], {})  # 0 says something: it may be a block's number

    @property
    def beyond(self) -> list[str]:
        """
        The settings that make the adapter more than plain LoRA, which adds the product of two matrices to a layer's matrix.
        Empty for plain LoRA.
        """
        plain = CHECKS.keys() - {"modules_to_save", "layers_pattern"} | WITHOUT_EFFECT
        beyond = [name for name in self.values if name not in plain and self.has(name)]
        if self.values["bias"] != "none":
            beyond.append("bias")
        if self.changes_base:
            beyond.append(f"init_lora_weights={shown(self.values['init_lora_weights'])}")
        return beyond

    @property
    def changes_base(self) -> bool:
        """Whether the adapter's initialisation changed the base model: it was trained on another one than it names."""
        way = self.values["init_lora_weights"]
        return isinstance(way, str) and way.lower() not in BASE_UNCHANGED

    @property
    def draws_base(self) -> bool:
        """Whether it changed the base model by numbers drawn at random: PiSSA's approximation of singular vectors does."""
        return self.changes_base and self.values["init_lora_weights"].lower().startswith("pissa_niter")
