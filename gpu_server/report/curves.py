"""What pictures show against steps, seconds or bytes, as numbers: the same that is drawn and that a CSV file holds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .measured_run import Column, MeasuredRun

__all__ = [
    "AXES",
    "MOST_POINTS",
    "SMOOTHED_PERCENT",
    "Axis",
    "Curve",
    "as_drawn",
    "final_loss",
    "held_out_curve",
    "loss_curve",
    "spans_orders",
]

MOST_POINTS = 400
"""Of a curve in a picture: about as many as it is wide."""
FACTOR_FOR_LOG = 10
SMOOTHED_PERCENT = 5
"""Of a run's steps, over which its loss is averaged."""


@dataclass(frozen=True)
class Axis:
    """What a picture shows something against."""

    name: str
    words: str
    unit: str

    def of(self, run: MeasuredRun) -> Column:
        """Where each of the run's steps stands; all 0 if that is not known, or there is nothing of it."""
        return {"steps": run.steps, "seconds": run.seconds, "bytes": run.num_bytes}[self.name]


AXES = (
    Axis("steps", "steps", "steps"),
    Axis("seconds", "seconds", "seconds of training"),
    Axis("bytes", "bytes", "bytes sent and received by all devices"),
)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One run's line in a picture."""

    label: str
    place: int
    """Of the run among all runs: a run looks the same in every picture."""
    columns: dict[str, Column]
    """By name; the first is where the points stand."""

    @property
    def x(self) -> Column:
        return next(iter(self.columns.values()))


def loss_curve(run: MeasuredRun, label: str, place: int, axis: Axis) -> Curve | None:
    """
    The loss of training. In more than `MOST_POINTS` steps a point is the mean of several, with the lowest and the highest of
    them. None if there is nothing to draw.
    """
    measured, x = np.isfinite(run.losses), axis.of(run)
    if not measured.any() or x[-1] <= 0:
        return None
    losses, x = run.losses[measured], x[measured]
    starts = np.unique(np.linspace(0, len(losses), min(MOST_POINTS, len(losses)), endpoint=False).astype(int))
    sizes = np.diff([*starts, len(losses)])
    smoothed = _smoothed(losses, run.labelled_tokens[measured])
    columns = {
        axis.name: np.add.reduceat(x, starts) / sizes,
        "loss": np.add.reduceat(losses, starts) / sizes,
        "lowest": np.minimum.reduceat(losses, starts),
        "highest": np.maximum.reduceat(losses, starts),
        "smoothed": np.add.reduceat(smoothed, starts) / sizes,
    }
    return Curve(label=label, place=place, columns=columns)


def held_out_curve(run: MeasuredRun, label: str, place: int, axis: Axis) -> Curve | None:
    """The held-out perplexity. None if there is nothing to draw."""
    x = run.held_out.steps if axis.name == "steps" else run.at_steps(axis.of(run), run.held_out.steps)
    perplexities = run.held_out.perplexities
    drawn = np.isfinite(perplexities)
    if axis.of(run)[-1] <= 0 or not drawn.any():
        return None
    return Curve(label=label, place=place, columns={axis.name: x[drawn], "perplexity": perplexities[drawn]})


def spans_orders(curves: Sequence[Curve]) -> bool:
    """Whether the curve that ends first would be squeezed into a corner, so that a log scale shows more."""
    ends = [curve.x[-1] for curve in curves]
    return bool(max(ends) > FACTOR_FOR_LOG * min(ends))


def as_drawn(curves: Sequence[Curve]) -> list[Curve]:
    """The same without the points that a log scale has no place for, if there is to be one."""
    if not spans_orders(curves):
        return list(curves)
    return [replace(curve, columns={name: column[curve.x > 0] for name, column in curve.columns.items()}) for curve in curves]


def final_loss(run: MeasuredRun) -> float:
    """Nats per labelled token over the last of a run's steps; NaN if none of these was measured."""
    last = slice(-_window(len(run.losses)), None)
    losses, tokens = run.losses[last], run.labelled_tokens[last]
    measured = np.isfinite(losses)
    return float(np.average(losses[measured], weights=tokens[measured])) if tokens[measured].sum() > 0 else float("nan")


def _window(steps: int) -> int:
    return max(1, round(steps * SMOOTHED_PERCENT / 100))


def _smoothed(losses: Column, labelled_tokens: Column) -> Column:
    """The mean loss of the labelled tokens in a window around each step; at a run's ends, in the half of it that there is."""
    before = (_window(len(losses)) - 1) // 2
    after = _window(len(losses)) - 1 - before
    places = np.arange(len(losses))
    first, last = np.maximum(places - before, 0), np.minimum(places + after + 1, len(losses))
    weights = np.maximum(labelled_tokens, 1)
    summed, counted = (np.concatenate([[0.0], np.cumsum(column)]) for column in (losses * weights, weights))
    smoothed: Column = (summed[last] - summed[first]) / (counted[last] - counted[first])
    return smoothed
