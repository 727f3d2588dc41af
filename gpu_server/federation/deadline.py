"""How long a step waits for its clients."""

from collections import defaultdict, deque
from statistics import median

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
        self._seen: defaultdict[type, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._derived: dict[type, float] = {}
        """From all that was seen of a kind so far: it is asked for more often than something is seen."""

    def observe(self, kind: type, seconds: float) -> bool:
        """A client took so long for a question of this kind. Says whether just now enough is known to derive a deadline."""
        seen = self._seen[kind]
        seen.append(seconds)
        self._derived.pop(kind, None)
        return self._seconds is None and len(seen) == NEEDED

    def seconds(self, kind: type) -> float:
        return self._seconds if self._seconds is not None else self._measured(kind, UNTIL_KNOWN, SHORTEST)

    def seconds_until_report(self, kind: type) -> float:
        """Seconds after which a wait for such a question is worth telling, whether or not anything can be done about it."""
        return self._seconds if self._seconds is not None else self._measured(kind, REPORT_UNTIL_KNOWN, SHORTEST_UNTIL_REPORT)

    def _measured(self, kind: type, until_known: float, shortest: float) -> float:
        seen = self._seen[kind]
        if len(seen) < NEEDED:
            return until_known
        if kind not in self._derived:
            middle = median(seen)
            self._derived[kind] = middle + DEVIATIONS * median(abs(value - middle) for value in seen)
        return max(shortest, self._derived[kind])
