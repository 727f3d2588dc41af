"""An exported folder, read and run with ONNX Runtime, to measure how well it agrees with its model."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphs import Floats
from storage import ExportedManifest, Folder
from storage.exported_manifest import MANIFEST
from terminal import import_onnxruntime

from .errors import ExportError
from .precision import PRECISIONS

__all__ = ["ExportedModel", "empty_cache", "open_session", "read_manifest"]

onnxruntime = import_onnxruntime("exporting", install="splitlora[export]")

Integers = NDArray[np.int64]
Cache = dict[str, NDArray[Any]]


def read_manifest(folder: Path) -> ExportedManifest:
    """
    The manifest of a folder whose files are all there, in precisions that are known here.

    Raises:
        ExportError: it is not an exported folder, or a file of it is missing or cut short.
    """
    manifest = ExportedManifest.read(Folder(folder, ExportError))
    if not manifest.precisions:
        raise ExportError(f"{folder / MANIFEST} names no precision; export the model again")
    for name in manifest.precisions:
        if name not in PRECISIONS:
            raise ExportError(f"{folder / MANIFEST}: the precision {name[:40]!r} is not one of {', '.join(PRECISIONS)}")
        manifest.require(name)
    return manifest


@contextmanager
def _readable_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # onnxruntime's errors have no common type
        raise ExportError(f"{what}: {' '.join(str(error).split())}") from None


def open_session(path: Path, *, maps_weights: bool = False) -> Any:
    """
    A graph in onnxruntime, on the CPU.

    Args:
        maps_weights: whether to leave weights in their files, which takes less memory, and more time where many tokens are
            computed at once. Quantised ones take far more.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # the exceptions say what the log would say about errors
    if maps_weights:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"], enable_fallback=0)


def empty_cache(session: Any, batch: int) -> Cache:
    """Keys and values of no tokens, for ``batch`` sequences."""
    return {
        item.name: np.zeros((batch, item.shape[1], 0, item.shape[3]), np.float16 if "16" in item.type else np.float32)
        for item in session.get_inputs()
        if item.name.startswith("past_key_values.")
    }


class ExportedModel:
    """
    Runs the graphs of a model one after the other, each with its own keys and values.

    Args:
        graphs: the whole model, or its edge part and its server part.
        adapter: an .onnx_adapter file to run them with.
        maps_weights: see `open_session`.

    Raises:
        ExportError: a graph or the adapter cannot be loaded; later, when a graph does not compute what a language model does.
    """

    def __init__(self, graphs: Sequence[Path], adapter: Path | None = None, *, maps_weights: bool = False) -> None:
        self._sessions = []
        for path in graphs:
            with _readable_errors(f"{path} cannot be loaded by onnxruntime {onnxruntime.__version__}"):
                self._sessions.append(open_session(path, maps_weights=maps_weights))
        self._graphs = graphs
        self._run_options = onnxruntime.RunOptions()
        self._run_options.log_severity_level = 4
        if adapter is not None:
            self._adapter = onnxruntime.LoraAdapter()
            with _readable_errors(f"{adapter} is not an adapter that onnxruntime {onnxruntime.__version__} can load"):
                self._adapter.Load(str(adapter))
            self._run_options.add_active_adapter(self._adapter)

    def logits(self, tokens: Integers, mask: Integers | None = None) -> Floats:
        """Logits (B, S, V) of token ids (B, S), given a mask (B, S) that is 0 at padding."""
        return self.step(tokens, np.ones_like(tokens) if mask is None else mask, self.empty_cache(len(tokens)))[0]

    def step(self, tokens: Integers, mask: Integers, cache: Cache) -> tuple[Floats, Cache]:
        """
        Compute new tokens that come after those of the cache.

        Args:
            tokens: (B, S) ids.
            mask: (B, P + S), for old and new tokens; 0 at padding.
            cache: keys and values of P tokens, by the names of the graphs' inputs.

        Returns:
            Logits (B, S, V) and the cache of P + S tokens.
        """
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -tokens.shape[1] :]
        values = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, **cache}
        present: Cache = {}
        for session, path in zip(self._sessions, self._graphs, strict=True):
            with _readable_errors(f"{path} cannot be computed"):
                wanted = {item.name: values[item.name] for item in session.get_inputs()}
                names = [item.name for item in session.get_outputs()]
                results = session.run(names, wanted, self._run_options)
            for name, value in zip(names, results, strict=True):
                (present if name.startswith("present.") else values)[name.replace("present.", "past_key_values.")] = value
        logits = values.get("logits")
        if not isinstance(logits, np.ndarray) or logits.shape[:-1] != tokens.shape:
            raise ExportError(f"{self._graphs[-1]} gives no logits for each token: it is not the graph of a language model")
        return logits.astype(np.float32, copy=False), present

    def empty_cache(self, batch: int) -> Cache:
        """Keys and values of no tokens, for ``batch`` sequences."""
        with _readable_errors(f"{self._graphs[0]} has no keys and values of earlier tokens"):
            return {name: value for session in self._sessions for name, value in empty_cache(session, batch).items()}

    def continue_greedily(self, prompt: Sequence[int], limit: int, ends: Collection[int]) -> list[int]:
        """The most likely continuation: at most ``limit`` tokens, and none after one of ``ends``."""
        tokens, cache, found = np.array([prompt], np.int64), self.empty_cache(1), list[int]()
        while len(found) < limit and not (found and found[-1] in ends):
            logits, cache = self.step(tokens, np.ones((1, len(prompt) + len(found)), np.int64), cache)
            found.append(int(logits[0, -1].argmax()))
            tokens = np.array([found[-1:]], np.int64)
        return found
