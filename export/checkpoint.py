"""A Hugging Face checkpoint, written tensor by tensor."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphs import Weights
from graphs.tensor_file import TensorFile

if TYPE_CHECKING:
    from split_model import ModelConfig

__all__ = ["write_checkpoint"]


def write_checkpoint(path: Path, config: "ModelConfig", weights: Weights) -> None:
    """All weights in float32 under transformers' names."""
    turned, shapes = config.turned_matrices, config.tensor_shapes
    layout = {config.stored_name(name): (np.dtype("<f4"), shape) for name, shape in shapes.items()}
    with TensorFile(path, layout, {"format": "pt"}) as file:
        for name in shapes:
            for piece in [weights.read(name).T] if name in turned else weights.pieces(name):
                file.append(config.stored_name(name), piece)
