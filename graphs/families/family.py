"""What a model family gives so that a device can have a part of such a model as graphs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..matrix_formats import MatrixFormat
from ..part_graph import PartGraph

if TYPE_CHECKING:  # a graph is built without torch, which split_model imports
    from split_model import ModelConfig

__all__ = ["Block", "PartFamily"]


class Block(Protocol):
    """One block, built into a graph. Tensors of the file of weights have the names they have within a block of the model."""

    def forward(self, x: str) -> str:
        """(N, d) -> (N, d). What the backward pass needs besides ``x`` is handed on by `PartGraph.keep`."""

    def backward(self, x: str, dy: str) -> str:
        """Input (N, d) and the gradient by the output (N, d) -> the gradient by the input (N, d)."""


@dataclass(frozen=True, kw_only=True)
class PartFamily:
    """A family's block and embedding."""

    block: Callable[[PartGraph, "ModelConfig", MatrixFormat], Block]
    embedding: Callable[[PartGraph, "ModelConfig", str], str]
    """From the tokens' embeddings (N, d), which a device looks up in its file, to the first block's input (N, d)."""
    embedding_tensors: tuple[str, ...]
    """What it takes besides the tokens' table, by the names of `ModelConfig.tensor_shapes`."""
