"""How a run stands, in figures and in words: what the page, `splitlora-server status` and /metrics say of it."""

import heapq
import math
import statistics
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from terminal import count, duration, in_words, listed

from ..federation import StepRecord
from .events import RunEvent
from .recent_steps import OWN, RECENT, RecentSteps, SummedSteps
from .records import TOGETHER, EvaluationRecord, finite, mean_of
from .run_files import HistoryError, RunFiles

__all__ = ["ADVICE", "Overview"]

ADVICE = {
    "edge_compute": "a smaller --cut-layer leaves devices less to compute",
    "encode": "making bytes takes longer than sending them: --codec bfloat16 or float32 takes less",
    "decode": "reading bytes takes longer than receiving them: --codec bfloat16 or float32 takes less",
    "uplink": "a leaner --codec (int8, int4, delta), or a higher --aggregate-every, sends less",
    "downlink": "a leaner --codec (int8, int4, delta), or a higher --aggregate-every, sends less",
    "queue": "devices wait for slower ones: give those a smaller --batch-size, or the run a --quorum",
    "server_compute": "a higher --cut-layer moves work to the devices; or give the server a faster processor",
}
"""What to change about each part of the time."""

SLOW = 1.25
"""Times the others' time: from here on a device is called slow."""
USUAL_WAIT = 3.0
"""Times a usual step: so long a wait is no lateness yet, nor is one of less than `SHORTEST_LATENESS` seconds."""
SHORTEST_LATENESS = 5.0
BY_NEED = ("late", "lost", "connected", "left")
"""States of a device. Where not all devices are listed, those of the first are, and slow ones before others in a state."""


class _Step(NamedTuple):
    """What is said of a step of all devices together."""

    loss: float
    learning_rate: float
    seconds: float
    tokens: int
    num_bytes: int


class _Wait(NamedTuple):
    """Whom the run waits for."""

    clients: Mapping[str, None] = {}
    """As a set that keeps their order."""
    number: int = 0
    """Of all; an event names the first of many."""
    since: float = 0.0
    """Seconds since 1970."""
    evaluating: Container[str] = ()
    """Those of them that measure their held-out loss meanwhile."""

    def seconds(self, now: float) -> float:
        return max(0.0, now - self.since)  # a clock may have been put back meanwhile


@dataclass
class _Device:
    """What has been heard of one client."""

    state: str = "connected"
    """connected, lost or left."""
    since: float = 0.0
    """When it came into this state, in seconds since 1970."""
    samples: int | None = None
    batch_size: int | None = None
    last_step: int | None = None
    """Up to which it has data."""
    loss: float = math.nan
    num_bytes: tuple[int, int] = (0, 0)
    """Up and down, since the run began."""
    heard: float = 0.0
    missed: int = 0


