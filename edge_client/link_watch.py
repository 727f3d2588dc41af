"""Notices a link that carries nothing any more and has told nobody: a network that is gone, a router that was restarted."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Link", "LinkWatch", "Patience"]

SECONDS_BETWEEN_LOOKS = 0.25
SHORTEST_QUIET, LONGEST_QUIET = 1.0, 30.0
"""Seconds without a byte after which the server is asked for a sign of life; twice as long after each that it has given."""
SECONDS_A_DEVICE = 0.002
"""Of the run: so many devices ask for at most five hundred signs of life a second, which take a server 5 % of a core."""
PATIENCE = 3.0
"""Seconds for that sign, from when the other side's system has the question, as long as none has taken half as long."""
MOST_RETRANSMISSIONS = 4
"""In a row, of which the other side's system has acknowledged none. Their distances double from a fifth of a second on: 3 s."""


class Link(Protocol):
    """What a `LinkWatch` sees of a connection, and does with it. Nothing here waits."""

    @property
    def num_received(self) -> int:
        """Bytes that have arrived so far."""
        ...

    def is_delivered(self) -> bool:
        """Whether the other side's system has all that was sent, as far as this one knows."""
        ...

    def retransmissions(self) -> int:
        """How often in a row this side's system has said something again, or asked for room, and got no acknowledgement."""
        ...

    def ping(self) -> None:
        """Ask the other side for a sign of life, behind what is being sent."""
        ...

    def give_up(self) -> None:
        """End it, for whoever waits for an answer on it."""
        ...


@dataclass
class Patience:
    """How long a device waits for signs of life: what it has learnt of its link, over all connections."""

    given_up: int = 0
    """
    Connections in a row that were, and brought no answer before: each makes the next one twice as patient. A link that is worse
    than we think would else never carry a long message to its end.
    """
    slowest_sign: float = 0.0
    """
    Seconds that a sign of life has taken at most. A relay on the way, such as a tunnel or a proxy, acknowledges what it has
    not passed on yet: behind one with a slow link, the sign comes when the message before the question has arrived.
    """

    @property
    def seconds(self) -> float:
        """For a sign of life."""
        return max(PATIENCE, 2 * self.slowest_sign) * 2.0**self.given_up

    @property
    def retransmissions(self) -> int:
        """In a row."""
        return MOST_RETRANSMISSIONS + self.given_up


class LinkWatch:
    """
    Gives a link up when it is dead: when the other side's system acknowledges nothing, or the server says nothing though a
    question for a sign of life has reached it. A message that takes long is no silence: as long as its bytes come, or are
    acknowledged, the link lives.

    It decides when a device connects again, and nothing of what it then says.

    Args:
        patience: of this device; it learns from this link.
        num_devices: of the run.
    """

    def __init__(
        self, link: Link, patience: Patience, *, num_devices: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._link, self._patience, self._clock = link, patience, clock
        self._shortest = self._quiet = max(SHORTEST_QUIET, SECONDS_A_DEVICE * num_devices)
        self._looked_at, self._time = clock(), 0.0
        """When it was last looked, and the seconds that looks were made: a device that has slept has not listened."""
        self._received, self._heard_at = link.num_received, 0.0
        self._is_asked = False
        """Whether a sign of life is asked for."""
        self._reached_at: float | None = None
        """When it was first seen that the question has reached the other side."""
        self.has_given_up = False
        self._closed = threading.Event()

    def begin(self) -> None:
        """Look several times a second, on a thread of its own, until `close` or the link is given up."""
        threading.Thread(target=self._watch, name="link-watch", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self.has_given_up and not self._closed.wait(SECONDS_BETWEEN_LOOKS):
            self.look()

    def look(self) -> None:
        looked_at, received = self._clock(), self._link.num_received
        self._time += min(looked_at - self._looked_at, 2 * SECONDS_BETWEEN_LOOKS)
        self._looked_at, now = looked_at, self._time
        if received != self._received:
            if self._reached_at is not None:
                self._patience.slowest_sign = max(self._patience.slowest_sign, now - self._reached_at)
            # What comes unasked is what this device waits for; after that a short silence tells something again.
            longest = max(LONGEST_QUIET, self._shortest)
            self._quiet = min(longest, 2 * self._quiet) if self._is_asked else self._shortest
            self._received, self._heard_at, self._is_asked, self._reached_at = received, now, False, None
        if self._link.retransmissions() >= self._patience.retransmissions or self._is_silent(now):
            self.has_given_up = True
            self._patience.given_up += 1
            self._link.give_up()

    def _is_silent(self, now: float) -> bool:
        if not self._is_asked:
            if now - self._heard_at >= self._quiet:
                self._is_asked = True
                self._link.ping()
            return False
        if not self._link.is_delivered():
            self._reached_at = None
            return False
        if self._reached_at is None:
            self._reached_at = now
        return now - self._reached_at >= self._patience.seconds
