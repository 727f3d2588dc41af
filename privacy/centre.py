"""
Around which point a device clips its activations.

A model's activations share large parts that say nothing of the text; a clip that left room for these would need noise in
proportion. So they are taken away first: the mean over token ids that everybody can draw, through the base model, whose first
blocks everybody has. Nothing of a device's text is in it, or it would itself have to be protected.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .noise import Array

__all__ = ["Centre", "public_token_ids"]

SEQUENCES, LENGTH = 16, 32
"""512 rows: the means' errors are small beside the spread of rows, and a device computes them in a second."""


def public_token_ids(vocabulary_size: int, num_positions: int) -> tuple[Array, Array]:
    """
    Sequences of token ids that follow from a model's sizes.

    Args:
        num_positions: most tokens of a sequence.

    Returns:
        (N,) ids, and (B,) lengths, whose sum is N. Both int32.
    """
    length = min(LENGTH, num_positions)
    stream = hashlib.shake_256(b"centre of activations").digest(8 * SEQUENCES * length)
    ids = np.frombuffer(stream, "<u8") % np.uint64(vocabulary_size)
    return ids.astype(np.int32), np.full(SEQUENCES, length, np.int32)


@dataclass(frozen=True)
class Centre:
    """Mean activations of the first position, which in GPT-2 are unlike all others, and of the later ones."""

    first: Array
    """(d,)"""
    later: Array
    """(d,)"""

    @classmethod
    def of(cls, activations: Array, lengths: Array) -> "Centre":
        """
        Args:
            activations: (N, d) at the cut, of the base model without an adapter, for `public_token_ids`.
            lengths: (B,) of their sequences.
        """
        is_first = _is_first(lengths)
        first, later = activations[is_first], activations[~is_first]
        later = later if len(later) else first  # a model of one position will never have any
        return cls(*(rows.mean(0, dtype=np.float64).astype(activations.dtype) for rows in (first, later)))

    @classmethod
    def of_model(cls, vocabulary_size: int, num_positions: int, activations: Callable[[Array, Array], Array]) -> "Centre":
        """
        Of a base model.

        Args:
            vocabulary_size, num_positions: the model's.
            activations: gives (N, d) at the cut, without an adapter, of ids (N,) in sequences of lengths (B,).
        """
        ids, lengths = public_token_ids(vocabulary_size, num_positions)
        return cls.of(activations(ids, lengths), lengths)

    def rows(self, lengths: Array) -> Array:
        """(B,) lengths of packed sequences -> (N, d), the centre of each of their rows."""
        chosen: Array = np.where(_is_first(lengths)[:, None], self.first, self.later)
        return chosen


def _is_first(lengths: Array) -> Array:
    """(B,) -> (N,) bool: which rows begin a sequence. No sequence is empty."""
    is_first = np.zeros(int(lengths.sum()), bool)
    is_first[np.cumsum(lengths) - lengths] = True
    return is_first
