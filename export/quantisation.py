"""Weights as small integers, a scale and a zero point for each block of a row: the layout of ONNX Runtime's MatMulNBits."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphs import Floats

__all__ = ["BlockFormat", "QuantisedMatrix", "quantise"]

ROWS_AT_ONCE = 4096
"""A matrix is quantised in pieces of so many rows: as a whole it would need several float copies of itself."""


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """How a row of a matrix is stored: value = (integer - zero point) * scale, scale and zero point shared by a block."""

    bits: int
    """8 or 4."""
    size: int
    """Elements of a block; a power of two from 16."""

    def padded(self, width: int) -> int:
        """``width`` rounded up to whole blocks."""
        return -(-width // self.size) * self.size


@dataclass(frozen=True, kw_only=True)
class QuantisedMatrix:
    """N rows of K elements in b blocks of a row."""

    integers: NDArray[np.uint8]
    """(N, b, bytes of a block); of two 4-bit integers in a byte, the first is the lower half."""
    scales: Floats
    """(N, b)"""
    zero_points: NDArray[np.uint8]
    """(N, b), packed as the integers are."""


def quantise(rows: Iterable[Floats], form: BlockFormat) -> QuantisedMatrix:
    """
    Args:
        rows: (N, K), in pieces of some rows each.

    Returns:
        Their nearest representation. The last block of a row is filled up with zeros.
    """
    pieces = [
        _quantise_piece(some[start : start + ROWS_AT_ONCE], form)
        for some in rows
        for start in range(0, len(some), ROWS_AT_ONCE)
    ]
    return QuantisedMatrix(
        integers=np.concatenate([piece.integers for piece in pieces]),
        scales=np.concatenate([piece.scales for piece in pieces]),
        zero_points=np.concatenate([piece.zero_points for piece in pieces]),
    )


def _quantise_piece(rows: Floats, form: BlockFormat) -> QuantisedMatrix:
    count, width = rows.shape
    filled = np.zeros((count, form.padded(width)), np.float32)
    filled[:, :width] = rows
    blocks = filled.reshape(count, -1, form.size)
    # Zero is always on the grid, since the ends of rows are filled up with it.
    lowest, highest = np.minimum(blocks.min(-1, keepdims=True), 0), np.maximum(blocks.max(-1, keepdims=True), 0)
    largest = 2**form.bits - 1
    scales = (highest - lowest) / np.float32(largest)
    steps = np.where(scales == 0, 1, scales)
    zero_points = np.rint(-lowest / steps)
    integers = np.clip(np.rint(blocks / steps) + zero_points, 0, largest)
    return QuantisedMatrix(
        integers=_pack(integers.astype(np.uint8), form.bits),
        scales=np.ascontiguousarray(scales[..., 0]),
        zero_points=_pack(zero_points[..., 0].astype(np.uint8), form.bits),
    )


def _pack(integers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return integers
    if integers.shape[-1] % 2:
        integers = np.concatenate([integers, np.zeros_like(integers[..., :1])], -1)
    return np.bitwise_or(integers[..., 0::2], np.left_shift(integers[..., 1::2], 4), dtype=np.uint8)
