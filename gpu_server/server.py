"""The only file of this package that knows WebSockets and asyncio. It moves bytes, and does what `Federation` decides."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from protocol import (
    SECONDS_BETWEEN_PINGS,
    SECONDS_TO_PONG,
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
    compressed_bound,
    largest_message_bytes,
)
from split_model import TrainingDiverged
from terminal import version

from .compute import Compute
from .config import ConfigError
from .federation import Action, Aggregate, Evaluate, Federation, FinishRun, FinishStep, Reply, Train

__all__ = ["RunServer", "StepRecord"]

logger = logging.getLogger("gpu_server")
Result = TypeVar("Result")

SECONDS_TO_FINISH = 10.0
SECONDS_TO_CLOSE = 2.0
LONGEST_REASON = 1000  # characters


@dataclass(frozen=True)
class StepRecord:
    """A finished step, as it stands in metrics.jsonl."""

    number: int
    loss: float
    """Nats per labelled token."""
    labelled_tokens: int
    tokens: int
    bytes_up: dict[str, int]
    """By client, on the socket, WebSocket framing included, since the line before."""
    bytes_down: dict[str, int]
    seconds: dict[str, dict[str, float]]
    """By client: edge_compute, wire, waiting, server_compute."""


class CountingConnection(ServerConnection):
    """Counts every byte that goes through the socket: handshake, frames, control frames."""

    bytes_up = 0
    bytes_down = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        write = self.transport.write

        def counting_write(data: bytes) -> None:
            self.bytes_down += len(data)
            write(data)

        self.transport.write = counting_write  # type: ignore[method-assign, assignment]

    def data_received(self, data: bytes) -> None:
        self.bytes_up += len(data)
        super().data_received(data)


@dataclass
class Peer:
    """One connection, and who it turned out to be."""

    connection: CountingConnection
    session: Session = field(default_factory=lambda: Session(Side.SERVER))
    name: str | None = None
    counted_up: int = 0
    counted_down: int = 0


class RunServer:
    """
    Serves one run to its end.

    Args:
        report: called on the event loop for every finished step.
        save: called on the worker thread when the run is complete, before anybody hears of it.
    """

    def __init__(
        self,
        federation: Federation,
        compute: Compute,
        *,
        report: Callable[[StepRecord], None],
        save: Callable[[], None],
    ) -> None:
        self._federation, self._compute = federation, compute
        self._report, self._save = report, save
        self._peers: dict[str, Peer] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended: asyncio.Future[None]
        self._last_row: asyncio.Task[None] | None = None
        self._complete = False

    def run(self, host: str, port: int, listening: Callable[[str], None]) -> None:
        """
        Listen until the run is complete and all clients have left, or `stop` is called.

        Args:
            listening: called with the server's URL once it accepts connections.

        Raises:
            ConfigError: the address cannot be listened on, or the run directory not be written.
            TrainingDiverged: the loss is no longer a number.
        """
        asyncio.run(self._listen(host, port, listening))

    def stop(self) -> None:
        """End the run before its time; its clients are told. From any thread, after `run` called ``listening``."""
        try:
            self._loop.call_soon_threadsafe(self._end)
        except RuntimeError:
            pass  # the run is over, and its loop is closed

    async def _listen(self, host: str, port: int, listening: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        async with await self._open(host, port) as server:
            listening(_url(server))
            try:
                await self._ended
                await self._dismiss("the server was stopped")
                await self._save_unfinished()
            except (ConfigError, TrainingDiverged) as error:
                await self._dismiss(str(error))
                raise
            except Exception:
                await self._dismiss("the server failed")
                raise
            finally:
                self._worker.shutdown()

    async def _open(self, host: str, port: int) -> Server:
        try:
            server: Server = await serve(
                self._converse,
                host,
                port,
                compression=None,  # messages are compressed already
                max_size=self._largest_frame(),
                create_connection=CountingConnection,
                ping_interval=SECONDS_BETWEEN_PINGS,
                ping_timeout=SECONDS_TO_PONG,
                close_timeout=SECONDS_TO_CLOSE,
                server_header=None,
            )
            return server
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"cannot listen on {host}:{port}: {reason}; choose another --port or --host") from None

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    # A conversation

    async def _converse(self, connection: ServerConnection) -> None:
        assert isinstance(connection, CountingConnection)
        peer = Peer(connection)
        try:
            async for data in connection:
                message = await asyncio.to_thread(peer.session.receive, data)
                if isinstance(message, Goodbye):
                    break
                await self._answer(peer, message)
        except RemoteProtocolError as error:
            self._forget(peer)  # first: the others do not wait for a peer that does not listen
            await self._refuse(peer, str(error))
        except ConnectionClosed:
            logger.info("%s: connection lost", peer.name or "a client")
        finally:
            self._forget(peer)

    async def _answer(self, peer: Peer, message: Message) -> None:
        federation, now = self._federation, time.monotonic()
        if isinstance(message, Ping):
            await self._send(peer, self._pong())
        elif isinstance(message, Hello):
            welcome = federation.welcome(message)
            peer.name, self._peers[message.name] = message.name, peer
            await self._send(peer, welcome)
        elif isinstance(message, Join):
            assert peer.name is not None
            actions = federation.join(peer.name, message, now)
            peer.session.max_bytes = self._largest_message(message.batch_size * message.longest)
            joined, clients = len(federation.members), federation.settings.clients
            logger.info("%s joined with %d samples, %d of %d clients", peer.name, message.num_samples, joined, clients)
            self._perform(actions)
        else:
            assert peer.name is not None
            self._perform(federation.receive(peer.name, message, now))

    def _forget(self, peer: Peer) -> None:
        if peer.name is None or self._peers.get(peer.name) is not peer:
            return
        del self._peers[peer.name]
        if self._ended.done():
            return  # it did not leave: we dismissed it
        self._perform(self._federation.leave(peer.name, time.monotonic()))
        self._end_if_over()

    async def _refuse(self, peer: Peer, reason: str) -> None:
        logger.warning("%s refused: %s", peer.name or "a client", reason)
        try:
            data = peer.session.send(Failure(reason=reason[:LONGEST_REASON]))
            await asyncio.wait_for(peer.connection.send(data), SECONDS_TO_CLOSE)
            await peer.connection.close(1008)
        except (ConnectionClosed, LocalProtocolError, asyncio.TimeoutError):
            pass  # gone already, refused already, or deaf: nobody is left to be told

    async def _send(self, peer: Peer, message: Message) -> None:
        try:
            data = await asyncio.to_thread(peer.session.send, message)
            await peer.connection.send(data)
        except (ConnectionClosed, LocalProtocolError):
            pass  # it is gone, or has just been refused; the conversation itself notices

    # What the federation decides

    def _perform(self, actions: list[Action]) -> None:
        replies: list[asyncio.Task[None]] = []
        for action in actions:
            if isinstance(action, Reply):
                peer = self._peers.get(action.client)
                if peer is not None:
                    replies.append(self._spawn(self._send(peer, action.message)))
            elif isinstance(action, FinishStep):
                self._last_row = self._spawn(self._finish_step(action, replies, self._last_row))
            else:
                self._spawn(self._do(action))

    async def _do(self, action: Train | Aggregate | Evaluate | FinishRun) -> None:
        federation, compute, started = self._federation, self._compute, time.monotonic()
        if isinstance(action, Train):
            loss, gradients = await self._work(compute.train, action.step, action.total_steps, action.batches)
            now = time.monotonic()
            self._perform(federation.trained(loss, gradients, now - started, now))
        elif isinstance(action, Aggregate):
            adapter = await self._work(compute.aggregate, action.step, action.total_steps, action.contributions, action.weights)
            now = time.monotonic()
            self._perform(federation.aggregated(adapter, now - started, now))
        elif isinstance(action, Evaluate):
            summed_loss = await self._work(compute.evaluate, action.batch)
            self._perform(federation.evaluated(action.client, action.batch.index, summed_loss, time.monotonic()))
        else:
            await self._work(self._save)
            self._complete = True
            self._perform(federation.saved(time.monotonic()))
            self._end_if_over()

    async def _finish_step(
        self, action: FinishStep, replies: list[asyncio.Task[None]], row_before: asyncio.Task[None] | None
    ) -> None:
        await asyncio.gather(*replies, *([row_before] if row_before else []))
        up, down = {}, {}
        for name, peer in sorted(self._peers.items()):
            connection = peer.connection
            up[name], down[name] = connection.bytes_up - peer.counted_up, connection.bytes_down - peer.counted_down
            peer.counted_up, peer.counted_down = connection.bytes_up, connection.bytes_down
        self._report(StepRecord(action.step, action.loss, action.labelled_tokens, action.tokens, up, down, action.seconds))

    # Small parts

    async def _work(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Compute off the event loop, which goes on answering keepalives meanwhile."""
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
        if self._complete and not self._peers:
            self._end()

    async def _dismiss(self, reason: str) -> None:
        if self._tasks:
            # What is being computed is finished; a reply that nobody reads is not waited for.
            await asyncio.wait(self._tasks, timeout=SECONDS_TO_FINISH)
        await asyncio.gather(*(self._refuse(peer, reason) for peer in list(self._peers.values())))

    async def _save_unfinished(self) -> None:
        step, total_steps = self._federation.step, self._federation.total_steps
        if step and not self._complete:
            await self._work(self._save)
            logger.info("stopped after step %d of %d; its adapter is saved", step, total_steps)

    def _pong(self) -> Pong:
        federation = self._federation
        return Pong(
            software=version(),
            run=federation.run,
            clients=federation.settings.clients,
            joined=len(federation.members),
            step=federation.step,
        )

    def _largest_message(self, rows: int) -> int:
        limits = self._federation.limits
        return largest_message_bytes(
            rows=rows,
            width=limits.width,
            precision=self._federation.settings.precision,
            adapter_elements=sum(a * b for a, b in limits.edge_shapes.values()),
        )

    def _largest_frame(self) -> int:
        return compressed_bound(self._largest_message(self._federation.limits.max_batch_tokens))


def _url(server: Server) -> str:
    host, port = next(iter(server.sockets)).getsockname()[:2]
    return f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}"
