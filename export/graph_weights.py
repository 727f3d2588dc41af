"""A model's weights in a graph, in the form that a precision gives them."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from graphs import MICROSOFT, Graph, Weights

from .errors import ExportError
from .precision import Precision
from .quantisation import BlockFormat, QuantisedMatrix, quantise

__all__ = ["GraphWeights", "Nearest", "Rounding"]

INTEGER_PRODUCTS = 4
"""MatMulNBits' accuracy_level at which activations are rounded to 8 bits, too. Without it 8-bit weights are 30 times slower."""


class Rounding(Protocol):
    """How matrices of linear layers are quantised."""

    def quantised(self, name: str, form: BlockFormat) -> Iterator[QuantisedMatrix]:
        """The transpose of a matrix, (in, out), some rows at a time."""
        ...


class Nearest:
    """To the nearest values."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def quantised(self, name: str, form: BlockFormat) -> Iterator[QuantisedMatrix]:
        return quantise([self._weights.read(name).T], form)


class GraphWeights:
    """
    Adds a model's tensors to a graph. Each is read when it is first asked for, and stored once, however often that is.

    Raises:
        ExportError: in every method, if a value is too large for the precision.
    """

    def __init__(self, graph: Graph, weights: Weights, precision: Precision, rounding: Rounding | None = None) -> None:
        self._graph, self._weights, self._precision = graph, weights, precision
        self._rounding = rounding or Nearest(weights)

    def plain(self, *names: str) -> str:
        """A tensor that is not quantised, in the precision's dtype; or several, one behind the other."""
        return self._graph.weight_in_pieces("+".join(names), chain.from_iterable(map(self._converted, names)))

    def _converted(self, name: str) -> Iterator[NDArray[Any]]:
        for piece in self._weights.pieces(name):
            with np.errstate(over="ignore"):
                stored = piece.astype(self._precision.dtype, copy=False)
            self._check_finite(name, stored)
            yield stored

    def table(self, name: str, form: BlockFormat) -> list[str]:
        """Integers, scales and zero points of a table's rows."""
        return self._stored(name, quantise(self._weights.pieces(name), form))

    def table_product(self, x: str, name: str, shape: tuple[int, int], form: BlockFormat) -> str:
        """(B, S, K) times the transposed table of shape (N, K) -> (B, S, N)."""
        return self._product(x, self.table(name, form), shape, form)

    def product(self, x: str, names: Sequence[str], shape: tuple[int, int], form: BlockFormat, bias: str = "") -> str:
        """(B, S, in) times the matrices (in, out), side by side -> (B, S, all their outputs); shape: of the whole, turned."""
        rounded = chain.from_iterable(self._rounding.quantised(name, form) for name in names)
        return self._product(x, self._stored("+".join(names), rounded), shape, form, bias)

    def _product(self, x: str, matrix: list[str], shape: tuple[int, int], form: BlockFormat, bias: str = "") -> str:
        layout = {"N": shape[0], "K": shape[1], "bits": form.bits, "block_size": form.size}
        inputs = [x, *matrix, "", bias]
        return self._graph.node("MatMulNBits", *inputs, domain=MICROSOFT, accuracy_level=INTEGER_PRODUCTS, **layout)

    def _stored(self, name: str, matrices: Iterator[QuantisedMatrix]) -> list[str]:
        """
        One below the other. The integers of each are written before the next one is asked for: those of the table of a large
        vocabulary take more memory than all else.
        """
        names = integers, scales, zero_points = [f"{name}.{part}" for part in ("integers", "scales", "zero_points")]
        if not self._graph.has_weight(integers):
            grids = []

            def written() -> Iterator[NDArray[np.uint8]]:
                for matrix in matrices:
                    self._check_finite(name, matrix.scales)
                    grids.append((matrix.scales, matrix.zero_points))
                    yield matrix.integers

            self._graph.weight_in_pieces(integers, written())
            for part, pieces in zip((scales, zero_points), zip(*grids, strict=True), strict=True):
                self._graph.weight(part, np.concatenate(pieces))
        return names

    def _check_finite(self, name: str, stored: NDArray[Any]) -> None:
        if not np.isfinite(stored).all():
            precision = self._precision.name
            raise ExportError(f"{name} has values too large for {precision}; leave {precision} out of --precision")
