"""How a run stands, in figures and in words: what the page, `splitlora-server status` and /metrics say of it."""

import math
import statistics
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from protocol import Seconds
from terminal import count, duration, in_words, listed

from ..federation import StepRecord
from .events import RunEvent
from .records import EvaluationRecord, finite, mean_of
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

RECENT = 20
"""Steps over which speeds and shares are measured."""
SLOW = 1.25
"""Times the others' time: from here on a device is called slow."""
OWN = ("edge_compute", "encode", "uplink", "downlink", "decode")
"""The parts of a device's time that are its own and its link's; the rest is waiting."""
USUAL_WAIT = 3.0
"""Times a usual step: so long a wait is no lateness yet, nor is one of less than `SHORTEST_LATENESS` seconds."""
SHORTEST_LATENESS = 5.0
NOTHING = Seconds()
PARTS = tuple(vars(NOTHING))

Spent = dict[str, float]
"""Seconds by part of the time; see `Seconds`."""


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
    recent: deque[tuple[Seconds, int, float]] = field(default_factory=lambda: deque(maxlen=RECENT))
    """Of the last steps that it took part in: its time, its tokens, the step's time."""

    def spent(self) -> Spent:
        """In its recent steps together."""
        steps = [vars(seconds) for seconds, _, _ in self.recent]
        return {part: sum(spent[part] for spent in steps) for part in PARTS}

    def tokens_per_second(self) -> float | None:
        seconds = sum(seconds for _, _, seconds in self.recent)
        return sum(tokens for _, tokens, _ in self.recent) / seconds if seconds else None


