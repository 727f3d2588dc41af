"""Weights as small integers, a scale and a zero point for each block of a row: the layout of ONNX Runtime's MatMulNBits."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphs import Floats

__all__ = ["BlockFormat", "Grid", "QuantisedMatrix", "quantise"]

ROWS_AT_ONCE = 4096
"""A matrix is quantised in pieces of so many rows: as a whole it would need several float copies of itself."""


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """How a row of a matrix is stored: value = (integer - zero point) * scale, scale and zero point shared by a block."""

    bits: int
    """8 or 4."""
    size: int
    """Elements of a block; a power of two from 16."""

    @property
    def largest(self) -> int:
        """Of the integers."""
        return int(2**self.bits - 1)

    def padded(self, width: int) -> int:
        """``width`` rounded up to whole blocks."""
        return -(-width // self.size) * self.size


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The values that the elements of blocks may have. Both arrays have the shape of the elements, or 1 for a dimension."""

    scales: Floats
    zero_points: Floats
    """Integers."""
    largest: int
    """Of the integers."""

    @classmethod
    def around(cls, lowest: Floats, highest: Floats, form: BlockFormat) -> "Grid":
        """From the lowest to the highest value, and zero: the ends of rows are filled up with it."""
        lowest, highest = np.minimum(lowest, 0), np.maximum(highest, 0)
        scales = (highest - lowest) / np.float32(form.largest)
        return cls(scales=scales, zero_points=np.rint(-lowest / np.where(scales == 0, 1, scales)), largest=form.largest)

    def integers(self, values: Floats) -> NDArray[np.uint8]:
        """The nearest."""
        nearest = np.rint(values / np.where(self.scales == 0, 1, self.scales)) + self.zero_points
        return np.clip(nearest, 0, self.largest).astype(np.uint8)

    def values(self, integers: NDArray[np.uint8]) -> Floats:
        found: Floats = (integers - self.zero_points) * self.scales
        return found


@dataclass(frozen=True, kw_only=True)
class QuantisedMatrix:
    """N rows of K elements in b blocks of a row."""

    integers: NDArray[np.uint8]
    """(N, b, bytes of a block); of two 4-bit integers in a byte, the first is the lower half."""
    scales: Floats
    """(N, b)"""
    zero_points: NDArray[np.uint8]
    """(N, b), packed as the integers are."""

    @classmethod
    def of(cls, blocks: NDArray[np.uint8], grid: Grid, form: BlockFormat) -> "QuantisedMatrix":
        """
        Args:
            blocks: (N, b, elements of a block).
            grid: (N, b, 1).
        """
        return cls(
            integers=_pack(blocks, form.bits),
            scales=np.ascontiguousarray(grid.scales[..., 0]),
            zero_points=_pack(grid.zero_points[..., 0].astype(np.uint8), form.bits),
        )

    def values(self, width: int, form: BlockFormat) -> Floats:
        """(N, width) as a runtime reads it."""
        integers = _unpack(self.integers, form.bits)
        zero_points = _unpack(self.zero_points, form.bits)[:, : self.scales.shape[1]]
        grid = Grid(scales=self.scales[..., None], zero_points=zero_points[..., None].astype(np.float32), largest=form.largest)
        return grid.values(integers).reshape(len(integers), -1)[:, :width]


def quantise(rows: Iterable[Floats], form: BlockFormat) -> Iterator[QuantisedMatrix]:
    """
    Args:
        rows: (N, K), in pieces of some rows each.

    Yields:
        Their nearest representation, some rows at a time. The last block of a row is filled up with zeros.
    """
    for some in rows:
        for start in range(0, len(some), ROWS_AT_ONCE):
            yield _quantise_piece(some[start : start + ROWS_AT_ONCE], form)


@np.errstate(over="ignore", invalid="ignore")  # of which scales that are not finite tell
def _quantise_piece(rows: Floats, form: BlockFormat) -> QuantisedMatrix:
    count, width = rows.shape
    filled = np.zeros((count, form.padded(width)), np.float32)
    filled[:, :width] = rows
    blocks = filled.reshape(count, -1, form.size)
    grid = Grid.around(blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True), form)
    return QuantisedMatrix.of(grid.integers(blocks), grid, form)


def _pack(integers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return integers
    if integers.shape[-1] % 2:
        integers = np.concatenate([integers, np.zeros_like(integers[..., :1])], -1)
    return np.bitwise_or(integers[..., 0::2], np.left_shift(integers[..., 1::2], 4), dtype=np.uint8)


def _unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
