"""One connection to the server at a time, and a new one whenever it is lost."""

import logging
import math
import random
import time
from collections.abc import Callable
from typing import TypeVar

from protocol import ActivationCache
from terminal import Reminders

from .connection import Connection, ConnectionFailed, Dial
from .device_log import DeviceLog
from .link_watch import Patience
from .stopwatch import Stopwatch

__all__ = ["Backoff", "Reconnector"]

logger = logging.getLogger("edge_client")
Result = TypeVar("Result")

SHORTEST_WAIT = 0.05  # seconds
LONGEST_WAIT = 30.0
SHARE_OF_TIME_AWAY = 1 / 8
SECONDS_A_DEVICE = 0.01
"""A server greets and joins a device in 3 ms of one core, with TLS in 5."""
REMINDERS = Reminders(first=60.0, times_later=2.0)
"""After the first message, which comes at once: while there is no connection, the user is told so again after a minute, ..."""


class Backoff:
    """
    How long to wait before the next attempt to connect. Waits are drawn at random, up to a longest that is the largest of

    - twice the shortest, so that a link which was cut is tried again at once;
    - an eighth of the time away, and half a minute at most: a device comes back so much later than its server at most;
    - ten milliseconds for each device of the run. However many devices lose a server in one moment, they ask it for one to
      three hundred connections a second, and not for all of them at once. That is a quarter of the time after which a device
      gives up at most, or it would give up without having tried.

    Args:
        seed: of the draws; two devices need different ones.
        give_up_after: seconds.
    """

    def __init__(self, seed: str, give_up_after: float | None = None) -> None:
        self._random = random.Random(seed)
        self._longest_of_devices = math.inf if give_up_after is None else give_up_after / 4
        self.num_devices = 1
        """Of the run, this one included."""

    def next_wait(self, seconds_away: float) -> float:
        """
        In seconds.

        Args:
            seconds_away: how long there has been no connection.
        """
        of_the_time = min(LONGEST_WAIT, max(2 * SHORTEST_WAIT, SHARE_OF_TIME_AWAY * seconds_away))
        of_the_devices = min(self._longest_of_devices, SECONDS_A_DEVICE * self.num_devices)
        return self._random.uniform(SHORTEST_WAIT, max(of_the_time, of_the_devices))


class Reconnector:
    """
    Keeps what outlives a single connection: the bytes of all of them, when to dial again, and for how long this is tried.

    Args:
        dial: opens a connection.
        name: of this device; it seeds the `Backoff`.
        give_up_after: seconds without a connection, added up until `made_progress`; None tries forever.
        stopwatch: of all connections; the time without one is left out of it.
        log: hears when a connection is lost.
        sleep: waits for so many seconds.
        clock: gives seconds.
    """

    def __init__(
        self,
        dial: Dial,
        name: str,
        *,
        give_up_after: float | None = None,
        stopwatch: Stopwatch,
        log: DeviceLog,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._dial, self._give_up_after, self._stopwatch, self._log = dial, give_up_after, stopwatch, log
        self._sleep, self._clock = sleep, clock
        self.backoff = Backoff(name, give_up_after)
        self._connection: Connection | None = None
        self._seconds_away = 0.0
        """Without a connection since there was progress, counted up to `_counted_until`."""
        self._counted_until = 0.0
        self._patience = Patience()
        self._earlier_bytes = 0
        """Of the connections before this one."""
        self.activation_cache: ActivationCache | None = None
        """Set by `use_cache`."""

    @property
    def is_connected(self) -> bool:
        return self._connection is not None

    @property
    def connection(self) -> Connection:
        """
        Raises:
            ConnectionFailed: there is none.
        """
        if self._connection is None:
            raise ConnectionFailed("not connected")
        return self._connection

    @property
    def num_bytes(self) -> int:
        """Bytes of all messages on all connections so far, both ways."""
        return self._earlier_bytes + (self._connection.num_bytes if self._connection else 0)

    def use_cache(self, cache: ActivationCache | None) -> None:
        """Let the conversations on this connection and on all later ones keep the samples' activations there."""
        self.activation_cache = cache
        if self._connection is not None:
            self._connection.session.activation_cache = cache

    def connect(self) -> Connection:
        """
        Dial once.

        Raises:
            ConnectionFailed, Refused, CertificateChanged: as `Connection`.
        """
        self._connection = self._dial()
        self._connection.watch_link(self._patience, num_devices=self.backoff.num_devices)
        self._connection.stopwatch, self._connection.session.activation_cache = self._stopwatch, self.activation_cache
        return self._connection

    def reconnect(self, error: ConnectionFailed, talk: Callable[[Connection], Result]) -> Result:
        """
        Dial again and ``talk`` on the new connection, until both succeed.

        Args:
            error: why there is no connection.

        Raises:
            ConnectionFailed: ``give_up_after`` would be exceeded.
            Whatever else dialling and ``talk`` raise: trying again is of no use then.
        """
        began = self._counted_until = self._clock()
        report_at = 0.0
        while True:
            self.drop()
            now = self._count_time_away()
            # A server that says when it has time again is not asked before, nor then by all to whom it has said so.
            wait = error.retry_after + self.backoff.next_wait(self._seconds_away)
            self._check_give_up(wait, error)
            if now - began >= report_at:
                level = "warning" if error.retry_after else "info"  # the user may be able to do something about it
                text = f"{error}; this device tries until there is a connection, next in {wait:.1f} s"
                self._log.tell("lost", text, level=level, seconds=round(now - began, 3))
                report_at = REMINDERS.next_after(now - began)
            else:
                logger.debug("%s; this device tries again in %.1f s", error, wait)
            self._sleep(wait)
            try:
                connection = self.connect()
                self._count_time_away()
                result = talk(connection)
            except ConnectionFailed as failed:
                error = failed
            else:
                self._stopwatch.leave_out(self._clock() - began)
                return result

    def made_progress(self) -> None:
        """A question was answered: the next time without a connection begins with short waits, and has the whole time."""
        self._seconds_away, self._patience.given_up = 0.0, 0

    def drop(self) -> None:
        """Close the connection without a word, as if this device had been killed."""
        if self._connection is not None:
            self._earlier_bytes += self._connection.num_bytes
            self._connection.abandon()  # not closed politely: a Goodbye would leave the run
            self._connection = None
            self._counted_until = self._clock()  # there was a connection until now, if only for a moment

    def _count_time_away(self) -> float:
        """Add the time since there was a connection; returns the present time."""
        now = self._clock()
        self._seconds_away, self._counted_until = self._seconds_away + now - self._counted_until, now
        return now

    def _check_give_up(self, wait: float, error: ConnectionFailed) -> None:
        if self._give_up_after is not None and self._seconds_away + wait > self._give_up_after:
            asked = f" (and wants to be asked again in {error.retry_after:g} s)" if error.retry_after else ""
            raise ConnectionFailed(f"{error}{asked}; gave up after {self._give_up_after:g} s")
