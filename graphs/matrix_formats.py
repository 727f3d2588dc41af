"""How the frozen matrices of a device's part are stored, and how its graphs multiply by them."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from storage import ModelError

from .graph import Shape
from .part_graph import PartGraph
from .weights import Floats

__all__ = ["MATRIX_FORMATS", "MatrixFormat"]

Tensors = dict[str, NDArray[Any]]
LARGEST_INT8 = 127
SMALLEST = 1e-20
"""What is smaller counts as zero: a bias divided by its scale would not be finite."""


class MatrixFormat(ABC):
    """
    One of `storage.EDGE_WEIGHTS`. Of a linear layer's matrix W (in, out) it knows what the file of weights holds, the product
    x W, and dy Wᵀ for the gradient by x; of a table T (V, d) of tokens, the products x Tᵀ and p T. All products are computed in
    float32.
    """

    @abstractmethod
    def store(self, name: str, matrix: Floats, *, shared_scale: int = 0) -> Tensors:
        """
        The tensors of a file that stand for a matrix.

        Args:
            shared_scale: the axis along which elements share a scale, where there are scales: 0, one scale a column, for linear
                layers; 1, one a row, for a table of which rows are looked up.

        Raises:
            ModelError: a value is too large for the format, or no number.
        """

    @abstractmethod
    def product(self, graph: PartGraph, name: str, shape: tuple[int, int], x: str, bias: str) -> str:
        """x W + bias: (N, in) and (out,) -> (N, out); "" is no bias."""

    @abstractmethod
    def transposed_product(self, graph: PartGraph, name: str, shape: tuple[int, int], dy: str) -> str:
        """dy Wᵀ: (N, out) -> (N, in)."""

    @abstractmethod
    def table_product(self, graph: PartGraph, name: str, shape: Shape, x: str) -> str:
        """x Tᵀ: (N, d) -> (N, V)."""

    @abstractmethod
    def transposed_table_product(self, graph: PartGraph, name: str, shape: Shape, p: str) -> str:
        """p T: (N, V) -> (N, d)."""


class Floating(MatrixFormat):
    """As numbers of ``dtype``."""

    def __init__(self, dtype: DTypeLike) -> None:
        self.dtype = np.dtype(dtype)

    def store(self, name: str, matrix: Floats, *, shared_scale: int = 0) -> Tensors:
        with np.errstate(over="ignore"):
            stored = matrix.astype(self.dtype, order="C")
        check_finite(name, stored, self.dtype.name)
        return {name: stored}

    def product(self, graph: PartGraph, name: str, shape: tuple[int, int], x: str, bias: str) -> str:
        return graph.node("Gemm", x, self._matrix(graph, name, shape), *([bias] if bias else []))

    def transposed_product(self, graph: PartGraph, name: str, shape: tuple[int, int], dy: str) -> str:
        return graph.node("Gemm", dy, self._matrix(graph, name, shape), transB=1)

    def table_product(self, graph: PartGraph, name: str, shape: Shape, x: str) -> str:
        return graph.node("Gemm", x, self._matrix(graph, name, shape), transB=1)

    def transposed_table_product(self, graph: PartGraph, name: str, shape: Shape, p: str) -> str:
        return graph.node("Gemm", p, self._matrix(graph, name, shape))

    def _matrix(self, graph: PartGraph, name: str, shape: Shape) -> str:
        weight = graph.weight_input(name, self.dtype, shape)
        return weight if self.dtype == np.float32 else graph.cast(weight, np.float32)


class Integers(MatrixFormat):
    """
    As integers Q of 8 bits with a scale s for each column, W = Q diag(s). Neither product makes W:

        x W + b = (x Q + b / s) diag(s)        dy Wᵀ = (dy diag(s)) Qᵀ

    so that of the matrix only Q in float32 exists, for as long as the product takes. A table has a scale for each row instead,
    T = diag(s) Q:

        x Tᵀ = (x Qᵀ) diag(s)        p T = (p diag(s)) Q
    """

    def store(self, name: str, matrix: Floats, *, shared_scale: int = 0) -> Tensors:
        largest = np.abs(matrix).max(axis=shared_scale, keepdims=True)
        check_finite(name, largest, "int8")
        scale = np.where(largest > SMALLEST, largest / np.float32(LARGEST_INT8), np.float32(1))
        integers = np.rint(matrix / scale).astype(np.int8, order="C")
        return {name: integers, scale_name(name): scale.reshape(-1)}

    def product(self, graph: PartGraph, name: str, shape: tuple[int, int], x: str, bias: str) -> str:
        integers, scale = self._inputs(graph, name, shape, shape[1:])
        divided = [graph.node("Div", bias, scale)] if bias else []
        product = graph.node("Gemm", x, graph.cast(integers, np.float32), *divided)
        return graph.node("Mul", product, scale)

    def transposed_product(self, graph: PartGraph, name: str, shape: tuple[int, int], dy: str) -> str:
        integers, scale = self._inputs(graph, name, shape, shape[1:])
        return graph.node("Gemm", graph.node("Mul", dy, scale), graph.cast(integers, np.float32), transB=1)

    def table_product(self, graph: PartGraph, name: str, shape: Shape, x: str) -> str:
        integers, scale = self._inputs(graph, name, shape, shape[:1])
        return graph.node("Mul", graph.node("Gemm", x, graph.cast(integers, np.float32), transB=1), scale)

    def transposed_table_product(self, graph: PartGraph, name: str, shape: Shape, p: str) -> str:
        integers, scale = self._inputs(graph, name, shape, shape[:1])
        return graph.node("Gemm", graph.node("Mul", p, scale), graph.cast(integers, np.float32))

    def _inputs(self, graph: PartGraph, name: str, shape: Shape, num_scales: Shape) -> tuple[str, str]:
        return graph.weight_input(name, np.int8, shape), graph.weight_input(scale_name(name), np.float32, num_scales)


def scale_name(name: str) -> str:
    return f"{name}.scale"


def check_finite(name: str, stored: NDArray[Any], form: str) -> None:
    """
    Raises:
        ModelError: a value was too large for the format, or no number.
    """
    if not np.isfinite(stored).all():
        another = "choose another model" if form == "float32" else "leave --edge-weights at float32"
        raise ModelError(f"{name} has values that {form} cannot hold; {another}")


MATRIX_FORMATS: dict[str, MatrixFormat] = {
    "float32": Floating(np.float32),
    "float16": Floating(np.float16),
    "int8": Integers(),
}
"""By the names of `storage.EDGE_WEIGHTS`."""
