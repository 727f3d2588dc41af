"""One connection, and the session that is spoken over it."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hmac import compare_digest

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed, ProtocolError

from protocol import Failure, Hello, LocalProtocolError, Message, Session, Side, compressed_bound
from protocol.limits import limited_frames

from ..enrolment import Enrolment
from ..errors import ServerError
from ..listener import RateLimiter

__all__ = ["CacheError", "ConnectionLost", "CountingConnection", "Peer"]

SECONDS_TO_CLOSE = 2.0
SECONDS_TO_SHOW_LIFE = 10.0
LONGEST_REASON = 1000  # characters
NORMAL_CLOSURE = 1000  # of RFC 6455's registry, as the two below
POLICY_VIOLATION = 1008
SERVICE_RESTART = 1012  # come back later


class ConnectionLost(Exception):
    """There is no connection any more: it broke, or one side has closed it."""


class CacheError(ServerError):
    """The activation cache of a client cannot be written."""


class CountingConnection(ServerConnection):
    """
    Counts every byte that goes through the socket: handshake, frames, control frames.

    A peer that does not read is not read either, or the answers to its pings would pile up; nor is its closing waited for.
    """

    bytes_up = 0
    """From the device."""
    bytes_down = 0
    enrolment: Enrolment | None = None
    """With which its device was let in; None where the run takes everybody."""
    shows_run = False
    """Whether it is a page's, and no device's."""
    refused_because = ""
    """For the log, where it was answered in HTTP."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.address = self._whence()
        """Whence it comes, as it stands in the log, also when it is lost."""
        self.recv_messages.resume = self._resume_reading
        self.protocol.recv_frame = limited_frames(self.protocol.recv_frame, ProtocolError)  # type: ignore[method-assign, assignment]
        write = self.transport.write

        def counting_write(data: bytes) -> None:
            self.bytes_down += len(data)
            write(data)

        self.transport.write = counting_write  # type: ignore[method-assign, assignment]

    def data_received(self, data: bytes) -> None:
        self.bytes_up += len(data)
        super().data_received(data)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._resume_reading()

    def _resume_reading(self) -> None:
        # Both may hold the reading up: answers that nobody takes, and messages that are not worked off.
        if not self.paused and not self.recv_messages.paused:
            self.transport.resume_reading()

    async def close(self, code: int = NORMAL_CLOSURE, reason: str = "") -> None:
        # The closing handshake waits until what was sent before is taken: longer than a deaf peer is worth.
        end = self.loop.call_later(2 * SECONDS_TO_CLOSE, self.transport.abort)
        try:
            await super().close(code, reason)
        finally:
            end.cancel()

    @property
    def descriptor(self) -> int:
        """The number of its open file; -1 where the connection is lost."""
        transport_socket = self.transport.get_extra_info("socket")
        return -1 if transport_socket is None else int(transport_socket.fileno())

    def _whence(self) -> str:
        if self.remote_address is None:
            return "an unknown address"  # it was gone before it was here
        host, port = self.remote_address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Peer:
    """
    One connection, and who it turned out to be.

    Args:
        max_messages_per_second: more of its messages have to wait.
    """

    def __init__(self, connection: CountingConnection, *, max_messages_per_second: float) -> None:
        self.connection = connection
        self.session = Session(Side.SERVER)
        self.name: str | None = None
        """The client's, once it is welcome."""
        self.instance = ""
        """What its client has said of itself, see `Hello`."""
        self.has_joined = False
        self.asked_of_part = 0
        """Questions about its part of the model."""
        self.handed_over = 0
        """Bytes of its part that it has got."""
        self.keeps_next_pin = False
        """Whether its device keeps what it is told of the server's next key."""
        self.next_pin = ""
        """Of which next key it was told."""
        self._limiter = RateLimiter(max_messages_per_second)
        self._sending = asyncio.Lock()
        """Answers leave in their order, however long each takes to encode."""
        self._counted_up, self._counted_down = 0, 0

    def __str__(self) -> str:
        """As it stands in the log."""
        return self.connection.address if self.name is None else f"{self.name} ({self.connection.address})"

    async def receive(self, timeout: float | None) -> Message | None:
        """
        Args:
            timeout: seconds; None waits for as long as the connection lasts.

        Returns:
            The next message; None where it is to be ignored, see `Session.receive`.

        Raises:
            ConnectionLost: there will be none.
            asyncio.TimeoutError: none came in time.
            RemoteProtocolError: it is none, or out of turn.
            CacheError: the client's activation cache cannot be written.
        """
        try:
            data = await asyncio.wait_for(self.connection.recv(), timeout)
        except ConnectionClosed:
            raise ConnectionLost from None
        await asyncio.sleep(self._limiter.delay(time.monotonic()))
        return await asyncio.to_thread(self._take, data)

    def _take(self, data: bytes | str) -> Message | None:
        with _readable_errors():
            return self.session.receive(data)

    async def send(self, message: Message) -> bool:
        """
        Answer the device.

        Returns:
            Whether it still waited for this. Else nothing was sent: it has gone, or it is back and asks again, perhaps from an
            earlier question on; the federation has kept the answer for that.

        Raises:
            CacheError: as `receive`.
        """
        async with self._sending:
            if not self.session.awaits(message):
                return False
            try:
                with _readable_errors():
                    data = await asyncio.to_thread(self.session.send, message)
            except LocalProtocolError:
                if self.session.awaits(message):
                    raise
                return False  # it was refused, or said goodbye, while the answer was encoded
            try:
                await self.connection.send(data)
            except ConnectionClosed:
                return False
            return True

    async def refuse(self, reason: str, *, retry_after: float = 0.0) -> None:
        """
        Tell it why, and close.

        Args:
            retry_after: seconds after which the same may be allowed; 0 where it never will.
        """
        failure = Failure(reason=reason[:LONGEST_REASON], retry_after=retry_after)
        # Not behind the answers that leave: whoever is refused need not take these first.
        if self.session.awaits(failure):
            try:
                await asyncio.wait_for(self.connection.send(self.session.send(failure)), SECONDS_TO_CLOSE)
            except (ConnectionClosed, LocalProtocolError, asyncio.TimeoutError):
                pass  # gone already, with a goodbye perhaps, or deaf: nobody is left to be told
        await self.connection.close(POLICY_VIOLATION)

    async def send_away(self) -> None:
        """Close, so that the device tries to come back."""
        await self.connection.close(SERVICE_RESTART)

    def drop(self) -> None:
        """Close without a word."""
        self.connection.transport.abort()

    def is_of(self, hello: Hello) -> bool:
        """Whether the client that says this is the one of this connection, which has lost it then."""
        return bool(self.instance) and compare_digest(self.instance.encode(), hello.instance.encode())

    async def lives(self) -> bool:
        """Whether a connection that looks open is. A device that lost its network may be back before its old link times out."""
        connection = self.connection
        received, unsent = connection.bytes_up, connection.transport.get_write_buffer_size()

        async def pong() -> None:
            await (await connection.ping())  # which itself waits where the peer does not read

        try:
            await asyncio.wait_for(pong(), SECONDS_TO_SHOW_LIFE)
        except ConnectionClosed:
            return False
        except asyncio.TimeoutError:
            # A long message of a slow link may be on its way before the pong, or before the ping.
            return connection.bytes_up > received or connection.transport.get_write_buffer_size() < unsent
        return True

    def expect(self, size: int, *, answers: int) -> None:
        """
        Take messages of up to ``size`` bytes from now on; a frame that claims more is refused before it is read.

        Args:
            answers: so many of that size may wait for a device that does not read, since it is still sending.
        """
        self.session.max_bytes = size
        self.connection.protocol.max_message_size = compressed_bound(size)
        self.connection.transport.set_write_buffer_limits(high=answers * compressed_bound(size))

    def take_counts(self) -> tuple[int, int]:
        """Bytes up and down since this was called last."""
        up, down = self.connection.bytes_up, self.connection.bytes_down
        counts = up - self._counted_up, down - self._counted_down
        self._counted_up, self._counted_down = up, down
        return counts


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Around what a session does, which writes the activation cache and sees no socket."""
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"the activation cache cannot be written: {error.strerror or error}; when that is mended, --resume goes on"
        ) from None
