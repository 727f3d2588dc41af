"""A step while it is computed, and what is recorded of it afterwards."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from protocol import Activations, Seconds

__all__ = ["StepInProgress", "StepRecord"]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A finished step: what metrics.jsonl says of it, and what whoever follows a run is given."""

    number: int
    """1, 2, ..."""
    loss: float
    """Nats per labelled token."""
    labelled_tokens: int
    tokens: int
    seconds: dict[str, Seconds]
    """By client: what it has spent since the step before."""
    deadline: float
    """Seconds that the next step waits for its clients' activations before it asks whether a quorum is there."""
    codec: str
    """In which this step's activations came."""
    server_compute: float
    """Seconds that the server computed, also while clients did not wait for it."""
    bytes_up: dict[str, int] = field(default_factory=dict)
    """By client, on the socket, WebSocket framing included, since the record before."""
    bytes_down: dict[str, int] = field(default_factory=dict)


@dataclass
class StepInProgress:
    """The sums of one step, from its first micro-batch until it is recorded."""

    micro_batch: int = 0
    """The one that is gathered or computed; 0 again once the last is computed, as of all questions without micro-batches."""
    labels_of: dict[str, int] = field(default_factory=dict)
    """Members whose first micro-batch is computed, and the labelled tokens of each so far. Nobody enters a step later."""
    tokens: int = 0
    """All rows computed, labelled or not."""
    loss: float = math.nan
    """Nats per labelled token so far; as the engine gives it, which has the sum."""
    labelled_tokens: int = 0
    server_compute: float = 0.0
    """Seconds of the engine, the aggregation's included."""

    def add(self, batches: Mapping[str, Activations]) -> None:
        """A micro-batch is going to be computed. The first one says who is in the step."""
        for name, batch in batches.items():
            self.labels_of[name] = self.labels_of.get(name, 0) + len(batch.labels)
            self.tokens += len(batch.values)

    def record(self, number: int, *, seconds: dict[str, Seconds], deadline: float, codec: str) -> StepRecord:
        """What is told of the step once its round's adapter, if it ends one, is made."""
        return StepRecord(
            number=number,
            loss=self.loss,
            labelled_tokens=self.labelled_tokens,
            tokens=self.tokens,
            seconds=seconds,
            deadline=deadline,
            codec=codec,
            server_compute=self.server_compute,
        )
