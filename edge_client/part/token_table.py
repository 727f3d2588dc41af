"""A part's table of tokens."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from protocol import Array, Tensors
from storage import ModelError, PartDescription

from .weights_file import Rows, WeightsFile, give_back_pages

__all__ = ["TokenTable"]

MEAN_ROWS = 2048
"""Rows that are added up at once."""


class TokenTable:
    """
    A row for each token of the vocabulary: the token embeddings, or the head's.

    Of embeddings, only the rows that a batch uses are read; the head's are all read, slice by slice, and no slice stays in
    memory.

    Raises:
        ModelError: the file has no such table.
    """

    NAMES = frozenset({"tokens", "tokens.scale"})

    def __init__(self, weights: WeightsFile, description: PartDescription) -> None:
        self._rows: Rows = weights.rows("tokens")
        self._weights = weights
        shape = (description.vocabulary_size, description.width)
        if self._rows.shape != shape:
            raise ModelError(f"the part's table of tokens has shape {list(self._rows.shape)}; {list(shape)} is expected")
        self._scales = weights.map("tokens.scale") if "tokens.scale" in weights.names else None
        if self._scales is not None and self._scales.shape != shape[:1]:
            raise ModelError(
                f"the part's table of tokens has {self._scales.shape} scales; one for each of its rows is expected"
            )

    def embed(self, tokens: Array) -> Array:
        """
        (N,) ids -> (N, d) float32.

        Raises:
            ModelError: the vocabulary has no such token, or the file cannot be read.
        """
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._rows.shape[0]:
            raise ModelError(f"token {int(tokens.max())} is not in the model's vocabulary of {self._rows.shape[0]}")
        rows: Array = self._rows.gather(tokens).astype(np.float32)
        if self._scales is not None:
            rows *= self._scales[tokens, None]
        return rows

    @cached_property
    def mean(self) -> Array:
        """(d,) float32, of all rows."""
        size, summed = self._rows.shape[0], np.zeros(self.width)
        for begin in range(0, size, MEAN_ROWS):
            summed += self.embed(np.arange(begin, min(begin + MEAN_ROWS, size))).sum(0, dtype=np.float64)
        mean: Array = (summed / size).astype(np.float32)
        return mean

    def slices(self, num_rows: int) -> Iterator[Tensors]:
        """So many rows at a time, (V', d) as they are stored, and their scales, (V',), where there are any; both mapped."""
        table = self._weights.map("tokens")
        for begin in range(0, len(table), num_rows):
            rows = slice(begin, begin + num_rows)
            yield {"tokens": table[rows]} | ({} if self._scales is None else {"tokens.scale": self._scales[rows]})
            give_back_pages(table)

    @property
    def width(self) -> int:
        """d."""
        return self._rows.shape[1]
