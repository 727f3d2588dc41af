"""What happened in a run: steps, events, held-out losses. As they come, and as files that outlive the server."""

from .curve import Curve
from .events import EVENT_KINDS, RunEvent, tell, telling_to
from .overview import ADVICE, Overview
from .records import MOST_CLIENTS, TOGETHER, EvaluationRecord, record_of, row_of
from .run_files import HistoryError, RunFiles, checkpoint_files

__all__ = [
    "ADVICE",
    "EVENT_KINDS",
    "MOST_CLIENTS",
    "TOGETHER",
    "Curve",
    "EvaluationRecord",
    "HistoryError",
    "Overview",
    "RunEvent",
    "RunFiles",
    "checkpoint_files",
    "record_of",
    "row_of",
    "tell",
    "telling_to",
]
