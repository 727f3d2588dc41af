"""Products with frozen matrices, by the fastest kernel that torch has for them."""

import threading
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["add_frozen_linear", "bfloat16_pays", "frozen_linear", "frozen_linear_aligned"]

ALIGNMENT = 64  # elements, whole cache lines in every precision
CONVERTED_AT_ONCE = 1 << 22
"""Elements of a bfloat16 matrix that are in float32 at a time: 16 MiB."""
FEW_ROWS = 16
"""To convert a matrix for so few rows takes longer than their slower product."""


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """
    x W^T + b, (N, in) -> (N, out), in the dtype of x; without a gradient. The product is in the dtype of W, to which x and it
    are rounded. Where float32 is faster, a product with bfloat16 is in float32, and nothing is rounded but W.
    """
    if _is_faster_in_float32(x, weight):
        y = _multiply_in_float32(x, weight, torch.empty(len(x), len(weight)))
        return (y if bias is None else y.add_(bias)).to(x.dtype)
    rounded = x.to(weight.dtype)
    if _takes_onednn(rounded):
        y = torch.ops.mkldnn._linear_pointwise(rounded, weight, bias, "none", [], "")
    else:
        y = F.linear(rounded, weight, bias)
    return y.to(x.dtype)


def frozen_linear_aligned(x: Tensor, weight: Tensor) -> Tensor:
    """
    The same without a bias, for many outputs. Rows are padded to whole cache lines where that is faster: without, an odd
    vocabulary such as GPT-2's makes nearly every row begin within a line, which slows the product and every pass over it.
    """
    if _is_faster_in_float32(x, weight):
        return _multiply_in_float32(x, weight, _aligned(len(x), len(weight), x.float())).to(x.dtype)
    rounded = x.to(weight.dtype)
    if _takes_onednn(rounded):
        return frozen_linear(x, weight)
    return torch.mm(rounded, weight.T, out=_aligned(len(x), len(weight), rounded)).to(x.dtype)


def add_frozen_linear(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add x W^T to y (N, out), in place."""
    if x.dtype == y.dtype == weight.dtype and not _is_faster_in_float32(x, weight) and not _takes_onednn(x):
        y.addmm_(x, weight.T)
    else:
        y.add_(frozen_linear(x, weight))


def _multiply_in_float32(x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    """x W^T into y (N, out), which is of float32. W is converted some outputs at a time."""
    x = x.float()
    step = max(1, CONVERTED_AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), step):
        part = weight[start : start + step]
        torch.mm(x, _converted.to_float32(part).T, out=y[:, start : start + step])
    return y


class _Converted(threading.local):
    """The part of a matrix that is in float32 now: always in the same memory, since new memory costs a twelfth of a product."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def to_float32(self, part: Tensor) -> Tensor:
        """Until the next, in this thread; laid out as the part is."""
        if self._memory.numel() < part.numel():
            self._memory = torch.empty(max(part.numel(), CONVERTED_AT_ONCE))
        memory = self._memory[: part.numel()]
        is_transposed = part.stride(0) < part.stride(1)
        return (memory.view(part.T.shape).T if is_transposed else memory.view(part.shape)).copy_(part)


_converted = _Converted()


def _aligned(rows: int, outputs: int, like: Tensor) -> Tensor:
    """Uninitialised, (rows, outputs), in the dtype and on the device of another; every row begins with a cache line."""
    return like.new_empty(rows, -(-outputs // ALIGNMENT) * ALIGNMENT)[:, :outputs]


def _is_faster_in_float32(x: Tensor, weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and x.device.type == "cpu" and len(x) > FEW_ROWS and not _has_fast_bfloat16()


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
