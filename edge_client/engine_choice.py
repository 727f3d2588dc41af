"""Which engine computes a device's part of the model. Imports no engine."""

import ctypes
import functools
from importlib.util import find_spec

from protocol import RunSettings
from storage import ModelError

__all__ = ["DEVICES", "ENGINES", "ONNXRUNTIME", "TORCH", "choose_engine"]

AUTO, ONNXRUNTIME, TORCH = "auto", "onnxruntime", "torch"
ENGINES = (AUTO, ONNXRUNTIME, TORCH)
DEVICES = (AUTO, "cpu", "cuda")
CUDA_DRIVERS = ("libcuda.so.1", "nvcuda.dll")


def choose_engine(
    asked: str, *, has_model: bool, device: str, dtype: str, settings: RunSettings, edge_weights: str, before: str | None
) -> tuple[str, str]:
    """
    ONNXRUNTIME or TORCH, and why.

    Args:
        asked: one of ENGINES.
        has_model: whether this device has the base model itself; torch computes with no other.
        device: where to compute: "auto", "cpu" or "cuda".
        dtype: in which precision the user wants the frozen weights: "auto" or its name.
        edge_weights: the precision of the part that the server hands over; empty where it hands over none.
        before: the engine with which this device was in the run before it was stopped; None if it was not.

    Raises:
        ModelError: no engine, or not the one that is asked for, can compute what is asked for.
    """
    if asked == TORCH:
        return TORCH, "as asked for"
    why_not = _why_no_onnxruntime(dtype, settings, edge_weights)
    if why_not:
        if asked == ONNXRUNTIME or not has_model:
            remedy = "use --engine torch" if has_model else "give --model, which the torch engine computes with"
            raise ModelError(f"onnxruntime cannot compute what is asked for: {why_not}; {remedy}")
        return TORCH, why_not
    if asked == ONNXRUNTIME:
        return ONNXRUNTIME, "as asked for"
    if before == ONNXRUNTIME or (before == TORCH and has_model):
        return before, "as before this device was stopped"
    if not has_model:
        return ONNXRUNTIME, "this device has no model of its own"
    if device != "cpu" and finds_cuda():
        return TORCH, "this device has CUDA"
    return ONNXRUNTIME, "on a CPU it is the faster one"


def _why_no_onnxruntime(dtype: str, settings: RunSettings, edge_weights: str) -> str:
    if settings.precision != "float32":
        return f"the run is in {settings.precision}"
    if not edge_weights:
        return "the server hands over no part of its model"
    if dtype not in ("auto", edge_weights):
        return f"the server hands over weights in {edge_weights}, and --dtype is {dtype}"
    return ""


@functools.cache
def finds_cuda() -> bool:
    """Whether torch is installed and finds a CUDA device. It is imported only where there is a driver: that takes seconds."""
    if find_spec("torch") is None or not any(map(_loads, CUDA_DRIVERS)):
        return False
    import torch

    return torch.cuda.is_available()


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
