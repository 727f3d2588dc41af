"""A run as Prometheus scrapes it. Names and units are by its conventions: base units, and counters end in _total."""

import math
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from protocol import Seconds
from terminal import version

from .federation import RunStatus, StepRecord
from .history import EVENT_KINDS, EvaluationRecord, RunEvent
from .serving import Observer

__all__ = ["PrometheusObserver"]

STEP_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
"""Bounds of the histogram's buckets: from a tiny model on one machine to devices that are away for a night."""
STATES = ("joining", "training", "waiting", "saving", "finished", "stopped", "not_running")
"""See `Overview.as_json`."""

Figures = Mapping[str, Any]


class PrometheusObserver(Observer):
    """
    Counts what this server does, and tells it, and how the run stands, to whoever scrapes it.

    Counters begin at 0 with the server, as Prometheus expects of a program: its rate() and increase() go on over a restart. A
    total of the run would not do: after a crash it is that of the last checkpoint, and Prometheus would take all of it for new.
    A step that is done again is counted again. Gauges are those of the run.

    Args:
        overview: how the run stands just now; see `Overview.as_json`. None while that is not known.
        run: what stays as it is, such as the run's identifier, by name of the label.
    """

    def __init__(self, overview: Callable[[], Figures | None], run: Mapping[str, str]) -> None:
        counters = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"splitlora_{name}", text, labels, registry=counters)

        self._steps = counter("steps", "Steps that this server has finished.")
        self._tokens = counter("tokens", "Tokens of these steps.")
        self._labelled_tokens = counter("labelled_tokens", "Tokens of these steps that were to be predicted.")
        self._server_compute = counter("server_compute_seconds", "Seconds that the server has computed.")
        self._checkpoints = counter("checkpoints", "Checkpoints that were written.")
        self._events = counter("events", "Events by kind, as events.jsonl has them.", "kind")
        for kind in EVENT_KINDS:
            self._events.labels(kind)  # what appears with a value has no increase
        self._step_seconds = Histogram(
            "splitlora_step_seconds",
            "Seconds from one step's end to the next one's.",
            buckets=STEP_SECONDS,
            registry=counters,
        )
        self._client_steps = counter("client_steps", "Steps that a device took part in.", "client")
        self._client_tokens = counter("client_tokens", "Tokens of a device.", "client")
        self._client_bytes = counter("client_bytes", "Bytes on a device's socket; up is to the server.", "client", "direction")
        self._client_time = counter("client_time_seconds", "Where a device's time went.", "client", "part")
        self._clients: dict[str, _Client] = {}

        self._standing = _Standing(overview, run)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_WithoutCreated(counters))
        self._registry.register(self._standing)
        ProcessCollector(registry=self._registry)

    def exposition(self) -> tuple[bytes, str]:
        """Prometheus' text format, and its content type. Call it on the thread that serves."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def step_finished(self, record: StepRecord) -> None:
        self._standing.last = record
        self._steps.inc()
        self._tokens.inc(record.tokens)
        self._labelled_tokens.inc(record.labelled_tokens)
        self._server_compute.inc(record.server_compute)
        self._step_seconds.observe(record.step_seconds)
        for name in {*record.bytes_up, *record.seconds, *record.labelled}:
            client = self._client(name)
            client.steps.inc(name in record.labelled)
            client.tokens.inc(record.tokens_of.get(name, 0))
            client.bytes_up.inc(record.bytes_up.get(name, 0))
            client.bytes_down.inc(record.bytes_down.get(name, 0))
            for part, seconds in vars(record.seconds.get(name, Seconds())).items():
                client.seconds[part].inc(seconds)

    def status_changed(self, status: RunStatus) -> None:
        for name in status.members:
            self._client(name)

    def event_happened(self, event: RunEvent) -> None:
        self._events.labels(event.kind).inc()

    def evaluated(self, record: EvaluationRecord) -> None:
        self._standing.held_out[record.client] = record

    def checkpoint_written(self, step: int) -> None:
        self._checkpoints.inc()

    def _client(self, name: str) -> "_Client":
        if name not in self._clients:
            self._clients[name] = _Client(
                steps=self._client_steps.labels(name),
                tokens=self._client_tokens.labels(name),
                bytes_up=self._client_bytes.labels(name, "up"),
                bytes_down=self._client_bytes.labels(name, "down"),
                seconds={part: self._client_time.labels(name, part) for part in vars(Seconds())},
            )
        return self._clients[name]


@dataclass(frozen=True, kw_only=True)
class _Client:
    """Its counters, from when it joins on: what appears with a value has no increase."""

    steps: Counter
    tokens: Counter
    bytes_up: Counter
    bytes_down: Counter
    seconds: dict[str, Counter]
    """By part."""


class _WithoutCreated(Collector):
    """The text format has no place for when a counter began, so that the library makes a gauge of it for each."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


