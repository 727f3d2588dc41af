"""
How numbers come to the device that computes, and back to the host.

A CUDA device works through what it was given while the host goes on. It is waited for once, when results are read; everything
before is copied from and into pinned memory, which the device reaches by itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Uploads", "copied_to", "read_back"]


def copied_to(device: torch.device, tensor: Tensor) -> Tensor:
    """A tensor of the CPU on a device, without waiting for what the device has still to do before."""
    if _is_cuda(device):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def read_back(*tensors: Tensor) -> list[NDArray[Any]]:
    """The values of tensors. Those of a CUDA device are waited for together; those of the CPU are the same, not copies."""
    device = next((tensor.device for tensor in tensors if _is_cuda(tensor.device)), None)
    if device is None:
        return [tensor.detach().cpu().numpy() for tensor in tensors]
    read = [
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor.detach(), non_blocking=True)
        if tensor.is_cuda
        else tensor.detach()
        for tensor in tensors
    ]
    is_there = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # waits without taking a core
    is_there.record(torch.cuda.current_stream(device))
    is_there.synchronize()
    return [tensor.numpy() for tensor in read]


class Uploads:
    """Copies to a device. On CUDA they have a stream of their own, so they go on beside what is computed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if _is_cuda(device) else None  # type: ignore[no-untyped-call]

    def joined(self, arrays: Sequence[NDArray[Any]]) -> Tensor:
        """The arrays one after the other along their first axis, on the device; what is computed next there waits for them."""
        tensors = [torch.from_numpy(array) for array in arrays]
        if self._stream is None:
            return torch.cat(tensors).to(self._device)
        with torch.cuda.stream(self._stream):
            rows = [len(tensor) for tensor in tensors]
            joined = torch.empty((sum(rows), *tensors[0].shape[1:]), dtype=tensors[0].dtype, device=self._device)
            for part, tensor in zip(torch.split(joined, rows), tensors, strict=True):
                part.copy_(tensor.pin_memory(), non_blocking=True)
        computes = torch.cuda.current_stream(self._device)
        computes.wait_stream(self._stream)
        joined.record_stream(computes)  # so that its memory is not given away before it has been used there
        return joined


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available()
