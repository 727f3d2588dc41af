"""What a model family gives to be exported."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphs import Weights

from ..decoder_graph import DecoderGraph
from ..equalisation import EqualisedWeights

if TYPE_CHECKING:  # a graph is built without torch, which split_model imports
    from split_model import ModelConfig

__all__ = ["ExportFamily"]


@dataclass(frozen=True, kw_only=True)
class ExportFamily:
    """A model family's graph and weights, and its words in other programs."""

    graph: type[DecoderGraph]
    equalised: Callable[[Weights, "ModelConfig"], EqualisedWeights]
    architecture: str
    """transformers' class of such a model, as config.json names it; that class knows its class of configurations."""
    settings: Callable[["ModelConfig"], dict[str, Any]]
    """What makes transformers' configuration of such a model."""
    position_keys: tuple[str, ...]
    """Where in config.json runtimes look for the number of positions."""
    other_modules: Callable[["ModelConfig"], list[str]]
    """Full names of all modules but the blocks' linear layers: PEFT matches a stranger's regular expressions with them, too."""
