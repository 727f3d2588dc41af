"""
Causal self-attention of new tokens over earlier and new ones, in three forms: each asks a runtime for other operators.

B sequences, S new tokens of each, P tokens before them, T = P + S; H heads of queries and K of keys and values,
D elements each.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

from graphs import MICROSOFT, Graph

__all__ = ["ATTENTIONS", "Angles", "Attention", "AttentionForm", "Cache", "Heads", "split_heads"]


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The shape of attention, the same in all blocks."""

    count: int
    """Of queries, H."""
    keys: int
    """Of keys and values, K, which divides H."""
    width: int
    """Elements of one head, D."""
    dtype: DTypeLike

    @property
    def scale(self) -> float:
        return float(self.width**-0.5)

    @property
    def widths(self) -> list[int]:
        """Elements of all queries, keys and values of a token."""
        return [self.count * self.width, self.keys * self.width, self.keys * self.width]


@dataclass(frozen=True, kw_only=True)
class Angles:
    """By which queries and keys are turned."""

    width: int
    """Elements of a head that are turned, the first ones."""
    cosines: str
    sines: str
    """For each new token, (B, S, width / 2)."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Names of a block's keys and values, (B, K, P, D) before a run and (B, K, T, D) after it."""

    past_key: str
    past_value: str
    present_key: str
    present_value: str


class Attention(Protocol):
    """Made once for a graph: masks and angles are the same for all blocks."""

    def __init__(self, graph: Graph, heads: Heads, tokens: str, angles: Angles | None) -> None:
        """
        Args:
            tokens: a value whose first two dimensions are (B, S).
            angles: None where nothing is turned.
        """

    def turn(self, x: str, count: int) -> str:
        """``count`` heads of each token, (B, S, count D), turned by the token's angles."""

    def attend(self, qkv: tuple[str, ...], cache: Cache, window: int | None) -> str:
        """
        Queries (B, S, H D), keys and values (B, S, K D) each, or all side by side -> (B, S, H D).

        Args:
            window: how many tokens a token sees, itself and those before it; None: all.
        """


