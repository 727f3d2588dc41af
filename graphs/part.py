"""
A device's part of a model as files: its graphs without weights, the weights, the tokenizer, and a description of them all.

The same graph is run for each block with that block's weights. Of a packed batch's N rows, d elements each:

    embedding.onnx        rows: the tokens' embeddings (N, d)                   -> output (N, d)
    inference.onnx        input (N, d), a block's weights and LoRA matrices     -> output (N, d)
    forward.onnx          the same, and dropout's masks where there is dropout  -> output, and what the backward pass needs
    backward.onnx         gradient (N, d) by the output, and all of these       -> gradients by LoRA matrices and input
    first_backward.onnx   the same for the first block                          -> gradients by LoRA matrices

A part that learns nothing has only the first two.

Where labels stay on the devices, they have the head, too; of a slice of its table of tokens:

    head.onnx             hidden (M, d), after the final norm                   -> what loss and gradient are put together from
    head_loss.onnx        the same                                              -> what the loss is put together from

Nothing goes on below the first block, so first_backward.onnx computes nothing below the first adapted layer.
"""

from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from storage import HEAD_WEIGHTS, PartDescription
from storage.part_description import EMBEDDING_WEIGHTS, WITH_POSITIONS, WITHOUT_POSITIONS
from storage.tokenizer import write_tokenizer

from .block import Block, embedding, embedding_tensors
from .layers import TOKENS, WINDOW, Head
from .matrix_formats import MATRIX_FORMATS, MatrixFormat, check_finite
from .part_graph import Adaptation, PartGraph
from .tensor_file import TensorFile
from .weights import Weights

if TYPE_CHECKING:  # a graph is built without torch, which split_model imports
    from split_model import ModelConfig

__all__ = ["build_part"]

INFERENCE = "inference"
ONNXRUNTIME = "1.23"
"""The lowest version that the graphs are tested with."""


def build_part(
    folder: Path,
    config: "ModelConfig",
    weights: Weights,
    *,
    cut_layer: int,
    adaptation: Adaptation,
    precision: str,
    fingerprint: str,
    tokenizer_folder: Path,
    with_head: bool = False,
) -> PartDescription:
    """
    Write all files of blocks [0, cut_layer) into an empty folder.

    Args:
        weights: of the base model.
        precision: one of `storage.EDGE_WEIGHTS`, in which the linear layers' matrices and the tokens' table are stored. Norms,
            biases and positions are float32.
        fingerprint: of model and tokenizer.
        tokenizer_folder: the model's, or any other with the files of its tokenizer.
        with_head: whether the devices compute the loss themselves. A head that is no table of its own costs no byte of weights.

    Raises:
        ModelError: a value is too large for the precision, or no number; the folder has no tokenizer that can be used.
        OSError: a file cannot be written.
    """
    form = MATRIX_FORMATS[precision]
    description = PartDescription(
        fingerprint=fingerprint,
        cut_layer=cut_layer,
        weights=precision,
        width=config.width,
        num_positions=config.num_positions,
        vocabulary_size=config.vocabulary_size,
        end_token=config.end_token,
        lora_rank=adaptation.rank,
        lora_alpha=adaptation.alpha,
        lora_dropout=adaptation.dropout,
        adapter_prefix=f"base_model.model.{config.stored_name(config.names.blocks)}.{{block}}.",
        adapted=adaptation.layers,
        onnxruntime=ONNXRUNTIME,
        head=(EMBEDDING_WEIGHTS if config.tied_head else HEAD_WEIGHTS) if with_head else "",
        format=WITHOUT_POSITIONS if config.rotary is None else WITH_POSITIONS,
    )
    write_graphs(folder, config, adaptation, precision, with_head=with_head)
    embedding, *blocks = description.weight_files
    positions = {name: _exact(weights, name) for name in embedding_tensors(config)}
    _write_table(folder / embedding, config, config.table_name, weights, form, positions)
    for index, name in enumerate(blocks):
        save_file(_block(config, weights, form, index), folder / name)
    if description.head == HEAD_WEIGHTS:
        _write_table(folder / HEAD_WEIGHTS, config, config.head_name, weights, form)
    write_tokenizer(tokenizer_folder, folder)
    description.write(folder)
    return description


