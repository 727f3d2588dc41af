"""Everything that a run writes while it is served."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from split_model import Adapter, LoraConfig, ModelConfig
from storage import RunDescription

from ..checkpoints import SavedRound
from ..federation import StepRecord
from ..history import EvaluationRecord, RunEvent
from ..run_directory import RunDirectory

__all__ = ["Journal"]


class Journal:
    """
    Writes what a run leaves behind, on threads of its own, so that no answer waits for a disk. Steps and decisions are small,
    and written in the order in which they are asked. Checkpoints and adapters are large, and none of the small waits for them.

    Futures are done when what was asked is written; they hold a ServerError where it cannot be.

    Args:
        description: what run.json says of the run.
        config: the base model's.
        base_model: its name or folder, as the adapter's folder has it.
    """

    def __init__(
        self, directory: RunDirectory, description: RunDescription, config: ModelConfig, lora: LoraConfig, base_model: str
    ) -> None:
        self._directory, self._description = directory, description
        self._config, self._lora, self._base_model = config, lora, base_model
        self._small: ThreadPoolExecutor
        self._large: ThreadPoolExecutor
        self._describing: Future[None] | None = None
        """The last description that was asked for."""

    def begin(self, url: str) -> None:
        """Say in run.json where the run is served; that is written on return. Until `close` the rest may be asked."""
        self._small, self._large = (ThreadPoolExecutor(1, f"journal-{what}") for what in ("small", "large"))
        self._description = self._description.served_at(url)
        self._directory.describe(self._description)

    def write_step(self, record: StepRecord) -> "Future[None]":
        return self._small.submit(self._directory.append_metrics, record)

    def write_event(self, event: RunEvent) -> "Future[None]":
        return self._small.submit(self._directory.append_event, event)

    def write_evaluation(self, record: EvaluationRecord) -> "Future[None]":
        return self._small.submit(self._directory.append_evaluation, record)

    def write_checkpoint(self, saved: SavedRound) -> "Future[tuple[float, int]]":
        """The seconds that it took, and its bytes."""

        def write() -> tuple[float, int]:
            began = time.monotonic()
            self._directory.sync_metrics()
            num_bytes = self._directory.checkpoints.write(saved)
            return time.monotonic() - began, num_bytes

        return self._large.submit(write)

    def write_codec_state(self, state: dict[str, Any]) -> "Future[None]":
        return self._small.submit(self._directory.write_codec_state, state)

    def write_noise(self, noise: dict[str, Any]) -> "Future[None]":
        """Say in run.json what it is worth; see `RunDescription.noise`. Of what is asked before one is written, the last is."""
        self._description = self._description.with_noise(noise)

        waiting = self._describing
        if waiting is None or waiting.running() or waiting.done():  # else it has not begun, and will find this
            # On the thread of whoever else writes this file.
            self._describing = waiting = self._large.submit(lambda: self._directory.describe(self._description))
        return waiting

    def write_adapter(self, adapter: Adapter, **reached: int) -> "Future[None]":
        """
        And say in run.json how far it has come.

        Args:
            reached: as of `RunDescription.with_adapter`.
        """

        def write() -> None:
            self._directory.save_adapter(adapter, self._config, self._lora, self._base_model)
            self._directory.describe(self._description.with_adapter(**reached))

        return self._large.submit(write)

    def close(self) -> None:
        """Everything that was asked is written on return. Nothing was where the run was never served."""
        if hasattr(self, "_small"):
            self._small.shutdown()
            self._large.shutdown()
