"""Which device computes, and in which precision."""

import os
from dataclasses import dataclass

import torch
import torch.utils.deterministic

from storage import ModelError

from .products import bfloat16_pays

__all__ = ["DTYPES", "Placement", "choose_device", "choose_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

KEPT_PRODUCTS = "64"
"""Of oneDNN's; see `Placement.prepare`."""


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


def choose_dtype(name: str, device: torch.device) -> tuple[str, str]:
    """
    The dtype of the frozen weights, one of DTYPES, and why.

    "auto" is bfloat16 where a GPU has instructions for it, or where it pays on the CPU, see `bfloat16_pays`; else float32.

    Raises:
        ModelError: there is no such dtype.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ModelError(f"dtype must be auto, {', '.join(DTYPES)}; got {name!r}")
        return name, "as asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "this GPU has instructions for it"
        return "float32", "this GPU has no instructions for bfloat16"
    pays, why = bfloat16_pays()
    return "bfloat16" if pays else "float32", why


@dataclass(frozen=True)
class Placement:
    """Where a part of a model computes, and in which numbers."""

    weight_dtype: torch.dtype
    """Of the frozen matrices, and of the products with them."""
    device: torch.device
    in_bfloat16: bool = False
    """Whether what flows through the blocks is in bfloat16 as well; see `residual`."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what is not a frozen matrix: adapters and their gradients, norms, loss, what is sent."""
        return torch.float64 if self.weight_dtype == torch.float64 else torch.float32

    @property
    def residual(self) -> torch.dtype:
        """
        Of the residual stream, of all that lies between two layers of a block, and of the products with adapters. In bfloat16 a
        third less is kept between the passes; each block then rounds the stream twice, to 8 bits.
        """
        return torch.bfloat16 if self.in_bfloat16 else self.dtype

    def prepare(self) -> None:
        """
        On a CUDA device, for the whole process: the same numbers give the same result, and products of float32 are in float32.

        Where torch knows a slower way to a result that does not change from run to run, it takes that: of what is computed here
        in attention's backward pass alone. What it knows none for it refuses, and nothing here needs that. TF32, which keeps
        11 bits of 24, is off, whatever an environment variable of an image says.

        On the CPU, oneDNN keeps the code that it has made for each number of rows. Of packed batches nearly every one has
        another number, so that it would keep up to 1,024 of them; a step needs a dozen, block after block.
        """
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KEPT_PRODUCTS)  # it reads this when it begins
        if self.device.type == "cuda":
            # cuBLAS reads it when it begins: with a workspace of fixed size its results do not depend on what else goes on.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            # What torch.use_deterministic_algorithms sets, without loading the compiler's own settings, which takes seconds.
            torch.set_deterministic_debug_mode("error")
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time
            torch.set_float32_matmul_precision("highest")
