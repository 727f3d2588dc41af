"""Runs exported graphs, token after token. The only file of this room that knows onnxruntime."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage import shown
from storage.fingerprint import NO_MODEL
from terminal import PackageMissing, import_onnxruntime

from .exported_model import ExportedModelError

__all__ = ["Decoder", "RuntimeMissing", "open_session", "runtime_version"]

PAST, PRESENT = "past_key_values.", "present."
LOGITS_START = "logits_start"
ANOTHER = "use one that splitlora-export onnx --keep-adapter made of the same model, for the same layers"
"""What to do about an adapter that cannot be used."""


RuntimeMissing = PackageMissing
"""onnxruntime is not installed, or cannot be loaded here."""


class Decoder:
    """
    Runs the graphs of a model one after the other, for one sequence at a time, and keeps the keys and values of its tokens.

    Args:
        graphs: the whole model, or its edge part and its server part.
        shares_buffer: whether the graphs write new keys and values into the buffer that holds the earlier ones, so that
            nothing is copied. Those with --attention gqa do.
        configuration, num_threads: of each session, see `open_session`.

    Raises:
        RuntimeMissing: there is no onnxruntime.
        ExportedModelError: a graph cannot be loaded.
    """

    def __init__(
        self,
        graphs: Sequence[Path],
        *,
        shares_buffer: bool,
        configuration: Mapping[str, str] | None = None,
        num_threads: int = 0,
    ) -> None:
        self._parts = [_Part(open_session(path, configuration or {}, num_threads), shares_buffer) for path in graphs]
        self._length = 0

    @property
    def has_slots(self) -> bool:
        """Whether the graphs have inputs for an adapter."""
        return any(part.slots for part in self._parts)

    def use_adapter(self, path: Path, model: int) -> None:
        """
        Use an adapter instead of the one before. The graphs stay loaded.

        Args:
            model: the `model_number` of the graphs' base model.

        Raises:
            ExportedModelError: the file is not an adapter, or is one for another model. The one before is still in use.
        """
        parameters = _read_adapter(path, model, {name: slot for part in self._parts for name, slot in part.slots.items()})
        for part in self._parts:
            part.adapter = {name: value for name, value in parameters.items() if name in part.slots}

    def clear(self, capacity: int) -> None:
        """Forget the sequence, and make room for one of ``capacity`` tokens."""
        self._length = 0
        for part in self._parts:
            part.clear(capacity)

    def extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """
        Append tokens to the sequence.

        Returns:
            (vocabulary,) the logits of the token that comes next.
        """
        start, self._length = self._length, self._length + len(tokens)
        values: NDArray[Any] = np.array([tokens], np.int64)  # (1, S)
        for part in self._parts:
            values = part.extend(values, start)  # (1, S, width), at last (1, S or 1, vocabulary)
        if values.ndim != 3 or not values.size:
            raise ExportedModelError(f"the graph gives values of the shape {list(values.shape)}, and no logits for each token")
        return np.asarray(values[0, -1], np.float32)


class _Part:
    """One graph, and the keys and values of its blocks."""

    def __init__(self, session: Any, shares_buffer: bool) -> None:
        self._runtime = _import_runtime()
        self._session, self._shares_buffer = session, shares_buffer
        with _readable_errors("the graph is not one of a language model"):
            inputs = self._session.get_inputs()
            self._input, self._output = inputs[0].name, self._session.get_outputs()[0].name
            self._takes_positions = any(value.name == "position_ids" for value in inputs)
            self._cached = [value for value in inputs if value.name.startswith(PAST)]
            self._cache: list[Any] = []
            self.slots = {value.name: value for value in self._session.get_overridable_initializers()}
            """What the graph says of an adapter's matrices: the type and shape of each. A word in shapes is one size in all."""
        self.adapter: dict[str, Any] = {}
        self._settings = {}
        if self.slots.pop(LOGITS_START, None) is not None:
            # The head is a third of a small model's work, so the graph is asked for the logits of the last position only.
            self._settings[LOGITS_START] = self._runtime.OrtValue.ortvalue_from_numpy(np.array([-1]))

    def clear(self, capacity: int) -> None:
        with _readable_errors(f"there is no cache of {capacity:,} tokens for this graph"):
            self._cache = [self._empty(cached, capacity) for cached in self._cached]

    def _empty(self, cached: Any, capacity: int) -> Any:
        """The keys or values of one block before the first token; ``cached`` is the input that takes them."""
        dtype, (_, num_heads, _, width) = _dtype(cached.type), cached.shape
        if self._shares_buffer:
            # It is not filled with zeros: the system then gives it memory only where it is written to.
            return self._runtime.OrtValue.ortvalue_from_shape_and_type((1, num_heads, capacity, width), dtype, "cpu")
        # A numpy array: the Attention of onnxruntime 1.23 treats an empty array of onnxruntime's own as if there were none.
        return np.empty((1, num_heads, 0, width), dtype)

    def extend(self, values: NDArray[Any], start: int) -> NDArray[Any]:
        with _readable_errors("the model cannot be computed"):
            return self._computed(values, start)

    def _computed(self, values: NDArray[Any], start: int) -> NDArray[Any]:
        binding = self._session.io_binding()
        for name, value in self._inputs(values, start).items():
            binding.bind_cpu_input(name, value)
        for name, value in (self._settings | self.adapter).items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output(self._output)
        for cached, value in zip(self._cached, self._cache, strict=True):
            bind = binding.bind_cpu_input if isinstance(value, np.ndarray) else binding.bind_ortvalue_input
            bind(cached.name, value)
            present = cached.name.replace(PAST, PRESENT)
            if self._shares_buffer:
                binding.bind_ortvalue_output(present, value)
            else:
                binding.bind_output(present)
        self._session.run_with_iobinding(binding)
        output, *present_values = binding.get_outputs()
        if not self._shares_buffer:
            self._cache = present_values
        return output.numpy()  # type: ignore[no-any-return]

    def _inputs(self, values: NDArray[Any], start: int) -> dict[str, NDArray[Any]]:
        end = start + values.shape[1]
        inputs = {self._input: values, "attention_mask": np.ones((1, end), np.int64)}
        if self._takes_positions:
            inputs["position_ids"] = np.arange(start, end)[None]
        return inputs


