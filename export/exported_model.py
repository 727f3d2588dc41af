"""An exported folder, opened with ONNX Runtime, for measuring what it agrees with."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .errors import ExportError
from .weights import Floats

__all__ = ["ExportedModel", "Manifest"]

Integers = NDArray[np.int64]
Cache = dict[str, NDArray[Any]]
KINDS = {"language model": ("graph",), "split language model": ("edge_graph", "server_graph")}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """splitlora.json of a folder whose files are all there."""

    folder: Path
    content: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """
        Raises:
            ExportError: it is not an exported folder, or a file of it is missing or cut short.
        """
        path = folder / "splitlora.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != 1 or content["kind"] not in KINDS:
                raise ExportError(f"{path}: this version knows nothing of {content['kind']!r} in format {content['format']!r}")
            files = {name: size for entry in content["precisions"].values() for name, size in entry["bytes"].items()}
        except FileNotFoundError:
            raise ExportError(f"{path} is missing; is this a folder that `splitlora-export onnx` has written?") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ExportError(f"{path} cannot be read: {error}") from None
        for name, size in files.items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != size:
                state = "missing" if found is None else f"{found} bytes long, not {size}"
                raise ExportError(f"{folder / name} is {state}: the folder is incomplete; copy or export it again")
        return cls(folder=folder, content=content)

    def graphs(self, precision: str) -> list[Path]:
        """One, or the edge part and the server part."""
        entry = self.content["precisions"][precision]
        return [self.folder / entry[graph] for graph in KINDS[self.content["kind"]]]

    def num_bytes(self, precision: str) -> int:
        return sum(self.content["precisions"][precision]["bytes"].values())

    @property
    def adapter(self) -> Path | None:
        name = self.content["adapter"]
        return self.folder / name if name else None


class ExportedModel:
    """
    Graphs that are run one after the other, each with its own keys and values.

    Args:
        adapter: an .onnx_adapter to run them with.
    """

    def __init__(self, graphs: Sequence[Path], adapter: Path | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._sessions = [onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in graphs]
        self._run_options = onnxruntime.RunOptions()
        if adapter is not None:
            self._adapter = onnxruntime.LoraAdapter()
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
        for session in self._sessions:
            wanted = {item.name: values[item.name] for item in session.get_inputs()}
            names = [item.name for item in session.get_outputs()]
            for name, value in zip(names, session.run(names, wanted, self._run_options), strict=True):
                (present if name.startswith("present.") else values)[name.replace("present.", "past_key_values.")] = value
        return values["logits"].astype(np.float32, copy=False), present

    def empty_cache(self, batch: int) -> Cache:
        inputs = [
            item for session in self._sessions for item in session.get_inputs() if item.name.startswith("past_key_values.")
        ]
        return {
            item.name: np.zeros((batch, item.shape[1], 0, item.shape[3]), np.float16 if "16" in item.type else np.float32)
            for item in inputs
        }

    def continue_greedily(self, prompt: Sequence[int], limit: int, end_token: int) -> list[int]:
        """The most likely continuation, at most ``limit`` tokens and up to the end token."""
        tokens, cache, text = np.array([prompt], np.int64), self.empty_cache(1), list(prompt)
        while len(text) < len(prompt) + limit and text[len(prompt) :][-1:] != [end_token]:
            logits, cache = self.step(tokens, np.ones((1, len(text)), np.int64), cache)
            text.append(int(logits[0, -1].argmax()))
            tokens = np.array([text[-1:]], np.int64)
        return text[len(prompt) :]
