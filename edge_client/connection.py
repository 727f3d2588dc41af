"""The only file of this package that knows WebSockets. One verb: exchange a question for its answer."""

import time
from contextlib import ExitStack
from types import TracebackType
from typing import TypeVar

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.sync.client import connect

from protocol import (
    SECONDS_BETWEEN_PINGS,
    SECONDS_TO_PONG,
    Failure,
    Goodbye,
    LocalProtocolError,
    Message,
    RemoteProtocolError,
    Session,
    Side,
)

__all__ = ["Connection", "ConnectionFailed", "Refused"]

Answer = TypeVar("Answer", bound=Message)

LARGEST_FRAME_BYTES = 2**30  # a guard for the transport; the session holds every message to the bytes it can legally have


class ConnectionFailed(ConnectionError):
    """There is no server at the address, or it is gone."""


class Refused(ConnectionError):
    """The server refuses this client; the message is its reason."""


class Connection:
    """
    A conversation with the server at ``url``.

    Raises:
        ConnectionFailed: nobody there speaks WebSocket.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.session = Session(Side.CLIENT)
        self._open = ExitStack()
        self.num_bytes = 0
        """Bytes of all messages so far, both ways."""
        try:
            # No proxy: an address of the local network is meant. No deflate: messages are compressed already.
            opened = connect(
                url,
                compression=None,
                max_size=LARGEST_FRAME_BYTES,
                proxy=None,
                ping_interval=SECONDS_BETWEEN_PINGS,
                ping_timeout=SECONDS_TO_PONG,
            )
            self._socket = self._open.enter_context(opened)
        except (InvalidURI, ValueError):  # a port or host that cannot be is a ValueError
            raise ConnectionFailed(f"{url} is no WebSocket address; it looks like ws://192.168.1.20:8765") from None
        except (OSError, InvalidHandshake, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ConnectionFailed(f"no server at {url}: {reason}; is splitlora-server running there?") from None
        self._last_reply = time.perf_counter()

    def exchange(self, message: Message, answer_kind: type[Answer]) -> Answer:
        """
        Send a question, wait for its answer as long as it takes.

        Raises:
            Refused: the server answers with a refusal.
            RemoteProtocolError: it answers with something else than the protocol allows.
            ConnectionFailed: it is gone.
        """
        data = self.session.send(message)
        try:
            try:
                self._socket.send(data)
            except ConnectionClosed:
                pass  # a refusal that says why may have arrived before
            answer = self._socket.recv()
        except ConnectionClosed as error:
            raise ConnectionFailed(f"the connection to {self.url} was lost: {error}") from None
        self.num_bytes += len(data) + len(answer)
        try:
            reply = self.session.receive(answer)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"{self.url} does not keep to the protocol: {error}") from None
        self._last_reply = time.perf_counter()
        if isinstance(reply, Failure):
            raise Refused(f"the server at {self.url} refuses: {reply.reason}")
        if not isinstance(reply, answer_kind):
            raise RemoteProtocolError(f"expected {answer_kind.__name__}, got {type(reply).__name__}")
        return reply

    def seconds_since_reply(self) -> float:
        """How long this side has been busy with the last answer."""
        return time.perf_counter() - self._last_reply

    def close(self) -> None:
        """Leave, politely where the server still listens."""
        try:
            self._socket.send(self.session.send(Goodbye()))
        except (ConnectionClosed, LocalProtocolError):
            pass  # it is gone, or has refused us: there is nobody to say goodbye to
        finally:
            self._open.close()

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
