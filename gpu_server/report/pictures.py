"""Draws: curves against steps, seconds or bytes, and where the time went. It alone knows matplotlib."""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from terminal import in_words

from .colours import AT_NIGHT, COLOURS, GRID, INK, PAPER, QUIET, TINTS
from .curves import Axis, Curve, spans_orders

__all__ = ["draw_curves", "draw_time", "for_page", "places_of_labels"]

LINES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)), (0, (4, 1.5, 1, 1.5, 1, 1.5)))
MARKERS = "os^DvPX"
"""Colours, lines and markers are 8, 5 and 7: no two of the first 280 runs look the same."""

HATCHES = {"encode": "....", "uplink": "////", "queue": "xxxx", "downlink": "\\\\\\\\", "decode": "oo"}
"""Of the parts of the time."""

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana"],  # matplotlib has the one with it; the other is as wide
    "font.size": 9.5,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a run's name may have dollars in it
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "hatch.linewidth": 0.6,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
}
WIDTH = 6.8  # inches
DOTS_PER_INCH = 150
MOST_MARKERS = 30
LABEL_SIZE, LABEL_DISTANCE = 9, 12  # points
LONGEST_LABEL = 30
FACTOR_FOR_LOG = 5
"""Beyond it, the least of what is drawn would be squeezed into the lower end of a picture."""


def draw_curves(name: str, title: str, axis: Axis, curves: Sequence[Curve], value: str) -> dict[str, bytes]:
    """
    Args:
        name: of the files, without a suffix.
        value: which column is the line; "smoothed" and "loss" are drawn with the raw ones behind them.

    Returns:
        The picture as an SVG and as a PNG file, by their names.
    """
    with _style(name):
        figure = Figure(figsize=(WIDTH, max(3.9, 1.2 + 0.2 * len(curves))))
        axes = figure.subplots()
        figure.subplots_adjust(left=0.085, right=0.76, top=0.9, bottom=0.125)
        unit, scale = _unit(axis, max(float(curve.x[-1]) for curve in curves))
        for curve in curves:
            _draw(axes, curve, curve.x / scale, value, faintness=max(1, len(curves) / 4))
        _scale_x(axes, axis, unit, is_log=spans_orders(curves))
        _scale_y(axes, curves, value)
        axes.set_title(title, loc="left", fontsize=11, color=INK, pad=10)
        _label(axes, curves, scale, value)
        return _files(figure, name)


def _draw(axes: Axes, curve: Curve, x: Any, value: str, faintness: float) -> None:
    colour, line = COLOURS[curve.place % len(COLOURS)], LINES[curve.place % len(LINES)]
    marker = MARKERS[curve.place % len(MARKERS)]
    y = curve.columns[value]
    if value == "smoothed":
        low, high = curve.columns["lowest"], curve.columns["highest"]
        if (low < high).any():
            axes.fill_between(x, low, high, color=colour, alpha=0.13 / faintness, linewidth=0)
        if (curve.columns["loss"] != y).any():
            axes.plot(x, curve.columns["loss"], color=colour, alpha=0.25 / faintness, linewidth=0.6)
    shown = _marked(len(y), curve.place) if value == "smoothed" or len(y) > MOST_MARKERS else list(range(len(y)))
    axes.plot(x, y, color=colour, linestyle=line, linewidth=1.7, marker=marker, markersize=4.5, markevery=shown)


