"""How long a run is served."""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

from terminal import duration, listed

from ..federation import Federation, Phase
from ..history import tell
from .peer import Peer

__all__ = ["Lifetime"]


class Lifetime:
    """
    The server serves its run until every client has its adapter, until somebody ends it, or until a task of it fails.

    Args:
        peers: the open connections that belong to a client, by its name.
        grace_period: seconds that a finished run waits for clients which are away and have not fetched its adapter.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, federation: Federation, peers: Mapping[str, Peer], grace_period: float
    ) -> None:
        self._loop, self._federation, self._peers, self._grace_period = loop, federation, peers, grace_period
        self._ended: asyncio.Future[bool] = loop.create_future()
        """Its result is whether the run is to be continued."""
        self._late: BaseException | None = None
        """What has failed first after the end."""
        self._grace_ends: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_over(self) -> bool:
        return self._ended.done()

    @property
    def is_saved(self) -> bool:
        """Whether the adapter is on the disk."""
        return self._federation.phase is Phase.FINISHED

    def end(self, to_be_continued: bool = False) -> None:
        """
        Args:
            to_be_continued: whether clients are to come back when the run goes on.
        """
        if not self._ended.done():
            self._ended.set_result(to_be_continued)

    def fail(self, error: BaseException) -> None:
        if self._ended.done():
            self._late = self._late or error
        else:  # no future takes a StopIteration
            self._ended.set_exception(RuntimeError(repr(error)) if isinstance(error, StopIteration) else error)

    async def until_end(self) -> bool:
        """Wait for the end; say whether the run is to be continued. What made it fail is raised."""
        return await self._ended

    def end_if_all_have_left(self) -> None:
        """
        Call it when the run is complete, and whenever a client has gone. Clients that do not come back are waited for no longer
        than the grace period.
        """
        if not self.is_saved or self._peers:
            return
        unfinished = self._federation.unfinished()
        if not unfinished:
            self.end()
            return
        if self._grace_ends is not None:
            self._grace_ends.cancel()  # a device has come since, and gets the whole time to come again
        if self._grace_period:
            waited = duration(self._grace_period)
            tell("note", f"the run is complete; waiting up to {waited} for {listed(unfinished)} to fetch the adapter")
        self._grace_ends = self._loop.call_later(self._grace_period, lambda: None if self._peers else self.end())

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run it beside everything else; its failure is the run's."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    async def finish_tasks(self, seconds: float) -> None:
        """What is being computed and written is finished; a reply that nobody reads is not waited for."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    def raise_late(self) -> None:
        """What has failed after the end, if anything has: nobody else hears of it."""
        if self._late is not None:
            raise self._late

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)
