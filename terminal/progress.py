"""A bar where somebody watches, plain lines where nobody does."""

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from tqdm import tqdm

from .program import plain
from .words import amount, duration

__all__ = ["Progress", "show_log"]

SHORTEST_BETWEEN_LINES, LONGEST_BETWEEN_LINES = 5.0, 600.0
"""Seconds. A run of weeks leaves no line every five seconds in a journal: the longer it takes, the rarer they are."""
SHORTEST_BAR = 8  # columns; where the terminal is too narrow for it, figures are left out, then the bar itself
CLEAR_LINE, UP = "\x1b[K", "\x1b[A"
DOWN_AND_CLEAR = "\x1b[B\x1b[K"  # line by line: where all of the screen is cleared at once, some keep it in their history


class Progress:
    """
    Progress of something counted, on standard error.

    Args:
        total: how many units there are.
        done: units finished before this program started to look.
        unit: what is counted.
        silent: show nothing: standard error is read by a program.
    """

    def __init__(self, total: int, done: int = 0, unit: str = "step", *, silent: bool = False) -> None:
        self._is_silent = silent
        watched = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._bar = _Bar(total=total, initial=done, disable=silent or not watched, file=sys.stderr)
        self._total, self._done, self._unit = total, done, unit
        self._first: tuple[int, float] | None = None
        """
        The first unit that was finished, and when. Speeds are measured from there: of its own time nothing is known where this
        program began to look when it was over.
        """
        self._began = self._last_line = time.monotonic()
        self._tokens = self._bytes = 0
        self._stop_following = _follow_width(self._bar)

    def update(self, *, step: int, loss: float, tokens: int, num_bytes: int) -> None:
        """
        A step is done.

        Args:
            step: its number.
            loss: in nats per labelled token.
            num_bytes: both ways.
        """
        # Not always the next: a server that went back to a checkpoint repeats some.
        self._done = step - 1
        self._bar.n = step - 1
        figures = f"loss {loss:.3f}"
        if self._first is not None:
            self._tokens += tokens
            self._bytes += num_bytes
            seconds = max(time.monotonic() - self._first[1], 1e-9)
            figures += f", {self._tokens / seconds:,.0f} tokens/s, {amount(self._bytes / seconds)}/s"
        self.advance(figures)

    def advance(self, figures: str, units: int = 1) -> None:
        """So many units more, with whatever there is to say of them, the most important first, separated by ", "."""
        now = time.monotonic()
        self._done += units
        if self._first is None:
            self._first = self._done, now
        since_first, seconds = self._done - self._first[0], now - self._first[1]
        if since_first > 0:
            first, *others = figures.split(", ")
            figures = ", ".join([first, f"{duration((self._total - self._done) * seconds / since_first)} left", *others])
        self._bar.figures = figures
        self._bar.update(units)
        between = min(max(SHORTEST_BETWEEN_LINES, (now - self._began) / 20), LONGEST_BETWEEN_LINES)
        is_due = now - self._last_line > between or self._done == self._total
        if self._bar.disable and not self._is_silent and is_due:
            self._last_line = now
            print(f"{self._unit} {self._done}/{self._total}: {figures}", file=sys.stderr, flush=True)  # noqa: T201

    def close(self) -> None:
        self._stop_following()
        self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class _Bar(tqdm):  # type: ignore[misc]
    """One line that fits the terminal as wide as it is now."""

    figures = ""

    def __str__(self) -> str:
        meter = self.format_dict
        # The last column stays free: a terminal that has written there may wrap the line.
        meter["ncols"] = max(1, _columns(self.fp) - 1)
        for form in self._forms():
            room = meter["ncols"] - len(form.format(percentage=0, n_fmt=meter["n"], total_fmt=meter["total"], bar=""))
            if room >= (SHORTEST_BAR if "{bar}" in form else 0):
                break
        meter["bar_format"] = form
        return str(self.format_meter(**meter))

    def _forms(self) -> Iterator[str]:
        """From all there is to say to the least; the last is cut off where even that is too long."""
        figures = [f", {figure}".replace("{", "{{").replace("}", "}}") for figure in self.figures.split(", ") if figure]
        for number in range(max(1, len(figures)), 0, -1):
            yield "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt}" + "".join(figures[:number])
        yield "{n_fmt}/{total_fmt}" + "".join(figures[:1])
        yield "{n_fmt}/{total_fmt}"

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """
        The cursor waits at the beginning of the line. Terminals that become narrower break it into several, and move the cursor
        with its beginning; so what has to be cleared begins there.
        """
        before = ""

        def show(text: str) -> None:
            nonlocal before
            more = max(0, len(before) - 1) // _columns(file)
            file.write(f"\r{CLEAR_LINE}{DOWN_AND_CLEAR * more}{UP * more}{text}\r")
            file.flush()
            before = text

        return show


def _columns(file: Any) -> int:
    try:
        return max(1, os.get_terminal_size(file.fileno()).columns)
    except (OSError, ValueError, AttributeError):
        return 80  # nobody knows


def _follow_width(bar: _Bar) -> Callable[[], None]:
    """Draw the bar again whenever the terminal has another size, until what is returned is called."""
    if bar.disable or not hasattr(signal, "SIGWINCH") or threading.current_thread() is not threading.main_thread():
        return lambda: None

    def draw(_number: int, _frame: FrameType | None) -> None:
        with suppress(RuntimeError):  # in the middle of writing to the same stream: the next unit draws it
            bar.refresh()

    def stop() -> None:
        signal.signal(signal.SIGWINCH, before)

    before = signal.signal(signal.SIGWINCH, draw)
    return stop


class _Json(logging.Formatter):
    """A line an event, for log collectors."""

    def format(self, record: logging.LogRecord) -> str:
        text = plain(record.getMessage())
        event = {"time": round(record.created, 6), "kind": "note", "level": record.levelname.lower(), "text": text}
        return json.dumps({**event, **getattr(record, "event", {})})


def _is_event(record: logging.LogRecord) -> bool:
    return hasattr(record, "event") or record.levelno >= logging.INFO


class _Plain(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return plain(super().formatMessage(record))


class _AboveTheBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def show_log(name: str, form: str = "text") -> Iterator[None]:
    """
    Show what the logger ``name`` has to say meanwhile, without disturbing a bar: from INFO on, or from DEBUG on where the
    environment has SPLITLORA_LOG=debug. Then messages are seen that the protocol's rules ignore, with the reason.

    Args:
        form: "text", or "json": an object a line, and of records that have an ``event``, whatever their level, that.
    """
    is_debugged = os.environ.get("SPLITLORA_LOG", "").lower() == "debug"
    level = logging.DEBUG if is_debugged or form == "json" else logging.INFO
    handler = _AboveTheBar()
    if form == "json":
        handler.setFormatter(_Json())
        if not is_debugged:
            handler.addFilter(_is_event)
    else:
        handler.setFormatter(_Plain("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    before = [(logger, logger.level) for logger in (logging.getLogger(name), logging.getLogger("protocol"))]
    for logger, _ in before:
        logger.addHandler(handler)
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, level_before in before:
            logger.removeHandler(handler)
            logger.setLevel(level_before)
