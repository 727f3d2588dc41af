"""The functions between the matrices of an MLP, element by element, each with its derivative."""

import math
from abc import ABC, abstractmethod

import numpy as np

from .part_graph import PartGraph

__all__ = ["ACTIVATIONS", "Activation"]


class Activation(ABC):
    """y = f(x), and f'(x). Both go through the largest tensor of a block in few steps, and hold few copies of it at once."""

    @abstractmethod
    def function(self, graph: PartGraph, x: str) -> str: ...

    @abstractmethod
    def derivative(self, graph: PartGraph, x: str) -> str: ...


class GeluTanh(Activation):
    """
    y = x / 2 (1 + tanh(c (x + a x³))) with c = sqrt(2 / π) and a = 0.044715. (1 + tanh(t)) / 2 is sigmoid(2 t), so that with
    z = 2 c x + 2 c a x³ and S = sigmoid(z)

        y = x S        y' = S + S (1 - S) x z' = 1 - (1 - S) (1 - S x z')        x z' = 2 c x + 6 c a x³

    The product can be computed in the place of its factors; the sum would need a third copy.
    """

    CUBIC = 0.044715
    SLOPE = 2 * math.sqrt(2 / math.pi)
    """2 c."""

    def function(self, graph: PartGraph, x: str) -> str:
        return graph.node("Gelu", x, approximate="tanh")

    def derivative(self, graph: PartGraph, x: str) -> str:
        node, slope, one = graph.node, graph.constant(self.SLOPE, np.float32), graph.constant(1, np.float32)
        square = node("Mul", x, x)

        def odd(factor: float) -> str:  # 2 c x + factor 2 c a x³
            cubic = graph.constant(factor * self.SLOPE * self.CUBIC, np.float32)
            return node("Mul", x, node("Add", node("Mul", square, cubic), slope))

        sigmoid = node("Sigmoid", odd(1))
        rest = node("Sub", one, node("Mul", sigmoid, odd(3)))
        return node("Sub", one, node("Mul", node("Sub", one, sigmoid), rest))


class GeluErf(Activation):
    """y = x Φ(x), with the normal distribution's Φ(x) = (1 + erf(x / sqrt(2))) / 2; y' = Φ(x) + x exp(-x² / 2) / sqrt(2 π)."""

    def function(self, graph: PartGraph, x: str) -> str:
        return graph.node("Gelu", x)

    def derivative(self, graph: PartGraph, x: str) -> str:
        node = graph.node

        def times(value: str, factor: float) -> str:
            return node("Mul", value, graph.constant(factor, np.float32))

        error = node("Add", node("Erf", times(x, math.sqrt(0.5))), graph.constant(1, np.float32))
        density = node("Mul", x, times(node("Exp", times(node("Mul", x, x), -0.5)), 1 / math.sqrt(2 * math.pi)))
        return node("Add", times(error, 0.5), density)


class Relu(Activation):
    """y = max(x, 0); y' is 1 where x > 0, else 0."""

    def function(self, graph: PartGraph, x: str) -> str:
        return graph.node("Relu", x)

    def derivative(self, graph: PartGraph, x: str) -> str:
        return graph.cast(graph.node("Greater", x, graph.constant(0, np.float32)), np.float32)


class Silu(Activation):
    """y = x S with S = sigmoid(x); y' = S + x S (1 - S) = S (1 + x (1 - S))."""

    def function(self, graph: PartGraph, x: str) -> str:
        return graph.node("Mul", x, graph.node("Sigmoid", x))

    def derivative(self, graph: PartGraph, x: str) -> str:
        node, one = graph.node, graph.constant(1, np.float32)
        sigmoid = node("Sigmoid", x)
        return node("Mul", sigmoid, node("Add", node("Mul", x, node("Sub", one, sigmoid)), one))


ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": GeluTanh(),
    "gelu_pytorch_tanh": GeluTanh(),
    "gelu": GeluErf(),
    "relu": Relu(),
    "silu": Silu(),
}
"""By transformers' names."""
