"""The graphs of a device's part: what their inputs and outputs are called."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from .graph import Graph, Shape

__all__ = ["Adaptation", "PartGraph"]

OPSET, IR_VERSION = 20, 9


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """LoRA on a device's blocks."""

    layers: Mapping[str, tuple[int, int]]
    """The adapted layers of a block, by name, in the order of the forward pass: (in, out)."""
    rank: int
    alpha: float
    dropout: float


class PartGraph(Graph):
    """
    A graph of one block, or of the embedding. All that it computes with comes in under agreed names, the weights, too, so that
    it holds none and serves every block. An input is declared when it is first asked for; what no output needs is left out.

    Args:
        trains: whether what the backward pass needs is kept, and dropout takes part.
    """

    def __init__(self, path: Path, adaptation: Adaptation, *, trains: bool) -> None:
        super().__init__(path)
        self.adaptation, self.trains = adaptation, trains
        self._declared: set[str] = set()

    def given(self, name: str, dtype: DTypeLike, shape: Shape) -> str:
        """An input."""
        if name not in self._declared:
            self._declared.add(name)
            self.input(name, dtype, shape)
        return name

    def given_rows(self, name: str, width: int) -> str:
        """An input (N, width): one row for each token of the packed batch."""
        return self.given(name, np.float32, ["rows", width])

    def weight_input(self, name: str, dtype: DTypeLike, shape: Shape) -> str:
        """A frozen tensor, by its name in the file of weights."""
        return self.given(f"weight:{name}", dtype, shape)

    def lora_input(self, layer: str, matrix: str) -> str:
        """``matrix`` A (r, in) or B (out, r) of an adapted layer."""
        return self.given(f"lora:{layer}.{matrix}", np.float32, self._lora_shape(layer, matrix))

    def gradient_output(self, layer: str, matrix: str, value: str) -> None:
        self.name_output(f"gradient:{layer}.{matrix}", value, np.float32, self._lora_shape(layer, matrix))

    def rows_output(self, name: str, value: str, width: int) -> str:
        """An output (N, width)."""
        return self.name_output(name, value, np.float32, ["rows", width])

    def keep(self, name: str, value: str, width: int) -> str:
        """Hand a value (N, width) of the forward pass to the backward pass, which has it by `kept`."""
        return self.rows_output(f"saved:{name}", value, width) if self.trains else value

    def kept(self, name: str, width: int) -> str:
        return self.given_rows(f"saved:{name}", width)

    def write(self, name: str) -> None:
        """Write the file."""
        self.prune()
        self.order_for_memory()
        self.save(name, OPSET, IR_VERSION)

    def _lora_shape(self, layer: str, matrix: str) -> tuple[int, int]:
        inputs, outputs = self.adaptation.layers[layer]
        return (self.adaptation.rank, inputs) if matrix == "A" else (outputs, self.adaptation.rank)
