"""Low-rank adapters on frozen linear layers (LoRA, arXiv 2106.09685)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from storage import AdapterError

from .pretrained_model import ModelConfig

__all__ = ["Adapter", "LoraConfig", "adapter_shapes", "initial_adapter"]

Adapter = dict[str, Tensor]
"""LoRA matrices under the names PEFT gives them in the whole model; A is (r, in), B is (out, r)."""

LAYERS_OF_TARGET = {"c_attn": ("attn.c_attn",), "c_proj": ("attn.c_proj", "mlp.c_proj"), "c_fc": ("mlp.c_fc",)}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which layers are adapted, and how. The update of a layer is (alpha / rank) B A."""

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.0
    """Probability of zeroing an input element of A during training."""
    targets: tuple[str, ...] = ("c_attn",)
    """Any of c_attn, c_proj (both of attention and of the MLP, as in PEFT) and c_fc."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise AdapterError(f"LoRA rank must be at least 1, got {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise AdapterError(f"LoRA alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"LoRA dropout must be in [0, 1), got {self.dropout}")
        unknown = [target for target in self.targets if target not in LAYERS_OF_TARGET]
        if unknown or not self.targets:
            raise AdapterError(f"LoRA targets must be among {', '.join(LAYERS_OF_TARGET)}; got {', '.join(unknown) or 'none'}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def adapts(self, layer: str) -> bool:
        """Whether the layer, such as "attn.c_attn", has an adapter."""
        return any(layer in LAYERS_OF_TARGET[target] for target in self.targets)


def adapter_name(block: int, layer: str, matrix: str) -> str:
    """PEFT's name of ``matrix`` ("A" or "B") of a layer in the whole model."""
    return f"base_model.model.transformer.h.{block}.{layer}.lora_{matrix}.weight"


def adapter_shapes(config: ModelConfig, lora: LoraConfig, blocks: range) -> dict[str, tuple[int, int]]:
    """Name and shape of every adapter matrix of the given blocks, in the order of the forward pass."""
    shapes = {}
    for block in blocks:
        for layer, (inputs, outputs) in config.layer_shapes.items():
            if lora.adapts(layer):
                shapes[adapter_name(block, layer, "A")] = (lora.rank, inputs)
                shapes[adapter_name(block, layer, "B")] = (outputs, lora.rank)
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


class SeededDropout(nn.Module):
    """Dropout whose masks are a function of a seed alone, so that a repeated step draws the same ones."""

    def __init__(self, probability: float, device: torch.device) -> None:
        super().__init__()
        self.probability = probability
        self.generator = torch.Generator(device)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.probability:
            return x
        keep = 1 - self.probability
        return x * torch.empty_like(x).bernoulli_(keep, generator=self.generator) / keep


class LoraLinear(nn.Module):
    """y = x W + b + scale * dropout(x) A^T B^T. W (in, out) and b are frozen; A and B, where there are any, learn."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.is_adapted = True
        """Whether the matrices, where there are any, take part."""

    def adapt(self, lora: LoraConfig, dropout: SeededDropout, dtype: torch.dtype) -> dict[str, nn.Parameter]:
        """Add the matrices, empty: their values come with an adapter. Gives A and B."""
        inputs, outputs = self.weight.shape
        self.scale, self.dropout = lora.scale, dropout
        self.lora_A = nn.Parameter(torch.zeros(lora.rank, inputs, dtype=dtype, device=self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, lora.rank, dtype=dtype, device=self.weight.device))
        return {"A": self.lora_A, "B": self.lora_B}

    def forward(self, x: Tensor) -> Tensor:  # (N, in) -> (N, out)
        y = torch.addmm(self.bias, x.to(self.weight.dtype), self.weight).to(x.dtype)
        if self.lora_A is None or self.lora_B is None or not self.is_adapted:
            return y
        low_rank = self.dropout(x) @ self.lora_A.T  # (N, r)
        return y.addmm_(low_rank, self.lora_B.T, alpha=self.scale)
