"""
GPT-2 as it is exported: its graph, its weights equalised, and how transformers describes it.

B sequences, S new tokens of each, d width.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from graphs import Floats, Weights

from ..attention import Cache
from ..decoder_graph import DecoderGraph
from ..equalisation import balance
from .family import ExportFamily

if TYPE_CHECKING:  # a graph is built without torch, which split_model imports
    from split_model import ModelConfig

__all__ = ["FAMILY"]

ACTIVATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "gelu": ("Gelu", {}),
    "relu": ("Relu", {}),
}


class GPT2Graph(DecoderGraph):
    """The forward pass, in its order."""

    def embeddings(self) -> str:
        self.token_inputs()
        positions = self.graph.input("position_ids", np.int64, ["batch_size", "sequence_length"])
        with self.graph.scope("embeddings"):
            return self.node(
                "Add", self.embedded(self.inputs), self.node("Gather", self.weights.plain("wpe.weight"), positions)
            )

    def block(self, name: str, x: str, cache: Cache) -> str:
        x = self.node("Add", x, self.self_attention(f"{name}.attn", self.norm(f"{name}.ln_1", x), cache))
        return self.node("Add", x, self.mlp(f"{name}.mlp", self.norm(f"{name}.ln_2", x)))

    def self_attention(self, name: str, x: str, cache: Cache) -> str:
        qkv = self.linear(f"{name}.c_attn", x, self.precision.matrices)  # (B, S, 3 d)
        with self.graph.scope(name):
            mixed = self.attention.attend(qkv, cache)
        return self.linear(f"{name}.c_proj", mixed, self.precision.projection)

    def mlp(self, name: str, x: str) -> str:
        operator, attributes = ACTIVATIONS[self.config.activation]
        inner = self.node(operator, self.linear(f"{name}.c_fc", x, self.precision.matrices), **attributes)
        return self.linear(f"{name}.c_proj", inner, self.precision.matrices)

    def final_norm(self, x: str) -> str:
        return self.norm("ln_f", x)

    def norm(self, name: str, x: str) -> str:
        with self.graph.scope(name):
            parameters = self.weights.plain(f"{name}.weight"), self.weights.plain(f"{name}.bias")
            return self.node("LayerNormalization", x, *parameters, axis=-1, epsilon=self.config.norm_epsilon)


NORM_OF_LAYER = {"attn.c_attn": "ln_1", "mlp.c_fc": "ln_2"}
LAYER_OF_NORM = {norm: layer for layer, norm in NORM_OF_LAYER.items()}


class EqualisedGPT2:
    """
    The same model with other weights, see `export.equalisation`. c_attn and c_fc follow a norm, whose gain and offset take the
    factors. The input of attention's c_proj is linear in the values, so the last third of c_attn's columns takes them.
    """

    def __init__(self, weights: Weights, config: "ModelConfig") -> None:
        self._weights, self._config = weights, config
        self._of_norm = lru_cache(maxsize=None)(self._factors_of_norm)
        self._of_values = lru_cache(maxsize=None)(self._factors_of_values)

    def read(self, name: str) -> Floats:
        tensor = self._weights.read(name)
        if not name.startswith("h."):
            return tensor
        _, index, part = name.split(".", 2)
        layer, parameter = part.rsplit(".", 1)
        if layer in LAYER_OF_NORM:
            return tensor / self.rows(f"h.{index}.{LAYER_OF_NORM[layer]}")
        if parameter == "bias":
            return tensor * self.columns(f"h.{index}.{layer}")
        return self.rows(f"h.{index}.{layer}")[:, None] * tensor * self.columns(f"h.{index}.{layer}")

    def rows(self, layer: str) -> Floats:
        _, index, part = layer.split(".", 2)
        if part in NORM_OF_LAYER:
            return self._of_norm(layer, f"h.{index}.{NORM_OF_LAYER[part]}")
        if part == "attn.c_proj":
            return self._of_values(f"h.{index}.attn")
        return np.ones(self._config.layer_shapes[part][0], np.float32)

    def columns(self, layer: str) -> Floats:
        _, index, part = layer.split(".", 2)
        factors = np.ones(self._config.layer_shapes[part][1], np.float32)
        if part == "attn.c_attn":
            factors[2 * self._config.width :] /= self._of_values(f"h.{index}.attn")
        return factors

    def _factors_of_norm(self, layer: str, norm: str) -> Floats:  # -> (d,)
        return balance(self._size_of_normed(norm), self._weights.read(f"{layer}.weight"))

    def _factors_of_values(self, attention: str) -> Floats:  # -> (d,)
        norm = self._size_of_normed(attention.replace(".attn", ".ln_1"))
        values = self._weights.read(f"{attention}.c_attn.weight")[:, 2 * self._config.width :]  # (d, d)
        bias = self._weights.read(f"{attention}.c_attn.bias")[2 * self._config.width :]
        with np.errstate(over="ignore"):
            size = np.sqrt(norm**2 @ values**2 + bias**2)
        return balance(size, self._weights.read(f"{attention}.c_proj.weight"))

    def _size_of_normed(self, norm: str) -> Floats:  # -> (d,)
        # A normed element has mean 0 and variance 1: times the gain, and around the offset, this is its root mean square.
        gain, offset = (self._weights.read(f"{norm}.{parameter}") for parameter in ("weight", "bias"))
        size: Floats = np.sqrt(gain**2 + offset**2)
        return size


def _settings(config: "ModelConfig") -> dict[str, Any]:
    return {
        "n_layer": config.num_layers,
        "n_embd": config.width,
        "n_head": config.num_heads,
        "n_inner": config.inner_width,
        "n_positions": config.num_positions,
        "vocab_size": config.vocabulary_size,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": config.activation,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": config.end_token,
        "eos_token_id": config.end_token,
    }


def _other_modules(config: "ModelConfig") -> list[str]:
    inner = ("", ".ln_1", ".attn", ".attn.attn_dropout", ".attn.resid_dropout", ".ln_2", ".mlp", ".mlp.act", ".mlp.dropout")
    outer = ("transformer", *(f"transformer.{name}" for name in ("wte", "wpe", "drop", "h", "ln_f")), "lm_head")
    return [*outer, *(f"transformer.h.{block}{name}" for block in range(config.num_layers) for name in inner)]


FAMILY = ExportFamily(
    graph=GPT2Graph,
    equalised=EqualisedGPT2,
    architecture="GPT2LMHeadModel",
    settings=_settings,
    position_keys=("n_positions", "n_ctx"),
    other_modules=_other_modules,
)
