"""All of a run that its page shows, and what is new of it, as JSON."""

import json
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..federation import StepRecord
from ..history import EvaluationRecord, RunEvent
from ..history.curve import Curve
from ..history.overview import Overview

__all__ = ["Happened", "Snapshot"]

EVENTS_SHOWN = 50
MOST_DEVICES = 100
"""That a page lists; see `Overview.as_json` which."""
MOST_MARKS = 200
MOST_EVALUATIONS = 500

Happened = StepRecord | EvaluationRecord | RunEvent


class Snapshot:
    """
    What a page that is opened now has to know, in an amount that does not grow with the run.

    Args:
        overview: of a run of which nothing has happened yet.
    """

    def __init__(self, overview: Overview) -> None:
        self.overview = overview
        self._curve = Curve()
        self._evaluations: dict[str, list[EvaluationRecord]] = {}
        """By client, in the order of time."""
        self._num_evaluations = 0
        self._marks: list[dict[str, Any]] = []
        self._events: deque[RunEvent] = deque(maxlen=EVENTS_SHOWN)

    def add(self, happened: Happened) -> None:
        """What happened next."""
        self.overview.add(happened)
        if isinstance(happened, StepRecord):
            self._curve.add(happened)
        elif isinstance(happened, EvaluationRecord):
            self._add_evaluation(happened)
        else:
            self._add_event(happened)

    def everything(self, now: float) -> str:
        """
        For a page that knows nothing.

        Args:
            now: seconds since 1970, UTC.
        """
        overview, evaluations = self.overview.as_json(now, MOST_DEVICES), self._evaluations_in_order()
        return _json("snapshot", overview, self._curve, evaluations, self._marks, self._events)

    def update(self, news: Sequence[Happened], now: float) -> str:
        """For a page that knows all but this, which was added."""
        curve = Curve()
        for each in news:
            if isinstance(each, StepRecord):
                curve.add(each)
        evaluations = [each for each in news if isinstance(each, EvaluationRecord)][-MOST_EVALUATIONS:]
        events = [each for each in news if isinstance(each, RunEvent)]
        return _json(
            "update",
            self.overview.as_json(now, MOST_DEVICES),
            curve,
            evaluations,
            _marks_of(events),
            _shown(events)[-EVENTS_SHOWN:],
        )

    def _add_evaluation(self, evaluation: EvaluationRecord) -> None:
        self._evaluations.setdefault(evaluation.client, []).append(evaluation)
        self._num_evaluations += 1
        if self._num_evaluations > MOST_EVALUATIONS:
            # Every second goes, of each client; the newest stays.
            self._keep_evaluations(each for kept in self._evaluations.values() for each in kept[::-2][::-1])
            if self._num_evaluations > 0.75 * MOST_EVALUATIONS:  # too many clients for that: the newest half stays
                self._keep_evaluations(self._evaluations_in_order()[-MOST_EVALUATIONS // 2 :])

    def _keep_evaluations(self, kept: Iterable[EvaluationRecord]) -> None:
        self._num_evaluations, self._evaluations = 0, {}
        for each in sorted(kept, key=lambda each: each.time):
            self._evaluations.setdefault(each.client, []).append(each)
            self._num_evaluations += 1

    def _evaluations_in_order(self) -> list[EvaluationRecord]:
        return sorted((each for kept in self._evaluations.values() for each in kept), key=lambda each: each.time)

    def _add_event(self, event: RunEvent) -> None:
        self._events.extend(_shown([event]))
        self._marks += _marks_of([event])
        if len(self._marks) > MOST_MARKS:
            checkpoints = [mark for mark in self._marks if mark["kind"] == "checkpoint"]
            gone = {id(mark) for mark in checkpoints[::2]}
            self._marks = [mark for mark in self._marks if id(mark) not in gone][-MOST_MARKS:]


def _shown(events: Iterable[RunEvent]) -> list[RunEvent]:
    """Those that people read; a checkpoint is a mark on the axis."""
    return [event for event in events if event.level != "debug" and event.kind != "checkpoint"]


def _marks_of(events: Iterable[RunEvent]) -> list[dict[str, Any]]:
    """What stands on the axis of time."""
    marks = []
    for event in events:
        if event.kind in ("checkpoint", "codec") or (event.kind == "server_started" and event.details.get("restarts")):
            kind = "restart" if event.kind == "server_started" else event.kind
            marks.append({"step": event.step, "time": event.time, "kind": kind})
    return marks


def _json(
    kind: str,
    overview: Mapping[str, Any],
    curve: Curve,
    evaluations: Sequence[EvaluationRecord],
    marks: Sequence[Mapping[str, Any]],
    events: Iterable[RunEvent],
) -> str:
    columns = ("step", "time", "client", "loss", "perplexity")
    message = {
        "kind": kind,
        "overview": overview,
        "curve": curve.as_json(),
        "evaluations": {name: [getattr(each, name) for each in evaluations] for name in columns},
        "marks": marks,
        "events": [event.as_json() for event in events],
    }
    try:
        return json.dumps(message, allow_nan=False, separators=(",", ":"))
    except ValueError:  # a loss that is no number any more, or a perplexity beyond all
        return json.dumps(_without_nan(message), allow_nan=False, separators=(",", ":"))


def _without_nan(value: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _without_nan(each) for name, each in value.items()}
    return [_without_nan(each) for each in value] if isinstance(value, list | tuple) else value
