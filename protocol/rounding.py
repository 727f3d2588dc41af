"""Numbers of fewer bits: bfloat16, and the noise that makes rounding right on average."""

import hashlib

import numpy as np

from .messages import Array

__all__ = ["Dither", "drawn", "from_bfloat16", "to_bfloat16", "upwards_to_bfloat16"]


class Dither:
    """
    Noise for stochastic rounding. A number is then rounded up with the probability of its distance from the number below, so
    that errors of many cancel out instead of adding up.

    Args:
        seed: what the noise is for; the same noise for the same seed, on every machine.
    """

    def __init__(self, *seed: int | str) -> None:
        digest = hashlib.sha256("/".join(map(str, seed)).encode()).digest()
        self._bits = np.random.PCG64(int.from_bytes(digest, "big"))  # NEP 19: its raw stream never changes

    def draw(self, size: int) -> Array:
        """
        Of every 2^16-th of the last place that is kept, how many to add: (size,) int16, odd, symmetric about 0.

        Being odd they never reach a half: what needs no rounding is never changed.
        """
        words = self._bits.random_raw(-(-size // 4)) | np.uint64(0x0001_0001_0001_0001)
        noise: Array = words.astype("<u8", copy=False).view("<i2")[:size]
        return noise

    def seed(self) -> bytes:
        """16 bytes, others at every call: what a receiver draws the same noise of, by `drawn`."""
        return self._bits.random_raw(2).astype("<u8", copy=False).tobytes()


def drawn(seed: bytes, size: int) -> Array:
    """Noise of both sides, the stream of SHAKE128: (size,) float32, odd multiples of 2^-9 between -1/2 and 1/2."""
    numbers = np.frombuffer(hashlib.shake_128(seed).digest(size), np.uint8)
    noise: Array = numbers * np.float32(2.0**-8) + np.float32(2.0**-9 - 0.5)
    return noise


def to_bfloat16(values: Array, dither: Dither | None = None) -> Array:
    """float32 of any shape -> the upper 16 of its 32 bits, uint16, rounded to the nearest, or stochastically with a dither."""
    bits: Array = np.ascontiguousarray(values, np.float32).view(np.uint32)
    if dither is None:
        rounded = bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))  # a tie goes to the even number
    else:
        rounded = bits + dither.draw(bits.size).view("<u2").reshape(bits.shape)
    rounded >>= 16
    narrowed: Array = rounded.astype(np.uint16)
    return narrowed


def upwards_to_bfloat16(values: Array) -> Array:
    """Positive float32 of any shape -> the bfloat16 not below it, uint16."""
    bits: Array = ((values.view(np.uint32) + np.uint32(0xFFFF)) >> 16).astype(np.uint16)
    return bits


def from_bfloat16(bits: Array) -> Array:
    """uint16 of any shape -> float32."""
    widened = bits.astype(np.uint32)
    widened <<= 16
    values: Array = widened.view(np.float32)
    return values
