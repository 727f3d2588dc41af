"""
Memory for what a forward pass leaves to its backward pass. It is not onnxruntime's: in its arena, what stays would lie between
what goes, and the holes would be a tenth of a device's memory. It is used again from step to step, since the system fills what
it gives with zeros, which takes time.
"""

import numpy as np

from protocol import Array
from storage import ModelError

from .runtime import has_memory_for

__all__ = ["Buffer", "ReusedMemory"]

SPARE = 8
"""New memory is an eighth larger than needed: the next batch may be a little longer. What is not written to takes no room."""


class Buffer:
    """Memory of one forward pass, out of which arrays are taken until all of it is given back."""

    def __init__(self, num_floats: int) -> None:
        try:
            if not has_memory_for(4 * num_floats):
                raise MemoryError
            self._floats: Array = np.empty(num_floats, np.float32)
        except MemoryError:
            raise ModelError(
                f"there is no memory for the {4 * num_floats / 1e6:,.0f} MB that are kept of a batch; "
                "choose a smaller --batch-size or --max-length"
            ) from None
        self._num_taken = 0

    @property
    def size(self) -> int:
        """In floats."""
        return self._floats.size

    def take(self, num_rows: int, width: int) -> Array:
        """(num_rows, width) float32, of any content."""
        begin, self._num_taken = self._num_taken, self._num_taken + num_rows * width
        array: Array = self._floats[begin : self._num_taken].reshape(num_rows, width)
        return array

    def clear(self) -> None:
        """No array of it is used any more."""
        self._num_taken = 0


class ReusedMemory:
    """Buffers that are used now and then."""

    def __init__(self) -> None:
        self._free: list[Buffer] = []

    def take(self, num_floats: int) -> Buffer:
        """
        Raises:
            ModelError: there is not as much memory.
        """
        fitting = [buffer for buffer in self._free if buffer.size >= num_floats]
        if self._free:
            # The smallest that is large enough; else the largest goes, for one that is.
            buffer = min(fitting, key=lambda each: each.size) if fitting else max(self._free, key=lambda each: each.size)
            self._free.remove(buffer)
            if fitting:
                return buffer
            del buffer
        return Buffer(num_floats + num_floats // SPARE)

    def give_back(self, buffer: Buffer) -> None:
        buffer.clear()
        self._free.append(buffer)
