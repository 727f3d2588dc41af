"""The only file of this package that knows WebSockets: one conversation, as long as its link lasts."""

import logging
import socket
import ssl
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI, ProtocolError
from websockets.headers import build_authorization_basic
from websockets.http11 import Response
from websockets.sync.client import ClientConnection, connect

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
    Start,
    compressed_bound,
)
from protocol.limits import limited_frames

from .pinning import CertificateChanged
from .stopwatch import Stopwatch

__all__ = ["Connection", "ConnectionFailed", "Dial", "Refused"]

Answer = TypeVar("Answer", bound=Message)
Dial = Callable[[], "Connection"]

QUIET = logging.getLogger("websockets.client.quiet")
QUIET.setLevel(logging.INFO)  # below that it would tell the headers, and the secret in them
UNAUTHORISED = 401  # of HTTP, as the two below
TOO_MANY_REQUESTS, SERVICE_UNAVAILABLE = 429, 503
SERVICE_RESTART = 1012  # of WebSocket
SECONDS_TO_TRY_AGAIN = 10.0  # where a server that is busy does not say when
LONGEST_WAIT = 3600.0  # seconds, as in `Failure`
LARGEST_SEND_BUFFER = 2**23  # bytes; systems allow less
SECONDS_TO_LEAVE = 5.0


