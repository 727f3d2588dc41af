"""A run's lines as JSON: of its steps, and of its held-out losses."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from protocol import Seconds

from ..federation import StepRecord
from .events import moment

__all__ = ["MOST_CLIENTS", "TOGETHER", "EvaluationRecord", "finite", "mean_of", "record_of", "row_of"]

PARTS = [item.name for item in fields(Seconds)]
MOST_CLIENTS = 1000
"""
Of more, nothing is kept of each in every step: a line would be megabytes. It says then what they are `TOGETHER`, and whoever
adds up a line has the same sums.
"""
TOGETHER = "*"
"""Stands in a line for all clients; no client has this name."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """The held-out loss of one client, as its device has measured it."""

    step: int
    """After this step."""
    time: float
    """When the server heard of it, in seconds since 1970, UTC."""
    client: str
    loss: float
    """Nats per labelled token."""
    labelled_tokens: int

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "EvaluationRecord":
        """
        Raises:
            KeyError, TypeError, ValueError, OverflowError: it is none.
        """
        return cls(
            step=int(line["step"]),
            time=moment(line["time"]),
            client=str(line["client"]),
            loss=float(line["loss"]),
            labelled_tokens=int(line["labelled_tokens"]),
        )


def mean_of(records: Sequence[EvaluationRecord]) -> EvaluationRecord:
    """Of clients after one step: the loss over all their labels together. It is nobody's: ``client`` is empty."""
    labelled_tokens = sum(record.labelled_tokens for record in records)
    loss = sum(record.loss * record.labelled_tokens for record in records) / max(1, labelled_tokens)
    step, time = records[-1].step, records[-1].time
    return EvaluationRecord(step=step, time=time, client="", loss=loss, labelled_tokens=labelled_tokens)


def row_of(record: StepRecord) -> dict[str, Any]:
    """A step as metrics.jsonl has it."""
    names = sorted({*record.bytes_up, *record.seconds, *record.labelled})
    is_too_long = record.together or len(names) > MOST_CLIENTS
    return {
        "step": record.number,
        "time": round(record.time, 3),
        "step_seconds": round(record.step_seconds, 6),
        "loss": finite(record.loss),
        "learning_rate": finite(record.learning_rate),
        "gradient_norm": finite(record.gradient_norm),
        "labelled_tokens": record.labelled_tokens,
        "tokens": record.tokens,
        "deadline": round(record.deadline, 3),
        "codec": record.codec,
        "server_compute": round(record.server_compute, 6),
        "clients": {TOGETHER: _row_of_all(record)} if is_too_long else {name: _row_of_client(record, name) for name in names},
    }


def _row_of_client(record: StepRecord, name: str) -> dict[str, Any]:
    """Who is connected and was not in the step has no loss, labels or samples."""
    row: dict[str, Any] = {}
    if name in record.labelled:
        row = {
            "loss": record.losses.get(name),
            "labelled_tokens": record.labelled[name],
            "samples": record.samples.get(name, 0),
            "tokens": record.tokens_of.get(name, 0),
        }
    return {
        **row,
        "bytes_up": record.bytes_up.get(name, 0),
        "bytes_down": record.bytes_down.get(name, 0),
        "seconds": _rounded(record.seconds.get(name, Seconds())),
    }


def _row_of_all(record: StepRecord) -> dict[str, Any]:
    return {
        "clients": record.num_taking_part,
        "loss": finite(record.loss),
        "labelled_tokens": sum(record.labelled.values()),
        "samples": sum(record.samples.values()),
        "tokens": sum(record.tokens_of.values()),
        "bytes_up": sum(record.bytes_up.values()),
        "bytes_down": sum(record.bytes_down.values()),
        "seconds": _rounded(sum(record.seconds.values(), Seconds())),
    }


def _rounded(seconds: Seconds) -> dict[str, float]:
    return {part: round(value, 6) for part, value in vars(seconds).items()}


def record_of(row: Mapping[str, Any]) -> StepRecord:
    """
    What `row_of` was made of. Members that this version does not know are left out; those that an earlier version did not write
    have their defaults.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, OverflowError: it is no step.
    """
    clients: Mapping[str, Mapping[str, Any]] = row["clients"]
    spent = {name: client.get("seconds", {}) for name, client in clients.items()}
    return StepRecord(
        number=int(row["step"]),
        time=moment(row.get("time", 0.0)),
        step_seconds=float(row.get("step_seconds", 0.0)),
        loss=_number(row["loss"]),
        learning_rate=_number(row.get("learning_rate")),
        gradient_norm=_number(row.get("gradient_norm")),
        labelled_tokens=int(row["labelled_tokens"]),
        tokens=int(row["tokens"]),
        deadline=float(row.get("deadline", 0.0)),
        codec=str(row.get("codec", "")),
        server_compute=float(row.get("server_compute", 0.0)),
        seconds={name: Seconds(**{part: float(parts.get(part, 0.0)) for part in PARTS}) for name, parts in spent.items()},
        bytes_up={name: int(client["bytes_up"]) for name, client in clients.items()},
        bytes_down={name: int(client["bytes_down"]) for name, client in clients.items()},
        losses={name: float(client["loss"]) for name, client in clients.items() if client.get("loss") is not None},
        labelled={name: int(client["labelled_tokens"]) for name, client in clients.items() if "labelled_tokens" in client},
        samples={name: int(client["samples"]) for name, client in clients.items() if "samples" in client},
        tokens_of={name: int(client["tokens"]) for name, client in clients.items() if "tokens" in client},
        together=int(clients[TOGETHER]["clients"]) if TOGETHER in clients else 0,
    )


def finite(value: float | None) -> float | None:
    """None for what JSON has no number for: NaN and infinity."""
    return value if value is not None and math.isfinite(value) else None


def _number(value: Any) -> float:
    """None, which `finite` has written, is NaN."""
    return math.nan if value is None else float(value)
