"""A device's part of the model, opened from the server's files."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from protocol import RunSettings
from storage import HEAD_WEIGHTS, Folder, ModelError, PartDescription, load_tokenizer

from .graph_inspection import MOST_GRAPH_BYTES, inspect_graph
from .head import Head
from .runtime import Graph, Runtime, Value, Values, has_memory_for
from .token_table import TokenTable
from .weights_file import WeightsFile

__all__ = ["DevicePart", "Graphs"]


class DevicePart:
    """
    The files of a part. Its graphs are loaded when `open` is called; the weights' pages come into memory when graphs use them.

    Args:
        files: under the names of `PartDescription`. Each is what the server's manifest says.
        device: "cpu" or "cuda".

    Raises:
        PackageMissing: there is no onnxruntime.
        ModelError: a file is missing or cannot be used.
    """

    def __init__(self, files: Path | Folder, device: str = "cpu") -> None:
        self.files = files if isinstance(files, Folder) else Folder(files, ModelError)
        self.runtime = Runtime(device)
        self.description = PartDescription.read(self.files, onnxruntime=self.runtime.version)

    def tokenizer(self) -> Tokenizer:
        """
        Raises:
            ModelError: there is none, or it cannot be read.
        """
        return load_tokenizer(self.files)

    def check(self, settings: RunSettings) -> None:
        """
        Raises:
            ModelError: the part is one of other settings, or this device has no memory for the adapter of its blocks.
        """
        found = self.description
        targets = {layer.rpartition(".")[2] for layer in found.adapted}
        wanted = set(settings.lora_targets if settings.trains_edge else ())
        for name, of_part, of_run in (
            ("cut layer", found.cut_layer, settings.cut_layer),
            ("LoRA rank", found.lora_rank, settings.lora_rank),
            ("LoRA alpha", found.lora_alpha, settings.lora_alpha),
            ("LoRA dropout", found.lora_dropout, settings.lora_dropout),
            ("labels on the", "device" if found.head else "server", settings.labels),
            ("LoRA targets", *(", ".join(sorted(names)) or "none" for names in (targets, wanted))),
        ):
            if of_part != of_run:
                raise ModelError(
                    f"{self.files.path} has {name} {of_part}, the run has {of_run}; the server has to hand this run's part over"
                )
        num_floats = found.cut_layer * found.lora_rank * sum(map(sum, found.adapted.values()))
        if not has_memory_for(4 * num_floats):
            raise ModelError(
                f"{self.files.path} has LoRA matrices of {4 * num_floats / 1e6:,.0f} MB, for which this device has no memory; "
                "use a smaller --lora-rank on the server"
            )

    def open(self) -> "Graphs":
        """
        Load the graphs, and map the weights.

        Raises:
            ModelError: a file is missing or is not what its name says, or a graph has what no graph of a part needs.
        """

        def graph(name: str) -> Graph:
            path = self.files.require(f"{name}.onnx")
            try:
                with path.open("rb") as file:
                    content = file.read(MOST_GRAPH_BYTES + 1)
            except OSError as error:
                raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None
            inspect_graph(content, f"{name}.onnx")
            return self.runtime.open(f"{name}.onnx", content)

        embedding, *blocks = (WeightsFile(self.files.require(name)) for name in self.description.weight_files)
        tokens, head = TokenTable(embedding, self.description), None
        if self.description.head:
            is_tied = self.description.head != HEAD_WEIGHTS
            table = tokens if is_tied else TokenTable(WeightsFile(self.files.require(HEAD_WEIGHTS)), self.description)
            head = Head(self.runtime, table, graph("head"), graph("head_loss"))
        return Graphs(
            tokens=tokens,
            embedding=graph("embedding"),
            embedding_weights=self._mapped(embedding, embedding.names - TokenTable.NAMES),
            inference=graph("inference"),
            training=TrainingGraphs(graph("forward"), graph("backward"), graph("first_backward"))
            if self.description.adapted
            else None,
            blocks=[self._mapped(block, block.names) for block in blocks],
            head=head,
        )

    def _mapped(self, weights: WeightsFile, names: frozenset[str]) -> dict[str, Value]:
        return {f"weight:{name}": self.runtime.value(weights.map(name)) for name in names}


@dataclass(frozen=True)
class TrainingGraphs:
    """What computes a part that learns something."""

    forward: Graph
    """A block's output, and what backward needs of what was computed on the way."""
    backward: Graph
    """The gradients of a block's LoRA matrices, and of its input."""
    first_backward: Graph
    """The same of block 0, whose input nobody asks the gradient of."""


@dataclass(frozen=True, kw_only=True)
class Graphs:
    """What computes a part; see PROTOCOL.md for their inputs and outputs. The weights are values for `Graph.run`."""

    tokens: "TokenTable"
    embedding: Graph
    embedding_weights: Values
    inference: Graph
    """A block's output alone, without dropout."""
    training: TrainingGraphs | None
    """None where the part learns nothing."""
    blocks: list[Values]
    """Each block's weights."""
    head: Head | None
    """Where the labels are on the device."""
