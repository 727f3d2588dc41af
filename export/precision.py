"""The precisions in which graphs keep their weights and compute."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike

from .quantisation import BlockFormat

if TYPE_CHECKING:  # a graph is built without torch, which split_model imports
    from split_model import ModelConfig

__all__ = ["PRECISIONS", "Precision", "block_forms", "sensitive_layers"]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """One of the ways in which a model is exported."""

    name: str
    suffix: str
    """What transformers.js expects at the end of the graph's file name."""
    dtype: DTypeLike = np.float32
    """Of the values between nodes, and of weights that are not quantised."""
    matrices: BlockFormat | None = None
    """How the blocks' matrices are stored; None: as ``dtype``."""
    sensitive: BlockFormat | None = None
    """How those of them are stored in which rounding does most harm, see `sensitive_layers`."""
    table: BlockFormat | None = None
    """How the token embedding and the LM head are stored, which may be one matrix."""

    @property
    def bits(self) -> int:
        """Of an element of most matrices."""
        return self.matrices.bits if self.matrices else 8 * np.dtype(self.dtype).itemsize


# Blocks of 64 elements keep GPT-2 small below 140 MB and let prefill run in larger products; the table, of which every logit is
# made, has blocks of 32. Zero points cost a 64th, and a third of the error.
EIGHT_BITS = BlockFormat(bits=8, size=64)
EIGHT_BIT_TABLE = BlockFormat(bits=8, size=32)
FOUR_BITS = BlockFormat(bits=4, size=64)

PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision(name="fp32", suffix=""),
        Precision(name="fp16", suffix="_fp16", dtype=np.float16),
        Precision(name="q8", suffix="_quantized", matrices=EIGHT_BITS, sensitive=EIGHT_BITS, table=EIGHT_BIT_TABLE),
        # With a table of 4 bits the loss would grow ten times as much.
        Precision(name="q4", suffix="_q4", matrices=FOUR_BITS, sensitive=EIGHT_BITS, table=EIGHT_BITS),
    )
}


def sensitive_layers(config: "ModelConfig") -> set[str]:
    """
    A block's linear layers with a far larger share in what 4 bits do to the text than in the weights, by their names there:
    attention's projection; the values', where they have a matrix of their own; and the last of a gated MLP, whose inputs have
    outliers. In SmolLM2-135M the latter two are 28 % of a block, and two thirds of the divergence from the exact model.
    """
    names = config.names
    values, down = names.qkv[-1:] if len(names.qkv) > 1 else (), (names.down,) if config.is_gated else ()
    return {names.projection, *values, *down}


def block_forms(config: "ModelConfig", precision: Precision) -> dict[str, BlockFormat]:
    """Of a block's linear layers, by their names there; none where matrices are not quantised."""
    if precision.matrices is None or precision.sensitive is None:
        return {}
    sensitive = sensitive_layers(config)
    return {layer: precision.sensitive if layer in sensitive else precision.matrices for layer in config.layer_shapes}
