"""
The conversation as a state machine, without I/O.

All that decides which message may come next is in TRANSITIONS, and both sides obey the same rows. The client asks, the server
answers. Only of a step's micro-batches may several be open at a time: they are answered in their order, and the state is left
with the last of them, or with a `Start`, which answers all. Where labels stay on the device, the server asks back in between,
once for each that is open.
"""

import enum
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from . import delta, recall
from .agreement import Agreement
from .codecs import Coded
from .encoding import decode, encode
from .errors import LocalProtocolError, RemoteProtocolError
from .gradients import coded_gradient
from .itinerary import LEGS, Leg
from .limits import HANDING_OVER_BYTES, HANDSHAKE_BYTES
from .messages import (
    ActivationGradient,
    Activations,
    AdapterGradient,
    AdapterWeights,
    Array,
    AskPart,
    AskPiece,
    Contribution,
    EdgeAdapter,
    Evaluation,
    EvaluationLoss,
    EvaluationStates,
    Failure,
    Goodbye,
    HeldOutLoss,
    Hello,
    HiddenGradient,
    HiddenStates,
    Join,
    LabelledBatch,
    Message,
    Noted,
    Part,
    Piece,
    Ping,
    Pong,
    RunEnd,
    Start,
    Welcome,
    identity,
)
from .passage import coded_contribution
from .rounding import Dither
from .settings import DELTA, DITHERED, EXACT, gradient_codec, states_codec

__all__ = ["TRANSITIONS", "Session", "Side", "State"]


logger = logging.getLogger(__name__)


class Side(enum.Enum):
    CLIENT = "client"
    SERVER = "server"

    @property
    def peer(self) -> "Side":
        return Side.SERVER if self is Side.CLIENT else Side.CLIENT


class State(enum.Enum):
    NEW = "new"
    PINGED = "pinged"
    GREETED = "greeted"
    WELCOMED = "welcomed"
    AWAITING_PART = "awaiting part"
    AWAITING_PIECE = "awaiting piece"
    JOINING = "joining"
    READY = "ready"
    AWAITING_GRADIENT = "awaiting gradient"
    AWAITING_ADAPTER = "awaiting adapter"
    AWAITING_LOSS = "awaiting loss"
    AWAITING_NOTE = "awaiting note"
    AWAITING_END = "awaiting the end"
    BROKEN = "broken by an illegal message"
    CLOSED = "closed"


OF_HELD_OUT = "bfloat16"
"""
The codec of held-out texts, in runs that have one. What is measured is the adapter, which is used without a codec: bfloat16
changes the loss by less than is seen.
"""


class Codecs(NamedTuple):
    """What coded floats travel in, by the kind of their message."""

    activations: str = EXACT
    gradients: str = EXACT
    """Of hidden states, too, but for DITHERED."""
    adapters: str = EXACT
    """Of LoRA matrices; it stays as the run has begun."""

    def of(self, kind: type) -> str:
        if issubclass(kind, Activations):
            return self.activations
        if issubclass(kind, Contribution | EdgeAdapter):
            return self.adapters
        if issubclass(kind, Evaluation | EvaluationStates):
            return EXACT if self.activations == EXACT else OF_HELD_OUT
        if issubclass(kind, HiddenStates) and self.gradients == DITHERED:
            return states_codec(self.activations)
        return self.gradients

    def of_side(self, sender: Side) -> set[str]:
        """All that a side may use."""
        return {self.of(kind) for kind in _CODED[sender]}


_CODED = {
    Side.CLIENT: (Activations, HiddenGradient, Contribution, Evaluation),
    Side.SERVER: (ActivationGradient, HiddenStates, EdgeAdapter, EvaluationStates),
}
"""Who sends what may be coded."""


class Stage(enum.Enum):
    """How far a micro-batch has come."""

    ASKED = "asked"
    ASKED_BACK = "asked back"
    """The client owes the loss and its gradient."""
    REPLIED = "replied"