def write_graphs(
    folder: Path, config: "ModelConfig", adaptation: Adaptation, precision: str, *, with_head: bool = False
) -> None:
    """The graphs of a part; no weight is read for them."""
    graphs = _Graphs(config, MATRIX_FORMATS[precision])
    fill: dict[str, Callable[[PartGraph], None]] = {
        "embedding": graphs.embedding,
        INFERENCE: graphs.forward,
    }
    if adaptation.layers:
        fill |= {"forward": graphs.forward, "backward": graphs.backward, "first_backward": graphs.first_backward}
    if with_head:
        fill |= {"head": graphs.head, "head_loss": graphs.head_loss}
    for name, fill_in in fill.items():
        graph = PartGraph(folder / f"{name}.onnx", adaptation, trains=name != INFERENCE)
        fill_in(graph)
        graph.write(name)


class _Graphs:
    """What stands in the graphs of a part."""

    def __init__(self, config: "ModelConfig", form: MatrixFormat) -> None:
        self.config, self.form = config, form

    def embedding(self, graph: PartGraph) -> None:
        tokens = graph.given_rows("rows", self.config.width)
        graph.rows_output("output", embedding(graph, self.config, tokens), self.config.width)

    def forward(self, graph: PartGraph) -> None:
        graph.rows_output("output", self._block(graph).forward(self._input(graph)), self.config.width)

    def backward(self, graph: PartGraph) -> None:
        graph.rows_output("input_gradient", self._backward(graph), self.config.width)

    def first_backward(self, graph: PartGraph) -> None:
        self._backward(graph)

    def head(self, graph: PartGraph) -> None:
        self._head(graph, with_gradient=True)

    def head_loss(self, graph: PartGraph) -> None:
        self._head(graph, with_gradient=False)

    def _head(self, graph: PartGraph, *, with_gradient: bool) -> None:
        hidden = graph.given_rows("hidden", self.config.width)
        Head(graph, self.config.width, self.form).sums(hidden, with_gradient=with_gradient)

    def _backward(self, graph: PartGraph) -> str:
        return self._block(graph).backward(self._input(graph), graph.given_rows("gradient", self.config.width))

    def _block(self, graph: PartGraph) -> Block:
        return Block(graph, self.config, self.form)

    def _input(self, graph: PartGraph) -> str:
        return graph.given_rows("input", self.config.width)


def _write_table(
    path: Path,
    config: "ModelConfig",
    name: str,
    weights: Weights,
    form: MatrixFormat,
    others: Mapping[str, NDArray[np.float32]] = MappingProxyType({}),
) -> None:
    """A file of a table of tokens, some rows at a time, and of other tensors."""
    pieces = (form.store(TOKENS, rows, shared_scale=1) for rows in weights.pieces(name))
    first = next(pieces)
    layout = {each: (array.dtype, (config.vocabulary_size, *array.shape[1:])) for each, array in first.items()}
    layout |= {each: (array.dtype, array.shape) for each, array in others.items()}
    with TensorFile(path, layout) as file:
        for tensors in chain([others, first], pieces):
            for each, array in tensors.items():
                file.append(each, array)


def _block(config: "ModelConfig", weights: Weights, form: MatrixFormat, index: int) -> dict[str, NDArray[np.generic]]:
    tensors: dict[str, NDArray[np.generic]] = {}
    if any(config.windows):
        # The same graph is run for every block: one whose tokens see all has the widest window that there is.
        tensors[WINDOW] = np.array([config.window(index) or config.num_positions], np.float32)
    prefix, matrices = f"{config.block_name(index)}.", {f"{layer}.weight" for layer in config.layer_shapes}
    for name in config.tensor_shapes:
        if name.startswith(prefix):
            inner = name.removeprefix(prefix)
            if inner in matrices:
                stored = form.store(name, weights.read(name))
                tensors |= {each.removeprefix(prefix): array for each, array in stored.items()}
            else:
                tensors[inner] = _exact(weights, name)
    return tensors


def _exact(weights: Weights, name: str) -> NDArray[np.float32]:
    tensor = weights.read(name)
    check_finite(name, tensor, "float32")
    return tensor
