"""What a person sees and types in a terminal: progress, one sentence for what went wrong, paths."""

from .bottleneck import where_time_went
from .packages import PackageMissing, import_onnxruntime, importing
from .program import Parser, PathError, plain, run_program, user_path, user_text_path, version
from .progress import Progress, show_log
from .reminders import Reminders
from .words import amount, count, duration, in_words, listed

__all__ = [
    "PackageMissing",
    "Parser",
    "PathError",
    "Progress",
    "Reminders",
    "amount",
    "count",
    "duration",
    "import_onnxruntime",
    "importing",
    "in_words",
    "listed",
    "plain",
    "run_program",
    "show_log",
    "user_path",
    "user_text_path",
    "version",
    "where_time_went",
]
