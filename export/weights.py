"""Where a graph's weights come from: readers that give one float32 array at a time, and wrap one another."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  # teaches numpy, and so safetensors, what bfloat16 is
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from .errors import ExportError

__all__ = ["Floats", "StoredWeights", "Weights"]

Floats = NDArray[np.float32]


class Weights(Protocol):
    """The tensors of a GPT-2 under transformers' names without "transformer."; matrices of layers are (in, out)."""

    def read(self, name: str) -> Floats: ...


class StoredWeights:
    """
    The tensors of safetensors files, in float32, read when they are asked for.

    Raises:
        ExportError: a file cannot be read, or has not the tensor that is asked for.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._places: dict[str, tuple[Any, str]] = {}
        for path in files:
            try:
                file = safe_open(path, framework="np")
            except (OSError, SafetensorError) as error:
                raise ExportError(f"{path} cannot be read as safetensors: {error}") from None
            self._places |= {stored.removeprefix("transformer."): (file, stored) for stored in file.keys()}  # type: ignore[no-untyped-call]

    def names(self) -> list[str]:
        return list(self._places)

    def read(self, name: str) -> Floats:
        if name not in self._places:
            raise ExportError(f"tensor {name!r} is missing; is this a complete GPT-2 checkpoint?")
        file, stored = self._places[name]
        tensor: Floats = file.get_tensor(stored).astype(np.float32)
        return tensor
