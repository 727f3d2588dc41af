"""
Rows of floats as whole numbers of a byte, a scale for every row, and what would spoil the scales kept apart.

Activations have channels that are far from zero in every row: the *centre*, the mean of each channel over the message, is taken
away first. Of pretrained transformers a few channels are a hundred times as large as all others (LLM.int8(), arXiv 2208.07339):
these *outliers* travel as bfloat16. All that is computed from the values is of this one message, hence of one client.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .messages import Array
from .rounding import Dither, drawn, from_bfloat16, to_bfloat16, upwards_to_bfloat16

__all__ = [
    "BLOCK",
    "LARGEST_CODE",
    "LARGEST_MAGNITUDE",
    "LARGEST_VALUE",
    "Quantised",
    "dequantise",
    "dequantise_dithered",
    "quantise",
    "quantise_dithered",
]

LARGEST_MAGNITUDE = 2.0**120
"""Of scales, centres and outlier values: 128 of them are still a float32."""
LARGEST_VALUE = 2.0**119
"""Larger ones become it: two of them are never further apart than the largest magnitude."""
SMALLEST_SCALE = 2.0**-126  # the smallest normal float32, whose inverse is one too
LARGEST_CODE = 127
MARGIN = 1 + 2.0**-20  # a code is never beyond the largest, however the division rounds
BLOCK = 64
LARGEST_DITHERED = 126  # without its noise, which may be a half more
OUTLIER_RATIO = 3.0  # to the median channel
OUTLIER_RATIO_IN_UNITS = 8.0  # where a channel that reaches further makes no scale larger, only its own codes longer
FEWEST_CHANNELS_AN_OUTLIER = 16
CHUNK_ELEMENTS = 2**16  # 256 kB: what is worked on stays in a core's cache


@dataclass(frozen=True)
class Quantised:
    """N rows of d channels. bfloat16 is held as its bits, uint16."""

    codes: Array
    """(N, d) int8, in units of the row's scale; 0 in outlier channels."""
    scales: Array
    """(N,) bfloat16."""
    centre: Array
    """(d,) bfloat16, or (0,) where nothing was taken away."""
    outliers: Array
    """(K,) int32, increasing."""
    outlier_values: Array
    """(K, N) bfloat16, the centre taken away."""


def quantise(values: Array, codes_of_the_rms: float | None = None, dither: Dither | None = None) -> Quantised:
    """
    Args:
        values: (N, d) float32.
        codes_of_the_rms: how many codes the root mean square of the median row is, outliers left out. Rows then have one scale,
            their errors are alike, and small codes, which are frequent, cost few bits when they are compressed. A row has a
            larger scale where its largest element needs one. None: in every row that is the largest code.
        dither: rounds stochastically, and leaves the centre where it is, so that the mean of every number is itself: for
            gradients, whose mean is near zero. None rounds to the nearest.
    """
    num_rows, width = values.shape
    centre, reach = _centre_and_reach(values, centred=dither is None)
    outliers = _outliers(reach, OUTLIER_RATIO if codes_of_the_rms is None else OUTLIER_RATIO_IN_UNITS)
    shift = from_bfloat16(centre)
    unit = 0.0 if codes_of_the_rms is None else _median_rms(values, shift, outliers) / codes_of_the_rms
    codes = np.empty(values.shape, np.int8)
    scales = np.full(num_rows, to_bfloat16(np.float32(1)))
    outlier_values = np.empty((len(outliers), num_rows), np.uint16)
    for rows in _chunks(num_rows, width):
        chunk = _from_centre(values[rows], shift)
        if len(outliers):
            outlier_values[:, rows] = to_bfloat16(chunk[:, outliers], dither).T
            chunk[:, outliers] = 0
        scales[rows] = _scales(np.abs(chunk).max(axis=1), unit)
        codes[rows] = _codes(chunk, scales[rows], dither)
    return Quantised(codes, scales, centre, outliers, outlier_values)


