"""The way of an event from where it is told to the run's files and to whoever follows the run."""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from ..history import RunEvent
from .journal import Journal
from .lifetime import Lifetime
from .observer import Observer

__all__ = ["EventRelay"]


class EventRelay:
    """
    Is told events on any thread, and hands them on where the run is served. What is told before that waits; what is told
    afterwards only the log has.
    """

    def __init__(self, journal: Journal, observers: Sequence[Observer]) -> None:
        self._journal, self._observers = journal, observers
        self._loop: asyncio.AbstractEventLoop
        self._lifetime: Lifetime | None = None
        self._waiting: list[RunEvent] = []
        self._lock = threading.Lock()
        """Of these two: an observer's thread may tell something just when the run begins to be served."""

    def __call__(self, event: RunEvent) -> None:
        with self._lock:
            if self._lifetime is None:
                self._waiting.append(event)
                return
        if self._thread == threading.get_ident():
            self._deliver(event)
        else:
            try:
                self._loop.call_soon_threadsafe(self._deliver, event)
            except RuntimeError:
                pass  # the run is over, and its loop is closed

    def connect(self, lifetime: Lifetime) -> None:
        """Call it on the thread that serves, once the journal has begun."""
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        with self._lock:
            self._lifetime, waiting, self._waiting = lifetime, self._waiting, []
        for event in waiting:
            self._deliver(event)

    def _deliver(self, event: RunEvent) -> None:
        assert self._lifetime is not None
        self._lifetime.spawn(_done(self._journal.write_event(event)))
        try:
            for observer in self._observers:
                observer.event_happened(event)
        except Exception as error:
            self._lifetime.fail(error)


async def _done(written: "Future[None]") -> None:
    await asyncio.wrap_future(written)
