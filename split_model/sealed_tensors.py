"""Tensors and a text in one safetensors file with a digest of both, by which whoever reads it sees damage."""

import hashlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

__all__ = ["DamagedFile", "read_sealed", "seal"]


class DamagedFile(ValueError):
    """A file cannot be read, or its content is not what was written."""


def seal(text: str, tensors: dict[str, Tensor]) -> bytes:
    """The bytes of a file for `read_sealed`."""
    return save(tensors, {"checkpoint": text, "sha256": _digest(text, tensors)})


def read_sealed(path: Path) -> tuple[str, dict[str, Tensor]]:
    """
    The text and the tensors.

    Raises:
        DamagedFile: the file cannot be read, or its content is not what was written.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise DamagedFile(str(error)) from None
    text = metadata.get("checkpoint", "")
    if _digest(text, tensors) != metadata.get("sha256"):
        raise DamagedFile("its content is not what was written")
    return text, tensors


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensor.numpy()).data)
    return digest.hexdigest()
