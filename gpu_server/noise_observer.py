"""Tells, and writes to run.json, what the noise of every device is worth."""

from concurrent.futures import Future

from privacy import NoiseReport
from protocol import RunSettings

from .federation import Federation, Member, RunStatus
from .history import tell
from .serving import Journal, Observer

__all__ = ["NoiseObserver"]


class NoiseObserver(Observer):
    """
    Of a run with noise. How much data a device has, in which batches, and how long its texts are, is known when it has joined.

    Raises:
        ServerError: run.json cannot be written; from the status after that.
    """

    def __init__(self, federation: Federation, journal: Journal) -> None:
        self._federation, self._journal = federation, journal
        self._reports: dict[str, NoiseReport] = {}
        self._written: Future[None] | None = None

    def status_changed(self, status: RunStatus) -> None:
        if self._written is not None and self._written.done():
            self._written.result()
        members, before = self._federation.members, self._reports
        if members.keys() == before.keys():
            return  # what a member has joined with stays
        settings = self._federation.settings
        self._reports = {name: before.get(name) or _report(settings, member) for name, member in members.items()}
        for name in members.keys() - before.keys():
            tell("noise", f"{name}: {self._reports[name]}", client=name)
        self._written = self._journal.write_noise({name: report.as_json() for name, report in self._reports.items()})


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
