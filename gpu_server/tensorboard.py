"""A run as TensorBoard shows it."""

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from itertools import takewhile
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter

from protocol import Seconds

from .checkpoints import Checkpoints
from .errors import ServerError
from .federation import StepRecord
from .history import MOST_CLIENTS, EvaluationRecord, RunFiles, tell
from .history.records import mean_of
from .serving import Observer

__all__ = ["TensorBoardObserver"]

NEVER = 10**8
"""Seconds, three years. The library's own thread may flush at the same time as `flush`, and then writes the same twice."""


class TensorBoardObserver(Observer):
    """
    Writes event files to ``RUN_DIR/tensorboard``, on a thread of its own. If they cannot be written it says so, and the run
    goes on without them.

    A run that goes on begins a new file. That takes back, by TensorBoard's own means, all from the earlier of the run's two
    checkpoints on, and says it again as far as the run goes: what a crash kept from the files is then in them, and no step that
    is done again shows twice. In a run that had none before, the file begins with the first step.

    Args:
        clients: how many the run starts with. Of more than `MOST_CLIENTS` none has curves of its own.
    """

    def __init__(self, run_dir: Path, checkpoints: Checkpoints, clients: int) -> None:
        self._run_dir, self._checkpoints, self._has_curves_of_clients = run_dir, checkpoints, clients <= MOST_CLIENTS
        self._thread: ThreadPoolExecutor
        self._asked: deque[Future[None]] = deque()
        self._broken = threading.Event()
        self._file: FileWriter
        self._step = 0
        """The last that is finished."""
        self._evaluated: dict[str, int] = {}
        """By client: the step of its last held-out loss."""
        self._held_out: dict[str, EvaluationRecord] = {}
        """By client: those of the last step, until the next is finished: then all have come that are waited for."""

    def serving_begins(self, step: int) -> None:
        folder = self._run_dir / "tensorboard"
        goes_on = folder.is_dir() and any(folder.iterdir())
        first = min(self._checkpoints.steps(), default=0) if goes_on else 0
        self._thread = ThreadPoolExecutor(1, "tensorboard")
        self._context = copy_context()  # whoever follows this run hears what is told on that thread
        self._ask(self._begin, folder, first, step)

    def step_finished(self, record: StepRecord) -> None:
        self._ask(self._write, record)

    def evaluated(self, record: EvaluationRecord) -> None:
        self._ask(self._add_evaluation, record)

    def serving_ends(self) -> None:
        self._ask(self._end)
        self._thread.shutdown()
        self._raise_defects()

    def _ask(self, work: Callable[..., None], *arguments: Any) -> None:
        self._raise_defects()
        self._asked.append(self._thread.submit(self._context.run, self._do, work, *arguments))

    def _raise_defects(self) -> None:
        while self._asked and self._asked[0].done():
            self._asked.popleft().result()

    # On its own thread

    def _do(self, work: Callable[..., None], *arguments: Any) -> None:
        if self._broken.is_set():
            return
        try:
            work(*arguments)
        except (OSError, ServerError) as error:
            self._broken.set()
            reason = getattr(error, "strerror", None) or error
            text = f"event files for TensorBoard cannot be written: {reason}; the run goes on without them"
            tell("note", text, level="warning")

    def _begin(self, folder: Path, first: int, last: int) -> None:
        """Begin a file, and write steps that were done before."""
        folder.mkdir(exist_ok=True, mode=0o700)
        self._file = FileWriter(folder, flush_secs=NEVER)
        self._file.add_event(Event(session_log=SessionLog(status=SessionLog.START)), first)  # takes back from there on
        files = RunFiles(self._run_dir)
        evaluations = deque(each for each in files.evaluations() if first <= each.step <= last)
        for record in takewhile(lambda record: record.number <= last, files.steps()):
            if record.number < first:
                continue
            while evaluations and evaluations[0].step < record.number:
                self._add_evaluation(evaluations.popleft())
            self._add_step(record)
        for evaluation in evaluations:
            self._add_evaluation(evaluation)
        self._file.flush()

    def _write(self, record: StepRecord) -> None:
        self._add_step(record)
        self._file.flush()

    def _end(self) -> None:
        self._add_mean_of_evaluations()
        self._file.close()

    def _add_step(self, record: StepRecord) -> None:
        if any(each.step < record.number for each in self._held_out.values()):
            self._add_mean_of_evaluations()
        self._step = record.number
        self._add(record.number, record.time, scalars_of(record))
        if self._has_curves_of_clients:
            self._add(record.number, record.time, {f"train_loss/{name}": loss for name, loss in record.losses.items()})

    def _add_evaluation(self, record: EvaluationRecord) -> None:
        if record.step <= self._evaluated.get(record.client, -1):
            return  # it was told, and read in the file as well
        self._evaluated[record.client] = record.step
        if record.step >= self._step:  # else it is late, and the mean of its step is written
            self._held_out[record.client] = record
        if self._has_curves_of_clients:
            self._add(record.step, record.time, {f"eval_loss/{record.client}": record.loss})

    def _add_mean_of_evaluations(self) -> None:
        """Of all devices that have held-out texts, weighted by their labelled tokens."""
        records = list(self._held_out.values())
        self._held_out.clear()
        if not records:
            return
        mean = mean_of(records)
        self._add(mean.step, mean.time, {"eval/loss": mean.loss, "eval/perplexity": mean.perplexity})

    def _add(self, step: int, time: float, scalars: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items() if math.isfinite(value)]
        self._file.add_summary(Summary(value=values), step, time)


def scalars_of(record: StepRecord) -> dict[str, float]:
    """
    By tag. Those of training are called as the Hugging Face Trainer calls them. ``time/`` is what devices have spent on each
    part of the step, on average, in seconds; ``time/engine`` is how long the server computed in all.
    """
    scalars = {
        "train/loss": record.loss,
        "train/learning_rate": record.learning_rate,
        "train/grad_norm": record.gradient_norm,
        "time/engine": record.server_compute,
    }
    if record.step_seconds:
        scalars["time/step"] = record.step_seconds
        scalars["throughput/tokens_per_second"] = record.tokens / record.step_seconds
        for way, num_bytes in (("up", record.bytes_up), ("down", record.bytes_down)):
            scalars[f"throughput/bytes_{way}_per_second"] = sum(num_bytes.values()) / record.step_seconds
    if record.seconds:
        spent, taking_part = vars(sum(record.seconds.values(), Seconds())), record.num_taking_part
        scalars |= {f"time/{part}": seconds / taking_part for part, seconds in spent.items()}
    return scalars
