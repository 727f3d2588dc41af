"""
Sequences of different lengths in one batch, almost without padding.

A packed batch is the rows of all real tokens one under the other, (N, w), and the sequences' lengths, (B,), N = sum(lengths).
Only attention needs (B, T) grids: sequences of about the same length share one, T long as the longest of them. `Packing` goes
there and back.
"""

import torch
from torch import Tensor

__all__ = ["Packing", "labelled_positions"]

MOST_PADDING = 1.25
"""A grid's longest sequence to its shortest. More makes few, wasteful products of attention, less makes many small ones."""


class Packing:
    """Where the rows of a packed batch stand in the grids, which lie one under the other."""

    def __init__(self, lengths: Tensor) -> None:
        self.positions = positions_in_sequence(lengths)  # (N,)
        rows_of = lengths.tolist()
        self.grids: list[tuple[int, int]] = []
        """B and T of each."""
        first, num_cells = [0] * len(rows_of), 0
        for group in _of_about_the_same_length(rows_of):
            longest = rows_of[group[-1]]
            self.grids.append((len(group), longest))
            for sequence in group:
                first[sequence] = num_cells
                num_cells += longest
        self.num_cells = num_cells
        self.cells = torch.tensor(first, device=lengths.device).repeat_interleave(lengths) + self.positions  # (N,)

    def pad(self, rows: Tensor) -> list[Tensor]:
        """(N, w) -> (B, T, w) for each grid, zero where a sequence has ended."""
        cells = rows.new_zeros(self.num_cells, rows.shape[1]).index_copy_(0, self.cells, rows)
        parts = torch.split(cells, [sequences * longest for sequences, longest in self.grids])
        return [part.view(*grid, -1) for part, grid in zip(parts, self.grids, strict=True)]

    def pack(self, grids: list[Tensor]) -> Tensor:
        """(B, T, w) of each grid -> (N, w)."""
        return torch.cat([grid.flatten(0, 1) for grid in grids]).index_select(0, self.cells)


def _of_about_the_same_length(lengths: list[int]) -> list[list[int]]:
    """Which sequences share a grid; the longest of each is the last."""
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
    """The rows of a packed batch that have a label: the last ``label_counts[b]`` of every sequence. (M,), ascending."""
    first = (lengths - label_counts).repeat_interleave(lengths)
    return (positions_in_sequence(lengths) >= first).nonzero().flatten()
