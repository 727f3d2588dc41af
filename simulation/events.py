"""
The discrete-event simulation. It calls the federation's public methods in the order of simulated time, as the server does.

A message leaves a device when its processor is done and its uplink is free, crosses the link, then the server's own, and waits
for the thread that serves, which takes questions one after the other in the order in which they came. An answer crosses the
server's link and the device's downlink in the same way. What the federation wants computed is computed one after the other.
What a lost connection carried, either way, is lost with it.
"""

import gc
import heapq
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpu_server.federation import (
    Action,
    Aggregate,
    Aggregated,
    Checkpoint,
    Deadline,
    Federation,
    FinishRun,
    FinishStep,
    ModelLimits,
    Phase,
    Reply,
    Train,
    Trained,
)
from protocol import Goodbye, Hello, Itinerary, Message
from terminal import duration

from .cost import Meter, name_of
from .device import Device, Hardware, SimulationFault
from .messages import ADAPTER, LONGEST, VALUES, join
from .plan import Plan
from .result import Result, StepOutcome
from .traffic import Traffic

__all__ = ["RunStuck", "SimulationFault", "make_federation", "simulate"]

ARRIVES, HEARS, JOINS, IS_LOST, IS_COMPUTED = range(5)
HANDSHAKE_ROUND_TRIPS = 4
"""TCP, TLS, Hello and Join."""
MOST_JITTERS = 2**16
BITS = 8
LONGEST_STEP = 30 * 86400.0
"""Simulated seconds without a step, after which the run is taken for stuck."""
LATENESS = 1e-6
"""Seconds by which the server's alarm rings late: at the moment itself, rounding may make it early."""
NEVER = float("inf")


class RunStuck(RuntimeError):
    """A run of this plan goes on so slowly that nobody would wait for it."""


Trace = Callable[[float, str, str, Message], None]
"""Told the time, the device's name, "up" or "down", and a message that is delivered."""


def make_federation(plan: Plan) -> Federation:
    limits = ModelLimits(
        fingerprint="simulated",
        width=1,
        vocabulary_size=2,
        num_positions=LONGEST,
        max_batch_tokens=plan.micro_batches * LONGEST,
        edge_shapes=dict.fromkeys(ADAPTER, (1, 1)),
        hands_over_part=True,
    )
    return Federation(
        *("simulated", plan.settings(), limits, ADAPTER, plan.needed, plan.checkpoint_every), deadline=Deadline(plan.deadline)
    )


def simulate(
    plan: Plan,
    *,
    told: Callable[[StepOutcome], None] = lambda step: None,
    meter: Meter | None = None,
    trace: Trace | None = None,
) -> Result:
    """
    Args:
        told: hears of every finished step.

    Raises:
        RunStuck: a step takes more than a month of simulated time.
        SimulationFault: the run does not come to its end, or an answer is out of its order.
    """
    # Python's collector would walk all that the simulation keeps, over and over, in the middle of decisions that are measured.
    collects = gc.isenabled()
    gc.disable()
    try:
        return _Simulation(plan, told, meter or Meter(), trace).run()
    finally:
        if collects:
            gc.enable()


