"""The only file of this package that knows WebSockets: one conversation with the server, as long as its connection lasts."""

import logging
import socket
import ssl
import sys
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

from .link_watch import LinkWatch, Patience
from .pinning import CertificateChanged
from .stopwatch import Stopwatch

if sys.platform == "linux":
    import fcntl
    import termios

__all__ = ["Connection", "ConnectionFailed", "Dial", "Refused", "SecretRefused"]

Answer = TypeVar("Answer", bound=Message)
Dial = Callable[[], "Connection"]

QUIET = logging.getLogger("websockets.client.quiet")
QUIET.setLevel(logging.INFO)  # at DEBUG websockets logs the headers, and the secret is in one of them
UNAUTHORISED = 401  # of HTTP, as the two below
TOO_MANY_REQUESTS, SERVICE_UNAVAILABLE = 429, 503
SERVICE_RESTART = 1012  # of WebSocket
SECONDS_TO_TRY_AGAIN = 10.0  # after a server was busy and did not say when to come again
LONGEST_WAIT = 3600.0  # seconds, as in `Failure`
LARGEST_SEND_BUFFER = 2**23  # bytes; most systems allow less
SECONDS_TO_LEAVE = 5.0  # for what is still being sent, before a device leaves without a Goodbye


class ConnectionFailed(ConnectionError):
    """No server answers at the address, or it is gone, or it has no time now. Trying again later may help."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        """Seconds after which the server wants to be asked again; 0 if it did not say."""


class Refused(ConnectionError):
    """The server refuses this client for good. The message is the server's reason."""


class SecretRefused(Refused):
    """The server does not let this device in with the secret that it has. Joined with another invitation, it may be."""


class AnsweredInHttp(InvalidHandshake):
    """The address answers with an HTTP response instead of opening a WebSocket."""

    def __init__(self, response: Response) -> None:
        super().__init__(f"HTTP {response.status_code}")
        self.response = response


class Handshake(ClientConnection):
    """Follows no redirect: whoever answers at the user's address must not choose where the secret and the activations go."""

    def handshake(self, *arguments: Any, **options: Any) -> None:
        try:
            super().handshake(*arguments, **options)
        except InvalidStatus as error:
            raise AnsweredInHttp(error.response) from None


@dataclass(frozen=True)
class Sent:
    """A question that has no answer yet, or the reply with which it goes on waiting for one."""

    micro_batch: int
    """0 where it is of none."""
    at: float
    """When it was encoded, in seconds of the stopwatch's clock."""
    num_bytes: int
    sending: "Future[None]"
    """Done when the question has been handed to the system; holds the error if that failed."""


