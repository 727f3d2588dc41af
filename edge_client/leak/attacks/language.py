"""What an attacker expects of a text before it sees any of it: the model's next token, and that of its own texts."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...data import Sample

__all__ = ["NextToken"]

OF_MODEL = 0.5
"""The model's share in what is expected; the rest is of the attacker's own texts."""
DISCOUNT = 0.5
"""Of each count of what follows, what is left to the shorter context."""
START = -1
LONGEST_CONTEXT = 2


class NextToken:
    """
    Which tokens follow which in texts, by the two tokens before, where these were seen, else by one, else by none (absolute
    discounting), mixed with a language model's own opinion.

    Args:
        samples: the texts.
    """

    def __init__(self, samples: Sequence[Sample], vocabulary_size: int) -> None:
        self._size = vocabulary_size
        self._after: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for sample in samples:
            tokens = [START] * LONGEST_CONTEXT + sample.tokens[:-1].tolist()
            for end in range(LONGEST_CONTEXT, len(tokens)):
                for length in range(LONGEST_CONTEXT + 1):
                    self._after[tuple(tokens[end - length : end])][tokens[end]] += 1

    def log_probability(self, texts: Sequence[Sequence[int]], of_model: Tensor | None) -> Tensor:
        """
        Of every token to come next, (P, V).

        Args:
            texts: P texts so far.
            of_model: (P, V) its probabilities; None where it has none, before the first token.
        """
        rows = torch.stack([self._row(tuple(([START] * LONGEST_CONTEXT + list(text))[-LONGEST_CONTEXT:])) for text in texts])
        return (rows if of_model is None else OF_MODEL * of_model + (1 - OF_MODEL) * rows).log()

    def _row(self, context: tuple[int, ...]) -> Tensor:
        row = torch.full((self._size,), 1 / self._size)
        for length in range(LONGEST_CONTEXT + 1):
            counts = self._after.get(context[LONGEST_CONTEXT - length :])
            if counts:
                total = sum(counts.values())
                row *= DISCOUNT * len(counts) / total
                seen = torch.from_numpy(np.fromiter(counts.keys(), np.int64, len(counts)))
                row[seen] += (torch.from_numpy(np.fromiter(counts.values(), np.float32, len(counts))) - DISCOUNT) / total
        return row
