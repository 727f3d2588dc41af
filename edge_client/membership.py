"""A client's membership in a run, which outlives its connections."""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NoReturn, TypeVar, cast

from protocol import (
    HANDSHAKE_BYTES,
    ActivationCache,
    EdgeAdapter,
    Evaluation,
    Hello,
    HiddenGradient,
    HiddenStates,
    Itinerary,
    Join,
    Message,
    Ping,
    Pong,
    Remembered,
    RemoteProtocolError,
    RunEnd,
    Start,
    Welcome,
    identity,
)
from protocol.agreement import changed_settings
from storage import ModelError
from terminal import plain

from .connection import Connection, ConnectionFailed, Dial, Refused
from .device_log import DeviceLog
from .reconnector import Reconnector
from .stopwatch import Stopwatch

__all__ = ["Membership", "Position", "Redirected"]

Question = TypeVar("Question", bound=Message)
Answer = TypeVar("Answer", bound=Message)


class Redirected(Exception):
    """
    The run does not stand where this client does: the server went back to a checkpoint, or a step ended without this client.
    It goes on where ``start`` says.
    """

    def __init__(self, start: Start) -> None:
        super().__init__(f"go on after step {start.step}")
        self.start = start


@dataclass
class Position:
    """Where this client stands in the run."""

    step: int = 0
    """The last step that it has finished and can go on from; `Join` tells the server."""
    round: int = 0
    """The last step that is in the adapter with which it began the present round."""
    checkpoint: int = 0
    """The earliest step that the server may go back to."""

    @property
    def is_between_rounds(self) -> bool:
        """Whether this client has the adapter that the run has; within a round it has its own."""
        return self.step == self.round


class PostponedStart:
    """
    The answer to a `Join` in the middle of an evaluation. Held-out batches may be asked about at any point of the run, so the
    evaluation goes on; the training, which may have to go elsewhere, looks here before its next question.
    """

    def __init__(self) -> None:
        self._start: Start | None = None
        self._must_follow = False

    def put(self, start: Start, *, must_follow: bool) -> None:
        """
        Args:
            must_follow: whether the training has to go where ``start`` says, whatever it asks next. That remains so after
                later ones, since the training has heard of none of them.
        """
        self._start, self._must_follow = start, self._must_follow or must_follow

    def take(self) -> tuple[Start, bool] | None:
        """The last one, and whether it must be followed; it is not given again."""
        start, must_follow = self._start, self._must_follow
        self._start, self._must_follow = None, False
        return None if start is None else (start, must_follow)


