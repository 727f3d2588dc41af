"""In what numbers a graph keeps its weights and computes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from .quantisation import BlockFormat

__all__ = ["PRECISIONS", "Precision"]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """One of the ways in which a model is exported."""

    name: str
    suffix: str
    """Of the file's name, as transformers.js looks for it."""
    dtype: DTypeLike = np.float32
    """Of what flows from node to node, and of weights that are not quantised."""
    matrices: BlockFormat | None = None
    """How the blocks' matrices are stored; None: as ``dtype``."""
    table: BlockFormat | None = None
    """The same of the token embedding, which is the LM head, too."""


# Blocks of 64: see benchmarks/LOG.md for what 32 and 128 cost and gain.
EIGHT_BITS = BlockFormat(bits=8, size=64, symmetric=True)
FOUR_BITS = BlockFormat(bits=4, size=32, symmetric=False)

PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision(name="fp32", suffix=""),
        Precision(name="fp16", suffix="_fp16", dtype=np.float16),
        Precision(name="q8", suffix="_quantized", matrices=EIGHT_BITS, table=EIGHT_BITS),
        # The logits are what suffers most: with a 4-bit table the loss would grow ten times as much.
        Precision(name="q4", suffix="_q4", matrices=FOUR_BITS, table=EIGHT_BITS),
    )
}
