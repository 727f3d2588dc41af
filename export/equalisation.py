"""
Channels of equal size before quantisation, by the weights alone: what SmoothQuant (arXiv 2211.10438) does with activations
that it has seen, and cross-layer equalisation (arXiv 1906.04721) without any.

A linear layer's input channel may be divided by a number if its row of the matrix is multiplied by it. The model's family says
which layers' inputs can be divided at no cost. All numbers are powers of two, which change no digit of a float: the function
stays the same to the bit.
"""

from typing import Protocol

import numpy as np

from graphs import Floats, Weights

__all__ = ["EqualisedWeights", "balance"]

SMALLEST = np.float32(1e-8)
STRENGTHS = (0.0, 0.25, 0.5)
"""How far to go from leaving a layer as it is, 0, to making its inputs and its rows equally large, 0.5."""
BLOCK = 64
LARGEST_INPUT = 3.0
"""The largest input of a block that is expected, in root mean squares of its channels."""


class EqualisedWeights(Weights, Protocol):
    """Weights of the same function as those that they are made of."""

    def rows(self, layer: str) -> Floats:
        """(in,): what the rows of the matrix of a linear layer of the model have been multiplied by."""

    def columns(self, layer: str) -> Floats:
        """(out,): what the columns of its matrix, and its bias, have been multiplied by."""


@np.errstate(over="ignore", invalid="ignore")  # near the largest float, any choice is as good as another
def balance(inputs: Floats, matrix: Floats) -> Floats:
    """
    The factors of a matrix's rows with which quantisation is expected to change the product least, (in,).

    Args:
        inputs: (in,) root mean square of each input channel.
        matrix: (in, out).
    """
    rows = np.maximum(np.abs(matrix).max(1), SMALLEST)
    difference = np.log2(np.maximum(inputs, SMALLEST)) - np.log2(rows)
    candidates = [np.exp2(np.rint(strength * (difference - difference.mean()))).astype(np.float32) for strength in STRENGTHS]
    return min(candidates, key=lambda factors: _expected_error(inputs / factors, matrix * factors[:, None]))


def _expected_error(inputs: Floats, matrix: Floats) -> float:
    """The mean square error of a product, up to a factor, if blocks of channels are rounded: weights to 4 bits, inputs to 8."""
    whole = len(inputs) // BLOCK * BLOCK or len(inputs)
    blocks = matrix[:whole].reshape(-1, min(BLOCK, whole), matrix.shape[1])
    squares = (inputs[:whole] ** 2).reshape(blocks.shape[:2])
    of_weights = ((blocks.max(1) - blocks.min(1)) ** 2).sum(1) @ squares.sum(1) / 15**2
    of_inputs = (blocks**2).sum((1, 2)) @ squares.max(1) / 127**2 * LARGEST_INPUT**2
    return float(of_weights + of_inputs)