class Connection:
    """
    A conversation with the server at ``url``.

    Questions are sent by a thread of their own, the sender: on a slow link sending takes a while, in which the device can
    compute. Answers are read by whoever calls `answer`.

    Args:
        credentials: name and secret of this device.
        encryption: for wss://; the default trusts the certificate authorities that the system trusts.

    Raises:
        ConnectionFailed: nobody answers there, or not as a WebSocket.
        SecretRefused: the server does not accept the credentials.
        CertificateChanged: it is not the server that this device was enrolled with.
    """

    def __init__(
        self, url: str, *, credentials: tuple[str, str] | None = None, encryption: ssl.SSLContext | None = None
    ) -> None:
        self.url = url
        self.session = Session(Side.CLIENT)
        self.stopwatch = Stopwatch()
        self._open = ExitStack()
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="sender")
        self._sent: deque[Sent] = deque()
        """In the order in which they were sent: one of each micro-batch."""
        self._last_sending: Future[None] = Future()
        """See `Sent.sending`, of the last question."""
        self._last_sending.set_result(None)
        self.num_bytes = 0
        """Bytes of all messages so far, both ways."""
        self.num_received = 0
        """Bytes that have arrived, of frames of all kinds."""
        self._last_ping: Future[None] | None = None
        self._link_watch: LinkWatch | None = None
        try:
            # No proxy, since servers are mostly in the local network. No deflate, since messages are compressed already.
            opened = connect(
                url,
                ssl=encryption,
                additional_headers={"Authorization": build_authorization_basic(*credentials)} if credentials else None,
                compression=None,
                max_size=compressed_bound(self.session.max_bytes),  # until `expect`
                proxy=None,
                ping_interval=SECONDS_BETWEEN_PINGS,  # by a thread of websockets, so also while this device computes
                ping_timeout=SECONDS_TO_PONG,
                create_connection=Handshake,
                logger=QUIET,
            )
            self._socket = self._open.enter_context(opened)
            self.certificate = _certificate_of(self._socket.socket)
            """The server's, in DER; None without encryption."""
            protocol = self._socket.protocol
            protocol.recv_frame = limited_frames(protocol.recv_frame, ProtocolError)  # type: ignore[method-assign, assignment]
            receive = protocol.receive_data

            def counting_receive(data: bytes | bytearray) -> None:
                self.num_received += len(data)
                receive(data)

            protocol.receive_data = counting_receive  # type: ignore[method-assign]
        except CertificateChanged:
            raise
        except AnsweredInHttp as error:
            raise _not_opened(url, credentials, error.response) from None
        except ssl.SSLCertVerificationError as error:  # caught before ValueError, of which it is a kind
            raise ConnectionFailed(
                f"this device is not enrolled at {url}, and the server's certificate is not an authority's "
                f"({error.verify_message}): enrol it with splitlora-edge join and what splitlora-server enrol NAME prints"
            ) from None
        except (InvalidURI, ValueError):  # the latter where the port or the host is none
            raise ConnectionFailed(f"{url} is not the address of a server; one looks like ws://192.168.1.20:8765") from None
        except ssl.SSLError as error:
            raise ConnectionFailed(f"{url} does not speak TLS as this side does: {error.reason or error}") from None
        except (OSError, InvalidHandshake, EOFError, ConnectionClosed) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ConnectionFailed(f"no server at {url}: {reason}; is splitlora-server running there?") from None

    def expect(self, size: int) -> None:
        """Take answers that inflate to at most ``size`` bytes. A larger frame is refused before it is read."""
        self.session.max_bytes = size
        self._socket.protocol.max_message_size = compressed_bound(size)
        # websockets does not read while it writes a question to the socket, so the system's buffer should take the whole of it.
        with suppress(OSError):  # the connection is lost, and `answer` will say so
            self._socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, min(size, LARGEST_SEND_BUFFER))

    def exchange(self, message: Message, *answer_kinds: type[Answer], within: float | None = None) -> Answer:
        """Send a question and wait for its answer; raises what `answer` does."""
        self.ask(message)
        return self.answer(*answer_kinds, within=within)

    def ask(self, message: Message) -> None:
        """Have a question sent, or a reply where the server asks back. If the connection is lost, `answer` will say so."""
        began = self.stopwatch.now()
        data = self.session.send(message)
        encoded = self.stopwatch.now()
        self.stopwatch.add(encode=encoded - began)
        self.num_bytes += len(data)
        self._last_sending = self._sender.submit(self._send, data)
        self._sent.append(Sent(getattr(message, "micro_batch", 0), encoded, len(data), self._last_sending))

    def _send(self, data: bytes) -> None:
        try:
            self._socket.send(data)
        except ConnectionClosed:
            pass  # `answer` says it, and perhaps with a reason: the server may have sent a refusal before it hung up

    def answer(self, *kinds: type[Answer], within: float | None = None) -> Answer:
        """
        Wait for the answer to the earliest question that has none, or for what the server asks back about any.

        Args:
            within: seconds to wait for each message; None waits as long as it takes.

        Raises:
            Refused: the server refuses this client for good.
            RemoteProtocolError: the server says something that the protocol does not allow.
            ConnectionFailed: the server is gone, does not answer in time, or refuses for now only.
        """
        try:
            reply = self._receive(within)
        except TimeoutError:
            raise ConnectionFailed(f"the server at {self.url} is silent: no answer within {within:g} s") from None
        except ConnectionClosed as error:
            if self._link_watch is not None and self._link_watch.has_given_up:
                raise ConnectionFailed(f"the link to {self.url} carries nothing any more") from None
            if error.rcvd is not None and error.rcvd.code == SERVICE_RESTART:
                raise ConnectionFailed(
                    f"the server at {self.url} has closed the connection, and wants this device to come back"
                ) from None
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
        while reply is None:  # None stands for a message that was delivered twice
            data = self._socket.recv(within)
            arrived = self.stopwatch.now()
            self.num_bytes += len(data)
            try:
                reply = self.session.receive(data)
            except RemoteProtocolError as error:
                raise RemoteProtocolError(f"{self.url} does not keep to the protocol: {error}") from None
        decoded = self.stopwatch.now()
        if question := self._take_sent(reply):
            question.sending.result()
            if isinstance(reply, Start):
                self._sent.clear()  # one Start answers all open questions
            self.stopwatch.answered(
                reply,
                waited=arrived - began,
                under_way=arrived - question.at,
                share_up=question.num_bytes / (question.num_bytes + len(data)),
            )
        self.stopwatch.add(decode=decoded - arrived)
        return reply

    def _take_sent(self, reply: Message) -> Sent | None:
        """
        To what the server replies: of several micro-batches to the one that it names, else to the earliest. None where it
        refuses a client that has asked nothing.
        """
        named = getattr(reply, "micro_batch", None)
        for number, sent in enumerate(self._sent):
            if named in (None, sent.micro_batch):
                del self._sent[number]
                return sent
        return None

    def close(self) -> None:
        """Leave the run: say Goodbye if the server still listens, then close."""
        try:
            if not wait([self._last_sending], SECONDS_TO_LEAVE).not_done:
                self._socket.send(self.session.send(Goodbye()))
        except (ConnectionClosed, LocalProtocolError):
            pass  # the server is gone, or has refused us: there is nobody to say Goodbye to
        finally:
            self.abandon()

    # The link: see `Link`

    def watch_link(self, patience: Patience, *, num_devices: int) -> None:
        """From now on, and until it is closed, have it looked after by a `LinkWatch` with these arguments."""
        self._link_watch = LinkWatch(self, patience, num_devices=num_devices)
        self._link_watch.begin()

    def is_delivered(self) -> bool:
        if self._last_ping is None or not self._last_ping.done():
            return False
        return unacknowledged_bytes(self._socket.socket) == 0

    def retransmissions(self) -> int:
        return retransmissions(self._socket.socket)

    def ping(self) -> None:
        def ping() -> None:
            with suppress(ConnectionClosed):
                self._socket.ping()

        with suppress(RuntimeError):  # it is abandoned just now
            self._last_ping = self._sender.submit(ping)

    def give_up(self) -> None:
        shut(self._socket.socket)

    def abandon(self) -> None:
        """Close without a word, as for a connection that is lost: for the server this client remains a member."""
        if self._link_watch is not None:
            self._link_watch.close()
        if not self._last_sending.done():
            shut(self._socket.socket)  # without this, closing would wait until the question is sent
        self._open.close()
        self._sender.shutdown()

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def shut(connected: socket.socket) -> None:
    """
    End what other threads send and receive on it. `ssl.SSLSocket.shutdown` forgets the encryption first: whoever sends at that
    moment would send the rest as it is.
    """
    with suppress(OSError):  # it is closed already
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


