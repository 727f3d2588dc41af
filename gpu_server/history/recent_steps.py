"""What each device has spent and computed in its last steps."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from protocol import Seconds

from ..federation import StepRecord

__all__ = ["OWN", "PARTS", "RECENT", "RecentSteps", "Spent"]

RECENT = 20
"""Steps over which speeds and shares are measured."""
NOTHING = Seconds()
PARTS = tuple(vars(NOTHING))
OWN = ("edge_compute", "encode", "uplink", "downlink", "decode")
"""The parts of a device's time that are its own and its link's; the rest is waiting."""
COLUMNS = (*PARTS, "tokens", "step_seconds")
TOKENS, STEP_SECONDS = COLUMNS.index("tokens"), COLUMNS.index("step_seconds")

Spent = Mapping[str, float]
"""Seconds by part of the time; see `Seconds`."""
Column = npt.NDArray[np.float64]


class RecentSteps:
    """
    The last `RECENT` steps that each device took part in, in one array: thousands of devices are summed twice a second while
    somebody looks.
    """

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        """By device, its place in both arrays."""
        self._steps = np.zeros((0, RECENT, len(COLUMNS)))
        """(places, steps, columns); a device's newest step replaces its oldest."""
        self._numbers = np.zeros(0, dtype=np.int64)
        """Steps that each has taken part in."""

    def add(self, record: StepRecord, names: list[str]) -> None:
        """A step in which these devices took part, each named once."""
        if not names:
            return
        places = [self._places.setdefault(name, len(self._places)) for name in names]
        self._make_room()
        spent = [vars(record.seconds.get(name, NOTHING)).values() for name in names]
        rows = [(*parts, record.tokens_of.get(name, 0), record.step_seconds) for name, parts in zip(names, spent, strict=True)]
        self._steps[places, self._numbers[places] % RECENT] = rows
        self._numbers[places] += 1

    def _make_room(self) -> None:
        room = len(self._numbers)
        if len(self._places) > room:
            more = max(len(self._places) - room, room)
            self._steps = np.concatenate([self._steps, np.zeros((more, *self._steps.shape[1:]))])
            self._numbers = np.concatenate([self._numbers, np.zeros(more, dtype=np.int64)])

    def summed(self) -> "SummedSteps":
        used = len(self._places)
        return SummedSteps(self._places, self._steps[:used].sum(axis=1), np.minimum(self._numbers[:used], RECENT))


class SummedSteps:
    """
    These steps, added up for each device.

    Args:
        places: by device, its row in both arrays.
        sums: (devices, columns).
        numbers: of steps that are summed, (devices,).
    """

    def __init__(self, places: Mapping[str, int], sums: Column, numbers: npt.NDArray[np.int64]) -> None:
        self._places, self._sums, self._numbers = places, sums, numbers
        own = sums[:, [COLUMNS.index(part) for part in OWN]].sum(axis=1) / np.maximum(numbers, 1)
        self._slowness = _over_the_median_of_the_others(own)

    def of_all(self) -> Spent:
        return dict(zip(PARTS, self._sums[:, : len(PARTS)].sum(axis=0).tolist(), strict=True))

    def of(self, name: str) -> Spent:
        """Nothing of a device that took part in no step."""
        place = self._places.get(name)
        return vars(NOTHING) if place is None else dict(zip(PARTS, self._sums[place, : len(PARTS)].tolist(), strict=True))

    def tokens_per_second(self, name: str) -> float | None:
        place = self._places.get(name)
        if place is None or not (seconds := float(self._sums[place, STEP_SECONDS])):
            return None
        return float(self._sums[place, TOKENS]) / seconds

    def slowness(self) -> dict[str, float]:
        """
        By device: its own and its link's seconds a step over the median of the others'; without those that have spent none.
        Nobody is slow alone.
        """
        slowness = self._slowness.tolist()
        return {name: slowness[place] for name, place in self._places.items() if slowness[place] == slowness[place]}


def _over_the_median_of_the_others(values: Column) -> Column:
    """Each positive value over the median of the other positive ones; NaN for all else, and where there is no other."""
    positive = values > 0
    ratios = np.full(len(values), np.nan)
    some = values[positive]
    if len(some) < 2:
        return ratios
    in_order = np.sort(some)
    places, middle = np.searchsorted(in_order, some), (len(some) - 1) // 2

    def other(number: int) -> Column:
        """The value of this number, in their order, without one's own."""
        found: Column = in_order[number + (number >= places)]
        return found

    medians = other(middle) if len(some) % 2 == 0 else (other(middle - 1) + other(middle)) / 2
    ratios[positive] = some / medians
    return ratios
