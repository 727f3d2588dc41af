"""
The layers of a block, each with its forward and its backward pass side by side, and the head.

N rows of a packed batch, one for each token; B sequences, and T columns of the grid in which attention sees them; H heads of
queries and K of keys and values, of D elements each. dx is the gradient of the loss by x. ∘ multiplies element by element.
"""

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from .matrix_formats import MatrixFormat
from .part_graph import PartGraph

if TYPE_CHECKING:  # a graph is built without torch, which split_model imports
    from split_model import ModelConfig
    from split_model.rotary import Rotary

__all__ = ["CausalAttention", "Head", "LayerNorm", "Linear", "Norm", "RMSNorm", "Rotation"]

TOKENS = "tokens"
"""The table of tokens, by its name in files of weights."""
WINDOW = "window"
"""How many tokens a token sees, by its name in a block's file of weights."""
HIDDEN = -1e30
"""Added to a score that must not be seen: its exponential is 0 in float32."""


class Linear:
    """
    y = x W + b, and for an adapted layer y = x W + b + s (m ∘ x) Aᵀ Bᵀ, with m dropout's mask of zeros and ones and
    s = alpha / rank / (1 - p). W and b are frozen. With u = (m ∘ x) Aᵀ and du = s dy B, both (N, r):

        dB = s dyᵀ u        dA = duᵀ (m ∘ x)        dx = dy Wᵀ + m ∘ (du A)

    Args:
        shape: (in, out).
        has_bias: whether there is b.
    """

    def __init__(
        self, graph: PartGraph, name: str, shape: tuple[int, int], form: MatrixFormat, *, has_bias: bool = True
    ) -> None:
        self.graph, self.name, self.shape, self.form, self.has_bias = graph, name, shape, form, has_bias
        adaptation = graph.adaptation
        self.is_adapted = name in adaptation.layers
        self.has_dropout = graph.trains and adaptation.dropout > 0
        self.scale = adaptation.alpha / adaptation.rank / ((1 - adaptation.dropout) if self.has_dropout else 1)

    def forward(self, x: str) -> str:  # (N, in) -> (N, out)
        with self.graph.scope(self.name):
            bias = self.graph.weight_input(f"{self.name}.bias", np.float32, self.shape[1:]) if self.has_bias else ""
            y = self.form.product(self.graph, f"{self.name}.weight", self.shape, x, bias)
            if not self.is_adapted:
                return y
            u = self._low_rank(self._masked(x))
            return self.graph.node("Gemm", u, self._matrix("B"), y, transB=1, alpha=self.scale)

    def backward(self, x: str, dy: str) -> str:
        """(N, in) and (N, out) -> dx (N, in). The matrices' gradients become outputs; ``x`` is needed for them alone."""
        node = self.graph.node
        with self.graph.scope(f"{self.name}.backward"):
            dx = self.form.transposed_product(self.graph, f"{self.name}.weight", self.shape, dy)
            if not self.is_adapted:
                return dx
            masked = self._masked(x)
            du = node("Gemm", dy, self._matrix("B"), alpha=self.scale)
            gradients = {
                "B": node("Gemm", dy, self._low_rank(masked), transA=1, alpha=self.scale),
                "A": node("Gemm", du, masked, transA=1),
            }
            if self.has_dropout:
                dx = node("Add", dx, self._masked(node("MatMul", du, self._matrix("A"))))
            else:
                dx = node("Gemm", du, self._matrix("A"), dx)
        for matrix, gradient in gradients.items():
            self.graph.gradient_output(self.name, matrix, gradient)
        return dx

    def _low_rank(self, masked: str) -> str:  # (N, in) -> (N, r)
        return self.graph.node("Gemm", masked, self._matrix("A"), transB=1)

    def _masked(self, x: str) -> str:  # (N, in) -> (N, in)
        if not self.has_dropout:
            return x
        mask = self.graph.given(f"mask:{self.name}", np.uint8, ["rows", self.shape[0]])
        return self.graph.node("Mul", x, self.graph.cast(mask, np.float32))

    def _matrix(self, matrix: str) -> str:
        return self.graph.lora_input(self.name, matrix)


