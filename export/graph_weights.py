"""A model's weights in a graph, in the form that a precision gives them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphs import MICROSOFT, Graph, Weights

from .errors import ExportError
from .precision import Precision
from .quantisation import BlockFormat, quantise

__all__ = ["GraphWeights"]

INTEGER_PRODUCTS = 4
"""MatMulNBits' accuracy_level at which activations are rounded to 8 bits, too. Without it 8-bit weights are 30 times slower."""


class GraphWeights:
    """
    Adds a model's tensors to a graph. Each is read when it is first asked for, and stored once, however often that is.

    Raises:
        ExportError: in every method, if a value is too large for the precision.
    """

    def __init__(self, graph: Graph, weights: Weights, precision: Precision) -> None:
        self._graph, self._weights, self._precision = graph, weights, precision

    def plain(self, name: str) -> str:
        """A tensor that is not quantised, in the precision's dtype."""
        return self._graph.weight_in_pieces(name, self._converted(name))

    def _converted(self, name: str) -> Iterator[NDArray[Any]]:
        for piece in self._weights.pieces(name):
            with np.errstate(over="ignore"):
                stored = piece.astype(self._precision.dtype, copy=False)
            self._check_finite(name, stored)
            yield stored

    def quantised(self, name: str, form: BlockFormat, *, transposed: bool = False) -> list[str]:
        """Integers, scales and zero points of a matrix's rows, or of its columns if it is transposed."""
        names = [f"{name}.{part}" for part in ("integers", "scales", "zero_points")]
        if not self._graph.has_weight(names[0]):
            rows = iter([self._weights.read(name).T]) if transposed else self._weights.pieces(name)
            with np.errstate(over="ignore", invalid="ignore"):
                stored = quantise(rows, form)
            self._check_finite(name, stored.scales)
            arrays: tuple[NDArray[Any], ...] = (stored.integers, stored.scales, stored.zero_points)
            for part, array in zip(names, arrays, strict=True):
                self._graph.weight(part, array)
        return names

    def product(
        self, x: str, name: str, shape: tuple[int, int], form: BlockFormat, bias: str = "", *, transposed: bool = False
    ) -> str:
        """(B, S, K) times the transposed matrix of shape (N, K) -> (B, S, N)."""
        inputs = [x, *self.quantised(name, form, transposed=transposed), "", bias]
        layout = {"N": shape[0], "K": shape[1], "bits": form.bits, "block_size": form.size}
        return self._graph.node("MatMulNBits", *inputs, domain=MICROSOFT, accuracy_level=INTEGER_PRODUCTS, **layout)

    def _check_finite(self, name: str, stored: NDArray[Any]) -> None:
        if not np.isfinite(stored).all():
            precision = self._precision.name
            raise ExportError(f"{name} has values too large for {precision}; leave {precision} out of --precision")
