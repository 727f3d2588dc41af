"""Which device computes, and in which precision."""

import time

import torch

from .errors import ModelError

__all__ = ["DTYPES", "choose_device", "choose_dtype", "working_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def choose_device(name: str) -> torch.device:
    """
    "auto" is CUDA where there is a CUDA device.

    Raises:
        ModelError: "cuda" without one.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ModelError(f"device must be auto, cpu or cuda; got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the frozen weights. "auto" is bfloat16 where products in it are clearly faster, else float32."""
    if name != "auto":
        if name not in DTYPES:
            raise ModelError(f"dtype must be auto, {', '.join(DTYPES)}; got {name!r}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _product_seconds(torch.float32) > 1.5 * _product_seconds(torch.bfloat16) else torch.float32


def working_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype of everything that is not a frozen matrix: norms, residual stream, adapters, what is sent."""
    return torch.float64 if weight_dtype == torch.float64 else torch.float32


def _product_seconds(dtype: torch.dtype) -> float:
    # A CPU without bfloat16 instructions takes a hundred times longer, one with them a third: 1 ms decides.
    a, b = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    fastest = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        fastest = min(fastest, time.perf_counter() - start)
    return fastest