class Norm(Protocol):
    """Over the last of an array's dimensions."""

    def forward(self, x: str) -> str: ...

    def backward(self, x: str, dy: str) -> str:
        """The input, and the gradient by the output -> the gradient by the input."""


class LayerNorm:
    """
    y = g ∘ x̂ + b with x̂ = (x - mean(x)) r and r = 1 / sqrt(var(x) + epsilon); means and variance are those of each row, g and b
    are frozen. With e = g ∘ dy:

        dx = r (e - mean(e) - x̂ mean(e ∘ x̂))
    """

    def __init__(self, graph: PartGraph, name: str, width: int, epsilon: float) -> None:
        self.graph, self.name, self.width, self.epsilon = graph, name, width, epsilon

    def forward(self, x: str) -> str:  # (N, d) -> (N, d)
        with self.graph.scope(self.name):
            parameters = (self._parameter("weight"), self._parameter("bias"))
            return self.graph.node("LayerNormalization", x, *parameters, axis=-1, epsilon=self.epsilon)

    def backward(self, x: str, dy: str) -> str:  # (N, d), (N, d) -> (N, d)
        node, each_row = self.graph.node, self.graph.constant([-1])
        with self.graph.scope(f"{self.name}.backward"):
            ones = node("Expand", self.graph.constant(1, np.float32), self.graph.constant([self.width]))
            normed, root = f"{self.name}.backward/normed", f"{self.name}.backward/root"
            self.graph.node_with_outputs("LayerNormalization", [x, ones], [normed, "", root], axis=-1, epsilon=self.epsilon)
            e = node("Mul", dy, self._parameter("weight"))
            across = node("Mul", normed, node("ReduceMean", node("Mul", e, normed), each_row))
            centred = node("Sub", e, node("ReduceMean", e, each_row))
            return node("Mul", node("Sub", centred, across), root)

    def _parameter(self, name: str) -> str:
        return self.graph.weight_input(f"{self.name}.{name}", np.float32, [self.width])


class RMSNorm:
    """
    y = g ∘ x̂ with x̂ = x r and r = 1 / sqrt(mean(x²) + epsilon), over the last dimension; g is frozen. With e = g ∘ dy:

        dx = r (e - x̂ mean(e ∘ x̂))
    """

    def __init__(self, graph: PartGraph, name: str, width: int, epsilon: float) -> None:
        self.graph, self.name, self.width, self.epsilon = graph, name, width, epsilon

    def forward(self, x: str) -> str:
        with self.graph.scope(self.name):
            return self.graph.node("Mul", self.graph.node("Div", x, self._size(x)), self._gain())

    def backward(self, x: str, dy: str) -> str:
        node, last = self.graph.node, self.graph.constant([-1])
        with self.graph.scope(f"{self.name}.backward"):
            size = self._size(x)
            normed, e = node("Div", x, size), node("Mul", dy, self._gain())
            across = node("Mul", normed, node("ReduceMean", node("Mul", e, normed), last))
            return node("Div", node("Sub", e, across), size)

    def _size(self, x: str) -> str:
        """1 / r."""
        node = self.graph.node
        square = node("ReduceMean", node("Mul", x, x), self.graph.constant([-1]))
        return node("Sqrt", node("Add", square, self.graph.constant(self.epsilon, np.float32)))

    def _gain(self) -> str:
        return self.graph.weight_input(f"{self.name}.weight", np.float32, [self.width])


