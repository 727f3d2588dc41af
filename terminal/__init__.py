"""What a person sees in a terminal: progress, and one sentence for what went wrong. The programs speak with one voice."""

from .bottleneck import where_time_went
from .program import plain, run_program, version
from .progress import Progress, show_log
from .words import count, duration, listed

__all__ = ["Progress", "count", "duration", "listed", "plain", "run_program", "show_log", "version", "where_time_went"]