class Overview:
    """
    Is given what happens in a run, live or from its files, in the order of time, and says how the run stands.

    Args:
        run: its identifier.
        clients: how many it starts with.
        restarts: how often its server was started again, as far as that is known before the first event.
    """

    def __init__(self, run: str, clients: int, *, restarts: int = 0, codec: str | None = None) -> None:
        self.run, self.clients, self.restarts = run, clients, restarts
        self.step = self.total_steps = 0
        self.is_served = False
        """Whether a server has the run; who reads files of a server that was killed knows better than its events."""
        self.ended: str | None = None
        """complete, stopped or failed, once it is."""
        self._started: float | None = None
        self._codec, self._codec_reason = codec, None if codec is None else ""
        self._devices: dict[str, _Device] = {}
        self._recent: deque[StepRecord] = deque(maxlen=RECENT)
        self._held_out: dict[str, EvaluationRecord] = {}
        """The latest of each client."""
        self._held_out_of_all: EvaluationRecord | None = None
        """After the last step that all of them have evaluated."""
        self._checkpoint: tuple[int, float] | None = None
        self._late: dict[str, float] = {}
        """Whom the run waits for, and since when (seconds since 1970)."""

    @classmethod
    def of_files(cls, files: RunFiles) -> "Overview":
        """
        Of a run as its files have it, whether it is served or not.

        Raises:
            HistoryError: a line cannot be read.
        """
        description = files.description
        clients = description.config.get("clients")
        run = cls(description.run, clients if isinstance(clients, int) else 0, restarts=description.restarts)
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
        self.step, self._late = record.number, {}
        self.total_steps = max(self.total_steps, record.number)
        self._started = self._started or record.time - record.step_seconds or None
        self._recent.append(record)
        self._codec = record.codec
        for name in {*record.bytes_up, *record.labelled}:
            device = self._devices.setdefault(name, _Device(since=record.time))
            up, down = device.num_bytes
            device.num_bytes = up + record.bytes_up.get(name, 0), down + record.bytes_down.get(name, 0)
            if name not in record.labelled and record.labelled:
                continue
            device.heard = max(device.heard, record.time)
            device.loss = record.losses.get(name, device.loss)
            device.recent.append((record.seconds.get(name, NOTHING), record.tokens_of.get(name, 0), record.step_seconds))
        if record.labelled:  # lines of earlier versions do not say who took part
            for name, device in self._devices.items():
                has_data = device.last_step is None or record.number <= device.last_step
                device.missed += name not in record.labelled and device.state != "left" and has_data

    def add_event(self, event: RunEvent) -> None:
        """Something has happened; what is not about the run's state changes nothing."""
        kind, details = event.kind, event.details
        if kind == "server_started":
            self.is_served, self.ended, self._late = True, None, {}
            self.restarts = int(details.get("restarts", self.restarts))
            self.total_steps = max(self.total_steps, int(details.get("total_steps", 0)))
            self._lose_all()
        elif kind == "training_started":
            self._started = event.time
            self.total_steps = max(self.total_steps, int(details.get("total_steps", 0)))
        elif kind in ("complete", "stopped", "failed"):
            self.ended, self._late = kind, {}
            if kind != "complete":  # else devices may still fetch the adapter
                self.server_is_gone()
        elif kind == "late":
            since = event.time - float(details.get("seconds", 0.0))
            self._late = {str(name): since for name in details.get("clients", [])}
        elif kind == "codec":
            self._codec, self._codec_reason = str(details.get("codec", self._codec)), event.text
        elif kind == "checkpoint" and event.step is not None:
            self.checkpoint_written(event.step, event.time)
        if event.client is not None:
            self._hear_of_device(event.client, event)

    def server_is_gone(self) -> None:
        """Whether it has told so or was killed."""
        self.is_served, self._late = False, {}
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
        self._held_out[record.client] = record
        with_held_out = [
            each
            for each in self._held_out.values()
            if each.step == record.step or self._devices.get(each.client, _Device()).state != "left"
        ]
        if all(each.step == record.step for each in with_held_out):
            self._held_out_of_all = mean_of(with_held_out)

    def checkpoint_found(self, last: tuple[int, float] | None) -> None:
        """What is in the folder, since events tell of one a minute at most; see `RunFiles.last_checkpoint`."""
        self._checkpoint = last

    def checkpoint_written(self, step: int, time: float) -> None:
        self._checkpoint = step, time

    def waits_for(self, clients: Iterable[str], seconds: float, now: float) -> None:
        """A live server knows whom it waits for before it tells an operator: these, for so many seconds until ``now``."""
        limit = max(SHORTEST_LATENESS, USUAL_WAIT * (self._step_seconds() or 0.0))
        self._late = dict.fromkeys(clients, now - seconds) if seconds > limit and self.step < self.total_steps else {}

    def _late_seconds(self, name: str, now: float) -> float:
        return max(0.0, now - self._late[name])  # a clock may have been put back meanwhile

    # How it stands

    def as_json(self, now: float) -> dict[str, Any]:
        """
        Args:
            now: seconds since 1970; what is measured until now ("for 12 s") is measured until then.

        Returns:
            Figures and words, as the page is told them; see docs/operating.md.
        """
        connected = sum(device.state == "connected" for device in self._devices.values()) if self.is_served else 0
        state, step_seconds = self._state(), self._step_seconds()
        is_left = state in ("training", "waiting", "stopped", "not_running") and self.step < self.total_steps
        left = (self.total_steps - self.step) * step_seconds if step_seconds and is_left else None
        spent = {name: device.spent() for name, device in self._devices.items()}
        slowness = self._slowness(spent)
        slowest = max(slowness, key=lambda name: slowness[name], default=None)
        if slowest is not None and slowness[slowest] < SLOW:
            slowest = None
        last = self._recent[-1] if self._recent else None
        recent_seconds = sum(record.step_seconds for record in self._recent)
        num_bytes = sum(record.num_bytes for record in self._recent)
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
            "tokens_per_second": _rate(sum(record.tokens for record in self._recent), recent_seconds),
            "bytes_per_second": _rate(num_bytes, recent_seconds),
            "codec": self._codec,
            "codec_reason": self._codec_reason or None,
            "bottleneck": self._bottleneck(slowest, slowness, spent),
            "waiting_for": [{"client": name, "seconds": self._late_seconds(name, now)} for name in self._late],
            "last_checkpoint": None if self._checkpoint is None else {"step": self._checkpoint[0], "time": self._checkpoint[1]},
            "devices": [
                self._device(name, device, spent[name], slowness.get(name), now, is_slowest=name == slowest)
                for name, device in sorted(self._devices.items())
            ],
        }

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
        return "waiting" if self._late else "training"

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
            longest = max(self._late_seconds(name, now) for name in self._late)
            return f"{steps} waits for {listed(self._late)}, for {duration(longest)}; {devices}"
        if state == "saving":
            return f"{steps}, {devices}, saving the adapter"
        return f"{steps}, {devices}" + (f", {duration(left)} left" if left is not None else "")

    def _step_seconds(self) -> float | None:
        """Of a recent step, usually."""
        measured = [record.step_seconds for record in self._recent if record.step_seconds > 0]
        return statistics.fmean(measured) if measured else None

    def _held_out_loss(self) -> dict[str, Any] | None:
        whole = self._held_out_of_all
        if whole is None:
            return None
        return {"step": whole.step, "loss": finite(whole.loss), "perplexity": finite(whole.perplexity)}

    def _slowness(self, spent: Mapping[str, Spent]) -> dict[str, float]:
        """By device: its own and its link's seconds a step over the median of the others'."""
        own = {
            name: seconds / len(self._devices[name].recent)
            for name, parts in spent.items()
            if (seconds := sum(parts[part] for part in OWN))
        }
        if len(own) < 2:
            return {}
        in_order = sorted(own.values())
        return {name: seconds / _median_of_others(in_order, seconds) for name, seconds in own.items()}

    def _bottleneck(
        self, slowest: str | None, slowness: Mapping[str, float], by_device: Mapping[str, Spent]
    ) -> dict[str, Any] | None:
        spent = {part: sum(parts[part] for parts in by_device.values()) for part in PARTS}
        total = sum(spent.values())
        if total <= 0:
            return None
        part = max(spent, key=lambda each: spent[each])
        if slowest is None or part not in (*OWN, "queue"):
            sentence = f"{_percent(spent[part] / total)} of the devices' time goes to {in_words(part)}"
            return {
                "part": part, "client": None, "share": spent[part] / total, "sentence": sentence, "advice": ADVICE[part]
            }  # fmt: skip
        of_device = by_device[slowest]
        part = max(OWN, key=lambda each: of_device[each])
        share = of_device[part] / max(sum(of_device.values()), 1e-9)
        times = f"{slowness[slowest]:.1f} times"
        where = f"{_percent(share)} of its time goes to {in_words(part)}"
        sentence = f"{slowest} is {times} as slow as the others, who wait for it; {where}"
        advice = f"give it a smaller --batch-size, or the run a --quorum; {ADVICE[part]}"
        return {"part": part, "client": slowest, "share": share, "sentence": sentence, "advice": advice}

    def _device(
        self, name: str, device: _Device, spent: Spent, slowness: float | None, now: float, *, is_slowest: bool
    ) -> dict[str, Any]:
        late = self._late_seconds(name, now) if name in self._late else None
        state = "late" if late is not None and device.state == "connected" else device.state
        return {
            "name": name,
            "state": state,
            "words": self._words_of(device, state, late, slowness, now, is_slowest=is_slowest),
            "samples": device.samples,
            "batch_size": device.batch_size,
            "loss": finite(device.loss),
            "tokens_per_second": finite(device.tokens_per_second()),
            "bytes_up": device.num_bytes[0],
            "bytes_down": device.num_bytes[1],
            "last_heard": device.heard or None,
            "missed_steps": device.missed,
            "late_seconds": late,
            "slowness": finite(slowness),
            "is_slowest": is_slowest,
            "seconds": {part: round(seconds, 6) for part, seconds in spent.items()},
        }

    def _words_of(
        self, device: _Device, state: str, late: float | None, slowness: float | None, now: float, *, is_slowest: bool
    ) -> str:
        ago = f"{duration(max(0.0, now - device.since))} ago" if device.since else "some time ago"
        if state == "left":
            return "has left" if self.ended != "complete" else "is done"
        if not self.is_served:
            return "no server runs"
        if state == "lost":
            return f"lost its connection {ago}"
        if late is not None:
            return f"is {duration(late)} late"
        if is_slowest and slowness is not None:
            return f"takes part, {slowness:.1f} times as slow as the others"
        return "takes part"


def _median_of_others(in_order: Sequence[float], one: float) -> float:
    """Of ascending values, at least two, without ``one`` of them; in a time that hardly grows with their number."""
    place, middle = bisect_left(in_order, one), (len(in_order) - 1) // 2

    def other(number: int) -> float:
        return in_order[number + (number >= place)]

    return other(middle) if len(in_order) % 2 == 0 else (other(middle - 1) + other(middle)) / 2


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _rate(amount: float, seconds: float) -> float | None:
    return amount / seconds if seconds > 0 else None
