"""Where a graph's weights come from: readers of one float32 array at a time, which can wrap one another."""

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


class Weights(Protocol):
    """A model's tensors under the names of `ModelConfig.tensor_shapes`; matrices of linear layers are (in, out)."""

    def read(self, name: str) -> Floats: ...


class StoredWeights:
    """A base model's tensors in float32, each read when it is asked for."""

    def __init__(self, base: "PretrainedModel") -> None:
        self._places = base.tensors
        self._turned = base.config.turned_matrices
        self._files: dict[Path, Any] = {
            path: safe_open(path, framework="np") for path in {stored.path for stored in base.tensors.values()}
        }

    def read(self, name: str) -> Floats:
        stored = self._places[name]
        with np.errstate(over="ignore"):  # a float64 that becomes infinite is refused by `Merged`
            tensor: Floats = self._files[stored.path].get_tensor(stored.name).astype(np.float32)
        return tensor.T if name in self._turned else tensor