def quantise_dithered(values: Array, codes_of_the_rms: float, seed: bytes, *, has_one_unit: bool) -> tuple[Array, Array]:
    """
    Codes by subtractive dither (Roberts 1962): noise is added before rounding, and `dequantise_dithered` subtracts the same.
    Whatever a value is, its error is then even over a code: zero on average, with half the variance of rounding at random.

    Args:
        values: (n,) float32, in blocks of BLOCK, the last of which may have fewer.
        codes_of_the_rms: how many codes a block's root mean square is, or up to a third fewer; fewer still,
            where one would be beyond the largest.
        seed: of the noise; empty: rounds to the nearest.
        has_one_unit: the root mean square is that of all values, and their errors are alike. Else they are in proportion to
            what is in a block.

    Returns:
        Codes (n,) int8, and the scales of the blocks, bfloat16; where they differ with one bit of a mantissa: many are alike.
    """
    blocks = np.zeros((-(-values.size // BLOCK), BLOCK), np.float32)
    flat = blocks.reshape(-1)[: values.size]
    flat[:] = _clipped(values)
    alike = blocks.reshape(1, -1) if has_one_unit and len(blocks) else blocks
    rms = np.sqrt(np.square(alike, dtype=np.float64).mean(axis=1))
    wanted = np.maximum(rms / codes_of_the_rms, np.abs(alike).max(axis=1) * (MARGIN / LARGEST_DITHERED))
    rounded_up = upwards_to_bfloat16 if has_one_unit else _upwards_to_few_bits
    scales = np.broadcast_to(rounded_up(np.maximum(wanted, SMALLEST_SCALE).astype(np.float32)), len(blocks))
    blocks *= (1 / from_bfloat16(scales))[:, None]
    if seed:
        flat += drawn(seed, flat.size)
    np.rint(flat, out=flat)
    return flat.astype(np.int8), scales


def dequantise_dithered(codes: Array, scales: Array, seed: bytes) -> Array:
    """(n,) float32, exact: a code less its noise has 16 bits, and a scale 8."""
    values = codes.astype(np.float32)
    if seed:
        values -= drawn(seed, values.size)
    values *= np.repeat(from_bfloat16(scales), BLOCK)[: values.size]
    return values


def _codes(rows: Array, scales: Array, dither: Dither | None) -> Array:
    """(N, d) int8: rows of float32, which are overwritten, in units of their scales, (N,) bfloat16."""
    rows *= (1 / from_bfloat16(scales))[:, None]
    if dither is not None:
        rows += np.multiply(dither.draw(rows.size), np.float32(2.0**-16)).reshape(rows.shape)
    np.rint(rows, out=rows)
    return rows.astype(np.int8)


def dequantise(quantised: Quantised) -> Array:
    """(N, d) float32, in memory of its own."""
    codes, shift = quantised.codes, from_bfloat16(quantised.centre)
    scales = from_bfloat16(quantised.scales)[:, None]
    values = np.empty(codes.shape, np.float32)
    for rows in _chunks(*codes.shape):
        chunk = values[rows]
        np.multiply(codes[rows], scales[rows], out=chunk)
        if len(quantised.outliers):
            chunk[:, quantised.outliers] = from_bfloat16(quantised.outlier_values[:, rows]).T
        if len(shift):
            chunk += shift
    return values


def _chunks(num_rows: int, width: int) -> Iterator[slice]:
    """Of rows, for the memory's sake; none where there are no elements."""
    rows = max(1, CHUNK_ELEMENTS // max(1, width))
    for start in range(0, num_rows if width else 0, rows):
        yield slice(start, start + rows)


def _clipped(chunk: Array) -> Array:
    """A copy."""
    clipped: Array = np.clip(chunk, np.float32(-LARGEST_VALUE), np.float32(LARGEST_VALUE))
    return clipped


def _from_centre(rows: Array, shift: Array) -> Array:
    """Rows (n, d) less the centre, (d,) or (0,), in memory of their own."""
    chunk = _clipped(rows)
    if len(shift):
        chunk -= shift
    return chunk


def _median_rms(values: Array, shift: Array, outliers: Array) -> float:
    """The root mean square of the median row of values (N, d), centre and outliers taken away; 0 where there is nothing."""
    if not values.size:
        return 0.0
    squares = np.empty(len(values))
    for rows in _chunks(*values.shape):
        chunk = _from_centre(values[rows], shift)
        chunk[:, outliers] = 0
        squares[rows] = np.einsum("nc,nc->n", chunk, chunk, dtype=np.float64)
    return float(np.sqrt(np.median(squares) / values.shape[1]))


def _centre_and_reach(values: Array, *, centred: bool) -> tuple[Array, Array]:
    """The mean of each channel, as bfloat16, and how far its values are from there at most: (d,) each."""
    num_rows, width = values.shape
    total = np.zeros(width)
    highest, lowest = np.full(width, -np.inf, np.float32), np.full(width, np.inf, np.float32)
    for rows in _chunks(num_rows, width):
        chunk = _clipped(values[rows])
        total += chunk.sum(axis=0)
        np.maximum(highest, chunk.max(axis=0), out=highest)
        np.minimum(lowest, chunk.min(axis=0), out=lowest)
    if not centred or not values.size:
        return np.empty(0, np.uint16), np.maximum(highest, -lowest)
    centre = to_bfloat16((total / num_rows).astype(np.float32))
    shift = from_bfloat16(centre)
    return centre, np.maximum(highest - shift, shift - lowest)


def _outliers(reach: Array, ratio: float) -> Array:
    """The channels that reach more than ``ratio`` times as far as the median one, increasing: (K,) int32."""
    if not len(reach):
        return np.empty(0, np.int32)
    furthest = np.argsort(-reach, kind="stable")[: len(reach) // FEWEST_CHANNELS_AN_OUTLIER]
    beyond = furthest[reach[furthest] > ratio * np.median(reach)]
    return np.sort(beyond).astype(np.int32)


def _scales(peaks: Array, unit: float) -> Array:
    """For the largest magnitude of each row: the bfloat16 above what makes it the largest code, and above ``unit``."""
    exact = np.maximum(peaks * np.float32(MARGIN / LARGEST_CODE), np.float32(max(unit, SMALLEST_SCALE)))
    return upwards_to_bfloat16(exact)


def _upwards_to_few_bits(values: Array) -> Array:
    """Positive float32 -> the power of two, or one and a half of it, that is not below: bfloat16."""
    bits: Array = (((values.view(np.uint32) + np.uint32(0x3FFFFF)) >> 22) << 6).astype(np.uint16)
    return bits
