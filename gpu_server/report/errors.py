"""What goes wrong with a report."""

from ..errors import ServerError

__all__ = ["ReportError", "RunsLeftOut"]


class ReportError(ServerError):
    """A report cannot be made or written."""


class RunsLeftOut(ReportError):
    """A report is written, but not all runs are in it."""
