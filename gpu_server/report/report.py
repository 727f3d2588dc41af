"""Reads runs, draws them, and writes the folder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from storage import replace_file
from terminal import Progress, count, listed

from ..errors import ServerError
from ..history import RunFiles
from .curves import AXES, MOST_POINTS, SMOOTHED_PERCENT, Axis, Curve, as_drawn, held_out_curve, loss_curve
from .differences import NONE, folder_names, labels_of, settings_of, split_settings
from .errors import ReportError, RunsLeftOut
from .measured_run import MeasuredRun, measure
from .page import GENERATOR_TAG, Figure, page
from .pictures import draw_curves, draw_time, for_page
from .tables import csv_of_curves, results_table, settings_table, time_table

__all__ = ["write"]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is drawn against steps, seconds and bytes."""

    name: str
    """In the names of files."""
    title: str
    curve: Callable[[MeasuredRun, str, int, Axis], Curve | None]
    column: str
    """Of a curve: the line."""


LOSS = Subject(name="loss", title="loss in training, nats per labelled token", curve=loss_curve, column="smoothed")
HELD_OUT = Subject(name="perplexity", title="held-out perplexity", curve=held_out_curve, column="perplexity")
ABOUT_RESULTS = (
    f"The final loss is the mean over the last {SMOOTHED_PERCENT} % of a run's steps, in nats per labelled token. "
    "Tokens per second are those of all devices, labelled or not."
)
ABOUT = {
    "steps": f"A thick line of loss is the mean over {SMOOTHED_PERCENT} % of a run's steps, a thin one shows single steps. Of "
    f"more than {MOST_POINTS} steps, each point is the mean of several, in a band from the lowest to the highest of them.",
    "seconds": "Time is that of the steps of which a run consists. Hours in which no server ran are not in it, nor are steps "
    "that were lost with a server and done again.",
    "bytes": "Bytes are those on the sockets of all devices, both ways. A log scale does not show what was measured before the "
    "first of them.",
}
ABOUT_HELD_OUT = (
    "Held-out perplexity is that of texts that are not trained on, over all devices that have some: e to the mean loss in nats "
    "per token, 1 at best."
)
NO_HELD_OUT = "No held-out perplexity was measured: devices do that with --eval-data and --eval-every."
ABSENT = {
    "steps": "These runs have no steps",
    "seconds": "Of these runs not all of it was recorded, so they are left out here",
    "bytes": "These runs sent none, so they are left out here",
}

TIME = "time"
PICTURES = [f"{subject.name}-by-{axis.name}" for subject in (LOSS, HELD_OUT) for axis in AXES] + [TIME]
INDEX = "index.html"
TABLES = ["results.csv", "settings.csv"]
ALL_FILES = {INDEX, *TABLES, *(f"{name}.{suffix}" for name in PICTURES for suffix in ("svg", "png", "csv"))}
"""Everything that a report may have."""
READABLE = 0o644  # less the umask


def write(runs: Sequence[Path], output: Path) -> Path:
    """See `gpu_server.report.write_report`."""
    _require_free(output)
    with Progress(len(runs) + len(PICTURES), unit="part of the report") as progress:
        measured, left_out = _read(runs, progress)
        if not measured:
            raise ReportError("; ".join(left_out) or "a report needs at least one run")
        files = _made_of(measured, left_out, progress)
    _write(files, output)
    if left_out:
        raise RunsLeftOut(f"the report in {output} has {count(len(measured), 'run')}; left out: {'; '.join(left_out)}")
    return output / INDEX


def _read(runs: Sequence[Path], progress: Progress) -> tuple[list[MeasuredRun], list[str]]:
    """And a sentence for each run that cannot be read."""
    measured: list[MeasuredRun] = []
    left_out: list[str] = []
    for path in runs:
        words = f"reading {path}"
        try:
            if any(path.resolve() == other.path.resolve() for other in measured):
                left_out.append(f"{path} is given twice")
                continue
            run = measure(RunFiles(path), lambda steps, words=words: progress.advance(f"{words}, {steps:,} steps", 0))  # type: ignore[misc]
            if run is None:
                left_out.append(f"{path} has finished no step yet")
            else:
                measured.append(run)
        except ServerError as error:
            left_out.append(str(error))
        except OSError as error:
            left_out.append(f"{path} cannot be read: {error.strerror or error}")
        finally:
            progress.advance(words)
    return measured, left_out


