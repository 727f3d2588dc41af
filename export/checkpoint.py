"""A Hugging Face checkpoint, written tensor by tensor."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphs import Weights

if TYPE_CHECKING:
    from split_model import ModelConfig

__all__ = ["write_checkpoint"]


def write_checkpoint(path: Path, config: "ModelConfig", weights: Weights) -> None:
    """
    All weights in float32 under transformers' names.

    The library of safetensors would hold them in memory twice; its format is a length, a JSON header and the data
    (https://huggingface.co/docs/safetensors#format).
    """
    turned = config.turned_matrices
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in config.tensor_shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[config.stored_name(name)] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in config.tensor_shapes:
            for piece in [weights.read(name).T] if name in turned else weights.pieces(name):
                file.write(np.ascontiguousarray(piece, "<f4").data)
