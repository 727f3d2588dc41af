"""
GPT-2's block and embedding.

N rows of a packed batch, d elements a row, of which an MLP makes `inner_width`, 4 d as a rule.
"""

from typing import TYPE_CHECKING

import numpy as np

from ..activations import ACTIVATIONS
from ..layers import CausalAttention, LayerNorm, Linear
from ..matrix_formats import MatrixFormat
from ..part_graph import PartGraph
from .family import PartFamily

if TYPE_CHECKING:  # a graph is built without torch, which split_model imports
    from split_model import ModelConfig

__all__ = ["FAMILY"]


class GPT2Block:
    """
        x -> ln_1 -> attn.c_attn -> attention -> attn.c_proj -> + x = middle
        middle -> ln_2 -> mlp.c_fc -> activation -> mlp.c_proj -> + middle = output

    Kept for the backward pass, in bytes of each row, and in MB of 468 rows of GPT-2 small (d = 768):

        x       the block's input, which the block before has made     4 d     1.4
        qkv     attn.c_attn's output                                  12 d     4.3
        middle  between attention and MLP                              4 d     1.4
        inner   mlp.c_fc's output                                     16 d     5.8

    Everything else is computed again: both norms, attention's probabilities and what they mix, and the activation cost a tenth
    of the products with the matrices, and would be as much again to keep.
    """

    def __init__(self, graph: PartGraph, config: "ModelConfig", form: MatrixFormat) -> None:
        self.graph, self.width, self.inner_width = graph, config.width, config.inner_width
        linear = {name: Linear(graph, name, shape, form) for name, shape in config.layer_shapes.items()}
        self.c_attn, self.attention_projection = linear["attn.c_attn"], linear["attn.c_proj"]
        self.c_fc, self.mlp_projection = linear["mlp.c_fc"], linear["mlp.c_proj"]
        self.ln_1, self.ln_2 = (LayerNorm(graph, name, config.width, config.norm_epsilon) for name in ("ln_1", "ln_2"))
        self.attention = CausalAttention(graph, config.width, config.num_heads)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: str) -> str:
        qkv = self.graph.keep("qkv", self.c_attn.forward(self.ln_1.forward(x)), 3 * self.width)
        mixed = self.attention_projection.forward(self.attention.forward(qkv))
        middle = self.graph.keep("middle", self.graph.node("Add", mixed, x), self.width)
        inner = self.graph.keep("inner", self.c_fc.forward(self.ln_2.forward(middle)), self.inner_width)
        return self.graph.node("Add", self.mlp_projection.forward(self.activation.function(self.graph, inner)), middle)

    def backward(self, x: str, dy: str) -> str:
        qkv, middle = self.graph.kept("qkv", 3 * self.width), self.graph.kept("middle", self.width)
        inner = self.graph.kept("inner", self.inner_width)
        d_active = self.mlp_projection.backward(self.activation.function(self.graph, inner), dy)
        d_inner = self.graph.node("Mul", d_active, self.activation.derivative(self.graph, inner))
        d_normed = self.c_fc.backward(self.ln_2.forward(middle), d_inner)
        d_middle = self.graph.node("Add", self.ln_2.backward(middle, d_normed), dy)
        d_mixed = self.attention_projection.backward(self.attention.forward(qkv), d_middle)
        d_qkv = self.attention.backward(qkv, d_mixed)
        d_normed = self.c_attn.backward(self.ln_1.forward(x), d_qkv)
        return self.graph.node("Add", self.ln_1.backward(x, d_normed), d_middle)


def _embedding(graph: PartGraph, config: "ModelConfig", tokens: str) -> str:
    table = graph.weight_input("wpe.weight", np.float32, [config.num_positions, config.width])
    return graph.node("Add", tokens, graph.node("Gather", table, graph.given("positions", np.int64, ["rows"])))


FAMILY = PartFamily(block=GPT2Block, embedding=_embedding, embedding_tensors=("wpe.weight",))
