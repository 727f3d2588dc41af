"""The modules of a model, whatever its family: a block, the embedding and the norms, in plain torch on packed batches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .lora import LoraLinear, side_by_side
from .model_config import ModelConfig
from .packing import Numbers, Packing, Places
from .placement import Placement
from .rotary import Rotation, rotate
from .stored_tensors import StoredTensors
from .transfer import copied_to

__all__ = ["ACTIVATIONS", "Block", "Embedding", "final_norm"]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}
"""By transformers' names."""


class LayerNorm(nn.Module):
    """Frozen layer norm over the last dimension; computed in `Placement.dtype` whatever it is given."""

    weight: Tensor
    bias: Tensor

    def __init__(self, config: ModelConfig, tensors: StoredTensors, name: str, placement: Placement) -> None:
        super().__init__()
        self.epsilon = config.norm_epsilon
        for parameter in ("weight", "bias"):
            self.register_buffer(parameter, _vector(tensors, f"{name}.{parameter}", placement), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.bias, self.epsilon).to(x.dtype)


class RMSNorm(nn.Module):
    """Frozen root mean square norm over the last dimension (arXiv 1910.07467); computed in `Placement.dtype` as well."""

    weight: Tensor

    def __init__(self, config: ModelConfig, tensors: StoredTensors, name: str, placement: Placement) -> None:
        super().__init__()
        self.epsilon = config.norm_epsilon
        self.register_buffer("weight", _vector(tensors, f"{name}.weight", placement), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _RootMeanSquareNorm.apply(x.to(self.weight.dtype), self.weight, self.epsilon)  # type: ignore[no-untyped-call]
        return y.to(x.dtype)


class _RootMeanSquareNorm(torch.autograd.Function):
    """In half of the passes over the rows that torch's takes on the CPU, in both directions."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norms.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()  # 1 / r, with r^2 = mean(x^2) + epsilon
        context.save_for_backward(x, scale)
        context.weight = weight
        return x.mul(scale).mul_(weight)

    @staticmethod
    def backward(context: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        # y = weight x / r; the gradient is g / r - x mean(g x) / r^3, with g = upstream weight.
        x, scale = context.saved_tensors
        gradient = upstream[0] * context.weight
        along = (gradient * x).mean(-1, keepdim=True) * scale.square()
        return gradient.addcmul_(x, along, value=-1).mul_(scale), None, None


def _vector(tensors: StoredTensors, name: str, placement: Placement) -> Tensor:
    return tensors[name].view().to(placement.device, placement.dtype)


def _norm(config: ModelConfig, tensors: StoredTensors, name: str, placement: Placement) -> nn.Module:
    kind = LayerNorm if config.has_layer_norms else RMSNorm
    return kind(config, tensors, name, placement)


class Block(nn.Module):
    """
    One pre-norm transformer block, (N, d) -> (N, d). Its modules have the paths that the family gives them, so that a linear
    layer is found by its name; what each of them is for is told by `Names`.
    """

    def __init__(
        self, config: ModelConfig, tensors: StoredTensors, index: int, placement: Placement, rotation: Rotation
    ) -> None:
        super().__init__()
        names, prefix = config.names, config.block_name(index)
        self.layers: dict[str, LoraLinear] = {}
        """By the names of `ModelConfig.layer_shapes`."""
        for layer in config.layer_shapes:
            matrix = tensors[f"{prefix}.{layer}.weight"].view().to(placement.device, placement.weight_dtype)
            bias = None
            if layer not in config.without_bias:
                bias = tensors[f"{prefix}.{layer}.bias"].view().to(placement.device, placement.weight_dtype)
            self.layers[layer] = LoraLinear(matrix, bias, stores_in_out=config.family.stores_in_out)
            self.add_module(layer.replace(".", "_"), self.layers[layer])

        def norm(name: str) -> nn.Module:
            return _norm(config, tensors, f"{prefix}.{name}", placement)

        def linear(*layers: str) -> list[LoraLinear]:
            return [self.layers[layer] for layer in layers]

        self.attention_norm, self.mlp_norm = norm(names.attention_norm), norm(names.mlp_norm)
        self.query_norm = norm(names.query_norm) if config.normalises_heads else None
        self.key_norm = norm(names.key_norm) if config.normalises_heads else None
        self._qkv, (self._projection,) = linear(*names.qkv), linear(names.projection)
        self._up, (self._down,) = linear(*names.up), linear(names.down)
        self._widths, self._head_width = [config.query_width, config.key_width, config.key_width], config.head_width
        self._inner_widths = [config.inner_width] * 2
        self._activation, self._is_gated = ACTIVATIONS[config.activation], config.is_gated
        self._window, self._rotation = config.window(index), rotation

    def forward(self, x: Tensor, packing: Packing, kept: Places | None = None) -> Tensor:
        """
        (N, d) -> (N, d).

        Args:
            kept: the rows that are asked for, if not all are: (M, d). What they see are all.
        """
        mixed = self.attention(self.attention_norm(x), packing)
        if kept is not None:
            mixed, x = kept.take(mixed), kept.take(x)
        x = self._projection(mixed).add_(x)
        return self.mlp(self.mlp_norm(x)).add_(x)

    def attention(self, x: Tensor, packing: Packing) -> Tensor:
        """Causal self-attention, before its projection: (N, d) -> (N, H D)."""
        outputs = _divided(side_by_side(self._qkv, x), self._widths)
        query, key, value = (each.view(len(x), -1, self._head_width) for each in outputs)  # (N, H, D), twice (N, K, D)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if tables := self._rotation.tables(packing):
            query, key = rotate(query, tables), rotate(key, tables)
        # On a CUDA device queries, keys and values are rounded to the dtype of the weights, as the inputs of every other large
        # product are: only so is there a kernel of packed rows. On the CPU attention in bfloat16 takes several times as long.
        dtype = self._projection.weight.dtype if x.is_cuda else x.dtype
        mixed = packing.attend(query.to(dtype), key.to(dtype), value.to(dtype), self._window)
        return mixed.to(x.dtype)

    def mlp(self, x: Tensor) -> Tensor:
        """(N, d) -> (N, d)."""
        if not self._is_gated:
            return self._down(self._activation(self._up[0](x)))  # type: ignore[no-any-return]
        gate, inner = _divided(side_by_side(self._up, x), self._inner_widths)
        return self._down(self._activation(gate) * inner)  # type: ignore[no-any-return]


def _divided(outputs: tuple[Tensor, ...], widths: list[int]) -> tuple[Tensor, ...]:
    """The outputs of several layers, or of one layer what it makes for all of them."""
    return torch.split(outputs[0], widths, 1) if len(outputs) == 1 else outputs


class Embedding(nn.Module):
    """
    The tokens' embeddings, and where the model has a table of positions, these added. Of the tokens' table, only the rows that
    a batch uses are read.
    """

    def __init__(self, config: ModelConfig, tensors: StoredTensors, placement: Placement) -> None:
        super().__init__()
        self.placement = placement
        self.tokens = tensors[config.table_name].rows()
        self.positions = tensors[config.positions_name].view() if config.rotary is None else None

    def forward(self, tokens: Numbers, packing: Packing) -> Tensor:  # (N,) on the host -> (N, d) on the device
        # Rows are looked up on the CPU, where the tables' file is.
        dtype = self.placement.dtype
        rows = self.tokens.gather(tokens).to(dtype)
        if self.positions is not None:
            rows = rows + F.embedding(torch.from_numpy(packing.positions), self.positions).to(dtype)
        return copied_to(self.placement.device, rows)


def final_norm(config: ModelConfig, tensors: StoredTensors, placement: Placement) -> nn.Module:
    """(M, d) -> (M, d), for the M rows that go on to the LM head."""
    return _norm(config, tensors, config.names.final_norm, placement)
