"""Weights as small integers, a scale and a zero point for each block of a row: the layout of ONNX Runtime's MatMulNBits."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .weights import Floats

__all__ = ["BlockFormat", "QuantisedMatrix", "quantise"]

ROWS_AT_ONCE = 4096
"""A vocabulary's table is quantised piece by piece: a whole one would need several float copies of itself."""


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """How a row of a matrix is stored: value = (integer - zero point) * scale, scale and zero point shared by a block."""

    bits: int
    """8 or 4."""
    size: int
    """Elements of a block; a power of two from 16."""
    symmetric: bool
    """Whether the zero point is fixed at the middle of the integers, and need not be stored."""

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
    zero_points: NDArray[np.uint8] | None
    """(N, b) bytes, packed as the integers are; None where symmetric."""


def quantise(rows: Floats, form: BlockFormat) -> QuantisedMatrix:
    """(N, K) -> its nearest representation; the last block of a row is filled up with zeros."""
    pieces = [_quantise_piece(piece, form) for piece in _pieces(rows)]
    asymmetric = [piece.zero_points for piece in pieces if piece.zero_points is not None]
    return QuantisedMatrix(
        integers=np.concatenate([piece.integers for piece in pieces]),
        scales=np.concatenate([piece.scales for piece in pieces]),
        zero_points=np.concatenate(asymmetric) if asymmetric else None,
    )


def _pieces(rows: Floats) -> Iterator[Floats]:
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[start : start + ROWS_AT_ONCE]


def _quantise_piece(rows: Floats, form: BlockFormat) -> QuantisedMatrix:
    count, width = rows.shape
    blocks = np.zeros((count, form.padded(width)), np.float32)
    blocks[:, :width] = rows
    blocks = blocks.reshape(count, -1, form.size)
    scales, zero_points = _symmetric_grid(blocks, form.bits) if form.symmetric else _asymmetric_grid(blocks, form.bits)
    steps = np.rint(blocks / np.where(scales == 0, 1, scales)) + zero_points
    integers = np.clip(steps, 0, 2**form.bits - 1).astype(np.uint8)
    return QuantisedMatrix(
        integers=_pack(integers, form.bits),
        scales=np.ascontiguousarray(scales[..., 0]),
        zero_points=None if form.symmetric else _pack(zero_points[..., 0].astype(np.uint8), form.bits),
    )


def _symmetric_grid(blocks: Floats, bits: int) -> tuple[Floats, Floats]:
    # The integers reach one further below the middle than above: the element furthest from zero is put there, whatever its
    # sign, so that no half step of the range is lost. A scale may be negative.
    furthest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    middle = np.float32(2 ** (bits - 1))
    return furthest / -middle, np.full_like(furthest, middle)


def _asymmetric_grid(blocks: Floats, bits: int) -> tuple[Floats, Floats]:
    # Zero is always on the grid: it is what rows are filled up with.
    lowest = np.minimum(blocks.min(-1, keepdims=True), 0)
    highest = np.maximum(blocks.max(-1, keepdims=True), 0)
    scales = (highest - lowest) / np.float32(2**bits - 1)
    return scales, np.rint(-lowest / np.where(scales == 0, 1, scales))


def _pack(integers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return integers
    if integers.shape[-1] % 2:
        integers = np.concatenate([integers, np.zeros_like(integers[..., :1])], -1)
    return integers[..., 0::2] | integers[..., 1::2] << 4
