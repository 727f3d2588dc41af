"""
What one rank tells another, as bytes: texts, numbers, lists and maps in msgpack, and the arrays among them as they are, behind
it. Nothing is pickled: whatever the bytes are, they only ever become such values.

    8 bytes    b"SLranks1"
    8 bytes    length of the msgpack, little-endian
    ...        the msgpack; in the place of an array [dtype, shape, where its bytes begin], see ARRAY
    ...        the arrays, each at a multiple of 64 from the first byte
"""

import math
import struct
from typing import Any

import msgpack
import numpy

__all__ = ["NotAMessage", "pack", "unpack"]

MAGIC = b"SLranks1"
ARRAY = 1  # the msgpack extension
ALIGNMENT = 64  # bytes, of a cache line
DTYPES = {name: numpy.dtype(name) for name in ("float32", "float64", "int32", "int64")}


class NotAMessage(ValueError):
    """Bytes that are no message of this version."""


def pack(value: Any) -> numpy.ndarray[Any, Any]:
    """
    The bytes, (n,) uint8, of None, texts, numbers, arrays, and lists and maps of these. Tuples come out as lists.

    Raises:
        TypeError: there is something else in it.
    """
    arrays: list[tuple[int, numpy.ndarray[Any, Any]]] = []
    end = 0

    def place(item: Any) -> msgpack.ExtType:
        nonlocal end
        if not isinstance(item, numpy.ndarray) or item.dtype.name not in DTYPES:
            raise TypeError(f"cannot be told to another rank: {type(item).__name__}")
        start = _aligned(end)
        arrays.append((start, item))
        end = start + item.nbytes
        return msgpack.ExtType(ARRAY, msgpack.packb([item.dtype.name, item.shape, start]))

    head = msgpack.packb(value, default=place)
    behind = _aligned(len(MAGIC) + 8 + len(head))
    packed = numpy.zeros(behind + end, numpy.uint8)
    for start, part in (
        (0, numpy.frombuffer(MAGIC + struct.pack("<Q", len(head)) + head, numpy.uint8)),
        *((behind + start, numpy.ascontiguousarray(array).reshape(-1).view(numpy.uint8)) for start, array in arrays),
    ):
        packed[start : start + len(part)] = part
    return packed


def unpack(packed: numpy.ndarray[Any, Any]) -> Any:
    """
    What `pack` was given. Its arrays share memory with ``packed``.

    Raises:
        NotAMessage: it did not make these bytes.
    """
    begin = len(MAGIC) + 8
    if packed[: len(MAGIC)].tobytes() != MAGIC or len(packed) < begin:
        raise NotAMessage("it does not begin as messages of this version of splitlora do")
    (length,) = struct.unpack("<Q", packed[len(MAGIC) : begin].tobytes())
    behind = _aligned(begin + length)

    def array(code: int, data: bytes) -> numpy.ndarray[Any, Any]:
        name, shape, start = msgpack.unpackb(data)
        if code != ARRAY or not all(type(size) is int and size >= 0 for size in (start, *shape)):
            raise NotAMessage("it has an array that cannot be")
        dtype = DTYPES[name]
        first = behind + start
        last = first + math.prod(shape) * dtype.itemsize
        if last > len(packed):
            raise NotAMessage("an array of it is cut off")
        placed: numpy.ndarray[Any, Any] = packed[first:last].view(dtype).reshape(shape)
        return placed

    try:
        return msgpack.unpackb(packed[begin : begin + length].tobytes(), ext_hook=array, strict_map_key=True)
    except NotAMessage:
        raise
    except (msgpack.UnpackException, ValueError, TypeError, KeyError, RecursionError) as error:
        raise NotAMessage(f"it cannot be read: {str(error) or type(error).__name__}") from None


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
