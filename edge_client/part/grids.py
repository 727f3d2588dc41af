"""How a packed batch, (N, d) rows of B sequences, is laid out where attention needs a grid (B', T)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from protocol import Array

__all__ = ["Grid", "grids"]

FEW_ROWS = 256
"""About as many has one grid, or a single sequence if that is longer: intermediate values take memory for each row. A batch of
more rows is cut into equal shares. Of 468 rows of GPT-2 small, two halves take as long as the whole, and 10 MB less."""
MOST_SCORES_BYTES = 32 << 20
"""Of one grid's attention scores, (B', H, T, T) float32, unless a single sequence has more."""
HEAD_WIDTH = 64
"""Of nearly every model: how many heads there are is known to the graphs alone, and only an estimate is needed."""


@dataclass(frozen=True)
class Grid:
    """Some sequences of a batch, padded to the longest of them."""

    rows: Array
    """(N',) which of the batch's rows they are."""
    positions: Array
    """(N',) int64: of each of these rows in its own sequence."""
    row_of_cell: Array
    """(B', T) int64: which of these rows a cell shows. A cell of padding shows the first one; causal attention never looks."""
    cell_of_row: Array
    """(N',) int64: where each of these rows is, cells numbered sequence by sequence."""
    is_token: Array
    """(B', T, 1) float32: 0 for padding."""


def grids(lengths: Array, width: int) -> list[Grid]:
    """
    The grids of a batch: few, since every graph is run once a grid, but more where padding or memory would cost too much.

    Args:
        lengths: (B,) rows of each sequence.
        width: d.
    """
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    return [_grid(lengths[group], starts[group]) for group in _groups(lengths.tolist(), width)]


def _groups(lengths: Sequence[int], width: int) -> Iterator[list[int]]:
    """The sequences, by number, of each grid. All, once; none that is empty."""
    group: list[int] = []
    share = sum(lengths) / max(1, math.ceil(sum(lengths) / FEW_ROWS))
    for sequence in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not lengths[sequence]:
            continue
        there = [lengths[other] for other in group]
        if group and (sum(there) >= share or not _can_share([*there, lengths[sequence]], width)):
            yield group
            group = []
        group.append(sequence)
    if group:
        yield group


def _can_share(lengths: Sequence[int], width: int) -> bool:
    """Whether sequences, the longest last, are to share a grid."""
    cells = len(lengths) * lengths[-1] ** 2  # of (B', T, T): each is a product of d numbers in every block, and then another
    padding = cells - sum(length**2 for length in lengths)
    # A row costs 12 d² products in a block's linear layers, so padding adds at most a tenth to what the sequences cost.
    return padding <= width * sum(lengths) / 2 and 4 * cells * max(1, width // HEAD_WIDTH) <= MOST_SCORES_BYTES


def _grid(lengths: Array, starts: Array) -> Grid:
    """
    Args:
        lengths: (B',) of the grid's sequences.
        starts: (B',) the batch's row with which each begins.
    """
    num_sequences, longest = len(lengths), int(lengths.max())
    columns = np.arange(longest)
    is_token = columns < lengths[:, None]  # (B', T)
    sequence, positions = is_token.nonzero()
    row_of_cell = np.zeros((num_sequences, longest), np.int64)
    row_of_cell[is_token] = np.arange(len(positions))
    return Grid(
        rows=starts[sequence] + positions,
        positions=positions,
        row_of_cell=row_of_cell,
        cell_of_row=sequence * longest + positions,
        is_token=is_token[..., None].astype(np.float32),
    )