@dataclass
class OpenBatch:
    """A batch that is not answered."""

    hidden_shape: tuple[int, int]
    """(M, d) of its hidden states, and of the gradient there."""
    stage: Stage = Stage.ASKED


_BATCH_OF: dict[type, type] = {
    ActivationGradient: Activations,
    HiddenStates: Activations,
    HiddenGradient: Activations,
    EvaluationLoss: Evaluation,
    EvaluationStates: Evaluation,
}
"""What a message belongs to."""

_ADVANCE = {HiddenStates: (Stage.ASKED, Stage.ASKED_BACK), HiddenGradient: (Stage.ASKED_BACK, Stage.REPLIED)}
"""From which stage to which a message brings its micro-batch."""

_OPEN = [state for state in State if state is not State.CLOSED]

_AWAITING = {ActivationGradient: State.AWAITING_GRADIENT, EdgeAdapter: State.AWAITING_ADAPTER, RunEnd: State.AWAITING_END}
"""The state of a session that waits for such an answer."""

_Row = tuple[State, Side, type]
"""In this state this side may send such a message."""


def _rows(leg: Leg) -> Iterator[tuple[_Row, State]]:
    """The rows by which a client asks a question of its itinerary, and gets its answer."""
    awaiting = _AWAITING[leg.answer]
    yield (State.READY, Side.CLIENT, leg.question), awaiting
    if leg.by_micro_batch:
        yield (awaiting, Side.CLIENT, leg.question), awaiting
    if leg.asks_back and leg.replied_by:
        yield (awaiting, Side.SERVER, leg.asks_back), awaiting
        yield (awaiting, Side.CLIENT, leg.replied_by), awaiting
    yield (awaiting, Side.SERVER, leg.answer), State.READY
    if leg.may_be_overtaken:
        yield (awaiting, Side.SERVER, Start), State.READY


# (state, who sends, what) -> next state
TRANSITIONS: dict[_Row, State] = {
    (State.NEW, Side.CLIENT, Ping): State.PINGED,
    (State.PINGED, Side.SERVER, Pong): State.NEW,
    (State.NEW, Side.CLIENT, Hello): State.GREETED,
    (State.GREETED, Side.SERVER, Welcome): State.WELCOMED,
    (State.WELCOMED, Side.CLIENT, AskPart): State.AWAITING_PART,
    (State.AWAITING_PART, Side.SERVER, Part): State.WELCOMED,
    (State.WELCOMED, Side.CLIENT, AskPiece): State.AWAITING_PIECE,
    (State.AWAITING_PIECE, Side.SERVER, Piece): State.WELCOMED,
    (State.WELCOMED, Side.CLIENT, Join): State.JOINING,
    (State.JOINING, Side.SERVER, Start): State.READY,
    **{row: state for leg in LEGS for row, state in _rows(leg)},
    (State.READY, Side.CLIENT, Evaluation): State.AWAITING_LOSS,
    (State.AWAITING_LOSS, Side.SERVER, EvaluationLoss): State.READY,
    (State.AWAITING_LOSS, Side.SERVER, EvaluationStates): State.READY,
    (State.READY, Side.CLIENT, HeldOutLoss): State.AWAITING_NOTE,
    (State.AWAITING_NOTE, Side.SERVER, Noted): State.READY,
    **{(state, Side.CLIENT, Goodbye): State.CLOSED for state in _OPEN},
    **{(state, Side.SERVER, Failure): State.CLOSED for state in _OPEN},
}


