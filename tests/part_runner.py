"""Runs the graphs of a device's part as an engine does, as plainly as can be: what tests hold the graphs to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from safetensors.numpy import load_file

from storage import GRAPH_FILES, PartDescription

Array = NDArray[Any]
Masks = Mapping[tuple[int, str], Array]
"""By block and layer: (N, in) zeros and ones."""


@dataclass
class Batch:
    """B sequences, packed: ids (N,) and lengths (B,). Cells of the grid without a token show the row ``shown``."""

    lengths: Sequence[int]
    vocabulary: int = 600
    shown: int = 0
    ids: Array = field(init=False)

    def __post_init__(self) -> None:
        self.ids = np.random.default_rng(5).integers(0, self.vocabulary, sum(self.lengths))

    def feeds(self) -> dict[str, Array]:
        longest = max(self.lengths)
        is_token = np.arange(longest) < np.array(self.lengths)[:, None]  # (B, T)
        row_of_cell = np.full(is_token.shape, self.shown)
        row_of_cell[is_token] = np.arange(len(self.ids))
        return {
            "positions": np.broadcast_to(np.arange(longest), is_token.shape)[is_token],
            "row_of_cell": row_of_cell,
            "cell_of_row": np.flatnonzero(is_token),
            "is_token": is_token[:, :, None].astype(np.float32),
        }


class PartRunner:
    """
    A part's files, opened.

    Args:
        adapter: the LoRA matrices under PEFT's names.
    """

    def __init__(self, folder: Path, adapter: Mapping[str, Array], masks: Masks | None = None) -> None:
        self.description = PartDescription.read(folder, onnxruntime=onnxruntime.__version__)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.sessions = {
            name.removesuffix(".onnx"): onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
            for name in GRAPH_FILES
        }
        embedding, *blocks = self.description.weight_files
        self.embedding = load_file(folder / embedding)
        self.blocks = [self._inputs_of(block, folder / file, adapter, masks or {}) for block, file in enumerate(blocks)]

    def _inputs_of(self, block: int, file: Path, adapter: Mapping[str, Array], masks: Masks) -> dict[str, Array]:
        given = {f"weight:{name}": array for name, array in load_file(file).items()}
        for layer in self.description.adapted:
            for matrix in "AB":
                given[f"lora:{layer}.{matrix}"] = adapter[self.description.adapter_name(block, layer, matrix)]
            if (block, layer) in masks:
                given[f"mask:{layer}"] = masks[block, layer].astype(np.uint8)
        return given

    def forward(self, batch: Batch, graph: str = "forward") -> tuple[Array, list[dict[str, Array]]]:
        """Activations (N, d), and what the backward pass is given, block by block."""
        rows = self.embedding["tokens"][batch.ids].astype(np.float32)
        if "tokens.scale" in self.embedding:
            rows *= self.embedding["tokens.scale"][batch.ids, None]
        feeds, kept = batch.feeds(), []
        weights = {f"weight:{name}": array for name, array in self.embedding.items()}
        hidden = self.run("embedding", {"rows": rows, **feeds, **weights})["output"]
        for given in self.blocks:
            known = {"input": hidden, **feeds, **given}
            found = self.run(graph, known)
            hidden = found["output"]
            kept.append(known | found)
        return hidden, kept

    def backward(self, gradient: Array, kept: list[dict[str, Array]]) -> dict[str, Array]:
        """The gradients by the LoRA matrices under PEFT's names, given that by the activations."""
        gradients = {}
        for block in reversed(range(len(kept))):
            found = self.run("backward" if block else "first_backward", kept[block] | {"gradient": gradient})
            for layer in self.description.adapted:
                for matrix in "AB":
                    gradients[self.description.adapter_name(block, layer, matrix)] = found[f"gradient:{layer}.{matrix}"]
            gradient = found.get("input_gradient", gradient)
        return gradients

    def run(self, graph: str, known: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs of a graph, which is given those of ``known`` that it asks for."""
        session = self.sessions[graph]
        names = [output.name for output in session.get_outputs()]
        given = {each.name: known[each.name] for each in session.get_inputs()}
        return dict(zip(names, session.run(names, given), strict=True))
