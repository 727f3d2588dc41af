"""Runs laid side by side: a page, pictures and tables of what they have written."""

from collections.abc import Sequence
from pathlib import Path

from terminal import importing

from .errors import ReportError, RunsLeftOut

__all__ = ["ReportError", "RunsLeftOut", "write_report"]


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """
    Lay runs side by side, and show progress on standard error.

    Args:
        output: a folder for index.html, pictures and tables. An earlier report in it is replaced.

    Returns:
        The page's path.

    Raises:
        RunsLeftOut: the report is written without some of the runs; the message says why.
        ReportError: none of the runs can be read, or the folder holds something else or cannot be written.
        PackageMissing: matplotlib is not installed.
    """
    with importing("a report", install="splitlora[report]"):
        from .report import write
    return write(runs, output)
