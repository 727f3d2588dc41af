"""Everything that a run writes while it is served."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from split_model import Adapter, LoraConfig, ModelConfig
from storage import RunDescription

from ..checkpoints import SavedRound
from ..federation import StepRecord
from ..run_directory import RunDirectory

__all__ = ["Journal"]


class Journal:
    """
    Writes what a run leaves behind, on one thread and in the order in which it is asked, so that no answer waits for a disk.

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
        self._writer: ThreadPoolExecutor
        self._last: Future[None] = Future()
        """What was asked last."""
        self._last.set_result(None)

    def begin(self, url: str) -> None:
        """Say in run.json where the run is served; that is written on return. Until `close` the rest may be asked."""
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._description = self._description.served_at(url)
        self._directory.describe(self._description)

    def write_step(self, record: StepRecord) -> "Future[None]":
        return self._ask(self._directory.append_metrics, record)

    def write_checkpoint(self, saved: SavedRound) -> "Future[None]":
        def write() -> None:
            self._directory.sync_metrics()
            self._directory.checkpoints.write(saved)

        return self._ask(write)

    def write_codec_state(self, state: dict[str, Any]) -> None:
        """See `written`."""
        self._ask(self._directory.write_codec_state, state)

    def write_adapter(self, adapter: Adapter, step: int, total_steps: int) -> "Future[None]":
        """And say in run.json which step it has reached."""

        def write() -> None:
            self._directory.save_adapter(adapter, self._config, self._lora, self._base_model)
            self._directory.describe(self._description.with_adapter(step=step, of=total_steps))

        return self._ask(write)

    def written(self) -> "Future[None]":
        """What was asked last is written, and so is all before it."""
        return self._last

    def close(self) -> None:
        """Everything that was asked is written on return. Nothing was where the run was never served."""
        if hasattr(self, "_writer"):
            self._writer.shutdown()

    def _ask(self, write: Callable[..., None], *arguments: Any) -> "Future[None]":
        self._last = self._writer.submit(write, *arguments)
        return self._last
