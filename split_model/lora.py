"""Low-rank adapters on frozen linear layers (LoRA, arXiv 2106.09685)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from storage import AdapterError

from .dropout import SeededDropout
from .model_config import ModelConfig
from .products import add_frozen_linear, frozen_linear

__all__ = ["Adapter", "LoraConfig", "adapter_shapes", "initial_adapter"]

Adapter = dict[str, Tensor]
"""LoRA matrices under the names PEFT gives them in the whole model; A is (r, in), B is (out, r)."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which layers are adapted, and how. The update of a layer is (alpha / rank) B A."""

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.0
    """Probability of zeroing an input element of A during training."""
    rslora: bool = False
    """Rank-stabilised (arXiv 2312.03732): the update is (alpha / sqrt(rank)) B A."""
    targets: tuple[str, ...]
    """The last components of layers' names, as PEFT matches target_modules; `ModelConfig.lora_targets` lists a family's."""
    first_block: int = 0
    """No block before this one has an adapter."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise AdapterError(f"LoRA rank must be at least 1, got {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise AdapterError(f"LoRA alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"LoRA dropout must be in [0, 1), got {self.dropout}")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def adapted_layers(config: ModelConfig, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    """
    Of an adapted block's linear layers, those with an adapter: name in the block -> (in, out), in the forward pass' order.

    Raises:
        AdapterError: a target is no layer of this family, or there is no target.
    """
    known = config.lora_targets
    unknown = [target for target in lora.targets if target not in known]
    if unknown or not lora.targets:
        raise AdapterError(f"LoRA targets must be among {', '.join(known)}; got {', '.join(unknown) or 'none'}")
    return {layer: shape for layer, shape in config.layer_shapes.items() if layer.rpartition(".")[2] in lora.targets}


def adapter_name(config: ModelConfig, block: int, layer: str, matrix: str) -> str:
    """PEFT's name of ``matrix`` ("A" or "B") of a block's layer in the whole model."""
    return f"base_model.model.{config.stored_name(config.block_name(block))}.{layer}.lora_{matrix}.weight"


def adapter_shapes(config: ModelConfig, lora: LoraConfig, blocks: range) -> dict[str, tuple[int, int]]:
    """
    Name and shape of every adapter matrix of the given blocks, in the order of the forward pass: A is (r, in), B is (out, r).

    Raises:
        AdapterError: as `adapted_layers`.
    """
    layers, shapes = adapted_layers(config, lora), {}
    for block in blocks[max(0, lora.first_block - blocks.start) :]:
        for layer, (inputs, outputs) in layers.items():
            shapes[adapter_name(config, block, layer, "A")] = (lora.rank, inputs)
            shapes[adapter_name(config, block, layer, "B")] = (outputs, lora.rank)
    return shapes


def initial_adapter(config: ModelConfig, lora: LoraConfig, seed: int) -> Adapter:
    """A fresh adapter of the whole model, drawn as PEFT draws it: A Kaiming-uniform with a = sqrt(5), B zero. float32."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, shape in adapter_shapes(config, lora, range(config.num_layers)).items():
        adapter[name] = torch.zeros(shape)
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(adapter[name], a=math.sqrt(5), generator=generator)
    return adapter


class LoraLinear(nn.Module):
    """
    y = x W + b + scale * dropout(x) A^T B^T. W (in, out) and b (out,), where there is one, are frozen and in
    `Placement.weight_dtype`; A (r, in) and B (out, r), where there are any, learn and are in `Placement.dtype`; x (N, in) and
    y (N, out) are in `Placement.residual`.

    Args:
        weight: W, or W^T unless it is stored as (in, out).
    """

    weight: Tensor
    bias: Tensor | None
    columns: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, *, stores_in_out: bool) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.stores_in_out = stores_in_out
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.is_adapted = True
        """Whether the matrices, where there are any, take part."""

    def adapt(self, lora: LoraConfig, dropout: SeededDropout, dtype: torch.dtype) -> dict[str, nn.Parameter]:
        """Add the matrices, zero until an adapter's values are loaded, and return A (r, in) and B (out, r)."""
        inputs, outputs = self.matrix.shape
        self.scale, self.dropout = lora.scale, dropout
        self.register_buffer("columns", dropout.add_columns(inputs), persistent=False)
        self.lora_A = nn.Parameter(torch.zeros(lora.rank, inputs, dtype=dtype, device=self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, lora.rank, dtype=dtype, device=self.weight.device))
        return {"A": self.lora_A, "B": self.lora_B}

    @property
    def matrix(self) -> Tensor:
        """W, (in, out)."""
        return self.weight if self.stores_in_out else self.weight.T

    @property
    def takes_part(self) -> bool:
        """Whether A and B do."""
        return self.lora_A is not None and self.is_adapted

    def read(self, x: Tensor) -> Tensor:
        """What A is given, (N, in): x itself if nothing is dropped."""
        return self.dropout(x, self.columns) if self.takes_part else x

    def forward(self, x: Tensor) -> Tensor:  # (N, in) -> (N, out)
        return side_by_side([self], x)[0]


