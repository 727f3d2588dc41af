"""A place in a run, which outlives its connections."""

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TypeVar, cast

from protocol import (
    EdgeAdapter,
    Evaluation,
    Hello,
    Itinerary,
    Join,
    KeptSamples,
    Message,
    RemoteProtocolError,
    Seconds,
    Start,
    Welcome,
)
from protocol.agreement import changed_settings

from .connection import Connection, ConnectionFailed, Dial, Refused
from .stopwatch import Stopwatch, difference

__all__ = ["Membership", "Moved"]

logger = logging.getLogger("edge_client")
Question = TypeVar("Question", bound=Message)
Answer = TypeVar("Answer", bound=Message)

SHORTEST_WAIT = 0.5  # seconds
LONGEST_WAIT = 30.0
SECONDS_TO_TELL_AGAIN = 60.0  # after which whoever waits for a connection is told so again; then twice that, and so on


class Moved(Exception):
    """The run does not stand where this client does: a server went back to a checkpoint, or a step went on without us."""

    def __init__(self, start: Start) -> None:
        super().__init__(f"go on after step {start.step}")
        self.start = start


class Membership:
    """
    Exchanges questions for answers as `Connection` does, and connects again when the link is lost.

    Args:
        dial: opens a connection.
        give_up_after: seconds without a connection, added up until a question is answered; None tries forever.
        patience: entered while this client waits for an answer.
        patient: whether the server may be away when the first connection is opened; else its address is taken for wrong.
            A server that says when it wants to be asked again is asked again in any case.
        before: the run in which this device has a place, as it was announced before the device was killed.
        sleep: waits for so many seconds.

    Raises:
        ConnectionFailed, Refused, RemoteProtocolError: as `Connection`, where trying again is of no use.
    """

    def __init__(
        self,
        dial: Dial,
        hello: Hello,
        *,
        give_up_after: float | None = None,
        patient: bool = False,
        before: Welcome | None = None,
        patience: AbstractContextManager[None] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._patience = patience or nullcontext()
        self._dial, self._hello, self._give_up_after, self._sleep = dial, hello, give_up_after, sleep
        self._random = random.Random(hello.name)  # devices that lost the same server do not come back all at once
        self._waits = self._new_waits()
        self._away = 0.0
        """Seconds without a connection since a question was answered last."""
        self._join: Join | None = None
        self._bytes_before = 0
        self.largest_message = 0
        """Bytes that an answer may inflate to from `start` on."""
        self.step = 0
        """The last step that this client has finished and remembers."""
        self.round = 0
        """The last step that is in the adapter this client began the present round with."""
        self.checkpoint = 0
        """The earliest step that the server may go back to."""
        self._num_evaluations = 0
        self._start_unheard: tuple[Start, bool] | None = None
        """
        Where the run stood when a held-out batch was asked about again, and whether the training has to go there whatever it
        asks next: it does not know yet.
        """
        self.stopwatch = Stopwatch()
        """Of all connections; a while without one is left out."""
        self._told = Seconds()
        self.kept: KeptSamples | None = None
        """This device's samples, from `start` on, where the run keeps any."""
        self._connection: Connection | None = None
        try:
            self.welcome = self._greet(patient)
            if before is not None and before.run == self.welcome.run:
                self._check_same_run(before, self.welcome)
        except KeyboardInterrupt:
            self.close()
            raise
        except BaseException:
            self.hang_up()
            raise

    def start(self, join: Join) -> Start:
        """Wait until the run starts, or learn where it stands."""
        self._join = join
        if self._connection is not None:
            self._connection.session.kept = self.kept
        try:
            start = self._enter(self._connected())
        except ConnectionFailed as error:
            start = self._keep_trying(error, self._come_back)
        self.round = start.round
        self._told = self.stopwatch.read()  # waiting for the others to join belongs to no step
        return start

    def exchange(self, question: Message, answer_kind: type[Answer]) -> Answer:
        """A question's answer; raises what `exchange_each` does."""
        ((_, answer),) = self.exchange_each([question], answer_kind)
        return answer

    def exchange_each(
        self, questions: Iterable[Question], answer_kind: type[Answer], in_flight: int = 1
    ) -> Iterator[tuple[Question, Answer]]:
        """
        The questions with their answers, in their order, however often they have to be asked.

        Args:
            questions: the next one is made when fewer than ``in_flight`` are open.

        Raises:
            Moved: the run stands elsewhere.
            ConnectionFailed: no connection for ``give_up_after`` seconds.
            Refused, RemoteProtocolError: as `Connection.answer`.
        """
        waiting: deque[Question] = deque()
        for question in questions:
            if not isinstance(question, Evaluation):
                self._hear_of_start(question)
            waiting.append(question)
            if self._connection is not None:
                self._connection.ask(question)
            if len(waiting) >= in_flight:
                yield waiting[0], self._answer(waiting, answer_kind)
        while waiting:
            yield waiting[0], self._answer(waiting, answer_kind)

    def _answer(self, waiting: deque[Question], answer_kind: type[Answer]) -> Answer:
        """To the first of the questions that wait."""
        while True:
            try:
                connection = self._connected()
                with self._patience:
                    answer = connection.answer(answer_kind, Start)
            except ConnectionFailed as error:
                self._ask_again(waiting, error)
                continue
            question = waiting.popleft()
            if isinstance(answer, Start):
                _tell_what_was_missed(question, answer)
                self._go_to(answer, question)
            self._waits, self._away = self._new_waits(), 0.0  # a Welcome and a Start alone would be no progress
            if isinstance(question, Evaluation):
                self._told = self.stopwatch.read()  # it belongs to no step
            if isinstance(answer, EdgeAdapter):
                self.round = answer.step
                self.checkpoint = max(self.checkpoint, answer.checkpoint)
            return cast(Answer, answer)

    def _ask_again(self, waiting: deque[Question], error: ConnectionFailed) -> None:
        """On another connection, unless the run has left these questions behind."""
        before = (self.welcome.restarts, self.round)
        start = self._keep_trying(error, self._come_back)
        if (self.welcome.restarts, start.round) != before or not Itinerary.may_ask_again(waiting[0], start):
            self._go_to(start, waiting[0])
        if isinstance(waiting[0], Evaluation):
            self._start_unheard = start, self._start_unheard is not None and self._start_unheard[1]
        for question in waiting:
            self._connected().ask(question)

    def next_index(self) -> int:
        """A number for the next `Evaluation` that no other has had."""
        self._num_evaluations += 1
        return self._num_evaluations

    def seconds_to_tell(self) -> Seconds:
        """Where the time since this was asked last has gone."""
        read, before = self.stopwatch.read(), self._told
        self._told = read
        return difference(read, before)

    @property
    def num_bytes(self) -> int:
        """Bytes of all messages so far, both ways."""
        return self._bytes_before + (self._connection.num_bytes if self._connection else 0)

    def close(self) -> None:
        """Leave the run for good."""
        if self._connection is not None:
            self._connection.close()
        elif self._join is not None:
            logger.warning("without a connection the server cannot be told that this device leaves: the run waits for it")

    def hang_up(self) -> None:
        """Be gone, as a device that was killed is: the place in the run stays, and this device may come back to it."""
        self._drop()

    def _greet(self, patient: bool) -> Welcome:
        try:
            return self._hear_welcome(self._opened())
        except ConnectionFailed as error:
            if self._connection is None and not patient and not error.retry_after:
                raise
            return self._keep_trying(error, self._hear_welcome)

    def _hear_welcome(self, connection: Connection) -> Welcome:
        welcome = connection.exchange(self._hello, Welcome)
        if welcome.fingerprint != self._hello.fingerprint:
            raise RemoteProtocolError(f"{connection.url} does not keep to the protocol: its run has another base model")
        return welcome

    def _go_to(self, start: Start, question: Message) -> None:
        self.round = start.round
        self._start_unheard = (start, True) if isinstance(question, Evaluation) else None
        raise Moved(start)

    def _hear_of_start(self, question: Message) -> None:
        """Whether a question of the training is still to be asked, if the run has said meanwhile where it stands."""
        if self._start_unheard is not None:
            (start, must_go), self._start_unheard = self._start_unheard, None
            if must_go or not Itinerary.may_ask_again(question, start):
                self._go_to(start, question)

    def _connected(self) -> Connection:
        if self._connection is None:
            raise ConnectionFailed("not connected")
        return self._connection

    def _enter(self, connection: Connection) -> Start:
        assert self._join is not None
        connection.expect(self.largest_message)
        kept = None if self.kept is None else self.kept.newest
        with self._patience:
            return connection.exchange(replace(self._join, step=self.step, kept=kept), Start)

    def _come_back(self, connection: Connection) -> Start:
        welcome = self._hear_welcome(connection)
        if welcome.run != self.welcome.run:
            raise Refused(f"{connection.url} has another run now: {welcome.run} instead of {self.welcome.run}")
        self._check_same_run(self.welcome, welcome)
        self.welcome = welcome
        start = self._enter(connection)
        logger.info("connected again; the run goes on after step %d, this device had finished step %d", start.step, self.step)
        return start

    def _check_same_run(self, before: Welcome, now: Welcome) -> None:
        changed = changed_settings(before.settings, now.settings, restarted=now.restarts > before.restarts)
        if now.restarts < before.restarts:
            changed.append(f"restarts {before.restarts} is now {now.restarts}")
        if changed:
            raise RemoteProtocolError(
                f"the server does not keep to the protocol: run {now.run} has other settings than before "
                f"({', '.join(changed)}); the same run has the same settings"
            )

    def _keep_trying(self, error: ConnectionFailed, talk: Callable[[Connection], Answer]) -> Answer:
        """Open a connection and ``talk`` on it until that succeeds."""
        lost_at = gone_since = time.monotonic()
        tell_after = 0.0
        for wait in self._waits:
            self._drop()
            now = time.monotonic()
            self._away, gone_since = self._away + now - gone_since, now
            wait = max(wait, error.retry_after)
            if self._give_up_after is not None and self._away + wait > self._give_up_after:
                asked = f" (and wants to be asked again in {error.retry_after:g} s)" if error.retry_after else ""
                raise ConnectionFailed(f"{error}{asked}; gave up after {self._give_up_after:g} s")
            if now - lost_at >= tell_after:
                level = logging.WARNING if error.retry_after else logging.INFO  # a refusal may be the user's to mend
                logger.log(level, "%s; this device tries until there is a connection, next in %.1f s", error, wait)
                tell_after = max(SECONDS_TO_TELL_AGAIN, 2 * (now - lost_at))
            else:
                logger.debug("%s; this device tries again in %.1f s", error, wait)
            self._sleep(wait)
            try:
                connection = self._opened()
                now = time.monotonic()
                self._away, gone_since = self._away + now - gone_since, now
                answer = talk(connection)
            except ConnectionFailed as failed:
                if self._connection is not None:
                    gone_since = time.monotonic()  # there was a connection, if only for so long
                error = failed
            else:
                self.stopwatch.leave_out(time.monotonic() - lost_at)
                return answer
        raise AssertionError("waits never end")

    def _opened(self) -> Connection:
        self._connection = self._dial()
        self._connection.stopwatch, self._connection.session.kept = self.stopwatch, self.kept
        return self._connection

    def _new_waits(self) -> Iterator[float]:
        """Seconds between attempts: doubling on average, never the same for two devices."""
        longest = SHORTEST_WAIT
        while True:
            yield self._random.uniform(SHORTEST_WAIT, longest)
            longest = min(LONGEST_WAIT, 2 * longest)

    def _drop(self) -> None:
        if self._connection is not None:
            self._bytes_before += self._connection.num_bytes
            self._connection.abandon()
            self._connection = None


def _tell_what_was_missed(question: Message, start: Start) -> None:
    """Of a question that came too late: the run has gone on without it."""
    first = getattr(question, "step", start.step + 1)
    if first <= start.step:
        steps = f"step {first}" if first == start.step else f"steps {first} to {start.step}"
        logger.info("the run has gone on without this device, which has missed %s", steps)
