"""Where a device's time goes: into computing, waiting for the server, and the link."""

import time
from collections.abc import Callable
from dataclasses import replace

from protocol import ActivationGradient, EdgeAdapter, HiddenStates, Message, Seconds

__all__ = ["Stopwatch", "difference"]


class Stopwatch:
    """
    Divides the time since it was made into the parts of `Seconds`. What no other part claims is the device's own computing.

    Args:
        now: seconds of a monotonic clock.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self._began = now()
        self._spent = Seconds()
        self._lap_began = Seconds()

    def read(self) -> Seconds:
        """The parts until now."""
        others = sum(vars(self._spent).values())
        return replace(self._spent, edge_compute=max(0.0, self.now() - self._began - others))

    def lap(self) -> Seconds:
        """The time since `lap` was called last; a new lap begins."""
        now, before = self.read(), self._lap_began
        self._lap_began = now
        return difference(now, before)

    def add(self, **seconds: float) -> None:
        """Add seconds to the parts that are named."""
        self._spent = replace(self._spent, **{part: getattr(self._spent, part) + more for part, more in seconds.items()})

    def leave_out(self, seconds: float) -> None:
        """Count so many seconds for no part, such as those without a connection."""
        self._began += seconds

    def answered(self, answer: Message, *, waited: float, under_way: float, share_up: float) -> None:
        """
        Divide the time in which this side only waited for an answer.

        So is the time until the server asks back, and that from this side's reply to the answer: each is a way of its own.

        A question's whole way is uplink, queue, the server's computing, downlink. This side computes during the first part of
        it and waits during the last, so the wait is filled from the way's end.

        Args:
            waited: seconds since waiting began.
            under_way: seconds since the question was handed over to be sent.
            share_up: the question's share of the bytes of both; links are taken to be as fast in both directions.
        """
        queue, server_compute = 0.0, 0.0
        if isinstance(answer, HiddenStates | ActivationGradient | EdgeAdapter):
            queue, server_compute = answer.queue_seconds, answer.compute_seconds
        link = max(0.0, under_way - queue - server_compute)
        left = waited
        way = {"downlink": link * (1 - share_up), "server_compute": server_compute, "queue": queue}
        for part, seconds in way.items():
            self.add(**{part: min(left, max(0.0, seconds))})
            left -= min(left, max(0.0, seconds))
        self.add(uplink=left)


def difference(later: Seconds, earlier: Seconds) -> Seconds:
    """By part; never below zero, whatever rounding does."""
    return Seconds(**{part: max(0.0, seconds - getattr(earlier, part)) for part, seconds in vars(later).items()})
