"""
Makes bytes of messages, and messages of bytes: zstd(msgpack([version, kind, fields])).

Nothing that arrives is trusted. The size of a frame is checked before it is inflated, the size of a tensor before memory is
taken for it, and the type of every field, and whether its numbers are finite, before a message is made. Whatever the bytes are,
the only error is RemoteProtocolError.
"""

import math
import types
from collections.abc import Callable, Collection
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, partial
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgpack
import numpy as np

from . import zstd
from .codecs import Coded
from .errors import RemoteProtocolError
from .limits import LARGEST_VALUE
from .messages import PROTOCOL_VERSION, Array, ArrayType, Message
from .rounding import Dither
from .settings import DELTA, EXACT
from .shuffling import NOT_SHUFFLED, looks_plain, plainly, shuffled, unshuffled

__all__ = ["decode", "encode"]

COMPRESSION_LEVEL = 1  # on shuffled floats higher levels save under 2 % and take three times as long
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"  # RFC 8878, section 3.1.1
LIST_OF_THREE = 0x93  # in msgpack
ARRAY_EXTENSION, CODED_EXTENSION = 1, 2
ARRAY_DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "int32")}
INFLATED_AT_ONCE = 2**17  # of a frame, compressed or not, that are inflated at once
MAX_ELEMENTS = 4096  # in all lists and maps of a message together: an empty list takes one byte of a frame, and 64 of memory
MAX_TENSOR_ELEMENTS = 16  # the same in one tensor's [dtype, shape, bytes]
MAX_TEXT = 4096  # characters
MAX_INTEGER = 2**53
WANTED = {
    int: "an integer from 0 to 2^53",
    float: "a finite number",
    str: f"a text of at most {MAX_TEXT} characters",
    bytes: "bytes",
    tuple: "a list",
    dict: "a map",
}

KINDS: dict[str, type] = {kind.__name__: kind for kind in get_args(Message)}


def encode(message: Message, codec: str = EXACT, dither: Dither | None = None) -> bytes:
    """
    The bytes of a message: one binary message of a WebSocket.

    Args:
        codec: in which those tensors travel that may be coded.
        dither: with which they are rounded, if they are gradients.
    """

    def coded(value: Any, kind: ArrayType) -> Any:
        if codec not in kind.codecs or isinstance(value, Coded):
            return value
        return Coded.of(value, codec, dither)

    packed = msgpack.packb([PROTOCOL_VERSION, type(message).__name__, _as_map(message, coded)], default=_pack)
    return zstd.compress(packed, COMPRESSION_LEVEL)


