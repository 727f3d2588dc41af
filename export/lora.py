"""What LoRA adds to weights, without PEFT and without torch."""

from dataclasses import dataclass

import numpy as np

from .errors import ExportError
from .weights import Floats, Weights

__all__ = ["LoraAdapter", "LoraUpdate", "Merged"]


@dataclass(frozen=True, kw_only=True)
class LoraUpdate:
    """What is added to a layer's matrix (in, out): scale * (B A) transposed."""

    a: Floats
    """(r, in)"""
    b: Floats
    """(out, r)"""
    scale: float

    def matrix(self) -> Floats:
        update: Floats = self.a.T @ (self.b.T * np.float32(self.scale))
        return update


LoraAdapter = dict[str, LoraUpdate]
"""By a linear layer's name in the model, without `ModelConfig.prefix`."""


class Merged:
    """
    Weights with an adapter in them.

    Raises:
        ExportError: a weight, or what the adapter makes of it, is no finite number. A graph would give nonsense without a word.
    """

    def __init__(self, weights: Weights, adapter: LoraAdapter) -> None:
        self._weights, self._adapter = weights, adapter

    def read(self, name: str) -> Floats:
        tensor, update = self._weights.read(name), self._adapter.get(name.removesuffix(".weight"))
        if not np.isfinite(tensor).all():
            raise ExportError(f"the base model's tensor {name} has values that are not finite numbers")
        if update is None:
            return tensor
        with np.errstate(over="ignore", invalid="ignore"):  # it is said in the sentence below
            tensor = tensor + update.matrix()
        if not np.isfinite(tensor).all():
            raise ExportError(
                f"with the adapter, the tensor {name} is beyond the largest float32; the adapter cannot be merged"
            )
        return tensor
