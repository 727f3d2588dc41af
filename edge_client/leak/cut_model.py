"""A model cut in two with its adapter on one machine, as a device and the server have it together."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from privacy import Centre
from protocol import Array
from split_model import Adapter, EdgePart, LoraConfig, PretrainedModel, ServerPart, adapter_shapes

__all__ = ["CutModel"]


class CutModel:
    """
    Both parts, in float32 on the CPU.

    Args:
        adapter: of the whole model.
    """

    def __init__(self, model: PretrainedModel, adapter: Adapter, lora: LoraConfig, cut_layer: int) -> None:
        self.model, self.config, self.lora, self.cut_layer = model, model.config, lora, cut_layer
        where = {"weight_dtype": torch.float32, "device": torch.device("cpu")}
        self.edge = EdgePart(model, cut_layer, lora, **where)  # type: ignore[arg-type]
        self.server = ServerPart(model, cut_layer, lora, **where)  # type: ignore[arg-type]
        for part, blocks in ((self.edge, range(cut_layer)), (self.server, range(cut_layer, model.config.num_layers))):
            names = adapter_shapes(model.config, lora, blocks)
            part.load_adapter({name: adapter[name] for name in names})
            part.eval()

    @cached_property
    def table(self) -> Tensor:
        """(V, d) embeddings of all tokens."""
        return self.model.tensors[self.config.table_name].view().float()

    @property
    def head(self) -> Tensor:
        """(V, d)"""
        return self.server.head

    @cached_property
    def centre(self) -> Centre:
        """Around which activations are clipped."""
        with torch.no_grad(), self.edge.without_adapter():
            return Centre.of_model(self.config.vocabulary_size, self.config.num_positions, self._activations)

    @torch.no_grad()
    def activations(self, tokens: Sequence[Array]) -> Array:
        """Activations (N, d) at the cut of sequences, one under the other."""
        joined = [array for array in tokens if len(array)]
        return self._activations(torch.cat([torch.as_tensor(array) for array in joined]).numpy(), _lengths(joined))

    def _activations(self, tokens: Array, lengths: Array) -> Array:
        activations: Array = self.edge(tokens, lengths).numpy()
        return activations


def _lengths(sequences: Sequence[Array]) -> Array:
    lengths: Array = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int32).numpy()
    return lengths