class Rotation:
    """
    Turns queries and keys by their positions. Of a head's elements x = (x₁, x₂, rest), x₁ and x₂ as wide, with the angles
    a = position ∘ frequencies:

        y = (x₁ ∘ cos a - x₂ ∘ sin a, x₂ ∘ cos a + x₁ ∘ sin a, rest)

    The gradient is turned back, by -a. An amplitude that is not 1 multiplies cosine and sine.
    """

    def __init__(self, graph: PartGraph, rotary: "Rotary", head_width: int) -> None:
        self.graph, self.rotary, self.half = graph, rotary, rotary.width // 2
        self.rest = head_width - rotary.width
        self._tables: tuple[str, str] | None = None

    def turned(self, heads: str, *, back: bool = False) -> str:  # (B, H, T, D) -> (B, H, T, D)
        node, (cosine, sine) = self.graph.node, self._angles()
        with self.graph.scope("rotation"):
            sizes = [self.half, self.half, *([self.rest] if self.rest else [])]
            parts = [f"{heads}/{part}" for part in ("first", "second", "rest")[: len(sizes)]]
            self.graph.node_with_outputs("Split", [heads, self.graph.constant(sizes)], parts, axis=-1)
            first, second, *rest = parts
            minus, plus = ("Add", "Sub") if back else ("Sub", "Add")
            turned = (
                node(minus, node("Mul", first, cosine), node("Mul", second, sine)),
                node(plus, node("Mul", second, cosine), node("Mul", first, sine)),
            )
            return node("Concat", *turned, *rest, axis=-1)

    def _angles(self) -> tuple[str, str]:
        """Cosines and sines, (B, 1, T, D' / 2); computed once in a graph."""
        if self._tables is None:
            node, constant = self.graph.node, self.graph.constant
            with self.graph.scope("rotation"):
                positions = self.graph.cast(_position_of_cell(self.graph, [0, 1, -1, 1]), np.float32)
                angles = node("Mul", positions, constant(self.rotary.frequencies().tolist(), np.float32))
                cosine, sine = node("Cos", angles), node("Sin", angles)
                if self.rotary.amplitude != 1:
                    amplitude = constant(self.rotary.amplitude, np.float32)
                    cosine, sine = node("Mul", cosine, amplitude), node("Mul", sine, amplitude)
            self._tables = cosine, sine
        return self._tables


