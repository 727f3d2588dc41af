"""Listens for the devices of a run, and ends the run when it is over."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from protocol import TrainingDiverged
from storage import CacheFolder, ModelError
from terminal import count

from ..checkpoints import CheckpointSpacing
from ..door import Door
from ..edge_part import EdgePartStore
from ..engine import Engine
from ..errors import RankLost, ServerError
from ..federation import Action, Federation
from ..history import tell
from ..listener import Limits, Listener
from ..page.routes import Routes
from .conversation import Conversations
from .event_relay import EventRelay
from .http_handshake import accept_connections, watch_door
from .journal import Journal
from .lifetime import Lifetime
from .observer import Observer
from .peer import CountingConnection, Peer
from .performer import Performer
from .viewers import Viewers

__all__ = ["RunServer"]

SECONDS_TO_FINISH = 10.0


class RunServer:
    """
    Serves one run to its end.

    Args:
        model_name: of the base model on the Hugging Face hub, if it came from there.
        grace_period: seconds that a finished run waits for clients which are away and have not fetched its adapter.
        caches: the activation cache of a client, by its name, where the run has any.
        edge_part: what is handed to devices without a model, where the run has it.
        viewers: the open pages.
        metrics: what the run has counted, for tools that read metrics; see `accept_connections`.
        last_step_time: when the server before has finished its last step; None where it is not known, or there was none.
        spacing: see `Performer`.
    """

    def __init__(
        self,
        federation: Federation,
        engine: Engine,
        *,
        door: Door,
        journal: Journal,
        observers: Sequence[Observer],
        events: EventRelay,
        model_name: str,
        grace_period: float,
        caches: Callable[[str], CacheFolder] | None,
        edge_part: EdgePartStore | None,
        viewers: Viewers,
        metrics: Callable[[], Callable[[], tuple[bytes, str]]],
        last_step_time: float | None,
        spacing: CheckpointSpacing | None,
    ) -> None:
        self._federation, self._engine, self._door = federation, engine, door
        self._journal, self._observers, self._events = journal, observers, events
        self._model_name, self._grace_period, self._caches = model_name, grace_period, caches
        self._edge_part, self._viewers, self._metrics = edge_part, viewers, metrics
        self._last_step_time = last_step_time
        self._spacing = spacing
        self._loop: asyncio.AbstractEventLoop
        self._lifetime: Lifetime

    def run(self, listening: Callable[[str], None], first: Sequence[Action]) -> None:
        """
        Listen until the run is complete and all clients have left, or `stop` or `suspend` is called.

        Args:
            listening: called with the server's URL once it accepts connections.
            first: what the federation wants done before anything else.

        Raises:
            ServerError: the address cannot be listened on, or the run directory not be written.
            TrainingDiverged: the loss is no longer a number.
            ModelError: the base model gives none.
        """
        with ExitStack() as self._watched:
            asyncio.run(self._serve(listening, first))

    def stop(self) -> None:
        """End the run before its time; its clients are told. From any thread, after `run` called ``listening``."""
        self._end(to_be_continued=False)

    def suspend(self) -> None:
        """Stop so that the run can go on later: its clients will try to come back. From any thread, as `stop`."""
        self._end(to_be_continued=True)

    def fail(self, error: ServerError) -> None:
        """End the run since something that it needs is lost: its clients will try to come back. From any thread, as `stop`."""
        self._call(lambda: self._lifetime.fail(error))

    def _end(self, *, to_be_continued: bool) -> None:
        self._call(lambda: self._lifetime.end(to_be_continued))

    def _call(self, function: Callable[[], None]) -> None:
        """On the thread that serves."""
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:
            pass  # the run is over, and its loop is closed

    async def _serve(self, listening: Callable[[str], None], first: Sequence[Action]) -> None:
        self._loop, peers = asyncio.get_running_loop(), dict[str, Peer]()
        limits = self._limits()
        listener = Listener.open(self._door.host, self._door.port, limits)
        lifetime = self._lifetime = Lifetime(self._loop, self._federation, peers, self._grace_period)
        performer = Performer(
            self._federation,
            self._engine,
            journal=self._journal,
            observers=self._observers,
            peers=peers,
            lifetime=lifetime,
            spacing=self._spacing,
        )
        conversations = Conversations(
            self._federation,
            performer,
            lifetime,
            peers=peers,
            door=self._door,
            listener=listener,
            model_name=self._model_name,
            caches=self._caches,
            edge_part=self._edge_part,
        )

        async def converse(connection: CountingConnection) -> None:
            await conversations.converse(Peer(connection, max_messages_per_second=limits.messages_per_second))

        routes = Routes(has_page=self._door.has_page, token=self._door.page_token, is_well=lambda: not lifetime.is_over)
        accepting = accept_connections(
            listener, self._door, limits, routes, metrics=self._metrics, converse=converse, show=self._viewers.show
        )
        async with await accepting as server:
            listener.freeze()
            listening(self._url(listener))
            for observer in self._observers:
                observer.serving_begins(self._federation.step)
                self._watched.callback(observer.serving_ends)
            self._events.connect(lifetime)
            restarts = self._federation.restarts
            again = f", restarted {count(restarts, 'time')}" if restarts else ""
            started = f"the server listens on {self._url(listener)}{again}"
            step, total_steps = self._federation.step, self._federation.total_steps
            details: dict[str, Any] = {"restarts": restarts, "total_steps": total_steps}
            tell("server_started", started, step=step, quiet=True, **details, last_step_time=self._last_step_time)
            for notice in self._door.notices:
                tell("note", notice, level="warning")
            watch = self._loop.create_task(
                watch_door(self._door, conversations.apply_enrolments, conversations.announce_next_key)
            )
            try:
                performer.perform(first)
                await self._until_end(lifetime, performer, conversations)
            finally:
                watch.cancel()
                listener.unfreeze()
                self._viewers.end()
                listener.turn_strangers_away()
                server.close()
                performer.close()

    def _limits(self) -> Limits:
        limits = self._door.limits.within_open_files(self._federation.settings.clients)
        if limits.connections < self._door.limits.connections:
            most = f"at most {limits.connections} connections at a time"
            tell("note", f"{most}, by the number of files that this process may open", level="warning")
        return limits

    async def _until_end(self, lifetime: Lifetime, performer: Performer, conversations: Conversations) -> None:
        try:
            to_be_continued = await lifetime.until_end()
        except Exception as error:
            await lifetime.finish_tasks(SECONDS_TO_FINISH)
            # Numbers that are none come again. A disk that is full, or a defect, may be mended: then the run can go on.
            is_lasting = isinstance(error, TrainingDiverged | ModelError)
            tell("failed", str(error) or repr(error), level="error", step=self._federation.step, quiet=True)
            if isinstance(error, RankLost):
                await performer.save_round_end()  # the last round is still in memory
            await conversations.dismiss(str(error) if is_lasting else "the server failed", to_be_continued=not is_lasting)
            raise
        await lifetime.finish_tasks(SECONDS_TO_FINISH)
        await conversations.dismiss("the server was stopped", to_be_continued=to_be_continued)
        # Also if the last step has failed meanwhile: what was learnt before it is as good as it was.
        await self._save_unfinished(lifetime, performer, to_be_continued=to_be_continued)
        lifetime.raise_late()

    async def _save_unfinished(self, lifetime: Lifetime, performer: Performer, *, to_be_continued: bool) -> None:
        federation = self._federation
        if lifetime.is_saved:
            return
        if not federation.total_steps:
            if to_be_continued:
                tell("stopped", "stopped before the run started; --resume waits for its devices again", step=0)
            return
        await performer.save_unfinished()
        goes_on = "; --resume goes on from there" if to_be_continued else ""
        reached = f"step {federation.round} of {federation.total_steps}"
        tell("stopped", f"stopped after {reached}; its adapter is saved{goes_on}", step=federation.round)

    def _url(self, listener: Listener) -> str:
        host, port = listener.getsockname()[:2]
        scheme = "wss" if self._door.encryption else "ws"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
