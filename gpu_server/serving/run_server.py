"""The only file of this package that knows WebSockets and asyncio: it moves bytes, and does what the federation decides."""

import asyncio
import gc
import http
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, TypeVar

from websockets.asyncio.server import Server, ServerConnection, basic_auth, serve
from websockets.exceptions import ConnectionClosed, ProtocolError
from websockets.frames import DATA_OPCODES, Frame
from websockets.http11 import Request, Response
from websockets.protocol import Protocol

from protocol import (
    HANDSHAKE_BYTES,
    MAX_FRAMES,
    SECONDS_BETWEEN_PINGS,
    SECONDS_TO_PONG,
    ActivationGradient,
    Failure,
    Goodbye,
    Hello,
    Join,
    LocalProtocolError,
    Message,
    Ping,
    Pong,
    RemoteProtocolError,
    Session,
    Side,
    State,
    TrainingDiverged,
    compressed_bound,
    largest_message_bytes,
)
from split_model import Adapter
from storage import CacheFolder, ModelError
from terminal import count, duration, listed, version

from ..config import ConfigError
from ..door import Door
from ..federation import (
    Action,
    Aggregate,
    Checkpoint,
    Evaluate,
    Federation,
    FinishRun,
    FinishStep,
    NameInUse,
    Reply,
    Report,
    StepRecord,
    Train,
    Trained,
)
from ..listener import Listener, Pace
from ..torch_engine import TorchEngine

__all__ = ["RunServer"]

logger = logging.getLogger("gpu_server")
QUIET = logging.getLogger("websockets.server.quiet")
QUIET.setLevel(logging.INFO)  # below that it would tell the headers, and the secrets in them
Result = TypeVar("Result")

SECONDS_TO_FINISH = 10.0
SECONDS_TO_CLOSE = 2.0
SECONDS_TO_JOIN = 600.0  # between Welcome and Join a device reads its part of the model, from a slow card perhaps
SECONDS_TO_SHOW_LIFE = 10.0
SECONDS_TO_TRY_AGAIN = 10.0  # after which a device that was late, or has too many connections, is heard again
SECONDS_FOR_REPLIES = 1.0
SECONDS_BETWEEN_LOOKS = 1.0
LONGEST_REASON = 1000  # characters
NORMAL_CLOSURE = 1000  # of RFC 6455's registry, as the two below
POLICY_VIOLATION = 1008
SERVICE_RESTART = 1012  # come back later
NAMES_IN_A_PONG = 100
CONNECTIONS_A_DEVICE = 4  # the one it uses, one or two that it has lost without our knowing, and a ping


def _limit_frames(protocol: Protocol) -> None:
    """A message in too many frames ends the connection. websockets counts them from 17.4 on, which Python 3.10 cannot have."""
    receive, unfinished = protocol.recv_frame, 0

    def counting(frame: Frame) -> None:
        nonlocal unfinished
        if frame.opcode in DATA_OPCODES:
            unfinished = 0 if frame.fin else unfinished + 1
            if unfinished >= MAX_FRAMES:
                raise ProtocolError(f"a message in more than {MAX_FRAMES} frames")
        receive(frame)

    protocol.recv_frame = counting  # type: ignore[method-assign]


class CountingConnection(ServerConnection):
    """
    Counts every byte that goes through the socket: handshake, frames, control frames.

    A peer that does not read is not read either, or the answers to its pings would pile up; nor is its closing waited for.
    """

    bytes_up = 0
    bytes_down = 0
    enrolled: datetime | None = None
    """When its device was, where devices are."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.recv_messages.resume = self._resume_reading
        _limit_frames(self.protocol)
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
        if not self.paused and not self.recv_messages.paused:
            self.transport.resume_reading()

    async def close(self, code: int = NORMAL_CLOSURE, reason: str = "") -> None:
        end = self.loop.call_later(2 * SECONDS_TO_CLOSE, self.transport.abort)
        try:
            await super().close(code, reason)
        finally:
            end.cancel()


@dataclass
class Peer:
    """One connection, and who it turned out to be."""

    connection: CountingConnection
    pace: Pace
    session: Session = field(default_factory=lambda: Session(Side.SERVER))
    name: str | None = None
    joined: bool = False
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Answers leave in their order, however long each takes to encode."""
    counted_up: int = 0
    counted_down: int = 0

    def __str__(self) -> str:
        """As it stands in the log."""
        address = _address(self.connection)
        return address if self.name is None else f"{self.name} ({address})"


