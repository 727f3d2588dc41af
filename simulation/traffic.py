"""How many bytes a message has on the wire, by formula: the simulation's own arrays are one number wide."""

from dataclasses import dataclass
from typing import NamedTuple

from protocol import (
    ActivationGradient,
    Activations,
    AdapterGradient,
    AdapterWeights,
    Done,
    EdgeAdapter,
    Goodbye,
    Hello,
    Join,
    Message,
    RunEnd,
    Start,
)

__all__ = ["CODECS", "Traffic"]


class BytesOfAnElement(NamedTuple):
    """After zstd: benchmarks/README.md, What a codec costs."""

    activations: float
    gradients: float
    contributions: float = 3.7
    """Of LoRA matrices, in rounds of one step, to the server; in float32 zstd finds little to save."""
    changes: float = 3.7
    """Of the same to the devices."""


CODECS = {
    "float32": BytesOfAnElement(3.29, 3.49),
    "bfloat16": BytesOfAnElement(1.36, 1.49, 0.70, 0.70),
    "int8": BytesOfAnElement(0.90, 0.72, 0.70, 0.54),
    "int4": BytesOfAnElement(0.53, 0.26, 0.46, 0.28),
}
BYTES_OF_A_LABEL = 2.0
OVERHEAD = 300
"""Bytes of a message's names, of WebSocket and of TLS."""


@dataclass(frozen=True)
class Traffic:
    """
    Args:
        tokens: rows of a device's batch, half of which have a label, as in E2E NLG.
        targets: of LoRA: GPT-2's c_attn, which is three times as wide as it is high.
    """

    tokens: int
    micro_batches: int
    width: int
    cut_layer: int
    lora_rank: int
    codec: str

    @property
    def adapter_elements(self) -> int:
        return self.cut_layer * self.lora_rank * (self.width + 3 * self.width)

    def bytes_by_kind(self) -> dict[type[Message], float]:
        of_an_element, rows = CODECS[self.codec], self.tokens / self.micro_batches
        of_adapters: dict[type[Message], float] = {
            AdapterGradient: of_an_element.contributions,
            AdapterWeights: of_an_element.contributions,
            EdgeAdapter: of_an_element.changes,
            **dict.fromkeys((RunEnd, Start), CODECS["float32"].changes),
        }
        return {
            Activations: OVERHEAD + rows * (self.width * of_an_element.activations + BYTES_OF_A_LABEL / 2),
            ActivationGradient: OVERHEAD + rows * self.width * of_an_element.gradients,
            **{kind: OVERHEAD + each * self.adapter_elements for kind, each in of_adapters.items()},
            **dict.fromkeys((Hello, Join, Done, Goodbye), float(OVERHEAD)),
        }