def _made_of(runs: Sequence[MeasuredRun], left_out: Sequence[str], progress: Progress) -> dict[str, bytes]:
    """The report's files, by name."""
    settings = [settings_of(run) for run in runs]
    labels = labels_of(runs, settings)
    folders = folder_names([run.path for run in runs])
    differ, alike = split_settings(settings)
    merged = {name: value for each in settings for name, value in each.items()}
    results = results_table(runs, labels, folders)
    differences = settings_table(labels, settings, differ) if differ else None
    files = {"results.csv": results.csv}
    if differences is not None:
        files["settings.csv"] = differences.csv

    sections = []
    for axis in AXES:
        figures = []
        for subject in (LOSS, HELD_OUT):
            progress.advance(f"drawing {subject.name} against {axis.name}")
            curves = [
                subject.curve(run, label, place, axis) for place, (run, label) in enumerate(zip(runs, labels, strict=True))
            ]
            if drawn := [curve for curve in curves if curve is not None]:
                figures.append(_curves(subject, axis, as_drawn(drawn), files))
        sections.append((f"Against {axis.name}", _about(axis, runs, labels), figures))
    progress.advance("drawing where the time went")
    sections.append(_time(runs, labels, files))
    if differ:
        title = f"{count(len(runs), 'run')} that differ in {listed(differ, 4)}"
    else:
        title = f"{count(len(runs), 'run')}: {listed(labels, 4)}"
    files[INDEX] = page(
        title,
        results=results,
        words_on_results=ABOUT_RESULTS,
        differences=differences,
        alike=settings_table(["value"], [merged], [name for name in alike if merged[name] != NONE]),
        figures=sections,
        left_out=left_out,
    ).encode("utf-8", "replace")
    return files


def _curves(subject: Subject, axis: Axis, curves: Sequence[Curve], files: dict[str, bytes]) -> Figure:
    name, title = f"{subject.name}-by-{axis.name}", f"{subject.title}, against {axis.name}"
    files |= draw_curves(name, subject.title, axis, curves, subject.column)
    files[f"{name}.csv"] = csv_of_curves(curves)
    ends = "; ".join(f"{curve.label}: {curve.columns[subject.column][-1]:.4g}" for curve in curves)
    return Figure(name=name, title=title, svg=for_page(files[f"{name}.svg"], name, f"{title}. {ends}"))


def _time(runs: Sequence[MeasuredRun], labels: Sequence[str], files: dict[str, bytes]) -> tuple[str, list[str], list[Figure]]:
    heading, title = "Where the time went", "seconds of a device in a step"
    table, bars = time_table(runs, labels)
    if not bars:
        return heading, ["None of the runs has recorded it."], []
    files |= draw_time(TIME, bars)
    files[f"{TIME}.csv"] = table.csv
    described = "; ".join(
        ", ".join(f"{name} {cell}" for name, cell in zip(table.header, row, strict=True)) for row in table.rows
    )
    figure = Figure(name=TIME, title=title, svg=for_page(files[f"{TIME}.svg"], TIME, described), table=table)
    words = ["The bars are the time of a device in a step, on average, and what it is made of."]
    if missing := "; ".join(label for label in labels if label not in {each for each, _ in bars}):
        words.append(f"Of these runs no device's time was recorded: {missing}.")
    return heading, words, [figure]


def _about(axis: Axis, runs: Sequence[MeasuredRun], labels: Sequence[str]) -> list[str]:
    """How the figures of a section are made, and what is not in them."""
    named = list(zip(runs, labels, strict=True))
    if missing := "; ".join(label for run, label in named if axis.of(run)[-1] <= 0):
        missing = f"{ABSENT[axis.name]}: {missing}."
    held_out = []
    if axis.name == "steps":
        is_measured = any(len(run.held_out.steps) for run in runs)
        held_out = [ABOUT_HELD_OUT if is_measured else NO_HELD_OUT]
    incomplete = [
        f"{label}: perplexities after {count(run.held_out.incomplete, 'step')} are left out, because some of the devices with "
        "held-out texts have none for them."
        for run, label in named
        if axis.name == "steps" and run.held_out.incomplete
    ]
    return list(filter(None, [ABOUT[axis.name], missing, *held_out, *incomplete]))


def _require_free(output: Path) -> None:
    """
    Raises:
        ReportError: the folder has something in it, and it is no report.
    """
    try:
        if not output.exists() or (output.is_dir() and not any(output.iterdir())):
            return
        index = output / INDEX
        if index.is_file() and GENERATOR_TAG.encode() in index.read_bytes()[:2000]:
            return
    except OSError as error:
        raise ReportError(f"{output} cannot be read: {error.strerror or error}") from None
    what = "holds something that is no report" if output.is_dir() else "is no folder"
    raise ReportError(f"{output} {what}; give a new folder, or that of an earlier report, as --output")


def _write(files: Mapping[str, bytes], output: Path) -> None:
    """The page first, by which the folder is known as a report's whatever happens to the rest."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name in sorted(files, key=lambda name: name != INDEX):
            replace_file(output / name, files[name], READABLE)
        for name in ALL_FILES - files.keys():
            (output / name).unlink(missing_ok=True)  # of an earlier report
    except OSError as error:
        raise ReportError(f"{output} cannot be written: {error.strerror or error}") from None
