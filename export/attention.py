"""
Causal self-attention of new tokens over earlier and new ones, in three forms: each asks a runtime for other operators.

B sequences, S new tokens of each, P tokens before them, T = P + S, H heads of D elements, d = H D.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import DTypeLike

from graphs import MICROSOFT, Graph

__all__ = ["ATTENTIONS", "Attention", "AttentionForm", "Cache", "Heads"]


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The shape of attention, the same in all blocks."""

    count: int
    width: int
    """Elements of one head, D."""
    dtype: DTypeLike

    @property
    def scale(self) -> float:
        return float(self.width**-0.5)


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Names of a block's keys and values, (B, H, P, D) before a run and (B, H, T, D) after it."""

    past_key: str
    past_value: str
    present_key: str
    present_value: str


class Attention(Protocol):
    """Made once for a graph: the mask is the same for all blocks."""

    def __init__(self, graph: Graph, heads: Heads, tokens: str) -> None:
        """``tokens`` is a value whose first two dimensions are (B, S)."""

    def attend(self, qkv: str, cache: Cache) -> str:
        """Queries, keys and values side by side (B, S, 3 d) -> (B, S, d)."""


class GroupQuery:
    """
    ONNX Runtime's GroupQueryAttention, from 1.22 on. Past and present may be one buffer, so that the keys and values of earlier
    tokens are not copied for every new one. With a past, it cannot take several new tokens of several sequences.
    """

    def __init__(self, graph: Graph, heads: Heads, tokens: str) -> None:
        self.graph, self.heads = graph, heads
        batch, length = _dimension(graph, tokens, 0), _dimension(graph, tokens, 1)
        total = _dimension(graph, "attention_mask", 1)
        one = graph.constant([1])
        # The operator masks only what is to the right of a sequence's end. To mask padding at the left, it needs a bias.
        shape = graph.node("Concat", batch, one, length, total, axis=0)
        self.bias = graph.node("Expand", _bias(graph, _is_token(graph), heads.dtype), shape)
        last = graph.node("Expand", graph.node("Sub", total, one), batch)
        self.last_positions = graph.cast(last, np.int32)
        self.total = graph.cast(graph.node("Squeeze", total), np.int32)

    def attend(self, qkv: str, cache: Cache) -> str:
        mixed = f"{cache.present_key}/mixed"
        self.graph.node_with_outputs(
            "GroupQueryAttention",
            [qkv, "", "", cache.past_key, cache.past_value, self.last_positions, self.total, "", "", "", self.bias],
            [mixed, cache.present_key, cache.present_value],
            domain=MICROSOFT,
            num_heads=self.heads.count,
            kv_num_heads=self.heads.count,
            scale=self.heads.scale,
        )
        return mixed


class Standard:
    """The Attention of ONNX's opset 23, which ONNX Runtime has from 1.23 on."""

    def __init__(self, graph: Graph, heads: Heads, tokens: str) -> None:
        self.graph, self.heads = graph, heads
        self.bias = _causal_bias(graph, heads, tokens)

    def attend(self, qkv: str, cache: Cache) -> str:
        query, key, value = _split(self.graph, qkv, self.heads)
        mixed = f"{cache.present_key}/mixed"
        self.graph.node_with_outputs(
            "Attention",
            [query, key, value, self.bias, cache.past_key, cache.past_value],
            [mixed, cache.present_key, cache.present_value],
            q_num_heads=self.heads.count,
            kv_num_heads=self.heads.count,
            scale=self.heads.scale,
        )
        return mixed


class Elementary:
    """Matrix products and a softmax, for runtimes that know nothing else."""

    def __init__(self, graph: Graph, heads: Heads, tokens: str) -> None:
        self.graph, self.heads = graph, heads
        self.bias = _causal_bias(graph, heads, tokens)

    def attend(self, qkv: str, cache: Cache) -> str:
        node = self.graph.node
        query, key, value = (self._by_head(part) for part in _split(self.graph, qkv, self.heads))
        self.graph.node_with_outputs("Concat", [cache.past_key, key], [cache.present_key], axis=2)
        self.graph.node_with_outputs("Concat", [cache.past_value, value], [cache.present_value], axis=2)
        scaled = node("Mul", query, self.graph.constant(self.heads.scale, self.heads.dtype))
        scores = node("MatMul", scaled, node("Transpose", cache.present_key, perm=[0, 1, 3, 2]))  # (B, H, S, T)
        weights = node("Softmax", node("Add", scores, self.bias), axis=-1)
        mixed = node("Transpose", node("MatMul", weights, cache.present_value), perm=[0, 2, 1, 3])  # (B, S, H, D)
        return node("Reshape", mixed, self.graph.constant([0, 0, self.heads.count * self.heads.width]))

    def _by_head(self, part: str) -> str:  # (B, S, d) -> (B, H, S, D)
        shape = self.graph.constant([0, 0, self.heads.count, self.heads.width])
        return self.graph.node("Transpose", self.graph.node("Reshape", part, shape), perm=[0, 2, 1, 3])


@dataclass(frozen=True, kw_only=True)
class AttentionForm:
    """A form, and the versions that a runtime has to know for it."""

    build: type[Attention]
    opset: int
    ir_version: int


ATTENTIONS = {
    "gqa": AttentionForm(build=GroupQuery, opset=20, ir_version=9),
    "attn23": AttentionForm(build=Standard, opset=23, ir_version=11),
    "ops": AttentionForm(build=Elementary, opset=20, ir_version=9),
}


def _dimension(graph: Graph, value: str, axis: int) -> str:  # -> (1,)
    return graph.node("Shape", value, start=axis, end=axis + 1)


def _is_token(graph: Graph) -> str:
    """Whether a key is one of the text and not padding, (B, 1, 1, T)."""
    return graph.node("Unsqueeze", graph.cast("attention_mask", np.bool_), graph.constant([1, 2]))


def _bias(graph: Graph, visible: str, dtype: DTypeLike) -> str:
    """0 where visible, and elsewhere the lowest finite number: minus infinity would make NaN of a row that sees nothing."""
    lowest = np.finfo(np.dtype(dtype)).min
    return graph.node("Where", visible, graph.constant(0, dtype), graph.constant(lowest, dtype))


def _causal_bias(graph: Graph, heads: Heads, tokens: str) -> str:
    """(B, 1, S, T): key j is seen by query i if it is a token and j <= P + i."""
    length, total = (graph.node("Squeeze", _dimension(graph, *what)) for what in ((tokens, 1), ("attention_mask", 1)))
    zero, one = graph.constant(0), graph.constant(1)
    keys = graph.node("Range", zero, total, one)
    queries = graph.node("Range", graph.node("Sub", total, length), total, one)
    before = graph.node("LessOrEqual", keys, graph.node("Unsqueeze", queries, graph.constant([1])))
    return _bias(graph, graph.node("And", before, _is_token(graph)), heads.dtype)


def _split(graph: Graph, qkv: str, heads: Heads) -> tuple[str, str, str]:
    width = heads.count * heads.width
    query, key, value = (f"{qkv}/{part}" for part in ("query", "key", "value"))
    graph.node_with_outputs("Split", [qkv, graph.constant([width] * 3)], [query, key, value], axis=-1)
    return query, key, value