def decode(data: bytes, max_bytes: int, codecs: Collection[str] = ()) -> Message:
    """
    The message that the bytes say.

    Args:
        max_bytes: the most that a message may inflate to, and a coded tensor decode to.
        codecs: in which tensors may come, besides the exact form. A tensor in DELTA stays a `Coded`, for `delta.arrived`.

    Raises:
        RemoteProtocolError: ``data`` is no message of this version, or too large.
    """
    count = _at_most(MAX_ELEMENTS)
    try:
        unpacked = msgpack.unpackb(
            _inflate(data, max_bytes),
            ext_hook=partial(_unpack, codecs, max_bytes),
            list_hook=count,
            object_hook=count,
            strict_map_key=True,
            max_array_len=MAX_ELEMENTS,  # msgpack takes memory for as many elements as a header claims
            max_map_len=MAX_ELEMENTS,
        )
        return _build_message(unpacked)
    except RemoteProtocolError:
        raise
    # RecursionError comes of deep nesting. UnicodeDecodeError and msgpack's StackError and FormatError are ValueErrors.
    except (
        zstd.ZstdError,
        msgpack.UnpackException,
        ValueError,
        TypeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise RemoteProtocolError(f"not a message: {str(error) or type(error).__name__}") from None


def _at_most(limit: int) -> Callable[[Any], Any]:
    """A hook for msgpack that refuses a message whose lists and maps have more than ``limit`` elements together."""
    total = 0

    def count(container: Any) -> Any:
        nonlocal total
        total += 1 + len(container)
        if total > limit:
            raise RemoteProtocolError(f"not a message: more than {limit} elements")
        return container

    return count


def _inflate(data: bytes, max_bytes: int) -> bytearray:
    if not data.startswith(ZSTD_MAGIC):
        found = (
            "msgpack that was not compressed" if data[:1] == bytes([LIST_OF_THREE]) else f"bytes {data[:4].hex(' ') or 'none'}"
        )
        raise RemoteProtocolError(f"not a message: expected a zstd frame, which begins with {ZSTD_MAGIC.hex(' ')}; got {found}")
    size = zstd.get_frame_info(data).decompressed_size
    if size is None:
        raise RemoteProtocolError("not a message: the zstd frame does not announce its size")
    if size > max_bytes:
        raise RemoteProtocolError(f"message of {size} bytes exceeds the limit of {max_bytes} bytes")
    decompressor, inflated, rest = zstd.ZstdDecompressor(), bytearray(), memoryview(data)
    while not decompressor.eof and len(inflated) <= size and (rest or not decompressor.needs_input):
        # Little by little: the decompressor has a second copy of what it makes in one call, and of what it leaves unread.
        given = rest[:INFLATED_AT_ONCE] if decompressor.needs_input else b""
        rest = rest[len(given) :]
        inflated += decompressor.decompress(given, min(INFLATED_AT_ONCE, size + 1 - len(inflated)))
    if len(inflated) <= size and not decompressor.eof:
        raise RemoteProtocolError("not a message: the zstd frame is cut off")
    if len(inflated) != size:
        than = "more" if len(inflated) > size else "less"
        raise RemoteProtocolError(f"not a message: the zstd frame holds {than} than the {size} bytes that it announces")
    if decompressor.unused_data or rest:
        raise RemoteProtocolError("not a message: something follows the zstd frame")
    return inflated


def _build_message(unpacked: Any) -> Message:
    if not isinstance(unpacked, list) or not unpacked or type(unpacked[0]) is not int:
        raise RemoteProtocolError("not a message: expected [version, kind, fields]")
    if unpacked[0] != PROTOCOL_VERSION:  # checked first: another version may have another form from here on
        raise RemoteProtocolError(f"peer speaks protocol version {unpacked[0]}, this side speaks {PROTOCOL_VERSION}")
    if len(unpacked) != 3:
        raise RemoteProtocolError("not a message: expected [version, kind, fields]")
    _, kind, values = unpacked
    if not isinstance(kind, str) or kind not in KINDS:
        raise RemoteProtocolError(f"unknown kind of message: {_shown(kind)}")
    message: Message = _build(KINDS[kind], values, kind)
    return message


# Values as the types of their fields say


@cache
def _field_types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _as_map(value: Any, coded: Callable[[Any, ArrayType], Any]) -> dict[str, Any]:
    kind: type = type(value)
    types = _field_types(kind)
    return {field.name: _as_plain(getattr(value, field.name), types[field.name], coded) for field in fields(value)}


def _as_plain(value: Any, expected: Any, coded: Callable[[Any, ArrayType], Any]) -> Any:
    if isinstance(value, Coded):
        return value
    if isinstance(value, tuple):
        return [_as_plain(item, get_args(expected)[0], coded) for item in value]
    if get_origin(expected) is Annotated:
        return coded(value, get_args(expected)[1])
    return _as_map(value, coded) if is_dataclass(value) else value


def _build(kind: type, values: Any, where: str) -> Any:
    """
    An instance of the dataclass ``kind``. Fields that have defaults may be missing: earlier releases did not send them. Fields
    that are unknown here are left out: later releases send them.
    """
    if not isinstance(values, dict):
        raise RemoteProtocolError(f"{where}: expected a map")
    checked = {}
    for field in fields(kind):
        if field.name in values:
            checked[field.name] = _check(values[field.name], _field_types(kind)[field.name], f"{where}.{field.name}")
        elif field.default is MISSING:
            raise RemoteProtocolError(f"{where}.{field.name} is missing")
    try:
        return kind(**checked)
    except ValueError as error:
        hint = f"; {NOT_SHUFFLED}" if _would_do_plainly(kind, checked) else ""
        raise RemoteProtocolError(f"{where}: {error}{hint}") from None


def _would_do_plainly(kind: type, checked: dict[str, Any]) -> bool:
    """Whether the fields would be right if their sender had forgotten to shuffle the tensors' bytes: worth a hint."""
    arrays = {name: plainly(value) for name, value in checked.items() if isinstance(value, np.ndarray)}
    try:
        kind(**{**checked, **arrays})
    except ValueError:
        return False
    return bool(arrays)


def _check(value: Any, expected: Any, where: str) -> Any:
    """``value``, if it is of the type that a field's annotation ``expected`` asks for; ``where`` names the field."""
    origin, arguments = get_origin(expected), get_args(expected)
    if origin is Annotated:
        return _check_array(value, arguments[1], where)
    if origin in (Union, types.UnionType):  # X | None
        return None if value is None else _check(value, arguments[0], where)
    if origin is dict and isinstance(value, dict):
        return {_check(key, str, where): _check(item, arguments[1], f"{where}[{key!r:.80}]") for key, item in value.items()}
    if origin is tuple and isinstance(value, list):
        return tuple(_check(item, arguments[0], where) for item in value)
    if is_dataclass(expected):
        return _build(expected, value, where)  # type: ignore[arg-type]
    if expected is int and type(value) is int and 0 <= value <= MAX_INTEGER:
        return value
    if expected is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if expected is str and isinstance(value, str) and len(value) <= MAX_TEXT:
        return value
    if expected is bytes and isinstance(value, bytes):
        return value
    raise RemoteProtocolError(f"{where}: expected {WANTED[origin or expected]}, got {_shown(value)}")


def _shown(value: Any) -> str:
    """A value for an error message. Of a list, a map or a tensor, which may be huge, only the type is shown."""
    if isinstance(value, str | bytes):
        value = value[:40]
    elif not isinstance(value, int | float):
        return type(value).__name__
    return f"{type(value).__name__} {value!r}"


def _check_array(value: Any, expected: ArrayType, where: str) -> Array | Coded:
    if isinstance(value, Coded):
        if value.codec not in expected.codecs:
            raise RemoteProtocolError(f"{where}: a tensor in {value.codec}, in which none of this field can be")
        if value.codec == DELTA:
            return value
        try:
            value = value.decode()
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"{where}: {error}") from None
    if not isinstance(value, np.ndarray):
        raise RemoteProtocolError(f"{where}: expected a tensor, got {type(value).__name__}")
    if value.dtype.name not in expected.dtypes or value.ndim != expected.num_dimensions:
        wanted = f"{' or '.join(expected.dtypes)} of {expected.num_dimensions} dimensions"
        raise RemoteProtocolError(f"{where}: expected {wanted}, got {value.dtype.name}{list(value.shape)}")
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        hint = f"; {NOT_SHUFFLED}" if looks_plain(value, LARGEST_VALUE) else ""
        raise RemoteProtocolError(f"{where}: has NaN or infinite values{hint}")
    return value


