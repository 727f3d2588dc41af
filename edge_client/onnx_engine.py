"""The `Engine` of a device without torch: it runs the graphs that the server has handed over."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from protocol import Array, RunSettings, Tensors, TrainingDiverged
from storage import AdapterError, ModelError

from .adamw import AdamW
from .data import Batch
from .dropout import dropout_masks
from .part.device_part import DevicePart, TrainingGraphs
from .part.grids import Grid, grids
from .part.head import Head
from .part.reused_memory import Buffer, ReusedMemory
from .part.runtime import Graph, Value, Values, give_back_freed_memory

__all__ = ["OnnxEngine"]

ADAPTER, OPTIMISER = "adapter/", "optimiser/"


class OnnxEngine:
    """
    See `Engine` for what its methods do.

    One graph computes every block: a block's weights and LoRA matrices are inputs like its activations. What backward needs
    is not copied: forward's graph writes it where backward's reads it.

    Raises:
        ModelError: the part is another run's, or cannot be used.
    """

    def __init__(self, part: DevicePart, settings: RunSettings) -> None:
        part.check(settings)
        if settings.precision != "float32":
            raise ModelError(f"the run computes in {settings.precision}, for which a device needs its model and torch")
        self._description, self._runtime, self._smoothing = part.description, part.runtime, settings.label_smoothing
        give_back_freed_memory()  # of reading the data
        self._graphs = part.open()
        adapted, rank = part.description.adapted, part.description.lora_rank
        self._matrices: Tensors = {}
        self._names: list[dict[str, str]] = []
        """Of each block: matrix as the graphs call it, "LAYER.A" or "LAYER.B" -> its name in PEFT folders."""
        for block in range(part.description.cut_layer):
            names = {}
            for layer, (inputs, outputs) in adapted.items():
                for matrix, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                    names[f"{layer}.{matrix}"] = part.description.adapter_name(block, layer, matrix)
                    self._matrices[names[f"{layer}.{matrix}"]] = np.zeros(shape, np.float32)
            self._names.append(names)
        self._adapter = self._values(self._matrices)
        # In rounds of one step the server has the optimiser, for everybody.
        self._optimiser = AdamW(self._matrices, weight_decay=settings.weight_decay) if settings.aggregate_every > 1 else None
        self._memory = ReusedMemory()
        self._kept = [self._kept_of(block) for block in range(len(self._names))] if self._graphs.training else []
        self._gradients: Tensors = {}
        """Of the summed loss; nothing for a matrix that no backward pass has reached."""
        self._awaiting_gradient: deque[_Forward] = deque()
        """What had no `backward` yet."""

    @property
    def num_adapter_elements(self) -> int:
        return sum(matrix.size for matrix in self._matrices.values())

    # A step

    def begin_step(self) -> None:
        self._awaiting_gradient.clear()
        self._gradients.clear()

    def forward(self, batch: Batch, dropout_seed: int) -> Array:
        computed = self._forward(batch, dropout_seed)
        activations = self._finite(batch, self._activations(computed.passes, batch))
        self._awaiting_gradient.append(computed)
        return activations

    def backward(self, gradient: Array) -> None:
        if not self._awaiting_gradient:
            raise RuntimeError("backward() needs a forward() before it")
        computed = self._awaiting_gradient.popleft()
        self._backward(computed.passes, gradient)
        self._memory.give_back(computed.memory)

    def end_step(self, labelled_tokens: int) -> None:
        for gradient in self._gradients.values():
            gradient /= max(1, labelled_tokens)

    def take_step(self, learning_rate: float) -> None:
        if self._optimiser is None:
            raise RuntimeError("in rounds of one step, the server takes it")
        self._optimiser.step(self.gradients(), learning_rate)
        self._gradients.clear()

    def state(self) -> Tensors:
        assert self._optimiser is not None
        adapter = {f"{ADAPTER}{name}": matrix.copy() for name, matrix in self._matrices.items()}
        return {**adapter, **{f"{OPTIMISER}{name}": value for name, value in self._optimiser.state().items()}}

    def restore(self, state: Tensors) -> None:
        assert self._optimiser is not None
        self.load_adapter({name.removeprefix(ADAPTER): value for name, value in state.items() if name.startswith(ADAPTER)})
        self._optimiser.restore(
            {name.removeprefix(OPTIMISER): value for name, value in state.items() if name.startswith(OPTIMISER)}
        )

    def forget(self) -> None:
        assert self._optimiser is not None
        self._optimiser.restore({})

    # The adapter

    def gradients(self) -> Tensors:
        return {name: self._gradients.get(name, np.zeros_like(matrix)) for name, matrix in self._matrices.items()}

    def adapter(self) -> Tensors:
        return dict(self._matrices)

    def load_adapter(self, tensors: Tensors) -> None:
        if tensors.keys() != self._matrices.keys():
            odd = sorted(tensors.keys() ^ self._matrices.keys())
            raise AdapterError(f"adapter does not fit: {odd[0]} and {len(odd) - 1} more are missing or unknown")
        for name, matrix in self._matrices.items():
            if tensors[name].shape != matrix.shape:
                raise AdapterError(f"{name} has shape {list(tensors[name].shape)}, expected {list(matrix.shape)}")
        for name, matrix in self._matrices.items():
            matrix[...] = tensors[name]

    # The head

    def losses_and_gradient(self, hidden: Array, labels: Array) -> tuple[Array, Array]:
        return self._head().losses_and_gradient(hidden, labels, self._smoothing)

    def losses(self, hidden: Array, labels: Array) -> Array:
        return self._head().losses(hidden, labels)

    # Held-out texts

    def infer(self, batch: Batch) -> Array:
        return self._finite(batch, self._activations(self._infer(batch, self._adapter), batch))

    def _head(self) -> Head:
        if self._graphs.head is None:
            raise RuntimeError("the server has the labels, and the head")
        return self._graphs.head

    # The algorithm

    def _forward(self, batch: Batch, dropout_seed: int) -> "_Forward":
        """Run the embedding and every block, and keep what backward needs."""
        passes = self._embed(batch)
        memory = self._memory.take(len(batch.tokens) * sum(sum(widths.values()) for widths in self._kept))
        for block, (weights, adapter) in enumerate(zip(self._graphs.blocks, self._adapter, strict=True)):
            masks = self._masks(dropout_seed, block, len(batch.tokens))
            needed = self._backward_graph(block).inputs
            for each in passes:
                own = {name: self._runtime.value(mask[each.grid.rows]) for name, mask in masks.items()}
                inputs = {"input": each.hidden, **own}
                num_rows = len(each.grid.rows)
                into = {name: self._runtime.value(memory.take(num_rows, width)) for name, width in self._kept[block].items()}
                outputs = self._training.forward.run(
                    {**inputs, **each.layout, **weights, **adapter}, {"output": self._shape(each.grid)}, into
                )
                each.saved.append({name: value for name, value in {**inputs, **outputs}.items() if name in needed})
                each.hidden = outputs["output"]
        return _Forward(passes, memory)

    def _kept_of(self, block: int) -> dict[str, int]:
        """What is kept of a block's forward pass, and its width: the output, and what its backward graph needs."""
        needed = {"output", *self._backward_graph(block).inputs}
        return {name: width for name, width in self._training.forward.widths.items() if name in needed}

    def _infer(self, batch: Batch, adapter: Sequence[Values]) -> "list[_Pass]":
        passes = self._embed(batch)
        for each in passes:
            for weights, matrices in zip(self._graphs.blocks, adapter, strict=True):
                inputs = {"input": each.hidden, **each.layout, **weights, **matrices}
                each.hidden = self._graphs.inference.run(inputs, {"output": self._shape(each.grid)})["output"]
        return passes

    def _activations(self, passes: "list[_Pass]", batch: Batch) -> Array:
        """The rows of all passes in the batch's order, (N, d)."""
        activations: Array = np.empty((len(batch.tokens), self._description.width), np.float32)
        for each in passes:
            activations[each.grid.rows] = each.hidden.numpy()
        return activations

    def _embed(self, batch: Batch) -> "list[_Pass]":
        """The passes of a batch, not a block of them computed yet."""
        passes = []
        for grid in grids(batch.lengths, self._description.width):
            rows = self._graphs.tokens.embed(batch.tokens[grid.rows])
            positions = {"positions": self._runtime.value(grid.positions)}
            inputs = {"rows": self._runtime.value(rows), **positions, **self._graphs.embedding_weights}
            hidden = self._graphs.embedding.run(inputs, {"output": self._shape(grid)})["output"]
            layout = {
                **positions,
                "row_of_cell": self._runtime.value(grid.row_of_cell),
                "cell_of_row": self._runtime.value(grid.cell_of_row),
                "is_token": self._runtime.value(grid.is_token),
            }
            passes.append(_Pass(grid, layout, hidden))
        return passes

    def _backward(self, passes: "list[_Pass]", gradient: Array) -> None:
        """Run every block's backward graph, from the last block to the first, and add to the gradients of its matrices."""
        for each in passes:
            each.hidden = self._runtime.value(gradient[each.grid.rows])
        for block in reversed(range(len(self._names))):
            graph, weights, adapter = self._backward_graph(block), self._graphs.blocks[block], self._adapter[block]
            shapes = {f"gradient:{matrix}": self._matrices[name].shape for matrix, name in self._names[block].items()}
            for each in passes:
                if block:
                    shapes["input_gradient"] = self._shape(each.grid)
                inputs = {"gradient": each.hidden, **each.saved.pop(), **each.layout, **weights, **adapter}
                outputs = graph.run(inputs, shapes)
                self._add_gradients(block, outputs)
                if block:
                    each.hidden = outputs["input_gradient"]

    def _shape(self, grid: Grid) -> tuple[int, int]:
        """Of the hidden states of a grid's rows."""
        return len(grid.rows), self._description.width

    def _backward_graph(self, block: int) -> Graph:
        return self._training.backward if block else self._training.first_backward

    @property
    def _training(self) -> TrainingGraphs:
        if self._graphs.training is None:
            raise RuntimeError("this part learns nothing")
        return self._graphs.training

    def _add_gradients(self, block: int, outputs: Values) -> None:
        for matrix, name in self._names[block].items():
            found = outputs[f"gradient:{matrix}"].numpy()
            if name in self._gradients:
                self._gradients[name] += found
            else:
                self._gradients[name] = found

    def _masks(self, seed: int, block: int, num_rows: int) -> dict[str, Array]:
        """Of a block's layers (N, in), under the names of the graphs' inputs; none in runs without dropout."""
        probability, adapted = self._description.lora_dropout, self._description.adapted
        if not probability:
            return {}
        masks = dropout_masks(seed, block, probability, num_rows, (inputs for inputs, _ in adapted.values()))
        return {f"mask:{layer}": mask for layer, mask in zip(adapted, masks, strict=True)}

    def _finite(self, batch: Batch, activations: Array) -> Array:
        if np.isfinite(activations).all():
            return activations
        nothing = self._values({name: np.zeros_like(matrix) for name, matrix in self._matrices.items()})
        if not np.isfinite(self._activations(self._infer(batch, nothing), batch)).all():
            raise ModelError(
                "the server's part of the model itself, without an adapter, gives activations that are not finite numbers: "
                "its weights are damaged, or too large for the precision; the server needs another copy of the model, or "
                "another model"
            )
        raise TrainingDiverged("this device's activations are no longer finite numbers; try a lower --lr on the server")

    def _values(self, matrices: Tensors) -> list[Values]:
        """Matrices by their names in PEFT folders -> for each block, by the names of the graphs' inputs."""
        return [
            {f"lora:{matrix}": self._runtime.value(matrices[name]) for matrix, name in names.items()} for names in self._names
        ]


@dataclass
class _Pass:
    """The sequences of a batch that share a grid, on their way through the blocks."""

    grid: Grid
    layout: Values
    """The grid as the graphs' inputs."""
    hidden: Value
    """(N', d): the output of the last block that was computed; in the backward pass, the gradient by it."""
    saved: list[dict[str, Value]] = field(default_factory=list)
    """Of each block whose backward pass is still to come: its inputs and intermediate values that this pass needs."""


@dataclass(frozen=True)
class _Forward:
    """A micro-batch between its forward and its backward pass."""

    passes: list[_Pass]
    memory: Buffer
    """In which the blocks' outputs and what they have saved lie."""
