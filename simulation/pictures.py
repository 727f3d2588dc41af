"""The curves as a picture: a step's time and the work that counts against the quorum, and what a message costs."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from terminal import importing

from .result import Result

with importing("--pictures", "splitlora[report]"):
    import matplotlib
    from matplotlib.figure import Figure

__all__ = ["draw"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which people with most kinds of colour blindness can tell apart."""
MARKERS = "os^DvPX"
LINES = ("-", "--", ":", "-.")
"""Of the deadlines; colours and markers are of the fleets."""
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "fleet",  # identifiers are what they were the last time
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
NAME, DOTS_PER_INCH = "fleet", 110


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """
    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = _figure(results)
        paths = []
        for suffix, options in (("svg", {"metadata": {"Date": None, "Creator": None}}), ("png", {"dpi": DOTS_PER_INCH})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, **options)
            paths.append(folder / f"{NAME}.{suffix}")
            paths[-1].write_bytes(buffer.getvalue())
    return paths


def _figure(results: Sequence[Result]) -> Figure:
    figure = Figure(figsize=(11, 3.7), layout="constrained")
    times, work, cost = figure.subplots(1, 3)
    deadlines = list(dict.fromkeys(result.plan.deadline for result in results))
    for place, devices in enumerate(sorted({result.plan.devices for result in results})):
        look = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "markersize": 4}
        of_fleet = [result for result in results if result.plan.devices == devices]
        for number, deadline in enumerate(deadlines):
            # Without a quorum there is no deadline: that run ends every curve.
            curve = [result for result in of_fleet if result.plan.deadline == deadline or result.plan.quorum == 1]
            curve.sort(key=lambda result: result.plan.quorum)
            quorums, line = [100 * result.plan.quorum for result in curve], LINES[number % len(LINES)]
            label = f"{devices:,} devices" + ("" if len(deadlines) == 1 else f", deadline {_named(deadline)}")
            times.plot(quorums, [result.step_seconds for result in curve], linestyle=line, label=label, **look)
            work.plot(quorums, [100 * result.share_that_counts for result in curve], linestyle=line, **look)
        cost.plot([devices], [max(result.spent["receive"].microseconds for result in of_fleet)], **look)
    times.set(title="A step, simulated", xlabel="quorum, % of the devices", ylabel="seconds, median", yscale="log")
    work.set(title="Devices' work that counts, simulated", xlabel="quorum, % of the devices", ylabel="%")
    work.set_ylim(top=101)
    cost.set(title="The federation, measured", xlabel="devices", ylabel="µs a message", xscale="log")
    cost.set_ylim(0, 1.3 * max(result.spent["receive"].microseconds for result in results))
    figure.legend(*times.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _named(deadline: float | None) -> str:
    return "measured" if deadline is None else f"{deadline:g} s"