def unacknowledged_bytes(connected: socket.socket) -> int | None:
    """Of what was sent, those that the other side's system has not acknowledged; None where this system does not say."""
    if sys.platform != "linux":
        return None
    try:
        return int.from_bytes(fcntl.ioctl(connected.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except (OSError, ValueError):  # it is closed
        return None


def retransmissions(connected: socket.socket) -> int:
    """See `Link.retransmissions`; 0 where this system does not say."""
    if sys.platform != "linux":
        return 0
    try:
        # The third and fourth byte of struct tcp_info: tcpi_retransmits, tcpi_probes.
        return max(connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 4)[2:4])
    except OSError:
        return 0


def _certificate_of(connected: socket.socket) -> bytes | None:
    return connected.getpeercert(binary_form=True) if isinstance(connected, ssl.SSLSocket) else None


def _not_opened(url: str, credentials: tuple[str, str] | None, response: Response) -> ConnectionError:
    """What an HTTP response means that opens no WebSocket. Only a wrong secret is final; the rest may change with time."""
    status = response.status_code
    if status == UNAUTHORISED:
        return SecretRefused(_why_unauthorised(url, credentials))
    if status in (TOO_MANY_REQUESTS, SERVICE_UNAVAILABLE):
        why = "it has as many connections of this device as it takes" if status == TOO_MANY_REQUESTS else "it is stopping"
        return ConnectionFailed(f"the server at {url} has no time now (HTTP {status}): {why}", _seconds_to_wait(response))
    if 300 <= status < 400:
        elsewhere = ascii(response.headers.get("Location", "nowhere")[:200])[1:-1]
        return ConnectionFailed(f"{url} redirects to {elsewhere}, which is not followed; give the server's own address")
    return ConnectionFailed(f"{url} answers HTTP {status} instead of opening a WebSocket; a server's address has no path")


def _seconds_to_wait(response: Response) -> float:
    """What the header Retry-After says. Only a number of seconds is understood, not a date."""
    text = response.headers.get("Retry-After", "")
    seconds = float(text) if text.isascii() and text.isdigit() and len(text) < 10 else SECONDS_TO_TRY_AGAIN
    return min(max(seconds, 1.0), LONGEST_WAIT)


def _why_unauthorised(url: str, credentials: tuple[str, str] | None) -> str:
    if credentials is None:
        return f"the server at {url} takes enrolled devices only: splitlora-server enrol NAME prints what to join with"
    name = credentials[0]
    return (
        f"the server at {url} does not know {name} with this secret: {name} was revoked, or has a new one. Join with the "
        f"invitation that splitlora-server enrol {name} prints there, with --renew where {name} is still enrolled"
    )
