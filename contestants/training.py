"""
What the contestants have in common: the run's settings, the clients' data in their order, and the files that a run leaves
behind. All of it is that of a split run, so that runs can be compared.
"""

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy
import torch

from edge_client.data import Batch, Batches, Dataset, Form
from gpu_server import ServerConfig, StepRecord
from gpu_server.history import EvaluationRecord, tell, telling_to
from gpu_server.run_directory import RunDirectory
from gpu_server.sweep.settings import DeviceConfig, device_names, known_of_device, known_of_server
from protocol import RunSettings, Seconds, TrainingDiverged, derive_seed
from split_model import (
    DTYPES,
    Adapter,
    LoraConfig,
    OptimiserConfig,
    PretrainedModel,
    choose_device,
    choose_dtype,
    initial_adapter,
    load_adapter,
)
from storage import ChatTemplate, ModelError, RunDescription, find_model
from terminal import Progress, count, user_path, version

from .whole_model import WholeModel

__all__ = ["Contestant", "Taken", "Task", "train"]


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a step came to."""

    losses: dict[str, float]
    """By client: of its own batch, summed, in nats."""
    server_compute: float
    """Seconds that were spent where everything comes together."""
    seconds: dict[str, Seconds]
    """By client: what it has spent."""
    gradient_norm: float = math.nan
    """Euclidean, of the mean loss of all clients' batches; NaN where nobody has its gradient."""
    bytes_up: dict[str, int] = field(default_factory=dict)
    """By client, of its messages as they would be sent."""
    bytes_down: dict[str, int] = field(default_factory=dict)


class Contestant(Protocol):
    """A way to train."""

    def take_step(self, step: int, batches: dict[str, Batch], learning_rate: float, *, ends_round: bool) -> Taken:
        """
        Args:
            batches: of the clients that take part in the step; in the same order in every step.
            ends_round: whether adapters are averaged after it.
        """

    def evaluate(self, data: Dataset) -> tuple[float, int]:
        """As `WholeModel.evaluate`, with the adapter of the last round's end."""

    def adapter(self) -> Adapter:
        """What everybody has at a round's end."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """
    What is to be trained, and where it goes.

    Raises:
        ServerError, ModelError, AdapterError, DataError: of all that makes something of it.
    """

    mode: str
    config: ServerConfig
    """What the mode does not know stays unused."""
    device: DeviceConfig
    files: Sequence[Path]
    """A client's data each."""
    eval_data: Path | None = None
    eval_every: int | None = None
    """
    Steps between two evaluations, as on a device: each is at the end of the round by which so many more are done. Before the
    first step and after the last one there always is one.
    """
    token_folder: Path | None = None
    """Where encoded files are kept for the next who reads them; None keeps none."""

    def model(self) -> WholeModel:
        """With its initial adapter, which is the one that a split run with this seed begins with."""
        base, device = self.base, choose_device(self.config.device)
        dtype, _ = choose_dtype(self.config.dtype, device)
        lora = self.lora
        if self.config.init_adapter is None:
            adapter = initial_adapter(base.config, lora, self.config.seed)
        else:
            adapter = load_adapter(user_path(self.config.init_adapter), base.config, lora)
        optimiser = OptimiserConfig(**self.settings.optimiser())
        return WholeModel(
            base,
            lora,
            optimiser,
            adapter,
            weight_dtype=DTYPES[dtype],
            device=device,
            max_grad_norm=self.config.max_grad_norm,
            label_smoothing=self.config.label_smoothing,
        )

    @cached_property
    def base(self) -> PretrainedModel:
        return PretrainedModel(find_model(self.config.model))

    @cached_property
    def complete(self) -> ServerConfig:
        """The configuration with what it leaves to the model."""
        return self.config.for_model(self.base.config)

    @property
    def settings(self) -> RunSettings:
        return self.complete.settings()

    @property
    def lora(self) -> LoraConfig:
        return LoraConfig(**self.complete.lora())

    @property
    def names(self) -> list[str]:
        return device_names(len(self.files))

    def read(self, path: Path, base: PretrainedModel) -> Dataset:
        """The samples of a file, cut as on a device."""
        data = Dataset.load(
            user_path(path),
            base.tokenizer(),
            base.config.end_token,
            min(self.device.max_length, base.config.num_positions),
            form=Form(template=ChatTemplate.find(base.folder), loss_on=self.device.loss_on),
            long=self.device.long,
            folder=self.token_folder,
        )
        if data.highest_token >= base.config.vocabulary_size:
            raise ModelError(
                f"{base.folder}: the tokenizer gives token {data.highest_token}, the model's vocabulary has "
                f"{base.config.vocabulary_size}"
            )
        return data

    def batches(self, base: PretrainedModel) -> dict[str, Batches]:
        """By client, in the order in which a split run's device of that name draws them."""
        return {
            name: Batches(
                data=self.read(path, base),
                name=name,
                batch_size=self.device.batch_size,
                shuffle=not self.device.no_shuffle,
                seed=self.config.seed,
                num_parts=1,
            )
            for name, path in zip(self.names, self.files, strict=True)
        }

    def num_bytes(self) -> dict[str, int]:
        """By client: of its file."""
        return {name: user_path(path).stat().st_size for name, path in zip(self.names, self.files, strict=True)}

    def evaluates_after(self, step: int) -> bool:
        if self.eval_every is None or not self.settings.ends_round(step):
            return False
        return step // self.eval_every > (step - self.settings.aggregate_every) // self.eval_every

    def description(self, base: PretrainedModel) -> RunDescription:
        """What run.json says: of the settings only those that the mode knows."""
        device = choose_device(self.config.device)
        dtype, _ = choose_dtype(self.config.dtype, device)
        of_server, of_device = (
            {name: value for name, value in asdict(table).items() if name in known}
            for table, known in (
                (self.complete, known_of_server(self.mode)),
                (self.device, known_of_device(self.mode)),
            )
        )
        return RunDescription(
            run=uuid.uuid4().hex[:12],
            fingerprint=base.fingerprint(),
            config={"mode": self.mode, **of_server, "dtype": dtype, **of_device, "clients": len(self.files)},
            device=str(device),
            dtype=dtype,
            versions={"splitlora": version(), "torch": str(torch.__version__), "numpy": numpy.__version__},
        )