class _Standing(Collector):
    """How the run stands, made when it is asked for. What is not known yet is left out."""

    def __init__(self, overview: Callable[[], Figures | None], run: Mapping[str, str]) -> None:
        self._overview, self._run = overview, run
        self.last: StepRecord | None = None
        self.held_out: dict[str, EvaluationRecord] = {}

    def collect(self) -> Iterator[Metric]:
        yield _info("build", "The server's program.", {"version": version(), "python": platform.python_version()})
        yield _info("run", "What the server trains.", self._run)
        now = self._overview()
        if now is not None:
            yield from _of_run(now)
            yield from _of_devices({device["name"]: device for device in now["devices"]})
        if self.last is not None:
            yield _gauge("gradient_norm", "Of the last step.", self.last.gradient_norm)
            yield _gauge("deadline_seconds", "After so long a step goes on with a quorum.", self.last.deadline)
        losses = {name: record.loss for name, record in self.held_out.items()}
        yield _of_each("client_held_out_loss_nats", "Per labelled token of a device's held-out texts.", "client", losses)


def _of_run(now: Figures) -> Iterator[Metric]:
    restarts = "How often the run's server was started again."  # the one figure of the run that only grows
    yield CounterMetricFamily("splitlora_server_restarts", restarts, value=now["restarts"])
    if now["codec"]:
        yield _info("codec", "In which activations come.", {"codec": now["codec"]})
    states = {state: state == now["state"] for state in STATES}
    yield _of_each("run_state", "1 for the state that the run is in.", "state", states)
    yield _gauge("step", "Steps that the run has finished.", now["step"])
    yield _gauge("planned_steps", "Steps that the run is to have; 0 until it starts.", now["total_steps"])
    yield _gauge("remaining_seconds", "Until the run is complete, at its last speed.", now["seconds_left"])
    yield _gauge("expected_clients", "Devices that the run starts with.", now["clients"])
    yield _gauge("connected_clients", "Devices that are connected.", now["connected"])
    yield _gauge("loss_nats", "Of the last step, per labelled token.", now["loss"])
    yield _gauge("learning_rate", "Of the last step.", now["learning_rate"])
    if held_out := now["held_out"]:
        yield _gauge("held_out_loss_nats", "Per labelled token of all devices' held-out texts.", held_out["loss"])
        yield _gauge("held_out_step", "The step after which that was measured.", held_out["step"])
    if checkpoint := now["last_checkpoint"]:
        yield _gauge("last_checkpoint_step", "The step from which the run can go on.", checkpoint["step"])
        yield _gauge("last_checkpoint_timestamp_seconds", "When that was written, since 1970.", checkpoint["time"])


def _of_devices(devices: Mapping[str, Figures]) -> Iterator[Metric]:
    def gauge(name: str, text: str, value: Callable[[Figures], float | None]) -> Metric:
        return _of_each(f"client_{name}", text, "client", {client: value(device) for client, device in devices.items()})

    yield gauge("connected", "1 while a device is connected.", lambda device: device["state"] in ("connected", "late"))
    waited = "For how long the run has been waiting for a device; 0 while it is not."
    yield gauge("late_seconds", waited, lambda device: device["late_seconds"] or 0.0)
    yield gauge("loss_nats", "Of a device's last step, per labelled token of its own.", lambda device: device["loss"])
    yield gauge("missed_steps", "Steps of the run that went on without a device.", lambda device: device["missed_steps"])
    slow = "A device's own seconds of a step over those of the others."
    yield gauge("slowness_ratio", slow, lambda device: device["slowness"])
    heard = "When a device was heard last, since 1970."
    yield gauge("last_heard_timestamp_seconds", heard, lambda device: device["last_heard"])


def _gauge(name: str, text: str, value: float | None) -> Metric:
    """Without a sample where there is no such number."""
    family = GaugeMetricFamily(f"splitlora_{name}", text)
    if value is not None and math.isfinite(value):
        family.add_metric([], value)
    return family


def _of_each(name: str, text: str, label: str, values: Mapping[str, float | None]) -> Metric:
    family = GaugeMetricFamily(f"splitlora_{name}", text, labels=[label])
    for labelled, value in values.items():
        if value is not None and math.isfinite(value):
            family.add_metric([labelled], value)
    return family


def _info(name: str, text: str, labels: Mapping[str, str]) -> Metric:
    return InfoMetricFamily(f"splitlora_{name}", text, value=dict(labels))
