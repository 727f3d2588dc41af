"""Finds the newest adapter in a run directory: that of the run's end, or of its last checkpoint."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from split_model import DamagedFile, LoraConfig, ModelConfig, PretrainedModel, adapted_layers, read_sealed, save_adapter
from storage import AdapterError, Folder, RunDescription, part_that_differs, shown
from storage.folder import Member
from storage.run_description import REMEDY, RUN_FILE

from .errors import ExportError

__all__ = ["Run", "RunDirectory"]

logger = logging.getLogger("export")

ADAPTER = "adapter/"
"""The prefix of the names of the adapter's matrices in a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The run that an adapter is of."""

    id: str
    step: int
    """The last step that the adapter has taken."""
    finished: bool


class RunDirectory:
    """
    A directory that splitlora-server has written.

    Raises:
        ExportError: the folder holds no run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        description = RunDescription.read(folder, ExportError)
        if description is None:
            raise ExportError(f"{folder / RUN_FILE} is missing; --run-dir is the folder that splitlora-server was given")
        self._id, self._fingerprint, config = description.run, description.fingerprint, description.config
        self._reached = description.adapter
        self.model: str = self._setting(config, "model", str)
        """The base model, as the server was given it."""
        rank, targets = self._setting(config, "lora_rank", int), self._setting(config, "lora_targets", list)
        alpha = self._setting(config, "lora_alpha", float)
        if not all(isinstance(target, str) for target in targets):
            raise self._wrong(f"lora_targets is {shown(targets)}; a list of texts is expected")
        more = {"first_block": self._setting(config, "cut_layer", int)} if config.get("edge_adapter") == "none" else {}
        rslora = bool(config.get("lora_rslora", False))  # a run of an earlier version has no such setting
        try:
            self._lora = LoraConfig(rank=rank, alpha=float(alpha), rslora=rslora, targets=tuple(targets), **more)
        except (AdapterError, OverflowError) as error:  # of a whole number that no float is as large as
            raise self._wrong(error) from None

    def _setting(self, config: dict[str, Any], key: str, kind: type[Member]) -> Member:
        return Folder(self.folder, ExportError).member(RUN_FILE, config, key, kind, REMEDY)

    def _wrong(self, what: object) -> ExportError:
        return ExportError(f"{self.folder / RUN_FILE}: {what}{REMEDY}")

    def adapter(self, model: PretrainedModel, scratch: Path) -> tuple[Run, Path]:
        """
        The newest adapter, as a PEFT folder. A warning says if the run has not finished.

        Args:
            model: the base model that it is to be merged into.
            scratch: an empty folder, for an adapter that only a checkpoint holds.

        Raises:
            ExportError: the run is of another model, or nothing was kept of it yet.
        """
        if self._fingerprint != (fingerprint := model.fingerprint()):
            raise ExportError(
                f"{self.folder} is a run of the model {self.model!r} ({self._fingerprint}); "
                f"--model gives another {part_that_differs(self._fingerprint, fingerprint)} ({fingerprint})"
            )
        try:
            adapted_layers(model.config, self._lora)
        except AdapterError as error:
            raise self._wrong(error) from None
        if self._reached is None:
            return self._last_checkpoint(model.config, scratch)
        reached, last = self._reached["step"], self._reached["of"]
        if reached != last:
            logger.warning("the run ended early: this is its adapter after step %d of %d", reached, last)
        step = self._reached.get("best_step", reached)
        return Run(id=self._id, step=step, finished=reached == last), self.folder / "adapter"

    def _last_checkpoint(self, config: ModelConfig, scratch: Path) -> tuple[Run, Path]:
        for path in sorted((self.folder / "checkpoints").glob("*.safetensors"), reverse=True):
            try:
                text, tensors = read_sealed(path)
                saved: dict[str, Any] = json.loads(text)
            except DamagedFile as error:
                logger.warning("checkpoint %s is damaged: %s; trying the one before", path, error)
                continue
            if saved["run"] != self._id:
                raise ExportError(f"{path} is of run {saved['run']}, not of {self._id}")
            logger.warning("the run has not finished: this is its last checkpoint, after step %d", saved["step"])
            matrices = {name.removeprefix(ADAPTER): tensor for name, tensor in tensors.items() if name.startswith(ADAPTER)}
            save_adapter(scratch, matrices, config, self._lora, self.model)
            return Run(id=self._id, step=saved["step"], finished=False), scratch
        raise ExportError(f"{self.folder} has no checkpoint yet and no adapter; wait for the run's first checkpoint")
