"""A bar where somebody watches, plain lines where nobody does."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from tqdm import tqdm

from .program import plain

__all__ = ["Progress", "show_log"]

SECONDS_BETWEEN_LINES = 5.0
BAR = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Progress:
    """
    Progress of something counted, on standard error.

    Args:
        total: how many units there are.
        done: units finished before this program started to look.
        unit: what is counted.
    """

    def __init__(self, total: int, done: int = 0, unit: str = "step") -> None:
        self._bar = tqdm(total=total, initial=done, bar_format=BAR, disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self._total, self._first, self._done, self._unit = total, done, done, unit
        self._start = self._last_line = time.monotonic()
        self._tokens = self._bytes = 0

    def update(self, number: int, loss: float, tokens: int, num_bytes: int) -> None:
        """A step is done: its number, its loss in nats per labelled token, its tokens, its bytes both ways."""
        # Not always the next: a server that went back to a checkpoint repeats some.
        self._done = number - 1
        self._bar.n = number - 1
        self._tokens += tokens
        self._bytes += num_bytes
        seconds = max(time.monotonic() - self._start, 1e-9)
        self.advance(f"loss {loss:.3f}, {self._tokens / seconds:,.0f} tokens/s, {_amount(self._bytes / seconds)}/s")

    def advance(self, figures: str) -> None:
        """One unit more, with whatever there is to say of it."""
        self._done += 1
        self._bar.set_postfix_str(figures, refresh=False)
        self._bar.update()
        now = time.monotonic()
        if self._bar.disable and (now - self._last_line > SECONDS_BETWEEN_LINES or self._done == self._total):
            self._last_line = now
            left = (self._total - self._done) * (now - self._start) / max(1, self._done - self._first)
            print(f"{self._unit} {self._done}/{self._total}: {figures}, {left:.0f} s left", file=sys.stderr, flush=True)  # noqa: T201

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class _Plain(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return plain(super().formatMessage(record))


class _AboveTheBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def show_log(name: str) -> Iterator[None]:
    """Show what the logger ``name`` has to say meanwhile, from INFO on, without disturbing a bar."""
    logger, handler = logging.getLogger(name), _AboveTheBar()
    handler.setFormatter(_Plain())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _amount(num_bytes: float) -> str:
    """In decimal units, as network speeds are given."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"
