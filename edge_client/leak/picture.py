"""The findings in one picture: what was recovered beside what the setting costs."""

from pathlib import Path

from matplotlib.figure import Figure

from .meter import Findings
from .report import title_of

__all__ = ["draw"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which people with most kinds of colour blindness can tell apart."""


def draw(findings: Findings, paths: list[Path]) -> None:
    """Write the same picture to files; their names' suffixes decide the format."""
    settings = findings.measured
    figure = Figure(figsize=(11, 1.6 + 0.55 * len(settings)), layout="constrained")
    shares, costs = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    names = list(dict.fromkeys((reading.channel, reading.attack) for each in settings for reading in each.readings))
    for number, name in enumerate(names):
        colour, offset = COLOURS[number % len(COLOURS)], 0.7 * ((number + 0.5) / len(names) - 0.5)
        for row, each in enumerate(settings):
            for reading in each.readings:
                estimate = reading.counts.tokens.estimate(0)
                if (reading.channel, reading.attack) != name or estimate is None:
                    continue
                bounds = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
                shares.errorbar(estimate.value, row + offset, xerr=bounds, fmt="o", color=colour, markersize=4)
                shares.plot(reading.guess, row + offset, "|", color=colour, markersize=9, alpha=0.6)
        shares.plot([], [], "o", color=colour, label=f"{name[0]}: {name[1]}")
    shares.plot([], [], "|", color="grey", markersize=9, label="without an attack, by guessing")
    shares.set(xlim=(-0.02, 1.02), xlabel="share recovered, with the 95 % interval over texts")
    shares.set_yticks(
        range(len(settings)), [title_of(each.setting).replace(", labels", ",\nlabels") for each in settings], fontsize=7
    )
    shares.invert_yaxis()
    for row, each in enumerate(settings):
        for ratio, marker in ((each.cost.forward, "o"), (each.cost.trained, "^")):
            estimate = None if ratio is None else ratio.estimate(0)
            if estimate is not None:
                bounds = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
                costs.errorbar(estimate.value, row, xerr=bounds, fmt=marker, color="black", markersize=4)
    costs.set_xlabel("nats a label more\n(o same adapter,\n^ after training)")
    costs.axvline(0, color="grey", linewidth=0.5)
    figure.legend(*shares.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7)
    if findings.failures:
        figure.suptitle("A control failed: do not rely on these figures", color="red")
    for path in paths:
        figure.savefig(path, dpi=150)
