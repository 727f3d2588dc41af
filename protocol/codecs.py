"""Codes activations, their gradients and LoRA matrices in fewer bytes, and decodes them. Decoded values are always float32."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import RemoteProtocolError
from .messages import Array
from .quantisation import (
    BLOCK,
    LARGEST_MAGNITUDE,
    Quantised,
    dequantise,
    dequantise_dithered,
    quantise,
    quantise_dithered,
)
from .rounding import Dither, from_bfloat16, to_bfloat16
from .settings import COARSE, DITHERED, OFFERED
from .shuffling import shuffled, unshuffled

__all__ = ["Coded", "quantised_parts", "quantised_values"]

CODES_OF_THE_RMS = {"int8": None, COARSE: 4.5}
"""See `quantise`. 4.5 take 4.2 bits of Gaussian numbers, and the loss changes with the square of its inverse."""
NOISE_BYTES = 16
UINT16, INT32 = np.dtype(np.uint16), np.dtype(np.int32)


@dataclass(frozen=True)
class Coded:
    """A matrix (N, d) as it travels. The parts are bytes that nobody has checked: `decode` does."""

    codec: str
    """One of OFFERED. `decode` cannot decode DELTA, which depends on what was sent before; `delta.py` does."""
    shape: tuple[int, int]
    """Of the decoded matrix."""
    parts: Sequence[bytes]
    """How many there are and what they hold, each codec says: see PROTOCOL.md."""

    def __len__(self) -> int:
        """The number of rows, as of the decoded matrix."""
        return self.shape[0]

    @classmethod
    def of(cls, values: Array, codec: str, dither: Dither | None = None) -> "Coded":
        """
        Code a matrix.

        Args:
            values: (N, d) float32, finite.
            codec: one of CODECS.
            dither: rounds gradients stochastically; None rounds to the nearest. See `quantise`.
        """
        num_rows, width = values.shape
        bfloat16 = codec == "bfloat16"
        parts = [shuffled(to_bfloat16(values, dither))] if bfloat16 else quantised_parts(values, codec, dither)
        return cls(codec, (num_rows, width), parts)

    @classmethod
    def dithered(
        cls, matrix: Array, codes_of_the_rms: float, dither: Dither | None = None, *, has_one_unit: bool = False
    ) -> "Coded":
        """
        Code a matrix in DITHERED along its longer side, as LoRA's A row by row, and B column by column.

        Args:
            matrix: (N, d) float32, finite.
            codes_of_the_rms: the fewer, the coarser, and the fewer bits remain when it is compressed; see `quantise_dithered`.
            dither: whose noise is added, and subtracted by the receiver; None rounds to the nearest.
            has_one_unit: see `quantise_dithered`.
        """
        seed = b"" if dither is None else dither.seed()
        codes, scales = quantise_dithered(_lengthwise(matrix).reshape(-1), codes_of_the_rms, seed, has_one_unit=has_one_unit)
        return cls(DITHERED, matrix.shape, [seed, shuffled(scales), *_planes(codes)])

    @classmethod
    def received(cls, fields: Any, max_bytes: int) -> "Coded":
        """
        A coded tensor out of a message. Its form is checked, its parts are not yet.

        Args:
            fields: [codec, shape, part, part, ...] as msgpack unpacks them.
            max_bytes: the most that the decoded tensor may take.

        Raises:
            RemoteProtocolError: ``fields`` is something else, or the tensor too large.
        """
        if not isinstance(fields, list) or len(fields) < 2:
            raise RemoteProtocolError("a coded tensor is [codec, shape, parts...]")
        codec, shape, *parts = fields
        if not isinstance(codec, str) or not isinstance(shape, list) or not all(isinstance(part, bytes) for part in parts):
            raise RemoteProtocolError("a coded tensor is [codec, shape, parts...]")
        if codec not in OFFERED:
            raise RemoteProtocolError(f"a tensor in the codec {codec[:40]!a}; there are {', '.join(OFFERED)}")
        if len(shape) != 2 or any(type(size) is not int or size < 0 for size in shape):
            raise RemoteProtocolError("a coded tensor's shape is a list of two sizes")
        if 4 * math.prod(shape) > max_bytes or max(shape) > max_bytes:
            raise RemoteProtocolError(f"{codec}{shape} exceeds the limit of {max_bytes} bytes")
        return cls(codec, (shape[0], shape[1]), parts)

    def decode(self) -> Array:
        """
        The values (N, d), float32, in memory of their own.

        Raises:
            RemoteProtocolError: the codec makes no such parts of a tensor of this shape.
        """
        if self.codec == DITHERED:
            return self._undithered()
        if self.codec != "bfloat16":
            return quantised_values(self.codec, self.shape, self.parts)
        _check_sizes(self.codec, self.shape, self.parts, {"values": 2 * math.prod(self.shape)})
        return from_bfloat16(unshuffled(self.parts[0], UINT16, self.shape))

    def _undithered(self) -> Array:
        """What `dithered` has coded."""
        num_codes = math.prod(self.shape)
        num_scales, half = -(-num_codes // BLOCK), -(-num_codes // 2)
        noise = NOISE_BYTES if self.parts and self.parts[0] else 0
        sizes = {"noise": noise, "scales": 2 * num_scales, "lower halves": half, "upper halves": half}
        _check_sizes(self.codec, self.shape, self.parts, sizes)
        seed, scales, *planes = self.parts
        units = unshuffled(scales, UINT16, (num_scales,))
        _check_scales(self.codec, from_bfloat16(units))
        values = dequantise_dithered(_of_planes(planes, num_codes), units, seed)
        return np.ascontiguousarray(values.reshape(self.shape[::-1]).T) if _is_tall(self.shape) else values.reshape(self.shape)


def _is_tall(shape: tuple[int, ...]) -> bool:
    """Whether a matrix is coded column by column."""
    return shape[0] > shape[1]


def _lengthwise(matrix: Array) -> Array:
    """Its rows, or where these are short its columns, one under the other."""
    return np.ascontiguousarray(matrix.T) if _is_tall(matrix.shape) else matrix


def quantised_parts(values: Array, codec: str, dither: Dither | None) -> list[bytes]:
    """The parts of values (N, d), float32, in int8 or COARSE: centre, outliers, outlier values, scales, codes."""
    quantised = quantise(values, CODES_OF_THE_RMS[codec], dither)
    exact = (quantised.centre, quantised.outliers, quantised.outlier_values, quantised.scales)
    return [*map(shuffled, exact), quantised.codes.tobytes()]


def quantised_values(codec: str, shape: tuple[int, int], parts: Sequence[bytes]) -> Array:
    """The values (N, d), float32, of parts that `quantised_parts` made. Raises what `Coded.decode` does."""
    num_rows, width = shape
    num_outliers = len(parts[1]) // 4 if len(parts) == 5 else 0
    sizes = {
        "centre": 2 * width if len(parts) == 5 and parts[0] else 0,
        "outliers": 4 * num_outliers,
        "outlier values": 2 * num_outliers * num_rows,
        "scales": 2 * num_rows,
        "codes": num_rows * width,
    }
    _check_sizes(codec, shape, parts, sizes)
    centre, outliers, outlier_values, scales, codes = parts
    quantised = Quantised(
        codes=np.frombuffer(codes, np.int8).reshape(shape),
        scales=unshuffled(scales, UINT16, (num_rows,)),
        centre=unshuffled(centre, UINT16, (len(centre) // 2,)),
        outliers=unshuffled(outliers, INT32, (num_outliers,)),
        outlier_values=unshuffled(outlier_values, UINT16, (num_outliers, num_rows)),
    )
    _check(codec, quantised)
    return dequantise(quantised)


def _check_sizes(codec: str, shape: tuple[int, int], parts: Sequence[bytes], sizes: dict[str, int]) -> None:
    found = [len(part) for part in parts]
    if found != list(sizes.values()):
        wanted = ", ".join(f"{size} of {name}" for name, size in sizes.items())
        raise RemoteProtocolError(f"{codec}{list(shape)} has parts of {found[:8]} bytes, expected {wanted}")


def _check(codec: str, quantised: Quantised) -> None:
    """Refuses numbers that no sender computes, and those whose values would not be finite."""
    _check_scales(codec, from_bfloat16(quantised.scales))
    for name in ("centre", "outlier_values"):
        if not (np.abs(from_bfloat16(getattr(quantised, name))) <= LARGEST_MAGNITUDE).all():
            raise RemoteProtocolError(f"the {name.replace('_', ' ')} of {codec} are not numbers up to 2^120")
    outliers, width = quantised.outliers, quantised.codes.shape[1]
    if len(outliers) and not (outliers[0] >= 0 and outliers[-1] < width and (outliers[1:] > outliers[:-1]).all()):
        raise RemoteProtocolError(f"the outliers of {codec} are not increasing numbers of channels from 0 to {width - 1}")


def _check_scales(codec: str, scales: Array) -> None:
    if not ((scales > 0) & (scales <= LARGEST_MAGNITUDE)).all():
        raise RemoteProtocolError(f"a scale of {codec} is not a positive number up to 2^120")


def _planes(codes: Array) -> list[bytes]:
    """
    The lower and the upper halves of codes of a byte, both as `_halves` has them. The sign is the lowest bit: of small codes
    the upper halves are zeros, which zstd makes nothing of.
    """
    folded = ((codes << 1) ^ (codes >> 7)).view(np.uint8)
    return [_halves(folded), _halves(folded >> 4)]


def _of_planes(planes: Sequence[bytes], num_codes: int) -> Array:
    """(num_codes,) int8: the codes that `_planes` made bytes of."""
    lower, upper = (_whole(plane, num_codes) for plane in planes)
    folded = lower | (upper << 4)
    codes: Array = ((folded >> 1) ^ (0 - (folded & 1))).view(np.int8)
    return codes


def _halves(codes: Array) -> bytes:
    """Numbers of 4 bits, two in a byte, the first in its lower half."""
    flat = codes.reshape(-1).view(np.uint8)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return ((flat[::2] & 15) | (flat[1::2] << 4)).tobytes()


def _whole(raw: bytes, num_codes: int) -> Array:
    """(num_codes,) uint8: the numbers that `_halves` made bytes of."""
    pairs = np.frombuffer(raw, np.uint8)
    codes = np.empty(2 * len(pairs), np.uint8)
    codes[::2], codes[1::2] = pairs & 15, pairs >> 4
    return codes[:num_codes]