def _marked(points: int, place: int) -> list[int]:
    """Which points of a curve have a marker: a few, at other places than other curves', and the last."""
    between = max(1, points // 6)
    return sorted({*range((place * between // 4) % between, points, between), points - 1})


def _unit(axis: Axis, longest: float) -> tuple[str, float]:
    """The unit in which ``longest`` is a number that people read, and what it is in the axis' own."""
    units = {
        "steps": [("steps", 1.0)],
        "seconds": [("seconds", 1.0), ("minutes", 60.0), ("hours", 3600.0), ("days", 86400.0)],
        "bytes": [("bytes", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)],
    }[axis.name]
    return next((unit for unit in units[::-1] if unit[1] * 2 <= longest), units[0])


def _scale_x(axes: Axes, axis: Axis, unit: str, *, is_log: bool) -> None:
    axes.set_xlabel(axis.unit.replace(axis.name, unit, 1))
    if is_log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"{axes.get_xlabel()}, on a log scale")
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=axis.name == "steps"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _scale_y(axes: Axes, curves: Sequence[Curve], value: str) -> None:
    values = [number for curve in curves for number in (curve.columns[value].min(), curve.columns[value].max())]
    if min(values) > 0 and max(values) > FACTOR_FOR_LOG * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,g}"))


def _label(axes: Axes, curves: Sequence[Curve], scale: float, value: str) -> None:
    """Each curve's name beside its last point."""
    figure: Any = axes.figure
    canvas: Any = FigureCanvasAgg(figure)
    pixels = figure.dpi / 72
    names = []
    for curve in curves:
        colour = COLOURS[curve.place % len(COLOURS)]
        name = axes.annotate(
            shortened(curve.label),
            xy=(curve.x[-1] / scale, curve.columns[value][-1]),
            xytext=(LABEL_DISTANCE, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=LABEL_SIZE,
            color=colour,
            bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "relpos": (0, 0.5),  # from the beginning of the text
                "shrinkA": 0,
                "shrinkB": 4,
            },
        )
        names.append(name)
    widths = [Text.get_window_extent(name, canvas.get_renderer()).width for name in names]
    figure.subplots_adjust(right=1 - (max(widths) + 2 * LABEL_DISTANCE * pixels) / figure.bbox.width)
    canvas.draw()  # from here on it is known where a point is
    lines = [axes.transData.transform(np.stack([curve.x / scale, curve.columns[value]], axis=1)) for curve in curves]
    ends = [line[-1] + (LABEL_DISTANCE * pixels, 0) for line in lines]
    boxes = [(left, left + width, middle) for (left, middle), width in zip(ends, widths, strict=True)]
    area = axes.get_window_extent()
    middles = places_of_labels(boxes, lines, height=1.4 * LABEL_SIZE * pixels, lowest=area.y0, highest=area.y1)
    for name, (_, _, before), after in zip(names, boxes, middles, strict=True):
        name.xyann = (LABEL_DISTANCE, (after - before) / pixels)


Box = tuple[float, float, float]
"""The left and right end of a line of text, and the middle of its height, which is larger further up."""


def places_of_labels(
    boxes: Sequence[Box], lines: Sequence[Any], *, height: float, lowest: float, highest: float
) -> list[float]:
    """
    The middles of lines of text beside the ends of curves, so that no text is over another, and as little as possible over a
    curve.

    Args:
        boxes: where the texts are meant to be.
        lines: the curves, (points, 2).
    """
    points = np.concatenate([_densely(line) for line in lines])
    beside = [number for number, (left, _, _) in enumerate(boxes) if (points[:, 0] < left).all()]
    placed = dict(zip(beside, _spread([boxes[number][2] for number in beside], height, lowest), strict=True))

    def is_free(box: Box) -> bool:
        others = [(*boxes[number][:2], middle) for number, middle in placed.items()]
        return not any(box[0] < right and left < box[1] and abs(box[2] - middle) < height for left, right, middle in others)

    def cost(box: Box, meant: float) -> Any:
        inside = (points[:, 0] > box[0]) & (points[:, 0] < box[1]) & (abs(points[:, 1] - box[2]) < 0.6 * height)
        hidden = 2 * inside.any() + 6 * inside.sum() / (box[1] - box[0])
        return abs(box[2] - meant) / height + hidden + 1000 * (not is_free(box))

    for number, (left, right, meant) in enumerate(boxes):
        if number not in placed:
            candidates = [meant, *np.arange(lowest + height, highest, height / 3)]
            placed[number] = min(candidates, key=lambda middle: cost((left, right, middle), meant))
    return [placed[number] for number in range(len(boxes))]


def _densely(line: Any) -> Any:
    """The same curve with a point at each of its pixels from left to right."""
    left, right = np.ceil(line[0, 0]), np.floor(line[-1, 0])
    x = np.arange(left, right + 1)
    return np.stack([x, np.interp(x, line[:, 0], line[:, 1])], axis=1) if len(x) else line


def _spread(middles: list[float], height: float, lowest: float) -> list[float]:
    """The same, at least ``height`` from each other and in the same order; as a pass downwards, and one upwards, find them."""
    order = sorted(range(len(middles)), key=lambda each: -middles[each])
    for above, each in pairwise(order):
        middles[each] = min(middles[each], middles[above] - height)
    if order:
        middles[order[-1]] = max(middles[order[-1]], lowest)
    for below, each in pairwise(order[::-1]):
        middles[each] = max(middles[each], middles[below] + height)
    return middles


def shortened(label: str) -> str:
    """What of a label fits beside a curve."""
    half = LONGEST_LABEL // 2
    return label if len(label) <= LONGEST_LABEL else f"{label[:half]}…{label[-half:]}"


def draw_time(name: str, bars: Sequence[tuple[str, Mapping[str, float]]]) -> dict[str, bytes]:
    """
    A bar for each run, its parts stacked.

    Args:
        bars: each run's label, and its seconds by part.
    """
    with _style(name):
        figure = Figure(figsize=(1.3 * WIDTH, 1.5 + 0.46 * len(bars)), layout="constrained")
        axes = figure.subplots()
        longest = max(sum(parts.values()) for _, parts in bars)
        for row, (_, parts) in enumerate(bars):
            left = 0.0
            total = sum(parts.values())
            for part, seconds in parts.items():
                tint, hatch = TINTS[part], HATCHES.get(part)
                axes.barh(row, seconds, left=left, height=0.62, color=tint, hatch=hatch, edgecolor="#7d848b", linewidth=0.5)
                if seconds > 0.05 * longest:
                    axes.text(
                        left + seconds / 2,
                        row,
                        f"{100 * seconds / total:.0f} %",
                        ha="center",
                        va="center",
                        fontsize=8.5,
                        color="#000000",
                        bbox={"facecolor": tint, "edgecolor": "none", "pad": 1.2},
                    )
                left += seconds
            axes.text(left + 0.012 * longest, row, f"{total:,.3g} s", va="center", fontsize=9, color=INK)
        axes.set_yticks(range(len(bars)), [shortened(label) for label, _ in bars], color=INK)
        axes.invert_yaxis()
        axes.set_xlim(0, longest * 1.1)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("seconds of a device in a step, on average")
        handles = [
            Patch(facecolor=tint, hatch=HATCHES.get(part), edgecolor="#7d848b", label=in_words(part))
            for part, tint in TINTS.items()
        ]
        figure.legend(
            handles=handles,
            loc="outside upper left",
            ncols=len(TINTS),
            frameon=False,
            fontsize=9,
            columnspacing=1.2,
            handlelength=1.6,
        )
        return _files(figure, name)


def for_page(svg: bytes, name: str, description: str) -> str:
    """
    An SVG file as an element of an HTML page that holds others as well: its identifiers are its own, its colours are the page's
    variables (see `colours.AT_NIGHT`), and who does not see it is told ``description``.
    """
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for place, colour in enumerate(AT_NIGHT):
        text = text.replace(colour, f"var(--c{place})")
    (box,) = re.findall(r'viewBox="([^"]*)"', text[:1000])
    inner = text[text.index(">") + 1 :]
    return f'<svg role="img" aria-label="{escape(description)}" viewBox="{box}">{inner}'


@contextmanager
def _style(name: str) -> Iterator[None]:
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # in a run's name; the SVG file has it as text
        matplotlib.rcdefaults()  # whatever this user's own are
        # The salt makes identifiers in an SVG file what they were the last time.
        matplotlib.rcParams.update({**STYLE, "svg.hashsalt": name})
        yield


def _files(figure: Figure, name: str) -> dict[str, bytes]:
    files = {}
    for suffix, options in (("svg", {"metadata": {"Date": None, "Creator": None}}), ("png", {"dpi": DOTS_PER_INCH})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, **options)
        files[f"{name}.{suffix}"] = buffer.getvalue()
    return files
