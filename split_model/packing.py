"""
Sequences of different lengths in one batch, almost without padding.

A packed batch is the rows of all tokens of B sequences one under the other, (N, w), and the sequences' lengths, (B,), with
N = sum(lengths). All layers but attention treat each row by itself, so they never see padding, and rows on the wire have none.
Attention takes the rows as they are where it has a kernel for them. Elsewhere it needs grids (B', T): sequences of about the
same length share one, whose T is the length of the longest of them.

Numbers that say where rows are belong to the host: they are arrays of numpy, which cannot be on a device. What a device needs
of them is copied once for a batch, and nothing that is on a device is ever read back to find out where rows are.
"""

from collections.abc import Callable
from functools import cache, cached_property
from inspect import signature
from typing import Any

import numpy
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional as F

from .transfer import copied_to

__all__ = ["Numbers", "Packing", "Places", "labelled_positions", "positions_in_sequence"]

Numbers = NDArray[numpy.int64]
"""Whole numbers on the host."""

MOST_PADDING = 1.25
"""Of a grid's longest sequence to its shortest, at most. A larger ratio wastes work on padding, a smaller makes many grids."""
WIDEST_HEAD = 192
"""Elements of a head for which every card has a kernel of packed rows, in both directions; they are a multiple of 8."""