class _Simulation:
    def __init__(self, plan: Plan, told: Callable[[StepOutcome], None], meter: Meter, trace: Trace | None) -> None:
        self._plan, self._told, self._meter, self._trace = plan, told, meter, trace
        self.federation = make_federation(plan)
        self._now = 0.0
        self._events: list[tuple[float, int, int, Any, Any, int]] = []
        """A heap of when, a number that keeps the order of equal times, what, of whom, with what, on which connection."""
        self._num_events = 0
        self._to_serve: deque[tuple[float, Device, Message, int]] = deque()
        """Messages before the thread that serves, and when each has been served; in that order."""
        self._served_until = self._link_up_free = self._link_down_free = self._computed_until = 0.0
        self._alarm = NEVER
        traffic = Traffic(plan.tokens, plan.micro_batches, plan.width, plan.cut_layer, plan.lora_rank, plan.codec)
        self._bytes, self._adapter_bytes = traffic.bytes_by_kind(), 4 * traffic.adapter_elements
        self._server_speed = plan.server.gigabits * 1e9 / BITS
        self._draws = np.random.default_rng(plan.seed)
        self._devices = self._drawn_devices()
        self._unfinished = plan.devices
        self._steps: list[StepOutcome] = []
        self._last_step_at = 0.0
        self._counted = self._bytes_up = self._bytes_down = 0.0
        self._losses = self._left = 0

    def _drawn_devices(self) -> dict[str, Device]:
        """The same for the same seed and number, whatever else the plan says."""
        plan, fleet, draws, number = self._plan, self._plan.fleet, self._draws, self._plan.devices
        speeds = fleet.device_speed * np.exp(fleet.device_spread * draws.standard_normal(number))
        forwards = plan.tokens / plan.micro_batches * plan.block_share / speeds / 2  # the other half is the way back
        links = np.exp(fleet.link_spread * draws.standard_normal(number))
        uplinks, downlinks = (megabits * 1e6 / BITS * links for megabits in (fleet.uplink, fleet.downlink))
        latencies = fleet.round_trip / 2 / links
        jitters = np.exp(fleet.jitter * draws.standard_normal(MOST_JITTERS)).tolist()
        arrivals = fleet.arrival * draws.random(number)
        itinerary = Itinerary(self.federation.settings, plan.steps)
        next_jitter = -1

        def jitter() -> float:
            nonlocal next_jitter
            next_jitter = (next_jitter + 1) % MOST_JITTERS
            return float(jitters[next_jitter])

        devices = {}
        each = zip(forwards.tolist(), uplinks.tolist(), downlinks.tolist(), latencies.tolist(), strict=True)
        for place, drawn in enumerate(each):
            device = Device(name_of(place), Hardware(*drawn), itinerary, plan.in_flight, jitter, self._send)
            devices[device.name] = device
            self._happens(float(arrivals[place]), JOINS, device)
        return devices

    # Time

    def run(self) -> Result:
        began = time.thread_time()
        while self._unfinished:
            if not self._events and not self._to_serve and self._alarm == NEVER:
                raise SimulationFault(f"nothing will happen any more, and the run is {self.federation.phase.value}")
            self._next()
            if self._now - self._last_step_at > LONGEST_STEP + self._plan.fleet.arrival:
                raise RunStuck(
                    f"no step was finished in {duration(LONGEST_STEP)} of simulated time, and the run is "
                    f"{self.federation.phase.value}; choose a quorum, fewer devices, or faster ones"
                )
        self._check_end()
        return Result(
            plan=self._plan,
            steps=self._steps,
            worked=sum(device.worked for device in self._devices.values()),
            counted=self._counted,
            bytes_up=self._bytes_up,
            bytes_down=self._bytes_down,
            losses=self._losses,
            left=self._left,
            seconds=self._now,
            spent=self._meter.spent,
            took=time.thread_time() - began,
            where=self._meter.where(),
        )

    def _next(self) -> None:
        """The next thing that happens."""
        served = self._to_serve[0][0] if self._to_serve else NEVER
        event = self._events[0][0] if self._events else NEVER
        if self._alarm <= served and self._alarm <= event:
            self._tick()
        elif served <= event:
            when, device, message, connection = self._to_serve.popleft()
            self._now = max(self._now, when)
            if connection == device.connection:
                self._receive(device, message)
        else:
            when, _, kind, subject, payload, connection = heapq.heappop(self._events)
            self._now = max(self._now, when)
            if kind == HEARS:
                if connection == subject.connection:
                    if self._trace is not None:
                        self._trace(self._now, subject.name, "down", payload)
                    self._bytes_down += self._bytes[type(payload)]
                    subject.hears(payload, self._now)
            elif kind == ARRIVES:
                if connection == subject.connection:
                    self._arrive(subject, payload)
            elif kind == IS_COMPUTED:
                self._computed(subject, payload)
            elif kind == IS_LOST:
                self._lose(subject)
            else:
                self._join(subject)

    def _happens(self, when: float, kind: int, subject: Any, payload: Any = None, connection: int = 0) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (when, self._num_events, kind, subject, payload, connection))

    def _tick(self) -> None:
        """As the server's alarm does."""
        self._now = max(self._now, self._alarm + LATENESS)
        self._decide("tick", self.federation.tick)
        if self._alarm <= self._now:
            raise SimulationFault("the federation's alarm rings for ever")

    # Links

    def _send(self, device: Device, message: Message, ready: float) -> None:
        device.uplink_free = max(ready, device.uplink_free) + self._bytes[type(message)] / device.hardware.uplink
        self._happens(device.uplink_free + device.hardware.latency, ARRIVES, device, message, device.connection)

    def _arrive(self, device: Device, message: Message) -> None:
        """At the server's link."""
        size = self._bytes[type(message)]
        self._bytes_up += size
        self._link_up_free = max(self._now, self._link_up_free) + size / self._server_speed
        self._served_until = max(self._link_up_free, self._served_until) + self._plan.server.exchange
        self._to_serve.append((self._served_until, device, message, device.connection))

    def _reply(self, device: Device, message: Message) -> None:
        if not device.awaits(message):
            return
        size = self._bytes[type(message)]
        self._link_down_free = max(self._now, self._link_down_free) + size / self._server_speed
        came = max(self._link_down_free + device.hardware.latency, device.downlink_free)
        device.downlink_free = came + size / device.hardware.downlink
        self._happens(device.downlink_free, HEARS, device, message, device.connection)

    # Devices come and go

    def _join(self, device: Device) -> None:
        device.connects()
        hello = Hello(name=device.name, fingerprint="")
        self._meter.call("welcome", self.federation.welcome, hello)
        if self.federation.phase is not Phase.JOINING:
            self._schedule_loss(device)
        self._decide("join", self.federation.join, device.name, join(device.step, self._plan.micro_batches))

    def _schedule_loss(self, device: Device) -> None:
        if self._plan.fleet.connected:
            connected = self._draws.exponential(self._plan.fleet.connected)
            self._happens(self._now + connected, IS_LOST, device)

    def _lose(self, device: Device) -> None:
        if device.has_ended:
            return
        self._losses += 1
        device.loses_connection()
        fleet = self._plan.fleet
        if fleet.leaving and self._draws.random() < fleet.leaving:
            device.has_ended = True
            self._left += 1
            self._unfinished -= 1
            self._decide("leave", self.federation.leave, device.name)
            return
        self._meter.call("disconnected", self.federation.disconnected, device.name, self._now)
        away = self._draws.exponential(fleet.away) if fleet.away else 0.0
        # As a device's program does, it computes on and connects again when it is about to speak or to wait.
        back = max(self._now + away, device.processor_free) + 2 * HANDSHAKE_ROUND_TRIPS * device.hardware.latency
        self._happens(back, JOINS, device)

    # The server

    def _receive(self, device: Device, message: Message) -> None:
        if self._trace is not None:
            self._trace(self._now, device.name, "up", message)
        if isinstance(message, Goodbye):
            self._unfinished -= 1
            self._decide("leave", self.federation.leave, device.name)
        elif device.is_heard(message):
            self._decide("receive", self.federation.receive, device.name, message)

    def _decide(self, name: str, method: Callable[..., list[Action]], *arguments: Any) -> None:
        self._perform(self._meter.call(name, method, *arguments, self._now))
        expires = self._meter.call("expires", self.federation.expires)
        self._alarm = NEVER if expires is None else expires

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Reply):
                self._reply(self._devices[action.client], action.message)
            elif isinstance(action, Train | Aggregate | FinishRun):
                seconds = self._seconds_of(action)
                self._computed_until = max(self._now, self._computed_until) + seconds
                self._happens(self._computed_until, IS_COMPUTED, action, seconds)
            elif isinstance(action, FinishStep):
                step = StepOutcome(action.record.step_seconds, len(action.record.tokens_of))
                self._steps.append(step)
                self._last_step_at = self._now
                self._told(step)
            elif isinstance(action, Checkpoint):
                self._meter.call("membership", self.federation.membership)
                self.federation.checkpointed(action.step)
                if not action.step:  # the run starts: nobody is lost before
                    for device in self._devices.values():
                        self._schedule_loss(device)

    def _seconds_of(self, action: Train | Aggregate | FinishRun) -> float:
        plan = self._plan
        if isinstance(action, Train):
            return plan.server.seconds_of(len(action.batches) * plan.tokens / plan.micro_batches)
        if isinstance(action, Aggregate):
            return len(action.contributions) * self._adapter_bytes / plan.server.adding
        return 0.0

    def _computed(self, action: Train | Aggregate | FinishRun, seconds: float) -> None:
        if isinstance(action, Train):
            labels = len(action.batches)
            trained = Trained(loss=1.0, labelled_tokens=labels, gradients=dict.fromkeys(action.batches, VALUES))
            self._decide("trained", self.federation.trained, trained, seconds)
        elif isinstance(action, Aggregate):
            for name in action.contributions:
                work = self._devices[name].work
                self._counted += sum(work.values())
                work.clear()
            self._decide("aggregated", self.federation.aggregated, Aggregated(edge_adapter=ADAPTER), seconds)
        else:
            self._decide("saved", self.federation.saved)

    def _check_end(self) -> None:
        """
        Raises:
            SimulationFault: the federation does not stand where a run ends.
        """
        federation, plan = self.federation, self._plan
        present = [name for name, member in federation.members.items() if not member.presence.has_left]
        everybody_left = self._left == plan.devices
        if present or len(federation.members) != plan.devices:
            raise SimulationFault(f"all have said goodbye, and the federation has {len(present)} present")
        if not everybody_left and (federation.phase is not Phase.FINISHED or federation.step != plan.steps):
            raise SimulationFault(f"all have said goodbye after step {federation.step}, {federation.phase.value}")
        if federation.round != federation.step and not everybody_left:
            raise SimulationFault(f"the adapter is that of step {federation.round}, the last step {federation.step}")
