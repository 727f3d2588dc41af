"""How large a legal message can be, and how much each side keeps of what arrived."""

from collections.abc import Callable
from typing import Protocol, TypeVar

__all__ = [
    "CACHES_ON_DEVICE",
    "CACHES_ON_SERVER",
    "HANDING_OVER_BYTES",
    "HANDSHAKE_BYTES",
    "LARGEST_VALUE",
    "MAX_FRAMES",
    "MAX_PART_FILES",
    "MAX_PART_FILE_BYTES",
    "PIECE_BYTES",
    "SECONDS_BETWEEN_PINGS",
    "SECONDS_TO_PONG",
    "VERSIONS_OF_A_SAMPLE",
    "compressed_bound",
    "largest_message_bytes",
    "limited_frames",
]

HANDSHAKE_BYTES = 64 * 1024
"""Nothing before `Start` is larger, but for a `Piece`."""

PIECE_BYTES = 2**20
"""Of a file of the part, at most so many come in one `Piece`."""

HANDING_OVER_BYTES = HANDSHAKE_BYTES + PIECE_BYTES
"""No message that a server sends before `Start` is larger."""

MAX_PART_FILES = 256
"""A list of more would not fit into `HANDSHAKE_BYTES`."""

MAX_PART_FILE_BYTES = 2**40

LARGEST_VALUE = 1e6
"""
Of activations, gradients and adapters that clients send, in magnitude. GPT-2's largest activations are some thousands,
SmolLM2-135M's 25,000; what is beyond would make the loss of everybody infinite, and belongs to one client that has diverged or
means harm.
"""

MAX_FRAMES = 4096
"""WebSocket frames that one message may come in: each of them costs its receiver memory, an empty one, too."""

SECONDS_BETWEEN_PINGS = 30.0
SECONDS_TO_PONG = 300.0
"""
Of WebSocket's keepalive. A pong waits behind the message that is being sent, and 10 MB take 80 s at 1 Mbit/s: a peer is
given up only when it is silent for longer than any message of a slow link takes.
"""

VERSIONS_OF_A_SAMPLE = 3
"""
That exist at once, in `DELTA`: the last two that count, and the one that is being made. So a client chooses, with
``cache_bytes``, as many samples as fit into a third of it.
"""

CACHES_ON_DEVICE = 2 * VERSIONS_OF_A_SAMPLE
"""
Times ``cache_bytes`` that a device's files may take before it adds no new versions. A run that may still go back to its
checkpoint needs the versions of every step since then, and not only the last three: a device has as much again for these.
"""

CACHES_ON_SERVER = CACHES_ON_DEVICE + 2
"""
Times ``cache_bytes`` that the server takes of one client before it refuses it. It is more than a device plans with, since the
server may drop later what a `Start` takes back, and a device looks at its limit before it adds a message's versions.
"""

_OVERHEAD = 64 * 1024  # names, headers, everything that is not a tensor's data


def largest_message_bytes(*, rows: int, width: int, precision: str, adapter_elements: int) -> int:
    """
    Bytes of the largest message a client can legally send or get, before compression.

    Args:
        rows: tokens in its largest batch.
        width: elements of an activation.
        precision: the run's, "float32" or "float64".
        adapter_elements: of the edge's LoRA matrices.
    """
    element = 8 if precision == "float64" else 4
    integers = 4 * 4 * rows  # lengths, label counts, labels and samples, at most one of each a row
    values = 2 * rows * width * element  # in a codec and exactly, where it is checked
    return _OVERHEAD + max(values + integers, adapter_elements * element)


def compressed_bound(size: int) -> int:
    """The most that zstd makes of ``size`` bytes, however incompressible (ZSTD_COMPRESSBOUND, rounded up)."""
    return size + size // 128 + 1024


class _Frame(Protocol):
    """A WebSocket frame, as far as frames are counted."""

    fin: bool
    """Whether it is its message's last."""

    @property
    def opcode(self) -> int: ...


AnyFrame = TypeVar("AnyFrame", bound=_Frame)
_DATA_OPCODES = range(3)
"""Continuation, text, binary (RFC 6455, section 5.2); the others are control frames, complete in themselves."""


def limited_frames(receive: Callable[[AnyFrame], None], error: type[Exception]) -> Callable[[AnyFrame], None]:
    """
    ``receive``, but for the frame with which a message would come in more than `MAX_FRAMES`.

    websockets counts frames itself from 17.4 on, which Python 3.10 cannot have; until then both sides wrap its ``recv_frame``
    with this.

    Args:
        error: raised instead; websockets ends the connection after its own ``ProtocolError``.
    """
    so_far = 0

    def receive_unless_too_many(frame: AnyFrame) -> None:
        nonlocal so_far
        if frame.opcode in _DATA_OPCODES:
            so_far = 0 if frame.fin else so_far + 1
            if so_far >= MAX_FRAMES:
                raise error(f"a message in more than {MAX_FRAMES} frames")
        receive(frame)

    return receive_unless_too_many