# Tensors: [dtype, shape, bytes], the bytes shuffled, or [codec, shape, bytes...].


def _pack(value: Any) -> msgpack.ExtType:
    if isinstance(value, Coded):
        return msgpack.ExtType(CODED_EXTENSION, msgpack.packb([value.codec, value.shape, *value.parts]))
    if not isinstance(value, np.ndarray) or value.dtype.name not in ARRAY_DTYPES:
        raise TypeError(f"cannot send {type(value).__name__}")
    return msgpack.ExtType(ARRAY_EXTENSION, msgpack.packb([value.dtype.name, value.shape, shuffled(value)]))


def _unpack(codecs: Collection[str], max_bytes: int, code: int, data: bytes) -> Array | Coded:
    if code not in (ARRAY_EXTENSION, CODED_EXTENSION):
        raise RemoteProtocolError(f"unknown msgpack extension {code}")
    unpacked = msgpack.unpackb(data, list_hook=_at_most(MAX_TENSOR_ELEMENTS), max_array_len=MAX_TENSOR_ELEMENTS, max_map_len=0)
    if code == ARRAY_EXTENSION:
        return _array_of(unpacked)
    coded = Coded.received(unpacked, max_bytes)
    if coded.codec not in codecs:
        agreed = ", ".join(sorted({EXACT, *codecs}))
        raise RemoteProtocolError(f"a tensor in {coded.codec}, which was not agreed on; agreed are {agreed}")
    return coded


def _array_of(unpacked: Any) -> Array:
    if not isinstance(unpacked, list) or len(unpacked) != 3:
        raise RemoteProtocolError("a tensor is [dtype, shape, bytes]")
    name, shape, raw = unpacked
    if not isinstance(name, str) or not isinstance(shape, list) or not isinstance(raw, bytes):
        raise RemoteProtocolError("a tensor is [dtype, shape, bytes]")
    if name not in ARRAY_DTYPES:
        raise RemoteProtocolError(f"a tensor of dtype {name[:40]!a}; there are {', '.join(ARRAY_DTYPES)}")
    if any(type(size) is not int or size < 0 for size in shape):
        raise RemoteProtocolError("a tensor's shape is a list of sizes")
    dtype = ARRAY_DTYPES[name]
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise RemoteProtocolError(f"{name}{shape} takes {math.prod(shape) * dtype.itemsize} bytes, got {len(raw)}")
    return unshuffled(raw, dtype, shape)