class ConnectionFailed(ConnectionError):
    """There is no server at the address, it is gone, or has no time now: later it may be there."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        """Seconds after which the server wants to be asked again; 0: it has not said."""


class Refused(ConnectionError):
    """The server refuses this client, and would do so again; the message is its reason."""


class AnsweredInHttp(InvalidHandshake):
    """The address has answered, but not as a WebSocket."""

    def __init__(self, response: Response) -> None:
        super().__init__(f"HTTP {response.status_code}")
        self.response = response


class Handshake(ClientConnection):
    """
    No redirect is followed: whoever answers at the user's address does not choose another one for the secret and the text.
    """

    def handshake(self, *arguments: Any, **options: Any) -> None:
        try:
            super().handshake(*arguments, **options)
        except InvalidStatus as error:
            raise AnsweredInHttp(error.response) from None


@dataclass(frozen=True)
class Sent:
    """A question that is not answered."""

    at: float
    num_bytes: int
    sending: "Future[None]"


class Connection:
    """
    A conversation with the server at ``url``. Questions are sent by a thread of its own: on a slow link that takes a while,
    in which the device can compute.

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
        self.stopwatch = Stopwatch()
        self._open = ExitStack()
        self._courier = ThreadPoolExecutor(1, thread_name_prefix="courier")
        self._sent: deque[Sent] = deque()
        self._sending: Future[None] = Future()
        """Of the last question."""
        self._sending.set_result(None)
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
                create_connection=Handshake,
                logger=QUIET,
            )
            self._socket = self._open.enter_context(opened)
            protocol = self._socket.protocol
            protocol.recv_frame = limited_frames(protocol.recv_frame, ProtocolError)  # type: ignore[method-assign, assignment]
        except CertificateChanged:
            raise
        except AnsweredInHttp as error:
            raise _not_opened(url, credentials, error.response) from None
        except ssl.SSLCertVerificationError as error:  # before ValueError, which it is, too
            raise ConnectionFailed(
                f"this device is not enrolled at {url}, and the server's certificate is not an authority's "
                f"({error.verify_message}): enrol it with splitlora-edge join and what splitlora-server enrol NAME prints"
            ) from None
        except (InvalidURI, ValueError):  # a port or host that cannot be is a ValueError
            raise ConnectionFailed(f"{url} is not the address of a server; one looks like ws://192.168.1.20:8765") from None
        except ssl.SSLError as error:
            raise ConnectionFailed(f"{url} does not speak TLS as this side does: {error.reason or error}") from None
        except (OSError, InvalidHandshake, EOFError, ConnectionClosed) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ConnectionFailed(f"no server at {url}: {reason}; is splitlora-server running there?") from None

    def expect(self, size: int) -> None:
        """Take messages of up to ``size`` bytes from now on; a frame that claims more is refused before it is read."""
        self.session.max_bytes = size
        self._socket.protocol.max_message_size = compressed_bound(size)
        # While a question is written to the socket, websockets does not read: let the system take it whole, if it does.
        with suppress(OSError):  # the link is lost, and `answer` says so
            self._socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, min(size, LARGEST_SEND_BUFFER))

    def exchange(self, message: Message, *answer_kinds: type[Answer], within: float | None = None) -> Answer:
        """Send a question, wait for its answer; raises what `answer` does."""
        self.ask(message)
        return self.answer(*answer_kinds, within=within)

    def ask(self, message: Message) -> None:
        """Have a question sent. Where the link is lost, `answer` says so."""
        began = self.stopwatch.now()
        data = self.session.send(message)
        encoded = self.stopwatch.now()
        self.stopwatch.add(encode=encoded - began)
        self.num_bytes += len(data)
        self._sending = self._courier.submit(self._send, data)
        self._sent.append(Sent(encoded, len(data), self._sending))

    def _send(self, data: bytes) -> None:
        try:
            self._socket.send(data)
        except ConnectionClosed:
            pass  # a refusal that says why may have arrived before

    def answer(self, *kinds: type[Answer], within: float | None = None) -> Answer:
        """
        Wait for the answer to the first question that has none.

        Args:
            within: so many seconds at most for each message; None waits as long as it takes.

        Raises:
            Refused: the server answers with a refusal.
            RemoteProtocolError: it answers with something else than the protocol allows.
            ConnectionFailed: it is gone, does not answer in time, or refuses for a while only.
        """
        try:
            reply = self._receive(within)
        except TimeoutError:
            raise ConnectionFailed(f"the server at {self.url} is silent: no answer within {within:g} s") from None
        except ConnectionClosed as error:
            if error.rcvd is not None and error.rcvd.code == SERVICE_RESTART:
                raise ConnectionFailed(f"the server at {self.url} has stopped and will be back") from None
            raise ConnectionFailed(f"the connection to {self.url} was lost: {error}") from None
        if isinstance(reply, Failure):
            if reply.retry_after:
                raise ConnectionFailed(f"the server at {self.url} refuses for now: {reply.reason}", reply.retry_after)
            raise Refused(f"the server at {self.url} refuses: {reply.reason}")
        if not isinstance(reply, kinds):
            raise RemoteProtocolError(f"expected {kinds[0].__name__}, got {type(reply).__name__}")
        return reply

    def _receive(self, within: float | None) -> Message:
        reply, began = None, self.stopwatch.now()
        while reply is None:  # what is delivered twice, counts once
            data = self._socket.recv(within)
            arrived = self.stopwatch.now()
            self.num_bytes += len(data)
            try:
                reply = self.session.receive(data)
            except RemoteProtocolError as error:
                raise RemoteProtocolError(f"{self.url} does not keep to the protocol: {error}") from None
        decoded = self.stopwatch.now()
        if self._sent:  # else nobody has asked, and somebody is refused
            question = self._sent.popleft()
            question.sending.result()
            if isinstance(reply, Start):
                self._sent.clear()  # it answers all of them
            self.stopwatch.answered(
                reply,
                waited=arrived - began,
                under_way=arrived - question.at,
                share_up=question.num_bytes / (question.num_bytes + len(data)),
            )
        self.stopwatch.add(decode=decoded - arrived)
        return reply

    def close(self) -> None:
        """Leave the run, politely where the server still listens."""
        try:
            if not wait([self._sending], SECONDS_TO_LEAVE).not_done:
                self._socket.send(self.session.send(Goodbye()))
        except (ConnectionClosed, LocalProtocolError):
            pass  # it is gone, or has refused us: there is nobody to say goodbye to
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close a connection that is lost. The place in the run stays."""
        if not self._sending.done():
            with suppress(OSError):  # it is closed already
                self._socket.socket.shutdown(socket.SHUT_RDWR)  # else closing waits for what is being sent
        self._open.close()
        self._courier.shutdown()

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def _not_opened(url: str, credentials: tuple[str, str] | None, response: Response) -> ConnectionError:
    """What an answer means that is HTTP's and no WebSocket's. Only a wrong secret is final."""
    status = response.status_code
    if status == UNAUTHORISED:
        return Refused(_why_unauthorised(url, credentials))
    if status in (TOO_MANY_REQUESTS, SERVICE_UNAVAILABLE):
        why = "it has as many connections of this device as it takes" if status == TOO_MANY_REQUESTS else "it is stopping"
        return ConnectionFailed(f"the server at {url} has no time now (HTTP {status}): {why}", _seconds_to_wait(response))
    if 300 <= status < 400:
        elsewhere = ascii(response.headers.get("Location", "nowhere")[:200])[1:-1]
        return ConnectionFailed(f"{url} redirects to {elsewhere}, which is not followed; give the server's own address")
    return ConnectionFailed(f"{url} answers HTTP {status} instead of opening a WebSocket; a server's address has no path")


def _seconds_to_wait(response: Response) -> float:
    """Of HTTP's Retry-After, in seconds; as a date it is not understood."""
    text = response.headers.get("Retry-After", "")
    seconds = float(text) if text.isascii() and text.isdigit() and len(text) < 10 else SECONDS_TO_TRY_AGAIN
    return min(max(seconds, 1.0), LONGEST_WAIT)


def _why_unauthorised(url: str, credentials: tuple[str, str] | None) -> str:
    if credentials is None:
        return f"the server at {url} takes enrolled devices only: splitlora-server enrol NAME prints what to join with"
    return f"the server at {url} does not know {credentials[0]} with this secret; it may have been revoked: enrol it again"
