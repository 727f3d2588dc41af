"""Text from an exported model. Needs no torch, no network and nothing else of edge_client."""

from .decoder import RuntimeMissing
from .exported_model import ExportedModel, ExportedModelError
from .generator import GenerationError, Generator, Sampling, Speed
from .memory import process_memory
from .prepared import precisions_to_prepare, prepare

__all__ = [
    "ExportedModel",
    "ExportedModelError",
    "GenerationError",
    "Generator",
    "RuntimeMissing",
    "Sampling",
    "Speed",
    "precisions_to_prepare",
    "prepare",
    "process_memory",
]
