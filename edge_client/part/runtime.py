"""Runs graphs with onnxruntime. Everything that this package knows of it, for training, is here."""

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from protocol import Array
from storage import ModelError
from terminal import import_onnxruntime

__all__ = ["Graph", "Runtime", "Value", "Values", "give_back_freed_memory", "has_memory_for"]

Value = Any
"""An onnxruntime.OrtValue: an array that onnxruntime uses, or has made, where it lies."""
Values = Mapping[str, Value]
NOTHING: Values = {}
MMAP_THRESHOLD, LARGE_BYTES = -3, 1 << 18
"""The first is glibc's M_MMAP_THRESHOLD."""
CONSTANT_FOLDING = "ConstantFolding"
"""It computes what follows from constants alone while a graph is loaded, in memory that is not the arena's and has no bound."""
FLOAT32 = "tensor(float)"
"""What onnxruntime calls it."""


class Runtime:
    """
    onnxruntime, set up so that all graphs of a process share one arena of memory, which is bounded, and none keeps a core busy
    while it waits.

    Args:
        device: "cpu" or "cuda".

    Raises:
        PackageMissing: there is no onnxruntime.
        ModelError: there is no such device, or this onnxruntime was built without it.
    """

    def __init__(self, device: str) -> None:
        self._onnxruntime = _import_onnxruntime()
        self._device = device
        provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device)
        if provider not in self._onnxruntime.get_available_providers():
            raise ModelError(
                f"--device {device}: onnxruntime {self.version} computes on the CPU alone here; use --device cpu, "
                "or install onnxruntime-gpu in its place"
            )
        self._provider = provider
        _share_arena()

    @property
    def version(self) -> str:
        return str(self._onnxruntime.__version__)

    def value(self, array: Array) -> Value:
        """The array for use in graphs. On the CPU it stays where it is: what is written into the array is seen by graphs."""
        return self._onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device)

    def open(self, name: str, content: bytes) -> "Graph":
        """
        Args:
            name: of the graph, for messages.
            content: of its file.

        Raises:
            ModelError: onnxruntime does not load it.
        """
        options = self._onnxruntime.SessionOptions()
        options.log_severity_level = 4  # the exceptions say what the log would say about errors
        options.intra_op_num_threads = num_threads()
        options.enable_mem_pattern = False  # it plans for one number of rows; every batch has another
        # Weights are inputs: there is nothing that could be packed beforehand. Threads of one graph do not wait for work while
        # another graph runs: on a device of few cores they would be in its way.
        for entry, value in {"use_env_allocators": "1", "intra_op.allow_spinning": "0"}.items():
            options.add_session_config_entry(f"session.{entry}", value)
        with _readable_errors(f"onnxruntime {self.version} does not load {name} of the server's part of the model"):
            session = self._onnxruntime.InferenceSession(
                content, options, providers=[self._provider], disabled_optimizers=[CONSTANT_FOLDING], enable_fallback=0
            )
        return Graph(name, session, self._device)


class Graph:
    """One graph. It has no weights: they are among its inputs."""

    def __init__(self, name: str, session: Any, device: str) -> None:
        self._name, self._session, self._device = name, session, device
        self.inputs = [value.name for value in session.get_inputs()]
        self.outputs = [value.name for value in session.get_outputs()]
        self.widths: dict[str, int] = {
            value.name: value.shape[1]
            for value in session.get_outputs()
            if len(value.shape) == 2 and [type(size) for size in value.shape] == [str, int]
        }
        """Of those outputs that have a row for each of the batch's, (N, width)."""

    def run(self, values: Values, shapes: Mapping[str, tuple[int, ...]], into: Values = NOTHING) -> dict[str, Value]:
        """
        Compute all outputs, which stay where they were computed.

        Args:
            values: the inputs by name; the graph takes those that it has.
            shapes: of the outputs that the caller counts on, all float32.
            into: where outputs are to be written, by name; others get memory of the arena.

        Raises:
            ModelError: an input is missing or does not fit, onnxruntime fails, or an output is another than expected.
        """
        with _readable_errors(f"{self._name} of the server's part of the model cannot be computed"):
            binding = self._session.io_binding()
            for name in self.inputs:
                if name not in values:
                    raise ModelError(f"it asks for {name!r}, which is not there")
                binding.bind_ortvalue_input(name, values[name])
            for name in self.outputs:
                if name in into:
                    binding.bind_ortvalue_output(name, into[name])
                else:
                    binding.bind_output(name, self._device)
            self._session.run_with_iobinding(binding)
            outputs = dict(zip(self.outputs, binding.get_outputs(), strict=True))
            for name, shape in shapes.items():
                if name not in outputs or outputs[name].data_type() != FLOAT32 or tuple(outputs[name].shape()) != shape:
                    raise ModelError(f"it does not compute {name!r} as float32 of shape {list(shape)}")
            return outputs


def num_threads() -> int:
    """Threads that compute: as many as OMP_NUM_THREADS says, as for torch, or as this process has cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_memory() -> int:
    """Bytes that graphs may take, half of what this machine has; 0, which bounds nothing, if the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):  # the first: not a POSIX system
        return 0


def has_memory_for(num_bytes: int) -> bool:
    """To be asked before a server's numbers are allocated: the system itself says no only when it is too late."""
    return num_bytes <= (most_memory() or math.inf)


def give_back_freed_memory() -> None:
    """
    Return to the system what this process has freed: 15 MB after a tokenizer was there and went. From now on, what is as large
    as a message is returned at once. The C library would keep it for later, in gaps that larger values do not fit into: 6 MB.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library other than glibc
            library = ctypes.CDLL(None)
            library.mallopt(MMAP_THRESHOLD, LARGE_BYTES)
            library.malloc_trim(0)


@cache
def _share_arena() -> None:
    """
    The memory of every intermediate value comes from here, and goes back. With an arena for each graph there would be five of
    them, each as large as its graph has ever needed; without any, every value would be memory that the system first fills with
    zeros, which takes a third of a step's time. It grows by few large pieces: values that lie in one leave few gaps.

    It is bounded: with a graph that makes huge values, the server could otherwise fill a device's memory.
    """
    onnxruntime = _import_onnxruntime()
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    strategy = {
        "max_mem": most_memory(),
        "arena_extend_strategy": 0,  # by powers of two
        "initial_chunk_size_bytes": 64 << 20,  # most batches take less; what is not written to takes no room
        "max_dead_bytes_per_chunk": 1 << 16,  # the default is 128 MB: values would get chunks of nearly twice their size
    }
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(strategy))


def _import_onnxruntime() -> Any:
    return import_onnxruntime("training", install="splitlora")


@contextmanager
def _readable_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # onnxruntime's errors have no common type
        raise ModelError(f"{what}: {str(error).strip().partition(chr(10))[0]}") from None
