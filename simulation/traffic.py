"""How many bytes a message has on the wire, by formula: the simulation's own arrays are one number wide."""

from dataclasses import dataclass

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

CODECS = {"float32": (3.29, 3.49), "bfloat16": (1.36, 1.49), "int8": (0.90, 0.94), "int4": (0.40, 0.43)}
"""Bytes of an element of activations, and of their gradients, after zstd: benchmarks/README.md, What a codec costs."""
BYTES_OF_A_WEIGHT = 3.7
"""Of an adapter, in float32 after zstd, which finds little to save in them."""
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

    @property
    def adapter_bytes(self) -> float:
        return OVERHEAD + BYTES_OF_A_WEIGHT * self.adapter_elements

    def bytes_by_kind(self) -> dict[type[Message], float]:
        activation, gradient = CODECS[self.codec]
        rows = self.tokens / self.micro_batches
        adapter = self.adapter_bytes
        return {
            Activations: OVERHEAD + rows * (self.width * activation + BYTES_OF_A_LABEL / 2),
            ActivationGradient: OVERHEAD + rows * self.width * gradient,
            **dict.fromkeys((AdapterGradient, AdapterWeights, EdgeAdapter, RunEnd, Start), adapter),
            **dict.fromkeys((Hello, Join, Done, Goodbye), float(OVERHEAD)),
        }
