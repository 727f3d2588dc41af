"""A device that waits long for an answer says for whom and how long, and repeats that at growing distances."""

import threading
import time
from collections.abc import Callable
from types import TracebackType

from protocol import Ping, Pong, RemoteProtocolError
from terminal import Reminders, count, duration, listed, plain

from .connection import ConnectionFailed, Dial, Refused
from .device_log import DeviceLog
from .pinning import CertificateChanged

__all__ = ["WaitReports", "reason_to_wait"]

REMINDERS = Reminders(first=10.0, times_later=3.0, longest_between=3600.0)  # after 10 s, 30 s, 90 s, ..., then every hour
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_ANSWER = 10.0


class WaitReports:
    """
    Entered while this device does nothing but wait for an answer of the server.

    Args:
        reason: says what the server is waiting for. It is called on a thread of its own, since it asks the server on a second
            connection, which may take a while.
        log: hears what it is.
        clock: gives seconds.
    """

    def __init__(self, reason: Callable[[], str], log: DeviceLog, clock: Callable[[], float] = time.monotonic) -> None:
        self._reason, self._log, self._clock = reason, log, clock
        self._since: float | None = None
        """When the present wait began; None while nothing is waited for."""
        self._told_after = 0.0
        """Seconds that the present wait had lasted when it was last reported; 0 if it has not been."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="wait-reports", daemon=True)

    def __enter__(self) -> None:
        self._told_after, self._since = 0.0, self._clock()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._since = None

    def begin(self) -> None:
        """Look once a second, on a thread of its own, until `close`."""
        self._thread.start()

    def close(self) -> None:
        self._closed.set()

    def look(self) -> None:
        """Report the present wait, if it is time to."""
        since = self._since
        if since is None or self._clock() - since < REMINDERS.next_after(self._told_after):
            return
        reason = self._reason()  # takes a while, and the thread that waits does not stop for it
        if self._since != since:
            return  # the answer came while the server was asked for the reason
        self._told_after = self._clock() - since
        text = f"this device has waited {duration(self._told_after)}: {reason}"
        self._log.tell("waiting", text, seconds=round(self._told_after, 3))

    def _watch(self) -> None:
        while not self._closed.wait(SECONDS_BETWEEN_LOOKS):
            self.look()


def reason_to_wait(dial: Dial, own_name: str) -> str:
    """What the run waits for, as the server says when it is asked on a second connection."""
    try:
        with dial() as connection:
            pong = connection.exchange(Ping(), Pong, within=SECONDS_TO_ANSWER)  # the first connection waits for its answer
    except (ConnectionFailed, Refused, RemoteProtocolError, CertificateChanged) as error:
        return f"the server cannot be asked why, a second connection to it fails: {error}"
    others = [name for name in pong.waiting_for if name != own_name]
    if others:
        return f"the run waits for {plain(listed(others))} (silent for {duration(pong.waiting_seconds)})"
    if own_name in pong.waiting_for:
        return "its own message is still on the way to the server"
    if pong.joined < pong.clients:
        return f"{pong.joined} of {count(pong.clients, 'device')} are connected"
    # The server may compute for this device, or for others that still have data when this one has none left.
    return f"the server is at work, {count(pong.step, 'step')} finished"
