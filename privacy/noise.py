"""
Rows clipped to a norm, and Gaussian noise on each element: the Gaussian mechanism, drawn from a secret of the device's own.

Nobody who lacks the secret can tell the noise from a fresh draw: it is the stream of SHAKE-256, of which whoever knows some
cannot compute more. For whoever has it, the noise is a function of what it is for and of what it is added to. So a message that
a broken link makes a device send twice is the same message, and tells nothing more; and two different values never get the same
noise, which their difference would be free of.

What the figures of `accounting` assume, and floating-point numbers give only nearly (Mironov, CCS 2012): that noise may be any
real number. Here it has 2^53 possible radii and as many angles, and is never beyond 8.6 standard deviations, which adds 1e-16 a
number to delta. By the lowest bits of a sum, whoever knows how noise is drawn could rule out values. So these bits do not
leave: a sum is rounded to a grid of about a millionth of the noise's deviation, where very many sums fall on each point.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

__all__ = ["SECRET_BYTES", "Array", "GaussianNoise", "clipped"]

Array: TypeAlias = np.ndarray[Any, Any]

SECRET_BYTES = 32
GRID_BITS = 20
ELEMENTS_AT_ONCE = 2**16
"""
Computed together: they and their noise stay in a processor's cache, and a large batch takes no more memory than a small one.
"""


class GaussianNoise:
    """
    Hides the rows of a matrix to a degree that can be computed: see `privacy.accounting`.

    Args:
        secret: `SECRET_BYTES` of the device's own, from ``os.urandom``, which nobody else sees.
        sigma: the noise's standard deviation in units of ``clip``; 0: no noise.
        clip: the largest Euclidean norm of a row, C; longer rows are shortened to it. 0: rows stay as they are.

    Raises:
        ValueError: noise without a clip, of which nobody could say what it is worth; or an argument is out of range.
    """

    def __init__(self, secret: bytes, *, sigma: float, clip: float) -> None:
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a secret has {SECRET_BYTES} bytes, got {len(secret)}")
        if not (0 <= sigma < np.inf and 0 <= clip < np.inf):
            raise ValueError(f"sigma and clip are finite and not negative, got {sigma} and {clip}")
        if sigma and not clip:
            raise ValueError(f"noise of sigma {sigma} needs a clip: it is in units of the largest norm that a row may have")
        self._secret, self._sigma, self._clip = secret, sigma, clip

    def __call__(self, values: Array, purpose: tuple[str | int, ...], centre: Array | None = None) -> Array:
        """
        Args:
            values: (N, d) float32 or float64.
            purpose: what the noise is for. Noise for different purposes is independent, for equal values, too.
            centre: what is subtracted before rows are clipped, and added again behind: (N, d), or what numpy broadcasts to it.
                It is sent along, so to speak: it must be public.

        Returns:
            centre + clipped(values - centre) + noise, (N, d) of the type of ``values``.
        """
        if not self._clip:
            return values
        return self._hide(values, purpose, centre, lambda rows: clipped(rows, self._clip))

    def on_bounded(self, values: Array, purpose: tuple[str | int, ...]) -> Array:
        """As `__call__`, for values that are not to be clipped: two of them are never further apart than two clips."""
        return self._hide(values, purpose, None, lambda rows: rows)

    def _hide(
        self, values: Array, purpose: tuple[str | int, ...], centre: Array | None, bounded: Callable[[Array], Array]
    ) -> Array:
        hidden = np.empty_like(values)
        centre = np.broadcast_to(np.float64(0) if centre is None else centre, values.shape)
        key = self._key(values, purpose, centre) if self._sigma else b""
        for number, rows in enumerate(_blocks(values)):
            block = bounded(np.subtract(values[rows], centre[rows], dtype=np.float64))
            if self._sigma:
                deviation = self._sigma * self._clip
                block = block + deviation * _normal(key + number.to_bytes(8, "big"), block.size).reshape(block.shape)
                grid = 2.0 ** (math.frexp(deviation)[1] - GRID_BITS)
                block = np.rint(block / grid) * grid
            hidden[rows] = block + centre[rows]
        return hidden

    def _key(self, values: Array, purpose: tuple[str | int, ...], centre: Array) -> bytes:
        """Of everything that the result depends on, so that two results that differ have independent noise."""
        what = [purpose, self._sigma, self._clip, values.shape, values.dtype.str]
        key = hashlib.blake2b(key=self._secret, digest_size=SECRET_BYTES)
        for part in (json.dumps(what).encode(), b"\0", _digest(values), _digest(centre)):
            key.update(part)
        return key.digest()


def clipped(values: Array, clip: float) -> Array:
    """(N, d) -> the same, with rows of a larger Euclidean norm than ``clip``, which is positive, shortened to it."""
    norms = np.sqrt(np.einsum("nd,nd->n", values, values, dtype=np.float64))
    scales = clip / np.maximum(norms, clip)  # exactly 1 up to the clip
    shortened: Array = values * scales[:, None].astype(values.dtype)
    return shortened


def _blocks(values: Array) -> Iterator[slice]:
    rows = max(1, ELEMENTS_AT_ONCE // max(1, values.shape[1]))
    return (slice(start, start + rows) for start in range(0, len(values), rows))


def _digest(values: Array) -> bytes:
    """Of a matrix of any strides."""
    digest = hashlib.sha256()
    for rows in _blocks(values):
        digest.update(np.ascontiguousarray(values[rows]).data)
    return digest.digest()


def _normal(key: bytes, size: int) -> Array:
    """``size`` independent standard normal numbers, float64, by Box and Muller's transform of SHAKE-256's stream."""
    pairs = -(-size // 2)
    words = np.frombuffer(hashlib.shake_256(key).digest(16 * pairs), "<u8")
    uniform = (words >> np.uint64(11)) * 2.0**-53  # in [0, 1)
    radius = np.sqrt(-2.0 * np.log1p(-uniform[:pairs]))
    angle = 2.0 * np.pi * uniform[pairs:]
    normal: Array = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))
    return normal[:size]
