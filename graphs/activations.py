"""The functions between the matrices of an MLP, element by element, each with its derivative."""

import math
from abc import ABC, abstractmethod

import numpy as np

from .part_graph import PartGraph

__all__ = ["ACTIVATIONS", "Activation"]


class Activation(ABC):
    """Both passes have as few steps as possible: each goes through the largest tensor of a block."""

    @abstractmethod
    def forward(self, graph: PartGraph, x: str) -> str:
        """y of the shape of x."""

    @abstractmethod
    def backward(self, graph: PartGraph, x: str, dy: str) -> str:
        """dx = dy ∘ y'(x)."""


class GeluTanh(Activation):
    """
    y = x / 2 (1 + tanh(c (x + a x³))) with c = sqrt(2 / π) and a = 0.044715. (1 + tanh(t)) / 2 is sigmoid(2 t), so that with
    z = 2 c x + 2 c a x³ and S = sigmoid(z)

        y = x S        y' = S (1 + (1 - S) x z')        x z' = x (2 c + 6 c a x²)
    """

    CUBIC = 0.044715
    SLOPE = 2 * math.sqrt(2 / math.pi)
    """2 c."""

    def forward(self, graph: PartGraph, x: str) -> str:
        return graph.node("Gelu", x, approximate="tanh")

    def backward(self, graph: PartGraph, x: str, dy: str) -> str:
        node = graph.node
        slope, one = graph.constant(self.SLOPE, np.float32), graph.constant(1, np.float32)
        square = node("Mul", x, x)

        def odd(factor: float) -> str:  # x (2 c + factor 2 c a x²)
            cubic = graph.constant(factor * self.SLOPE * self.CUBIC, np.float32)
            return node("Mul", x, node("Add", node("Mul", square, cubic), slope))

        sigmoid = node("Sigmoid", odd(1))
        rest = node("Mul", node("Sub", one, sigmoid), odd(3))
        return node("Mul", node("Mul", dy, sigmoid), node("Add", rest, one))


class GeluErf(Activation):
    """y = x Φ(x), with the normal distribution's Φ(x) = (1 + erf(x / sqrt(2))) / 2; y' = Φ(x) + x exp(-x² / 2) / sqrt(2 π)."""

    def forward(self, graph: PartGraph, x: str) -> str:
        return graph.node("Gelu", x)

    def backward(self, graph: PartGraph, x: str, dy: str) -> str:
        node = graph.node

        def times(value: str, factor: float) -> str:
            return node("Mul", value, graph.constant(factor, np.float32))

        error = node("Add", node("Erf", times(x, math.sqrt(0.5))), graph.constant(1, np.float32))
        density = node("Mul", x, times(node("Exp", times(node("Mul", x, x), -0.5)), 1 / math.sqrt(2 * math.pi)))
        return node("Mul", dy, node("Add", times(error, 0.5), density))


class Relu(Activation):
    """y = max(x, 0); y' is 1 where x > 0, else 0."""

    def forward(self, graph: PartGraph, x: str) -> str:
        return graph.node("Relu", x)

    def backward(self, graph: PartGraph, x: str, dy: str) -> str:
        return graph.node("Mul", dy, graph.cast(graph.node("Greater", x, graph.constant(0, np.float32)), np.float32))


ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": GeluTanh(),
    "gelu_pytorch_tanh": GeluTanh(),
    "gelu": GeluErf(),
    "relu": Relu(),
}
"""By transformers' names."""
