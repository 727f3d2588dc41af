"""The open pages of a run, as connections: what they are sent, and what becomes of those that do not read it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from websockets.asyncio.server import broadcast
from websockets.exceptions import ConnectionClosed

from .peer import POLICY_VIOLATION, CountingConnection

__all__ = ["Viewers"]

MOST_UNSENT = 256 * 1024
"""Bytes that wait for one page. One with more misses what comes meanwhile, and is sent everything once it has taken these."""
SECONDS_TO_TAKE_ANYTHING = 30.0
BYTES_OF_PONGS = 1000
"""That a page may send in a second: pongs are far less, and there is nothing else for it to say."""


@dataclass
class _Viewer:
    since: float
    """When it was opened, or last known to have taken something."""
    opened: float
    taken: int = 0
    """Bytes, until then."""
    has_missed_something: bool = False


class Viewers:
    """
    Sends the same bytes to all. Nothing waits for any of them: what a slow one does not take is not kept for it, and one that
    takes nothing is closed.

    Args:
        everything: what a page that has just come, or has missed something, is sent: JSON. None where there is nothing to send
            yet: then it is sent with the news that comes next.
    """

    def __init__(self, everything: Callable[[], str | None]) -> None:
        self._everything = everything
        self._all: dict[CountingConnection, _Viewer] = {}

    def __len__(self) -> int:
        return len(self._all)

    async def show(self, connection: CountingConnection) -> None:
        """Until it ends. A page that says anything is closed."""
        now = time.monotonic()
        self._all[connection] = _Viewer(now, now, has_missed_something=not self._send_everything([connection]))
        try:
            await connection.recv()
            await connection.close(POLICY_VIOLATION, "a page has nothing to say")
        except ConnectionClosed:
            pass
        finally:
            del self._all[connection]

    def tell(self, news: str) -> None:
        """Send it to all that have taken what came before, and everything to those that have caught up."""
        now, in_time, caught_up = time.monotonic(), list[CountingConnection](), list[CountingConnection]()
        for connection, viewer in self._all.items():
            unsent = connection.transport.get_write_buffer_size()
            taken = connection.bytes_down - unsent
            if not unsent or taken > viewer.taken:
                viewer.since, viewer.taken = now, taken
            says_too_much = connection.bytes_up > BYTES_OF_PONGS * (10 + now - viewer.opened)
            if says_too_much or now - viewer.since > SECONDS_TO_TAKE_ANYTHING:
                connection.transport.abort()
            elif viewer.has_missed_something and not unsent:
                viewer.has_missed_something = False
                caught_up.append(connection)
            elif viewer.has_missed_something or unsent > MOST_UNSENT:
                viewer.has_missed_something = True
            else:
                in_time.append(connection)
        broadcast(in_time, news)
        if caught_up:
            self._send_everything(caught_up)

    def _send_everything(self, connections: Sequence[CountingConnection]) -> bool:
        everything = self._everything()
        if everything is None:
            return False
        broadcast(connections, everything)
        return True

    def end(self) -> None:
        """Close those at once that would keep the others waiting: they have not taken what they were sent."""
        for connection in self._all:
            if connection.transport.get_write_buffer_size():
                connection.transport.abort()