def side_by_side(layers: Sequence[LoraLinear], x: Tensor) -> tuple[Tensor, ...]:
    """What each of these layers makes of the same x: (N, in) -> (N, out), each in memory of its own."""
    reads = [layer.read(x) for layer in layers]
    if all(read is x for read in reads):
        return _outputs(layers, x, x)
    return tuple(_outputs([layer], x, read)[0] for layer, read in zip(layers, reads, strict=True))


def _outputs(layers: Sequence[LoraLinear], x: Tensor, read: Tensor) -> tuple[Tensor, ...]:
    adapted = [layer for layer in layers if layer.takes_part]
    matrices = [*(layer.lora_A for layer in adapted), *(layer.lora_B for layer in adapted)]
    return _SideBySide.apply(x, read, *matrices, layers)  # type: ignore[no-any-return, no-untyped-call]


class _SideBySide(torch.autograd.Function):
    """
    A and B stay in float32, whatever W is in: what a step changes of them is smaller than what bfloat16 can tell apart. All A
    are multiplied at once, and sums are made by the products themselves, for what so small a rank costs is passes over (N, in)
    and (N, out).
    """

    @staticmethod
    def forward(context: Any, x: Tensor, read: Tensor, *others: Any) -> tuple[Tensor, ...]:
        *matrices, layers = others
        context.reads_x = read is x
        context.frozen = [layer.matrix.T for layer in layers]
        outputs = [frozen_linear(x, frozen, layer.bias) for frozen, layer in zip(context.frozen, layers, strict=True)]
        context.adapted = [(number, layer.scale) for number, layer in enumerate(layers) if layer.takes_part]
        if context.adapted:
            number_of_each = len(context.adapted)
            all_a = torch.cat(matrices[:number_of_each]).to(x.dtype)  # (R, in)
            each_b = [b.to(x.dtype) for b in matrices[number_of_each:]]
            low_rank = read @ all_a.T  # (N, R)
            for (number, scale), b, part in zip(context.adapted, each_b, _divided(low_rank, each_b), strict=True):
                outputs[number].addmm_(part, b.T, alpha=scale)
            context.save_for_backward(read, low_rank, all_a, *each_b)
        return tuple(outputs)

    @staticmethod
    def backward(context: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        wants_x, wants_read, *_ = context.needs_input_grad
        of_x = of_read = None
        if wants_x:
            of_x = frozen_linear(upstream[0], context.frozen[0].T)
            for gradient, frozen in zip(upstream[1:], context.frozen[1:], strict=True):
                add_frozen_linear(of_x, gradient, frozen.T)
        if not context.adapted:
            return of_x, None, None  # the last of them is by the layers
        read, low_rank, all_a, *each_b = context.saved_tensors
        of_low_rank, of_each_b = torch.empty_like(low_rank), []
        for (number, scale), b, part, of_part in zip(
            context.adapted, each_b, _divided(low_rank, each_b), _divided(of_low_rank, each_b), strict=True
        ):
            torch.mm(upstream[number], b, out=of_part).mul_(scale)
            of_each_b.append((part.T @ upstream[number]).mul_(scale).T)  # several times as fast as its transpose's product
        of_each_a = (of_low_rank.T @ read).split([b.shape[1] for b in each_b])
        if of_x is not None and context.reads_x:
            of_x.addmm_(of_low_rank, all_a)
        elif wants_read:
            of_read = of_low_rank @ all_a
        return of_x, of_read, *of_each_a, *of_each_b, None


def _divided(low_rank: Tensor, each_b: list[Tensor]) -> tuple[Tensor, ...]:
    """Each layer's columns of what all A make together."""
    return torch.split(low_rank, [b.shape[1] for b in each_b], 1)
