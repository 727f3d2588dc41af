"""
Frozen weights divided over several processes, each of which has the whole for a block at a time while it computes.

Sharding is torch's own (FSDP2, `fully_shard`). Nothing else is divided: norms and biases are small, and every process has all
of the adapter, whose gradients are not touched here. This file alone imports torch.distributed, which not every torch has.
"""

import ctypes
import platform

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

__all__ = ["Sharding"]

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
LARGE = 8 * 2**20
"""Bytes of a tensor. The smaller, the more comes and goes page by page, which takes time: at 1 MB a third of a short step."""


class Sharding:
    """
    Args:
        group: the processes. All of them shard the same modules in the same order, and call these equally often.
        device: where each of them computes.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self._mesh = DeviceMesh.from_group(group, device.type)
        if device.type == "cpu":
            _return_what_is_freed()

    def shard(self, module: nn.Module, *, again_in_backward: bool = True) -> None:
        """
        Keep only this process' part of the rows of each frozen matrix of the module, but for what is sharded already.

        Args:
            module: its frozen matrices are buffers; they become parameters, since these are what is sharded.
            again_in_backward: whether they are needed in a backward pass, too.
        """
        for part in module.modules():
            for name, buffer in list(part.named_buffers(recurse=False)):
                if buffer.dim() == 2:
                    delattr(part, name)
                    part.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
        trained = {parameter for parameter in module.parameters() if parameter.requires_grad}
        sharded: FSDPModule = fully_shard(module, mesh=self._mesh, reshard_after_forward=True, ignored_params=trained)
        sharded.set_unshard_in_backward(again_in_backward)


def _return_what_is_freed() -> None:
    """
    Give what is freed of large tensors back to the system at once. By default glibc soon keeps everything below 32 MB for what
    is allocated next. But activations, which stay until the backward pass, are allocated between weights, which come and go,
    and leave gaps too small for the next weights: a process with half of a model then takes more memory than with all.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)
