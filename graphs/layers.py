"""
The layers of a block, each with its forward and its backward pass side by side, and the head.

N rows of a packed batch, one for each token; B sequences, and T columns of the grid in which attention sees them; H heads of D
elements, d = H D. dx is the gradient of the loss by x. ∘ multiplies element by element.
"""

import numpy as np

from .matrix_formats import MatrixFormat
from .part_graph import PartGraph

__all__ = ["CausalAttention", "Head", "LayerNorm", "Linear"]

TOKENS = "tokens"
"""The table of tokens, by its name in files of weights."""
HIDDEN = -1e30
"""Added to a score that must not be seen: its exponential is 0 in float32."""


class Linear:
    """
    y = x W + b, and for an adapted layer y = x W + b + s (m ∘ x) Aᵀ Bᵀ, with m dropout's mask of zeros and ones and
    s = alpha / rank / (1 - p). W and b are frozen. With u = (m ∘ x) Aᵀ and du = s dy B, both (N, r):

        dB = s dyᵀ u        dA = duᵀ (m ∘ x)        dx = dy Wᵀ + m ∘ (du A)

    Args:
        shape: (in, out).
    """

    def __init__(self, graph: PartGraph, name: str, shape: tuple[int, int], form: MatrixFormat) -> None:
        self.graph, self.name, self.shape, self.form = graph, name, shape, form
        adaptation = graph.adaptation
        self.is_adapted = name in adaptation.layers
        self.has_dropout = graph.trains and adaptation.dropout > 0
        self.scale = adaptation.alpha / adaptation.rank / ((1 - adaptation.dropout) if self.has_dropout else 1)

    def forward(self, x: str) -> str:  # (N, in) -> (N, out)
        with self.graph.scope(self.name):
            bias = self.graph.weight_input(f"{self.name}.bias", np.float32, self.shape[1:])
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


class CausalAttention:
    """
    O = P V with P = softmax(Q Kᵀ / sqrt(D) + C) row by row, in each head of each sequence; C hides later tokens. With

        dV = Pᵀ dO        dP = dO Vᵀ        dS = P ∘ (dP - sum(P ∘ dP)) / sqrt(D)        dQ = dS K        dK = dSᵀ Q

    Rows become a grid (B, T) by their numbers, ``row_of_cell``. Cells after a sequence's end show any row. No token sees them,
    as they are later, and ``cell_of_row`` leaves out what they see. Their dO is set to 0, so that nothing flows back from them.
    """

    def __init__(self, graph: PartGraph, width: int, num_heads: int) -> None:
        self.graph, self.width, self.num_heads, self.head_width = graph, width, num_heads, width // num_heads
        self._seen: dict[str, tuple[str, str, str, str]] = {}

    def forward(self, qkv: str) -> str:
        """Queries, keys and values side by side (N, 3 d) -> (N, d)."""
        _, _, value, probabilities = self._attend(qkv)
        with self.graph.scope("attention"):
            return self._rows(self.graph.node("MatMul", probabilities, value), self.width)

    def backward(self, qkv: str, d_mixed: str) -> str:  # (N, 3 d), (N, d) -> (N, 3 d)
        node = self.graph.node
        query, key, value, probabilities = self._attend(qkv)
        with self.graph.scope("attention.backward"):
            is_token = self.graph.given("is_token", np.float32, ["sequences", "columns", 1])
            d_mixed = self._heads(node("Mul", node("Gather", d_mixed, self._row_of_cell()), is_token))
            d_value = node("MatMul", self._transposed(probabilities), d_mixed)
            d_probabilities = node("MatMul", d_mixed, self._transposed(value))
            inner = node("ReduceSum", node("Mul", probabilities, d_probabilities), self.graph.constant([-1]))
            d_scores = self._scaled(node("Mul", probabilities, node("Sub", d_probabilities, inner)))
            d_query = node("MatMul", d_scores, key)
            d_key = node("MatMul", self._transposed(d_scores), query)
            return self._rows(node("Concat", d_query, d_key, d_value, axis=1), 3 * self.width)

    def _attend(self, qkv: str) -> tuple[str, str, str, str]:
        """Q, K and V (B, H, T, D), and P (B, H, T, T); computed once in a graph."""
        if qkv not in self._seen:
            node = self.graph.node
            with self.graph.scope("attention"):
                parts = [f"attention/{part}" for part in ("query", "key", "value")]
                cells = node("Gather", qkv, self._row_of_cell())
                self.graph.node_with_outputs("Split", [cells], parts, axis=2, num_outputs=3)
                query, key, value = (self._heads(part) for part in parts)
                scores = self._scaled(node("MatMul", query, self._transposed(key)))
                probabilities = node("Softmax", node("Add", scores, self._hidden()), axis=-1)
            self._seen[qkv] = query, key, value, probabilities
        return self._seen[qkv]

    def _hidden(self) -> str:
        """C (T, T): 0 up to the diagonal, `HIDDEN` after it."""
        columns = self.graph.node("Shape", self._row_of_cell(), start=1, end=2)
        square = self.graph.node("Concat", columns, columns, axis=0)
        return self.graph.node(
            "Trilu", self.graph.node("Expand", self.graph.constant(HIDDEN, np.float32), square), self.graph.constant(1), upper=1
        )

    def _row_of_cell(self) -> str:
        return self.graph.given("row_of_cell", np.int64, ["sequences", "columns"])

    def _heads(self, grid: str) -> str:  # (B, T, d) -> (B, H, T, D)
        shape = self.graph.constant([0, 0, self.num_heads, self.head_width])
        return self.graph.node("Transpose", self.graph.node("Reshape", grid, shape), perm=[0, 2, 1, 3])

    def _rows(self, heads: str, width: int) -> str:  # (B, width / D, T, D) -> (N, width)
        cells = self.graph.node("Transpose", heads, perm=[0, 2, 1, 3])
        cells = self.graph.node("Reshape", cells, self.graph.constant([-1, width]))
        return self.graph.node("Gather", cells, self.graph.given("cell_of_row", np.int64, ["rows"]))

    def _transposed(self, heads: str) -> str:
        return self.graph.node("Transpose", heads, perm=[0, 1, 3, 2])

    def _scaled(self, scores: str) -> str:
        return self.graph.node("Mul", scores, self.graph.constant(self.head_width**-0.5, np.float32))


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
