"""An exported folder, opened with ONNX Runtime, for measuring what it agrees with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from storage import ExportedManifest, Folder
from storage.exported_manifest import MANIFEST

from .errors import ExportError
from .precision import PRECISIONS
from .weights import Floats

__all__ = ["ExportedModel", "read_manifest"]

Integers = NDArray[np.int64]
Cache = dict[str, NDArray[Any]]


def read_manifest(folder: Path) -> ExportedManifest:
    """
    The manifest of a folder whose files are all there, in precisions that are known here.

    Raises:
        ExportError: it is not an exported folder, or a file of it is missing or cut short.
    """
    manifest = ExportedManifest.read(Folder(folder, ExportError))
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


class ExportedModel:
    """
    Graphs that are run one after the other, each with its own keys and values.

    Args:
        adapter: an .onnx_adapter to run them with.

    Raises:
        ExportError: a graph or the adapter cannot be loaded; later, when a graph does not compute what a language model does.
    """

    def __init__(self, graphs: Sequence[Path], adapter: Path | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what it has to say of errors, the exceptions say
        self._sessions = []
        for path in graphs:
            with _readable_errors(f"{path} cannot be loaded by onnxruntime {onnxruntime.__version__}"):
                self._sessions.append(
                    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"], enable_fallback=0)
                )
        self._graphs = graphs
        self._run_options = onnxruntime.RunOptions()
        self._run_options.log_severity_level = 4
        if adapter is not None:
            self._adapter = onnxruntime.LoraAdapter()
            with _readable_errors(f"{adapter} is not an adapter that onnxruntime {onnxruntime.__version__} can load"):
                self._adapter.Load(str(adapter))
            self._run_options.add_active_adapter(self._adapter)

    def logits(self, tokens: Integers, mask: Integers | None = None) -> Floats:
        """(B, S) ids and a mask that is 0 at padding -> (B, S, V)."""
        return self.step(tokens, np.ones_like(tokens) if mask is None else mask, self.empty_cache(len(tokens)))[0]

    def step(self, tokens: Integers, mask: Integers, cache: Cache) -> tuple[Floats, Cache]:
        """
        New tokens after those of the cache.

        Args:
            tokens: (B, S).
            mask: (B, P + S), of old and new tokens.
            cache: of P tokens, by the names of the graphs' inputs.

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
        with _readable_errors(f"{self._graphs[0]} has no keys and values of earlier tokens"):
            return {
                item.name: np.zeros((batch, item.shape[1], 0, item.shape[3]), np.float16 if "16" in item.type else np.float32)
                for session in self._sessions
                for item in session.get_inputs()
                if item.name.startswith("past_key_values.")
            }

    def continue_greedily(self, prompt: Sequence[int], limit: int, end_token: int) -> list[int]:
        """The most likely continuation, at most ``limit`` tokens and up to the end token."""
        tokens, cache, text = np.array([prompt], np.int64), self.empty_cache(1), list(prompt)
        while len(text) < len(prompt) + limit and text[len(prompt) :][-1:] != [end_token]:
            logits, cache = self.step(tokens, np.ones((1, len(text)), np.int64), cache)
            text.append(int(logits[0, -1].argmax()))
            tokens = np.array([text[-1:]], np.int64)
        return text[len(prompt) :]
