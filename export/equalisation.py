"""
Channels of equal size before quantisation, by the weights alone: what SmoothQuant (arXiv 2211.10438) does with activations
that it has seen, and cross-layer equalisation (arXiv 1906.04721) without any.

A linear layer's input channel may be divided by a number if its row of the matrix is multiplied by it. It costs nothing where
the input is what a norm gives, whose gain and offset take the division, or is linear in what another layer gives, as the input
of attention's projection is in the values. All numbers are powers of two, which change no digit of a float: the function stays
the same to the bit.

The input of a gated MLP's last layer is linear in what the gate lets through, too. It is left as it is: its size cannot be told
from the weights, and guesses made SmolLM2 worse in 8 bits and in 4.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from graphs import Floats, Weights

if TYPE_CHECKING:  # a graph is built without torch, which split_model imports
    from split_model import ModelConfig

__all__ = ["Equalised", "balance"]

SMALLEST = np.float32(1e-8)
STRENGTHS = (0.0, 0.25, 0.5)
"""How far to go from leaving a layer as it is, 0, to making its inputs and its rows equally large, 0.5."""
BLOCK = 64
LARGEST_INPUT = 3.0
"""The largest input of a block that is expected, in root mean squares of its channels."""


class Equalised(Weights):
    """Weights of the same function as those that they are made of."""

    def __init__(self, weights: Weights, config: "ModelConfig") -> None:
        self._weights, self._config = weights, config
        names = config.names
        self._norm_of = dict.fromkeys(names.qkv, names.attention_norm) | dict.fromkeys(names.up, names.mlp_norm)
        self._layers_behind = {names.attention_norm: names.qkv, names.mlp_norm: names.up}
        self._of_norm = lru_cache(maxsize=None)(self._factors_of_norm)
        self._of_values = lru_cache(maxsize=None)(self._factors_of_values)

    def read(self, name: str) -> Floats:
        tensor = self._weights.read(name)
        block, part = self._place(name)
        if not block:
            return tensor
        layer, parameter = part.rsplit(".", 1)
        if layer in self._layers_behind:
            return tensor / self._of_norm(block, layer)
        if layer not in self._config.layer_shapes:
            return tensor
        if parameter == "bias":
            return tensor * self.columns(f"{block}.{layer}")
        return self.rows(f"{block}.{layer}")[:, None] * tensor * self.columns(f"{block}.{layer}")

    def pieces(self, name: str) -> Iterator[Floats]:
        block, _ = self._place(name)
        return iter([self.read(name)]) if block else self._weights.pieces(name)

    def rows(self, layer: str) -> Floats:
        """(in,): what the rows of the matrix of a linear layer of the model have been multiplied by."""
        block, part = self._place(layer)
        names = self._config.names
        if part in self._norm_of:
            return self._of_norm(block, self._norm_of[part])
        if part == names.projection:
            return self._for_each_query(self._of_values(block))
        return np.ones(self._config.layer_shapes[part][0], np.float32)

    def columns(self, layer: str) -> Floats:
        """(out,): what the columns of its matrix, and its bias, have been multiplied by."""
        block, part = self._place(layer)
        names = self._config.names
        factors = np.ones(self._config.layer_shapes[part][1], np.float32)
        if part == names.qkv[-1]:
            factors[-self._config.key_width :] /= self._of_values(block)
        return factors

    def _place(self, name: str) -> tuple[str, str]:
        """The block that a tensor or a layer belongs to, and its name there; of one that belongs to none, "" and its name."""
        blocks = f"{self._config.names.blocks}."
        if not name.startswith(blocks):
            return "", name
        index, _, part = name.removeprefix(blocks).partition(".")
        return f"{blocks}{index}", part

    def _factors_of_norm(self, block: str, norm: str) -> Floats:  # -> (d,)
        matrices = [self._weights.read(f"{block}.{layer}.weight") for layer in self._layers_behind[norm]]
        return balance(self._size_of_normed(block, norm), np.concatenate(matrices, 1) if len(matrices) > 1 else matrices[0])

    def _factors_of_values(self, block: str) -> Floats:  # -> (K D,)
        config, names = self._config, self._config.names
        size = self._size_of_values(block)
        # All heads of queries that see one head of values mix the same values, so their rows have the same factor.
        projection = self._weights.read(f"{block}.{names.projection}.weight")
        by_head = projection.reshape(config.num_key_value_heads, -1, config.head_width, config.width).swapaxes(1, 2)
        return balance(size, by_head.reshape(config.key_width, -1))

    def _for_each_query(self, factors: Floats) -> Floats:  # (K D,) -> (H D,)
        config = self._config
        by_head = factors.reshape(config.num_key_value_heads, 1, config.head_width)
        shape = (config.num_key_value_heads, config.num_heads // config.num_key_value_heads, config.head_width)
        return np.broadcast_to(by_head, shape).reshape(-1)

    def _size_of_values(self, block: str) -> Floats:  # -> (K D,)
        names, width = self._config.names, self._config.key_width
        layer, bias = names.qkv[-1], np.zeros(width, np.float32)
        matrix = self._weights.read(f"{block}.{layer}.weight")[:, -width:]
        if layer not in self._config.without_bias:
            bias = self._weights.read(f"{block}.{layer}.bias")[-width:]
        with np.errstate(over="ignore"):
            size: Floats = np.sqrt(self._size_of_normed(block, names.attention_norm) ** 2 @ matrix**2 + bias**2)
        return size

    def _size_of_normed(self, block: str, norm: str) -> Floats:  # -> (d,)
        # A normed element has variance 1: times the gain, and around the offset, this is its root mean square.
        gain = self._weights.read(f"{block}.{norm}.weight")
        if not self._config.has_layer_norms:
            return np.abs(gain)
        size: Floats = np.sqrt(gain**2 + self._weights.read(f"{block}.{norm}.bias") ** 2)
        return size


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
