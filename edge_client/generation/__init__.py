"""Text from an exported model. Needs no torch, no network and nothing else of edge_client."""

from .decoder import RuntimeMissing
from .exported_model import ExportedModelError, open_exported
from .generator import GenerationError, Generator, Sampling, Speed
from .memory import process_memory
from .prepared import precisions_to_prepare, prepare

__all__ = [
    "ExportedModelError",
    "GenerationError",
    "Generator",
    "RuntimeMissing",
    "Sampling",
    "Speed",
    "open_exported",
    "precisions_to_prepare",
    "prepare",
    "process_memory",
]
