"""When to speak again of something that lasts."""

import math
from dataclasses import dataclass

__all__ = ["Reminders"]


@dataclass(frozen=True, kw_only=True)
class Reminders:
    """
    Growing distances between reports of one wait: whoever reads a log wants to know soon that something waits, and then not to
    read it every minute. All in seconds since the wait began.
    """

    first: float
    """No report after the wait has begun comes earlier than this."""
    times_later: float
    """The next report comes when the wait has lasted this many times as long as at the last report, ..."""
    longest_between: float = math.inf
    """... or so much longer, whichever is earlier."""

    def next_after(self, told: float) -> float:
        """
        When to tell next.

        Args:
            told: how long the wait had lasted when it was told last; 0 if it has not been.
        """
        return max(self.first, min(self.times_later * told, told + self.longest_between))
