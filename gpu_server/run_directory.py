"""What a run leaves behind: run.json, metrics.jsonl, events.jsonl, evaluations.jsonl, checkpoints/ and adapter/."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout
from safetensors import SafetensorError

from split_model import Adapter, LoraConfig, ModelConfig, save_adapter
from storage import CacheFolder, RunDescription, remove_unfinished, replace_file
from storage.run_description import RUN_FILE

from .checkpoints import Checkpoints
from .edge_part import remove_unfinished_part
from .errors import ConfigError, ServerError
from .federation import StepRecord
from .history import EvaluationRecord, RunEvent, row_of
from .history.line_file import LineFile
from .history.run_files import CHECKPOINTS, EVALUATIONS, EVENTS, METRICS
from .run_lock import lock_of

__all__ = ["RunDirectory"]

CODECS = "codecs.json"
SECONDS_TO_ASK = 1.0
SEGMENT_BYTES = 8 * 2**20


class RunDirectory:
    """
    A folder for one run, held by one server at a time.

    Args:
        resume: whether the folder holds a run that is to go on; else it is to hold a new one.

    Raises:
        ConfigError: it holds a run and is to hold a new one, or holds none and is to be resumed.
        ServerError: it cannot be written.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / CHECKPOINTS)
        self._lines = {name: LineFile(path / name) for name in (METRICS, EVENTS, EVALUATIONS)}
        self._lock = lock_of(path)
        self.resumes = resume
        exists = self.holds_run(path)
        if resume and not exists:
            raise ConfigError(
                f"{path} holds no run to resume; correct --run-dir, or start a run: without --resume, or with --resume-or-start"
            )
        if exists and not resume:
            raise ConfigError(f"{path} holds a run already; go on with it by --resume, or choose another --run-dir")
        with self._writing():
            path.mkdir(parents=True, exist_ok=True, mode=0o700)

    @staticmethod
    def holds_run(path: Path) -> bool:
        """Whether a run was begun there."""
        return (path / RUN_FILE).exists()

    def hold(self) -> None:
        """
        Keep other servers out until `release`, or until this process ends, however it ends.

        Raises:
            ServerError: another server holds the folder.
        """
        with self._writing():
            try:
                # Commands that ask whether a server runs hold the lock for a moment: see `is_served`.
                self._lock.acquire(timeout=SECONDS_TO_ASK, poll_interval=0.01)
            except Timeout:
                raise ServerError(f"{self.path} is in use by another server") from None
            remove_unfinished(self.checkpoints.folder)
            remove_unfinished_part(self.edge_part_folder)
            for lines in self._lines.values():
                lines.mend()
            for name in (RUN_FILE, CODECS):  # not clients.json: `splitlora-server enrol` may be writing it just now
                remove_unfinished(self.path, name)

    def release(self) -> None:
        self._lock.release()

    def describe(self, description: RunDescription) -> None:
        """Write run.json."""
        with self._writing():
            description.write(self.path)

    def write_codec_state(self, state: dict[str, Any]) -> None:
        """What the codec policy has seen and decided; it holds, whatever checkpoint the run goes back to."""
        with self._writing():
            replace_file(self.path / CODECS, (json.dumps(state, indent=2) + "\n").encode())

    def codec_state(self) -> dict[str, Any] | None:
        """
        What `write_codec_state` wrote last; None if nothing.

        Raises:
            ServerError: the file cannot be read.
        """
        path = self.path / CODECS
        if not path.exists():
            return None
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ServerError(f"{path} cannot be read: {error}") from None

    def activation_cache(self, client: str, max_bytes: int) -> CacheFolder:
        """A client's activations, which stay until `remove_what_only_a_run_needs`."""
        with self._writing():
            return CacheFolder(self.path / "samples" / client, max_bytes)

    @property
    def edge_part_folder(self) -> Path:
        """For what is handed to devices without a model, until `remove_what_only_a_run_needs`."""
        return self.path / "edge-part"

    def remove_what_only_a_run_needs(self) -> None:
        """When the run is complete nothing stays that was computed from the devices' data, or that can be made again."""
        for folder in (self.path / "samples", self.edge_part_folder):
            shutil.rmtree(folder, ignore_errors=True)

    def append_metrics(self, record: StepRecord) -> None:
        """Add a step's line to metrics.jsonl."""
        self._append(METRICS, row_of(record))

    def append_event(self, event: RunEvent) -> None:
        """Add a line to events.jsonl."""
        self._append(EVENTS, event.as_json())

    def append_evaluation(self, record: EvaluationRecord) -> None:
        """Add a line to evaluations.jsonl."""
        self._append(EVALUATIONS, record.as_json())

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with self._writing():
            self._lines[name].append(line)

    def sync_metrics(self) -> None:
        """Have all lines of steps and held-out losses on the disk: a checkpoint must not know of more than they do."""
        with self._writing():
            for name in (METRICS, EVALUATIONS):
                self._lines[name].sync()

    def forget_after(self, step: int) -> None:
        """
        Take back the lines of steps that will be done again, and of held-out texts that were evaluated after these.

        Args:
            step: the last that the run has finished; -1 where it has not begun.
        """
        with self._writing():
            for name in (METRICS, EVALUATIONS):
                self._lines[name].forget(lambda line: bool(line["step"] > step))

    def rotate(self) -> None:
        """Compress the lines of a run that goes on, where they are many."""
        with self._writing():
            for lines in self._lines.values():
                lines.rotate(SEGMENT_BYTES)

    def save_adapter(self, adapter: Adapter, config: ModelConfig, lora: LoraConfig, base_model: str) -> Path:
        """Write the adapter of both parts as one PEFT folder; give its path."""
        with self._writing():
            save_adapter(self.adapter_folder, adapter, config, lora, base_model)
        return self.adapter_folder

    @property
    def adapter_folder(self) -> Path:
        return self.path / "adapter"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            later = "; when that is mended, --resume goes on with its run" if self.holds_run(self.path) else ""
            raise ServerError(f"run directory {self.path} cannot be written: {reason}{later}") from None
