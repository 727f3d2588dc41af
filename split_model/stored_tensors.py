"""The tensors of safetensors files: mapped into memory and never read whole, so that a part of a model costs only its size."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from storage import Folder, ModelError
from storage.model_folder import INDEX_FILE, WEIGHTS_FILE

__all__ = ["STORED_DTYPES", "StoredTensor", "StoredTensors", "open_tensors", "weight_files"]

STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""In the words of safetensors."""
OTHER_WEIGHTS = ("pytorch_model*.bin", "*.gguf", "*.pth", "*.h5")
"""Files in which people have weights that are not read: the first are pickled, which can run code."""
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, and as what."""

    path: Path
    name: str
    """Under which the file holds it."""
    dtype: str
    """In the words of safetensors; it may be none of `STORED_DTYPES`."""
    shape: tuple[int, ...]
    file: Any = field(repr=False, compare=False)
    """``path``, opened by safetensors."""

    def view(self) -> Tensor:
        """The values, in the dtype and the shape in which they are stored: a view of the mapped file."""
        tensor: Tensor = self.file.get_tensor(self.name)
        return tensor

    def rows(self) -> "Rows":
        """The same as rows that are read one by one. For tables of which little is used: see `Rows`."""
        return Rows(self)

    def equals(self, other: "StoredTensor") -> bool:
        """Whether both are matrices with the same values. They are read in pieces, so that neither stays in memory."""
        can_be_read = {self.dtype, other.dtype} <= STORED_DTYPES.keys()
        if self.shape != other.shape or len(self.shape) != 2 or 0 in self.shape or not can_be_read:
            return False  # the check of each tensor against its expected shape and dtype says what is wrong
        both = self.rows(), other.rows()
        for begin in range(0, self.shape[0], ROWS_AT_ONCE):
            indices = numpy.arange(begin, min(begin + ROWS_AT_ONCE, self.shape[0]))
            if not torch.equal(*(rows.gather(indices).double() for rows in both)):
                return False
        return True


StoredTensors = Mapping[str, StoredTensor]
"""Of a model, under the names of `ModelConfig.tensor_shapes`."""


class Rows:
    """
    The rows of a stored tensor (n, ...), read from the file when they are asked for.

    The pages of a mapped file stay in memory once touched, with dozens of their neighbours: after some batches the whole table
    of a vocabulary would be there. What is read from a file that is not mapped is only what is asked for.
    """

    def __init__(self, stored: StoredTensor) -> None:
        self._file = stored.path.open("rb", buffering=0)
        header_bytes = int.from_bytes(self._file.read(8), "little")  # the format of safetensors: length, JSON, data
        begin, end = json.loads(self._file.read(header_bytes))[stored.name]["data_offsets"]
        self._dtype = STORED_DTYPES[stored.dtype]
        self._begin = 8 + header_bytes + begin
        self._row_bytes = (end - begin) // stored.shape[0]

    def read(self, indices: Sequence[int]) -> bytearray:
        """The bytes of the rows, one after the other."""
        buffer = bytearray(len(indices) * self._row_bytes)
        view = memoryview(buffer)
        for number, index in enumerate(indices):
            self._file.seek(self._begin + index * self._row_bytes)
            self._file.readinto(view[number * self._row_bytes : (number + 1) * self._row_bytes])
        return buffer

    def gather(self, indices: NDArray[numpy.integer[Any]]) -> Tensor:
        """Rows of a matrix, (N,) indices -> (N, width) in the stored dtype. A row that is wanted twice is read once."""
        distinct, inverse = numpy.unique(indices, return_inverse=True)
        rows = torch.frombuffer(self.read(distinct.tolist()), dtype=self._dtype)
        return rows.view(len(distinct), -1).index_select(0, torch.from_numpy(inverse))

    def __del__(self) -> None:
        self._file.close()


def weight_files(files: Folder) -> list[Path]:
    """
    The safetensors files of a model folder: one, or the shards that its index names.

    Raises:
        ModelError: there are none, or the index is damaged.
    """
    if path := files.find(WEIGHTS_FILE):
        return [path]
    if not files.find(INDEX_FILE):
        raise ModelError(f"{files.path} has no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}{_other_weights(files.path)}")
    weight_map = files.read_json(INDEX_FILE).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    if not names or any(not isinstance(name, str) or name == ".." or Path(name).name != name for name in names):
        raise ModelError(f"{files.path / INDEX_FILE} names no shards, or shards outside its folder")
    return [files.require(name) for name in sorted(set(names))]


def _other_weights(folder: Path) -> str:
    """What is there instead, and what to do with it, as the end of a sentence; "" if nothing is."""
    for pattern in OTHER_WEIGHTS:
        if other := min(folder.glob(pattern), default=None):
            return f"; {other.name} is not read: load it with transformers and save_pretrained, which writes safetensors"
    return ""


def open_tensors(paths: Iterable[Path], prefix: str) -> dict[str, StoredTensor]:
    """
    All that the files hold, by name, ``prefix`` removed.

    Raises:
        ModelError: a file cannot be read, or two tensors have one name.
    """
    found: dict[str, StoredTensor] = {}
    for path in paths:
        try:
            file: Any = safe_open(path, framework="pt")
            for stored in file.keys():
                part, name = file.get_slice(stored), stored.removeprefix(prefix)
                if name in found:
                    raise ModelError(
                        f"{path}: the tensor {name!r} is there twice, as {stored!r} and, in {found[name].path.name}, as "
                        f"{found[name].name!r}; remove the one that is not meant"
                    )
                found[name] = StoredTensor(path, stored, part.get_dtype(), tuple(part.get_shape()), file)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read as safetensors: {error}") from None
    return found