class Overview:
    """
    Is given what happens in a run, live or from its files, in the order of time, and says how the run stands.

    Args:
        run: its identifier.
        clients: how many it starts with.
        restarts: how often its server was started again, as far as that is known before the first event.
        is_split: whether a server trains it with devices; what a contestant has trained in one process has none of the settings
            that `ADVICE` is about.
    """

    def __init__(self, run: str, clients: int, *, restarts: int = 0, codec: str | None = None, is_split: bool = True) -> None:
        self.run, self.clients, self.restarts, self._is_split = run, clients, restarts, is_split
        self.step = self.total_steps = 0
        self.is_served = False
        """Whether a server has the run; who reads files of a server that was killed knows better than its events."""
        self.ended: str | None = None
        """complete, stopped or failed, once it is."""
        self._started: float | None = None
        self._codec, self._codec_reason = codec, None if codec is None else ""
        self._devices: dict[str, _Device] = {}
        self._recent: deque[_Step] = deque(maxlen=RECENT)
        self._recent_of_devices = RecentSteps()
        self._is_together, self._counts_each = False, True
        """Whether the last step has only sums of all devices; and whether no step so far has."""
        self._held_out: dict[str, EvaluationRecord] = {}
        """The latest of each client."""
        self._clients_at: dict[int, set[str]] = {}
        """By step: whose latest that is."""
        self._held_out_of_all: EvaluationRecord | None = None
        """After the last step that all of them have evaluated."""
        self._checkpoint: tuple[int, float] | None = None
        self._late = _Wait()

    @classmethod
    def of_files(cls, files: RunFiles) -> "Overview":
        """
        Of a run as its files have it, whether it is served or not.

        Raises:
            HistoryError: a line cannot be read.
        """
        description = files.description
        config = description.config
        clients = config["clients"] if isinstance(config.get("clients"), int) else 0
        run = cls(description.run, clients, restarts=description.restarts, is_split="mode" not in config)
        for happened in files.everything():
            try:
                run.add(happened)
            except HistoryError as error:
                raise HistoryError(f"{files.path}: {error}") from None
        run.checkpoint_found(files.last_checkpoint())
        run.is_served = files.is_served
        if not run.is_served:
            run.server_is_gone()
            if run.ended is None and description.adapter is not None:  # of before there were events
                run.total_steps = int(description.adapter["of"])
                run.ended = "complete" if description.adapter["step"] == run.total_steps else "stopped"
        return run

    # What happens

    def add(self, happened: StepRecord | EvaluationRecord | RunEvent) -> None:
        """
        The next of these that a run has to tell.

        Raises:
            HistoryError: an event has figures of another kind, as a later version may write them.
        """
        if isinstance(happened, StepRecord):
            self.add_step(happened)
        elif isinstance(happened, RunEvent):
            try:
                self.add_event(happened)
            except (TypeError, ValueError, OverflowError):
                raise HistoryError(
                    f"what was written at {happened.time:.3f} (seconds since 1970) is nothing that this version reads; use a "
                    "later one"
                ) from None
        else:
            self.add_evaluation(happened)

    def add_step(self, record: StepRecord) -> None:
        """A step is finished; an earlier one where the run went back to a checkpoint."""
        self.step, self._late = record.number, _Wait()
        self.total_steps = max(self.total_steps, record.number)
        self._started = self._started or record.time - record.step_seconds or None
        self._recent.append(_Step(record.loss, record.learning_rate, record.step_seconds, record.tokens, record.num_bytes))
        self._codec = record.codec
        if self._is_together != bool(record.together):  # a device is not compared with all
            self._is_together, self._recent_of_devices = not self._is_together, RecentSteps()
        self._recent_of_devices.add(record, self._add_together(record) if record.together else self._add_of_each(record))

    def _add_together(self, record: StepRecord) -> list[str]:
        """A step of which only sums are known: who is connected was there."""
        self._counts_each = False
        for device in self._devices.values():
            if device.state == "connected":
                device.heard = max(device.heard, record.time)
        return [TOGETHER]

    def _add_of_each(self, record: StepRecord) -> list[str]:
        """Who took part in the step."""
        taking_part = []
        for name in {*record.bytes_up, *record.labelled}:
            device = self._devices.setdefault(name, _Device(since=record.time))
            up, down = device.num_bytes
            device.num_bytes = up + record.bytes_up.get(name, 0), down + record.bytes_down.get(name, 0)
            if name not in record.labelled and record.labelled:
                continue
            device.heard = max(device.heard, record.time)
            device.loss = record.losses.get(name, device.loss)
            taking_part.append(name)
        if record.labelled:  # lines of earlier versions do not say who took part
            for name, device in self._devices.items():
                has_data = device.last_step is None or record.number <= device.last_step
                device.missed += name not in record.labelled and device.state != "left" and has_data
        return taking_part

    def add_event(self, event: RunEvent) -> None:
        """Something has happened; what is not about the run's state changes nothing."""
        kind, details = event.kind, event.details
        if kind == "server_started":
            self.is_served, self.ended, self._late = True, None, _Wait()
            self.restarts = int(details.get("restarts", self.restarts))
            self.total_steps = max(self.total_steps, int(details.get("total_steps", 0)))
            self._lose_all()
        elif kind == "training_started":
            self._started = event.time
            self.total_steps = max(self.total_steps, int(details.get("total_steps", 0)))
        elif kind == "ended_early":
            self.total_steps = int(details.get("total_steps", self.total_steps))
        elif kind in ("complete", "stopped", "failed"):
            self.ended, self._late = kind, _Wait()
            if kind != "complete":  # else devices may still fetch the adapter
                self.server_is_gone()
        elif kind == "late":
            clients = dict.fromkeys(map(str, details.get("clients", [])))
            number = int(details.get("count", len(clients)))
            self._late = _Wait(clients, number, event.time - float(details.get("seconds", 0.0)))
        elif kind == "codec":
            self._codec, self._codec_reason = str(details.get("codec", self._codec)), event.text
        elif kind == "checkpoint" and event.step is not None:
            self.checkpoint_written(event.step, event.time)
        if event.client is not None:
            self._hear_of_device(event.client, event)

    def server_is_gone(self) -> None:
        """Whether it has told so or was killed."""
        self.is_served, self._late = False, _Wait()
        self._lose_all()

    def _lose_all(self) -> None:
        """Nobody is connected; each was there at least until it was heard last."""
        for device in self._devices.values():
            if device.state == "connected":
                device.state, device.since = "lost", device.heard

    def _hear_of_device(self, name: str, event: RunEvent) -> None:
        state = {"joined": "connected", "back": "connected", "lost": "lost", "left": "left"}.get(event.kind)
        if state is None:
            return
        device = self._devices.setdefault(name, _Device())
        device.state, device.since = state, event.time
        if state == "connected":
            device.heard = event.time
            device.samples, device.batch_size, device.last_step = (
                event.details.get(name, before)
                for name, before in (
                    ("samples", device.samples),
                    ("batch_size", device.batch_size),
                    ("steps", device.last_step),
                )
            )

    def add_evaluation(self, record: EvaluationRecord) -> None:
        before = self._held_out.get(record.client)
        if before is not None:
            self._clients_at[before.step].discard(record.client)
            if not self._clients_at[before.step]:
                del self._clients_at[before.step]
        self._held_out[record.client] = record
        self._clients_at.setdefault(record.step, set()).add(record.client)
        with_held_out = self._clients_at[record.step]
        if all(
            self._has_left(client) for step, clients in self._clients_at.items() if step != record.step for client in clients
        ):
            self._held_out_of_all = mean_of([self._held_out[client] for client in sorted(with_held_out)])

    def _has_left(self, client: str) -> bool:
        device = self._devices.get(client)
        return device is not None and device.state == "left"

    def checkpoint_found(self, last: tuple[int, float] | None) -> None:
        """What is in the folder, since events tell of one a minute at most; see `RunFiles.last_checkpoint`."""
        self._checkpoint = last

    def checkpoint_written(self, step: int, time: float) -> None:
        self._checkpoint = step, time

    def waits_for(
        self, clients: Iterable[str], seconds: float, now: float, is_evaluating: Callable[[str], bool] = lambda _: False
    ) -> None:
        """
        A live server knows whom it waits for before it tells an operator: these, for so many seconds until ``now``.

        Args:
            is_evaluating: whether a device measures its held-out loss meanwhile.
        """
        limit = max(SHORTEST_LATENESS, USUAL_WAIT * (self._step_seconds() or 0.0))
        is_late = seconds > limit and self.step < self.total_steps
        late = dict.fromkeys(clients) if is_late else {}
        self._late = _Wait(late, len(late), now - seconds, set(filter(is_evaluating, late)))

    # How it stands

    def as_json(self, now: float, most_devices: int | None = None) -> dict[str, Any]:
        """
        Args:
            now: seconds since 1970; what is measured until now ("for 12 s") is measured until then.
            most_devices: where there are more, only those that most need to be looked after are listed.

        Returns:
            Figures and words, as the page is told them; see docs/operating.md.
        """
        in_state = Counter(self._state_of(name, device) for name, device in self._devices.items())
        connected = in_state["connected"] + in_state["late"] if self.is_served else 0
        state, step_seconds = self._state(), self._step_seconds()
        is_left = state in ("training", "waiting", "stopped", "not_running") and self.step < self.total_steps
        left = (self.total_steps - self.step) * step_seconds if step_seconds and is_left else None
        spent = self._recent_of_devices.summed()
        slowness = spent.slowness()
        slowest = max(slowness, key=lambda name: slowness[name], default=None)
        if slowest is not None and slowness[slowest] < SLOW:
            slowest = None
        last = self._recent[-1] if self._recent else None
        recent_seconds = sum(step.seconds for step in self._recent)
        num_bytes = sum(step.num_bytes for step in self._recent)
        listed_devices = self._most_in_need(most_devices, slowness)
        return {
            "run": self.run,
            "sentence": self._sentence(state, connected, left, now),
            "state": state,
            "step": self.step,
            "total_steps": self.total_steps,
            "seconds_left": left,
            "clients": self.clients,
            "connected": connected,
            "restarts": self.restarts,
            "started": self._started,
            "now": now,
            "loss": None if last is None else finite(last.loss),
            "learning_rate": None if last is None else finite(last.learning_rate),
            "held_out": self._held_out_loss(),
            "tokens_per_second": _rate(sum(step.tokens for step in self._recent), recent_seconds),
            "bytes_per_second": _rate(num_bytes, recent_seconds),
            "codec": self._codec,
            "codec_reason": self._codec_reason or None,
            "bottleneck": self._bottleneck(slowest, slowness, spent),
            "waiting_for": [
                {"client": name, "seconds": self._late.seconds(now)} for name in islice(self._late.clients, most_devices)
            ],
            "last_checkpoint": None if self._checkpoint is None else {"step": self._checkpoint[0], "time": self._checkpoint[1]},
            "device_states": {each: in_state[each] for each in BY_NEED},
            "more_devices": len(self._devices) - len(listed_devices),
            "devices": [
                self._device(name, spent, slowness.get(name), now, is_slowest=name == slowest) for name in listed_devices
            ],
        }

    def _state_of(self, name: str, device: _Device) -> str:
        return "late" if device.state == "connected" and name in self._late.clients else device.state

    def _most_in_need(self, most: int | None, slowness: Mapping[str, float]) -> list[str]:
        """All in the order of their names; of too many, those that are late or lost or slow, in this order."""
        if most is None or len(self._devices) <= most:
            return sorted(self._devices)

        def need(name: str) -> tuple[int, float, str]:
            return BY_NEED.index(self._state_of(name, self._devices[name])), -round(slowness.get(name, 0.0), 1), name

        return heapq.nsmallest(most, self._devices, key=need)

    def _state(self) -> str:
        if self.ended == "complete":
            return "finished"
        if self.ended is not None:
            return "stopped"
        if not self.is_served:
            return "not_running"
        if not self.total_steps:
            return "joining"
        if self.step >= self.total_steps:
            return "saving"
        return "waiting" if self._late.clients else "training"

    def _sentence(self, state: str, connected: int, left: float | None, now: float) -> str:
        steps = f"step {self.step:,} of {self.total_steps:,}" if self.total_steps else "before the first step"
        devices = f"{connected} of {count(self.clients, 'device')}"
        if state == "finished":
            return f"the run is complete: {count(self.step, 'step')}"
        if state in ("stopped", "not_running"):
            said = {None: "no server runs;", "stopped": "stopped", "failed": "the server failed"}[self.ended]
            after = "after " if self.ended is not None and self.total_steps else ""
            at_last_speed = f", {duration(left)} left at its last speed" if left is not None else ""
            return f"{said} {after}{steps}{at_last_speed}"
        if state == "joining":
            return f"waiting for devices: {devices} joined"
        if state == "waiting":
            waited = duration(self._late.seconds(now))
            late = (f"{name} (evaluating)" if name in self._late.evaluating else name for name in self._late.clients)
            return f"{steps} waits for {listed(late, of=self._late.number)}, for {waited}; {devices}"
        if state == "saving":
            return f"{steps}, {devices}, saving the adapter"
        return f"{steps}, {devices}" + (f", {duration(left)} left" if left is not None else "")

    def _step_seconds(self) -> float | None:
        """Of a recent step, usually."""
        measured = [step.seconds for step in self._recent if step.seconds > 0]
        return statistics.fmean(measured) if measured else None

    def _held_out_loss(self) -> dict[str, Any] | None:
        whole = self._held_out_of_all
        if whole is None:
            return None
        return {"step": whole.step, "loss": finite(whole.loss), "perplexity": finite(whole.perplexity)}

    def _bottleneck(self, slowest: str | None, slowness: Mapping[str, float], by_device: SummedSteps) -> dict[str, Any] | None:
        spent = by_device.of_all()
        total = sum(spent.values())
        if total <= 0:
            return None
        part = max(spent, key=lambda each: spent[each])
        if slowest is None or part not in (*OWN, "queue"):
            sentence = f"{_percent(spent[part] / total)} of the devices' time goes to {in_words(part)}"
            advice = ADVICE[part] if self._is_split else ""
            return {"part": part, "client": None, "share": spent[part] / total, "sentence": sentence, "advice": advice}
        of_device = by_device.of(slowest)
        part = max(OWN, key=lambda each: of_device[each])
        share = of_device[part] / max(sum(of_device.values()), 1e-9)
        times = f"{slowness[slowest]:.1f} times"
        where = f"{_percent(share)} of its time goes to {in_words(part)}"
        sentence = f"{slowest} is {times} as slow as the others, who wait for it; {where}"
        advice = f"give it a smaller --batch-size, or the run a --quorum; {ADVICE[part]}" if self._is_split else ""
        return {"part": part, "client": slowest, "share": share, "sentence": sentence, "advice": advice}

    def _device(
        self, name: str, recent: SummedSteps, slowness: float | None, now: float, *, is_slowest: bool
    ) -> dict[str, Any]:
        device = self._devices[name]
        late = self._late.seconds(now) if name in self._late.clients else None
        state = self._state_of(name, device)
        return {
            "name": name,
            "state": state,
            "words": self._words_of(
                device, state, late, slowness, now, is_slowest=is_slowest, is_evaluating=name in self._late.evaluating
            ),
            "samples": device.samples,
            "batch_size": device.batch_size,
            "loss": finite(device.loss),
            "tokens_per_second": finite(recent.tokens_per_second(name)),
            "bytes_up": device.num_bytes[0] if self._counts_each else None,
            "bytes_down": device.num_bytes[1] if self._counts_each else None,
            "last_heard": device.heard or None,
            "missed_steps": device.missed if self._counts_each else None,
            "late_seconds": late,
            "slowness": finite(slowness),
            "is_slowest": is_slowest,
            "seconds": {part: round(seconds, 6) for part, seconds in recent.of(name).items()},
        }

    def _words_of(
        self,
        device: _Device,
        state: str,
        late: float | None,
        slowness: float | None,
        now: float,
        *,
        is_slowest: bool,
        is_evaluating: bool,
    ) -> str:
        ago = f"{duration(max(0.0, now - device.since))} ago" if device.since else "some time ago"
        if state == "left":
            return "has left" if self.ended != "complete" else "is done"
        if not self.is_served:
            return "no server runs"
        if state == "lost":
            return f"lost its connection {ago}"
        if late is not None:
            return f"is {duration(late)} late" + (", evaluating" if is_evaluating else "")
        if is_slowest and slowness is not None:
            return f"takes part, {slowness:.1f} times as slow as the others"
        return "takes part"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _rate(amount: float, seconds: float) -> float | None:
    return amount / seconds if seconds > 0 else None
