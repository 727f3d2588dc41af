"""
Many continuations of many texts through the blocks of a model, for the work of the new tokens alone.

P prefixes of t tokens each, c continuations by one token of each, d elements in a row.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["Prefixes"]

KeysAndValues = tuple[Tensor, Tensor]
"""(P, H, t, d / H) each, of H heads."""


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
        step = _Step(self._kept, self.number)
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
            # (P, H, c, d / H) -> (P', H, 1, d / H)
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
    """Stands where a `Packing` does: every row is the next token of a prefix."""

    def __init__(self, kept: Iterable[KeysAndValues], number: int) -> None:
        self._kept, self._number = iter(kept), number
        self.of_new: list[KeysAndValues] = []

    def attend(self, qkv: Tensor, num_heads: int) -> Tensor:  # (P c, 3d) -> (P c, d)
        heads = (self._number, -1, num_heads, qkv.shape[1] // 3 // num_heads)
        query, key, value = (part.reshape(heads).transpose(1, 2) for part in qkv.chunk(3, 1))  # (P, H, c, d / H)
        self.of_new.append((key, value))
        scale = query.shape[-1] ** -0.5
        scores, before = (query * key).sum(-1, keepdim=True) * scale, next(self._kept, None)  # (P, H, c, 1): of itself
        if before is None:
            return value.transpose(1, 2).reshape(len(qkv), -1)
        keys, values = before
        weights = torch.cat([query @ keys.transpose(2, 3) * scale, scores], 3).softmax(3)  # (P, H, c, t + 1)
        mixed = weights[..., :-1] @ values + weights[..., -1:] * value
        return mixed.transpose(1, 2).reshape(len(qkv), -1)
