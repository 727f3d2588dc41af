"""
Reads the weights of a part. Their files have the format of safetensors: the length of a header in 8 bytes, the header in JSON,
the data. They come from a server, so no number in them is used before it is known to lie within the file.
"""

import json
import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from protocol import Array
from storage import ModelError, shown

__all__ = ["Rows", "WeightsFile", "give_back_pages"]

DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "I8": np.dtype("i1")}
"""In the words of safetensors: the ones that a part's weights can have."""
LENGTH_BYTES, MOST_HEADER_BYTES = 8, 1 << 20
MOST_TENSORS, MOST_DIMENSIONS = 1000, 8


@dataclass(frozen=True)
class _Place:
    """Of one tensor."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""


class WeightsFile:
    """
    The tensors of a file by name, each mapped into memory when it is asked for.

    Raises:
        ModelError: the file cannot be read, or is not of the format.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with _readable_errors(path):
            self._places = self._read_places()

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._places)

    def map(self, name: str) -> Array:
        """
        Raises:
            ModelError: there is no such tensor.
        """
        place = self._place(name)
        try:
            return np.memmap(self._path, place.dtype, "r", place.offset, place.shape)
        except (OSError, ValueError) as error:  # the file has become another one since it was opened
            raise ModelError(f"{self._path} cannot be mapped into memory: {error}") from None

    def rows(self, name: str) -> "Rows":
        """
        The matrix ``name`` as rows that are read one by one.

        Raises:
            ModelError: there is no such matrix.
        """
        place = self._place(name)
        if len(place.shape) != 2:
            raise ModelError(f"{self._path}: {shown(name)} has shape {list(place.shape)}; a matrix is expected")
        return Rows(self._path, place.dtype, place.shape, place.offset)

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            raise ModelError(f"{self._path} has no tensor {shown(name)}")
        return self._places[name]

    def _read_places(self) -> dict[str, _Place]:
        num_bytes = self._path.stat().st_size
        with self._path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
            begin = LENGTH_BYTES + header_bytes
            if num_bytes < LENGTH_BYTES or begin > num_bytes or header_bytes > MOST_HEADER_BYTES:
                raise self._wrong(f"a header of {header_bytes} bytes does not fit into its {num_bytes} bytes")
            header = file.read(header_bytes)
        try:
            described = json.loads(header)
        except (ValueError, RecursionError):
            raise self._wrong("its header is no JSON") from None
        if not isinstance(described, dict) or len(described) > MOST_TENSORS:
            raise self._wrong(f"its header is no object of at most {MOST_TENSORS} tensors")
        described.pop("__metadata__", None)
        return {name: self._read_place(name, value, begin, num_bytes) for name, value in described.items()}

    def _read_place(self, name: str, described: object, begin: int, num_bytes: int) -> _Place:
        if not isinstance(described, dict) or described.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._wrong(f"{shown(name)} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._wrong(f"{shown(name)} is stored as {shown(dtype)}; weights are {', '.join(DTYPES)}")
        if not _are_counts(shape) or not 0 < len(shape) <= MOST_DIMENSIONS or 0 in shape:
            raise self._wrong(f"{shown(name)} has the shape {shown(shape)}")
        kind = DTYPES[dtype]
        if not _are_counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= num_bytes - begin:
            raise self._wrong(f"{shown(name)} lies at {shown(offsets)}, which is outside the file")
        if offsets[1] - offsets[0] != math.prod(shape) * kind.itemsize or (begin + offsets[0]) % kind.itemsize:
            raise self._wrong(f"{shown(name)} lies at {shown(offsets)}, where no {dtype} of shape {shown(shape)} can be")
        return _Place(kind, tuple(shape), begin + offsets[0])

    def _wrong(self, reason: str) -> ModelError:
        return ModelError(f"{self._path} is no file of weights: {reason}")


class Rows:
    """
    The rows of a stored matrix (n, width), read from the file when they are asked for.

    The pages of a mapped file stay in memory once touched, with dozens of their neighbours: after some batches the whole table
    of a vocabulary would be there. What is read from a file that is not mapped is only what is asked for.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> None:
        self._path, self._dtype, self.shape, self._offset = path, dtype, shape, offset
        with _readable_errors(path):
            self._file = path.open("rb", buffering=0)

    def gather(self, indices: Array) -> Array:
        """
        (N,) indices from 0 to n - 1 -> (N, width) in the stored dtype. A row that is wanted twice is read once.

        Raises:
            ModelError: the file cannot be read, or has become shorter.
        """
        distinct, inverse = np.unique(indices, return_inverse=True)
        rows = np.empty((len(distinct), self.shape[1]), self._dtype)
        with _readable_errors(self._path):
            for row, index in zip(rows, distinct.tolist(), strict=True):
                self._file.seek(self._offset + index * row.nbytes)
                if self._file.readinto(row.data.cast("B")) != row.nbytes:
                    raise ModelError(f"{self._path} has become shorter since it was opened")
        return rows[inverse]

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


def give_back_pages(mapped: Array) -> None:
    """
    Take the pages of a mapped file out of this process's memory. They stay in the system's cache of files, as long as that has
    room for them; what is read again comes from there.
    """
    pages = getattr(mapped, "_mmap", None)  # numpy's, which has no other name
    if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


@contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None


def _are_counts(values: object) -> bool:
    """Whether this is a list of whole numbers that are not negative. Python calls true and false whole numbers, too."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
