"""
What an operator would like to be told of a run.

Whoever notices something calls `tell`. The lines in the log, in events.jsonl and on the page are the same event.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any

from terminal import plain

__all__ = ["EVENT_KINDS", "RunEvent", "moment", "tell", "telling_to"]

logger = logging.getLogger("gpu_server")

YEAR_10000 = 253402300800.0
"""Its beginning, in seconds since 1970: dates end there."""

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

EVENT_KINDS = {
    "server_started": "the server listens, for the first time or again",
    "joined": "a device takes part from the first step on",
    "back": "a device has a connection again",
    "lost": "a device has lost its connection, and keeps its place",
    "left": "a device takes part no longer",
    "refused": "somebody was not let in, or broke the protocol",
    "training_started": "all devices are there",
    "late": "the run has been waiting for devices",
    "overtaken": "a step went on without devices that were late",
    "takes_part_again": "a device that steps had gone on without is in the run again",
    "deadline": "it is known how long devices usually take",
    "codec": "the codec policy has decided something",
    "part_fetched": "a device has its part of the model",
    "next_key": "a device knows the key that the server will have next",
    "noise": "what the noise of a device is worth",
    "ended_early": "held-out losses have ended the run before its last step",
    "checkpoint": "the run can go on from here; told at most once a minute",
    "complete": "the last step is done, and the adapter is saved",
    "stopped": "the server was stopped before that",
    "failed": "the server has ended with an error",
    "note": "anything else",
}


@dataclass(frozen=True, kw_only=True)
class RunEvent:
    """Something that happened, at a moment."""

    time: float
    """Seconds since 1970, UTC."""
    kind: str
    """One of `EVENT_KINDS`."""
    text: str
    """A sentence or a part of one, without a secret in it."""
    level: str = "info"
    """debug, info, warning or error."""
    client: str | None = None
    """Whom it is about, if it is one client."""
    step: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    """Figures and names of this kind of event, as JSON has them."""

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None and value != {}}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "RunEvent":
        """
        Raises:
            KeyError, TypeError, ValueError, OverflowError: it is none.
        """
        client, step = line.get("client"), line.get("step")
        return cls(
            time=moment(line["time"]),
            kind=str(line["kind"]),
            text=str(line["text"]),
            level=str(line.get("level", "info")),
            client=None if client is None else str(client),
            step=None if step is None else int(step),
            details=dict(line.get("details", {})),
        )


def moment(value: Any) -> float:
    """
    A time as a line has it: seconds since 1970, of which a date can be made.

    Raises:
        TypeError, ValueError, OverflowError: it is none.
    """
    seconds = float(value)
    if not 0.0 <= seconds < YEAR_10000:
        raise ValueError(f"{seconds} is no time")
    return seconds


_told: ContextVar[Callable[[RunEvent], None] | None] = ContextVar("told", default=None)


@contextmanager
def telling_to(sink: Callable[[RunEvent], None]) -> Iterator[None]:
    """
    Meanwhile give ``sink`` every event that is told in this context, its asyncio tasks and `asyncio.to_thread` included; so two
    servers in one process do not hear each other's. It is called on the thread that tells.
    """
    before = _told.set(sink)
    try:
        yield
    finally:
        _told.reset(before)


def tell(
    kind: str,
    text: str,
    *,
    level: str = "info",
    client: str | None = None,
    step: int | None = None,
    quiet: bool = False,
    **details: Any,
) -> None:
    """
    Say in the log what has happened, and give it to whoever follows the run.

    Args:
        text: may have somebody else's words in it, which are made plain.
        quiet: whether the log has it only for whoever debugs.
        details: see `RunEvent`.
    """
    assert kind in EVENT_KINDS
    text = plain(text)
    event = RunEvent(time=time.time(), kind=kind, text=text, level=level, client=client, step=step, details=details)
    logger.log(logging.DEBUG if quiet else LEVELS[level], "%s", text, extra={"event": event.as_json()})
    sink = _told.get()
    if sink is not None:
        sink(event)
