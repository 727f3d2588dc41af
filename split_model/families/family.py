"""What a model family gives to be split."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ..model_config import ModelConfig
from ..placement import Placement
from ..stored_tensors import StoredTensors

__all__ = ["Family"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """
    The class of a family's configurations, and what makes the modules of a model. N rows of all sequences, one under the other,
    d elements each. Modules read their frozen weights when they are made, and nothing learns but LoRA's matrices.
    """

    config: type[ModelConfig]
    block: Callable[[ModelConfig, StoredTensors, int, Placement], nn.Module]
    """
    Makes the block of an index: a module (N, d), `Packing` -> (N, d). Its linear layers are `LoraLinear`, at the paths that
    `ModelConfig.layer_shapes` names. The position of each row in its sequence is in `Packing.positions`, on the host.
    """
    embedding: Callable[[ModelConfig, StoredTensors, Placement], nn.Module]
    """Makes a module: token ids (N,) on the host, and `Packing` -> (N, d) on the device."""
    final_norm: Callable[[ModelConfig, StoredTensors, Placement], nn.Module]
    """Makes a module (M, d) -> (M, d), for the M rows that go on to the LM head."""
