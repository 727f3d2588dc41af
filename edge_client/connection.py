"""The only file of this package that knows WebSockets: one conversation, as long as its link lasts."""

import ssl
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import TypeVar

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.headers import build_authorization_basic
from websockets.sync.client import connect

from protocol import (
    HANDSHAKE_BYTES,
    SECONDS_BETWEEN_PINGS,
    SECONDS_TO_PONG,
    Failure,
    Goodbye,
    LocalProtocolError,
    Message,
    RemoteProtocolError,
    Session,
    Side,
    compressed_bound,
)

from .pinning import CertificateChanged

__all__ = ["Connection", "ConnectionFailed", "Dial", "Refused"]

Answer = TypeVar("Answer", bound=Message)
Dial = Callable[[], "Connection"]

UNAUTHORISED = 401


class ConnectionFailed(ConnectionError):
    """There is no server at the address, or it is gone."""


class Refused(ConnectionError):
    """The server refuses this client; the message is its reason."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        """Seconds after which the same may be allowed; 0: never."""


class Connection:
    """
    A conversation with the server at ``url``.

    Args:
        credentials: name and secret of this device.
        encryption: for wss://; the default trusts the system's authorities.

    Raises:
        ConnectionFailed: nobody there speaks WebSocket.
        Refused: the server does not accept the credentials.
        CertificateChanged: it is not the one this device was enrolled with.
    """

    def __init__(
        self, url: str, *, credentials: tuple[str, str] | None = None, encryption: ssl.SSLContext | None = None
    ) -> None:
        self.url = url
        self.session = Session(Side.CLIENT)
        self._open = ExitStack()
        self.num_bytes = 0
        """Bytes of all messages so far, both ways."""
        try:
            # No proxy: an address of the local network is meant. No deflate: messages are compressed already.
            opened = connect(
                url,
                ssl=encryption,
                additional_headers={"Authorization": build_authorization_basic(*credentials)} if credentials else None,
                compression=None,
                max_size=compressed_bound(HANDSHAKE_BYTES),
                proxy=None,
                ping_interval=SECONDS_BETWEEN_PINGS,
                ping_timeout=SECONDS_TO_PONG,
            )
            self._socket = self._open.enter_context(opened)
        except CertificateChanged:
            raise
        except InvalidStatus as error:
            if error.response.status_code != UNAUTHORISED:
                raise ConnectionFailed(f"no server at {url}: {error}; is splitlora-server running there?") from None
            raise Refused(_why_unauthorised(url, credentials)) from None
        except (InvalidURI, ValueError):  # a port or host that cannot be is a ValueError
            raise ConnectionFailed(f"{url} is no WebSocket address; it looks like ws://192.168.1.20:8765") from None
        except ssl.SSLError as error:
            raise ConnectionFailed(f"{url} does not speak TLS as this side does: {error.reason or error}") from None
        except (OSError, InvalidHandshake, EOFError, ConnectionClosed) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ConnectionFailed(f"no server at {url}: {reason}; is splitlora-server running there?") from None

    def expect(self, size: int) -> None:
        """Take messages of up to ``size`` bytes from now on; a frame that claims more is refused before it is read."""
        self.session.max_bytes = size
        self._socket.protocol.max_message_size = compressed_bound(size)

    def exchange(self, message: Message, *answer_kinds: type[Answer]) -> Answer:
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
            self.num_bytes += len(data)
            reply = self._receive()
        except ConnectionClosed as error:
            raise ConnectionFailed(f"the connection to {self.url} was lost: {error}") from None
        if isinstance(reply, Failure):
            raise Refused(f"the server at {self.url} refuses: {reply.reason}", reply.retry_after)
        if not isinstance(reply, answer_kinds):
            raise RemoteProtocolError(f"expected {answer_kinds[0].__name__}, got {type(reply).__name__}")
        return reply

    def _receive(self) -> Message:
        reply = None
        while reply is None:  # what is delivered twice, counts once
            answer = self._socket.recv()
            self.num_bytes += len(answer)
            try:
                reply = self.session.receive(answer)
            except RemoteProtocolError as error:
                raise RemoteProtocolError(f"{self.url} does not keep to the protocol: {error}") from None
        return reply

    def close(self) -> None:
        """Leave the run, politely where the server still listens."""
        try:
            self._socket.send(self.session.send(Goodbye()))
        except (ConnectionClosed, LocalProtocolError):
            pass  # it is gone, or has refused us: there is nobody to say goodbye to
        finally:
            self._open.close()

    def abandon(self) -> None:
        """Close a connection that is lost. The place in the run stays."""
        self._open.close()

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def _why_unauthorised(url: str, credentials: tuple[str, str] | None) -> str:
    if credentials is None:
        return f"the server at {url} takes enrolled devices only: splitlora-server enrol NAME prints what to join with"
    return f"the server at {url} does not know {credentials[0]} with this secret; it may have been revoked: enrol it again"
