"""
A CUDA device that computes nothing, on a machine without one: torch's fake tensors know their shapes, types and devices alone.

An operator that mixes devices, or whose result's shape depends on numbers that only the device knows, fails there as it should.
`Watch` adds what such tensors let pass although a real device makes the host wait for it.

Where results are read, ones are read. What the streams are told is written down.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy.typing
import pytest
import torch
import torch.utils.deterministic
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from split_model import stored_tensors, transfer

CUDA = torch.device("cuda", 0)


class HostWaits(AssertionError):
    """An operator makes the host wait for the device, or takes tensors of both."""


class Watch(TorchDispatchMode):
    """In this context operators keep to one device, and only copies that wait for nothing go from one to another."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device, on_host = [tensor for tensor in given if tensor.is_cuda], [tensor for tensor in given if not tensor.is_cuda]
        if operator is torch.ops.aten._to_copy.default:
            self._check_copy(operator, result, given[0], (kwargs or {}).get("non_blocking", False))
        elif operator is torch.ops.aten.copy_.default:
            self._check_copy(operator, given[0], given[1], len(args) > 2 and args[2])
        elif on_device and any(tensor.dim() for tensor in on_host):
            raise HostWaits(f"{operator} takes {[(list(tensor.shape), tensor.device.type) for tensor in given]}")
        return result

    def _check_copy(self, operator: Any, copy: Tensor, original: Tensor, waits_for_nothing: bool) -> None:
        if original.is_cuda != copy.is_cuda and not waits_for_nothing:
            raise HostWaits(
                f"{operator} of {list(original.shape)} from {original.device} to {copy.device} waits for the device"
            )


class Stream:
    """Stands for a CUDA stream."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said

    def wait_stream(self, other: "Stream") -> None:
        self.said.append(f"{self.name} waits for {other.name}")


class Event:
    """Stands for a CUDA event."""

    def __init__(self, said: list[str]) -> None:
        self.said = said

    def record(self, stream: Stream) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        self.said.append(f"the host waits for {self.stream.name}")


@contextmanager
def fake_cuda() -> Iterator[list[str]]:
    """In this context parts can be made on `CUDA`, whose tensors and those of the CPU are fake. Gives what streams are told."""
    give_a_guard_to_cuda()
    said: list[str] = []
    copying, computing = Stream("copying", said), Stream("computing", said)
    now = [computing]

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        now.append(stream)
        yield
        now.pop()

    def kept(tensor: Tensor, stream: Stream) -> None:
        said.append(f"memory is kept for {stream.name}")

    with (
        settings_of_the_process_restored(),
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        pytest.MonkeyPatch.context() as patch,
    ):

        def from_disk(read: Callable[..., Tensor]) -> Callable[..., FakeTensor]:
            def fake(*arguments: Any) -> FakeTensor:
                with unset_fake_temporarily():
                    real = read(*arguments)
                return mode.from_tensor(real)

            return fake

        for kind, method in ((stored_tensors.StoredTensor, "view"), (stored_tensors.Rows, "gather")):
            patch.setattr(kind, method, from_disk(getattr(kind, method)))
        patch.setattr(transfer, "_is_cuda", lambda device: device.type == "cuda")

        to_numpy, empty = Tensor.numpy, torch.empty

        def ones(tensor: Tensor) -> numpy.typing.NDArray[Any]:
            if tensor.is_cuda:
                raise HostWaits(f"values of {list(tensor.shape)} that are on the device are taken for numbers of the host")
            with unset_fake_temporarily():
                return to_numpy(torch.ones(tensor.shape, dtype=tensor.dtype))

        patch.setattr(Tensor, "numpy", ones)
        patch.setattr(torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))
        patch.setattr(torch.cuda, "Event", lambda blocking: Event(said))
        patch.setattr(torch.cuda, "Stream", lambda device: copying)
        patch.setattr(torch.cuda, "stream", on)
        patch.setattr(torch.cuda, "current_stream", lambda device: now[-1])
        patch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
        patch.setattr(Tensor, "record_stream", kept)
        patch.setattr(torch.autograd, "backward", backward)
        # Of a number of the CPU, by which AdamW counts its steps.
        patch.setattr(sys.modules["torch.optim.adam"], "_get_value", count_on_the_host)
        yield said


@contextmanager
def settings_of_the_process_restored() -> Iterator[None]:
    """Those that a part on CUDA makes for the whole process."""
    workspace, precision = os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None), torch.get_float32_matmul_precision()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        yield
    finally:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        if workspace is not None:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace
        torch.set_float32_matmul_precision(precision)
        torch.set_deterministic_debug_mode("default")
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


def give_a_guard_to_cuda() -> None:
    """A torch without CUDA refuses even slices on such a device. It gets the guard of the meta device, which does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * 16).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # numbers of c10::DeviceType
    registry[cuda] = registry[cuda] or registry[meta]


def count_on_the_host(steps: Tensor) -> float:
    assert not steps.is_cuda
    return 1.0


def backward(tensors: Tensor | Sequence[Tensor], gradients: Tensor | None = None) -> None:
    """
    `torch.autograd.backward` of one tensor, in Python and in this thread: torch's own asks the device for its streams. Every
    gradient has the shape, type and device of what it is a gradient by, which torch's own sees to as well.
    """
    (root,) = (tensors,) if isinstance(tensors, Tensor) else tensors
    assert root.grad_fn is not None
    came: dict[Any, dict[int, Tensor]] = {}
    add(came, root.grad_fn, root.output_nr, torch.ones_like(root) if gradients is None else gradients)
    with torch.no_grad():
        for node in in_order(root.grad_fn):
            if node in came:
                arguments = came.pop(node)
                of_outputs = [arguments.get(number) for number in range(len(node._input_metadata))]
                results = (node.apply if hasattr(node, "apply") else node)(*of_outputs)
                results = results if isinstance(results, tuple) else (results,)
                # What follows are gradients by arguments that are no tensors.
                assert not any(gradient is not None for gradient in results[len(node.next_functions) :])
                for (before, number), gradient in zip(node.next_functions, results, strict=False):
                    if before is not None and gradient is not None:
                        add(came, before, number, gradient)


def add(came: dict[Any, dict[int, Tensor]], node: Any, number: int, gradient: Tensor) -> None:
    expected = node._input_metadata[number]
    assert gradient.device == expected.device, f"the gradient of {node} is on {gradient.device}"
    gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
    of_node = came.setdefault(node, {})
    of_node[number] = of_node[number] + gradient if number in of_node else gradient


def in_order(root: Any) -> list[Any]:
    """Every function of a graph before those that it leads to."""
    found, left = [], {root: iter(root.next_functions)}
    seen = {root}
    while left:
        node, following = next(reversed(left.items()))
        other = next((other for other, _ in following if other is not None and other not in seen), None)
        if other is None:
            found.append(node)
            del left[node]
        else:
            seen.add(other)
            left[other] = iter(other.next_functions)
    return found[::-1]
