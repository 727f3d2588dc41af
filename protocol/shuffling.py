"""
Elements byte by byte: all first (lowest) bytes, then all second bytes, and so on; little-endian on every machine.

The exponents of neighbouring floats are alike and compress; their mantissas are noise and are passed over quickly.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .messages import Array

__all__ = ["NOT_SHUFFLED", "looks_plain", "plainly", "shuffled", "unshuffled"]

NOT_SHUFFLED = "its bytes look as if they were not shuffled: see Tensors in PROTOCOL.md"
FEWEST_ELEMENTS_TO_TELL = 64
LEAST_ORDINARY = 1e-30


def shuffled(array: Array) -> bytes:
    """The bytes of an array of any shape, in row-major order."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    planes: Array = little.reshape(-1).view(np.uint8).reshape(-1, little.itemsize).T
    return planes.tobytes()


def unshuffled(raw: bytes, dtype: "np.dtype[Any]", shape: Sequence[int]) -> Array:
    """What was shuffled, in memory of its own; ``raw`` has as many bytes as the shape takes."""
    array = np.empty(shape, dtype.newbyteorder("<"))
    elements = array.reshape(-1).view(np.uint8).reshape(-1, dtype.itemsize)
    for index, plane in enumerate(np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1)):  # much faster than transposing
        elements[:, index] = plane
    return array


def plainly(array: Array) -> Array:
    """What an array that was unshuffled is, if its sender has not shuffled it."""
    plain: Array = np.frombuffer(shuffled(array), array.dtype.newbyteorder("<")).reshape(array.shape)
    return plain


def looks_plain(array: Array, largest: float) -> bool:
    """Whether floats that cannot be are ordinary numbers up to ``largest`` if they are read `plainly`. Of few none can tell."""
    sizes = np.abs(plainly(array))
    ordinary = (sizes == 0) | ((sizes >= LEAST_ORDINARY) & (sizes <= largest))  # neither is true of NaN
    return sizes.size >= FEWEST_ELEMENTS_TO_TELL and bool(ordinary.all())
