"""
Elements byte by byte: all first (lowest) bytes, then all second bytes, and so on; little-endian on every machine.

The exponents of neighbouring floats are alike and compress; their mantissas are noise and are passed over quickly.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .messages import Array

__all__ = ["shuffled", "unshuffled"]


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
