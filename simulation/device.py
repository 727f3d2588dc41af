"""One device's way through a run: what it computes, asks and does with an answer, as `edge_client` does."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from protocol import (
    ActivationGradient,
    Activations,
    AdapterWeights,
    Done,
    EdgeAdapter,
    Goodbye,
    Itinerary,
    Message,
    Remembered,
    RunEnd,
    Start,
)

from .messages import activations, adapter_gradient, adapter_weights, done

__all__ = ["Device", "Hardware", "SimulationFault"]

GOODBYE = Goodbye()
RESTARTS = 0
"""Of the server, which this simulation never restarts."""


class SimulationFault(RuntimeError):
    """The federation, or this simulation, has done what cannot be: an answer out of its order, a run that does not go on."""


@dataclass(frozen=True)
class Hardware:
    """What is drawn once for a device."""

    forward: float
    """Seconds of a micro-batch; the way back takes as long, since frozen weights need no gradient."""
    uplink: float
    """Bytes a second."""
    downlink: float
    latency: float
    """Seconds, one way."""


class Device:
    """
    It has no clock and no heap: it is told the time, and what it says goes to ``send`` with the time from which it is ready.

    Args:
        jitter: gives the factor by which the next computation takes longer.
        send: takes the device, a message, and when its processor is done with it.
    """

    __slots__ = (
        "_in_flight",
        "_itinerary",
        "_jitter",
        "_next_micro_batch",
        "_saved",
        "_send",
        "_step",
        "asked",
        "connection",
        "downlink_free",
        "hardware",
        "has_ended",
        "is_entering",
        "name",
        "processor_free",
        "resumed_at",
        "round",
        "step",
        "uplink_free",
        "waiting",
        "work",
        "worked",
    )

    def __init__(
        self,
        name: str,
        hardware: Hardware,
        itinerary: Itinerary,
        in_flight: int,
        jitter: Callable[[], float],
        send: "Callable[[Device, Message, float], None]",
    ) -> None:
        self.name, self.hardware = name, hardware
        self._itinerary, self._in_flight, self._jitter, self._send = itinerary, in_flight, jitter, send
        self.connection = 0
        """Its number: what another one carried is lost."""
        self.is_entering = False
        """Whether it has joined and not heard `Start` on this connection."""
        self.has_ended = False
        self.asked: deque[Any] = deque()
        """Questions that have come to the server on this connection and are not answered: it sends no other answers."""
        self.resumed_at = -1
        """The step of the last `Start` that the server has sent on this connection."""
        self.processor_free = self.uplink_free = self.downlink_free = 0.0
        self.step = self.round = 0
        """As `edge_client.membership.Position` has them."""
        self.waiting: deque[tuple[Any, float]] = deque()
        """Questions without an answer, and from when on each is ready to be asked."""
        self._step = self._next_micro_batch = 0
        self._saved: dict[int, int] = {}
        """By step that it has finished in this round, the round: what its own adapter holds."""
        self.work: dict[int, float] = {}
        """Seconds that it has computed for a step, as long as the result is in no adapter and not thrown away."""
        self.worked = 0.0
        """Seconds of all that it has computed."""

    # What the server's end of its connection knows

    def connects(self) -> None:
        self.connection, self.is_entering = abs(self.connection) + 1, True
        self.asked.clear()
        self.resumed_at = -1

    def loses_connection(self) -> None:
        """Until it has the next one, the number of the connection is negative."""
        self.connection = -self.connection

    def is_heard(self, message: Any) -> bool:
        """Whether a message is taken, and not left because a `Start` on its way has answered it."""
        if isinstance(message, Activations) and message.step <= self.resumed_at:
            return False
        self.asked.append(message)
        return True

    def awaits(self, message: Any) -> bool:
        """Whether the server sends this answer. Else it is kept, for the device will ask again."""
        if self.connection < 0:
            return False
        if isinstance(message, Start):
            self.asked.clear()
            self.resumed_at = message.step
            return True
        if not self.asked or not _answers(self.asked[0], message):
            return False
        self.asked.popleft()
        return True

    # What it does

    def hears(self, message: Any, now: float) -> None:
        """
        Raises:
            SimulationFault: it is no answer to what it has asked.
        """
        if isinstance(message, Start):
            self._hears_start(message, now)
            return
        question = self.waiting.popleft()[0] if self.waiting else None
        if question is None or not _answers(question, message):
            raise SimulationFault(f"{self.name} asked {question}, and was answered {message}")
        if isinstance(message, ActivationGradient):
            self._goes_backward(now)
        elif isinstance(message, EdgeAdapter):
            self.step = self.round = message.step
            self._saved.clear()
            self._goes_on(now)
        else:
            self.has_ended = True
            self._send(self, GOODBYE, now)

    def _hears_start(self, start: Start, now: float) -> None:
        answers_join, self.is_entering = self.is_entering, False
        stood = Remembered(step=self.step, round=self.round, restarts=RESTARTS)
        if (
            answers_join
            and self.waiting
            and stood.is_of_round(start, RESTARTS)
            and Itinerary.may_ask_again(self.waiting[0][0], start)
        ):
            for question, ready in self.waiting:
                self._send(self, question, max(now, ready))
            return
        self._goes_to(start, now)

    def _goes_to(self, start: Start, now: float) -> None:
        """What it has computed since is thrown away, unless it has kept it for this round."""
        self.waiting.clear()
        self._saved = {step: round_ for step, round_ in self._saved.items() if step <= start.step}
        saved = None
        if start.step in self._saved:
            saved = Remembered(step=start.step, round=self._saved[start.step], restarts=RESTARTS)
        is_kept = saved is not None and saved.is_of_round(start, RESTARTS)
        self.work = {step: seconds for step, seconds in self.work.items() if step <= start.step} if is_kept else {}
        self.step, self.round = start.step, start.round
        if self._itinerary.resume(start, RESTARTS, saved).kind is AdapterWeights:
            self._ask(adapter_weights(start.step), now)
        else:
            self._goes_on(now)

    def _goes_on(self, now: float) -> None:
        if self.step == self._itinerary.last_step:
            self._ask(done(self.step), now)
            return
        self._step, self._next_micro_batch = self.step + 1, 0
        for _ in range(min(self._in_flight, self._itinerary.settings.micro_batches)):
            self._goes_forward(now)

    def _goes_forward(self, now: float) -> None:
        self._compute(now)
        self._ask(activations(self._step, self._next_micro_batch), now)
        self._next_micro_batch += 1

    def _goes_backward(self, now: float) -> None:
        self._compute(now)
        settings, step = self._itinerary.settings, self._step
        if self._next_micro_batch < settings.micro_batches:
            self._goes_forward(now)
        elif self.waiting:
            return
        elif settings.aggregate_every == 1:
            self._ask(adapter_gradient(step), now)
        else:
            self._saved[step], self.step = self.round, step
            if self._itinerary.ends_round(step):
                self._ask(adapter_weights(step), now)
            else:
                self._goes_on(now)

    def _compute(self, now: float) -> None:
        seconds = self.hardware.forward * self._jitter()
        self.processor_free = max(now, self.processor_free) + seconds
        self.work[self._step] = self.work.get(self._step, 0.0) + seconds
        self.worked += seconds

    def _ask(self, question: Message, now: float) -> None:
        ready = max(now, self.processor_free)
        self.waiting.append((question, ready))
        self._send(self, question, ready)


def _answers(question: Any, answer: Any) -> bool:
    if isinstance(question, Activations):
        of = question.step, question.micro_batch
        return isinstance(answer, ActivationGradient) and (answer.step, answer.micro_batch) == of
    if isinstance(question, Done):
        return isinstance(answer, RunEnd)
    return isinstance(answer, EdgeAdapter) and answer.step >= question.step
