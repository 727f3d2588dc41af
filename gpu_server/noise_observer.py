"""Tells, and writes to run.json, what the noise of every device is worth."""

from concurrent.futures import Future
from typing import Any

from privacy import NoiseReport
from protocol import RunSettings

from .federation import Federation, Member
from .history import RunEvent, tell
from .serving import Journal, Observer

__all__ = ["NoiseObserver"]

WHEN_MEMBERS_CHANGE = ("joined", "back", "training_started")


class NoiseObserver(Observer):
    """
    Of a run with noise. How much data a device has, in which batches, and how long its texts are, is known when it has joined.

    Raises:
        ServerError: run.json cannot be written; from the event after that.
    """

    def __init__(self, federation: Federation, journal: Journal) -> None:
        self._federation, self._journal = federation, journal
        self._worth: dict[str, dict[str, Any]] = {}
        """By member: its report, as run.json has it."""
        self._is_complete = False
        """Whether the run has started: from then on its members, and what they have joined with, stay."""
        self._written: Future[None] | None = None

    def event_happened(self, event: RunEvent) -> None:
        if self._written is not None and self._written.done():
            self._written.result()
        if self._is_complete or event.kind not in WHEN_MEMBERS_CHANGE:
            return
        self._is_complete = self._federation.total_steps > 0
        members = self._federation.members
        gone, newcomers = self._worth.keys() - members.keys(), members.keys() - self._worth.keys()
        for name in gone:
            del self._worth[name]
        for name in newcomers:
            report = _report(self._federation.settings, members[name])
            self._worth[name] = report.as_json()
            tell("noise", f"{name}: {report}", client=name)
        if gone or newcomers:
            self._written = self._journal.write_noise(dict(self._worth))


def _report(settings: RunSettings, member: Member) -> NoiseReport:
    join = member.join
    report = NoiseReport.in_run(
        settings,
        steps=member.last_step,
        num_samples=join.num_samples,
        batch_size=join.batch_size,
        longest=join.longest,
    )
    assert report is not None  # this run has noise
    return report