class Session:
    """
    One side of one conversation. One thread may send while another receives.

    Args:
        side: which side we are.
        max_bytes: the most a message of the peer may inflate to; if not given, what it may be before `Start`. Raise it when a
            `Join` has said what to expect.
    """

    def __init__(self, side: Side, max_bytes: int | None = None) -> None:
        self.side = side
        before_start = HANDING_OVER_BYTES if side is Side.CLIENT else HANDSHAKE_BYTES
        self.max_bytes = before_start if max_bytes is None else max_bytes
        self.state = State.NEW
        self.codecs = Codecs()
        """The server decides them, for the next step."""
        self._codecs_before = self.codecs
        self._gradients_at_first = EXACT
        self.activation_cache: delta.ActivationCache | None = None
        """The client's samples, for runs that keep them; both sides give the session theirs when the client has joined."""
        self._agreed = Agreement()
        self._received: tuple[type, int, int, int, int] | None = None
        self._resumed_at: int | None = None
        """The step of the last `Start`."""
        self._answered_up_to = 0
        """What was asked of steps up to this one, it has answered: the same, and the next, where the run has ended early."""
        self._start_may_be_lost = False
        """Whether nothing has been heard since: what a `Start` takes back the server keeps until then."""
        self._open: dict[tuple[type, int, int], OpenBatch] = {}
        """Batches that are not answered by their identity, in the order in which they were asked."""
        self._lock = threading.Lock()
        """For the state; coding a tensor takes longer, and is not done under it."""

    def send(self, message: Message) -> bytes:
        """
        Note that we send ``message``; return its bytes.

        Raises:
            LocalProtocolError: it is not our turn to say this.
        """
        with self._lock:
            self._own_turn(message)
        data = encode(self._as_sent(message), self.codecs.of(type(message)), self._dither(message))
        with self._lock:
            self._enter(self._own_turn(message), message, self.side)
        return data

    def awaits(self, message: Message) -> bool:
        """
        Whether the peer waits for this. Of several micro-batches it waits for the first that is open: where that was lost, the
        second may be answered earlier.
        """
        with self._lock:
            if isinstance(message, ActivationGradient) and _batch_of(message) not in list(self._open)[:1]:
                return False
            return self._next_state(message, self.side) is not None

    def receive(self, data: bytes | str) -> Message | None:
        """
        Take one WebSocket message. After an error nothing may follow but a `Failure` or `Goodbye`.

        Returns:
            The message, or None if it is the one before it, delivered twice, or asks what a `Start` on its way has answered.

        Raises:
            RemoteProtocolError: it is no message, too large, or not the peer's turn.
        """
        try:
            if isinstance(data, str):
                raise RemoteProtocolError("got a text frame; messages are binary")
            message = decode(data, self.max_bytes, self._codecs_of_peer())
            with self._lock:  # what is not to be taken, or was, must not change the cache
                if self._is_repeated(message):
                    self._ignore(message, "it was delivered twice")
                    return None
                self._peers_turn(message)
                self._agreed.check(message)
                self._check_shape(message)
                if self._crosses_start(message):
                    self._ignore(message, f"Start after step {self._resumed_at} has answered it already")
                    return None
                if not isinstance(message, Goodbye):  # which may cross it
                    self._see_that_start_arrived()
            message = self._as_meant(message)
            with self._lock:
                return self._accept(message)
        except RemoteProtocolError:
            with self._lock:
                if self.state is not State.CLOSED:
                    self.state = State.BROKEN
            raise

    def _accept(self, message: Message) -> Message | None:
        next_state = self._peers_turn(message)
        if self._crosses_start(message):  # which has been sent since
            self._ignore(message, f"Start after step {self._resumed_at} has answered it meanwhile")
            return None
        self._enter(next_state, message, self.side.peer)
        self._received = _received_as(message)
        return message

    def _ignore(self, message: Message, reason: str) -> None:
        """Whoever looks for a message that was not answered finds it at level DEBUG."""
        kind, number, micro_batch = identity(message)
        client = self._agreed.hello.name if self._agreed.hello else "no name yet"
        logger.debug(
            "%s (%s): ignored %s %d, micro-batch %d: %s",
            self.side.value,
            client,
            kind.__name__,
            number,
            micro_batch,
            reason,
        )

    def _is_repeated(self, message: Message) -> bool:
        return _received_as(message) == self._received and self.state is not State.BROKEN

    def _crosses_start(self, message: Message) -> bool:
        """
        Whether it was sent before the `Start` had arrived that answers it, too.

        Raises:
            RemoteProtocolError: its sender had heard the `Start`, and would wait for an answer for ever.
        """
        if not isinstance(message, Activations | HiddenGradient) or message.step > self._answered_up_to:
            return False
        if not self._start_may_be_lost:
            if isinstance(message, HiddenGradient):
                return False  # nobody has asked for it: it is not the client's turn
            raise RemoteProtocolError(f"Activations of step {message.step} after a Start that goes on after {self._resumed_at}")
        return True

    def _peers_turn(self, message: Message) -> State:
        next_state = self._next_state(message, self.side.peer)
        if next_state is None:
            raise RemoteProtocolError(f"{self.side.peer.value} sent {type(message).__name__} while {self.state.value}")
        return next_state

    def _own_turn(self, message: Message) -> State:
        next_state = self._next_state(message, self.side)
        if next_state is None:
            raise LocalProtocolError(f"{self.side.value} cannot send {type(message).__name__} while {self.state.value}")
        if wrong := self._agreed.wrong_labels(message):  # before a label leaves its device
            raise LocalProtocolError(wrong)
        return next_state

    def _next_state(self, message: Message, sender: Side) -> State | None:
        """None if the sender may not say this now."""
        next_state = TRANSITIONS.get((self.state, sender, type(message)))
        if isinstance(message, HiddenGradient) and self.state is State.READY and self._crosses_start(message):
            return self.state
        if self.state is not State.AWAITING_GRADIENT:
            return next_state
        if isinstance(message, Activations) and len(self._open) >= self._most_open():
            return None
        if type(message) in _ADVANCE:
            asked = self._open.get(_batch_of(message))
            return next_state if asked is not None and asked.stage is _ADVANCE[type(message)][0] else None
        if isinstance(message, ActivationGradient):
            first = next(iter(self._open.values()), None)
            if first is not None and first.stage is Stage.ASKED_BACK:
                return None
            return self.state if len(self._open) > 1 else next_state
        return next_state

    def _check_shape(self, message: Message) -> None:
        """
        Raises:
            RemoteProtocolError: hidden states, or the gradient there, are not of the rows that were asked about.
        """
        asked = self._open.get(_batch_of(message))
        if asked is None or not isinstance(message, HiddenStates | HiddenGradient | EvaluationStates):
            return
        if message.values.shape != asked.hidden_shape:
            found, wanted = (" x ".join(map(str, shape)) for shape in (message.values.shape, asked.hidden_shape))
            raise RemoteProtocolError(f"{type(message).__name__} of {found}, expected {wanted}: one row for every label")

    def _most_open(self) -> int:
        """Micro-batches that may be under way."""
        return self._agreed.settings.micro_batches if self._agreed.settings else 1

    def _enter(self, next_state: State, message: Message, sender: Side) -> None:
        """Move on, and keep what has been agreed on."""
        if self.state is not State.AWAITING_GRADIENT:
            self._open.clear()
        if isinstance(message, LabelledBatch):
            self._open[identity(message)] = OpenBatch((message.num_labelled, message.values.shape[1]))
        elif type(message) in _ADVANCE and _batch_of(message) in self._open:
            self._open[_batch_of(message)].stage = _ADVANCE[type(message)][1]
        elif isinstance(message, ActivationGradient) and self._open:
            del self._open[next(iter(self._open))]
        self.state = next_state
        if isinstance(message, Start):
            self._resumed_at, self._start_may_be_lost = message.step, True
            self._answered_up_to = message.step + self._agreed.ends_early(message)
            if self.side is Side.CLIENT:
                self._see_that_start_arrived()
        self._agreed.note(message)
        if isinstance(message, Welcome):
            settings = message.settings
            self.codecs = Codecs(settings.activation_codec, settings.gradient_codec, settings.adapter_codec)
            self._gradients_at_first = settings.gradient_codec
        elif isinstance(message, Start | ActivationGradient) and message.codec:
            if message.codec != self.codecs.activations:
                self._codecs_before = self.codecs
            gradients = gradient_codec(message.codec, self._gradients_at_first)
            self.codecs = self.codecs._replace(activations=message.codec, gradients=gradients)
        self._update_cache(message)

    def _see_that_start_arrived(self) -> None:
        """Both sides drop what it takes back; the server not before it knows that the client has."""
        if self._start_may_be_lost and self.activation_cache is not None and self._resumed_at is not None:
            self.activation_cache.forget_after(self._resumed_at)
        self._start_may_be_lost = False

    def _update_cache(self, message: Message) -> None:
        """Both sides' caches hold the same, since the same messages change them."""
        if self.activation_cache is None:
            return
        if isinstance(message, ActivationGradient):
            self.activation_cache.confirm(message.step, message.micro_batch)
        elif isinstance(message, EdgeAdapter):
            self.activation_cache.forget_before(message.checkpoint)

    # Codecs

    def _codecs_of_peer(self) -> set[str]:
        """In which tensors may come, besides exactly."""
        return self.codecs.of_side(self.side.peer) | self._codecs_before.of_side(self.side.peer)  # it may be delivered twice

    def _as_sent(self, message: Message) -> Message:
        if isinstance(message, AdapterGradient | AdapterWeights) and (dither := self._dither(message)) is not None:
            assert self._agreed.settings is not None
            return coded_contribution(message, self._agreed.settings, dither)
        if isinstance(message, ActivationGradient | HiddenGradient) and self.codecs.gradients == DITHERED:
            return coded_gradient(message, self.codecs.activations, self._dither(message))
        if not isinstance(message, Activations):
            return message
        if message.since is not None and self.activation_cache is not None:
            recall.note_sent(message, self.activation_cache)
        if self.codecs.activations == EXACT:
            return message
        settings = self._agreed.settings
        if not message.micro_batch and settings is not None and settings.checks_codec(message.step):
            exact = self._nearly_exact(message.values)
            message = replace(message, exact=exact)  # type: ignore[arg-type]  # as it is on the wire
        if self.codecs.activations != DELTA:
            return message
        if self.activation_cache is None:
            raise LocalProtocolError(f"{DELTA} needs an activation cache")
        return delta.coded(message, self.activation_cache)

    def _nearly_exact(self, values: Array) -> Array | Coded:
        """What a codec is compared with: richer than it is, and little beside what it saves."""
        return values if self.codecs.activations == OF_HELD_OUT else Coded.of(values, OF_HELD_OUT)

    def _as_meant(self, message: Message) -> Message:
        if isinstance(message, Activations) and message.since is not None and self.activation_cache is not None:
            return recall.with_all_rows(message, self.activation_cache, self.max_bytes)
        in_delta = {name for name in ("values", "exact") if isinstance(getattr(message, name, None), Coded)}
        if not in_delta:
            return message
        if in_delta != {"values"} or not isinstance(message, Activations) or self.activation_cache is None:
            raise RemoteProtocolError(f"{type(message).__name__} in {DELTA}, which this run does not use")
        return delta.arrived(message, self.activation_cache)

    def _dither(self, message: Message) -> Dither | None:
        """For gradients, the same for the same run, client, direction and step: a repeated message has the same bytes."""
        hello, settings = self._agreed.hello, self._agreed.settings
        if not isinstance(message, ActivationGradient | HiddenGradient | Contribution) or hello is None or settings is None:
            return None
        if self.codecs.of(type(message)) == EXACT:
            return None
        return Dither(settings.seed, hello.name, type(message).__name__, *identity(message)[1:])


def _batch_of(message: Message) -> tuple[type, int, int]:
    """The identity of the batch that a message belongs to; of any other message, one that no batch has."""
    kind, number, micro_batch = identity(message)
    return _BATCH_OF.get(kind, kind), number, micro_batch


def _received_as(message: Message) -> tuple[type, int, int, int, int]:
    """What a message delivered twice has in common with itself, and with none before it."""
    # A `Start` may name the step of the one before it, where only its round has ended meanwhile, or the run has, early.
    return (*identity(message), getattr(message, "round", 0), getattr(message, "total_steps", 0))
