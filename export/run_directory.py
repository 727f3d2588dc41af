"""The adapter that a run has left: of its end, or of its last checkpoint."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from split_model import DamagedFile, ModelConfig, read_sealed

from .errors import ExportError
from .lora import LoraAdapter, lora_updates, read_adapter

__all__ = ["Run", "read_run"]

logger = logging.getLogger("export")

ADAPTER = "adapter/"
"""Before the names of the adapter's matrices in a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where an adapter comes from."""

    id: str
    step: int
    """The last one that is in it."""
    finished: bool


def read_run(folder: Path, config: ModelConfig, fingerprint: str) -> tuple[Run, LoraAdapter]:
    """
    The newest adapter of a run; a run that has not finished is said to be so.

    Raises:
        ExportError: the folder holds no run, or one of another model, or nothing was kept of it yet.
    """
    description = _describe(folder)
    if description["fingerprint"] != fingerprint:
        raise ExportError(
            f"{folder} is a run of the model {description['config']['model']!r} ({description['fingerprint']}); "
            f"--model is another one ({fingerprint})"
        )
    reached = description.get("adapter")
    if reached is None:  # the server is at it, or was killed: adapter/ may be of an earlier stop, or half written
        return _last_checkpoint(folder, description, config)
    run = Run(id=description["run"], step=reached["step"], finished=reached["step"] == reached["of"])
    if not run.finished:
        logger.warning("the run ended early: this is its adapter after step %d of %d", run.step, reached["of"])
    return run, read_adapter(folder / "adapter", config)


def _describe(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(description["config"], dict) or not {"run", "fingerprint"} <= description.keys():
            raise ValueError("it does not describe a run")
    except FileNotFoundError:
        raise ExportError(f"{path} is missing; --run-dir is the folder that splitlora-server was given") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from None
    return dict(description)


def _last_checkpoint(folder: Path, description: dict[str, Any], config: ModelConfig) -> tuple[Run, LoraAdapter]:
    for path in sorted((folder / "checkpoints").glob("*.safetensors"), reverse=True):
        try:
            text, tensors = read_sealed(path)
            saved = json.loads(text)
        except DamagedFile as error:
            logger.warning("checkpoint %s is damaged: %s; trying the one before", path, error)
            continue
        if saved["run"] != description["run"]:
            raise ExportError(f"{path} is of run {saved['run']}, not of {description['run']}")
        logger.warning("the run has not finished: this is its last checkpoint, after step %d", saved["step"])
        matrices = {name.removeprefix(ADAPTER): tensor.numpy() for name, tensor in tensors.items() if name.startswith(ADAPTER)}
        settings = {"lora_alpha": description["config"]["lora_alpha"]}
        run = Run(id=saved["run"], step=saved["step"], finished=False)
        return run, lora_updates(path, matrices, settings, config)
    raise ExportError(f"{folder} has no checkpoint yet and no adapter; wait for the run's first checkpoint")
