"""How large a legal message can be."""

__all__ = ["HANDSHAKE_BYTES", "compressed_bound", "largest_message_bytes"]

HANDSHAKE_BYTES = 64 * 1024
"""Nothing before `Start` is larger."""

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
    integers = 3 * 4 * rows  # lengths, label counts and labels, at most one of each a row
    return _OVERHEAD + max(rows * width * element + integers, adapter_elements * element)


def compressed_bound(size: int) -> int:
    """The most that zstd makes of ``size`` bytes, however incompressible (ZSTD_COMPRESSBOUND, rounded up)."""
    return size + size // 128 + 1024
