"""
A language model as an ONNX graph, from its token ids to its logits, or a stretch of its blocks.

B sequences, S new tokens of each, d width, V tokens in the vocabulary; H heads of queries and K of keys and values, D
elements each.
"""

from collections.abc import Collection, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from graphs import MICROSOFT, Graph, Weights

from .attention import ATTENTIONS, Angles, Attention, Cache, Heads, split_heads
from .graph_weights import GraphWeights, Rounding
from .precision import Precision, block_forms

if TYPE_CHECKING:  # a graph is built without torch, which split_model imports
    from split_model import ModelConfig
    from split_model.rotary import Rotary

__all__ = ["DecoderGraph"]

ACTIVATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "gelu": ("Gelu", {}),
    "relu": ("Relu", {}),
}
"""Operators with their attributes, by transformers' names; "silu" is made of two."""


class DecoderGraph:
    """
    Adds a stretch of a model's blocks to a graph, in the order of the forward pass.

    Args:
        attention: a key of `ATTENTIONS`.
        adapted: names of linear layers with empty slots for LoRA matrices.
        rounding: of matrices that are quantised; None: to the nearest values.
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
        rounding: Rounding | None = None,
    ) -> None:
        self.graph, self.config, self.precision = graph, config, precision
        self.weights = GraphWeights(graph, weights, precision, rounding)
        self.attention_form, self.blocks, self.adapted = ATTENTIONS[attention], blocks, adapted
        self.node, self.forms = graph.node, block_forms(config, precision)
        self.heads = Heads(
            count=config.num_heads, keys=config.num_key_value_heads, width=config.head_width, dtype=precision.dtype
        )
        self.inputs: str
        """Token ids (B, S), or the hidden states (B, S, d) of the stretch before."""
        self.attention: Attention
        """Of all blocks, which share its masks and angles."""

    def build(self) -> None:
        """Add the blocks, with the embeddings before the model's first block, and the final norm and head after its last."""
        hidden, added = self.stretch()
        if self.blocks.stop == self.config.num_layers:
            _, normed = self.sum_and_norm(self.config.names.final_norm, hidden, added)
            self.head(normed)
        else:
            self.name_output("hidden_states", self.sum(hidden, added), self.config.width)
        for cache in map(self.cache_names, self.blocks):
            for name in (cache.present_key, cache.present_value):
                self.graph.output(name, self.precision.dtype, self.cache_shape("total_sequence_length"))

    def stretch(self) -> tuple[str, str | None]:
        """
        Add the blocks, with the embeddings before the model's first.

        Returns:
            Hidden states (B, S, d), and what is still to be added to them: some runtimes have one operator for a sum and its
            norm.
        """
        hidden = self.embeddings() if self.blocks.start == 0 else self.hidden_states()
        angles = None if self.config.rotary is None else self.angles(self.config.rotary)
        with self.graph.scope("mask"):
            self.attention = self.attention_form.build(self.graph, self.heads, self.inputs, angles)
        caches = [self.cache(index) for index in self.blocks]
        added = None
        for index, cache in zip(self.blocks, caches, strict=True):
            hidden, added = self.block(index, hidden, added, cache)
        return hidden, added

    def embeddings(self) -> str:  # -> (B, S, d)
        self.token_inputs()
        if self.config.rotary is not None:
            return self.embedded(self.inputs)
        positions = self.position_ids()
        with self.graph.scope("embeddings"):
            table = self.weights.plain(self.config.positions_name)
            return self.node("Add", self.embedded(self.inputs), self.node("Gather", table, positions))

    def block(self, index: int, x: str, added: str | None, cache: Cache) -> tuple[str, str]:
        """From what the block before leaves to what this one does, each as `stretch` returns it."""
        names, prefix = self.config.names, self.config.block_name(index)
        x, normed = self.sum_and_norm(f"{prefix}.{names.attention_norm}", x, added)
        x, normed = self.sum_and_norm(f"{prefix}.{names.mlp_norm}", x, self.self_attention(index, normed, cache))
        return x, self.mlp(prefix, normed)

    def self_attention(self, index: int, x: str, cache: Cache) -> str:
        config, names, prefix = self.config, self.config.names, self.config.block_name(index)
        qkv = self.side_by_side(prefix, names.qkv, x)
        with self.graph.scope(f"{prefix}.attention"):
            if config.rotary is not None or config.normalises_heads:
                query, key, value = split_heads(self.graph, qkv, self.heads)
                if config.normalises_heads:
                    query = self.head_norm(f"{prefix}.{names.query_norm}", query, self.heads.count)
                    key = self.head_norm(f"{prefix}.{names.key_norm}", key, self.heads.keys)
                if config.rotary is not None:
                    query = self.attention.turn(query, self.heads.count)
                    key = self.attention.turn(key, self.heads.keys)
                qkv = (query, key, value)
            mixed = self.attention.attend(qkv, cache, config.window(index))
        return self.linear(prefix, names.projection, mixed)

    def mlp(self, prefix: str, x: str) -> str:
        names = self.config.names
        inner = list(self.side_by_side(prefix, names.up, x))
        if self.config.is_gated:
            if len(inner) == 1:
                whole, inner = inner[0], [f"{inner[0]}/gate", f"{inner[0]}/up"]
                self.graph.node_with_outputs("Split", [whole], inner, axis=-1, num_outputs=2)
            gate, up = inner
            active = self.node("Mul", self.activated(gate), up)
        else:
            active = self.activated(inner[0])
        return self.linear(prefix, names.down, active)

    def activated(self, x: str) -> str:
        if self.config.activation == "silu":
            return self.node("Mul", x, self.node("Sigmoid", x))
        operator, attributes = ACTIVATIONS[self.config.activation]
        return self.node(operator, x, **attributes)

    def sum(self, x: str, added: str | None) -> str:
        return x if added is None else self.node("Add", x, added)

    def sum_and_norm(self, name: str, x: str, added: str | None) -> tuple[str, str]:
        # In float16 some versions of ONNX Runtime add up its squares in float16 on CUDA, where they overflow.
        has_operator = self.attention_form.has_sum_and_norm and self.precision.dtype == np.float32
        if added is None or self.config.has_layer_norms or not has_operator:
            x = self.sum(x, added)
            return x, self.norm(name, x)
        # ONNX Runtime makes one operator of a sum and its LayerNormalization by itself, but not of a sum and this norm.
        total, normed = f"{added}/sum", f"{added}/normed"
        self.graph.node_with_outputs(
            "SkipSimplifiedLayerNormalization",
            [x, added, self.weights.plain(f"{name}.weight")],
            [normed, "", "", total],
            domain=MICROSOFT,
            epsilon=self.config.norm_epsilon,
        )
        return total, normed

    def norm(self, name: str, x: str) -> str:
        """Over the last dimension."""
        epsilon = self.config.norm_epsilon
        with self.graph.scope(name):
            gain = self.weights.plain(f"{name}.weight")
            if self.config.has_layer_norms:
                offset = self.weights.plain(f"{name}.bias")
                return self.node("LayerNormalization", x, gain, offset, axis=-1, epsilon=epsilon)
            # Operators that every runtime has; ONNX Runtime makes one of its own of them. In float32: a square of float16 is
            # soon beyond its largest number.
            wide = x if self.precision.dtype == np.float32 else self.graph.cast(x, np.float32)
            square = self.node("Pow", wide, self.graph.constant(2, np.float32))
            mean = self.node("ReduceMean", square, self.graph.constant([-1]))
            size = self.node("Sqrt", self.node("Add", mean, self.graph.constant(epsilon, np.float32)))
            normed = self.node("Div", wide, size)
            if wide != x:
                normed = self.graph.cast(normed, self.precision.dtype)
            return self.node("Mul", normed, gain)

    def head_norm(self, name: str, x: str, count: int) -> str:
        """Of each of ``count`` heads, (B, S, count D) -> (B, S, count D)."""
        by_head = self.node("Reshape", x, self.graph.constant([0, 0, count, self.heads.width]))
        return self.node("Reshape", self.norm(name, by_head), self.graph.constant([0, 0, count * self.heads.width]))

    def angles(self, rotary: "Rotary") -> Angles:
        """In float32: in float16, positions from 2048 on would be rounded."""
        node, constant = self.node, self.graph.constant
        with self.graph.scope("rotation"):
            positions = self.graph.cast(node("Unsqueeze", self.position_ids(), constant([2])), np.float32)
            angles = node("Mul", positions, self.graph.weight("rotation/frequencies", rotary.frequencies()))
            tables = [node("Cos", angles), node("Sin", angles)]
            if rotary.amplitude != 1:
                tables = [node("Mul", table, constant(rotary.amplitude, np.float32)) for table in tables]
            if self.precision.dtype != np.float32:
                tables = [self.graph.cast(table, self.precision.dtype) for table in tables]
        return Angles(width=rotary.width, cosines=tables[0], sines=tables[1])

    def position_ids(self) -> str:
        """An input: the position of each new token, (B, S)."""
        return self.graph.input("position_ids", np.int64, ["batch_size", "sequence_length"])

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

    def side_by_side(self, prefix: str, layers: Sequence[str], x: str) -> tuple[str, ...]:
        """
        What several linear layers make of the same x. Neighbours whose matrices are stored alike are one product: to begin one
        takes as long as a small matrix.
        """
        if not self.forms:
            return tuple(self.linear(prefix, layer, x) for layer in layers)
        found: list[str] = []
        for _, group in groupby(layers, lambda layer: (self.forms[layer], layer in self.config.without_bias)):
            found += self.quantised_layers(prefix, list(group), x)
        return tuple(found)

    def linear(self, prefix: str, layer: str, x: str) -> str:
        """
        x W, or x W + b, and what an adapter adds to it: (B, S, in) -> (B, S, out).

        Args:
            prefix: of the names of the block.
            layer: a key of `ModelConfig.layer_shapes`.
        """
        if self.forms:
            return self.quantised_layers(prefix, [layer], x)[0]
        name = f"{prefix}.{layer}"
        with self.graph.scope(name):
            y = self.node("MatMul", x, self.weights.plain(f"{name}.weight"))
            if layer not in self.config.without_bias:
                y = self.node("Add", y, self.weights.plain(f"{name}.bias"))
        return self.adapted_output(prefix, layer, x, y)

    def quantised_layers(self, prefix: str, layers: Sequence[str], x: str) -> list[str]:
        """The same of layers whose matrices are stored as one."""
        names, form = [f"{prefix}.{layer}" for layer in layers], self.forms[layers[0]]
        inputs, widths = self.config.layer_shapes[layers[0]][0], [self.config.layer_shapes[layer][1] for layer in layers]
        with self.graph.scope(f"{prefix}.{'+'.join(layers)}"):
            bias = "" if layers[0] in self.config.without_bias else self.weights.plain(*(f"{name}.bias" for name in names))
            whole = self.weights.product(x, [f"{name}.weight" for name in names], (sum(widths), inputs), form, bias)
        parts = [whole]
        if len(layers) > 1:
            parts = [f"{name}/product" for name in names]
            self.graph.node_with_outputs("Split", [whole, self.graph.constant(widths)], parts, axis=-1)
        return [self.adapted_output(prefix, layer, x, part) for layer, part in zip(layers, parts, strict=True)]

    def adapted_output(self, prefix: str, layer: str, x: str, y: str) -> str:
        """What a layer makes of x, and what its adapter adds to it."""
        name = f"{prefix}.{layer}"
        if name not in self.adapted:
            return y
        with self.graph.scope(name):
            return self.node("Add", y, self.low_rank(name, x, *self.config.layer_shapes[layer]))

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
        with self.graph.scope(self.config.names.head):
            # The head is a third of a small model's work, and a program that continues a text needs only the last row's logits.
            start = self.graph.optional_input("logits_start", np.array([0]))
            end, axis = self.graph.constant([np.iinfo(np.int64).max]), self.graph.constant([1])
            x = self.node("Slice", x, start, end, axis)
            if self.precision.table:
                logits = self.weights.table_product(x, table, shape, self.precision.table)
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
        integers, *grid = self.weights.table(self.config.table_name, form)
        # MatMulNBits wants the blocks of the LM head as a dimension of their own, this operator does not. The Reshape is folded
        # when the graph is loaded, and both use one table in memory.
        table = self.node("Reshape", integers, self.graph.constant([self.config.vocabulary_size, -1]))
        layout = {"bits": form.bits, "block_size": form.size, "gather_axis": 0, "quantize_axis": 1}
        rows = self.node("GatherBlockQuantized", table, tokens, *grid, domain=MICROSOFT, **layout)
        if form.padded(self.config.width) == self.config.width:
            return rows
        start, end, axis = (self.graph.constant([value]) for value in (0, self.config.width, 2))
        return self.node("Slice", rows, start, end, axis)

    def cache_names(self, index: int) -> Cache:
        return Cache(
            **{
                f"{when}_{what}": f"{prefix}.{index}.{what}"
                for what in ("key", "value")
                for when, prefix in (("past", "past_key_values"), ("present", "present"))
            }
        )

    def cache(self, index: int) -> Cache:
        """Inputs: keys and values of earlier tokens."""
        cache = self.cache_names(index)
        for name in (cache.past_key, cache.past_value):
            self.graph.input(name, self.precision.dtype, self.cache_shape("past_sequence_length"))
        return cache

    def cache_shape(self, length: str) -> list[int | str]:
        return ["batch_size", self.heads.keys, length, self.heads.width]

    def name_output(self, name: str, value: str, width: int) -> None:
        self.graph.node_with_outputs("Identity", [value], [name])
        self.graph.output(name, self.precision.dtype, ["batch_size", "sequence_length", width])
