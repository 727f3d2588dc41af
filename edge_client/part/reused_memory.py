"""
Memory for what a forward pass leaves to its backward pass. It is not onnxruntime's: in its arena, what stays would lie between
what goes, and the holes would be a tenth of a device's memory. It is used again from step to step, since the system fills what
it gives with zeros, which takes time.
"""

import math
from collections.abc import Mapping

import numpy as np

from protocol import Array, Tensors
from storage import ModelError

from .runtime import most_memory

__all__ = ["ReusedMemory"]

SPARE = 8
"""New memory is an eighth larger than needed: the next batch may be a little longer."""


class ReusedMemory:
    """Pieces of memory that are taken and given back."""

    def __init__(self) -> None:
        self._free: list[Array] = []

    def take(self, num_rows: int, widths: Mapping[str, int]) -> tuple[Array, Tensors]:
        """
        Returns:
            What is to be given back, and arrays in it: for each width (num_rows, width) float32, of any content.

        Raises:
            ModelError: there is not as much memory.
        """
        piece, arrays, begin = self._take(num_rows * sum(widths.values())), {}, 0
        for name, width in widths.items():
            end = begin + num_rows * width
            arrays[name] = piece[begin:end].reshape(num_rows, width)
            begin = end
        return piece, arrays

    def give_back(self, piece: Array) -> None:
        """The arrays in it are not used any more."""
        self._free.append(piece)

    def _take(self, size: int) -> Array:
        fitting = [number for number, piece in enumerate(self._free) if piece.size >= size]
        if fitting:
            return self._free.pop(min(fitting, key=lambda number: self._free[number].size))
        if self._free:
            self._free.pop()  # too small: it goes for a larger one
        try:
            if 4 * size > (
                most_memory() or math.inf
            ):  # the widths are the server's, and the system gives what it does not have
                raise MemoryError
            return np.empty(size + size // SPARE, np.float32)
        except MemoryError:
            raise ModelError(
                f"there is no memory for the {size / 2**18:,.0f} MB that a block keeps of a batch; "
                "choose a smaller --batch-size or --max-length"
            ) from None
