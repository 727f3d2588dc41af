"""Products with frozen matrices, by the fastest kernel that torch has for them."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["bfloat16_pays", "frozen_linear", "linear", "linear_aligned"]

ALIGNMENT = 64  # elements, whole cache lines in every precision
CONVERTED_AT_ONCE = 1 << 22
"""Elements of a bfloat16 matrix that are in float32 at a time: 16 MiB."""
FEW_ROWS = 16
"""To convert a matrix for so few rows takes longer than their slower product."""


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
    if _is_faster_in_float32(x):
        y = _linear_in_float32(x, weight)
        return (y if bias is None else y.add_(bias)).to(x.dtype)
    if _takes_onednn(x):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return F.linear(x, weight, bias)


def linear_aligned(x: Tensor, weight: Tensor) -> Tensor:
    """
    The same without a bias, for many outputs. Rows are padded to whole cache lines where that is faster: without, an odd
    vocabulary such as GPT-2's makes nearly every row begin within a line, which slows the product and every pass over it.
    """
    if _takes_onednn(x) or _is_faster_in_float32(x):
        return linear(x, weight)
    return torch.mm(x, weight.T, out=_aligned(x, len(weight)))


def _linear_in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """A product of bfloat16 matrices before it is rounded. Weights are converted some outputs at a time, into one buffer."""
    x, outputs = x.float(), len(weight)
    y = _aligned(x, outputs)
    step = max(1, CONVERTED_AT_ONCE // weight.shape[1])
    buffer = torch.empty_like(weight[:step], dtype=torch.float32)
    for start in range(0, outputs, step):
        part = weight[start : start + step]
        torch.mm(x, buffer[: len(part)].copy_(part).T, out=y[:, start : start + step])
    return y


def _aligned(x: Tensor, outputs: int) -> Tensor:
    """Uninitialised, (N, outputs) for x (N, in), in its dtype; every row begins with a cache line."""
    return x.new_empty(len(x), -(-outputs // ALIGNMENT) * ALIGNMENT)[:, :outputs]


def _is_faster_in_float32(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and len(x) > FEW_ROWS and not _has_fast_bfloat16()


def bfloat16_pays() -> tuple[bool, str]:
    """
    Whether this processor multiplies matrices of bfloat16 faster than matrices of float32, and why. torch is asked what the
    processor has, and no speed is measured: a measurement could come out otherwise on a busy machine, and results with it.
    """
    has = _capabilities()
    if not has:
        return False, f"torch {torch.__version__} does not say whether this processor has instructions for bfloat16"
    if not (has.get("amx_bf16") or has.get("avx512_bf16") or has.get("bf16")):  # of x86, and of ARM
        return False, "this processor has no instructions for bfloat16"
    # Processors with both are made to multiply bfloat16 by AMX. Where a virtual machine hides that, what is left of their
    # instructions for bfloat16 reaches half of the speed of float32.
    if has.get("avx512_fp16") and not has.get("amx_bf16"):
        return False, "this processor's instructions for bfloat16 are slower than those for float32"
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False, "this torch is built without oneDNN, whose products in bfloat16 are the fast ones"
    return True, "this processor has instructions for it"


@cache
def _has_fast_bfloat16() -> bool:
    return bfloat16_pays()[0]


def _capabilities() -> Mapping[str, object]:
    """Of the processor; empty where torch is older than 2.10: what it cannot say is not guessed."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def _takes_onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and len(x) > 0 and _prefers_onednn()


@cache
def _prefers_onednn() -> bool:
    """
    Whether products of float32 are computed by oneDNN, as those of bfloat16 are anyhow, and not by MKL: on processors with
    instructions for 512 bits that are not Intel's. MKL uses these on its maker's alone, and is the faster there; oneDNN uses
    them on all, and takes half of MKL's time. The operator is torch's own, made for its compiler; a torch that has it no more
    computes by MKL.
    """
    has_wide_instructions = torch.backends.cpu.get_cpu_capability() == "AVX512"
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    has_operator = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_wide_instructions and has_onednn and has_operator and "Intel" not in str(_capabilities().get("cpu_name"))
