"""GPT-2: its configuration, the names of its tensors, and its modules in plain torch on packed batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from storage import ModelError, shown

from ..lora import LoraLinear
from ..model_config import ConfigFile, ModelConfig
from ..packing import Numbers, Packing
from ..placement import Placement
from ..stored_tensors import StoredTensors
from ..transfer import copied_to
from .family import Family

__all__ = ["FAMILY", "GPT2Config"]

ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""Other names that transformers takes for a GPT-2's settings."""
MOST_LAYERS = 10_000


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu": F.gelu,
    "relu": F.relu,
}


@dataclass(frozen=True, kw_only=True)
class GPT2Config(ModelConfig):
    """The shape of a GPT-2."""

    model_type: ClassVar[str] = "gpt2"
    title: ClassVar[str] = "GPT-2"
    prefix: ClassVar[str] = "transformer."
    blocks: ClassVar[str] = "h"
    table_name: ClassVar[str] = "wte.weight"
    separate_head_name: ClassVar[str] = "lm_head.weight"
    stores_in_out: ClassVar[bool] = True

    @property
    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        d, inner = self.width, self.inner_width
        return {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, inner), "mlp.c_proj": (inner, d)}

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        table, norm = (self.vocabulary_size, self.width), (self.width,)
        shapes: dict[str, tuple[int, ...]] = {"wte.weight": table, "wpe.weight": (self.num_positions, self.width)}
        for block in map(self.block_name, range(self.num_layers)):
            for name in ("ln_1", "ln_2"):
                shapes |= {f"{block}.{name}.weight": norm, f"{block}.{name}.bias": norm}
            for name, shape in self.layer_shapes.items():
                shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[1:]}
        shapes |= {"ln_f.weight": norm, "ln_f.bias": norm}
        return shapes if self.tied_head else shapes | {"lm_head.weight": table}

    @classmethod
    def read(cls, file: ConfigFile) -> "GPT2Config":
        file.rename(ALIASES)
        file.check_support("scale_attn_by_inverse_layer_idx")
        if not file.boolean("scale_attn_weights", True):
            raise ModelError(f"{file.path}: attention without scale_attn_weights is not supported")
        config = cls(
            num_layers=file.integer("n_layer", most=MOST_LAYERS),
            width=(width := file.integer("n_embd")),
            num_heads=file.integer("n_head"),
            inner_width=4 * width if file.has_null("n_inner") else file.integer("n_inner"),
            num_positions=file.integer("n_ctx" if file.has_null("n_positions") else "n_positions"),
            vocabulary_size=file.integer("vocab_size"),
            norm_epsilon=file.number("layer_norm_epsilon", 1e-5),
            activation=file.text("activation_function", "gelu_new"),
            tied_head=file.boolean("tie_word_embeddings", True),
            end_token=file.integer("eos_token_id", 50256, least=0),
        )
        if config.end_token >= config.vocabulary_size:
            raise ModelError(f"{file.path}: eos_token_id {config.end_token} is not below vocab_size {config.vocabulary_size}")
        if config.activation not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise ModelError(f"{file.path}: activation_function is {shown(config.activation)}; it can be {names}")
        if config.width % config.num_heads:
            raise ModelError(f"{file.path}: n_embd {config.width} is not a multiple of n_head {config.num_heads}")
        return config


class LayerNorm(nn.Module):
    """Frozen layer norm over the last dimension, (N, d) -> (N, d); computed in `Placement.dtype` whatever it is given."""

    weight: Tensor
    bias: Tensor

    def __init__(self, config: ModelConfig, tensors: StoredTensors, name: str, placement: Placement) -> None:
        super().__init__()
        self.epsilon = config.norm_epsilon
        for parameter in ("weight", "bias"):
            value = tensors[f"{name}.{parameter}"].view().to(placement.device, placement.dtype)
            self.register_buffer(parameter, value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.bias, self.epsilon).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention of H heads, (N, d) -> (N, d)."""

    def __init__(self, num_heads: int, c_attn: LoraLinear, c_proj: LoraLinear) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.c_attn, self.c_proj = c_attn, c_proj

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        # Queries, keys and values are rounded to the dtype of the weights, as the inputs of every other large product are:
        # with bfloat16 weights, attention, too, then runs on the processor's instructions for bfloat16.
        mixed = packing.attend(self.c_attn(x).to(self.c_attn.weight.dtype), self.num_heads)
        return self.c_proj(mixed.to(x.dtype))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two linear layers with an activation between, (N, d) -> (N, d)."""

    def __init__(self, activation: Callable[[Tensor], Tensor], c_fc: LoraLinear, c_proj: LoraLinear) -> None:
        super().__init__()
        self.activation = activation
        self.c_fc, self.c_proj = c_fc, c_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ModelConfig, tensors: StoredTensors, index: int, placement: Placement) -> None:
        super().__init__()
        name, linear = config.block_name(index), {}
        for layer in config.layer_shapes:
            weight, bias = (tensors[f"{name}.{layer}.{parameter}"].view() for parameter in ("weight", "bias"))
            where = placement.device, placement.weight_dtype
            linear[layer] = LoraLinear(weight.to(*where), bias.to(*where))
        self.ln_1 = LayerNorm(config, tensors, f"{name}.ln_1", placement)
        self.attn = Attention(config.num_heads, linear["attn.c_attn"], linear["attn.c_proj"])
        self.ln_2 = LayerNorm(config, tensors, f"{name}.ln_2", placement)
        self.mlp = MLP(ACTIVATIONS[config.activation], linear["mlp.c_fc"], linear["mlp.c_proj"])

    def forward(self, x: Tensor, packing: Packing) -> Tensor:  # (N, d) -> (N, d)
        x = x + self.attn(self.ln_1(x), packing)
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class Embedding(nn.Module):
    """Token and position embeddings, added. Of the tokens' table, only the rows that a batch uses are read."""

    def __init__(self, config: ModelConfig, tensors: StoredTensors, placement: Placement) -> None:
        super().__init__()
        self.placement = placement
        self.tokens = tensors["wte.weight"].rows()
        self.positions = tensors["wpe.weight"].view()

    def forward(self, tokens: Numbers, packing: Packing) -> Tensor:  # (N,) -> (N, d)
        positions = F.embedding(torch.from_numpy(packing.positions), self.positions)
        # Rows are looked up on the CPU, where the tables' file is.
        dtype = self.placement.dtype
        return copied_to(self.placement.device, self.tokens.gather(tokens).to(dtype) + positions.to(dtype))


def _final_norm(config: ModelConfig, tensors: StoredTensors, placement: Placement) -> LayerNorm:
    return LayerNorm(config, tensors, "ln_f", placement)


FAMILY = Family(config=GPT2Config, block=Block, embedding=Embedding, final_norm=_final_norm)
