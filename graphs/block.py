"""
A model's block and embedding as graphs, whatever its family.

N rows of a packed batch, d elements a row, of which an MLP makes `inner_width`.
"""

from typing import TYPE_CHECKING

import numpy as np

from .activations import ACTIVATIONS
from .layers import CausalAttention, LayerNorm, Linear, Norm, RMSNorm
from .matrix_formats import MatrixFormat
from .part_graph import PartGraph

if TYPE_CHECKING:  # a graph is built without torch, which split_model imports
    from split_model import ModelConfig

__all__ = ["Block", "embedding", "embedding_tensors"]


class Block:
    """
        x -> norm -> queries, keys, values -> attention -> projection -> + x = middle
        middle -> norm -> up -> activation -> down -> + middle = output
        or, gated:     -> gate and up -> activation of the gate, times up -> down

    Kept for the backward pass, in bytes of each row of GPT-2 and of SmolLM2-135M, and in MB of 468 rows of GPT-2 small
    (d = 768) and of SmolLM2-135M (d = 576):

        x         the block's input, which the block before has made     4 d     4 d     1.4    1.1
        qkv       queries, keys and values                              12 d     7 d     4.3    1.8
        middle    between attention and MLP                              4 d     4 d     1.4    1.1
        inner     what goes into the activation, and is gated           16 d    21 d     5.8    5.8

    Everything else is computed again: norms, the rotation, attention's probabilities and what they mix, and the activation cost
    a tenth of the products with the matrices, and would be as much again to keep.

    Tensors of the file of weights have the names they have within a block of the model.
    """

    def __init__(self, graph: PartGraph, config: "ModelConfig", form: MatrixFormat) -> None:
        self.graph, self.config, names = graph, config, config.names
        linear = {
            name: Linear(graph, name, shape, form, has_bias=name not in config.without_bias)
            for name, shape in config.layer_shapes.items()
        }

        def norm(name: str) -> Norm:
            kind = LayerNorm if config.has_layer_norms else RMSNorm
            return kind(graph, name, config.norm_widths[name], config.norm_epsilon)

        self.qkv, self.projection = [linear[name] for name in names.qkv], linear[names.projection]
        self.up, self.down = [linear[name] for name in names.up], linear[names.down]
        self.attention_norm, self.mlp_norm = norm(names.attention_norm), norm(names.mlp_norm)
        head_norms = (norm(names.query_norm), norm(names.key_norm)) if config.normalises_heads else None
        self.attention = CausalAttention(graph, config, head_norms)
        self.activation = ACTIVATIONS[config.activation]
        self._divided: set[tuple[str, str]] = set()

    def forward(self, x: str) -> str:
        """(N, d) -> (N, d). What the backward pass needs besides ``x`` is handed on by `PartGraph.keep`."""
        qkv = self._forward("qkv", self.qkv, self.attention_norm.forward(x))
        mixed = self.projection.forward(self.attention.forward(qkv))
        middle = self.graph.keep("middle", self.graph.node("Add", mixed, x), self.config.width)
        inner = self._forward("inner", self.up, self.mlp_norm.forward(middle))
        return self.graph.node("Add", self.down.forward(self._active(inner)), middle)

    def backward(self, x: str, dy: str) -> str:
        """Input (N, d) and the gradient by the output (N, d) -> the gradient by the input (N, d)."""
        middle = self.graph.kept("middle", self.config.width)
        qkv, inner = self._kept("qkv", self.qkv), self._kept("inner", self.up)
        d_inner = self._through_activation(inner, self.down.backward(self._active(inner), dy))
        d_normed = self._backward(self.up, self.mlp_norm.forward(middle), d_inner)
        d_middle = self.graph.node("Add", self.mlp_norm.backward(middle, d_normed), dy)
        d_mixed = self.projection.backward(self.attention.forward(qkv), d_middle)
        d_qkv = self.attention.backward(qkv, d_mixed)
        d_normed = self._backward(self.qkv, self.attention_norm.forward(x), d_qkv)
        return self.graph.node("Add", self.attention_norm.backward(x, d_normed), d_middle)

    def _forward(self, what: str, layers: list[Linear], x: str) -> tuple[str, ...]:
        """The outputs of the layers, each handed on."""
        kept = zip(_kept_names(what, layers), layers, strict=True)
        return tuple(self.graph.keep(name, layer.forward(x), layer.shape[1]) for name, layer in kept)

    def _kept(self, what: str, layers: list[Linear]) -> tuple[str, ...]:
        kept = zip(_kept_names(what, layers), layers, strict=True)
        return tuple(self.graph.kept(name, layer.shape[1]) for name, layer in kept)

    def _backward(self, layers: list[Linear], x: str, gradients: tuple[str, ...]) -> str:
        """The layers' input and the gradients by their outputs -> the gradient by the input."""
        first, *others = (layer.backward(x, dy) for layer, dy in zip(layers, gradients, strict=True))
        for other in others:
            first = self.graph.node("Add", first, other)
        return first

    def _active(self, inner: tuple[str, ...]) -> str:
        """What goes into the MLP's last layer."""
        if not self.config.is_gated:
            return self.activation.function(self.graph, inner[0])
        gate, up = self._gate_and_up(inner)
        return self.graph.node("Mul", self.activation.function(self.graph, gate), up)

    def _through_activation(self, inner: tuple[str, ...], d_active: str) -> tuple[str, ...]:
        """The gradient by what goes into the MLP's last layer -> by the outputs of its first ones."""
        node = self.graph.node
        if not self.config.is_gated:
            return (node("Mul", d_active, self.activation.derivative(self.graph, inner[0])),)
        gate, up = self._gate_and_up(inner)
        d_up = node("Mul", d_active, self.activation.function(self.graph, gate))
        d_gate = node("Mul", node("Mul", d_active, up), self.activation.derivative(self.graph, gate))
        return (node("Concat", d_gate, d_up, axis=1),) if len(inner) == 1 else (d_gate, d_up)

    def _gate_and_up(self, inner: tuple[str, ...]) -> tuple[str, ...]:
        """Apart, where one layer makes both; divided once in a graph."""
        if len(inner) == 2:
            return inner
        parts = (f"{inner[0]}/gate", f"{inner[0]}/up")
        if parts not in self._divided:
            self._divided.add(parts)
            self.graph.node_with_outputs("Split", inner, parts, axis=1, num_outputs=2)
        return parts


def _kept_names(what: str, layers: list[Linear]) -> list[str]:
    """Of one layer that makes all: ``what``; of several, a name for each."""
    return [what] if len(layers) == 1 else [f"{what}.{number}" for number in range(len(layers))]


def embedding(graph: PartGraph, config: "ModelConfig", tokens: str) -> str:
    """From the tokens' embeddings (N, d), which a device looks up in its file, to the first block's input (N, d)."""
    if config.rotary is not None:
        return graph.node("Identity", tokens)
    table = graph.weight_input(config.positions_name, np.float32, [config.num_positions, config.width])
    return graph.node("Add", tokens, graph.node("Gather", table, graph.given("positions", np.int64, ["rows"])))


def embedding_tensors(config: "ModelConfig") -> tuple[str, ...]:
    """What `embedding` takes besides the tokens' table, by the names of `ModelConfig.tensor_shapes`."""
    return () if config.rotary is not None else (config.positions_name,)