class CausalAttention:
    """
    O = P V with P = softmax(Q Kᵀ / sqrt(D) + C) row by row, in each head of each sequence; C hides later tokens, and those
    before a window. With

        dV = Pᵀ dO        dP = dO Vᵀ        dS = P ∘ (dP - sum(P ∘ dP)) / sqrt(D)        dQ = dS K        dK = dSᵀ Q

    Rows become a grid (B, T) by their numbers, ``row_of_cell``. Cells after a sequence's end show any row. No token sees them,
    as they are later, and ``cell_of_row`` leaves out what they see. Their dO is set to 0, so that nothing flows back from them.

    Where H / K = G heads of queries see one head of keys, their tokens are taken for G T tokens of that head: the products
    above then add up what flows back to the keys and values.

    Args:
        norms: of each head of queries, and of keys; none in most families.
    """

    def __init__(self, graph: PartGraph, config: "ModelConfig", norms: tuple[Norm, Norm] | None) -> None:
        self.graph, self.norms, self.head_width = graph, norms, config.head_width
        self.num_heads, self.num_keys = config.num_heads, config.num_key_value_heads
        self.widths = [config.query_width, config.key_width, config.key_width]
        self.rotation = Rotation(graph, config.rotary, config.head_width) if config.rotary else None
        self.has_window = any(config.windows)
        self._seen: dict[tuple[str, ...], _Seen] = {}
        """By what `forward` was given."""

    def forward(self, qkv: tuple[str, ...]) -> str:
        """Queries (N, H D), keys and values (N, K D) each, or all side by side -> (N, H D)."""
        seen = self._attend(qkv)
        with self.graph.scope("attention"):
            mixed = self.graph.node("MatMul", self._grouped(seen.probabilities), seen.value)
            return self._rows(self._ungrouped(mixed), self.widths[0])

    def backward(self, qkv: tuple[str, ...], d_mixed: str) -> tuple[str, ...]:
        """What `forward` was given, and the gradient by what it gave (N, H D) -> the gradients by the former."""
        node = self.graph.node
        seen = self._attend(qkv)
        with self.graph.scope("attention.backward"):
            is_token = self.graph.given("is_token", np.float32, ["sequences", "columns", 1])
            d_mixed = self._heads(node("Mul", node("Gather", d_mixed, self._row_of_cell()), is_token), self.num_heads)
            probabilities, d_mixed = self._grouped(seen.probabilities), self._grouped(d_mixed)
            d_value = node("MatMul", self._transposed(probabilities), d_mixed)
            d_probabilities = node("MatMul", d_mixed, self._transposed(seen.value))
            inner = node("ReduceSum", node("Mul", probabilities, d_probabilities), self.graph.constant([-1]))
            d_scores = self._scaled(node("Mul", probabilities, node("Sub", d_probabilities, inner)))
            d_query = self._ungrouped(node("MatMul", d_scores, seen.key))
            d_key = node("MatMul", self._transposed(d_scores), seen.query)
            d_query, d_key = self._through_norms_and_rotation(seen, d_query, d_key)
            if len(qkv) == 1:
                return (self._rows(node("Concat", d_query, d_key, d_value, axis=1), sum(self.widths)),)
            parts = zip((d_query, d_key, d_value), self.widths, strict=True)
            return tuple(self._rows(part, width) for part, width in parts)

    def _attend(self, qkv: tuple[str, ...]) -> "_Seen":
        """Computed once in a graph."""
        if qkv not in self._seen:
            node = self.graph.node
            with self.graph.scope("attention"):
                query, key, value = made = self._parts(qkv)
                if self.norms:
                    query, key = self.norms[0].forward(query), self.norms[1].forward(key)
                if self.rotation:
                    query, key = self.rotation.turned(query), self.rotation.turned(key)
                query = self._grouped(query)
                scores = self._ungrouped(self._scaled(node("MatMul", query, self._transposed(key))))
                probabilities = node("Softmax", node("Add", scores, self._hidden()), axis=-1)
            self._seen[qkv] = _Seen(made[0], made[1], query, key, value, probabilities)
        return self._seen[qkv]

    def _parts(self, qkv: tuple[str, ...]) -> list[str]:
        """Queries (B, H, T, D), keys and values (B, K, T, D)."""
        cells = [self.graph.node("Gather", rows, self._row_of_cell()) for rows in qkv]
        if len(cells) == 1:
            names = [f"attention/{part}" for part in ("query", "key", "value")]
            if self.num_keys == self.num_heads:
                self.graph.node_with_outputs("Split", cells, names, axis=2, num_outputs=3)
            else:
                self.graph.node_with_outputs("Split", [*cells, self.graph.constant(self.widths)], names, axis=2)
            cells = names
        heads = (self.num_heads, self.num_keys, self.num_keys)
        return [self._heads(part, count) for part, count in zip(cells, heads, strict=True)]

    def _through_norms_and_rotation(self, seen: "_Seen", d_query: str, d_key: str) -> tuple[str, str]:
        """Gradients by what attention takes -> by what the linear layers make."""
        if self.rotation:
            d_query, d_key = self.rotation.turned(d_query, back=True), self.rotation.turned(d_key, back=True)
        if self.norms:
            d_query = self.norms[0].backward(seen.made_query, d_query)
            d_key = self.norms[1].backward(seen.made_key, d_key)
        return d_query, d_key

    def _hidden(self) -> str:
        """C (T, T): 0 up to the diagonal, `HIDDEN` after it. With a window (B, 1, T, T): `HIDDEN` before it, too."""
        node, constant = self.graph.node, self.graph.constant
        columns = node("Shape", self._row_of_cell(), start=1, end=2)
        square = node("Concat", columns, columns, axis=0)
        later = node("Trilu", node("Expand", constant(HIDDEN, np.float32), square), constant(1), upper=1)
        if not self.has_window:
            return later
        by_row, by_column = (
            self.graph.cast(_position_of_cell(self.graph, shape), np.float32) for shape in ([0, 1, -1, 1], [0, 1, 1, -1])
        )
        last_seen = node("Sub", self.graph.weight_input(WINDOW, np.float32, [1]), constant(1, np.float32))
        before = self.graph.cast(node("Greater", node("Sub", by_row, by_column), last_seen), np.float32)
        return node("Add", later, node("Mul", before, constant(HIDDEN, np.float32)))

    def _grouped(self, heads: str) -> str:  # (B, H, T, ...) -> (B, K, G T, ...)
        return heads if self.num_heads == self.num_keys else self._regrouped(heads, self.num_keys)

    def _ungrouped(self, heads: str) -> str:  # (B, K, G T, ...) -> (B, H, T, ...)
        return heads if self.num_heads == self.num_keys else self._regrouped(heads, self.num_heads)

    def _regrouped(self, heads: str, count: int) -> str:
        return self.graph.node("Reshape", heads, self.graph.constant([0, count, -1, 0]))

    def _row_of_cell(self) -> str:
        return _row_of_cell(self.graph)

    def _heads(self, grid: str, count: int) -> str:  # (B, T, H D) -> (B, H, T, D)
        shape = self.graph.constant([0, 0, count, self.head_width])
        return self.graph.node("Transpose", self.graph.node("Reshape", grid, shape), perm=[0, 2, 1, 3])

    def _rows(self, heads: str, width: int) -> str:  # (B, width / D, T, D) -> (N, width)
        cells = self.graph.node("Transpose", heads, perm=[0, 2, 1, 3])
        cells = self.graph.node("Reshape", cells, self.graph.constant([-1, width]))
        return self.graph.node("Gather", cells, self.graph.given("cell_of_row", np.int64, ["rows"]))

    def _transposed(self, heads: str) -> str:
        return self.graph.node("Transpose", heads, perm=[0, 1, 3, 2])

    def _scaled(self, scores: str) -> str:
        return self.graph.node("Mul", scores, self.graph.constant(self.head_width**-0.5, np.float32))


