"""Who is let in: the HTTP handshake, the watch over enrolments and keys. Only it, peer.py and viewers.py know WebSockets."""

import asyncio
import http
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from weakref import WeakSet

from websockets.asyncio.server import Server, ServerConnection, basic_auth, serve
from websockets.datastructures import Headers
from websockets.exceptions import InvalidHandshake
from websockets.http11 import Request, Response
from websockets.protocol import State

from protocol import HANDSHAKE_BYTES, SECONDS_BETWEEN_PINGS, SECONDS_TO_PONG, compressed_bound
from terminal import count

from ..door import Door
from ..enrolment import Enrolment
from ..errors import ServerError
from ..history import tell
from ..listener import Limits, Listener
from ..page.routes import HEADERS, Answer, Asked, Place, Routes
from .peer import SECONDS_TO_CLOSE, CountingConnection

__all__ = ["SECONDS_TO_TRY_AGAIN", "accept_connections", "watch_door"]

QUIET = logging.getLogger("websockets.server.quiet")
QUIET.setLevel(logging.INFO)  # below that it would tell the headers, and the secrets in them


def _spare_traceback(record: logging.LogRecord) -> bool:
    """A stranger's bad handshake is no fault of ours: the log has its line, without the way through websockets' code."""
    if record.exc_info and isinstance(record.exc_info[1], InvalidHandshake):
        record.exc_info = None
    return True


QUIET.addFilter(_spare_traceback)

SECONDS_TO_TRY_AGAIN = 10.0  # after which a device that was late, or has too many connections, is heard again
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_TAKE_AN_ANSWER = 10.0  # of a slow link, for the page; the handshake's own time ends it, too
REFUSALS_A_MINUTE = 60  # of HTTP, that each have a line of their own
LARGEST_PONG = 125  # bytes: of a control frame (RFC 6455, section 5.5)
CONNECTIONS_A_DEVICE = 4  # the one it uses, one or two that it has lost without our knowing, and a ping

WHY = {
    http.HTTPStatus.UNAUTHORIZED: "it has no valid secret",
    http.HTTPStatus.TOO_MANY_REQUESTS: "this device has enough connections",
    http.HTTPStatus.UPGRADE_REQUIRED: "it speaks no WebSocket",
}


async def accept_connections(
    listener: Listener,
    door: Door,
    limits: Limits,
    routes: Routes,
    *,
    metrics: Callable[[], Callable[[], tuple[bytes, str]]],
    converse: Callable[[CountingConnection], Awaitable[None]],
    show: Callable[[CountingConnection], Awaitable[None]],
) -> Server:
    """
    Accept connections from now on, until the server that is returned is closed.

    Args:
        routes: what there is beside the run.
        metrics: looks how the run stands, and returns what writes its metrics, on any thread, and their content type.
        converse: called for every connection that is let in to the run; when it returns, the connection is closed.
        show: the same for every page.
    """
    admission = _Admission(listener, door, routes, metrics)

    async def handle(connection: ServerConnection) -> None:
        assert isinstance(connection, CountingConnection)
        await (show if connection.shows_run else converse)(connection)

    server: Server = await serve(
        handle,
        sock=listener,
        ssl=door.encryption,
        ssl_handshake_timeout=limits.handshake_seconds if door.encryption else None,
        compression=None,  # messages are compressed already
        process_request=admission.authenticate,
        process_response=admission.note_refusal,
        logger=QUIET,
        open_timeout=limits.handshake_seconds,
        max_size=compressed_bound(HANDSHAKE_BYTES),
        max_queue=limits.queue,
        create_connection=CountingConnection,
        ping_interval=SECONDS_BETWEEN_PINGS,
        ping_timeout=SECONDS_TO_PONG,
        close_timeout=SECONDS_TO_CLOSE,
        server_header=None,
        backlog=limits.connections,  # all devices may come back at once
    )
    return server


async def watch_door(
    door: Door, apply_enrolments: Callable[[Mapping[str, Enrolment]], None], announce_next_key: Callable[[], None]
) -> None:
    """
    Look every second which key the server has and who is enrolled, where devices are; without end.

    Args:
        apply_enrolments: called with the enrolled devices, by name.
        announce_next_key: called when the next key may be another one.
    """
    while door.enrolled is not None:
        await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
        if door.identity is not None:
            door.identity.refresh()  # on this thread: nobody shakes hands meanwhile
            announce_next_key()
        try:
            enrolled = await asyncio.to_thread(door.enrolled)
        except ServerError:
            continue  # until the file can be read, newcomers are refused, of which the operator is told, and those inside stay
        apply_enrolments(enrolled)


