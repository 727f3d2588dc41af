"""
Sequences of different lengths in one batch, without padding.

A packed batch is the rows of all real tokens one under the other, (N, w), and the sequences' lengths, (B,), N = sum(lengths).
Only attention needs the (B, T) grid, T = max(lengths); `Packing` goes there and back.
"""

import torch
from torch import Tensor

__all__ = ["Packing", "labelled_positions"]


class Packing:
    """Where the rows of a packed batch stand in the padded (B, T) grid."""

    def __init__(self, lengths: Tensor) -> None:
        self.num_sequences = len(lengths)
        self.longest = int(lengths.max())
        self.positions = positions_in_sequence(lengths)  # (N,)
        sequence = torch.arange(self.num_sequences, device=lengths.device).repeat_interleave(lengths)
        self.cells = sequence * self.longest + self.positions  # (N,)

    def pad(self, rows: Tensor) -> Tensor:
        """(N, w) -> (B, T, w), zero where a sequence has ended."""
        grid = rows.new_zeros(self.num_sequences * self.longest, rows.shape[1])
        return grid.index_copy_(0, self.cells, rows).view(self.num_sequences, self.longest, -1)

    def pack(self, grid: Tensor) -> Tensor:
        """(B, T, w) -> (N, w)."""
        return grid.flatten(0, 1).index_select(0, self.cells)


def positions_in_sequence(lengths: Tensor) -> Tensor:
    """(B,) lengths -> (N,) position of every row in its own sequence."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum()), device=lengths.device) - starts.repeat_interleave(lengths)


def labelled_positions(lengths: Tensor, label_counts: Tensor) -> Tensor:
    """The rows of a packed batch that have a label: the last ``label_counts[b]`` of every sequence. (M,), ascending."""
    first = (lengths - label_counts).repeat_interleave(lengths)
    return (positions_in_sequence(lengths) >= first).nonzero().flatten()
