"""
Sequences of different lengths in one batch, almost without padding.

A packed batch is the rows of all tokens of B sequences one under the other, (N, w), and the sequences' lengths, (B,), with
N = sum(lengths). All layers but attention treat each row by itself, so they never see padding, and rows on the wire have none.
Attention needs grids (B', T): sequences of about the same length share one, whose T is the length of the longest of them.
`Packing` goes from rows to grids and back.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Packing", "labelled_positions"]

MOST_PADDING = 1.25
"""Of a grid's longest sequence to its shortest, at most. A larger ratio wastes work on padding, a smaller makes many grids."""


class Packing:
    """
    Which cell of the grids each row of a packed batch takes. Cells are numbered grid by grid, and in a grid sequence by
    sequence.

    Args:
        lengths: (B,) whole numbers, on the device of the rows.
    """

    def __init__(self, lengths: Tensor) -> None:
        self.positions = positions_in_sequence(lengths)  # (N,)
        self.lengths = counts = lengths.tolist()
        self.grids: list[tuple[int, int]] = []
        """The shape (B', T) of each."""
        first, num_cells = [0] * len(counts), 0  # the cell of each sequence's first row; how many cells there are so far
        for group in _of_about_the_same_length(counts):
            longest = counts[group[-1]]
            self.grids.append((len(group), longest))
            for sequence in group:
                first[sequence] = num_cells
                num_cells += longest
        self.num_cells = num_cells
        self.cells = torch.tensor(first, device=lengths.device).repeat_interleave(lengths) + self.positions  # (N,)

    def pad(self, rows: Tensor) -> list[Tensor]:
        """Rows (N, w) -> each grid (B', T, w), zero where a sequence has ended."""
        cells = rows.new_zeros(self.num_cells, rows.shape[1]).index_copy_(0, self.cells, rows)
        parts = torch.split(cells, [sequences * longest for sequences, longest in self.grids])
        return [part.view(*grid, -1) for part, grid in zip(parts, self.grids, strict=True)]

    def attend(self, qkv: Tensor, num_heads: int) -> Tensor:
        """Causal attention of every sequence to itself: queries, keys and values (N, 3d) -> (N, d)."""
        return self.pack([_attend(grid, num_heads) for grid in self.pad(qkv)])

    def pack(self, grids: list[Tensor]) -> Tensor:
        """Each grid (B', T, w) -> rows (N, w), without the padding."""
        return torch.cat([grid.flatten(0, 1) for grid in grids]).index_select(0, self.cells)


def _attend(qkv: Tensor, num_heads: int) -> Tensor:  # (B, T, 3d) -> (B, T, d)
    heads = (*qkv.shape[:2], num_heads, -1)
    query, key, value = (part.view(heads).transpose(1, 2) for part in qkv.chunk(3, 2))  # (B, H, T, d/H)
    # No mask for the padding: it comes after a sequence's tokens, so no token sees it, and `pack` drops what it gives.
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


def _of_about_the_same_length(lengths: list[int]) -> list[list[int]]:
    """Groups of sequences, by number, that share a grid. In a group they are ordered by length: the last one is the longest."""
    groups: list[list[int]] = []
    for sequence in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and lengths[sequence] <= MOST_PADDING * lengths[groups[-1][0]]:
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return groups


def positions_in_sequence(lengths: Tensor) -> Tensor:
    """(B,) lengths -> (N,) position of every row in its own sequence."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum()), device=lengths.device) - starts.repeat_interleave(lengths)


def labelled_positions(lengths: Tensor, label_counts: Tensor) -> Tensor:
    """
    Which rows of a packed batch have a label: of sequence b the last ``label_counts[b]``. Lengths and counts (B,) -> numbers of
    rows (M,), ascending, with M = sum(label_counts).
    """
    first = (lengths - label_counts).repeat_interleave(lengths)
    return (positions_in_sequence(lengths) >= first).nonzero().flatten()
