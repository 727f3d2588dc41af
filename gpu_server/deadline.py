"""How long a step waits for its clients."""

from collections import defaultdict, deque
from statistics import median

__all__ = ["Deadline"]

REMEMBERED = 100
NEEDED = 5
UNTIL_KNOWN = 300.0
SHORTEST = 1.0
"""
Seconds. Answers of a small model take milliseconds and deviate by less: a pause of the system would make a client late.
"""


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

    def observe(self, kind: type, seconds: float) -> bool:
        """A client took so long for a question of this kind. Says whether just now enough is known to derive a deadline."""
        seen = self._seen[kind]
        seen.append(seconds)
        return self._seconds is None and len(seen) == NEEDED

    def seconds(self, kind: type) -> float:
        if self._seconds is not None:
            return self._seconds
        seen = self._seen[kind]
        if len(seen) < NEEDED:
            return UNTIL_KNOWN
        middle = median(seen)
        return max(SHORTEST, middle + 6 * median(abs(value - middle) for value in seen))
