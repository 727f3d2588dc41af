"""
The model families that can be exported, a file each, under the same `model_type` as in `split_model.families`.

A new family is a file here with

- a class derived from `DecoderGraph`: how the graph goes on from token ids, block by block, to the final norm;
- its `EqualisedWeights`: which norm or which layer takes the factors that another layer's rows are multiplied by;
- an `ExportFamily` of these, and of the words by which transformers knows such a model,

and a line in `FAMILIES`. All of them see matrices of linear layers as (in, out), which `Weights` promises. For the first family
that stores them as (out, in), `StoredWeights` will have to turn them, and `write_checkpoint` to turn them back.
"""

from typing import TYPE_CHECKING

from . import gpt2
from .family import ExportFamily

if TYPE_CHECKING:  # a graph is built without torch, which split_model imports
    from split_model import ModelConfig

__all__ = ["FAMILIES", "ExportFamily", "family_of"]

FAMILIES = {"gpt2": gpt2.FAMILY}


def family_of(config: "ModelConfig") -> ExportFamily:
    return FAMILIES[config.model_type]
