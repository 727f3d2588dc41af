"""Makes of its settings what a run consists of, before anybody is served: its folder, its door, its model, its federation."""

import platform
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from privacy import worth
from protocol import DELTA, EXACT, RunSettings
from protocol.settings import codec_name, codec_named
from split_model import (
    Adapter,
    LoraConfig,
    PretrainedModel,
    adapted_layers,
    adapter_shapes,
    check_cut_layer,
    check_lora_rank,
    choose_device,
    choose_dtype,
    initial_adapter,
    load_adapter,
)
from storage import RunDescription, find_model, part_that_differs
from terminal import importing, listed, version

from .checkpoints import CheckpointSpacing
from .config import OF_THE_RUN, ServerConfig, is_loopback, resumed, with_whole_paths
from .door import Door, open_door
from .edge_part import EdgePartStore
from .errors import ConfigError, ServerError
from .federation import CodecPolicy, Deadline, EarlyStopping, Federation, ModelLimits
from .history.overview import Overview
from .noise_observer import NoiseObserver
from .page.live import PageObserver
from .page.snapshot import Snapshot
from .part_trainer import make_trainer
from .prometheus import PrometheusObserver
from .ranks.place import Place
from .run_directory import RunDirectory
from .serving import Journal, Observer
from .torch_engine import TorchEngine

if TYPE_CHECKING:
    from .ranks.leader import Leader

__all__ = ["Run", "parting_on_failure", "set_up"]

ROUNDS_OF_DELTA = 10
"""From one checkpoint to the next, in that codec."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is not served yet."""

    config: ServerConfig
    choices: list[str]
    """What of the settings was chosen by the server or an earlier run, and why."""
    directory: RunDirectory
    door: Door
    edge_part: EdgePartStore | None
    """What is handed to devices without a model; None in float64, in which no graph computes."""
    engine: TorchEngine
    federation: Federation
    journal: Journal
    observers: list[Observer]
    """Of what the run has to tell beside its steps."""
    page: PageObserver
    prometheus: PrometheusObserver
    """These two are among them where the run has a page."""
    steps_before: int | None
    """``steps`` of a resumed run, as it was served the last time."""
    spacing: CheckpointSpacing | None
    """Which of the rounds' ends are worth a checkpoint; None where the federation alone decides that."""
    leader: "Leader | None"
    """Of the other processes that compute; None where there are none."""


def set_up(options: Mapping[str, Any]) -> Run:
    """
    Args:
        options: as `ServerConfig`, of a resumed run only those that are given again.

    Raises:
        ServerError, ModelError, AdapterError: a setting, the run's folder, the model or the initial adapter cannot be used; or
            this process is one of several that torchrun has started, and they cannot compute together.
    """
    place = Place.here()
    if place is None:
        return _set_up(options, None)
    if not place.leads:
        raise ConfigError(
            f"this process is rank {place.rank} of {place.num_ranks}: only rank 0 makes a GpuServer; the others call "
            "gpu_server.ranks.follower.follow with theirs"
        )
    from .ranks.leader import Leader

    leader = Leader(place, options)
    with parting_on_failure(leader):
        return _set_up(options, leader)


@contextmanager
def parting_on_failure(leader: "Leader | None") -> Iterator[None]:
    """
    Where something fails, send the other ranks home, if there are any.

    Raises:
        RankLost: see `Leader.raise_lost`.
    """
    try:
        yield
    except BaseException as error:
        if leader is not None:
            leader.close()
            if isinstance(error, KeyboardInterrupt | SystemExit):
                leader.raise_lost()
        raise