class _Admission:
    """Answers in HTTP whoever may not speak to the run."""

    def __init__(
        self, listener: Listener, door: Door, routes: Routes, metrics: Callable[[], Callable[[], tuple[bytes, str]]]
    ) -> None:
        self._listener, self._door, self._routes, self._metrics = listener, door, routes, metrics
        self._connections: dict[str, WeakSet[CountingConnection]] = {}
        """By device: those that were let in with its secret, of which some may have been closed."""
        self._scrape: asyncio.Task[tuple[bytes, str]] | None = None
        self._minute, self._refused = -math.inf, 0
        """When this minute began, and how many were refused in it."""

    async def authenticate(self, connection: ServerConnection, request: Request) -> Response | None:
        """The answer to who is not let in, or asks for no WebSocket. No message has been read yet."""
        assert isinstance(connection, CountingConnection)
        if len(request.headers.get_all("Authorization")) > 1:
            return connection.respond(http.HTTPStatus.BAD_REQUEST, "one Authorization is enough\n")
        # Before version 17 websockets knows no other method.
        method = getattr(request, "method", "GET")
        found = self._routes.look_up(Asked(method, request.path, request.headers.get_all))
        if found is Place.LIVE:
            return self._open_page(connection)
        if found is Place.METRICS:
            found = Answer(http.HTTPStatus.OK, *await self._written_metrics())
        if isinstance(found, Answer):
            return _response(connection, found)
        return await self._admit_device(connection, request)

    async def _written_metrics(self) -> tuple[bytes, str]:
        """On another thread; whoever asks while they are written gets the same."""
        if self._scrape is None or self._scrape.done():
            self._scrape = asyncio.create_task(asyncio.to_thread(self._metrics()))
        return await asyncio.shield(self._scrape)

    def _open_page(self, connection: CountingConnection) -> Response | None:
        if not self._listener.admit_page(connection.descriptor):
            why = "as many pages are open as --max-pages allows; close one"
            return _response(connection, Answer(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{why}\n".encode(), why=why))
        connection.shows_run = True
        connection.protocol.max_message_size = LARGEST_PONG  # a page has nothing else to say
        return None

    async def _admit_device(self, connection: CountingConnection, request: Request) -> Response | None:
        if "Origin" in request.headers:  # no web page may speak to a server on its reader's own machine
            return connection.respond(http.HTTPStatus.FORBIDDEN, "web pages are not let in\n")
        if self._door.admits is not None:
            refusal = await self._check_secret(connection, request, self._door.admits)
            if refusal is not None:
                return refusal
        if request.path.strip("/"):
            return connection.respond(http.HTTPStatus.NOT_FOUND, "there is nothing here\n")
        return None

    async def _check_secret(
        self, connection: CountingConnection, request: Request, admits: Callable[[str, str], Enrolment | None]
    ) -> Response | None:
        def admit(name: str, secret: str) -> bool:
            connection.enrolment = admits(name, secret)
            return connection.enrolment is not None

        refusal = await basic_auth("splitlora", check_credentials=admit)(connection, request)
        if refusal is not None:
            return refusal
        others = self._connections.setdefault(connection.username, WeakSet())
        if sum(other.state is State.OPEN for other in others) >= CONNECTIONS_A_DEVICE:
            refusal = connection.respond(http.HTTPStatus.TOO_MANY_REQUESTS, "this device has enough connections\n")
            refusal.headers["Retry-After"] = f"{SECONDS_TO_TRY_AGAIN:.0f}"
            return refusal
        others.add(connection)
        self._listener.admit(connection.descriptor)
        return None

    async def note_refusal(self, connection: ServerConnection, request: Request, response: Response) -> None:
        """Whoever was answered in HTTP has no WebSocket; only the operator can tell why it was refused."""
        if response.status_code >= http.HTTPStatus.BAD_REQUEST:
            assert isinstance(connection, CountingConnection)
            why = connection.refused_because or self._why(request, response)
            if self._may_be_told():
                refusal = f"{connection.address} refused: HTTP {response.status_code}, {why}"
                tell("refused", refusal, level="warning", status=response.status_code)

    def _may_be_told(self) -> bool:
        """Whether another refusal is worth a line: whoever asks without end fills no disk with them, nor the page."""
        now = time.monotonic()
        if now - self._minute >= 60.0:
            if self._refused > REFUSALS_A_MINUTE:
                untold = self._refused - REFUSALS_A_MINUTE
                what = f"{count(untold, 'more request')} of HTTP"
                tell("refused", f"{what} {'was' if untold == 1 else 'were'} refused within that minute", level="warning")
            self._minute, self._refused = now, 0
        self._refused += 1
        return self._refused <= REFUSALS_A_MINUTE

    def _why(self, request: Request, response: Response) -> str:
        """What stands in the log beside an HTTP status; a stranger's words are shown in ASCII."""
        if response.status_code == http.HTTPStatus.FORBIDDEN:
            return f"a web page of {', '.join(request.headers.get_all('Origin'))[:100]!a}"
        if response.status_code == http.HTTPStatus.NOT_FOUND:
            return f"there is nothing at {self._routes.shown(request.path)}"
        status = http.HTTPStatus(response.status_code)
        return WHY.get(status, status.phrase)


def _response(connection: CountingConnection, answer: Answer) -> Response:
    """What is not of the run, as HTTP has it."""
    connection.refused_because = answer.why
    connection.close_timeout = SECONDS_TO_TAKE_AN_ANSWER
    headers = {"Connection": "close", "Content-Length": str(len(answer.body)), "Content-Type": answer.content_type}
    return Response(answer.status.value, answer.status.phrase, Headers({**headers, **HEADERS, **answer.headers}), answer.body)
