"""A run's steps as so many points at most, however many steps there are."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..federation import StepRecord
from .records import finite

__all__ = ["Curve"]

VALUES = ("loss", "tokens_per_second", "bytes_per_second", "learning_rate", "gradient_norm")


@dataclass
class _Point:
    """Of one step, or of several that follow each other: their means, and their lowest and highest loss."""

    step: int
    """The last of them."""
    time: float
    steps: int
    seconds: float
    means: dict[str, float]
    """Loss, learning rate and gradient norm; NaN where no step has it."""
    low: float
    high: float
    tokens: int
    num_bytes: int

    @classmethod
    def of(cls, record: StepRecord) -> "_Point":
        return cls(
            step=record.number,
            time=record.time,
            steps=1,
            seconds=record.step_seconds,
            means={"loss": record.loss, "learning_rate": record.learning_rate, "gradient_norm": record.gradient_norm},
            low=record.loss,
            high=record.loss,
            tokens=record.tokens,
            num_bytes=record.num_bytes,
        )

    def merged(self, other: "_Point") -> "_Point":
        """With the point that follows."""
        return _Point(
            step=other.step,
            time=other.time,
            steps=self.steps + other.steps,
            seconds=self.seconds + other.seconds,
            means={name: _mean(mean, self.steps, other.means[name], other.steps) for name, mean in self.means.items()},
            low=min(self.low, other.low) if self.low == self.low else other.low,
            high=max(self.high, other.high) if self.high == self.high else other.high,
            tokens=self.tokens + other.tokens,
            num_bytes=self.num_bytes + other.num_bytes,
        )

    def row(self) -> dict[str, float | int | None]:
        rates = {"tokens_per_second": self.tokens, "bytes_per_second": self.num_bytes}
        return {
            "step": self.step,
            "time": round(self.time, 3),
            "loss_low": _figure(self.low),
            "loss_high": _figure(self.high),
            **{name: _figure(mean) for name, mean in self.means.items()},
            **{name: _figure(amount / self.seconds if self.seconds else math.nan) for name, amount in rates.items()},
        }


class Curve:
    """
    Neighbouring points become one where there would be more than ``max_points``, so that adding a step costs the same however
    long the run is, and there are always more than half as many.

    Args:
        max_points: an even number.
    """

    def __init__(self, max_points: int = 1000) -> None:
        self._max_points = max_points
        self._points: list[_Point] = []
        self._width = 1
        """Steps of a point."""

    def add(self, record: StepRecord) -> None:
        """The next step; or an earlier one, where the run went back to a checkpoint: what was after it is forgotten."""
        while self._points and self._points[-1].step >= record.number:
            self._points.pop()
        point = _Point.of(record)
        if self._points and self._points[-1].steps < self._width:
            point = self._points.pop().merged(point)
        self._points.append(point)
        if len(self._points) > self._max_points:
            self._width *= 2
            self._points = list(_in_pairs(self._points))

    def as_json(self) -> dict[str, list[float | int | None]]:
        """Columns of equal length: step, time (seconds since 1970), loss, loss_low, loss_high and the other `VALUES`."""
        rows = [point.row() for point in self._points]
        return {name: [row[name] for row in rows] for name in ("step", "time", "loss_low", "loss_high", *VALUES)}


def _in_pairs(points: list[_Point]) -> Iterator[_Point]:
    for index in range(0, len(points), 2):
        pair = points[index : index + 2]
        yield pair[0].merged(pair[1]) if len(pair) == 2 else pair[0]


def _mean(mean: float, steps: int, other: float, other_steps: int) -> float:
    if math.isnan(mean) or math.isnan(other):
        return other if math.isnan(mean) else mean
    return (mean * steps + other * other_steps) / (steps + other_steps)


def _figure(value: float) -> float | None:
    """With the six digits that a picture shows; JSON has no NaN."""
    return finite(float(f"{value:.6g}"))
