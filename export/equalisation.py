"""
Channels of equal size before quantisation, by the weights alone: what SmoothQuant (arXiv 2211.10438) does with activations
that it has seen, and cross-layer equalisation (arXiv 1906.04721) without any.

A linear layer's input channel may be divided by a number and its row of the matrix multiplied by it. GPT-2 divides at no cost:
c_attn and c_fc follow a norm, whose gain and offset take it, and what c_proj of attention gets is linear in the values. All
numbers are powers of two, which change no digit of a float: the function is the same to the bit.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from .weights import Floats, Weights

if TYPE_CHECKING:  # a graph is built without torch, which split_model imports
    from split_model import ModelConfig

__all__ = ["Equalised"]

NORM_OF_LAYER = {"attn.c_attn": "ln_1", "mlp.c_fc": "ln_2"}
LAYER_OF_NORM = {norm: layer for layer, norm in NORM_OF_LAYER.items()}
SMALLEST = np.float32(1e-8)
STRENGTHS = (0.0, 0.25, 0.5)
"""Of what lies between leaving a layer as it is, and making inputs and rows equally large."""
BLOCK = 64
LARGEST_INPUT = 3.0
"""Of a block, in root mean squares."""


class Equalised:
    """The same model with other weights."""

    def __init__(self, weights: Weights, config: "ModelConfig") -> None:
        self._weights, self._config = weights, config
        self._of_norm = lru_cache(maxsize=None)(self._factors_of_norm)
        self._of_values = lru_cache(maxsize=None)(self._factors_of_values)

    def read(self, name: str) -> Floats:
        tensor = self._weights.read(name)
        if not name.startswith("h."):
            return tensor
        _, index, part = name.split(".", 2)
        layer, parameter = part.rsplit(".", 1)
        if layer in LAYER_OF_NORM:
            return tensor / self.rows(f"h.{index}.{LAYER_OF_NORM[layer]}")
        if parameter == "bias":
            return tensor * self.columns(f"h.{index}.{layer}")
        return self.rows(f"h.{index}.{layer}")[:, None] * tensor * self.columns(f"h.{index}.{layer}")

    def rows(self, layer: str) -> Floats:
        """(in,): what the rows of a layer's matrix, such as "h.0.attn.c_attn", are multiplied by."""
        _, index, part = layer.split(".", 2)
        if part in NORM_OF_LAYER:
            return self._of_norm(layer, f"h.{index}.{NORM_OF_LAYER[part]}")
        if part == "attn.c_proj":
            return self._of_values(f"h.{index}.attn")
        return np.ones(self._config.layer_shapes[part][0], np.float32)

    def columns(self, layer: str) -> Floats:
        """(out,): the same for its columns and its bias."""
        _, index, part = layer.split(".", 2)
        factors = np.ones(self._config.layer_shapes[part][1], np.float32)
        if part == "attn.c_attn":
            factors[2 * self._config.width :] /= self._of_values(f"h.{index}.attn")
        return factors

    def _factors_of_norm(self, layer: str, norm: str) -> Floats:
        return _balance(self._size_of_normed(norm), self._weights.read(f"{layer}.weight"))

    def _factors_of_values(self, attention: str) -> Floats:
        norm = self._size_of_normed(attention.replace(".attn", ".ln_1"))
        values = self._weights.read(f"{attention}.c_attn.weight")[:, 2 * self._config.width :]
        bias = self._weights.read(f"{attention}.c_attn.bias")[2 * self._config.width :]
        with np.errstate(over="ignore"):
            size = np.sqrt(norm**2 @ values**2 + bias**2)
        return _balance(size, self._weights.read(f"{attention}.c_proj.weight"))

    def _size_of_normed(self, norm: str) -> Floats:
        # A normed element has mean 0 and variance 1: times the gain, and around the offset, this is its root mean square.
        gain, offset = (self._weights.read(f"{norm}.{parameter}") for parameter in ("weight", "bias"))
        size: Floats = np.sqrt(gain**2 + offset**2)
        return size


@np.errstate(over="ignore", invalid="ignore")  # near the largest float, any choice is as good as another
def _balance(inputs: Floats, matrix: Floats) -> Floats:
    """
    The factors of a matrix's rows under which the product is expected to suffer least.

    Args:
        inputs: (in,) root mean square of each input channel.
    """
    rows = np.maximum(np.abs(matrix).max(1), SMALLEST)
    difference = np.log2(np.maximum(inputs, SMALLEST)) - np.log2(rows)
    candidates = [np.exp2(np.rint(strength * (difference - difference.mean()))).astype(np.float32) for strength in STRENGTHS]
    return min(candidates, key=lambda factors: _expected_error(inputs / factors, matrix * factors[:, None]))


def _expected_error(inputs: Floats, matrix: Floats) -> float:
    """Mean square of what rounding does to a product, up to a factor: weights to 4 bits, inputs to 8, in blocks of channels."""
    whole = len(inputs) // BLOCK * BLOCK or len(inputs)
    blocks = matrix[:whole].reshape(-1, min(BLOCK, whole), matrix.shape[1])
    squares = (inputs[:whole] ** 2).reshape(blocks.shape[:2])
    of_weights = ((blocks.max(1) - blocks.min(1)) ** 2).sum(1) @ squares.sum(1) / 15**2
    of_inputs = (blocks**2).sum((1, 2)) @ squares.max(1) / 127**2 * LARGEST_INPUT**2
    return float(of_weights + of_inputs)
