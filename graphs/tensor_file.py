"""Files of safetensors that are written some rows at a time."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["TensorFile"]

WORDS = {np.dtype("<f4"): "F32", np.dtype("<f2"): "F16", np.dtype("i1"): "I8"}
"""What safetensors calls the types."""

Layout = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]


class TensorFile:
    """
    A file to which tensors are given in pieces, so that none of them is ever in memory as a whole: the library of safetensors
    would hold all of them twice. The format is a length, a JSON header and the data
    (https://huggingface.co/docs/safetensors#format).

    Args:
        layout: of each tensor, type and shape. In the file wider types come first, and of those of a type the names decide, as
            where the library writes it.
        metadata: of the file, texts by name.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
        header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
        places, end = dict[str, int](), 0
        for name, (dtype, shape) in sorted(layout.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
            places[name], end = end, end + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            header[name] = {"dtype": WORDS[dtype], "shape": shape, "data_offsets": [places[name], end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._layout, self._next = layout, {name: 8 + len(text) + place for name, place in places.items()}

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._file.close()

    def append(self, name: str, rows: NDArray[Any]) -> None:
        """The next rows of a tensor, or all of it; converted to its type."""
        self._file.seek(self._next[name], os.SEEK_SET)
        self._file.write(np.ascontiguousarray(rows, self._layout[name][0]).data)
        self._next[name] = self._file.tell()
