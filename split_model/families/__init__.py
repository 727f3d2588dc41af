"""
The model families that can be split, trained, handed to devices and exported, a file each. No other file of the packages knows
the names of a family's tensors; all families are computed by one block, which is told by a `ModelConfig` what it is.

A new family is a file here with a `Family`, and a line in `FAMILIES`; docs/families.md adds one.
"""

from pathlib import Path

from storage import ModelError, shown

from ..config_file import WITHOUT_EFFECT, ConfigFile
from ..model_config import Family, ModelConfig
from . import gpt2, llama, mistral, phi3, qwen2, qwen3, starcoder2

__all__ = ["FAMILIES", "read_config"]

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY for module in (gpt2, llama, mistral, phi3, qwen2, qwen3, starcoder2)
}


def read_config(path: Path) -> ModelConfig:
    """
    A model's config.json.

    Raises:
        ModelError: the file is missing, no JSON, or describes something other than a model that this package can cut.
    """
    file = ConfigFile(path)
    family = FAMILIES.get(file.model_type) if isinstance(file.model_type, str) else None
    if family is None:
        *others, last = (f'"{name}"' for name in FAMILIES)
        known = f"only {', '.join(others)} or {last} can be split"
        raise ModelError(f"{path}: model_type is {shown(file.model_type)}; {known}{file.other_kind()}")
    file.check_support()
    config = family.read(file)
    file.check_all_known(WITHOUT_EFFECT | family.without_effect)
    config.check(file)
    return config
