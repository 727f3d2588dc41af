"""One run's files, read into columns."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from protocol import Seconds
from storage import RunDescription

from ..federation import StepRecord
from ..history import TOGETHER, EvaluationRecord, RunFiles
from ..history.records import mean_of

__all__ = ["HeldOut", "MeasuredRun", "held_out_of", "measure"]

Column = npt.NDArray[np.float64]

STEPS_BETWEEN_WORDS = 5_000


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The held-out loss of all devices that have held-out data, after some steps."""

    steps: Column
    losses: Column
    """Nats per labelled token, over all of the devices' held-out tokens."""
    incomplete: int = 0
    """Steps after which only some of the devices measured; they are left out, for other texts have another loss."""

    @property
    def perplexities(self) -> Column:
        with np.errstate(over="ignore"):
            return np.exp(self.losses)


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """What a report needs of a run. The columns have a value for each step."""

    path: Path
    description: RunDescription
    is_served: bool
    steps: Column
    """Numbers of the steps."""
    losses: Column
    """Nats per labelled token; NaN where none was measured."""
    labelled_tokens: Column
    seconds: Column
    """From the start of training to the end of the step, without the time in which no server ran. All 0 if not recorded."""
    num_bytes: Column
    """Both ways, of all devices, up to the end of the step."""
    tokens: int
    bytes_up: int
    bytes_down: int
    seconds_by_part: dict[str, float]
    """All devices' seconds; see `protocol.Seconds`."""
    device_steps: int
    """In how many steps devices took part, added up over devices."""
    devices: dict[str, dict[str, int]]
    """By device, in the order of their names: its ``samples`` and ``batch_size``, as far as events tell."""
    held_out: HeldOut

    @property
    def total_steps(self) -> int | None:
        """How many steps it is to have, if that is known."""
        if self.description.adapter is not None:
            return int(self.description.adapter["of"])
        steps = self.description.config.get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def state(self) -> str:
        """finished, running or not finished."""
        if self.is_served:
            return "running"
        adapter = self.description.adapter
        is_whole = adapter is not None and adapter["step"] == adapter["of"]
        return "finished" if is_whole or self.steps[-1] == self.total_steps else "not finished"

    def at_steps(self, column: Column, steps: Column) -> Column:
        """The values that a cumulative column had after other steps, 0 before the first of them."""
        found = np.searchsorted(self.steps, steps, side="right")
        return np.concatenate([[0.0], column])[found]


def measure(files: RunFiles, say: Callable[[int], None]) -> MeasuredRun | None:
    """
    Args:
        say: is called now and then with the number of steps that have been read.

    Returns:
        None if the run has finished no step.

    Raises:
        HistoryError: a file cannot be read.
    """
    sums = _Sums()
    for number, record in enumerate(files.steps(), 1):
        sums.add(record)
        if number % STEPS_BETWEEN_WORDS == 0:
            say(number)
    if not sums.rows:
        return None
    steps, losses, labelled, seconds, num_bytes = np.array(sums.rows).T
    devices: dict[str, dict[str, int]] = {name: {} for name in sums.devices - {TOGETHER}}
    for event in files.events():
        if event.kind == "joined" and event.client is not None and (event.client in devices or TOGETHER in sums.devices):
            told = {name: event.details.get(name) for name in ("samples", "batch_size")}
            devices[event.client] = {name: value for name, value in told.items() if isinstance(value, int)}
    return MeasuredRun(
        path=files.path,
        description=files.description,
        is_served=files.is_served,
        steps=steps,
        losses=losses,
        labelled_tokens=labelled,
        seconds=np.cumsum(seconds) if seconds.all() else np.zeros(len(seconds)),
        num_bytes=np.cumsum(num_bytes),
        tokens=sums.tokens,
        bytes_up=sums.bytes_up,
        bytes_down=sums.bytes_down,
        seconds_by_part=vars(sums.spent),
        device_steps=sums.device_steps,
        devices=dict(sorted(devices.items())),
        held_out=held_out_of(files.evaluations()),
    )


class _Sums:
    def __init__(self) -> None:
        self.rows: list[tuple[float, ...]] = []
        self.tokens = self.bytes_up = self.bytes_down = 0
        self.devices: set[str] = set()
        self.device_steps = 0
        self.spent = Seconds()

    def add(self, record: StepRecord) -> None:
        up, down = sum(record.bytes_up.values()), sum(record.bytes_down.values())
        self.rows.append((record.number, record.loss, record.labelled_tokens, record.step_seconds, up + down))
        self.tokens += record.tokens
        self.bytes_up += up
        self.bytes_down += down
        self.devices |= record.seconds.keys()
        self.device_steps += record.num_taking_part
        self.spent = sum(record.seconds.values(), self.spent)


def held_out_of(evaluations: Iterable[EvaluationRecord]) -> HeldOut:
    """
    One loss for each step after which all devices with held-out data have measured theirs. If a device measured twice after a
    step, as it does when the step is done again, the later one counts.
    """
    by_step: dict[int, dict[str, EvaluationRecord]] = defaultdict(dict)
    for each in evaluations:
        if math.isfinite(each.loss) and each.labelled_tokens > 0:
            by_step[each.step][each.client] = each
    everybody = set().union(*by_step.values())
    complete = {step: list(found.values()) for step, found in sorted(by_step.items()) if found.keys() == everybody}
    losses = [mean_of(found).loss for found in complete.values()]
    return HeldOut(
        steps=np.array(list(complete), dtype=float),
        losses=np.array(losses, dtype=float),
        incomplete=len(by_step) - len(complete),
    )
