"""A device that waits long for an answer says so: for whom, and how long, again and again at growing distances."""

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType

from protocol import Ping, Pong, RemoteProtocolError
from terminal import count, duration, listed, plain

from .connection import ConnectionFailed, Dial, Refused
from .pinning import CertificateChanged

__all__ = ["Patience", "reason_to_wait"]

logger = logging.getLogger("edge_client")

FIRST_TOLD = 10.0  # seconds
TIMES_LATER = 3.0  # after 10 s, 30 s, 90 s, ...
LONGEST_BETWEEN = 3600.0
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_ANSWER = 10.0


class Patience:
    """
    Entered while this device does nothing but wait for the server.

    Args:
        reason: says what for; asked by another thread, since it may take a while.
        clock: gives seconds.
    """

    def __init__(self, reason: Callable[[], str], clock: Callable[[], float] = time.monotonic) -> None:
        self._reason, self._clock = reason, clock
        self._since: float | None = None
        self._told_after = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="patience", daemon=True)

    def __enter__(self) -> None:
        self._told_after, self._since = 0.0, self._clock()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._since = None

    def begin(self) -> None:
        """Watch, until `close`."""
        self._thread.start()

    def close(self) -> None:
        self._closed.set()

    def look(self) -> None:
        """Tell, if it is time."""
        since = self._since
        if since is None or self._clock() - since < self._next():
            return
        reason = self._reason()
        if self._since != since:
            return  # the answer has come meanwhile
        self._told_after = self._clock() - since
        logger.info("this device has waited %s: %s", duration(self._told_after), reason)

    def _next(self) -> float:
        """Seconds of waiting after which to tell."""
        return max(FIRST_TOLD, min(TIMES_LATER * self._told_after, self._told_after + LONGEST_BETWEEN))

    def _watch(self) -> None:
        while not self._closed.wait(SECONDS_BETWEEN_LOOKS):
            self.look()


def reason_to_wait(dial: Dial, own_name: str) -> str:
    """What the run waits for, as its server says on another connection."""
    try:
        with dial() as connection:
            pong = connection.exchange(Ping(), Pong, within=SECONDS_TO_ANSWER)
    except (ConnectionFailed, Refused, RemoteProtocolError, CertificateChanged) as error:
        return f"the server answers no second connection either: {error}"
    others = [name for name in pong.waiting_for if name != own_name]
    if others:
        return f"the run waits for {plain(listed(others))} (silent for {duration(pong.waiting_seconds)})"
    if own_name in pong.waiting_for:
        return "its own message is still on the way to the server"
    if pong.joined < pong.clients:
        return f"{pong.joined} of {count(pong.clients, 'device')} are connected"
    # It may compute for this device, or for others that still have data when this one's has ended.
    return f"the server is at work, {count(pong.step, 'step')} finished"
