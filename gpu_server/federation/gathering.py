"""What a step waits for, with whom it may go on, and when the operator hears that it waits."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from terminal import Reminders, count, duration, listed

from .deadline import Deadline
from .turnout import Turnout

__all__ = ["Gathering", "Verdict"]

TIMES_LATER, LONGEST_BETWEEN_REPORTS = 2.0, 3600.0
"""A wait is told of again when it has become twice as long as when it was told before, and every hour (seconds)."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What comes of a gathering: wait, go, or say."""

    go: list[str] = field(default_factory=list)
    """Clients with whom to go on; empty: wait."""
    say: str = ""
    """What the operator is told: that the wait has become long, or without whom the run goes on."""
    silent: tuple[str, ...] = ()
    """Whom that is about."""


@dataclass
class Gathering:
    """
    The questions of one kind that the run waits for, since one moment: every phase that waits has its own.

    Args:
        kind: class of the questions.
        since: when it began; every ``now`` is of the same clock.
        deadline: how long clients of this run take for such questions.
        quorum: clients that are enough once the deadline has passed; None: all are needed, however long it takes.
        turnout: the members whose questions the run waits for, and those of them that have asked.
    """

    kind: type
    since: float
    deadline: Deadline
    quorum: int | None
    turnout: Turnout
    _is_late: bool = False
    """The deadline has passed: from now on time alone changes nothing, but one more that asks may be enough."""
    _told_after: float = 0.0
    """Seconds from the beginning until the wait was told of last; 0: it was not yet."""

    def verdict(self, step: int, now: float) -> Verdict:
        """
        Args:
            step: for which it is gathered.

        It remembers that it has said something, so that it does not say it at every call.
        """
        come, awaited, num_wanted = self.turnout.come, self.turnout.awaited, len(self.turnout)
        needed = num_wanted if self.quorum is None else min(self.quorum, num_wanted)
        enough = len(come) >= needed
        if enough and not awaited:
            return Verdict(go=sorted(come))
        self._is_late = self.quorum is not None and now - self.since >= self.deadline.seconds(self.kind)
        if enough and self._is_late:
            silent = sorted(awaited)
            without = f"{self._listed(silent)}, silent for {duration(now - self.since)}"
            return Verdict(go=sorted(come), say=f"step {step} goes on without {without}", silent=tuple(silent))
        if not self._is_worth_telling(now):
            return Verdict()
        silent = sorted(self.turnout.missing())
        waits = f"{self._listed(silent)}, silent for {duration(now - self.since)}"
        least = "" if self.quorum is None else f", {needed} needed"
        ready_of = f"{len(come)} of {count(num_wanted, 'device')} ready"
        return Verdict(say=f"step {step} waits for {waits}; {ready_of}{least}", silent=tuple(silent))

    def newcomers(self, joined: Collection[str], clients: int, now: float) -> Verdict:
        """
        The same of a run that has not started: it goes on when so many ``clients`` have joined, and with no fewer.
        """
        if len(joined) == clients:
            return Verdict(go=list(joined))
        if not joined or not self._is_worth_telling(now):
            return Verdict()
        more, waited = count(clients - len(joined), "more device"), duration(now - self.since)
        return Verdict(say=f"the run waits for {more} to join, for {waited}; {listed(joined)} joined")

    def expires(self) -> float:
        """When a verdict may be another one though nobody has asked anything."""
        seconds = self._next_report()
        if self.quorum is not None and not self._is_late:
            seconds = min(seconds, self.deadline.seconds(self.kind))
        return self.since + seconds

    def _is_worth_telling(self, now: float) -> bool:
        waited = now - self.since
        if waited < self._next_report():
            return False
        self._told_after = waited
        return True

    def _next_report(self) -> float:
        """Seconds from the beginning."""
        first = self.deadline.seconds_until_report(self.kind)
        reminders = Reminders(first=first, times_later=TIMES_LATER, longest_between=LONGEST_BETWEEN_REPORTS)
        return reminders.next_after(self._told_after)

    def _listed(self, names: Iterable[str]) -> str:
        return listed(f"{name} ({why})" if (why := self.turnout.why_missing(name)) else name for name in names)
