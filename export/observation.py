"""What the linear layers of a model are given while it reads texts, block by block: calibration asks for it."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphs import Floats, Graph, Weights

from .attention import ATTENTIONS
from .decoder_graph import DecoderGraph
from .errors import ExportError
from .exported_model import empty_cache, open_session
from .precision import PRECISIONS
from .texts import Tokens

if TYPE_CHECKING:  # a graph is built without torch, which split_model imports
    from split_model import ModelConfig

__all__ = ["Observer"]

LayerInputs = dict[tuple[str, ...], Floats]
"""By the names, in the model, of the layers that are given the same, (S, in)."""


class Observer:
    """
    Runs stretches of a model in float32 on the same texts. No more than a stretch's weights are needed at once.

    Args:
        texts: ids (S,) of each.
        attention: a key of `ATTENTIONS`.
        scratch: a folder with room for the largest tensor.

    Raises:
        ExportError: in every method, if the model computes no finite numbers.
    """

    def __init__(self, config: "ModelConfig", texts: Sequence[Tokens], attention: str, scratch: Path) -> None:
        self._config, self._texts, self._attention, self._scratch = config, texts, attention, scratch
        self.num_tokens = sum(map(len, texts))

    def embedded(self, weights: Weights) -> list[Floats]:
        """What the first block is given, (S, d) of each text."""
        return [hidden for hidden, _ in self._run(range(0), weights, [None] * len(self._texts))]

    def block(self, index: int, weights: Weights, hidden: Sequence[Floats]) -> Iterator[tuple[Floats, LayerInputs]]:
        """
        Args:
            hidden: what the block is given, (S, d) of each text.

        Yields:
            Of each text what the next block is given, and what this block's linear layers are given.
        """
        yield from self._run(range(index, index + 1), weights, hidden)

    def _run(self, blocks: range, weights: Weights, hidden: Sequence[Floats | None]) -> Iterator[tuple[Floats, LayerInputs]]:
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            form = ATTENTIONS[self._attention]
            with Graph(Path(folder, "stretch.onnx")) as graph:
                stretch = ObservedStretch(graph, self._config, weights, PRECISIONS["fp32"], self._attention, blocks)
                stretch.build()
                graph.save(self._config.family.model_type, form.opset, form.ir_version)
            session = open_session(graph.path, maps_weights=True)
            layers = {value: tuple(layers) for value, layers in stretch.readers.items()}
            for tokens, given in zip(self._texts, hidden, strict=True):
                values: dict[str, Any] = {
                    "input_ids": tokens[None],
                    "attention_mask": np.ones((1, len(tokens)), np.int64),
                    "position_ids": np.arange(len(tokens))[None],
                    "hidden_states": None if given is None else given[None],
                }
                taken = {item.name: values[item.name] for item in session.get_inputs() if item.name in values}
                found, *inputs = session.run([NEXT, *layers], taken | empty_cache(session, 1))
                if not np.isfinite(found).all():
                    raise ExportError(
                        "while it reads texts, the model in float32 computes what are no finite numbers; "
                        "leave q8 and q4 out of --precision"
                    )
                yield found[0], {readers: given[0] for readers, given in zip(layers.values(), inputs, strict=True)}


NEXT = "next_hidden_states"


class ObservedStretch(DecoderGraph):
    """A stretch of blocks whose linear layers' inputs are outputs, too."""

    def build(self) -> None:
        self.readers: dict[str, list[str]] = {}
        """Of a value, the names of the linear layers that are given it."""
        self.name_output(NEXT, self.sum(*self.stretch()), self.config.width)
        for value, layers in self.readers.items():
            width, _ = self.config.layer_shapes[layers[0].removeprefix(f"{self.config.block_name(self.blocks.start)}.")]
            self.graph.output(value, np.float32, ["batch_size", "sequence_length", width])

    def linear(self, prefix: str, layer: str, x: str) -> str:
        self.readers.setdefault(x, []).append(f"{prefix}.{layer}")
        return super().linear(prefix, layer, x)