class _Seen(NamedTuple):
    """What attention has computed of its input; see `CausalAttention`."""

    made_query: str
    made_key: str
    """As linear layers have made them: (B, H, T, D) and (B, K, T, D)."""
    query: str
    """Q, normed, turned and grouped: (B, K, G T, D)."""
    key: str
    """K, normed and turned: (B, K, T, D)."""
    value: str
    """V (B, K, T, D)."""
    probabilities: str
    """P (B, H, T, T)."""


def _row_of_cell(graph: PartGraph) -> str:
    return graph.given("row_of_cell", np.int64, ["sequences", "columns"])


def _position_of_cell(graph: PartGraph, shape: list[int]) -> str:
    """The position of each cell's token in its sequence, (B, T), in the shape of ONNX's Reshape."""
    positions = graph.node("Gather", graph.given("positions", np.int64, ["rows"]), _row_of_cell(graph))
    return graph.node("Reshape", positions, graph.constant(shape))


class Head:
    """
    The logits z = h Tᵀ of hidden states h (N, d), for a slice T (V', d) of the head's table of V tokens. All logits of a batch
    would be by far the largest of its values, so a slice gives, of each row, what the slices' results are put together from:

        m = max z, (N, 1)        s = sum e, (N, 1)        g = e T, (N, d)        with e = exp(z - m)

    With exp(m) s and exp(m) g added up over the slices, S and G, the cross-entropy of a label l is log S - z_l, and its
    gradient by h is G / S - T_l. Every logit is computed once, for both.
    """

    def __init__(self, graph: PartGraph, width: int, form: MatrixFormat) -> None:
        self.graph, self.form, self.width, self.shape = graph, form, width, ("tokens", width)

    def sums(self, hidden: str, *, with_gradient: bool) -> None:
        """(N, d) -> the outputs "largest", m, and "sum", s; with the gradient, "product", g, too."""
        node, each_row = self.graph.node, self.graph.constant([-1])
        logits = self.form.table_product(self.graph, TOKENS, self.shape, hidden)
        largest = self.graph.rows_output("largest", node("ReduceMax", logits, each_row), 1)
        exponentials = node("Exp", node("Sub", logits, largest))
        self.graph.rows_output("sum", node("ReduceSum", exponentials, each_row), 1)
        if with_gradient:
            product = self.form.transposed_table_product(self.graph, TOKENS, self.shape, exponentials)
            self.graph.rows_output("product", product, self.width)
