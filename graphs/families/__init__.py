"""
The model families of which a device can have a part as graphs, a file each, under the same `model_type` as in
`split_model.families`.

A new family is a file here with

- a class that is a `Block`: the block's layers, put together forwards and backwards;
- a `PartFamily` of it and of the embedding,

and a line in `FAMILIES`.
"""

from typing import TYPE_CHECKING

from . import gpt2
from .family import Block, PartFamily

if TYPE_CHECKING:  # a graph is built without torch, which split_model imports
    from split_model import ModelConfig

__all__ = ["FAMILIES", "Block", "PartFamily", "family_of"]

FAMILIES = {"gpt2": gpt2.FAMILY}


def family_of(config: "ModelConfig") -> PartFamily:
    return FAMILIES[config.model_type]