class Places:
    """
    Where each of n rows stands among m of them, each somewhere else. The gradient of `spread` is `take`, and the other way
    round; so both directions only read by number, and never add up rows in an order that nobody knows.

    Args:
        places: (n,), on the host.
        device: of the rows.
    """

    def __init__(self, places: Numbers, among: int, device: torch.device) -> None:
        rows, is_empty = numpy.zeros(among, dtype=numpy.int64), numpy.ones(among, dtype=bool)
        rows[places], is_empty[places] = numpy.arange(len(places)), False
        (empty,) = is_empty.nonzero()
        together = torch.from_numpy(numpy.concatenate([places, rows, empty]))  # one copy for all
        self._places, self._rows, self._empty = torch.split(copied_to(device, together), [len(places), among, len(empty)])

    def spread(self, rows: Tensor) -> Tensor:
        """(n, w) -> (m, w), zero where no row stands."""
        spread: Tensor = _Spread.apply(rows, self)  # type: ignore[no-untyped-call]
        return spread

    def take(self, spread: Tensor) -> Tensor:
        """(m, w) -> (n, w)."""
        rows: Tensor = _Take.apply(spread, self)  # type: ignore[no-untyped-call]
        return rows

    def _spread(self, rows: Tensor) -> Tensor:
        if not len(rows):
            return rows.new_zeros(len(self._rows), rows.shape[1])
        spread = rows.index_select(0, self._rows)
        return spread.index_fill_(0, self._empty, 0) if len(self._empty) else spread

    def _take(self, spread: Tensor) -> Tensor:
        return spread.index_select(0, self._places)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, places: Places) -> Tensor:
        context.places = places
        return places._spread(rows)

    @staticmethod
    def backward(context: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return context.places.take(upstream[0]), None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, spread: Tensor, places: Places) -> Tensor:
        context.places = places
        return places._take(spread)

    @staticmethod
    def backward(context: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return context.places.spread(upstream[0]), None


class Packing:
    """
    How the rows of a packed batch make sequences.

    Args:
        lengths: (B,) whole numbers, on the host.
        device: of the rows.
    """

    def __init__(self, lengths: ArrayLike, device: torch.device) -> None:
        self.lengths: Numbers = numpy.asarray(lengths, dtype=numpy.int64)
        self.positions = positions_in_sequence(self.lengths)  # (N,)
        self.device = device

    @cached_property
    def grids(self) -> list[list[int]]:
        """The sequences of each, by number. In a grid they are ordered by length: the last one is the longest."""
        return _of_about_the_same_length(self.lengths.tolist())

    @cached_property
    def _cells(self) -> Places:
        """Of the rows. Cells are numbered grid by grid, and in a grid sequence by sequence."""
        first, num_cells = numpy.zeros_like(self.lengths), 0  # the cell of each sequence's first row
        for group, (sequences, longest) in zip(self.grids, self._shapes, strict=True):
            first[group] = num_cells + longest * numpy.arange(sequences)
            num_cells += sequences * longest
        return Places(first.repeat(self.lengths) + self.positions, num_cells, self.device)

    @cached_property
    def _shapes(self) -> list[tuple[int, int]]:
        """(B', T) of each grid."""
        return [(len(group), int(self.lengths[group[-1]])) for group in self.grids]

    @cached_property
    def _boundaries(self) -> Tensor:
        """Where each sequence begins, and where the last one ends: int32 (B + 1,) on the device."""
        ends = numpy.cumsum([0, *self.lengths], dtype=numpy.int32)
        return copied_to(self.device, torch.from_numpy(ends))

    def labelled(self, label_counts: ArrayLike) -> Places | None:
        """Of the rows that have a label, among all; see `labelled_positions`. None if all have one."""
        labelled = labelled_positions(self.lengths, label_counts)
        return Places(labelled, len(self.positions), self.device) if len(labelled) < len(self.positions) else None

    def pad(self, rows: Tensor) -> list[Tensor]:
        """Rows (N, w) -> each grid (B', T, w), zero where a sequence has ended."""
        parts = torch.split(self._cells.spread(rows), [sequences * longest for sequences, longest in self._shapes])
        return [part.view(*shape, -1) for part, shape in zip(parts, self._shapes, strict=True)]

    def pack(self, grids: list[Tensor]) -> Tensor:
        """Each grid (B', T, w) -> rows (N, w), without the padding."""
        return self._cells.take(torch.cat([grid.flatten(0, 1) for grid in grids]))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
        """
        Causal attention of every sequence to itself. Queries (N, H, D), keys and values (N, K, D), each of which is seen by
        H / K heads of queries -> (N, H D).

        Args:
            window: how many tokens a token sees, itself and those before it; None: all.
        """
        if query.device.type != "cpu":  # a CUDA device has few kernels in which heads share keys and values
            key, value = (_for_each_query(each, query.shape[1]) for each in (key, value))
        kernel = kernel_of_packed_rows(query.device, query.dtype, query.shape[2])
        if kernel is None:
            queries, keys, values = (self.pad(each.flatten(1)) for each in (query, key, value))
            grids = zip(queries, keys, values, strict=True)
            return self.pack([_attend(q, k, v, query.shape[2], window) for q, k, v in grids])
        where, longest = self._boundaries, int(self.lengths.max())
        seen = CAUSAL if window is None else (window - 1, 0)
        mixed: Tensor = kernel(query, key, value, where, where, longest, longest, window_size=seen)
        return mixed.flatten(1)


def _for_each_query(heads: Tensor, num_heads: int) -> Tensor:  # (N, K, D) -> (N, H, D)
    if heads.shape[1] == num_heads:
        return heads
    # By a view: the gradient of repeat_interleave adds up in an order that nobody knows.
    return heads.unsqueeze(2).expand(-1, -1, num_heads // heads.shape[1], -1).flatten(1, 2)


CAUSAL = (-1, 0)
"""A token sees all that are before it, and none behind it."""


def kernel_of_packed_rows(device: torch.device, dtype: torch.dtype, head_width: int) -> Callable[..., Tensor] | None:
    """`torch.nn.attention.varlen.varlen_attn` where it can be used: in half precision on a CUDA device that is not too old."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    if device.type != "cuda" or not is_half or head_width % 8 or head_width > WIDEST_HEAD:
        return None
    return _varlen_attn(device)


@cache
def _varlen_attn(device: torch.device) -> Callable[..., Tensor] | None:
    # The second was added with torch 2.5.
    is_built = getattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    if torch.version.hip or not is_built() or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:  # Its import loads much, which only this path needs.
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # What an older torch has under this name takes other arguments.
    kernel: Callable[..., Any] = varlen_attn
    return kernel if "window_size" in signature(kernel).parameters else None


def _attend(query: Tensor, key: Tensor, value: Tensor, head_width: int, window: int | None) -> Tensor:
    """Queries (B, T, H D), keys and values (B, T, K D) -> (B, T, H D)."""
    longest = query.shape[1]
    query, key, value = (
        each.view(*each.shape[:2], -1, head_width).transpose(1, 2) for each in (query, key, value)
    )  # (B, H, T, D), twice (B, K, T, D)
    is_shared = key.shape[1] != query.shape[1]
    # No mask for the padding: it comes after a sequence's tokens, so no token sees it, and `pack` drops what it gives.
    if window is None or window >= longest:
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=is_shared)
    else:
        mask = torch.ones(longest, longest, dtype=torch.bool, device=query.device).tril().triu(1 - window)
        mixed = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=is_shared)
    return mixed.transpose(1, 2).flatten(2)


def _of_about_the_same_length(lengths: list[int]) -> list[list[int]]:
    """Groups of sequences, by number, that share a grid. In a group they are ordered by length: the last one is the longest."""
    groups: list[list[int]] = []
    for sequence in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and lengths[sequence] <= MOST_PADDING * lengths[groups[-1][0]]:
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return groups


def positions_in_sequence(lengths: Numbers) -> Numbers:
    """(B,) lengths -> (N,) position of every row in its own sequence."""
    return numpy.arange(lengths.sum()) - (lengths.cumsum() - lengths).repeat(lengths)


def labelled_positions(lengths: ArrayLike, label_counts: ArrayLike) -> Numbers:
    """
    Which rows of a packed batch have a label: of sequence b the last ``label_counts[b]``. Lengths and counts (B,) -> numbers of
    rows (M,), ascending, with M = sum(label_counts).
    """
    of_all, labelled = numpy.asarray(lengths, dtype=numpy.int64), numpy.asarray(label_counts, dtype=numpy.int64)
    return positions_in_sequence(labelled) + (of_all.cumsum() - labelled).repeat(labelled)