def open_session(path: Path, configuration: Mapping[str, str], num_threads: int = 0, *, save_to: Path | None = None) -> Any:
    """
    Args:
        configuration: onnxruntime's session entries, such as "session.disable_prepacking".
        num_threads: 0 is one for every core.
        save_to: where to write the graph as it is after onnxruntime's optimisations.

    Raises:
        RuntimeMissing: there is no onnxruntime.
        ExportedModelError: the graph cannot be loaded.
    """
    onnxruntime = _import_runtime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # the exceptions say what the log would say about errors
    options.intra_op_num_threads = num_threads
    # Threads that wait for each other spin for 50 microseconds and then sleep. The default, to spin on, halves the speed on a
    # machine that does anything else at the same time; not to spin at all costs a sixth of the speed on one that does not.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
    for name, value in configuration.items():
        options.add_session_config_entry(name, value)
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
    with _readable_errors(f"{path} cannot be loaded by onnxruntime {onnxruntime.__version__}"):
        # Without "fallback": it would try the same again, and say so on standard output.
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0)


def runtime_version() -> str:
    """
    Raises:
        RuntimeMissing: there is no onnxruntime.
    """
    return str(_import_runtime().__version__)


def _import_runtime() -> Any:
    return import_onnxruntime("generating", install="splitlora")


def _read_adapter(path: Path, model: int, slots: Mapping[str, Any]) -> dict[str, Any]:
    """The matrices of an adapter that is one for this model and fits these slots, by name."""
    if not os.path.isfile(path):  # Path.is_file would raise an OSError for a name that no file can have
        raise ExportedModelError(f"no adapter file at {path}")
    onnxruntime = _import_runtime()
    unreadable = f"{path} is not an adapter that onnxruntime can read"
    with _readable_errors(unreadable):
        file = onnxruntime.AdapterFormat.read_adapter(str(path))
        found, mapped = file.get_model_version(), file.get_parameters()
    if found not in (NO_MODEL, model):
        numbers = f"whose fingerprint begins with {found:07x}, and that of this folder's with {model:07x}"
        raise ExportedModelError(f"{path} is an adapter for another base model, {numbers}; {ANOTHER}")
    for misfit in _misfits(mapped, slots):
        raise ExportedModelError(f"{path} {misfit}; {ANOTHER}")
    with _readable_errors(unreadable):
        matrices = {name: np.array(value.numpy()) for name, value in mapped.items()}  # copies: the file may be replaced
    for name, matrix in matrices.items():
        if not np.isfinite(matrix).all():
            raise ExportedModelError(f"{path}: {name} has values that are not finite numbers; {ANOTHER}")
    return {name: onnxruntime.OrtValue.ortvalue_from_numpy(matrix) for name, matrix in matrices.items()}


def _misfits(matrices: Mapping[str, Any], slots: Mapping[str, Any]) -> Iterator[str]:
    """Why graphs with these slots cannot be computed with an adapter's matrices, or would be the base model."""
    if not matrices:
        yield "has no matrices"
    sizes: dict[str, tuple[int, str]] = {}  # by the word that a graph has for a size, such as a rank: what it is, and where
    for name, value in matrices.items():
        if name not in slots:
            yield f"adapts {shown(name)}, for which these graphs have no room"
            continue
        slot, shape = slots[name], value.shape()
        if value.data_type() != slot.type:
            yield f"holds {name} as {value.data_type()}, and the graph takes {slot.type}"
        if len(shape) != len(slot.shape) or not all(map(_fits, shape, slot.shape)):
            yield f"holds {name} of the shape {shape}, which does not fit {slot.shape}"
            continue
        for size, word in zip(shape, slot.shape, strict=True):
            if isinstance(word, str) and (first := sizes.setdefault(word, (size, name)))[0] != size:
                yield f"has {word} {first[0]} in {first[1]}, and {size} in {name}"
    for name, slot in slots.items():
        if name not in matrices:
            yield from (f"has {sizes[word][1]} without {name}" for word in slot.shape if word in sizes)


def _fits(size: int, wanted: int | str | None) -> bool:
    """Whether a graph takes this size; one that it leaves open, such as the rank, is no number there."""
    return size == wanted if isinstance(wanted, int) else size > 0


@contextmanager
def _readable_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # onnxruntime's errors have no common type
        raise ExportedModelError(f"{what}: {str(error).strip().partition(chr(10))[0]}") from None


def _dtype(type_name: str) -> type[np.floating[Any]]:
    return np.float16 if "float16" in type_name else np.float32