def train(task: Task, model: WholeModel, contestant: Contestant) -> None:
    """
    The whole run. Its folder holds what a server leaves behind: run.json, metrics.jsonl, evaluations.jsonl, events.jsonl and
    the adapter.

    Raises:
        ConfigError: the folder holds a run already.
        TrainingDiverged: a loss is not a number any more.
    """
    directory = RunDirectory(user_path(task.config.run_dir))
    clients = task.batches(model.base)
    held_out = None if task.eval_data is None else task.read(task.eval_data, model.base)
    directory.hold()
    try:
        with telling_to(directory.append_event):
            _train(task, model, contestant, directory, clients, held_out)
    finally:
        directory.release()


def _train(
    task: Task,
    model: WholeModel,
    contestant: Contestant,
    directory: RunDirectory,
    clients: dict[str, Batches],
    held_out: Dataset | None,
) -> None:
    settings, description = task.settings, task.description(model.base)
    directory.describe(description)
    last_steps = {name: batches.last_step(settings) for name, batches in clients.items()}
    total_steps = max(last_steps.values())
    for name, of_client in clients.items():
        samples, size = len(of_client.data.samples), of_client.batch_size
        text = f"{name} has joined with {count(samples, 'sample')} in batches of {size}"
        tell("joined", text, client=name, quiet=True, samples=samples, batch_size=size, steps=last_steps[name])
    tell("training_started", f"training starts: {count(total_steps, 'step')}", step=0, quiet=True, total_steps=total_steps)

    def evaluate(step: int) -> None:
        if held_out is not None:
            loss, labelled_tokens = contestant.evaluate(held_out)
            directory.append_evaluation(
                EvaluationRecord(step=step, time=time.time(), client=task.names[0], loss=loss, labelled_tokens=labelled_tokens)
            )

    evaluate(0)
    finished = time.perf_counter()
    with Progress(total_steps) as progress:
        for step in range(1, total_steps + 1):
            batches = {name: of_client.micro_batch(step, 0) for name, of_client in clients.items() if step <= last_steps[name]}
            rate = settings.learning_rate_at(step, total_steps)
            try:
                taken = contestant.take_step(step, batches, rate, ends_round=settings.ends_round(step) or step == total_steps)
            except TrainingDiverged as error:
                raise TrainingDiverged(f"in step {step} {error}") from None
            before, finished = finished, time.perf_counter()
            record = _record(step, batches, taken, rate, finished - before)
            directory.append_metrics(record)
            progress.update(step=step, loss=record.loss, tokens=record.tokens, num_bytes=record.num_bytes)
            if step < total_steps and task.evaluates_after(step):
                evaluate(step)  # the next step's seconds have it, as those of a split run do
    evaluate(total_steps)
    directory.save_adapter(contestant.adapter(), model.base.config, task.lora, task.config.model)
    directory.describe(description.with_adapter(step=total_steps, of=total_steps))
    tell("complete", f"all {count(total_steps, 'step')} are done; the adapter is saved", step=total_steps, quiet=True)


def _record(step: int, batches: dict[str, Batch], taken: Taken, rate: float, seconds: float) -> StepRecord:
    labelled = {name: len(batch.labels) for name, batch in batches.items()}
    labelled_tokens = sum(labelled.values())
    nothing = dict.fromkeys(batches, 0)
    return StepRecord(
        number=step,
        time=time.time(),
        step_seconds=seconds,
        loss=sum(taken.losses.values()) / max(1, labelled_tokens),
        learning_rate=rate,
        gradient_norm=taken.gradient_norm,
        labelled_tokens=labelled_tokens,
        tokens=sum(len(batch.tokens) for batch in batches.values()),
        losses={name: loss / labelled[name] for name, loss in taken.losses.items() if labelled[name]},
        labelled=labelled,
        samples={name: len(batch.lengths) for name, batch in batches.items()},
        seconds=taken.seconds,
        deadline=0.0,
        codec="",  # no activations travel
        server_compute=taken.server_compute,
        bytes_up=nothing | taken.bytes_up,
        bytes_down=nothing | taken.bytes_down,
    )


def dropout_seed(settings: RunSettings, client: str, step: int) -> int:
    """So that a run that is repeated drops the same; a split run's masks, of two sides, are others."""
    return derive_seed(settings.seed, client, "dropout", step)
