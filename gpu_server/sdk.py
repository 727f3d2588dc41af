"""The SDK: a server for one run, in five lines."""

import functools
import inspect
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec

import numpy
import torch

from protocol import DELTA, EXACT, RunSettings, Seconds
from protocol.limits import CACHES_ON_SERVER
from split_model import (
    DTYPES,
    Adapter,
    LoraConfig,
    PretrainedModel,
    adapter_shapes,
    check_cut_layer,
    choose_device,
    choose_dtype,
    initial_adapter,
    load_adapter,
)
from storage import CacheFolder, find_model, part_that_differs
from terminal import count, listed, version

from .checkpoints import SavedRound
from .config import ConfigError, ServerConfig, described, is_loopback, resumed, with_whole_paths
from .door import open_door
from .federation import Action, CodecPolicy, Deadline, Federation, ModelLimits, Phase, StepRecord
from .run_directory import RunDirectory
from .serving import RunServer
from .torch_engine import TorchEngine

__all__ = ["GpuServer", "RunEndedEarly"]

logger = logging.getLogger("gpu_server")


class RunEndedEarly(RuntimeError):
    """All clients left, or the server was stopped, before the last step."""


Settings = ParamSpec("Settings")


def _with_settings(
    config: Callable[Settings, ServerConfig],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, Settings], None]]:
    """Give an ``__init__(self, **options)`` the keyword arguments of a configuration: in type checkers, editors and `help`."""

    def with_signature(initialise: Callable[..., None]) -> Callable[Concatenate[Any, Settings], None]:
        own, _ = inspect.signature(initialise).parameters.values()
        settings = inspect.signature(config).parameters.values()
        initialise.__signature__ = inspect.Signature([own, *settings])  # type: ignore[attr-defined]
        initialise.__doc__ = f"Keyword arguments, and what they are as flags of the command line:\n\n{described()}"
        return initialise

    return with_signature


