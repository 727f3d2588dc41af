"""Reads what a run has written, while it is served and afterwards."""

import heapq
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from storage import RunDescription

from ..errors import ServerError
from ..federation import StepRecord
from ..run_lock import is_served
from .events import RunEvent
from .line_file import LineFile
from .records import EvaluationRecord, record_of

__all__ = ["CHECKPOINTS", "EVALUATIONS", "EVENTS", "METRICS", "HistoryError", "RunFiles", "checkpoint_files"]

METRICS, EVENTS, EVALUATIONS = "metrics.jsonl", "events.jsonl", "evaluations.jsonl"
CHECKPOINTS = "checkpoints"

Line = TypeVar("Line")


class HistoryError(ServerError):
    """A folder holds no run, or a file of it cannot be read."""


class RunFiles:
    """
    The files of one run. Nothing is read before it is asked for; a line that is being written just now is left out.

    Raises:
        HistoryError: the folder holds no run.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir
        description = RunDescription.read(run_dir, HistoryError) if run_dir.is_dir() else None
        if description is None:
            raise HistoryError(f"{run_dir} holds no run; give the folder that a server has as --run-dir")
        self.description: RunDescription = description

    @property
    def is_served(self) -> bool:
        """Whether a server has the run just now."""
        return is_served(self.path)

    def steps(self) -> Iterator[StepRecord]:
        """
        In their order; none where no step is finished yet.

        Raises:
            HistoryError: a line cannot be read.
        """
        return self._lines(METRICS, record_of)

    def last_step_time(self) -> float | None:
        """
        When the last step was finished, in seconds since 1970, found without reading those before it. None where no step says
        so, or a crash has left something else in its place.

        Raises:
            HistoryError: the file cannot be read.
        """
        file = LineFile(self.path / METRICS)
        try:
            line = file.last()
            return None if line is None else record_of(json.loads(line)).time or None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            return None
        except OSError as error:
            raise HistoryError(f"{file.path} cannot be read: {error.strerror or error}") from None

    def events(self) -> Iterator[RunEvent]:
        """The earliest first; none of a run of before there was events.jsonl. Raises as `steps`."""
        return self._lines(EVENTS, RunEvent.from_json)

    def num_events(self) -> int:
        """
        Raises:
            HistoryError: the file cannot be read.
        """
        try:
            return sum(1 for _ in LineFile(self.path / EVENTS).lines())
        except OSError as error:
            raise HistoryError(f"{self.path / EVENTS} cannot be read: {error.strerror or error}") from None

    def evaluations(self) -> Iterator[EvaluationRecord]:
        """In the order in which they came; raises as `steps`."""
        return self._lines(EVALUATIONS, EvaluationRecord.from_json)

    def everything(
        self, *, last_step: int | None = None, num_events: int | None = None
    ) -> Iterator[StepRecord | EvaluationRecord | RunEvent]:
        """
        All three in the order of time: what whoever follows a run is told. Raises as `steps`.

        Args:
            last_step: of steps and evaluations that are wanted; None: all are.
            num_events: how many of the events are wanted, from the first on; None: all are.
        """
        steps = (record for record in self.steps() if last_step is None or record.number <= last_step)
        evaluations = (record for record in self.evaluations() if last_step is None or record.step <= last_step)
        return heapq.merge(steps, evaluations, itertools.islice(self.events(), num_events), key=lambda happened: happened.time)

    def last_checkpoint(self) -> tuple[int, float] | None:
        """Its step, and when it was written, in seconds since 1970. (Events tell of one a minute at most.)"""
        files = checkpoint_files(self.path / CHECKPOINTS)
        step = max(files, default=None)
        try:
            return None if step is None else (step, files[step].stat().st_mtime)
        except FileNotFoundError:  # just then it was put aside as damaged
            return None

    def _lines(self, name: str, parse: Callable[[Mapping[str, Any]], Line]) -> Iterator[Line]:
        file = LineFile(self.path / name)
        try:
            for path, number, line in file.lines():
                try:
                    parsed = parse(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                    served_with = self.description.versions.get("splitlora", "unknown")
                    raise HistoryError(
                        f"{path}, line {number} is nothing that this version reads; the run was served with version "
                        f"{served_with}: use that one, or a later one"
                    ) from None
                yield parsed
        except OSError as error:
            raise HistoryError(f"{file.path} cannot be read: {error.strerror or error}") from None


def checkpoint_files(folder: Path) -> dict[int, Path]:
    """By step, in the order of the steps."""
    return {int(path.stem): path for path in sorted(folder.glob("*.safetensors")) if path.stem.isdigit()}
