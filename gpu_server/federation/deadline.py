"""How long a step waits for its clients."""

import math
from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Callable

__all__ = ["Deadline"]

REMEMBERED, NEEDED = 100, 5
"""Of the times that clients took for one kind of question."""
DEVIATIONS = 6
"""Whoever is slower than the median by six times the median deviation is not just slow: something is wrong there."""
UNTIL_KNOWN = 300.0
"""Seconds."""
SHORTEST = 1.0
"""Seconds. Answers of a small model take milliseconds and deviate by less: a pause of the system would make a client late."""
REPORT_UNTIL_KNOWN, SHORTEST_UNTIL_REPORT = 30.0, 5.0
"""Seconds, before which a wait is not worth a line."""


class Deadline:
    """
    The time a client has for its next question.

    Args:
        seconds: as the operator set it; None derives it from the times that clients took, median + 6 x median deviation,
            for each kind of question. Until five have been seen it is five minutes.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = seconds
        self._seen: defaultdict[type, _Seen] = defaultdict(_Seen)

    def observe(self, kind: type, seconds: float) -> bool:
        """A client took so long for a question of this kind. Says whether just now enough is known to derive a deadline."""
        seen = self._seen[kind]
        seen.add(seconds)
        return self._seconds is None and len(seen.in_order) == NEEDED

    def seconds(self, kind: type) -> float:
        return self._seconds if self._seconds is not None else self._measured(kind, UNTIL_KNOWN, SHORTEST)

    def seconds_until_report(self, kind: type) -> float:
        """Seconds after which a wait for such a question is worth telling, whether or not anything can be done about it."""
        return self._seconds if self._seconds is not None else self._measured(kind, REPORT_UNTIL_KNOWN, SHORTEST_UNTIL_REPORT)

    def _measured(self, kind: type, until_known: float, shortest: float) -> float:
        seen = self._seen[kind]
        return until_known if len(seen.in_order) < NEEDED else max(shortest, seen.longest_usual())


class _Seen:
    """The last times of one kind, kept in order: every message brings one, and asks for a deadline afterwards."""

    def __init__(self) -> None:
        self.in_order: list[float] = []
        self._in_time: deque[float] = deque()
        self._derived: float | None = None
        """From all of them; it is asked for more often than one is added."""

    def add(self, seconds: float) -> None:
        if len(self._in_time) == REMEMBERED:
            del self.in_order[bisect_left(self.in_order, self._in_time.popleft())]
        self._in_time.append(seconds)
        insort(self.in_order, seconds)
        self._derived = None

    def longest_usual(self) -> float:
        """The median and `DEVIATIONS` times the median deviation from it."""
        if self._derived is None:
            number = len(self.in_order)
            middle = _median(number, self.in_order.__getitem__)
            self._derived = middle + DEVIATIONS * _median(number, lambda place: self._deviation(place, middle))
        return self._derived

    def _deviation(self, place: int, middle: float) -> float:
        """The deviation from ``middle`` that has this place among all, the smallest has place 0."""
        values = self.in_order

        def reaches_further_up(first: int) -> bool:
            return values[first + place] - middle >= middle - values[first]

        # So many values in a row, where their largest deviation is smallest: either the first row whose last value deviates
        # more than its first does, or the row before it.
        num_rows = len(values) - place
        first = bisect_left(range(num_rows), True, key=reaches_further_up)
        above = values[first + place] - middle if first < num_rows else math.inf
        below = middle - values[first - 1] if first else math.inf
        return min(above, below)


def _median(number: int, value_at: Callable[[int], float]) -> float:
    """Of so many values, which are asked for by their place among all."""
    half = number // 2
    return value_at(half) if number % 2 else (value_at(half - 1) + value_at(half)) / 2
