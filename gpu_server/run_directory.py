"""What a run leaves behind: run.json, metrics.jsonl and adapter/."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from split_model import Adapter, LoraConfig, save_adapter

from .config import ConfigError

__all__ = ["RunDirectory"]


class RunDirectory:
    """
    A folder for one run.

    Raises:
        ConfigError: it holds a run already, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._writing():
            path.mkdir(parents=True, exist_ok=True)
        if (path / "run.json").exists():
            raise ConfigError(f"{path} holds a run already; choose another --run-dir")

    def describe(self, description: dict[str, Any]) -> None:
        """Write run.json."""
        with self._writing():
            self._write_whole("run.json", json.dumps(description, indent=2) + "\n")

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add a step's line to metrics.jsonl."""
        with self._writing(), (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def save_adapter(self, adapter: Adapter, lora: LoraConfig, base_model: str) -> Path:
        """Write the adapter of both parts as one PEFT folder; give its path."""
        folder = self.path / "adapter"
        with self._writing():
            save_adapter(folder, adapter, lora, base_model)
        return folder

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"run directory {self.path} cannot be written: {getattr(error, 'strerror', error)}") from None

    def _write_whole(self, name: str, text: str) -> None:
        # Under another name first: a reader never sees half a file.
        unfinished = self.path / f"{name}.part"
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, self.path / name)
