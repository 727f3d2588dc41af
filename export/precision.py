"""The precisions in which graphs keep their weights and compute."""

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
    """What transformers.js expects at the end of the graph's file name."""
    dtype: DTypeLike = np.float32
    """Of the values between nodes, and of weights that are not quantised."""
    matrices: BlockFormat | None = None
    """How the blocks' matrices are stored; None: as ``dtype``."""
    projection: BlockFormat | None = None
    """How the matrix at the end of attention, its output projection, is stored."""
    table: BlockFormat | None = None
    """How the token embedding and the LM head are stored, which may be one matrix."""


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
        Precision(name="q8", suffix="_quantized", matrices=EIGHT_BITS, projection=EIGHT_BITS, table=EIGHT_BIT_TABLE),
        # With a table of 4 bits the loss would grow ten times as much; and attention's projection, a twelfth of a block's
        # weights, has a far larger share in what 4 bits do to the text.
        Precision(name="q4", suffix="_q4", matrices=FOUR_BITS, projection=EIGHT_BITS, table=EIGHT_BITS),
    )
}
