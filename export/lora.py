"""Adds LoRA adapters to weights, without PEFT and without torch."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from graphs import Floats, Weights

from .errors import ExportError

__all__ = ["LoraAdapter", "LoraUpdate", "Merged"]


@dataclass(frozen=True, kw_only=True)
class LoraUpdate:
    """The update of a layer's matrix (in, out): scale * (B A) transposed is added to it."""

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


class Merged(Weights):
    """
    Weights with an adapter in them.

    Raises:
        ExportError: a weight, or its sum with the adapter's update, is not finite; a graph would compute nonsense with it.
    """

    def __init__(self, weights: Weights, adapter: LoraAdapter) -> None:
        self._weights, self._adapter = weights, adapter

    def read(self, name: str) -> Floats:
        tensor, update = self._checked(name, self._weights.read(name)), self._update(name)
        if update is None:
            return tensor
        with np.errstate(over="ignore", invalid="ignore"):  # the error below says it
            tensor = tensor + update.matrix()
        if not np.isfinite(tensor).all():
            raise ExportError(
                f"with the adapter, the tensor {name} is beyond the largest float32; the adapter cannot be merged"
            )
        return tensor

    def pieces(self, name: str) -> Iterator[Floats]:
        if self._update(name) is not None:
            yield self.read(name)
            return
        for piece in self._weights.pieces(name):
            yield self._checked(name, piece)

    def _update(self, name: str) -> LoraUpdate | None:
        return self._adapter.get(name.removesuffix(".weight"))

    def _checked(self, name: str, tensor: Floats) -> Floats:
        if not np.isfinite(tensor).all():
            raise ExportError(f"the base model's tensor {name} has values that are not finite numbers")
        return tensor