class GroupQuery:
    """
    ONNX Runtime's GroupQueryAttention, from 1.22 on. Past and present may be one buffer, so that the keys and values of earlier
    tokens are not copied for every new one. With a past, it cannot take several new tokens of several sequences.
    """

    def __init__(self, graph: Graph, heads: Heads, tokens: str, angles: Angles | None) -> None:
        self.graph, self.heads = graph, heads
        # The operator masks only what is to the right of a sequence's end. To mask padding at the left, it needs a bias, which
        # masks what is outside a window, too: of the operator's own windows, versions of ONNX Runtime have different ideas.
        self.bias = CausalBias(graph, heads, tokens)
        batch, total = _dimension(graph, tokens, 0), _dimension(graph, "attention_mask", 1)
        last = graph.node("Expand", graph.node("Sub", total, graph.constant([1])), batch)
        self.last_positions = graph.cast(last, np.int32)
        self.total = graph.cast(graph.node("Squeeze", total), np.int32)
        self.angles, self._looked_up = angles, self._for_lookup(angles) if angles else []

    def _for_lookup(self, angles: Angles) -> list[str]:
        """The operator looks angles up in tables, by row: here each new token has a row of its own."""
        node, constant = self.graph.node, self.graph.constant
        tables = [node("Reshape", table, constant([-1, angles.width // 2])) for table in (angles.cosines, angles.sines)]
        rows = node("Range", constant(0), node("Squeeze", _dimension(self.graph, tables[0], 0)), constant(1))
        return [node("Reshape", rows, node("Shape", angles.cosines, start=0, end=2)), *tables]

    def turn(self, x: str, count: int) -> str:
        assert self.angles is not None
        # The operator takes the number of heads only where a part of each is turned.
        is_whole = self.angles.width == self.heads.width
        options = {} if is_whole else {"rotary_embedding_dim": self.angles.width, "num_heads": count}
        return self.graph.node("RotaryEmbedding", x, *self._looked_up, domain=MICROSOFT, **options)

    def attend(self, qkv: tuple[str, ...], cache: Cache, window: int | None) -> str:
        mixed = f"{cache.present_key}/mixed"
        query, key, value = qkv if len(qkv) == 3 else (*qkv, "", "")
        earlier = (cache.past_key, cache.past_value, self.last_positions, self.total)
        self.graph.node_with_outputs(
            "GroupQueryAttention",
            [query, key, value, *earlier, "", "", "", self.bias.within(window)],
            [mixed, cache.present_key, cache.present_value],
            domain=MICROSOFT,
            num_heads=self.heads.count,
            kv_num_heads=self.heads.keys,
            scale=self.heads.scale,
        )
        return mixed


class Standard:
    """
    The Attention of ONNX's opset 23, which ONNX Runtime has from 1.23 on. 1.23.0 shows heads of queries the keys of others
    where several of them, and not all, share a head of keys.
    """

    def __init__(self, graph: Graph, heads: Heads, tokens: str, angles: Angles | None) -> None:
        self.graph, self.heads, self.bias, self.angles = graph, heads, CausalBias(graph, heads, tokens), angles

    def turn(self, x: str, count: int) -> str:
        assert self.angles is not None
        is_whole = self.angles.width == self.heads.width
        options: dict[str, Any] = {} if is_whole else {"rotary_embedding_dim": self.angles.width}
        return self.graph.node("RotaryEmbedding", x, self.angles.cosines, self.angles.sines, num_heads=count, **options)

    def attend(self, qkv: tuple[str, ...], cache: Cache, window: int | None) -> str:
        query, key, value = split_heads(self.graph, qkv, self.heads)
        mixed = f"{cache.present_key}/mixed"
        self.graph.node_with_outputs(
            "Attention",
            [query, key, value, self.bias.within(window), cache.past_key, cache.past_value],
            [mixed, cache.present_key, cache.present_value],
            q_num_heads=self.heads.count,
            kv_num_heads=self.heads.keys,
            scale=self.heads.scale,
        )
        return mixed


class Elementary:
    """Matrix products and a softmax, for runtimes that know nothing else."""

    def __init__(self, graph: Graph, heads: Heads, tokens: str, angles: Angles | None) -> None:
        self.graph, self.heads, self.bias, self.angles = graph, heads, CausalBias(graph, heads, tokens), angles

    def turn(self, x: str, count: int) -> str:
        assert self.angles is not None
        node, constant, half = self.graph.node, self.graph.constant, self.angles.width // 2
        by_head = node("Reshape", x, constant([0, 0, count, self.heads.width]))
        rest = self.heads.width - self.angles.width
        sizes = [half, half, rest] if rest else [half, half]
        parts = [f"{x}/part{number}" for number in range(len(sizes))]
        self.graph.node_with_outputs("Split", [by_head, constant(sizes)], parts, axis=-1)
        first, second, *unturned = parts
        cosine, sine = (node("Unsqueeze", table, constant([2])) for table in (self.angles.cosines, self.angles.sines))
        turned = (
            node("Sub", node("Mul", first, cosine), node("Mul", second, sine)),
            node("Add", node("Mul", second, cosine), node("Mul", first, sine)),
        )
        return node("Reshape", node("Concat", *turned, *unturned, axis=-1), constant([0, 0, count * self.heads.width]))

    def attend(self, qkv: tuple[str, ...], cache: Cache, window: int | None) -> str:
        node, heads = self.graph.node, self.heads
        counts = (heads.count, heads.keys, heads.keys)
        parts = zip(split_heads(self.graph, qkv, heads), counts, strict=True)
        query, key, value = (self._by_head(part, count) for part, count in parts)
        self.graph.node_with_outputs("Concat", [cache.past_key, key], [cache.present_key], axis=2)
        self.graph.node_with_outputs("Concat", [cache.past_value, value], [cache.present_value], axis=2)
        scaled = self._grouped(node("Mul", query, self.graph.constant(heads.scale, heads.dtype)), heads.keys)
        scores = node("MatMul", scaled, node("Transpose", cache.present_key, perm=[0, 1, 3, 2]))
        scores = self._grouped(scores, heads.count)  # (B, H, S, T)
        weights = node("Softmax", node("Add", scores, self.bias.within(window)), axis=-1)
        mixed = self._grouped(node("MatMul", self._grouped(weights, heads.keys), cache.present_value), heads.count)
        mixed = node("Transpose", mixed, perm=[0, 2, 1, 3])  # (B, S, H, D)
        return node("Reshape", mixed, self.graph.constant([0, 0, heads.count * heads.width]))

    def _by_head(self, part: str, count: int) -> str:  # (B, S, count D) -> (B, count, S, D)
        shape = self.graph.constant([0, 0, count, self.heads.width])
        return self.graph.node("Transpose", self.graph.node("Reshape", part, shape), perm=[0, 2, 1, 3])

    def _grouped(self, heads: str, count: int) -> str:
        """
        (B, H, S, ...) <-> (B, K, H / K S, ...): the tokens of all heads of queries that see one head of keys, as if they were
        tokens of that head.
        """
        if self.heads.count == self.heads.keys:
            return heads
        return self.graph.node("Reshape", heads, self.graph.constant([0, count, -1, 0]))


@dataclass(frozen=True, kw_only=True)
class AttentionForm:
    """A form, and the versions that a runtime has to know for it."""

    build: type[Attention]
    opset: int
    ir_version: int
    has_sum_and_norm: bool = False
    """Whether the runtime has one operator for a sum and its root-mean-square norm."""


ATTENTIONS = {
    "gqa": AttentionForm(build=GroupQuery, opset=20, ir_version=9, has_sum_and_norm=True),
    "attn23": AttentionForm(build=Standard, opset=23, ir_version=11),
    "ops": AttentionForm(build=Elementary, opset=20, ir_version=9),
}


def _dimension(graph: Graph, value: str, axis: int) -> str:  # -> (1,)
    return graph.node("Shape", value, start=axis, end=axis + 1)


def _is_token(graph: Graph) -> str:
    """Whether a key is one of the text and not padding, (B, 1, 1, T)."""
    return graph.node("Unsqueeze", graph.cast("attention_mask", np.bool_), graph.constant([1, 2]))


def _bias(graph: Graph, visible: str, dtype: DTypeLike) -> str:
    """
    0 where visible, and elsewhere half of the lowest finite number. The lowest becomes minus infinity with a negative score, of
    which a row that sees nothing would be NaN.
    """
    lowest = np.finfo(np.dtype(dtype)).min
    return graph.node("Where", visible, graph.constant(0, dtype), graph.constant(lowest / 2, dtype))


class CausalBias:
    """(B, 1, S, T): 0 where a key is seen by a query. Query i sees key j if it is a token, not later, and within the window."""

    def __init__(self, graph: Graph, heads: Heads, tokens: str) -> None:
        self._graph, self._dtype = graph, heads.dtype
        length, total = (graph.node("Squeeze", _dimension(graph, *what)) for what in ((tokens, 1), ("attention_mask", 1)))
        zero, one = graph.constant(0), graph.constant(1)
        self._keys = graph.node("Range", zero, total, one)
        queries = graph.node("Range", graph.node("Sub", total, length), total, one)
        self._queries = graph.node("Unsqueeze", queries, graph.constant([1]))
        before = graph.node("LessOrEqual", self._keys, self._queries)
        self._visible = graph.node("And", before, _is_token(graph))
        self._biases: dict[int | None, str] = {}

    def within(self, window: int | None) -> str:
        if window not in self._biases:
            graph, seen = self._graph, self._visible
            with graph.scope("mask"):
                if window is not None:
                    before_first = graph.node("Sub", self._queries, graph.constant(window))
                    seen = graph.node("And", graph.node("Less", before_first, self._keys), seen)
                self._biases[window] = _bias(graph, seen, self._dtype)
        return self._biases[window]


def split_heads(graph: Graph, qkv: tuple[str, ...], heads: Heads) -> tuple[str, ...]:
    if len(qkv) == 3:
        return qkv
    parts = tuple(f"{qkv[0]}/{part}" for part in ("query", "key", "value"))
    graph.node_with_outputs("Split", [*qkv, graph.constant(heads.widths)], parts, axis=-1)
    return parts
