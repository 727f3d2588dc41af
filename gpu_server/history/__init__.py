"""What happened in a run: steps, events, held-out losses. As they come, and as files that outlive the server."""

from .events import EVENT_KINDS, RunEvent, tell, telling_to
from .records import EvaluationRecord, record_of, row_of
from .run_files import HistoryError, RunFiles

__all__ = [
    "EVENT_KINDS",
    "EvaluationRecord",
    "HistoryError",
    "RunEvent",
    "RunFiles",
    "record_of",
    "row_of",
    "tell",
    "telling_to",
]
