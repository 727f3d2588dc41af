"""Reads the weights of a part: what is there, and nothing that a damaged or hostile file claims to be there."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.part.weights_file import MOST_HEADER_BYTES, MOST_TENSORS, WeightsFile
from storage import ModelError

MATRIX = np.arange(12, dtype=np.float32).reshape(4, 3)


def write(path: Path, header: object, data: bytes, length: int | None = None) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes((len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data)
    return path


def described(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48], **changes}


def test_tensors_are_those_that_safetensors_has_written(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    tensors = {
        "matrix": MATRIX,
        "half": MATRIX.astype(np.float16),
        "integers": np.arange(-3, 4, dtype=np.int8),
        "scale": np.ones(1, np.float32),
    }
    numpy.save_file(tensors, tmp_path / "w", {"made": "by a test"})
    weights = WeightsFile(tmp_path / "w")
    assert weights.names == tensors.keys()
    for name, tensor in tensors.items():
        assert weights.map(name).dtype == tensor.dtype
        np.testing.assert_array_equal(weights.map(name), tensor)


def test_rows_are_read_in_any_order_and_as_often_as_they_are_wanted(tmp_path: Path) -> None:
    weights = WeightsFile(write(tmp_path / "w", {"table": described(), "row": described(shape=[12])}, MATRIX.tobytes()))
    rows = weights.rows("table")
    np.testing.assert_array_equal(rows.gather(np.array([3, 0, 3, 1])), MATRIX[[3, 0, 3, 1]])
    assert rows.gather(np.array([], np.int64)).shape == (0, 3)
    with pytest.raises(ModelError, match=r"'?\"?row\"?'? has shape \[12\]; a matrix is expected"):
        weights.rows("row")
    with pytest.raises(ModelError, match='has no tensor "other"'):
        weights.map("other")
    os.truncate(tmp_path / "w", (tmp_path / "w").stat().st_size - 4)
    with pytest.raises(ModelError, match="has become shorter"):
        rows.gather(np.array([3]))


def test_disk_that_fails_later_is_one_sentence(tmp_path: Path) -> None:
    rows = WeightsFile(write(tmp_path / "w", {"table": described()}, MATRIX.tobytes())).rows("table")
    (tmp_path / "folder").mkdir()
    folder = os.open(tmp_path / "folder", os.O_RDONLY)
    os.dup2(folder, rows._file.fileno())  # nothing can be read from there
    os.close(folder)
    with pytest.raises(ModelError, match=r"w cannot be read: Is a directory"):
        rows.gather(np.array([3]))


WRONG: dict[str, tuple[object, str]] = {
    "no JSON": (b"{{{", "its header is no JSON"),
    "endless nesting": (b"[" * 100_000, "its header is no JSON"),
    "no UTF-8": (b"\xff\xff", "its header is no JSON"),
    "a list": ([1, 2], "its header is no object"),
    "too many tensors": ({str(n): 0 for n in range(MOST_TENSORS + 1)}, "its header is no object of at most"),
    "no description": ({"w": 7}, "is not described by dtype, shape and data_offsets"),
    "a key more": ({"w": described(more=1)}, "is not described by dtype, shape and data_offsets"),
    "another dtype": ({"w": described(dtype="F64")}, 'is stored as "F64"; weights are F32, F16, I8'),
    "a dtype that is a list": ({"w": described(dtype=["F32"])}, "is stored as"),
    "a negative size": ({"w": described(shape=[-4, -3])}, "has the shape"),
    "a size that is a truth": ({"w": described(shape=[True, 12])}, "has the shape"),
    "a size that is a fraction": ({"w": described(shape=[4.0, 3])}, "has the shape"),
    "no size": ({"w": described(shape=[])}, "has the shape"),
    "an empty tensor": ({"w": described(shape=[0, 3], data_offsets=[0, 0])}, "has the shape"),
    "too many sizes": ({"w": described(shape=[1] * 9)}, "has the shape"),
    "a size beyond all memory": ({"w": described(shape=[2**62, 2**62])}, "where no F32 of shape"),
    "beyond the end": ({"w": described(data_offsets=[8, 56])}, "is outside the file"),
    "before the beginning": ({"w": described(data_offsets=[-8, 40])}, "is outside the file"),
    "backwards": ({"w": described(data_offsets=[48, 0])}, "is outside the file"),
    "offsets that are texts": ({"w": described(data_offsets=["0", "48"])}, "is outside the file"),
    "three offsets": ({"w": described(data_offsets=[0, 24, 48])}, "is outside the file"),
    "a few bytes less": ({"w": described(data_offsets=[0, 44])}, "where no F32 of shape"),
    "between two numbers": ({"w": described(shape=[4], data_offsets=[2, 18])}, "where no F32 of shape"),
}


@pytest.mark.parametrize("what", WRONG)
def test_file_that_claims_what_cannot_be_is_refused(tmp_path: Path, what: str) -> None:
    header, message = WRONG[what]
    with pytest.raises(ModelError, match=message):
        WeightsFile(write(tmp_path / "w", header, MATRIX.tobytes()))


@pytest.mark.parametrize("length", [2**63, MOST_HEADER_BYTES + 1, 200])
def test_header_longer_than_its_file_or_than_any_is_not_read(tmp_path: Path, length: int) -> None:
    with pytest.raises(ModelError, match=f"a header of {length} bytes does not fit into its"):
        WeightsFile(write(tmp_path / "w", {"w": described()}, b"", length))


@pytest.mark.parametrize("content", [b"", b"\0\0\0"])
def test_file_that_ends_before_its_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(ModelError, match="does not fit into its"):
        WeightsFile(tmp_path / "w")
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        WeightsFile(tmp_path / "missing")
