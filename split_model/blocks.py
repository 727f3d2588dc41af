"""The transformer block of GPT-2 in plain torch, on packed batches. N rows, d width, B sequences, T longest, H heads."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .lora import LoraLinear
from .packing import Packing
from .pretrained_model import ModelConfig, PretrainedModel

__all__ = ["Block", "LayerNorm"]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu": F.gelu,
    "relu": F.relu,
}


class LayerNorm(nn.Module):
    """Frozen layer norm over the last dimension."""

    weight: Tensor
    bias: Tensor

    def __init__(self, model: PretrainedModel, name: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.epsilon = model.config.norm_epsilon
        for parameter in ("weight", "bias"):
            value = model.tensor(f"{name}.{parameter}", (model.config.width,)).to(device, dtype)
            self.register_buffer(parameter, value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


class Attention(nn.Module):
    """Causal self-attention, (N, d) -> (N, d); the only place where a batch is padded."""

    def __init__(self, config: ModelConfig, c_attn: LoraLinear, c_proj: LoraLinear) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.c_attn, self.c_proj = c_attn, c_proj

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        grids = packing.pad(self.c_attn(x).to(self.c_attn.weight.dtype))  # (B, T, 3d) each
        mixed = packing.pack([self._attend(grid) for grid in grids])
        return self.c_proj(mixed.to(x.dtype))  # type: ignore[no-any-return]

    def _attend(self, qkv: Tensor) -> Tensor:  # (B, T, 3d) -> (B, T, d)
        heads = (*qkv.shape[:2], self.num_heads, -1)
        query, key, value = (part.view(heads).transpose(1, 2) for part in qkv.chunk(3, 2))  # (B, H, T, d/H)
        # Padding stands after a sequence's end, where no real token looks: the causal mask is all that is needed.
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """Two linear layers with an activation between, (N, d) -> (N, d)."""

    def __init__(self, config: ModelConfig, c_fc: LoraLinear, c_proj: LoraLinear) -> None:
        super().__init__()
        self.activation = ACTIVATION_FUNCTIONS[config.activation]
        self.c_fc, self.c_proj = c_fc, c_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """
    One pre-norm transformer block, read from the checkpoint.

    Args:
        index: which block of the whole model.
        weight_dtype: of the frozen matrices and of the products with them.
        dtype: of the norms and of everything between the products.
    """

    def __init__(
        self, model: PretrainedModel, index: int, weight_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.index = index
        linear = {}
        for layer, shape in model.config.layer_shapes.items():
            weight = model.tensor(f"h.{index}.{layer}.weight", shape).to(device, weight_dtype)
            bias = model.tensor(f"h.{index}.{layer}.bias", shape[1:]).to(device, weight_dtype)
            linear[layer] = LoraLinear(weight, bias)
        self.norm_1 = LayerNorm(model, f"h.{index}.ln_1", dtype, device)
        self.attention = Attention(model.config, linear["attn.c_attn"], linear["attn.c_proj"])
        self.norm_2 = LayerNorm(model, f"h.{index}.ln_2", dtype, device)
        self.mlp = MLP(model.config, linear["mlp.c_fc"], linear["mlp.c_proj"])

    def linear_layers(self) -> dict[str, LoraLinear]:
        """The four linear layers under the names of `ModelConfig.layer_shapes`."""
        return {
            "attn.c_attn": self.attention.c_attn,
            "attn.c_proj": self.attention.c_proj,
            "mlp.c_fc": self.mlp.c_fc,
            "mlp.c_proj": self.mlp.c_proj,
        }

    def forward(self, x: Tensor, packing: Packing) -> Tensor:  # (N, d) -> (N, d)
        x = x + self.attention(self.norm_1(x), packing)
        return x + self.mlp(self.norm_2(x))  # type: ignore[no-any-return]
