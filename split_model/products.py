"""Products with frozen matrices, by the fastest kernel that torch has for them."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["frozen_linear", "linear", "linear_aligned"]

ALIGNMENT = 64  # elements, whole cache lines in every precision


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """
    x W^T + b, in the dtype of x: (N, in) -> (N, out). The product, and that of its gradient, are in the dtype of W.

    Args:
        weight: W (out, in). It has no gradient, and neither has b (out,), which is of the same dtype.
    """
    return _FrozenLinear.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


class _FrozenLinear(torch.autograd.Function):
    """Nothing is kept for the gradient but the matrix, which is there anyhow."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.weight = weight
        return linear(x.to(weight.dtype), weight, bias).to(x.dtype)

    @staticmethod
    def backward(context: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), weight = upstream, context.weight
        return linear(gradient.to(weight.dtype), weight.T).to(gradient.dtype), None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, which has no gradient here; all of one dtype."""
    if _takes_onednn(x):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return F.linear(x, weight, bias)


def linear_aligned(x: Tensor, weight: Tensor) -> Tensor:
    """
    The same without a bias, for many outputs. Rows are padded to whole cache lines where that is faster: without, an odd
    vocabulary such as GPT-2's makes nearly every row begin within a line, which slows the product and every pass over it.
    """
    if _takes_onednn(x):
        return linear(x, weight)
    outputs = len(weight)
    aligned = x.new_empty(len(x), -(-outputs // ALIGNMENT) * ALIGNMENT)[:, :outputs]
    return torch.mm(x, weight.T, out=aligned)


def _takes_onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and len(x) > 0 and _prefers_onednn()


@cache
def _prefers_onednn() -> bool:
    """
    Whether products of float32 are computed by oneDNN, as those of bfloat16 are anyhow, and not by MKL: where there are
    instructions for 512 bits. MKL uses them on the processors of its maker alone, oneDNN on all, in half the time.
    """
    has_wide_instructions = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_wide_instructions and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
