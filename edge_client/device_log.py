"""
What a device sees of a run, told once: for the terminal, and for a file in its folder for state that outlives the run.

The file is JSON, a line an event, in the form of the server's events.jsonl. None of the owner's texts is in it, and no secret.
"""

import json
import logging
import os
import sys
import time
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

from terminal import plain

__all__ = ["DEVICE_EVENTS", "DeviceLog"]

logger = logging.getLogger("edge_client")

LARGEST_FILE = 2**22  # bytes, some 10,000 steps
OLDER_FILES = 3
"""Beside the newest. So a log takes 16 MiB at most, however long a device runs."""

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

DEVICE_EVENTS = {
    "started": "this device takes part in a run from here on, for the first time or again",
    "step": "a step is done: its loss, and what this device has spent in it",
    "evaluated": "the loss of the held-out texts",
    "lost": "there is no connection",
    "back": "there is one again",
    "waiting": "this device has waited for an answer for long, and why",
    "missed": "the run has gone on without this device",
    "sent_back": "the server takes back what this device has done",
    "ended_early": "the server ends the run before the last step for which this device has data",
    "refused": "the server takes this device no more",
    "left": "the user has ended it",
    "stopped": "it has ended before the run was over, and may be started again",
    "done": "the run is over",
    "note": "anything else",
}


class DeviceLog:
    """
    Args:
        client: this device's name in the run.
        path: of the file; None writes none.
    """

    def __init__(self, client: str, path: Path | None) -> None:
        self.path, self._client = path, client
        self._lines = logging.Logger("lines of the device's log")  # of this object alone: nobody else writes to its file
        if path is not None:
            self._lines.addHandler(_Lines(path))

    def tell(self, kind: str, text: str, *, level: str = "info", step: int | None = None, **details: Any) -> None:
        """
        Say what has happened. It may be called on any thread.

        Args:
            kind: one of `DEVICE_EVENTS`.
            text: may have somebody else's words in it, which are made plain.
            level: debug, info, warning or error; the terminal shows people what is more than debug.
            details: figures and names, as JSON has them.
        """
        assert kind in DEVICE_EVENTS
        text = plain(text)
        event = {"time": round(time.time(), 3), "kind": kind, "text": text, "level": level, "client": self._client}
        if step is not None:
            event["step"] = step
        if details:
            event["details"] = details
        logger.log(LEVELS[level], "%s", text, extra={"event": event})
        self._lines.info("%s", json.dumps(event))


class _Lines(RotatingFileHandler):
    """
    A file that its owner alone may read, and that is open only while a line is written: there is nothing to close. Where it
    cannot be written, that is said once, and the training goes on: no result depends on it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=LARGEST_FILE, backupCount=OLDER_FILES, encoding="utf-8", delay=True)
        self._has_failed = self._is_mended = False

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        stream, self.stream = self.stream, None
        if stream is not None:
            with suppress(OSError):  # of what could not be written it was said already
                stream.close()

    def _open(self) -> TextIO:  # type: ignore[override]  # typeshed names the wrapper that it is anyway
        path = Path(self.baseFilename)
        path.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
        is_torn, self._is_mended = not self._is_mended and _is_torn(path), True
        file = open(path, "a", encoding="utf-8", opener=_private)  # noqa: SIM115  # `emit` closes it
        if is_torn:
            file.write("\n")
        return file

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            raise
        if not self._has_failed:
            self._has_failed = True
            logger.warning(
                "what this device sees cannot be written to %s: %s; it goes on without",
                self.baseFilename,
                error.strerror or error,
            )


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o600)


def _is_torn(path: Path) -> bool:
    """Whether a process that was killed has left half a line."""
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:
        return False  # there is none, or nothing in it
