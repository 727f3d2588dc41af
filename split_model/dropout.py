"""
LoRA's dropout on a part. Which inputs of A are kept is a function of a seed for each sequence, of the row's position in it, and
of layer and column: it does not depend on what else is computed with a sequence, where, or how often.

Every element takes 32 bits of a hash. A row's key, 64 bits of SplitMix64 (Steele, Lea, Flood 2014) begun at the sequence's
seed, is made on the CPU. The elements' bits come from whole-number operations, which give the same on every device: two rounds
of xorshift and multiplication, each with half of the row's key. torch's own generators give other numbers on every kind of
device.
"""

from collections.abc import Iterator, Sequence

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .packing import Packing, Places
from .transfer import copied_to

__all__ = ["SeededDropout"]

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 / the golden ratio, odd: by how much SplitMix64 steps."""
FIRST, SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
"""Odd factors below 2^31 in size, which spread a changed bit best with shifts by 16 and by 15 (found by Wellons, 2018)."""


class SeededDropout(nn.Module):
    """
    All layers of a part share one, which is told the seeds before each forward pass. Or it takes masks that are given, in the
    order of the forward pass.
    """

    def __init__(self, probability: float, device: torch.device) -> None:
        super().__init__()
        self.probability, self.device = probability, device
        self.seeds: Sequence[int] | None = None
        """Of the next forward pass, one for each sequence, 0 to 2^64 - 1."""
        self.masks: Iterator[Tensor] | None = None
        """One for each adapted layer, (N, in): 1 keeps an element, 0 drops it. None: they follow from the seeds."""
        self._keys: tuple[Tensor, Tensor] | None = None  # int32 (N, 1) each
        self._kept: Places | None = None
        self._num_columns = 0

    def add_columns(self, width: int) -> Tensor:
        """The keys of another layer's columns, int32 (width,): no two columns of all layers have the same."""
        first, self._num_columns = self._num_columns, self._num_columns + width
        numbers = torch.arange(first, self._num_columns, dtype=torch.int32)
        return _spread(_spread(numbers, 16, FIRST), 15, SECOND).to(self.device)

    @property
    def is_active(self) -> bool:
        """Whether anything is dropped."""
        return self.training and self.probability > 0

    def begin(self, packing: Packing, kept: Places | None = None) -> None:
        """
        Begin a forward pass over a batch, for which `seeds` are used up.

        Args:
            kept: of its rows, those that the last layers are given; None: all.
        """
        seeds, self.seeds, self._keys, self._kept = self.seeds, None, None, kept
        if not self.is_active or seeds is None:
            return
        if len(seeds) != len(packing.lengths):
            raise ValueError(f"dropout has seeds of {len(seeds)} sequences, and the batch has {len(packing.lengths)}")
        halves = row_keys(seeds, packing).view(numpy.int32).reshape(-1, 2)
        of_rows = copied_to(self.device, torch.from_numpy(halves))
        self._keys = of_rows[:, :1], of_rows[:, 1:]

    def forward(self, x: Tensor, columns: Tensor) -> Tensor:
        """(N, in) -> (N, in), or of the kept rows alone, of a layer whose columns have these keys, int32 (in,)."""
        if not self.is_active:
            return x
        keep = 1 - self.probability
        if self.masks is not None:
            mask = self._of_rows(x, copied_to(x.device, next(self.masks)))
        elif self._keys is not None:
            mask = self._mask(columns, x)
        else:
            raise RuntimeError("dropout needs seeds or masks before each forward pass of training")
        return x * mask / keep

    def _of_rows(self, x: Tensor, of_all: Tensor) -> Tensor:
        return of_all if self._kept is None or len(x) == len(of_all) else self._kept.take(of_all)

    def _mask(self, columns: Tensor, x: Tensor) -> Tensor:
        assert self._keys is not None
        first, second = (self._of_rows(x, keys) for keys in self._keys)
        bits = _spread(_spread(columns ^ first, 16, FIRST).add_(second), 15, SECOND)  # (N, in)
        # int32 begins at -2^31. The upper bits, which decide, are the best mixed ones.
        limit = min(round(self.probability * 2**32), 2**32 - 1) - 2**31
        return (bits >= limit).to(x.dtype)


def row_keys(seeds: Sequence[int], packing: Packing) -> NDArray[numpy.uint64]:
    """Of every row, (N,): the number at its position in the sequence of numbers that begins with its seed."""
    state = numpy.asarray(seeds, dtype=numpy.uint64).repeat(packing.lengths)
    state += (packing.positions + 1).astype(numpy.uint64) * numpy.uint64(GOLDEN)
    state = (state ^ (state >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    keys: NDArray[numpy.uint64] = state ^ (state >> numpy.uint64(31))
    return keys


def _spread(bits: Tensor, shift: int, factor: int) -> Tensor:
    """int32, in place: its upper bits are mixed into the lower ones, then the lower into the upper ones. Nothing is lost."""
    upper = bits >> shift
    upper &= (1 << (32 - shift)) - 1  # torch's shift repeats the sign
    bits ^= upper
    bits *= factor
    return bits
