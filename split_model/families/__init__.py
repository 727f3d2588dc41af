"""
The model families that can be split, a file each. No other file of the packages knows the names of a family's tensors.

A new family is a file here with

- a class derived from `ModelConfig`: what config.json calls its fields, and names and shapes of the model's tensors;
- its modules: a block, the embedding of tokens (with positions, where there is a table of them) and the final norm;
- a `Family` of these,

a line in `FAMILIES`, and the same in `graphs.families` and `export.families`. `protocol.settings.TARGETS` lists what LoRA may
adapt in any family.
"""

from pathlib import Path

from storage import ModelError, shown

from ..model_config import ConfigFile, ModelConfig
from . import gpt2
from .family import Family

__all__ = ["FAMILIES", "Family", "family_of", "read_config"]

FAMILIES = {family.config.model_type: family for family in (gpt2.FAMILY,)}


def family_of(config: ModelConfig) -> Family:
    return FAMILIES[config.model_type]


def read_config(path: Path) -> ModelConfig:
    """
    A model's config.json.

    Raises:
        ModelError: the file is missing, no JSON, or describes something other than a model that this package can cut.
    """
    file = ConfigFile(path)
    family = FAMILIES.get(file.model_type) if isinstance(file.model_type, str) else None
    if family is None:
        known = " or ".join(f'"{name}"' for name in FAMILIES)
        raise ModelError(f"{path}: model_type is {shown(file.model_type)}; only {known} can be split")
    return family.config.read(file)