class GpuServer:
    """
    Holds the server part of a model and trains it for all devices of one run.

        with GpuServer(model="gpt2", clients=2, steps=300, run_dir="runs/demo") as server:
            for step in server.train():
                print(step.number, step.loss)

    Its keyword arguments are the fields of `ServerConfig`; ``help(GpuServer.__init__)`` lists them.

    Raises:
        ConfigError, ModelError, AdapterError: a setting, the model or the initial adapter cannot be used.
    """

    config: ServerConfig
    """All settings, those of a resumed run included."""
    choices: list[str]
    """What of them was chosen by the server or an earlier run, and why."""
    url: str
    """
    Where the server listens, such as ws://127.0.0.1:8765 or wss://0.0.0.0:8765; there is one from the beginning of the ``with``
    block on. Devices elsewhere replace 0.0.0.0, which means all of this machine's addresses, with its name or one of these.
    """

    @_with_settings(ServerConfig)
    def __init__(self, **options: Any) -> None:
        options = with_whole_paths(options)
        self._directory = directory = _run_directory(options)
        recorded = directory.description() if directory.resumes else None
        given = ServerConfig.from_options(resumed(options, recorded["config"]) if recorded else options)
        device = choose_device(given.device)
        dtype, why = choose_dtype(str(recorded["dtype"]) if recorded else given.dtype, device)
        self.config = config = given.settled(dtype)
        self.choices = [f"dtype {dtype}: {'as the run began' if recorded else why}"]
        if given.micro_batches is None:
            alone = "only this machine reaches the server, so both sides share its cores"
            apart = "while one is on its way, a device computes the next"
            self.choices.append(f"micro-batches {config.micro_batches}: {alone if is_loopback(config.host) else apart}")
        self._door = open_door(config)
        model = PretrainedModel(find_model(config.model))
        check_cut_layer(config.cut_layer, model.config.num_layers)
        weight_dtype = DTYPES[dtype]
        settings = config.settings(precision="float64" if weight_dtype == torch.float64 else "float32")
        self._lora = LoraConfig(**settings.lora())
        self._compute = compute = TorchEngine(
            model, settings, self._starting_adapter(model), weight_dtype=weight_dtype, device=device
        )
        limits = ModelLimits(
            fingerprint=model.fingerprint(),
            width=model.config.width,
            vocabulary_size=model.config.vocabulary_size,
            num_positions=model.config.num_positions,
            max_batch_tokens=config.max_batch_tokens,
            edge_shapes=adapter_shapes(model.config, self._lora, range(config.cut_layer)),
        )
        self._federation = Federation(
            recorded["run"] if recorded else uuid.uuid4().hex[:12],
            settings,
            limits,
            compute.edge_adapter(),
            quorum=config.quorum,
            checkpoint_every=config.checkpoint_every,
            deadline=Deadline(config.step_deadline),
            codec_policy=_codec_policy(config, settings, directory),
            restarts=recorded.get("restarts", 0) + 1 if recorded else 0,
        )
        self._recorded_steps = recorded["config"].get("steps") if recorded else None
        if recorded and recorded["fingerprint"] != limits.fingerprint:
            what = part_that_differs(recorded["fingerprint"], limits.fingerprint)
            raise ConfigError(
                f"{config.run_dir} holds a run of another {what}: its fingerprint is {recorded['fingerprint']}, that of "
                f"{config.model} is {limits.fingerprint}"
            )
        self._description = {
            "run": self._federation.run,
            "restarts": self._federation.restarts,
            "fingerprint": limits.fingerprint,
            "config": asdict(config),
            "device": str(device),
            "dtype": dtype,
            "versions": {"splitlora": version(), "torch": str(torch.__version__), "numpy": numpy.__version__},
        }

    @property
    def adapter_folder(self) -> Path:
        """Where the adapter is when the run is complete."""
        return self._directory.path / "adapter"

    def __enter__(self) -> "GpuServer":
        """Listen; ``url`` tells where. ConfigError if the address cannot be listened on, or the run not be gone on with."""
        self._directory.hold()
        try:
            return self._begin()
        except BaseException:
            self._directory.release()
            raise

    def _begin(self) -> "GpuServer":
        self._records: queue.Queue[StepRecord | BaseException | None] = queue.Queue()
        self._server = RunServer(
            self._federation,
            self._compute,
            door=self._door,
            model_name="" if Path(self.config.model).is_dir() else self.config.model,
            linger=self.config.linger,
            report=self._record,
            keep=self._keep,
            save=self._save,
            kept=self._samples_of if self._federation.settings.activation_codec == DELTA else None,
        )
        actions = self._go_back() if self._federation.restarts else []
        listening: Future[str] = Future()
        self._thread = threading.Thread(target=self._serve, args=(listening, actions), name="server")
        self._thread.start()
        try:
            listening.result()
        except BaseException:
            if listening.exception() is None:  # Ctrl-C or SIGTERM meanwhile
                self.suspend()
            self._thread.join()
            raise
        return self

    def _go_back(self) -> list[Action]:
        """To the last checkpoint, or to the beginning of a run that has written none."""
        saved = self._directory.checkpoints.latest(self._federation.run)
        self._directory.forget_metrics_after(saved.step if saved else 0)
        if saved is None:
            return []
        if saved.step == self._recorded_steps != self.config.steps and not self._devices_can_go_on_after_the_end:
            raise ConfigError(
                f"the run in {self.config.run_dir} is complete, and its devices no longer have what they would go on with "
                f"(aggregate-every {self.config.aggregate_every}, codec {self.config.codec}); {self._adapter_to_start_from}"
            )
        self._compute.restore(saved.state)
        federation = self._federation
        federation.edge_adapter = self._compute.edge_adapter()
        earliest = self._directory.checkpoints.steps()[0]
        actions = federation.restore(saved.step, earliest, saved.membership, time.monotonic())
        self._tell_where_it_goes_on()
        return actions

    @property
    def _devices_can_go_on_after_the_end(self) -> bool:
        """In longer rounds they have forgotten AdamW's moments by then, and in delta their samples."""
        return self.config.aggregate_every == 1 and self._federation.settings.activation_codec != DELTA

    def _tell_where_it_goes_on(self) -> None:
        federation, config = self._federation, self.config
        here = federation.unfinished()
        if federation.step == federation.total_steps:
            may_be_longer = config.lr_schedule == "constant" and config.steps and self._devices_can_go_on_after_the_end
            logger.info(
                "all %s of this run are done, and its adapter is in %s; to train further: %sanother run with --init-adapter %s",
                count(federation.step, "step"),
                self.adapter_folder,
                "a larger --steps, or " if may_be_longer else "",
                self.adapter_folder,
            )
        elif here:
            logger.info("going on after step %d; waiting for %s to come back", federation.step, listed(here))

    def _starting_adapter(self, model: PretrainedModel) -> Adapter:
        """A resumed run goes on from its checkpoint, on a machine perhaps where the folder it began with is not."""
        if self.config.init_adapter is not None and not self._directory.checkpoints.steps():
            return load_adapter(Path(self.config.init_adapter), model.config, self._lora)
        return initial_adapter(model.config, self._lora, self.config.seed)

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
        if federation.phase is Phase.FINISHED:
            all_left = not federation.unfinished()
            what = f"{'all devices' if all_left else 'the devices that had steps to do'} have left the run"
        else:
            what = "the server was stopped"
        where = f"; {self._adapter_to_start_from}" if federation.step else ""
        raise RunEndedEarly(f"{what} after step {federation.step} of {federation.total_steps}{where}")

    @property
    def _adapter_to_start_from(self) -> str:
        return (
            f"its adapter is in {self.adapter_folder}, and another run starts from it with --init-adapter {self.adapter_folder}"
        )

    @property
    def total_steps(self) -> int:
        """Length of the run in steps; 0 until it starts."""
        return self._federation.total_steps

    def stop(self) -> None:
        """End the run before its time; its clients are told. From any thread."""
        self._server.stop()

    def suspend(self) -> None:
        """Stop after a checkpoint; the clients try to come back until the run goes on with ``resume``. From any thread."""
        self._server.suspend()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit):
            self.suspend()  # Ctrl-C or SIGTERM: the run may go on later
        else:
            self.stop()
        self._thread.join()
        if self._federation.phase is Phase.FINISHED:
            self._directory.forget_samples()
        self._directory.release()

    def _serve(self, listening: "Future[str]", actions: list[Action]) -> None:
        def begin(url: str) -> None:
            # Not before: a run whose port is in use leaves nothing behind.
            self._description["url"] = url
            self._directory.describe(self._description)
            self.url = url
            listening.set_result(url)

        try:
            self._server.run(begin, actions)
        except Exception as error:
            if not listening.done():
                listening.set_exception(error)
            self._records.put(error)
        finally:
            self._records.put(None)

    def _record(self, record: StepRecord) -> None:
        row = {
            "step": record.number,
            "loss": record.loss,
            "labelled_tokens": record.labelled_tokens,
            "tokens": record.tokens,
            "deadline": round(record.deadline, 3),
            "codec": record.codec,
            "server_compute": round(record.server_compute, 6),
            "clients": {
                name: {
                    "bytes_up": record.bytes_up[name],
                    "bytes_down": record.bytes_down[name],
                    "seconds": {part: round(value, 6) for part, value in vars(record.seconds.get(name, Seconds())).items()},
                }
                for name in record.bytes_up
            },
        }
        self._directory.append_metrics(row)
        self._records.put(record)

    def _keep(self, step: int, membership: dict[str, Any], state: Adapter) -> None:
        self._directory.keep_metrics()
        saved = SavedRound(run=self._federation.run, step=step, membership=membership, state=state)
        self._directory.checkpoints.write(saved)

    @functools.cache  # noqa: B019  # one for each client, as long as the server
    def _samples_of(self, client: str) -> CacheFolder:
        return self._directory.samples_of(client, CACHES_ON_SERVER * self.config.cache_bytes)

    def _save(self) -> None:
        self._directory.save_adapter(self._compute.adapter(), self._lora, self.config.model)
        reached = {"step": self._federation.round, "of": self._federation.total_steps}
        self._directory.describe({**self._description, "adapter": reached})


def _run_directory(options: dict[str, Any]) -> RunDirectory:
    run_dir, resume, or_start = options.get("run_dir"), options.get("resume", False), options.get("resume_or_start", False)
    for name, value in (("resume", resume), ("resume-or-start", or_start)):
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be true or false, got {value!r}")
    if run_dir is None and (resume or or_start):
        raise ConfigError("run-dir is missing: the folder of the run to go on with")
    if not isinstance(run_dir, str):
        ServerConfig.from_options(options)  # says what is wrong with it
    path = Path(str(run_dir))
    return RunDirectory(path, resume=resume or (or_start and RunDirectory.holds_run(path)))


def _codec_policy(config: ServerConfig, settings: RunSettings, directory: RunDirectory) -> CodecPolicy | None:
    if settings.activation_codec == EXACT or not settings.check_codec_every:
        return None
    policy = CodecPolicy(
        settings.activation_codec,
        tolerance=config.codec_tolerance,
        allow_int4=config.codec == "auto",
        save_state=directory.record_codecs,
    )
    recorded = directory.recorded_codecs()
    if recorded is not None:
        policy.restore(recorded)
    return policy
