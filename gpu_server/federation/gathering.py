"""What a step waits for, with whom it may go on, and when the operator hears that it waits."""

from dataclasses import dataclass, field

from terminal import Reminders, duration

from .deadline import Deadline

__all__ = ["Gathering", "Verdict"]

TIMES_LATER, LONGEST_BETWEEN_REPORTS = 2.0, 3600.0
"""A wait is told of again when it has become twice as long as when it was told before, and every hour (seconds)."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What comes of a gathering: wait, go, or say."""

    go: list[str] = field(default_factory=list)
    """Clients with whom to go on; empty: wait."""
    without: list[str] = field(default_factory=list)
    """Clients that are waited for no longer, since the deadline has passed."""
    is_worth_telling: bool = False
    """Whether the wait has become long enough to be told of, once more."""


@dataclass
class Gathering:
    """
    The questions of one kind that the run waits for, since one moment: every phase that waits has its own.

    Args:
        kind: class of the questions.
        since: when it began; every ``now`` is of the same clock.
        quorum: clients that are enough once the deadline has passed; None: all are needed, however long it takes.
    """

    kind: type
    since: float
    deadline: Deadline
    quorum: int | None
    _is_late: bool = False
    """The deadline has passed with too few clients: from now on one more that asks may be enough."""
    _told_after: float = 0.0
    """Seconds from the beginning until the wait was told of last; 0: it was not yet."""

    def verdict(self, ready: list[str], missing: list[str], absent: set[str], now: float) -> Verdict:
        """
        Args:
            ready: clients that have asked.
            missing: clients that have not, though they are wanted.
            absent: of these, those that need not be waited for, if a quorum is there without them.
        """
        wanted = len(ready) + len(missing)
        awaited = [name for name in missing if name not in absent]
        enough = len(ready) >= self.needed(wanted)
        if enough and not awaited:
            return Verdict(go=ready)
        self._is_late = self.quorum is not None and now - self.since >= self.deadline.seconds(self.kind)
        if enough and self._is_late:
            return Verdict(go=ready, without=awaited)
        return Verdict(is_worth_telling=self.is_worth_telling(now))

    def needed(self, wanted: int) -> int:
        """Clients that have to ask before the step may go on."""
        return wanted if self.quorum is None else min(self.quorum, wanted)

    def is_worth_telling(self, now: float) -> bool:
        waited = now - self.since
        if waited < self._next_report():
            return False
        self._told_after = waited
        return True

    def expires(self) -> float:
        """When a verdict may be another one though nobody has asked anything."""
        seconds = self._next_report()
        if self.quorum is not None and not self._is_late:
            seconds = min(seconds, self.deadline.seconds(self.kind))
        return self.since + seconds

    def waited(self, now: float) -> str:
        return duration(now - self.since)

    def _next_report(self) -> float:
        """Seconds from the beginning."""
        first = self.deadline.patience(self.kind)
        reminders = Reminders(first=first, times_later=TIMES_LATER, longest_between=LONGEST_BETWEEN_REPORTS)
        return reminders.next_after(self._told_after)
