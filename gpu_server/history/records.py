"""A run's lines as JSON: of its steps, and of its held-out losses."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from protocol import Seconds

from ..federation import StepRecord

__all__ = ["EvaluationRecord", "record_of", "row_of"]

PARTS = [item.name for item in fields(Seconds)]


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
            KeyError, TypeError, ValueError: it is none.
        """
        return cls(
            step=int(line["step"]),
            time=float(line["time"]),
            client=str(line["client"]),
            loss=float(line["loss"]),
            labelled_tokens=int(line["labelled_tokens"]),
        )


def row_of(record: StepRecord) -> dict[str, Any]:
    """A step as metrics.jsonl has it."""
    return {
        "step": record.number,
        "loss": record.loss,
        "labelled_tokens": record.labelled_tokens,
        "tokens": record.tokens,
        "deadline": round(record.deadline, 3),
        "codec": record.codec,
        "server_compute": round(record.server_compute, 6),
        "clients": {
            name: {
                "bytes_up": record.bytes_up[name],
                "bytes_down": record.bytes_down[name],
                "seconds": {part: round(value, 6) for part, value in vars(record.seconds.get(name, Seconds())).items()},
            }
            for name in record.bytes_up
        },
    }


def record_of(row: Mapping[str, Any]) -> StepRecord:
    """
    What `row_of` was made of. Members that this version does not know are left out; those that an earlier version did not write
    have their defaults.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is no step.
    """
    clients: Mapping[str, Mapping[str, Any]] = row["clients"]
    spent = {name: client.get("seconds", {}) for name, client in clients.items()}
    return StepRecord(
        number=int(row["step"]),
        loss=_number(row["loss"]),
        labelled_tokens=int(row["labelled_tokens"]),
        tokens=int(row["tokens"]),
        deadline=float(row.get("deadline", 0.0)),
        codec=str(row.get("codec", "")),
        server_compute=float(row.get("server_compute", 0.0)),
        seconds={name: Seconds(**{part: float(parts.get(part, 0.0)) for part in PARTS}) for name, parts in spent.items()},
        bytes_up={name: int(client["bytes_up"]) for name, client in clients.items()},
        bytes_down={name: int(client["bytes_down"]) for name, client in clients.items()},
    )


def _number(value: Any) -> float:
    """JSON has no NaN: None stands for it."""
    return math.nan if value is None else float(value)
