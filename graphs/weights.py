"""Where a graph's weights come from: readers of one float32 array at a time, which can wrap one another."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes  # noqa: F401  # teaches numpy, and so safetensors, what bfloat16 is
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

if TYPE_CHECKING:  # a graph is built without torch, which split_model imports
    from split_model import PretrainedModel

__all__ = ["Floats", "StoredWeights", "Weights"]

Floats = NDArray[np.float32]


ROWS_AT_ONCE = 4096


class Weights(Protocol):
    """A model's tensors under the names of `ModelConfig.tensor_shapes`; matrices of linear layers are (in, out)."""

    def read(self, name: str) -> Floats: ...

    def pieces(self, name: str) -> Iterator[Floats]:
        """
        The same, some rows at a time where that saves memory: the table of a large vocabulary takes a gigabyte, more than all
        else of a model that is read at once. No class inherits this from here: one that wraps others would read a table whole.
        """
        ...


class StoredWeights(Weights):
    """A base model's tensors in float32, each read when it is asked for."""

    def __init__(self, base: "PretrainedModel") -> None:
        self._places = base.tensors
        self._turned = base.config.turned_matrices
        self._files: dict[Path, Any] = {
            path: safe_open(path, framework="np") for path in {stored.path for stored in base.tensors.values()}
        }

    def read(self, name: str) -> Floats:
        stored = self._places[name]
        tensor = _float32(self._files[stored.path].get_tensor(stored.name))
        return tensor.T if name in self._turned else tensor

    def pieces(self, name: str) -> Iterator[Floats]:
        stored = self._places[name]
        if name in self._turned or len(stored.shape) < 2:
            yield self.read(name)
            return
        rows = self._files[stored.path].get_slice(stored.name)
        for begin in range(0, stored.shape[0], ROWS_AT_ONCE):
            yield _float32(rows[begin : min(begin + ROWS_AT_ONCE, stored.shape[0])])


def _float32(tensor: NDArray[Any]) -> Floats:
    with np.errstate(over="ignore"):  # a float64 that becomes infinite is refused by the export's `Merged`
        return tensor.astype(np.float32, copy=False)
