"""Writes ONNX graphs from a model's weights, without torch."""

from .graph import MICROSOFT, Graph
from .weights import Floats, StoredWeights, Weights

__all__ = ["MICROSOFT", "Floats", "Graph", "StoredWeights", "Weights"]
