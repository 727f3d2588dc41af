"""
Channels of equal size before quantisation, as SmoothQuant (arXiv 2211.10438) and AWQ (arXiv 2306.00978) make them of
activations that they have seen.

A linear layer's input channel may be divided by a number if its row of the matrix is multiplied by it. It costs nothing where
the input is what a norm gives, whose gain and offset take the division, or is linear in what another layer gives: the input of
attention's projection in the values, that of a gated MLP's last layer in what the gate lets through. All numbers are powers of
two, which change no digit of a float: the function stays the same to the bit.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from graphs import Floats, Weights

from .quantisation import BlockFormat

if TYPE_CHECKING:  # a graph is built without torch, which split_model imports
    from split_model import ModelConfig

__all__ = ["Equalised", "Factors", "balance", "factors_of_block"]

Factors = Mapping[str, Floats]
"""By the name of a linear layer, (in,): what the rows of its matrix are multiplied by. All others stay as they are."""

SMALLEST = np.float32(1e-8)
STRENGTHS = (0.0, 0.25, 0.5, 0.75)
"""How far to go from leaving a layer as it is, 0, to making its inputs, 1, or its inputs and its rows, 0.5, equally large."""
LARGEST_INPUT = 127
"""Of the 8-bit integers, of both signs, that a block of inputs is rounded to at run time."""


class Equalised(Weights):
    """Weights of the same function as those that they are made of."""

    def __init__(self, weights: Weights, config: "ModelConfig", factors: Factors) -> None:
        self._weights, self._config, self._factors = weights, config, factors

    def read(self, name: str) -> Floats:
        tensor = self._weights.read(name)
        block, part = self._place(name)
        if not block:
            return tensor
        layer, parameter = part.rsplit(".", 1)
        names = self._config.names
        behind = {names.attention_norm: names.qkv, names.mlp_norm: names.up}.get(layer)
        if behind is not None:
            return tensor / self.rows(f"{block}.{behind[0]}")
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
        _, part = self._place(layer)
        return self._factors.get(layer, np.ones(self._config.layer_shapes[part][0], np.float32))

    def columns(self, layer: str) -> Floats:
        """(out,): what the columns of its matrix, and its bias, have been multiplied by."""
        block, part = self._place(layer)
        config, names = self._config, self._config.names
        factors = np.ones(config.layer_shapes[part][1], np.float32)
        if part == names.qkv[-1]:
            # All heads of queries that see one head of values mix the same values, so their rows have the same factors.
            of_heads = self.rows(f"{block}.{names.projection}").reshape(config.num_key_value_heads, -1, config.head_width)
            factors[-config.key_width :] /= of_heads[:, 0].reshape(-1)
        if config.is_gated and part == names.up[-1]:
            factors[-config.inner_width :] /= self.rows(f"{block}.{names.down}")
        return factors

    def _place(self, name: str) -> tuple[str, str]:
        """The block that a tensor or a layer belongs to, and its name there; of one that belongs to none, "" and its name."""
        blocks = f"{self._config.names.blocks}."
        if not name.startswith(blocks):
            return "", name
        index, _, part = name.removeprefix(blocks).partition(".")
        return f"{blocks}{index}", part


def factors_of_block(
    config: "ModelConfig",
    block: str,
    weights: Weights,
    inputs: Mapping[str, Floats],
    forms: Mapping[str, BlockFormat],
    fixed: Collection[str] = (),
) -> Factors:
    """
    Args:
        block: what the names of its layers begin with.
        inputs: by a layer's name in the model, (tokens, in).
        forms: by a layer's name in the block, that of its matrix in the smallest precision.
        fixed: names, in the model, of layers whose inputs and outputs stay as they are.
    """
    names = config.names

    def may_change(*layers: str) -> bool:
        return not any(f"{block}.{layer}" in fixed for layer in layers)

    def matrix(*layers: str) -> Floats:
        matrices = [weights.read(f"{block}.{layer}.weight") for layer in layers]
        return np.concatenate(matrices, 1) if len(matrices) > 1 else matrices[0]

    factors: dict[str, Floats] = {}
    for layers in (names.qkv, names.up):
        if may_change(*layers):
            common = balance(inputs[f"{block}.{layers[0]}"], matrix(*layers), forms[layers[0]])
            factors |= {f"{block}.{layer}": common for layer in layers}
    if may_change(names.qkv[-1], names.projection):
        mixed = balance(
            _by_values(inputs[f"{block}.{names.projection}"], config),
            _by_values(matrix(names.projection).T, config).T.reshape(config.key_width, -1),
            forms[names.projection],
        )
        factors[f"{block}.{names.projection}"] = _for_each_query(mixed, config)
    if config.is_gated and may_change(names.up[-1], names.down):
        factors[f"{block}.{names.down}"] = balance(inputs[f"{block}.{names.down}"], matrix(names.down), forms[names.down])
    return factors


def _by_values(inputs: Floats, config: "ModelConfig") -> Floats:  # (n, H D) -> (n H / K, K D)
    """What the heads of queries mix of the same values, below one another."""
    by_head = inputs.reshape(len(inputs), config.num_key_value_heads, -1, config.head_width)
    below: Floats = by_head.swapaxes(1, 2).reshape(-1, config.key_width)
    return below


def _for_each_query(factors: Floats, config: "ModelConfig") -> Floats:  # (K D,) -> (H D,)
    by_head = factors.reshape(config.num_key_value_heads, 1, config.head_width)
    return np.repeat(by_head, config.num_heads // config.num_key_value_heads, 1).reshape(-1)


@np.errstate(over="ignore", invalid="ignore")  # near the largest float, any choice is as good as another
def balance(inputs: Floats, matrix: Floats, form: BlockFormat) -> Floats:
    """
    The factors of a matrix's rows with which quantisation is expected to change the product least, (in,).

    Args:
        inputs: (tokens, in).
        matrix: (in, out).
    """
    sizes = np.sqrt(np.square(inputs).mean(0))
    rows = np.maximum(np.abs(matrix).max(1), SMALLEST)
    difference = np.log2(np.maximum(sizes, SMALLEST)) - np.log2(rows)
    candidates = [np.exp2(np.rint(strength * (difference - difference.mean()))).astype(np.float32) for strength in STRENGTHS]
    return min(candidates, key=lambda factors: _expected_error(inputs / factors, matrix * factors[:, None], form))


def _expected_error(inputs: Floats, matrix: Floats, form: BlockFormat) -> float:
    """The mean square error of a product, up to a factor, if blocks of weights are rounded, and blocks of inputs to 8 bits."""
    error = 0.0
    for start in range(0, len(matrix), form.size):
        rows, of_rows = matrix[start : start + form.size], np.square(inputs[:, start : start + form.size])
        steps_of_weights = np.square((rows.max(0) - rows.min(0)) / form.largest).sum()
        steps_of_inputs = of_rows.max(1).mean() / LARGEST_INPUT**2
        error += float(steps_of_weights * of_rows.mean(0).sum() + steps_of_inputs * np.square(rows).sum())
    return error
