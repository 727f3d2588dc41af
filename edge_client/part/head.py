"""The head: the loss of hidden states by the tokens that follow, and its gradient, slice by slice of the vocabulary."""

from dataclasses import dataclass

import numpy as np

from protocol import Array, TrainingDiverged
from storage import ModelError

from .runtime import Graph, Runtime
from .token_table import TokenTable

__all__ = ["Head"]

MOST_ROWS = 512
"""Hidden states that are multiplied by a slice at once. Where there are more, the table is read several times."""
SLICE_FLOATS = 2048 * 768
"""Elements of the table that are multiplied at once: of GPT-2 small 2,048 tokens, 6 MB in float32, and 512 rows of their logits
are 4 MB. Half or twice as many take as long."""


class Head:
    """
    The head of a part: M hidden states, V tokens. Of the table no more than a slice is in memory at once, and of the logits,
    (M, V), no more than some rows of a slice's; each is computed once, for loss and gradient. No label goes into a graph.

    Args:
        graph: see `graphs.layers.Head`.
        loss_graph: the same without what only the gradient needs.
    """

    def __init__(self, runtime: Runtime, table: TokenTable, graph: Graph, loss_graph: Graph) -> None:
        self._runtime, self._table, self._graph, self._loss_graph = runtime, table, graph, loss_graph
        self._slice_rows = max(1, SLICE_FLOATS // table.width)

    def losses_and_gradient(self, hidden: Array, labels: Array, smoothing: float = 0.0) -> tuple[Array, Array]:
        """
        See `Engine.losses_and_gradient`.

        Args:
            smoothing: this part of a label is spread over the vocabulary: the label's row of the table becomes that much of the
                mean of all rows, and less by as much of its own.
        """
        gradient = np.empty_like(hidden)
        losses = self._losses(hidden, labels, gradient, smoothing)
        if not np.isfinite(gradient).all():
            raise TrainingDiverged("the gradient of this device's loss is no longer finite; try a lower --lr on the server")
        return losses, gradient

    def losses(self, hidden: Array, labels: Array) -> Array:
        """See `Engine.losses`."""
        return self._losses(hidden, labels, None)

    @np.errstate(all="ignore")  # what is not finite is refused, and not warned of
    def _losses(self, hidden: Array, labels: Array, gradient: Array | None, smoothing: float = 0.0) -> Array:
        """
        Args:
            gradient: where the gradient goes, (M, d), if it is asked for.
        """
        losses = np.empty(len(hidden))
        for begin in range(0, len(hidden), MOST_ROWS):
            rows = slice(begin, begin + MOST_ROWS)
            states, of_labels = np.ascontiguousarray(hidden[rows]), self._table.embed(labels[rows])
            if smoothing:
                of_labels = (1 - smoothing) * of_labels + np.float32(smoothing) * self._table.mean
            sums = self._sums(states, with_gradient=gradient is not None)
            losses[rows] = sums.losses(np.einsum("nd,nd->n", states, of_labels, dtype=np.float64))
            if gradient is not None:
                gradient[rows] = sums.product / sums.total - of_labels
        if not np.isfinite(losses).all():
            self._check_table()
            raise TrainingDiverged(f"the loss of this device's labels is {losses.sum()}; try a lower --lr on the server")
        return losses

    def _sums(self, states: Array, *, with_gradient: bool) -> "_Sums":
        """Of these rows, (N, d), over the whole vocabulary."""
        num_rows, width = states.shape
        shapes = {"largest": (num_rows, 1), "sum": (num_rows, 1)} | ({"product": (num_rows, width)} if with_gradient else {})
        graph = self._graph if with_gradient else self._loss_graph
        sums = _Sums.nothing(num_rows, width if with_gradient else 0)
        hidden = self._runtime.value(states)
        for weights in self._table.slices(self._slice_rows):
            inputs = {f"weight:{name}": self._runtime.value(array) for name, array in weights.items()}
            found = graph.run({"hidden": hidden, **inputs}, shapes)
            sums.add(**{name: found[name].numpy() for name in shapes})
        return sums

    def _check_table(self) -> None:
        """
        Raises:
            ModelError: it is the head itself that has numbers that are not finite.
        """
        if not all(np.isfinite(array).all() for weights in self._table.slices(self._slice_rows) for array in weights.values()):
            raise ModelError(
                "the head in the server's part of the model has numbers that are not finite; the server needs another copy of "
                "the model, or another model"
            )


@dataclass
class _Sums:
    """
    Of each row, over the slices so far. Exponentials of logits are summed up relative to that of the largest logit, so that
    none is too large for float32: where a larger one comes, what is there is scaled down.
    """

    largest: Array
    """(N, 1): the largest logit."""
    total: Array
    """(N, 1) float64: the sum of the exponentials."""
    product: Array
    """(N, d): the sum of the table's rows, times the exponentials; (N, 0) where no gradient is asked for."""

    @classmethod
    def nothing(cls, num_rows: int, width: int) -> "_Sums":
        largest: Array = np.full((num_rows, 1), -np.inf, np.float32)
        return cls(largest, np.zeros((num_rows, 1)), np.zeros((num_rows, width), np.float32))

    def add(self, *, largest: Array, sum: Array, product: Array | None = None) -> None:
        """A slice's."""
        before, self.largest = self.largest, np.maximum(self.largest, largest)
        old, new = np.exp(before - self.largest), np.exp(largest - self.largest)
        self.total = self.total * old + sum * new
        if product is not None:
            self.product *= old
            self.product += product * new

    def losses(self, of_labels: Array) -> Array:
        """The cross-entropies (N,) in nats, where the logits of the labels are these, (N,)."""
        found: Array = self.largest[:, 0] + np.log(self.total[:, 0]) - of_labels
        return found
