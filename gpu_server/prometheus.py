"""A run as Prometheus scrapes it. Names and units are by its conventions: base units, and counters end in _total."""

import math
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from protocol import Seconds
from terminal import version

from .federation import StepRecord
from .history import EVENT_KINDS, MOST_CLIENTS, EvaluationRecord, RunEvent
from .serving import Observer

__all__ = ["PrometheusObserver"]

STEP_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
"""Bounds of the histogram's buckets: from a tiny model on one machine to devices that are away for a night."""
STATES = ("joining", "training", "waiting", "saving", "finished", "stopped", "not_running")
"""See `Overview.as_json`."""
MOST_LATE_CLIENTS = 100
"""
That are named in a run of more than `MOST_CLIENTS`. Such a run has no series of each device: 18 a device are more than
Prometheus is made for. There are always those of all devices together.
"""
MEMBERSHIP = ("joined", "back")
"""Kinds of events with which a device is there."""
DIRECTIONS = ("up", "down")

Figures = Mapping[str, Any]


class PrometheusObserver(Observer):
    """
    Counts what this server does, and tells it, and how the run stands, to whoever scrapes it.

    Counters begin at 0 with the server, as Prometheus expects of a program: its rate() and increase() go on over a restart. A
    total of the run would not do: after a crash it is that of the last checkpoint, and Prometheus would take all of it for new.
    A step that is done again is counted again. Gauges are those of the run.

    Args:
        overview: how the run stands just now, with so many devices listed at most; see `Overview.as_json`. None while that is
            not known.
        run: what stays as it is, such as the run's identifier, by name of the label.
        clients: how many the run starts with.
    """

    def __init__(self, overview: Callable[[int], Figures | None], run: Mapping[str, str], clients: int) -> None:
        self._overview, self._run, self._has_series_of_clients = overview, run, clients <= MOST_CLIENTS
        counters = self._counters = CollectorRegistry()

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
        num_bytes = counter("bytes", "Bytes on all devices' sockets; up is to the server.", "direction")
        self._bytes = {direction: num_bytes.labels(direction) for direction in DIRECTIONS}
        seconds = counter("time_seconds", "Where all devices' time went.", "part")
        self._time = {part: seconds.labels(part) for part in vars(Seconds())}
        self._clients: dict[str, _Client] = {}
        self._last: StepRecord | None = None
        self._held_out: dict[str, EvaluationRecord] = {}
        """By client: the latest."""

    def exposition(self) -> Callable[[], tuple[bytes, str]]:
        """
        Call it on the thread that serves, where it looks how the run stands. What it returns takes a while, and may be called
        on any thread: it gives Prometheus' text format, and its content type.
        """
        now = self._overview(MOST_CLIENTS if self._has_series_of_clients else MOST_LATE_CLIENTS)
        last = {} if self._last is None else {"gradient_norm": self._last.gradient_norm, "deadline": self._last.deadline}
        losses = {name: record.loss for name, record in self._held_out.items()}
        return partial(self._write, _Standing(self._run, now, self._has_series_of_clients, last, losses))

    def _write(self, standing: "_Standing") -> tuple[bytes, str]:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_WithoutCreated(self._counters))
        registry.register(standing)
        ProcessCollector(registry=registry)
        return generate_latest(registry), CONTENT_TYPE_LATEST

    def step_finished(self, record: StepRecord) -> None:
        self._last = record
        self._steps.inc()
        self._tokens.inc(record.tokens)
        self._labelled_tokens.inc(record.labelled_tokens)
        self._server_compute.inc(record.server_compute)
        self._step_seconds.observe(record.step_seconds)
        self._bytes["up"].inc(sum(record.bytes_up.values()))
        self._bytes["down"].inc(sum(record.bytes_down.values()))
        for part, counted in self._time.items():
            counted.inc(sum(getattr(seconds, part) for seconds in record.seconds.values()))
        if self._has_series_of_clients:
            self._count_for_each(record)

    def _count_for_each(self, record: StepRecord) -> None:
        for name in {*record.bytes_up, *record.seconds, *record.labelled}:
            client = self._client(name)
            client.steps.inc(name in record.labelled)
            client.tokens.inc(record.tokens_of.get(name, 0))
            client.bytes_up.inc(record.bytes_up.get(name, 0))
            client.bytes_down.inc(record.bytes_down.get(name, 0))
            for part, seconds in vars(record.seconds.get(name, Seconds())).items():
                client.seconds[part].inc(seconds)

    def event_happened(self, event: RunEvent) -> None:
        self._events.labels(event.kind).inc()
        if event.kind in MEMBERSHIP and event.client is not None and self._has_series_of_clients:
            self._client(event.client)

    def evaluated(self, record: EvaluationRecord) -> None:
        if self._has_series_of_clients:
            self._held_out[record.client] = record

    def checkpoint_written(self, step: int) -> None:
        self._checkpoints.inc()

    def _client(self, name: str) -> "_Client":
        if name not in self._clients:
            up, down = (self._client_bytes.labels(name, direction) for direction in DIRECTIONS)
            self._clients[name] = _Client(
                steps=self._client_steps.labels(name),
                tokens=self._client_tokens.labels(name),
                bytes_up=up,
                bytes_down=down,
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


@dataclass(frozen=True, eq=False)
class _Standing(Collector):
    """How the run stands, as it was when it was asked for. What is not known yet is left out."""

    run: Mapping[str, str]
    now: Figures | None
    has_series_of_clients: bool
    last: Mapping[str, float] = field(default_factory=dict)
    """Figures of the last step."""
    held_out: Mapping[str, float] = field(default_factory=dict)
    """By client: nats per labelled token."""

    def collect(self) -> Iterator[Metric]:
        yield _info("build", "The server's program.", {"version": version(), "python": platform.python_version()})
        yield _info("run", "What the server trains.", self.run)
        if self.now is not None:
            devices = {device["name"]: device for device in self.now["devices"]}
            yield from _of_run(self.now)
            yield _lateness(devices, only_late=not self.has_series_of_clients)
            if self.has_series_of_clients:
                yield from _of_devices(devices)
        if self.last:
            yield _gauge("gradient_norm", "Of the last step.", self.last["gradient_norm"])
            yield _gauge("deadline_seconds", "After so long a step goes on with a quorum.", self.last["deadline"])
        yield _of_each("client_held_out_loss_nats", "Per labelled token of a device's held-out texts.", "client", self.held_out)


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
    yield _of_each("clients", "Devices by how they are; late ones are connected, too.", "state", now["device_states"])
    longest = max((each["seconds"] for each in now["waiting_for"]), default=0.0)
    yield _gauge("late_seconds", "For how long the run has been waiting for late devices; 0 while it is not.", longest)
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
    yield gauge("loss_nats", "Of a device's last step, per labelled token of its own.", lambda device: device["loss"])
    yield gauge("missed_steps", "Steps of the run that went on without a device.", lambda device: device["missed_steps"])
    slow = "A device's own seconds of a step over those of the others."
    yield gauge("slowness_ratio", slow, lambda device: device["slowness"])
    heard = "When a device was heard last, since 1970."
    yield gauge("last_heard_timestamp_seconds", heard, lambda device: device["last_heard"])


def _lateness(devices: Mapping[str, Figures], *, only_late: bool) -> Metric:
    waited = "For how long the run has been waiting for a device; 0 while it is not."
    late = {name: device["late_seconds"] or 0.0 for name, device in devices.items()}
    return _of_each("client_late_seconds", waited, "client", {name: late[name] for name in late if late[name] or not only_late})


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