class RunServer:
    """
    Serves one run to its end.

    Args:
        model_name: of the base model on the Hugging Face hub, if it came from there.
        linger: seconds that a finished run waits for devices which have not fetched its adapter.
        report: called on the event loop for every finished step.
        keep: called on another thread with what a round can go on from: its step, the members, `TorchEngine.round_end`.
        save: called on the worker thread when the run is complete, before anybody hears of it.
        kept: the samples that are kept of a client, by its name, where the run keeps any.
    """

    def __init__(
        self,
        federation: Federation,
        compute: TorchEngine,
        *,
        door: Door,
        model_name: str,
        linger: float,
        report: Callable[[StepRecord], None],
        keep: Callable[[int, dict[str, Any], Adapter], None],
        save: Callable[[], None],
        kept: Callable[[str], CacheFolder] | None,
    ) -> None:
        self._federation, self._compute, self._door = federation, compute, door
        self._model_name, self._linger = model_name, linger
        self._report, self._keep, self._save, self._kept = report, keep, save, kept
        self._peers: dict[str, Peer] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended: asyncio.Future[bool]
        """Whether the run can go on later."""
        self._last_row: asyncio.Task[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._patience_ends: asyncio.TimerHandle | None = None
        self._round_end: tuple[int, Adapter]
        """What the last round ended with: its step, and `TorchEngine.round_end` as it was then."""
        self._to_keep: tuple[int, Adapter] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._complete = False

    def run(self, listening: Callable[[str], None], first: list[Action]) -> None:
        """
        Listen until the run is complete and all clients have left, or `stop` or `suspend` is called.

        Args:
            listening: called with the server's URL once it accepts connections.
            first: what the federation wants done before anything else.

        Raises:
            ConfigError: the address cannot be listened on, or the run directory not be written.
            TrainingDiverged: the loss is no longer a number.
            ModelError: the base model gives none.
        """
        asyncio.run(self._listen(listening, first))

    def stop(self) -> None:
        """End the run before its time; its clients are told. From any thread, after `run` called ``listening``."""
        self._call(self._end)

    def suspend(self) -> None:
        """Stop so that the run can go on later: its clients will try to come back. From any thread, as `stop`."""
        self._call(self._end, True)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            pass  # the run is over, and its loop is closed

    async def _listen(self, listening: Callable[[str], None], first: list[Action]) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        limits = self._door.limits.within_open_files(self._federation.settings.clients)
        self._listener = Listener.open(self._door.host, self._door.port, limits)
        if limits.connections < self._door.limits.connections:
            logger.warning(
                "at most %d connections at a time, by the number of files that this process may open", limits.connections
            )
        async with await self._open() as server:
            gc.collect()
            gc.freeze()  # the listener collects often: it need not look at all that was here before
            listening(self._url())
            for notice in self._door.notices:
                logger.warning("%s", notice)
            watch = self._loop.create_task(self._watch_enrolments())
            # Not before: a run that is resumed stands at its checkpoint only now.
            self._round_end = (self._federation.round, self._compute.round_end)
            try:
                self._perform(first)
                to_be_continued = await self._ended
                await self._dismiss("the server was stopped", to_be_continued=to_be_continued)
                await self._save_unfinished(to_be_continued=to_be_continued)
            except (TrainingDiverged, ModelError) as error:
                await self._dismiss(str(error))
                raise
            except Exception:
                # Whatever it was, a disk that is full or a defect: when it is mended, the run can go on.
                await self._dismiss("the server failed", to_be_continued=True)
                raise
            finally:
                watch.cancel()
                if self._alarm is not None:
                    self._alarm.cancel()
                gc.unfreeze()
                server.close()
                self._worker.shutdown()

    async def _open(self) -> Server:
        limits, encryption = self._door.limits, self._door.encryption
        server: Server = await serve(
            self._converse,
            sock=self._listener,
            ssl=encryption,
            ssl_handshake_timeout=limits.handshake_seconds if encryption else None,
            compression=None,  # messages are compressed already
            process_request=self._authenticate,
            logger=QUIET,
            process_response=self._note_refusal,
            open_timeout=limits.handshake_seconds,
            max_size=compressed_bound(HANDSHAKE_BYTES),
            max_queue=limits.queue,
            create_connection=CountingConnection,
            ping_interval=SECONDS_BETWEEN_PINGS,
            ping_timeout=SECONDS_TO_PONG,
            close_timeout=SECONDS_TO_CLOSE,
            server_header=None,
        )
        return server

    def _end(self, to_be_continued: bool = False) -> None:
        if not self._ended.done():
            self._ended.set_result(to_be_continued)

    # Who gets in

    async def _authenticate(self, connection: ServerConnection, request: Request) -> Response | None:
        """During the HTTP handshake, before any message is read."""
        if "Origin" in request.headers:  # no web page may speak to a server on its reader's own machine
            return connection.respond(http.HTTPStatus.FORBIDDEN, "web pages are not let in\n")
        if len(request.headers.get_all("Authorization")) > 1:
            return connection.respond(http.HTTPStatus.BAD_REQUEST, "one Authorization is enough\n")
        admits = self._door.admits
        if admits is not None:
            assert isinstance(connection, CountingConnection)

            def admit(name: str, secret: str) -> bool:
                connection.enrolled = admits(name, secret)
                return connection.enrolled is not None

            refusal = await basic_auth("splitlora", check_credentials=admit)(connection, request)
            if refusal is not None:
                return refusal
            if _connections_of(connection.username, connection.server) >= CONNECTIONS_A_DEVICE:
                refusal = connection.respond(http.HTTPStatus.TOO_MANY_REQUESTS, "this device has enough connections\n")
                refusal.headers["Retry-After"] = f"{SECONDS_TO_TRY_AGAIN:.0f}"
                return refusal
            self._listener.admit(_descriptor(connection))
        if request.path.strip("/"):
            return connection.respond(http.HTTPStatus.NOT_FOUND, "there is nothing here\n")
        return None

    async def _note_refusal(self, connection: ServerConnection, request: Request, response: Response) -> None:
        """Whoever was answered in HTTP has no WebSocket; only the operator can tell why it was refused."""
        if response.status_code == http.HTTPStatus.SWITCHING_PROTOCOLS:
            return
        logger.warning("%s refused: HTTP %d, %s", _address(connection), response.status_code, _why(request, response))

    async def _watch_enrolments(self) -> None:
        """A device that is revoked has left the run, connected or not; also where its name has a new secret by now."""
        while self._door.enrolled is not None:
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
            try:
                enrolled = await asyncio.to_thread(self._door.enrolled)
            except ConfigError:
                continue  # who comes anew is not let in, and the operator told; who is in stays until it can be read
            here = {name for name, peer in self._peers.items() if peer.connection.enrolled != enrolled.get(name)}
            away = {
                name
                for name, member in self._federation.members.items()
                if name not in enrolled and not member.presence.has_left
            }
            for name in here | away:
                self._expel(name, f"the enrolment of {name} was revoked")

    def _expel(self, name: str, reason: str) -> None:
        peer = self._peers.pop(name, None)
        told = self._leave(name, peer, reason)
        if peer is not None:
            self._spawn(self._refuse(peer, reason, told=told))
        self._end_if_over()

    # A conversation

    async def _converse(self, connection: ServerConnection) -> None:
        assert isinstance(connection, CountingConnection)
        peer, patience = Peer(connection, Pace(self._door.limits.messages_per_second)), None
        try:
            while True:
                patience = self._patience(peer)
                data = await asyncio.wait_for(connection.recv(), patience)
                await asyncio.sleep(peer.pace.delay(time.monotonic()))
                message = await asyncio.to_thread(self._receive, peer, data)
                if peer.name is not None and self._peers.get(peer.name) is not peer:
                    logger.debug("%s: ignored what came after it was dismissed", peer)
                    await connection.wait_closed()  # by whoever dismissed it: a device that is to hear why has not heard yet
                    break  # it was dismissed meanwhile, or lives no more and its device is back
                if isinstance(message, Goodbye):
                    self._forget(peer, "it said goodbye")
                    break
                if message is not None:
                    await self._answer(peer, message)
        except asyncio.TimeoutError:
            # Its link stalled, or its disk: it may come again, and has its place as if the link had been lost.
            awaited = "Join" if peer.session.state is State.WELCOMED else "Hello"
            reason = f"no {awaited} came within {duration(patience or 0.0)}"
            self._forget(peer)
            await self._refuse(peer, reason, retry_after=SECONDS_TO_TRY_AGAIN)
        except RemoteProtocolError as error:
            # First: the others do not wait for a peer that does not listen. One that had not joined has no place to lose.
            told = self._forget(peer, str(error) if peer.joined else None)
            retry_after = SECONDS_TO_TRY_AGAIN if isinstance(error, NameInUse) else 0.0
            await self._refuse(peer, str(error), retry_after=retry_after, told=told)
        except ConnectionClosed:
            # Else it was closed from this side, which has said why.
            is_lost = peer.name is not None and self._peers.get(peer.name) is peer and not self._ended.done()
            if is_lost and peer.joined and not self._complete:
                logger.info("%s: connection lost", peer)
        finally:
            self._forget(peer)

    def _receive(self, peer: Peer, data: bytes | str) -> Message | None:
        try:
            return peer.session.receive(data)
        except OSError as error:  # of the disk: this thread sees no socket
            failure = ConfigError(
                f"devices' samples cannot be kept: {error.strerror or error}; when that is mended, --resume goes on"
            )
            self._call(self._fail, failure)
            return None

    def _kept_with(self, name: str, join: Join) -> CacheFolder:
        """A client's samples, without what only this side knows to count, or has not heard to be taken back."""
        assert self._kept is not None
        kept = self._kept(name)
        if join.kept is not None:
            kept.forget_after(join.kept - 1)
        return kept

    def _fail(self, error: Exception) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)

    def _patience(self, peer: Peer) -> float | None:
        """How long a peer may take for its next message. Those who have joined take as long as they compute."""
        if peer.joined:
            return None
        return SECONDS_TO_JOIN if peer.session.state is State.WELCOMED else self._door.limits.handshake_seconds

    async def _answer(self, peer: Peer, message: Message) -> None:
        federation, now = self._federation, time.monotonic()
        if isinstance(message, Ping):
            await self._send(peer, self._pong(message))
        elif isinstance(message, Hello):
            await self._greet(peer, message)
        elif isinstance(message, Join):
            assert peer.name is not None
            if self._kept is not None:
                peer.session.kept = await asyncio.to_thread(self._kept_with, peer.name, message)
            before = federation.members.get(peer.name)
            actions = federation.join(peer.name, message, now)
            peer.joined = True
            self._expect(peer, self._largest_message(message.batch_size * message.longest))
            connected = federation.status().connected
            if before is None:
                came = f"joined with {count(message.num_samples, 'sample')}"
            else:
                came = "is back" if before.lost_at is None else f"is back after {duration(now - before.lost_at)}"
            logger.info("%s %s; %d of %s connected", peer, came, connected, count(federation.settings.clients, "device"))
            self._perform(actions)
        else:
            assert peer.name is not None
            answers = self._perform(federation.receive(peer.name, message, now))
            if peer.name in answers:  # at once: what it has asked before it knew must not be taken for what it asks then
                await asyncio.wait([answers[peer.name]])

    async def _greet(self, peer: Peer, hello: Hello) -> None:
        if self._door.admits is not None and hello.name != (owner := peer.connection.username):
            raise RemoteProtocolError(f"the secret is that of {owner}; it does not open the run for {hello.name}")
        if (before := self._peers.get(hello.name)) is not None and not await self._lives(before):
            logger.info("%s: its earlier connection is dead", before)
            self._forget(before)
            before.connection.transport.abort()
        welcome = self._federation.welcome(hello)
        self._listener.admit(_descriptor(peer.connection))
        peer.name, self._peers[hello.name] = hello.name, peer
        await self._send(peer, welcome)

    async def _lives(self, peer: Peer) -> bool:
        """Whether a connection that looks open is. A device that lost its network may be back before its old link times out."""
        connection = peer.connection
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

    def _expect(self, peer: Peer, size: int) -> None:
        """Take messages of up to ``size`` bytes from now on; a frame that claims more is refused before it is read."""
        peer.session.max_bytes = size
        peer.connection.protocol.max_message_size = compressed_bound(size)
        # A device that is still sending does not read yet: so many answers may wait for it before it is not read either.
        answers = self._federation.settings.micro_batches * compressed_bound(size)
        peer.connection.transport.set_write_buffer_limits(high=answers)

    def _forget(self, peer: Peer, for_good: str | None = None) -> bool:
        """A peer is gone: its connection is lost, or, with a reason, it is out of the run. Says whether that was logged."""
        if peer.name is None or self._peers.get(peer.name) is not peer:
            return False
        del self._peers[peer.name]
        if self._ended.done():
            return False  # it did not go: we dismissed it
        told = False
        if for_good is None:
            self._perform(self._federation.disconnected(peer.name, time.monotonic()))
        else:
            told = self._leave(peer.name, peer, for_good)
        self._end_if_over()
        return told

    def _leave(self, name: str, peer: Peer | None, reason: str) -> bool:
        """A device is out of the run, connected or not. Says whether that was logged."""
        federation = self._federation
        told = name in federation.members and federation.total_steps > 0 and not self._complete
        if told:
            logger.warning("%s has left the run after step %d: %s", peer or name, federation.step, reason)
        self._perform(federation.leave(name, time.monotonic()))
        return told

    async def _refuse(self, peer: Peer, reason: str, *, retry_after: float = 0.0, told: bool = False) -> None:
        """
        Args:
            retry_after: seconds after which the same may be allowed; 0 where it never will.
            told: whether it was logged already.
        """
        if not told:
            logger.warning("%s refused%s: %s", peer, " for now" if retry_after else "", reason)
        try:
            data = peer.session.send(Failure(reason=reason[:LONGEST_REASON], retry_after=retry_after))
            await asyncio.wait_for(peer.connection.send(data), SECONDS_TO_CLOSE)
        except (ConnectionClosed, LocalProtocolError, asyncio.TimeoutError):
            pass  # gone already, refused already, or deaf: nobody is left to be told
        await peer.connection.close(POLICY_VIOLATION)

    async def _send(self, peer: Peer, message: Message) -> None:
        try:
            async with peer.sending:
                if isinstance(message, ActivationGradient) and not peer.session.awaits(message):
                    return  # its device is back and asks again, from an earlier one on; the answer is kept
                data = await asyncio.to_thread(peer.session.send, message)
                await peer.connection.send(data)
        except (ConnectionClosed, LocalProtocolError):
            pass  # it is gone, or back and has not asked again yet; the conversation itself notices

    # What the federation decides

    def _perform(self, actions: list[Action]) -> "dict[str, asyncio.Task[None]]":
        """The replies that are being sent, by client."""
        replies: dict[str, asyncio.Task[None]] = {}
        for action in actions:
            if isinstance(action, Reply):
                peer = self._peers.get(action.client)
                if peer is not None:
                    replies[action.client] = self._spawn(self._send(peer, action.message))
            elif isinstance(action, FinishStep):
                self._last_row = self._spawn(self._finish_step(action, list(replies.values()), self._last_row))
            elif isinstance(action, Report):
                logger.info("%s", action.text)
            elif isinstance(action, Checkpoint):
                self._keep_round_end()
            else:
                self._spawn(self._do(action))
        self._set_alarm()
        return replies

    def _set_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        expires = self._federation.expires()
        if expires is not None:
            self._alarm = self._loop.call_later(expires - time.monotonic(), self._tick)

    def _tick(self) -> None:
        self._perform(self._federation.tick(time.monotonic()))

    async def _do(self, action: Train | Aggregate | Evaluate | FinishRun) -> None:
        federation, compute, started = self._federation, self._compute, time.monotonic()
        if isinstance(action, Train):
            if action.check is not None:
                changes = await self._work(compute.check, list(action.batches.values()), action.check)
                came = federation.codec_of(action.step)
                self._perform(federation.checked({codec or came: change for codec, change in changes.items()}))
                started = time.monotonic()
            trained = await self._work(compute.train, action.step, action.total_steps, action.micro_batch, action.batches)
            now = time.monotonic()
            loss, labelled_tokens, gradients = trained
            result = Trained(loss=loss, labelled_tokens=labelled_tokens, gradients=gradients)
            self._perform(federation.trained(result, now - started, now))
        elif isinstance(action, Aggregate):
            adapter = await self._work(compute.aggregate, action.step, action.total_steps, action.contributions, action.weights)
            now, self._round_end = time.monotonic(), (action.step, compute.round_end)
            self._perform(federation.aggregated(adapter, now - started, now))
        elif isinstance(action, Evaluate):
            summed_loss = await self._work(compute.evaluate, action.batch)
            self._perform(federation.evaluated(action.client, action.batch, summed_loss, time.monotonic()))
        else:
            if self._keeper is not None:
                await self._keeper
            await self._work(self._save)
            self._complete = True
            self._perform(federation.saved(time.monotonic()))
            self._end_if_over()

    def _keep_round_end(self) -> asyncio.Task[None]:
        """One writer at a time: who asks while it writes has the same file, or the next, written after."""
        self._to_keep = self._round_end
        if self._keeper is None or self._keeper.done():
            self._keeper = self._spawn(self._keep_rounds())
        return self._keeper

    async def _keep_rounds(self) -> None:
        """Write the newest round that is to be kept, as often as there is a newer one."""
        while self._to_keep is not None:
            (step, state), self._to_keep = self._to_keep, None
            if self._last_row is not None:
                await self._last_row  # metrics know at least the steps that a checkpoint knows
            await asyncio.to_thread(self._keep, step, self._federation.membership(), state)
            self._federation.checkpointed(step)

    async def _finish_step(
        self, action: FinishStep, replies: list[asyncio.Task[None]], row_before: asyncio.Task[None] | None
    ) -> None:
        if replies:
            # Bytes that a slow reader takes later than this are counted in the next line.
            await asyncio.wait(replies, timeout=SECONDS_FOR_REPLIES)
        if row_before is not None:
            await row_before
        up, down = {}, {}
        for name, peer in sorted(self._peers.items()):
            connection = peer.connection
            up[name], down[name] = connection.bytes_up - peer.counted_up, connection.bytes_down - peer.counted_down
            peer.counted_up, peer.counted_down = connection.bytes_up, connection.bytes_down
        self._report(replace(action.record, bytes_up=up, bytes_down=down))

    # Small parts

    async def _work(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """TorchEngine off the event loop, which goes on answering keepalives meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._ended.done():
            self._ended.set_exception(error)

    def _end_if_over(self) -> None:
        """The run is over when everybody has its adapter; those who do not come for it are not waited for much longer."""
        if not self._complete or self._peers:
            return
        if self._federation.unfinished():
            if self._patience_ends is not None:
                self._patience_ends.cancel()  # a device has come since, and gets the whole time to come again
            if self._linger:
                names = listed(self._federation.unfinished())
                logger.info("the run is complete; waiting up to %s for %s to fetch the adapter", duration(self._linger), names)
            self._patience_ends = self._loop.call_later(self._linger, lambda: None if self._peers else self._end())
        else:
            self._end()

    async def _dismiss(self, reason: str, *, to_be_continued: bool = False) -> None:
        if self._tasks:
            # What is being computed is finished; a reply that nobody reads is not waited for.
            await asyncio.wait(self._tasks, timeout=SECONDS_TO_FINISH)
        peers = list(self._peers.values())
        if to_be_continued:
            await asyncio.gather(*(peer.connection.close(SERVICE_RESTART) for peer in peers))
        else:
            await asyncio.gather(*(self._refuse(peer, reason, told=True) for peer in peers))

    async def _save_unfinished(self, *, to_be_continued: bool) -> None:
        federation = self._federation
        if self._complete:
            return
        if not federation.total_steps:
            if to_be_continued:
                logger.info("stopped before the run started; --resume waits for its devices again")
            return
        await self._keep_round_end()
        await self._work(self._save)
        logger.info(
            "stopped after step %d of %d; its adapter is saved%s",
            federation.round,
            federation.total_steps,
            "; --resume goes on from there" if to_be_continued else "",
        )

    def _pong(self, ping: Ping) -> Pong:
        federation = self._federation
        waiting_for, waiting_seconds = federation.waits_for(time.monotonic())
        return Pong(
            index=ping.index,
            software=version(),
            run=federation.run,
            clients=federation.settings.clients,
            joined=federation.status().connected,
            step=federation.step,
            model=self._model_name,
            waiting_for=tuple(waiting_for[:NAMES_IN_A_PONG]),
            waiting_seconds=waiting_seconds,
        )

    def _largest_message(self, rows: int) -> int:
        limits = self._federation.limits
        return largest_message_bytes(
            rows=rows,
            width=limits.width,
            precision=self._federation.settings.precision,
            adapter_elements=sum(a * b for a, b in limits.edge_shapes.values()),
        )

    def _url(self) -> str:
        host, port = self._listener.getsockname()[:2]
        scheme = "wss" if self._door.encryption else "ws"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _address(connection: ServerConnection) -> str:
    if connection.remote_address is None:
        return "a lost connection"
    host, port = connection.remote_address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


WHY = {
    http.HTTPStatus.UNAUTHORIZED: "it has no valid secret",
    http.HTTPStatus.TOO_MANY_REQUESTS: "this device has enough connections",
    http.HTTPStatus.UPGRADE_REQUIRED: "it speaks no WebSocket",
}


def _why(request: Request, response: Response) -> str:
    """What stands in the log beside an HTTP status; a stranger's words are shown in ASCII."""
    if response.status_code == http.HTTPStatus.FORBIDDEN:
        return f"a web page of {', '.join(request.headers.get_all('Origin'))[:100]!a}"
    if response.status_code == http.HTTPStatus.NOT_FOUND:
        return f"there is nothing at {request.path[:100]!a}"
    status = http.HTTPStatus(response.status_code)
    return WHY.get(status, status.phrase)


def _descriptor(connection: ServerConnection) -> int:
    """-1 where the connection is lost."""
    transport_socket = connection.transport.get_extra_info("socket")
    return -1 if transport_socket is None else int(transport_socket.fileno())


def _connections_of(device: str, server: Server) -> int:
    return sum(getattr(connection, "username", None) == device for connection in server.connections)
