"""
A language model as an ONNX graph, from its token ids to its logits, or a stretch of its blocks.

B sequences, S new tokens of each, d width, H heads of D elements, V tokens in the vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from graphs import MICROSOFT, Graph, Weights

from .attention import ATTENTIONS, Attention, Cache, Heads
from .graph_weights import GraphWeights
from .precision import Precision
from .quantisation import BlockFormat

if TYPE_CHECKING:  # a graph is built without torch, which split_model imports
    from split_model import ModelConfig

__all__ = ["DecoderGraph"]


class DecoderGraph(ABC):
    """
    Adds a stretch of a model's blocks to a graph. A family derives its class from this one: what its embedding, its blocks and
    its norms are. Linear layers, token embedding, LM head, keys and values are here.

    Args:
        attention: a key of `ATTENTIONS`.
        adapted: names of linear layers with empty slots for LoRA matrices.
    """

    def __init__(
        self,
        graph: Graph,
        config: "ModelConfig",
        weights: Weights,
        precision: Precision,
        attention: str,
        blocks: range,
        adapted: Collection[str] = (),
    ) -> None:
        self.graph, self.config, self.precision = graph, config, precision
        self.weights = GraphWeights(graph, weights, precision)
        self.attention_form, self.blocks, self.adapted = ATTENTIONS[attention], blocks, adapted
        self.node = graph.node
        self.heads = Heads(count=config.num_heads, width=config.head_width, dtype=precision.dtype)
        self.shapes = {
            f"{config.block_name(block)}.{layer}": shape for block in blocks for layer, shape in config.layer_shapes.items()
        }
        """Of every linear layer, (in, out)."""
        self.inputs: str
        """Token ids (B, S), or the hidden states (B, S, d) of the stretch before."""
        self.attention: Attention
        """Of all blocks, which share its mask."""

    def build(self) -> None:
        """Add the blocks, with the embeddings before the model's first block, and the final norm and head after its last."""
        hidden = self.embeddings() if self.blocks.start == 0 else self.hidden_states()
        with self.graph.scope("mask"):
            self.attention = self.attention_form.build(self.graph, self.heads, self.inputs)
        caches = [self.cache(index) for index in self.blocks]
        for index, cache in zip(self.blocks, caches, strict=True):
            hidden = self.block(self.config.block_name(index), hidden, cache)
        if self.blocks.stop == self.config.num_layers:
            self.head(self.final_norm(hidden))
        else:
            self.name_output("hidden_states", hidden, self.config.width)
        for cache in caches:
            for name in (cache.present_key, cache.present_value):
                self.graph.output(name, self.precision.dtype, self.cache_shape("total_sequence_length"))

    @abstractmethod
    def embeddings(self) -> str:
        """`token_inputs`, and whatever else the family takes -> (B, S, d)."""

    @abstractmethod
    def block(self, name: str, x: str, cache: Cache) -> str:
        """The block of a `ModelConfig.block_name`: (B, S, d) -> (B, S, d)."""

    @abstractmethod
    def final_norm(self, x: str) -> str:
        """(B, S, d) -> (B, S, d)."""

    def token_inputs(self) -> None:
        """Inputs: ids of the new tokens, (B, S), and 0 for padding among the T earlier and new ones, (B, T)."""
        self.inputs = self.graph.input("input_ids", np.int64, ["batch_size", "sequence_length"])
        self.graph.input("attention_mask", np.int64, ["batch_size", "total_sequence_length"])

    def hidden_states(self) -> str:
        """Inputs of a later stretch of the model: the hidden states (B, S, d) of the one before, and the mask."""
        shape: list[int | str] = ["batch_size", "sequence_length", self.config.width]
        self.inputs = self.graph.input("hidden_states", self.precision.dtype, shape)
        self.graph.input("attention_mask", np.int64, ["batch_size", "total_sequence_length"])
        return self.inputs

    def linear(self, name: str, x: str, form: BlockFormat | None) -> str:
        """
        x W + b, and what an adapter adds to it: (B, S, in) -> (B, S, out).

        Args:
            form: how W is stored, one of the precision's; None: as the precision's dtype.
        """
        inputs, outputs = self.shapes[name]
        matrix, bias = f"{name}.weight", self.weights.plain(f"{name}.bias")
        with self.graph.scope(name):
            if form:
                y = self.weights.product(x, matrix, (outputs, inputs), form, bias, transposed=True)
            else:
                y = self.node("Add", self.node("MatMul", x, self.weights.plain(matrix)), bias)
            return self.node("Add", y, self.low_rank(name, x, inputs, outputs)) if name in self.adapted else y

    def low_rank(self, name: str, x: str, inputs: int, outputs: int) -> str:
        """x A B. The matrices have any rank, and are float32 in graphs of all precisions: one adapter file serves all."""
        a = self.graph.slot(f"{name}.lora_A.weight", np.float32, [inputs, f"{name}.rank"])
        b = self.graph.slot(f"{name}.lora_B.weight", np.float32, [f"{name}.rank", outputs])
        if self.precision.dtype != np.float32:
            a, b = (self.graph.cast(matrix, self.precision.dtype) for matrix in (a, b))
        return self.node("MatMul", self.node("MatMul", x, a), b)

    def head(self, x: str) -> None:
        """(B, S, d) -> logits (B, S, V)."""
        table, shape = self.config.head_name, (self.config.vocabulary_size, self.config.width)
        with self.graph.scope(self.config.separate_head_name.removesuffix(".weight")):
            # The head is a third of a small model's work, and a program that continues a text needs only the last row's logits.
            start = self.graph.optional_input("logits_start", np.array([0]))
            end, axis = self.graph.constant([np.iinfo(np.int64).max]), self.graph.constant([1])
            x = self.node("Slice", x, start, end, axis)
            if self.precision.table:
                logits = self.weights.product(x, table, shape, self.precision.table)
            else:
                # Gemm takes the table as it is. For a MatMul, runtimes would transpose it and keep it in memory twice.
                rows = self.node("Reshape", x, self.graph.constant([-1, self.config.width]))
                leading = self.node("Shape", x, start=0, end=2)
                whole = self.node("Concat", leading, self.graph.constant([self.config.vocabulary_size]), axis=0)
                logits = self.node("Reshape", self.node("Gemm", rows, self.weights.plain(table), transB=1), whole)
        self.name_output("logits", logits, self.config.vocabulary_size)

    def embedded(self, tokens: str) -> str:
        """Ids (B, S) -> their rows of the token embedding, (B, S, d)."""
        form = self.precision.table
        if form is None:
            return self.node("Gather", self.weights.plain(self.config.table_name), tokens)
        integers, *grid = self.weights.quantised(self.config.table_name, form)
        # MatMulNBits wants the blocks of the LM head as a dimension of their own, this operator does not. The Reshape is folded
        # when the graph is loaded, and both use one table in memory.
        table = self.node("Reshape", integers, self.graph.constant([self.config.vocabulary_size, -1]))
        layout = {"bits": form.bits, "block_size": form.size, "gather_axis": 0, "quantize_axis": 1}
        rows = self.node("GatherBlockQuantized", table, tokens, *grid, domain=MICROSOFT, **layout)
        if form.padded(self.config.width) == self.config.width:
            return rows
        start, end, axis = (self.graph.constant([value]) for value in (0, self.config.width, 2))
        return self.node("Slice", rows, start, end, axis)

    def cache(self, index: int) -> Cache:
        names = {
            f"{when}_{what}": f"{prefix}.{index}.{what}"
            for what in ("key", "value")
            for when, prefix in (("past", "past_key_values"), ("present", "present"))
        }
        for what in ("key", "value"):
            self.graph.input(names[f"past_{what}"], self.precision.dtype, self.cache_shape("past_sequence_length"))
        return Cache(**names)

    def cache_shape(self, length: str) -> list[int | str]:
        return ["batch_size", self.heads.count, length, self.heads.width]

    def name_output(self, name: str, value: str, width: int) -> None:
        self.graph.node_with_outputs("Identity", [value], [name])
        self.graph.output(name, self.precision.dtype, ["batch_size", "sequence_length", width])
