"""The SDK: a server for one run, in five lines."""

import queue
import threading
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy
import torch

from split_model import (
    Adapter,
    BaseModel,
    LoraConfig,
    adapter_shapes,
    check_cut_layer,
    choose_device,
    choose_dtype,
    find_model,
    initial_adapter,
    load_adapter,
)
from terminal import version

from .compute import Compute
from .config import ServerConfig
from .federation import Federation, ModelLimits, Phase
from .run_directory import RunDirectory
from .server import RunServer, StepRecord

__all__ = ["GpuServer", "RunEndedEarly"]


class RunEndedEarly(RuntimeError):
    """All clients left, or the server was stopped, before the last step."""


class GpuServer:
    """
    Holds the server part of a model and trains it for all devices of one run.

        with GpuServer(model="gpt2", clients=2, steps=300, run_dir="runs/demo") as server:
            for step in server.train():
                print(step.number, step.loss)

    Args:
        options: the fields of `ServerConfig`; on the command line they are flags.

    Raises:
        ConfigError, ModelError, AdapterError: a setting, the model or the initial adapter cannot be used.
    """

    def __init__(self, **options: Any) -> None:
        self.config = config = ServerConfig.from_options(options)
        model = BaseModel(find_model(config.model))
        check_cut_layer(config.cut_layer, model.config.num_layers)
        device = choose_device(config.device)
        weight_dtype = choose_dtype(config.dtype, device)
        settings = config.settings(precision="float64" if weight_dtype == torch.float64 else "float32")
        self._lora = LoraConfig(**settings.lora())
        compute = Compute(
            model, settings, _starting_adapter(config, model, self._lora), weight_dtype=weight_dtype, device=device
        )
        limits = ModelLimits(
            fingerprint=model.fingerprint(),
            width=model.config.width,
            vocabulary_size=model.config.vocabulary_size,
            num_positions=model.config.num_positions,
            max_batch_tokens=config.max_batch_tokens,
            edge_shapes=adapter_shapes(model.config, self._lora, range(config.cut_layer)),
        )
        self._federation = Federation(uuid.uuid4().hex[:12], settings, limits, compute.edge_adapter())
        self._compute = compute
        self._directory = RunDirectory(Path(config.run_dir))
        self._description = {
            "run": self._federation.run,
            "fingerprint": limits.fingerprint,
            "config": asdict(config),
            "device": str(device),
            "dtype": str(weight_dtype).removeprefix("torch."),
            "versions": {"splitlora": version(), "torch": str(torch.__version__), "numpy": numpy.__version__},
        }

    @property
    def adapter_folder(self) -> Path:
        """Where the adapter is when the run is complete."""
        return self._directory.path / "adapter"

    def __enter__(self) -> "GpuServer":
        """Listen; ``url`` tells where. ConfigError if the address cannot be listened on."""
        self._records: queue.Queue[StepRecord | BaseException | None] = queue.Queue()
        self._server = RunServer(self._federation, self._compute, report=self._record, save=self._save)
        listening: queue.Queue[str | BaseException] = queue.Queue()
        self._thread = threading.Thread(target=self._serve, args=(listening,), name="server")
        self._thread.start()
        answer = listening.get()
        if isinstance(answer, BaseException):
            self._thread.join()
            raise answer
        return self

    def train(self) -> Iterator[StepRecord]:
        """
        Follow the run step by step, until it is complete and its clients have left.

        Raises:
            RunEndedEarly: all clients left, or `stop` was called, before the last step; what was learnt until then is saved.
            TrainingDiverged: the loss is no longer a number.
            ConfigError: the run directory cannot be written any more.
        """
        while (record := self._records.get()) is not None:
            if isinstance(record, BaseException):
                raise record
            yield record
        self._records.put(None)  # whoever follows a second time finds the end, too
        federation = self._federation
        if federation.phase is Phase.FINISHED and federation.step == federation.total_steps:
            return
        what = "all clients left" if federation.phase is Phase.FINISHED else "the server was stopped"
        where = f"; the adapter of that step is in {self.adapter_folder}" if federation.step else ""
        raise RunEndedEarly(f"{what} after step {federation.step} of {federation.total_steps}{where}")

    @property
    def total_steps(self) -> int:
        """Length of the run in steps; 0 until it starts."""
        return self._federation.total_steps

    def stop(self) -> None:
        """End the run before its time; its clients are told. From any thread."""
        self._server.stop()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()
        self._thread.join()

    def _serve(self, listening: "queue.Queue[str | BaseException]") -> None:
        def begin(url: str) -> None:
            # Not before: a run whose port is in use leaves nothing behind.
            self._directory.describe(self._description)
            self.url = url
            listening.put(url)

        try:
            self._server.run(self.config.host, self.config.port, begin)
        except Exception as error:
            listening.put(error)
            self._records.put(error)
        finally:
            self._records.put(None)

    def _record(self, record: StepRecord) -> None:
        row = {
            "step": record.number,
            "loss": record.loss,
            "labelled_tokens": record.labelled_tokens,
            "tokens": record.tokens,
            "clients": {
                name: {
                    "bytes_up": record.bytes_up[name],
                    "bytes_down": record.bytes_down[name],
                    "seconds": {part: round(value, 6) for part, value in record.seconds.get(name, {}).items()},
                }
                for name in record.bytes_up
            },
        }
        self._directory.append_metrics(row)
        self._records.put(record)

    def _save(self) -> None:
        self._directory.save_adapter(self._compute.adapter(), self._lora, self.config.model)


def _starting_adapter(config: ServerConfig, model: BaseModel, lora: LoraConfig) -> Adapter:
    if config.init_adapter is not None:
        return load_adapter(Path(config.init_adapter), model.config, lora)
    return initial_adapter(model.config, lora, config.seed)