def _set_up(options: Mapping[str, Any], leader: "Leader | None") -> Run:
    options = with_whole_paths(options)
    directory = _directory(options)
    previous = RunDescription.read(directory.path, ServerError) if directory.resumes else None
    if previous:
        _check_settings_are_known(directory.path, previous)
    config, choices, device = _settled(options, previous)
    if config.shard and leader is None:
        if options.get("shard"):
            raise ConfigError(
                "shard divides the model over several ranks, and there is one: start them by torchrun --nproc-per-node 2 "
                "-m gpu_server serve, or leave --shard out"
            )
        config = replace(config, shard=False)
        choices.append("no shard: the run goes on with one rank, which holds the whole model")
    model = PretrainedModel(find_model(config.model))
    named, config = config.names_targets, config.for_model(model.config)
    if previous:
        resumed({"run_dir": config.run_dir, "lora_targets": config.lora_targets}, previous.config)
    elif not named:
        choices.append(f"lora-targets {','.join(config.lora_targets or ())}: those of this model ({model.config.family.title})")
    if leader is not None:
        device = leader.prepare(config, device)
        choices += leader.choices
    door = open_door(config)
    check_cut_layer(config.cut_layer, model.config.num_layers)
    check_lora_rank(config.lora_rank, model.config.width)
    settings = config.settings()
    lora = LoraConfig(**config.lora())
    adapter = _starting_adapter(config, directory, model, lora)
    make = make_trainer if leader is None else leader.trainer
    trainer = make(config, model, adapter, device)
    edge_names = adapter_shapes(model.config, lora, range(settings.cut_layer))
    engine = TorchEngine(trainer, settings, {name: adapter[name] for name in edge_names})
    edge_part = _edge_part(config, settings, directory, model)
    limits = _limits(config, model, lora, hands_over_part=edge_part is not None)
    if previous:
        _check_same_model(config, previous.fingerprint, limits.fingerprint)
    versions = {"splitlora": version(), "torch": str(torch.__version__), "numpy": numpy.__version__}
    host, now = platform.node(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    first = [{"versions": versions, "host": host, "time": now, "restarts": 0}]
    description = RunDescription(
        run=previous.run if previous else uuid.uuid4().hex[:12],
        restarts=previous.restarts + 1 if previous else 0,
        fingerprint=limits.fingerprint,
        config=asdict(config),
        device=str(device),
        dtype=config.dtype,
        noise=previous.noise if previous else None,
        versions=versions,
        of_the_run=sorted(OF_THE_RUN & {item.name for item in fields(ServerConfig)}),
        history=previous.served_with(versions, host, now) if previous else first,
    )
    journal = Journal(directory, description, model.config, lora, config.model)
    federation = Federation(
        description.run,
        settings,
        limits,
        engine.edge_adapter(),
        quorum=config.quorum,
        checkpoint_every=_rounds_to_checkpoint(config, settings) or 1,
        deadline=Deadline(config.step_deadline),
        codec_policy=_codec_policy(config, settings, directory),
        early_stopping=EarlyStopping.in_run(settings, config.early_stopping_threshold),
        restarts=description.restarts,
    )
    overview = Overview(description.run, config.clients, codec=codec_name(settings.activation_codec))
    page = PageObserver(
        Snapshot(overview),
        lambda: federation.waits_for(time.monotonic()),
        lambda client: federation.members[client].is_evaluating,
    )
    prometheus = PrometheusObserver(page.overview, {"run": description.run, "model": config.model}, config.clients)
    watching: list[Observer] = [page, prometheus] if door.has_page else []
    return Run(
        config=config,
        choices=choices,
        directory=directory,
        door=door,
        edge_part=edge_part,
        engine=engine,
        federation=federation,
        journal=journal,
        observers=[*_observers(config, settings, federation, journal, directory), *watching],
        page=page,
        prometheus=prometheus,
        steps_before=previous.config.get("steps") if previous else None,
        spacing=_spacing(settings, federation) if _rounds_to_checkpoint(config, settings) is None else None,
        leader=leader,
    )


def _rounds_to_checkpoint(config: ServerConfig, settings: RunSettings) -> int | None:
    """
    None: the clock decides. With `DELTA` it must not: a device keeps what it has sent since the last checkpoint, and codes
    otherwise when its cache is full of that, so that checkpoints have a part in what comes out.
    """
    if config.checkpoint_every is None and settings.activation_codec == DELTA:
        return ROUNDS_OF_DELTA
    return config.checkpoint_every


def _spacing(settings: RunSettings, federation: Federation) -> CheckpointSpacing:
    if settings.aggregate_every == 1:
        return CheckpointSpacing()
    adapter_and_moments = 3
    return CheckpointSpacing(adapter_and_moments * sum(matrix.nbytes for matrix in federation.edge_adapter.values()))


def _directory(options: Mapping[str, Any]) -> RunDirectory:
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


def _limits(config: ServerConfig, model: PretrainedModel, lora: LoraConfig, *, hands_over_part: bool) -> ModelLimits:
    return ModelLimits(
        fingerprint=model.fingerprint(),
        width=model.config.width,
        vocabulary_size=model.config.vocabulary_size,
        num_positions=model.config.num_positions,
        max_batch_tokens=config.max_batch_tokens,
        edge_shapes=adapter_shapes(model.config, lora, range(config.cut_layer)),
        hands_over_part=hands_over_part,
    )


def _edge_part(
    config: ServerConfig, settings: RunSettings, directory: RunDirectory, model: PretrainedModel
) -> EdgePartStore | None:
    if settings.precision == "float64":
        return None
    fingerprint, with_head = model.fingerprint(), settings.labels == "device"

    def build(folder: Path) -> None:
        with importing("the devices' part of the model", install="splitlora[server]"):
            from graphs import Adaptation, StoredWeights, build_part

        lora = LoraConfig(**settings.lora())
        build_part(
            folder,
            model.config,
            StoredWeights(model),
            cut_layer=settings.cut_layer,
            adaptation=Adaptation(
                layers=adapted_layers(model.config, lora) if settings.trains_edge else {},
                rank=lora.rank,
                alpha=lora.alpha,
                dropout=lora.dropout,
            ),
            precision=config.edge_weights,
            fingerprint=fingerprint,
            tokenizer_folder=model.folder,
            with_head=with_head,
        )

    # A newer version may write other graphs.
    wanted = {"fingerprint": fingerprint, "cut_layer": settings.cut_layer, **settings.lora(), "splitlora": version()}
    if with_head:
        wanted["head"] = True
    return EdgePartStore(directory.edge_part_folder, config.edge_weights, wanted, build)


def _settled(options: Mapping[str, Any], previous: RunDescription | None) -> tuple[ServerConfig, list[str], torch.device]:
    """All settings, what was chosen of them, and where the server computes."""
    given = ServerConfig.from_options(resumed(options, previous.config) if previous else options)
    device = choose_device(given.device)
    dtype, why = choose_dtype(previous.dtype if previous else given.dtype, device)
    config = given.settled(dtype)
    choices = [f"dtype {dtype}: {'as the run began' if previous else why}"]
    if previous:
        mine = {"splitlora": version(), "torch": str(torch.__version__)}
        changed = [
            f"{name} {now}, before {then}" for name, now in mine.items() if (then := previous.versions.get(name, now)) != now
        ]
        choices.extend(changed)
    if given.micro_batches is None:
        alone = "only this machine reaches the server, so both sides share its cores"
        apart = "while one is on its way, a device computes the next"
        choices.append(f"micro-batches {config.micro_batches}: {alone if is_loopback(config.host) else apart}")
    if config.labels == "device" and codec_named(config.codec) != EXACT:
        choices.append(f"codec {config.codec} is not checked: devices keep the labels, so the server has no loss to compare")
    return config, choices, device


def _starting_adapter(config: ServerConfig, directory: RunDirectory, model: PretrainedModel, lora: LoraConfig) -> Adapter:
    """
    Before the first step. A run that has a checkpoint needs no folder to begin with: it may go on on a machine that has none.
    """
    if config.init_adapter is not None and not directory.checkpoints.steps():
        return load_adapter(Path(config.init_adapter), model.config, lora)
    return initial_adapter(model.config, lora, config.seed)


def _codec_policy(config: ServerConfig, settings: RunSettings, directory: RunDirectory) -> CodecPolicy | None:
    if settings.activation_codec == EXACT or not settings.check_codec_every:
        return None
    policy = CodecPolicy(
        settings.activation_codec,
        tolerance=config.codec_tolerance,
        allow_int4=config.codec == "auto",
    )
    state = directory.codec_state()
    if state is not None:
        policy.restore(state)
    return policy


def _observers(
    config: ServerConfig, settings: RunSettings, federation: Federation, journal: Journal, directory: RunDirectory
) -> list[Observer]:
    observers: list[Observer] = []
    if settings.activation_noise or settings.gradient_noise:
        with importing("what noise is worth", install="splitlora[server]"):
            worth(1.0, 1, settings.noise_delta)  # loads its library, for which no device should have to wait later
        observers.append(NoiseObserver(federation, journal))
    if "tensorboard" in config.report_to:
        with importing("--report-to tensorboard", install="splitlora[tensorboard]"):
            from .tensorboard import TensorBoardObserver
        observers.append(TensorBoardObserver(directory.path, directory.checkpoints, config.clients))
    return observers


def _check_settings_are_known(run_dir: Path, previous: RunDescription) -> None:
    """
    Raises:
        ConfigError: a later version has served the run, with a setting that this one would go on without.
    """
    unknown = [name for name in previous.of_the_run if name not in {item.name for item in fields(ServerConfig)}]
    if unknown:
        later = previous.versions.get("splitlora", "a later version")
        raise ConfigError(
            f"the run in {run_dir} was served by splitlora {later}, and has settings that this version ({version()}) does not "
            f"know: {listed(unknown)}; go on with splitlora {later} or later"
        )


def _check_same_model(config: ServerConfig, before: str, now: str) -> None:
    """
    Raises:
        ConfigError: the model is not the one that the run began with.
    """
    if before != now:
        another = f"another {part_that_differs(before, now)}: its fingerprint is {before}, that of {config.model} is {now}"
        raise ConfigError(
            f"{config.run_dir} holds a run of {another}. Give --model the one that the run began with, or another --run-dir"
        )
