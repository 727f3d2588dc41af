"""What a run leaves behind: run.json, metrics.jsonl and adapter/."""

import json
import os
from pathlib import Path
from typing import Any

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
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run directory {path} cannot be made: {error.strerror}") from None
        if (path / "run.json").exists():
            raise ConfigError(f"{path} holds a run already; choose another --run-dir")

    def describe(self, description: dict[str, Any]) -> None:
        """Write run.json."""
        self._write_whole("run.json", json.dumps(description, indent=2) + "\n")

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add a step's line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def save_adapter(self, adapter: Adapter, lora: LoraConfig, base_model: str) -> Path:
        """Write the adapter of both parts as one PEFT folder; give its path."""
        folder = self.path / "adapter"
        save_adapter(folder, adapter, lora, base_model)
        return folder

    def _write_whole(self, name: str, text: str) -> None:
        # Under another name first: a reader never sees half a file.
        unfinished = self.path / f"{name}.part"
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, self.path / name)
