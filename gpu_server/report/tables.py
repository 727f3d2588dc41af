"""Tables: for a reader, with words and units, and for a program, as CSV with plain numbers."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from protocol import Seconds
from terminal import amount, duration, in_words

from .curves import Curve, final_loss
from .differences import Settings
from .measured_run import MeasuredRun

__all__ = ["Table", "csv_of", "csv_of_curves", "results_table", "settings_table", "time_table"]

Cell = str | int | float | None

NOTHING = "-"


@dataclass(frozen=True, kw_only=True)
class Table:
    """What the page shows, and what the CSV file beside it says."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The first cell of each names its row."""
    csv: bytes


def results_table(runs: Sequence[MeasuredRun], labels: Sequence[str], folders: Sequence[str]) -> Table:
    """What came of each run, and what it took."""
    header = [
        "run",
        "steps",
        "final loss",
        "held-out perplexity",
        "time",
        "tokens/s",
        "bytes up",
        "bytes down",
        "devices",
        "restarts",
    ]
    columns = (
        *("run", "folder", "state", "steps", "final_loss", "held_out_perplexity", "held_out_step"),
        *("lowest_perplexity", "lowest_perplexity_step", "seconds", "tokens", "tokens_per_second"),
        *("bytes_up", "bytes_down", "devices", "restarts"),
    )
    shown, numbers = [], []
    for run, label, folder in zip(runs, labels, folders, strict=True):
        seconds = float(run.seconds[-1]) or None
        speed = run.tokens / seconds if seconds else None
        perplexities, steps = run.held_out.perplexities, run.held_out.steps
        last: tuple[float | None, ...] = (None, None)
        lowest = last
        if len(steps):
            last, best = (perplexities[-1], int(steps[-1])), perplexities.argmin()
            lowest = perplexities[best], int(steps[best])
        number, loss = int(run.steps[-1]), final_loss(run)
        numbers.append(
            [
                *(label, folder, run.state, number, loss, *last, *lowest, seconds, run.tokens, speed),
                *(run.bytes_up, run.bytes_down, len(run.devices), run.description.restarts),
            ]
        )
        of_total = f" of {run.total_steps:,}" if run.total_steps not in (None, number) else ""
        shown.append(
            [
                label,
                f"{number:,}{of_total}" + ("" if run.state == "finished" else f", {run.state}"),
                _figure(loss, ".4f"),
                _perplexity(last, lowest),
                NOTHING if seconds is None else duration(seconds),
                _figure(speed, ",.0f"),
                amount(run.bytes_up),
                amount(run.bytes_down),
                str(len(run.devices)),
                str(run.description.restarts),
            ]
        )
    return Table(header=header, rows=shown, csv=csv_of(columns, numbers))


def settings_table(labels: Sequence[str], settings: Sequence[Settings], names: Sequence[str]) -> Table:
    """These settings of each run: a row for each setting, a column for each run."""
    rows = [[name, *(each.get(name, NOTHING) for each in settings)] for name in names]
    return Table(header=["setting", *labels], rows=rows, csv=csv_of(["setting", *labels], rows))


def time_table(runs: Sequence[MeasuredRun], labels: Sequence[str]) -> tuple[Table, list[tuple[str, dict[str, float]]]]:
    """
    Where the time of devices went: as a table of shares, and as the seconds of a device in a step on average, by run and part.
    Runs of which nothing is known are left out.
    """
    parts = list(vars(Seconds()))
    bars, shown = [], []
    numbers: list[list[Cell]] = []
    for run, label in zip(runs, labels, strict=True):
        total = sum(run.seconds_by_part.values())
        if total <= 0:
            continue
        bar = {part: run.seconds_by_part[part] / run.device_steps for part in parts}
        bars.append((label, bar))
        shown.append([label, *(f"{100 * run.seconds_by_part[part] / total:.1f} %" for part in parts)])
        numbers += [[label, part, seconds, run.seconds_by_part[part] / total] for part, seconds in bar.items()]
    csv_file = csv_of(["run", "part", "seconds_of_a_device_in_a_step", "share"], numbers)
    return Table(header=["run", *(in_words(part) for part in parts)], rows=shown, csv=csv_file), bars


def csv_of_curves(curves: Sequence[Curve]) -> bytes:
    """Every point that is drawn."""
    rows: list[list[Cell]] = []
    for curve in curves:
        rows += [[curve.label, *map(float, values)] for values in zip(*curve.columns.values(), strict=True)]
    return csv_of(["run", *curves[0].columns], rows)


def csv_of(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> bytes:
    """In UTF-8; numbers with nine digits, nothing where there is none."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([[_plain_number(cell) for cell in row] for row in rows])
    return buffer.getvalue().encode("utf-8", "replace")


def _plain_number(cell: Cell) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return f"{cell:.9g}" if isinstance(cell, float) else str(cell)


def _figure(value: float | None, form: str) -> str:
    return NOTHING if value is None or math.isnan(value) else format(value, form)


def _perplexity(last: Sequence[float | None], lowest: Sequence[float | None]) -> str:
    text = _figure(last[0], ".2f")
    return text if lowest == last else f"{text}, lowest {_figure(lowest[0], '.2f')} at step {lowest[1]:,}"
