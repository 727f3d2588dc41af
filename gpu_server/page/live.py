"""Follows the run for its open pages, and tells them what is new."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from ..federation import StepRecord
from ..history import EvaluationRecord, RunEvent, tell
from ..serving import Observer, Viewers
from .snapshot import Happened, Snapshot

__all__ = ["PageObserver"]

SECONDS_BETWEEN_UPDATES = 0.5
SECONDS_WITHOUT_NEWS = 5.0
"""After so long pages are told how things are though nothing has happened: who is waited for, since when."""
LAST_WORDS = {"complete", "stopped", "failed"}
"""From such an event on the server may be gone before the next update would come: all is told at once."""


class PageObserver(Observer):
    """
    Gathers what happens, and tells all pages at once, twice a second at most. What they are told is made once for all of them;
    where no page is open it is not made.

    Args:
        snapshot: of a run of which nothing has happened yet.
        waits_for: whom the run waits for just now, and for how many seconds.
        is_evaluating: whether a device measures its held-out loss just now.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        waits_for: Callable[[], tuple[Iterable[str], float]],
        is_evaluating: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.viewers = Viewers(self._everything_told)
        self._snapshot, self._waits_for, self._is_evaluating = snapshot, waits_for, is_evaluating
        self._news: list[Happened] = []
        self._checkpoint: int | None = None
        """Its step, where one was written since pages were told last."""
        self._encoded: str | None = None
        """The snapshot, as long as it is the same."""
        self._is_recalling = False
        """Meanwhile the snapshot belongs to another thread."""
        self._unreadable: Exception | None = None
        self._is_ending = False
        """Whether one of `LAST_WORDS` was said."""
        self._told = float("-inf")
        self._timer: asyncio.TimerHandle | None = None

    def recall(self, happened: Iterable[Happened], checkpoint: tuple[int, float] | None) -> None:
        """
        Begin with what the run's files have of earlier servers, as far as they can be read. That takes seconds where there are
        a hundred thousand steps, for which neither the run nor its devices wait; pages do.

        Args:
            checkpoint: the last that is in them; see `RunFiles.last_checkpoint`.
        """
        self._is_recalling = True
        threading.Thread(target=self._recall, args=(happened, checkpoint), name="recall", daemon=True).start()

    def _recall(self, happened: Iterable[Happened], checkpoint: tuple[int, float] | None) -> None:
        try:
            for each in happened:
                self._snapshot.add(each)
            self._snapshot.overview.checkpoint_found(checkpoint)
        except Exception as error:  # it is no reason not to train, and pages are told
            self._unreadable = error
        finally:
            self._is_recalling = False

    def step_finished(self, record: StepRecord) -> None:
        self._news.append(record)
        self._tell_soon()

    def evaluated(self, record: EvaluationRecord) -> None:
        self._news.append(record)
        self._tell_soon()

    def checkpoint_written(self, step: int) -> None:
        self._checkpoint = step
        self._tell_soon()

    def event_happened(self, event: RunEvent) -> None:
        self._news.append(event)
        self._is_ending |= event.kind in LAST_WORDS
        self._tell_soon()

    def overview(self, most_devices: int) -> dict[str, Any] | None:
        """
        How the run stands, half a second ago at most, with so many devices listed at most; None while what was before is not
        read yet.
        """
        if self._is_recalling:
            return None
        now, overview = time.time(), self._snapshot.overview
        overview.waits_for(*self._waits_for(), now, self._is_evaluating)
        return overview.as_json(now, most_devices)

    def _everything_told(self) -> str | None:
        """What pages know by now, for one that has just come; None where that is not read yet. The rest all hear together."""
        if self._is_recalling:
            self._tell_soon()
            return None
        self._tell_at(asyncio.get_running_loop().time() + SECONDS_WITHOUT_NEWS)
        if self._encoded is None:
            self._encoded = self._snapshot.everything(time.time())
        return self._encoded

    def _tell_soon(self) -> None:
        if self._is_ending and not self._is_recalling:
            self._tell()
        else:
            self._tell_at(self._told + SECONDS_BETWEEN_UPDATES)

    def _tell_at(self, when: float) -> None:
        """At this time of the loop's clock, unless it is to be earlier anyway."""
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(when, self._tell)

    def _tell(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._encoded, self._told = None, None, asyncio.get_running_loop().time()
        if self._is_recalling:
            self._tell_soon()
            return
        if self._unreadable is not None:
            text, self._unreadable = f"the page does not show all that was before: {self._unreadable}", None
            tell("note", text, level="warning")
        news, self._news = self._news, []
        for each in news:
            self._snapshot.add(each)
        now, overview = time.time(), self._snapshot.overview
        if self._checkpoint is not None:
            overview.checkpoint_written(self._checkpoint, now)
            self._checkpoint = None
        if len(self.viewers):
            overview.waits_for(*self._waits_for(), now, self._is_evaluating)
            self.viewers.tell(self._snapshot.update(news, now))
            self._tell_at(self._told + SECONDS_WITHOUT_NEWS)
