"""Writes ONNX graphs from a model's weights, without torch."""

from .graph import MICROSOFT, Graph
from .part import build_part
from .part_graph import Adaptation
from .weights import Floats, StoredWeights, Weights

__all__ = ["MICROSOFT", "Adaptation", "Floats", "Graph", "StoredWeights", "Weights", "build_part"]
