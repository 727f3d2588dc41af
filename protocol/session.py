"""
The conversation as a state machine, without I/O.

All that decides which message may come next is in TRANSITIONS, and both sides obey the same rows. The client asks, the server
answers: there is never more than one question open.
"""

import enum

from .encoding import decode, encode
from .errors import LocalProtocolError, RemoteProtocolError
from .limits import HANDSHAKE_BYTES
from .messages import (
    ActivationGradient,
    Activations,
    AdapterGradient,
    AdapterWeights,
    Done,
    EdgeAdapter,
    Evaluation,
    EvaluationLoss,
    Failure,
    Goodbye,
    Hello,
    Join,
    Message,
    Ping,
    Pong,
    RunEnd,
    Start,
    Welcome,
    identity,
)
from .rounding import Dither
from .settings import EXACT

__all__ = ["TRANSITIONS", "Session", "Side", "State"]


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
    JOINING = "joining"
    READY = "ready"
    AWAITING_GRADIENT = "awaiting gradient"
    AWAITING_ADAPTER = "awaiting adapter"
    AWAITING_LOSS = "awaiting loss"
    AWAITING_END = "awaiting the end"
    BROKEN = "broken by an illegal message"
    CLOSED = "closed"


_OPEN = [state for state in State if state is not State.CLOSED]

# (state, who sends, what) -> next state
TRANSITIONS: dict[tuple[State, Side, type], State] = {
    (State.NEW, Side.CLIENT, Ping): State.PINGED,
    (State.PINGED, Side.SERVER, Pong): State.NEW,
    (State.NEW, Side.CLIENT, Hello): State.GREETED,
    (State.GREETED, Side.SERVER, Welcome): State.WELCOMED,
    (State.WELCOMED, Side.CLIENT, Join): State.JOINING,
    (State.JOINING, Side.SERVER, Start): State.READY,
    (State.READY, Side.CLIENT, Activations): State.AWAITING_GRADIENT,
    (State.AWAITING_GRADIENT, Side.SERVER, ActivationGradient): State.READY,
    (State.READY, Side.CLIENT, AdapterGradient): State.AWAITING_ADAPTER,
    (State.READY, Side.CLIENT, AdapterWeights): State.AWAITING_ADAPTER,
    (State.AWAITING_ADAPTER, Side.SERVER, EdgeAdapter): State.READY,
    (State.READY, Side.CLIENT, Done): State.AWAITING_END,
    (State.AWAITING_END, Side.SERVER, RunEnd): State.READY,
    # A question about a step that the run has left behind.
    (State.AWAITING_GRADIENT, Side.SERVER, Start): State.READY,
    (State.AWAITING_ADAPTER, Side.SERVER, Start): State.READY,
    (State.READY, Side.CLIENT, Evaluation): State.AWAITING_LOSS,
    (State.AWAITING_LOSS, Side.SERVER, EvaluationLoss): State.READY,
    **{(state, Side.CLIENT, Goodbye): State.CLOSED for state in _OPEN},
    **{(state, Side.SERVER, Failure): State.CLOSED for state in _OPEN},
}


class Session:
    """
    One side of one conversation.

    Args:
        side: which side we are.
        max_bytes: the most a message of the peer may inflate to; raise it when a `Join` has said what to expect.
    """

    def __init__(self, side: Side, max_bytes: int = HANDSHAKE_BYTES) -> None:
        self.side = side
        self.max_bytes = max_bytes
        self.state = State.NEW
        self.codecs = dict.fromkeys(Side, EXACT)
        """By sender, of what may be coded; a `Welcome` decides."""
        self._hello: Hello | None = None
        self._seed = 0
        self._received: tuple[type, int, int] | None = None

    def send(self, message: Message) -> bytes:
        """
        Note that we send ``message``; return its bytes.

        Raises:
            LocalProtocolError: it is not our turn to say this.
        """
        next_state = TRANSITIONS.get((self.state, self.side, type(message)))
        if next_state is None:
            raise LocalProtocolError(f"{self.side.value} cannot send {type(message).__name__} while {self.state.value}")
        data = encode(message, self.codecs[self.side], self._dither(message))
        self.state = next_state
        self._note(message)
        return data

    def receive(self, data: bytes | str) -> Message | None:
        """
        Take one WebSocket message. After an error nothing may follow but a `Failure` or `Goodbye`.

        Returns:
            The message, or None if it is the one before it, delivered twice.

        Raises:
            RemoteProtocolError: it is no message, too large, or not the peer's turn.
        """
        try:
            if isinstance(data, str):
                raise RemoteProtocolError("got a text frame; messages are binary")
            message = decode(data, self.max_bytes, self.codecs[self.side.peer])
            # A `Start` may name the step of the one before it, where only its round has ended meanwhile.
            received = (*identity(message), getattr(message, "round", 0))
            if received == self._received and self.state is not State.BROKEN:
                return None
            next_state = TRANSITIONS.get((self.state, self.side.peer, type(message)))
            if next_state is None:
                peer = self.side.peer.value
                raise RemoteProtocolError(f"{peer} sent {type(message).__name__} while {self.state.value}")
            if isinstance(message, Welcome):
                self._check_offered(message)
        except RemoteProtocolError:
            if self.state is not State.CLOSED:
                self.state = State.BROKEN
            raise
        self.state = next_state
        self._received = received
        self._note(message)
        return message

    def _note(self, message: Message) -> None:
        """Keep what has been agreed on."""
        if isinstance(message, Hello):
            self._hello = message
        elif isinstance(message, Welcome):
            settings, self._seed = message.settings, message.settings.seed
            self.codecs = {Side.CLIENT: settings.activation_codec, Side.SERVER: settings.gradient_codec}

    def _check_offered(self, welcome: Welcome) -> None:
        """
        Raises:
            RemoteProtocolError: the server chose a codec that this client has not offered.
        """
        missing = welcome.settings.codecs().difference(self._hello.codecs if self._hello else ())
        if missing:
            raise RemoteProtocolError(f"the server chose the codec {', '.join(sorted(missing))}, which was not offered")

    def _dither(self, message: Message) -> Dither | None:
        """For gradients, the same for the same run, client, direction and step: a repeated message has the same bytes."""
        if not isinstance(message, ActivationGradient) or self._hello is None or self.codecs[self.side] == EXACT:
            return None
        return Dither(self._seed, self._hello.name, type(message).__name__, message.step)
