"""How large a legal message can be."""

__all__ = [
    "HANDSHAKE_BYTES",
    "LARGEST_VALUE",
    "MAX_FRAMES",
    "SECONDS_BETWEEN_PINGS",
    "SECONDS_TO_PONG",
    "compressed_bound",
    "largest_message_bytes",
]

HANDSHAKE_BYTES = 64 * 1024
"""Nothing before `Start` is larger."""

LARGEST_VALUE = 1e6
"""
Of activations, gradients and adapters that clients send, in magnitude. GPT-2's largest activations are some thousands; what is
beyond would make the loss of everybody infinite, and belongs to one client that has diverged or means harm.
"""

MAX_FRAMES = 4096
"""WebSocket frames that one message may come in: each of them costs its receiver memory, an empty one, too."""

SECONDS_BETWEEN_PINGS = 30.0
SECONDS_TO_PONG = 300.0
"""
Of WebSocket's keepalive. A pong waits behind the message that is being sent, and 10 MB take 80 s at 1 Mbit/s: a peer is
given up only when it is silent for longer than any message of a slow link takes.
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
