"""
Many continuations of many texts through the blocks of a model, for the work of the new tokens alone.

P prefixes of t tokens each, c continuations by one token of each, d elements in a row; H heads of queries and K of keys and
values, D elements each.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from protocol import Array

__all__ = ["Prefixes"]

KeysAndValues = tuple[Tensor, Tensor]
"""(P, K, t, D) each."""


class Prefixes:
    """Keys and values of P texts in consecutive blocks; at first the texts are empty."""

    def __init__(self, blocks: nn.ModuleList, number: int) -> None:
        self._blocks, self.number, self.length = blocks, number, 0
        self._kept: list[KeysAndValues] = []
        self._of_new: list[KeysAndValues] = []

    @torch.no_grad()
    def extended(self, hidden: Tensor) -> Tensor:
        """
        Rows (P c, d) behind the blocks, of rows before them. Each continues its prefix, and sees none of the others:
        the first c rows continue the first prefix, the next c the second.
        """
        step = _Step(self._kept, self.number, np.full(len(hidden), self.length))
        for block in self._blocks:
            hidden = block(hidden, step)
        self._of_new = step.of_new
        return hidden

    def chosen(self, rows: Tensor, per_prefix: int) -> "Prefixes":
        """
        The prefixes that become of some of the rows that were `extended` last.

        Args:
            rows: (P',) numbers of rows.
            per_prefix: c.
        """
        longer, parents = Prefixes(self._blocks, len(rows)), rows // per_prefix
        longer.length = self.length + 1
        for number, of_new in enumerate(self._of_new):
            # (P, K, c, D) -> (P', K, 1, D)
            new = [part.transpose(1, 2).flatten(0, 1)[rows].unsqueeze(2) for part in of_new]
            if self.length:
                new = [torch.cat([old[parents], part], 2) for old, part in zip(self._kept[number], new, strict=True)]
            longer._kept.append((new[0], new[1]))
        return longer

    def part(self, prefixes: Tensor) -> "Prefixes":
        """Some of them, (P',) numbers, to be extended apart."""
        some = Prefixes(self._blocks, len(prefixes))
        some.length, some._kept = self.length, [(keys[prefixes], values[prefixes]) for keys, values in self._kept]
        return some


class _Step:
    """
    Stands where a `Packing` does: every row is the next token of a prefix.

    Args:
        number: P.
        positions: (P c,) of the rows in their texts.
    """

    def __init__(self, kept: Iterable[KeysAndValues], number: int, positions: Array) -> None:
        self._kept, self._number, self.positions = iter(kept), number, positions
        self.of_new: list[KeysAndValues] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
        """See `Packing.attend`: (P c, H, D), twice (P c, K, D) -> (P c, H D)."""
        (heads, width), of_keys = query.shape[1:], key.shape[1]
        key, value = (part.view(self._number, -1, of_keys, width).transpose(1, 2) for part in (key, value))  # (P, K, c, D)
        self.of_new.append((key, value))
        key, value = key.unsqueeze(2), value.unsqueeze(2)  # seen by H / K heads of queries each
        query = query.view(self._number, -1, of_keys, heads // of_keys, width).permute(0, 2, 3, 1, 4)  # (P, K, H / K, c, D)
        scores = [(query * key).sum(-1, keepdim=True)]  # of itself
        before = [part[:, :, _first_seen(part.shape[2], window) :].unsqueeze(2) for part in next(self._kept, ())]
        if before:
            scores.append(query @ before[0].transpose(3, 4))  # (P, K, H / K, c, t)
        weights = (torch.cat(scores, 4) * width**-0.5).softmax(4)
        mixed: Tensor = weights[..., :1] * value
        if before:
            mixed = mixed + weights[..., 1:] @ before[1]
        return mixed.permute(0, 3, 1, 2, 4).reshape(-1, heads * width)


def _first_seen(num_before: int, window: int | None) -> int:
    """Of the tokens before one that sees a window of them, itself among them: the first that it sees."""
    return 0 if window is None else max(0, num_before + 1 - window)