class Membership:
    """
    Exchanges questions for answers as `Connection` does, and connects again when the connection is lost.

    Args:
        dial: opens a connection.
        give_up_after: seconds without a connection, added up until a question is answered; None tries forever.
        while_waiting: entered while this client waits for an answer.
        server_may_be_away: when the first connection is opened; else the address of a server that is away is taken for wrong.
            A server that says when it wants to be asked again is asked again in any case.
        before: the run in which this device was when it was killed, as the server had announced it.
        wants_part: whether this device may have its part of the model from the server; then the server is asked before anything
            else whether it hands over any. See `edge_weights`.
        welcomed: called with every connection and what the server has welcomed this client with.
        stopwatch: divides the time that this client spends.
        log: hears what becomes of the connection.
        sleep: waits for so many seconds.
        clock: gives seconds.

    Raises:
        ConnectionFailed, Refused, RemoteProtocolError: as `Connection`, where trying again is of no use.
        ModelError: this device has no model, and the server hands over no part of its own.
    """

    def __init__(
        self,
        dial: Dial,
        hello: Hello,
        *,
        give_up_after: float | None = None,
        server_may_be_away: bool = False,
        before: Welcome | None = None,
        wants_part: bool = False,
        while_waiting: AbstractContextManager[None] | None = None,
        welcomed: Callable[[Connection, Welcome], None] = lambda connection, welcome: None,
        stopwatch: Stopwatch | None = None,
        log: DeviceLog | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hello, self._while_waiting = hello, while_waiting or nullcontext()
        self._welcomed = welcomed
        self.stopwatch, self._log = stopwatch or Stopwatch(), log or DeviceLog(hello.name, None)
        self._server = Reconnector(
            dial, hello.name, give_up_after=give_up_after, stopwatch=self.stopwatch, log=self._log, sleep=sleep, clock=clock
        )
        self.position = Position()
        self.activation_cache: ActivationCache | None = None
        """See `start`."""
        self._postponed = PostponedStart()
        self._join: Join | None = None
        """What this client has joined with; None before `start`."""
        self._largest_message = HANDSHAKE_BYTES
        self._asked_back: dict[tuple[int, int], bytes] = {}
        """By step and micro-batch of what `exchange_each` exchanges now: a digest of the hidden states."""
        self._num_indices = 0
        """Of this process; see `next_index`."""
        self.edge_weights = ""
        """The precision of the part that the server hands over; empty where it hands over none, or was not asked."""
        self._wants_part = wants_part
        if before is not None:
            self._server.backoff.num_devices = before.settings.clients
        try:
            self.welcome = self._greet(server_may_be_away)
            if before is not None and before.run == self.welcome.run:
                _check_same_run(before, self.welcome)
        except KeyboardInterrupt:
            self.close()  # the user wants to leave
            raise
        except BaseException:
            self.hang_up()
            raise

    # What a client says

    def start(
        self, join: Join, *, largest_message: int = HANDSHAKE_BYTES, activation_cache: ActivationCache | None = None
    ) -> Start:
        """
        Join the run. Returns when it starts, with all of its clients; if it has started already, at once.

        Args:
            largest_message: bytes that an answer may inflate to from now on.
            activation_cache: of this device's samples, where the run keeps any.
        """
        self._join, self._largest_message = join, largest_message
        self.activation_cache = activation_cache
        self._server.use_cache(activation_cache)
        try:
            start = self._enter(self._server.connection)
        except ConnectionFailed as error:
            start = self._server.reconnect(error, self._rejoin)
        self.position.round = start.round
        self.stopwatch.lap()  # waiting for the others to join belongs to no step
        return start

    def ask(self, question: Message, answer_kind: type[Answer]) -> Answer:
        """
        The answer to a question that belongs before `start`, however often it has to be asked.

        Raises:
            ConnectionFailed, Refused, RemoteProtocolError: as `exchange_each`.
        """
        while True:
            try:
                answer = self._server.connection.exchange(question, answer_kind)
            except ConnectionFailed as error:
                self._server.reconnect(error, self._hear_same_welcome)
                continue
            self._server.made_progress()
            return answer

    def exchange(self, question: Message, answer_kind: type[Answer]) -> Answer:
        """The answer to a question about which the server asks nothing back; raises what `exchange_each` does."""
        ((_, answer),) = self.exchange_each([question], answer_kind)
        return cast(Answer, answer)

    def exchange_each(
        self, questions: Iterable[Question], answer_kind: type[Answer], in_flight: int = 1
    ) -> Iterator[tuple[Question, Answer | HiddenStates]]:
        """
        The questions with their answers, in their order, however often they have to be asked.

        Where labels stay on the device, a question comes with `HiddenStates` before: the server asks back, and gives no answer
        until it has a `reply`. It may come so again, on another connection.

        Args:
            questions: the next one is made when fewer than ``in_flight`` wait for their answers.

        Raises:
            Redirected: the run stands elsewhere.
            ConnectionFailed: no connection for ``give_up_after`` seconds.
            Refused, RemoteProtocolError: as `Connection.answer`.
        """
        waiting: deque[Question] = deque()
        self._asked_back.clear()
        for question in questions:
            self._follow_postponed_start(question)
            waiting.append(question)
            if self._server.is_connected:  # if not, it is asked when there is a connection again
                self._server.connection.ask(question)
            while len(waiting) >= in_flight:
                yield self._hear(waiting, answer_kind)
        while waiting:
            yield self._hear(waiting, answer_kind)

    def reply(self, reply: HiddenGradient) -> None:
        """Give the server what it has asked back. Where the connection is lost, it asks back again on the next one."""
        if self._server.is_connected:
            self._server.connection.ask(reply)

    def training_follows(self) -> None:
        """The training goes where the last `Start` says, of whichever question it has heard that."""
        self._postponed.take()

    def next_index(self) -> int:
        """
        A new number for each `Evaluation`, `AskPart` and `AskPiece`. The answer repeats it: so a late answer is recognised, and
        a question that is asked again is none of its own.
        """
        self._num_indices += 1
        return self._num_indices

    @property
    def num_bytes(self) -> int:
        """Bytes of all messages so far, both ways."""
        return self._server.num_bytes

    def close(self) -> None:
        """Leave the run for good."""
        if self._server.is_connected:
            self._server.connection.close()
        elif self._join is not None:
            away = "without a connection the server cannot be told that this device leaves: the run waits for it"
            self._log.tell("note", away, level="warning")

    def hang_up(self) -> None:
        """Close the connection without a word, as a device that was killed: it remains a member, and may come back."""
        self._server.drop()

    # Asking, until there is an answer

    def _hear(self, waiting: deque[Question], answer_kind: type[Answer]) -> tuple[Question, Answer | HiddenStates]:
        """What the server says next of a waiting question: the answer to the first, which is taken out, or a question."""
        while True:
            try:
                connection = self._server.connection
                with self._while_waiting:
                    answer = connection.answer(answer_kind, HiddenStates, Start)
            except ConnectionFailed as error:
                self._ask_again(waiting, error)
                continue
            if isinstance(answer, HiddenStates):
                return self._asked_back_about(waiting, answer), answer
            question = waiting.popleft()
            if isinstance(answer, Start):  # the run has gone on without this client, and none of its questions will be answered
                self._tell_where_to(question, answer)
                self._redirect(answer, question)
            self._server.made_progress()  # what the server says after each connection, such as a Welcome, would be none
            if isinstance(answer, EdgeAdapter | RunEnd):
                self.position.round = answer.step
            if isinstance(answer, EdgeAdapter):
                self.position.checkpoint = max(self.position.checkpoint, answer.checkpoint)
            return question, cast(Answer, answer)

    def _asked_back_about(self, waiting: Iterable[Question], states: HiddenStates) -> Question:
        """
        The waiting question to which the hidden states belong.

        Raises:
            RemoteProtocolError: there is none, or they are others than before. A server that could have the gradient at many
                points would average its noise away.
        """
        micro_batch = f"micro-batch {states.micro_batch} of step {states.step}"
        digest = hashlib.sha256(states.values.tobytes()).digest()
        if self._asked_back.setdefault((states.step, states.micro_batch), digest) != digest:
            raise RemoteProtocolError(f"the server asks back about {micro_batch} with other hidden states than before")
        for question in waiting:
            if identity(question)[1:] == identity(states)[1:]:
                return question
        raise RemoteProtocolError(f"got the hidden states of {micro_batch}, which this device waits for no more")

    def _ask_again(self, waiting: deque[Question], error: ConnectionFailed) -> None:
        """Ask the waiting questions on a new connection, unless the run has left them behind."""
        # A server that was started again, and a round that ended meanwhile, have made the adapter another one: what the waiting
        # questions were computed with is gone.
        position = self.position
        before = Remembered(step=position.step, round=position.round, restarts=self.welcome.restarts)
        start = self._server.reconnect(error, self._rejoin)
        is_same_round = before.is_of_round(start, self.welcome.restarts)
        if not is_same_round or not Itinerary.may_ask_again(waiting[0], start):
            self._redirect(start, waiting[0])
        if isinstance(waiting[0], Evaluation):
            self._postponed.put(start, must_follow=False)
        for question in waiting:
            self._server.connection.ask(question)

    def _redirect(self, start: Start, question: Message) -> NoReturn:
        """
        Raises:
            Redirected: always.
        """
        self.position.round = start.round
        if isinstance(question, Evaluation):
            self._postponed.put(start, must_follow=True)  # whoever evaluates is told now, the training is not
        else:
            self._postponed.take()
        raise Redirected(start)

    def _tell_where_to(self, question: Message, start: Start) -> None:
        """
        Where a question came too late, and the run has gone on without this device; or where the server takes back what this
        device has sent, which no run has to do often: with another adapter, what is sent again tells more of the same texts.
        """
        first = getattr(question, "step", start.step + 1)
        if start.total_steps < first:
            self._log.tell("ended_early", f"the server ends the run after step {start.step}", step=start.step)
        elif first <= start.step:
            steps = f"step {first}" if first == start.step else f"steps {first} to {start.step}"
            text = f"the run has gone on without this device, which has missed {steps}"
            self._log.tell("missed", text, step=start.step, first=first, last=start.step)
        else:
            text = f"the server sends this device back: what it has sent of step {first} it sends again"
            self._log.tell("sent_back", text, step=start.step)

    def _follow_postponed_start(self, question: Message) -> None:
        """
        To be called before a question is asked.

        Raises:
            Redirected: it is a question of the training, and the run has meanwhile gone elsewhere.
        """
        if isinstance(question, Evaluation):
            return
        postponed = self._postponed.take()
        if postponed is None:
            return
        start, must_follow = postponed
        if must_follow or not Itinerary.may_ask_again(question, start):
            self._redirect(start, question)

    # A connection's first messages

    def _greet(self, server_may_be_away: bool) -> Welcome:
        try:
            return self._hear_welcome(self._server.connect())
        except ConnectionFailed as error:
            # Nobody has ever answered at this address. An error at once shows a typing mistake; trying on would hide it.
            may_be_wrong = not self._server.is_connected and not error.retry_after
            if may_be_wrong and not server_may_be_away:
                raise
            return self._server.reconnect(error, self._hear_welcome)

    def _hear_welcome(self, connection: Connection) -> Welcome:
        if self._wants_part:
            self._ask_for_weights(connection)
        welcome = connection.exchange(self._hello, Welcome)
        # The server compares them, too, and refuses; one that does not would train another model with these activations.
        if self._hello.fingerprint not in ("", welcome.fingerprint):
            raise RemoteProtocolError(f"{connection.url} does not keep to the protocol: its run has another base model")
        self._hello = replace(self._hello, fingerprint=welcome.fingerprint)
        self._server.backoff.num_devices = welcome.settings.clients
        self._welcomed(connection, welcome)
        return welcome

    def _ask_for_weights(self, connection: Connection) -> None:
        pong = connection.exchange(Ping(), Pong)
        if not pong.edge_weights and not self._hello.fingerprint:
            raise ModelError(
                f"the server at {connection.url} (splitlora {plain(pong.software[:40])}) hands over no part of its model, as "
                "older versions and runs in float64 do: update it, or give --model"
            )
        self.edge_weights, self._wants_part = pong.edge_weights, False

    def _hear_same_welcome(self, connection: Connection) -> None:
        welcome = self._hear_welcome(connection)
        if welcome.run != self.welcome.run:
            # Not a run to enter by itself: what this device has learnt belongs to the one that is gone.
            raise Refused(f"{connection.url} has another run now: {welcome.run} instead of {self.welcome.run}")
        _check_same_run(self.welcome, welcome)
        self.welcome = welcome

    def _enter(self, connection: Connection) -> Start:
        assert self._join is not None
        connection.expect(self._largest_message)
        cache = self.activation_cache
        join = replace(self._join, step=self.position.step, kept=None if cache is None else cache.newest)
        with self._while_waiting:
            return connection.exchange(join, Start)

    def _rejoin(self, connection: Connection) -> Start:
        self._hear_same_welcome(connection)
        start = self._enter(connection)
        stands = f"the run goes on after step {start.step}, this device had finished step {self.position.step}"
        self._log.tell("back", f"connected again; {stands}", step=self.position.step)
        return start


def _check_same_run(before: Welcome, now: Welcome) -> None:
    changed = changed_settings(before.settings, now.settings, restarted=now.restarts > before.restarts)
    if now.restarts < before.restarts:
        changed.append(f"restarts {before.restarts} is now {now.restarts}")
    if changed:
        raise RemoteProtocolError(
            f"the server does not keep to the protocol: run {now.run} has other settings than before "
            f"({', '.join(changed)}); the same run has the same settings"
        )
